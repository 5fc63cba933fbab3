"""Evaluate embeddings by their nearest neighbors: the accuracy of a kNN vote for many k.

    python knn_eval.py                           # every run under runs/
    python knn_eval.py runs/a runs/b --pixels    # two runs, and the raw pixels of their data set
    python knn_eval.py features.npz --metric euclidean --vote distance --ks 1 5 20

An input is a run folder, or an .npz with train_features [N, D], train_labels [N], test_features
[M, D] and test_labels [M]. knn.json, knn.csv and embedding_2d.png are written next to each input,
knn.png next to the first one. k is chosen by leave-one-out, without the test labels.

To sweep k in your own code, copy everything above `Args`: NumPy, scikit-learn and tqdm are enough
on a CPU, and PyTorch searches on a GPU. README.md, section kNN evaluation, explains the votes.
"""

import csv
import io
import json
import re
import shlex
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import numpy as np
import sklearn
import tyro
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize
from sklearn.utils import check_array, check_consistent_length
from tqdm import tqdm

# Bytes that one chunk of queries takes.
BUDGET = 2**28


def knn_sweep(
    train_features,
    train_labels,
    test_features,
    ks,
    metric="cosine",
    vote="uniform",
    temperature=0.07,
    device=None,
):
    """Predict labels by a vote of the k nearest training points, for every k from one search.

    train_features [N, D], train_labels [N] and test_features [M, D] are NumPy arrays. Without
    test_features (None), each training point is predicted from the others (leave-one-out).
    Returns a dict from each k to the predicted labels [M]; raises ValueError on bad arguments.

    metric: "euclidean", or "cosine" (Euclidean distance between L2-normalized rows).
    vote: "uniform" (majority), "distance" (1 / distance), "softmax" (exp(similarity / temperature),
        cosine only; Wu et al. 2018, arXiv:1805.01978), "balanced" (votes of a class over its number
        of training points). The smallest label wins a tied vote.
    device: None searches with scikit-learn on the CPU, a PyTorch device searches there in float64.

    Predictions ("uniform", "distance") equal those of scikit-learn's KNeighborsClassifier, except
    where training points of different labels at the same distance straddle k.
    """
    train, ks = _prepare(train_features, metric), sorted(set(ks))
    leave_one_out = test_features is None
    test = train if leave_one_out else _prepare(test_features, metric)
    check_consistent_length(train, train_labels)
    if not ks or ks[0] < 1 or ks[-1] > len(train) - leave_one_out:
        raise ValueError(f"needs 1 <= k <= {len(train) - leave_one_out}, not {ks}")
    if vote == "softmax" and metric != "cosine":
        raise ValueError("vote softmax needs metric cosine")
    classes, train_ids, sizes = np.unique(train_labels, return_inverse=True, return_counts=True)
    # A collapsed encoder has no nearest neighbors: predict the majority class.
    if (train == train[0]).all():
        return {k: np.full(len(test), classes[sizes.argmax()]) for k in ks}
    kneighbors = NearestNeighbors(algorithm="brute").fit(train).kneighbors
    query_bytes = 64 * ks[-1] + 32 * len(classes)
    if device is not None:
        kneighbors = _torch_kneighbors(train, device)
        query_bytes += 8 * len(train)
    predictions = {k: np.empty(len(test), classes.dtype) for k in ks}
    chunk = min(4096, max(1, BUDGET // query_bytes))
    starts = range(0, len(test), chunk)
    for start in tqdm(starts, "neighbors", leave=False, delay=5, disable=None):
        distances, neighbors = kneighbors(test[start : start + chunk], ks[-1] + leave_one_out)
        rows = np.arange(len(distances))
        points = np.tile(sizes, (len(rows), 1))
        if leave_one_out:
            distances, neighbors = _drop_self(distances, neighbors, start + rows)
            points[rows, train_ids[start + rows]] -= 1
        weights, ids = _vote_weights(distances, vote, temperature), train_ids[neighbors]
        votes = np.zeros(points.shape)
        for k in range(1, ks[-1] + 1):
            votes[rows, ids[:, k - 1]] += weights[:, k - 1]
            if k in predictions:
                shares = votes / points.clip(1) if vote == "balanced" else votes
                predictions[k][start : start + chunk] = classes[shares.argmax(axis=1)]
    return predictions


def _prepare(features, metric):
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"unknown metric {metric!r}")
    features = check_array(features, dtype=[np.float32, np.float64], order="C")
    return normalize(features) if metric == "cosine" else features


def _torch_kneighbors(train, device):
    """Exact search on a PyTorch device: a function like NearestNeighbors.kneighbors."""
    import torch

    # float64: TF32 matrix products would change neighbors.
    train = torch.from_numpy(train).to(device, torch.float64)

    def kneighbors(queries, k):
        distances = torch.cdist(torch.from_numpy(queries).to(train), train)
        return [part.cpu().numpy() for part in distances.topk(k, largest=False)]

    return kneighbors


def _drop_self(distances, neighbors, own):
    """Leave-one-out: of k + 1 neighbors per query [m, k + 1], keep the k that are not itself."""
    others = neighbors != own[:, None]
    # Among many equal points, the search may not return the query itself.
    others[others.all(axis=1), -1] = False
    return distances[others].reshape(len(own), -1), neighbors[others].reshape(len(own), -1)


def _vote_weights(distances, vote, temperature):
    """Weight of each neighbor's vote [m, k], given its distance."""
    if vote == "distance":
        # Where training points equal the query, only those vote.
        equal = distances[:, :1] == 0
        return np.where(equal, distances == 0, 1 / np.where(equal, 1, distances))
    if vote == "softmax":
        # similarity = 1 - distance**2 / 2, relative to the nearest neighbor against underflow.
        return np.exp((distances[:, :1] ** 2 - distances**2) / 2 / temperature)
    if vote in ("uniform", "balanced"):
        return np.ones_like(distances)
    raise ValueError(f"unknown vote {vote!r}")


@dataclass
class Args:
    """Sweep k over embeddings: test accuracy of a vote of the k nearest training points."""

    inputs: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[RUN ...]")
    ] = ()
    """run folders or .npz files (none: every run under runs/)"""
    ks: tuple[int, ...] = (1, 2, 3, 4, 5, 10, 20, 50, 70, 100, 200, 500, 1000)
    """numbers of neighbors; those above the number of training points are dropped"""
    metric: Literal["cosine", "euclidean"] = "cosine"
    """distance between features"""
    vote: Literal["uniform", "distance", "softmax", "balanced"] = "uniform"
    """majority; 1 / distance; exp(similarity / temperature); share of a class's training points"""
    temperature: float = 0.07
    """temperature of the softmax vote"""
    loo: bool = True
    """choose k by leave-one-out on the training points"""
    pixels: bool = False
    """also evaluate the raw pixels of the runs' data sets"""
    cache_dir: str = "cache"
    """folder in which the runs keep the decoded images of a folder"""
    probe: bool = False
    """also fit a linear probe: logistic regression on the frozen features, no augmentation"""
    confusion: bool = False
    """print the confusion matrix at the chosen k"""
    embedding_2d: Literal["pca", "tsne", "none"] = "pca"
    """projection for the 2-D plot of the test features"""
    output: str | None = None
    """folder for all files (unset: next to each input)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """device of the neighbor search"""
    track: bool = False
    """log to Weights & Biases"""
    wandb_project: str = "ssl"
    """Weights & Biases project"""


def read_embeddings(path):
    """Arrays, class names and meta of an embeddings.npz, without unlabelled rows. UserError."""
    from common import check, read_npz, user_errors

    where, parts = repr(str(path)), ("train", "test")
    check(path.is_file(), f"{where} does not exist; name a finished run's folder or an .npz file")
    needed = ["train_features", "train_labels", "test_features", "test_labels"]
    data = {"class_names": [], "meta": "{}", **read_npz(path, needed, ["class_names", "meta"])}
    for part in parts:
        features, labels = data[f"{part}_features"], data[f"{part}_labels"]
        is_matrix = features.dtype.kind == "f" and features.ndim == 2 and features.size
        is_labels = labels.dtype.kind in "iu" and labels.shape == features.shape[:1]
        check(
            is_matrix and is_labels,
            f"{where}: {part}_features must be float [N, D] and {part}_labels integers [N], not "
            f"{features.dtype} {list(features.shape)} and {labels.dtype} {list(labels.shape)}",
        )
        finite = np.isfinite(features).all()
        check(finite, f"{where}: {part}_features has values that are not finite")
        keep = labels != -1
        check(keep.any(), f"{where}: all {part} images are unlabelled: nothing to evaluate")
        if not keep.all():
            print(f"{where}: dropped {(~keep).sum()} unlabelled of {len(keep)} {part} images")
        data[f"{part}_features"] = features[keep]
        data[f"{part}_labels"] = labels[keep].astype(np.int64)
    train, test = (data[f"{part}_features"].shape[1] for part in parts)
    check(train == test, f"{where}: train_features have D = {train}, test_features D = {test}")
    with user_errors(f"{where}: meta must be a JSON object", (TypeError, ValueError)):
        data["meta"] = dict(json.loads(str(data["meta"])))
    return data


def read_inputs(args):
    """Every input (none given: every run under runs/), its name and output folder. UserError."""
    from common import UserError, check

    inputs = []
    for path in map(Path, args.inputs or sorted(Path("runs").glob("*/"))):
        path = path / "embeddings.npz" if path.is_dir() else path
        try:
            data = read_embeddings(path)
        except UserError as error:
            if args.inputs:
                raise
            # An unfinished or unlabelled run does not stop the others.
            print(f"left out: {error}", file=sys.stderr)
            continue
        full = path.resolve()
        name = full.parent.name if full.name == "embeddings.npz" else full.stem
        name = re.sub(r"[^\w.-]", "_", name)
        folder = Path(args.output or path.parent)
        inputs.append(SimpleNamespace(name=name, folder=folder, pixels=False, **data))
    check(inputs, "no run under runs/ to evaluate; train one (python simclr.py) or name an .npz")
    unique = len({entry.name for entry in inputs}) == len(inputs)
    folders = [entry.folder for entry in inputs]
    for i, entry in enumerate(inputs, 1):
        entry.name += "" if unique else f"-{i}"
        entry.prefix = f"{entry.name}-" if folders.count(entry.folder) > 1 else ""
    return inputs


def read_pixels(inputs, cache_dir):
    """The raw pixels of every data set that the inputs' meta names. UserError."""
    from common import check, load_images, square

    keys = ("dataset", "data_dir", "image_size")
    sources = dict.fromkeys(tuple(map(entry.meta.get, keys)) for entry in inputs)
    sources.pop((None, None, None), None)
    check(sources, "--pixels needs a run: no input's meta names a data set")
    entries = []
    for i, source in enumerate(sources, 1):
        images = load_images(*source, cache_dir=cache_dir)
        entry = SimpleNamespace(name=f"pixels of {source[0]}", folder=inputs[0].folder, pixels=True)
        entry.meta, entry.class_names = dict(zip(keys, source)), images.class_names
        entry.prefix = f"pixels{i}-" if len(sources) > 1 else "pixels-"
        for part in ("train", "test"):
            pixels, labels = getattr(images, part), getattr(images, f"{part}_labels")
            rows = (labels != -1).nonzero().flatten()
            check(len(rows), f"--pixels: {source[0]} has no labelled {part} images")
            pixels = [square(pixels[some], images.size).numpy() for some in rows.split(1024)]
            # The three channels of gray images are equal.
            pixels = np.concatenate(pixels)[:, : 1 if images.gray else 3]
            setattr(entry, f"{part}_features", pixels.reshape(len(rows), -1))
            setattr(entry, f"{part}_labels", labels[rows].numpy())
        entries.append(entry)
    return entries


def linear_probe(entry):
    """Logistic regression on standardized frozen features, C chosen on a fifth of the training set.

    Returns None if there is one class, or a class with fewer than five training points.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels, sizes = entry.train_labels, np.unique(entry.train_labels, return_counts=True)[1]
    if len(sizes) < 2 or sizes.min() < 5:
        return None
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    grid = {"logisticregression__C": [0.001, 0.01, 0.1, 1, 10]}
    fifth = max(len(sizes), len(labels) // 5)
    held_out = StratifiedShuffleSplit(1, test_size=fifth, random_state=0)
    with warnings.catch_warnings():
        # Not converged after 1,000 iterations is good enough to compare.
        warnings.simplefilter("ignore")
        probe = GridSearchCV(probe, grid, cv=held_out)
        probe.fit(entry.train_features, labels)
    accuracy = probe.score(entry.test_features, entry.test_labels)
    return {"C": probe.best_params_["logisticregression__C"], "test_accuracy": accuracy}


def measure(k, predicted, truth):
    """The row of one k in knn.json."""
    from scipy.stats import binomtest
    from sklearn.metrics import recall_score

    correct = int((predicted == truth).sum())
    interval = binomtest(correct, len(truth)).proportion_ci(method="wilson")
    per_class = recall_score(truth, predicted, labels=np.unique(truth), average=None)
    return {
        "k": k,
        "accuracy": correct / len(truth),
        "low": interval.low,
        "high": interval.high,
        "leave_one_out": None,
        "balanced_accuracy": per_class.mean(),
        "per_class": per_class.tolist(),
    }


def evaluate(entry, args, device):
    """Sweep k over one input. Returns the content of its knn.json. UserError."""
    from sklearn.metrics import confusion_matrix

    from common import check

    train, labels, truth = entry.train_features, entry.train_labels, entry.test_labels
    name, n = entry.name, len(train)
    ks = [k for k in sorted(set(args.ks)) if k <= n]
    check(ks, f"{name}: --ks {min(args.ks)} is above the {n} training points; give a smaller one")
    if max(args.ks) > n:
        print(f"{name}: dropped every k above {n}, the number of training points")

    options = (args.metric, args.vote, args.temperature, device)
    predictions = knn_sweep(train, labels, entry.test_features, ks, *options)
    rows = [measure(k, predictions[k], truth) for k in ks]
    chosen = rows[0] if len(ks) == 1 else None
    chosen_by = "being the only k" if chosen else None
    loo_ks = [k for k in ks if args.loo and k < n]
    if loo_ks:
        loo = knn_sweep(train, labels, None, loo_ks, *options)
        for row, predicted in zip(rows, loo.values()):
            row["leave_one_out"] = float((predicted == labels).mean())
        # The smallest k wins a tie.
        chosen = max(rows[: len(loo)], key=lambda row: row["leave_one_out"])
        chosen_by = "leave-one-out on the training set"
    names = {label: str(label) for label in np.union1d(labels, truth).tolist()}
    names |= {label: n for label, n in enumerate(entry.class_names) if label in names}
    result = {
        "name": name,
        "meta": entry.meta,
        "metric": args.metric,
        "vote": args.vote,
        "temperature": args.temperature,
        "n_train": n,
        "n_test": len(truth),
        "dim": train.shape[1],
        "classes": [names[label] for label in np.unique(truth)],
        "sweep": rows,
        "chosen_k": chosen and chosen["k"],
        "test_accuracy": chosen and chosen["accuracy"],
        "chosen_by": chosen_by,
        "versions": {"numpy": np.__version__, "scikit-learn": sklearn.__version__},
        "command": shlex.join(sys.argv),
    }
    if args.confusion and chosen:
        matrix = confusion_matrix(truth, predictions[chosen["k"]], labels=[*names]).tolist()
        result["confusion"] = {"classes": [*names.values()], "true_by_predicted": matrix}
    if entry.pixels:
        result["pixels"] = True
    elif args.probe:
        result["probe"] = linear_probe(entry)
    return result


def draw_embedding(entry, classes, args):
    """A figure of the test features in two dimensions, colored by class; None if too few."""
    from matplotlib.figure import Figure
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    # At most 5,000 points of all classes, which may come in order.
    step = -(-len(entry.test_labels) // 5000)
    features = entry.test_features[::step]
    ids = np.unique(entry.test_labels, return_inverse=True)[1][::step]
    n, too_few = len(classes), len(features) < 5 or features.shape[1] < 2
    if args.embedding_2d == "none" or too_few:
        return None
    with warnings.catch_warnings():
        # A collapsed encoder has no variance to explain.
        warnings.simplefilter("ignore")
        points = PCA(2, random_state=0).fit_transform(features)
        if args.embedding_2d == "tsne" and points.std() > 0:
            tsne = TSNE(perplexity=min(30, len(points) / 4), metric=args.metric, random_state=0)
            points = tsne.fit_transform(features)
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    colors = dict(cmap="tab10" if n <= 10 else "turbo", vmin=0, vmax=max(9, n - 1))
    # In random order, so that no class covers another.
    order = np.random.default_rng(0).permutation(len(points))
    scatter = axes.scatter(*points[order].T, c=ids[order], s=8, alpha=0.7, **colors)
    if 1 < n <= 20:
        # An unescaped $ starts a formula.
        names = [classes[i].replace("$", r"\$") for i in np.unique(ids)]
        handles = scatter.legend_elements(num=None)[0]
        axes.legend(handles, names, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.set(title=f"{entry.name}: test features, {args.embedding_2d}", xticks=[], yticks=[])
    return figure


def draw_sweep(results, ks, args):
    """A figure of accuracy over k with 95 % bands; raw pixels and untrained encoders in gray."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for i, result in enumerate(results, 1):
        x = [row["k"] for row in result["sweep"]]
        y, low, high = (
            [100 * row[key] for row in result["sweep"]] for key in ("accuracy", "low", "high")
        )
        untrained = result["meta"].get("epochs") == 0
        style = ":" if untrained else "--" if "pixels" in result else "-"
        label = f"[{i}] {result['name']}" + (" (untrained)" if untrained else "")
        color = f"C{i - 1}" if style == "-" else "0.4"
        axes.plot(x, y, style, marker=".", color=color, label=label)
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        if result["chosen_k"]:
            axes.scatter(result["chosen_k"], 100 * result["test_accuracy"], 99, color, alpha=0.4)
    title = f"kNN, {args.metric}, {args.vote} vote, 95 % bands"
    axes.set(xscale="log", xlabel="k (large dot: chosen)", ylabel="test accuracy in %", title=title)
    axes.set_xticks(ks, ks)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside lower center", ncols=2, frameon=False)
    return figure


def accuracy_table(results):
    """A dict from each k to the test accuracies of all inputs, NaN where an input has no such k."""
    sweeps = [{row["k"]: row["accuracy"] for row in result["sweep"]} for result in results]
    ks = sorted(set().union(*sweeps))
    return {k: np.array([sweep.get(k, np.nan) for sweep in sweeps]) for k in ks}


def write_files(inputs, results, figures):
    """Write knn.json and knn.csv of every input, and the figures: (path, figure) pairs by name."""
    from common import atomic_write, user_errors

    for entry, result in zip(inputs, results):
        with user_errors(f"cannot write to --output {str(entry.folder)!r}", OSError):
            entry.folder.mkdir(parents=True, exist_ok=True)
        table, fields = io.StringIO(), list(result["sweep"][0])
        # All but per_class, the last field.
        writer = csv.DictWriter(table, fields[:-1], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(result["sweep"])
        texts = {"knn.csv": table.getvalue(), "knn.json": json.dumps(result, indent=2)}
        for ending, text in texts.items():
            with atomic_write(entry.folder / f"{entry.prefix}{ending}") as file:
                file.write(text.encode())
    for path, figure in figures.values():
        with atomic_write(path) as file:
            figure.savefig(file, dpi=120, format="png")


def report(results, table, args):
    """Print the inputs, a table of accuracies, and the result at the chosen k of each input."""
    for i, result in enumerate(results, 1):
        facts = dict(n_train=result["n_train"], n_test=result["n_test"], D=result["dim"])
        for key in ("encoder", "epochs", "seed"):
            if key in result["meta"]:
                facts[key] = result["meta"][key]
        print(f"[{i}] {result['name']}: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
    print(f"\naccuracy on the test set in %, metric {args.metric}, vote {args.vote}")
    print(f"{'k':>12}" + "".join(f"{f'[{i}]':>9}" for i in range(1, len(results) + 1)))
    for k, row in table.items():
        print(f"{k:>12}" + "".join(f"{100 * a:9.2f}" for a in row).replace("nan", "   "))
    to_100 = [row for k, row in table.items() if k <= 100]
    means = np.nanmean(to_100, axis=0) if to_100 else []
    print(f"{'mean to 100':>12}" + "".join(f"{100 * mean:9.2f}" for mean in means), "\n")
    for i, result in enumerate(results, 1):
        report_chosen(i, result)
    for i, result in enumerate(results, 1):
        probe = result.get("probe")
        if probe:
            print(
                f"[{i}] linear probe on the frozen features, no augmentation: test accuracy = "
                f"{100 * probe['test_accuracy']:.2f} % (C = {probe['C']})"
            )
        elif "probe" in result:
            print(f"[{i}] no linear probe: it needs two classes of five training points or more")


def report_chosen(i, result):
    row = next((row for row in result["sweep"] if row["k"] == result["chosen_k"]), None)
    if row is None:
        print(f"[{i}] no k chosen: --no-loo, and more than one k")
        return
    print(
        f"[{i}] chosen k = {row['k']}, test accuracy = {100 * row['accuracy']:.2f} % "
        f"(95 % interval {100 * row['low']:.2f} to {100 * row['high']:.2f})"
    )
    worst, name = min(zip(row["per_class"], result["classes"]), key=lambda pair: pair[0])
    print(
        f"    k chosen by {result['chosen_by']}; "
        f"balanced accuracy = {100 * row['balanced_accuracy']:.2f} %, "
        f"lowest: class {name} with {100 * worst:.2f} %"
    )
    if "confusion" in result:
        print("    confusion: rows are true classes, columns predicted ones")
        for name, counts in zip(*result["confusion"].values()):
            print(f"{name[:14]:>18}" + "".join(f" {count:5}" for count in counts))


def log_results(results, table, figures, args):
    """With --track, log accuracies, chosen k and figures to Weights & Biases."""
    from common import Tracker, git_commit

    runs = {result["name"]: result["meta"] for result in results}
    config = {**asdict(args), "runs": runs, "command": shlex.join(sys.argv), "commit": git_commit()}
    folder = figures["knn"][0].parent
    tracker = Tracker(args, folder, name=f"knn-{results[0]['name']}", group="knn", config=config)
    for k, row in table.items():
        tracker.log({"k": k, **{f"knn/{name}": a for name, a in zip(runs, row) if a == a}})
    for result in results:
        if result["chosen_k"]:
            for key in ("chosen_k", "test_accuracy"):
                tracker.log({f"{key}/{result['name']}": result[key]})
    tracker.log({name: path for name, (path, _) in figures.items()})
    tracker.finish()


def main(args):
    """Evaluate every input, then write the files. Returns the content of each knn.json."""
    from common import check, pick_device

    check(args.ks, "--ks is empty; give at least one k, as in --ks 1 5 20")
    check(min(args.ks) >= 1, f"--ks {min(args.ks)}: every k must be at least 1")
    check(args.temperature > 0, f"--temperature {args.temperature} must be above 0")
    cosine = args.metric == "cosine" or args.vote != "softmax"
    check(cosine, "--vote softmax weighs by similarity; use --metric cosine")
    device = pick_device(args.device)
    device = device if device.type == "cuda" else None

    inputs = read_inputs(args)
    if args.pixels:
        inputs += read_pixels(inputs, args.cache_dir)
    # Compute everything before writing anything: a failure leaves earlier files as they are.
    results = [evaluate(entry, args, device) for entry in inputs]
    table = accuracy_table(results)
    figures = {"knn": (inputs[0].folder / "knn.png", draw_sweep(results, list(table), args))}
    for entry, result in zip(inputs, results):
        figure = None if entry.pixels else draw_embedding(entry, result["classes"], args)
        if figure:
            path = entry.folder / f"{entry.prefix}embedding_2d.png"
            figures[f"embedding_2d/{entry.name}"] = (path, figure)
    write_files(inputs, results, figures)
    report(results, table, args)
    print("\nwrote knn.json, knn.csv and figures to", *{str(entry.folder) for entry in inputs})
    log_results(results, table, figures, args)
    return results


if __name__ == "__main__":
    from common import cli

    cli(Args, main)
