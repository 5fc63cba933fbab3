"""Judge embeddings by their nearest neighbours: the accuracy of a kNN vote for many k, from one neighbour search.

    python knn_eval.py                                    # every run under runs/
    python knn_eval.py runs/a runs/b --pixels             # these runs, beside raw pixels of their data set
    python knn_eval.py features.npz --metric euclidean --vote distance --ks 1 5 20

An input is a run folder, or an .npz with train_features [N, D], train_labels [N], test_features [M, D] and
test_labels [M]. Beside it go knn.json, knn.csv, embedding_2d.png and (beside the first one) knn.png.
To sweep k in your own code, copy everything above `Args`: it needs NumPy, scikit-learn, PyTorch, tqdm and tyro.
The votes, how k is chosen, and what is promised: README.md, section kNN evaluation.
"""

import csv
import io
import json
import operator
import os
import shlex
import sys
import warnings
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, Optional, Tuple

import numpy as np
import sklearn
import torch
import tyro
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize
from tqdm.auto import tqdm

BUDGET = 2**28  # bytes of a block of training points, of distances to it, and half of what a chunk of queries takes


def knn_sweep(train_features, train_labels, test_features, ks, metric="cosine", vote="uniform", temperature=0.07,
              device=None, progress=None):  # fmt: skip
    """Predict the labels of M points by a vote of their k nearest training points, for every k from one search.

    train_features [N, D], train_labels [N] (any integers) and test_features [M, D] are NumPy arrays; test_features
    None is leave-one-out: every training point is judged by the others. Returns a dict from each k to labels [M].

    metric  "euclidean", or "cosine": Euclidean between L2-normalised rows (a row of zeros stays as it is)
    vote    "uniform": majority; "distance": 1 / distance; "balanced": a class's votes over its number of training
            points; "softmax" (cosine only): exp(similarity / temperature), Wu et al. 2018, arXiv:1805.01978
    device  None searches by scikit-learn on the CPU; a PyTorch device searches there
    progress  title of a progress bar, shown in a terminal

    Distances are computed in float64, and predictions are those of scikit-learn's KNeighborsClassifier ("uniform",
    "distance"): the smallest label wins a tied vote. Where training points at the same distance straddle k, the
    lowest indices are taken; scikit-learn's choice depends on the number of queries there. Distances that float64
    rounding can not tell apart count as the same. Where all training points are equal (a collapsed encoder) there is no
    neighbour, and every k gives the majority class. Needs less than 2 GB beside the features. ValueError on bad input.
    """
    train, train_labels = np.asarray(train_features), np.asarray(train_labels)
    test = train if test_features is None else np.asarray(test_features)
    ks = sorted({operator.index(k) for k in ks})
    most = len(train) - (test_features is None)
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1] or not train.size or not test.size:
        raise ValueError(f"features must be [N, D] and [M, D] and not empty, not {train.shape} and {test.shape}")
    if train_labels.shape != train.shape[:1] or train_labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be {len(train)} integers, not {train_labels.dtype} {train_labels.shape}")
    if not ks or ks[0] < 1 or ks[-1] > most:
        raise ValueError(f"every k must be between 1 and {most}, not {ks}")
    if metric not in ("cosine", "euclidean") or vote not in ("uniform", "distance", "softmax", "balanced"):
        raise ValueError(f"unknown metric {metric!r} or vote {vote!r}")
    if vote == "softmax" and (metric != "cosine" or not 0 < temperature < np.inf):
        raise ValueError(f"vote softmax needs metric cosine and a temperature above 0, not {metric} and {temperature}")

    collapsed = (train == train[0]).all()
    classes, train_ids, sizes = np.unique(train_labels, return_inverse=True, return_counts=True)
    dtype = np.result_type(train, test, np.float32)  # float32 rows are normalised in float32, as scikit-learn does
    block = max(1, BUDGET // (8 * train.shape[1]))
    blocks = lru_cache(1)(lambda start: _prepare(train[start : start + block], metric, dtype))
    search = Search(blocks, range(0, len(train), block), len(train), device)
    predictions = {k: np.empty(len(test), classes.dtype) for k in ks}
    rows = max(1, 2 * BUDGET // (128 * ks[-1] + 24 * len(classes) + 32 * test.shape[1]))
    for start in tqdm(range(0, len(test), rows), progress, leave=False, disable=None if progress else True, delay=1):
        queries = _prepare(test[start : start + rows], metric, dtype)
        own = np.arange(start, start + len(queries)) if test_features is None else None
        squared, neighbours = search(queries, ks[-1], own)
        weights = _weights(squared, vote, temperature)
        cell = train_ids[neighbours] + len(classes) * np.arange(len(queries))[:, None]  # of votes, flattened
        votes = np.zeros((len(queries), len(classes)))
        # A point that is judged by the others does not count among its own class's.
        points = sizes if own is None else np.maximum(sizes - (train_ids[own, None] == np.arange(len(classes))), 1)
        for low, k in zip([0, *ks], ks):
            weight = None if weights is None else weights[:, low:k].ravel()
            votes += np.bincount(cell[:, low:k].ravel(), weight, votes.size).reshape(votes.shape)
            shares = votes / points if vote == "balanced" else votes
            shares = np.broadcast_to(points, votes.shape) if collapsed else shares
            predictions[k][start : start + rows] = classes[shares.argmax(1)]
    return predictions


def _prepare(features, metric, dtype):
    features = np.ascontiguousarray(features, dtype)
    if not np.abs(features).max() <= 1e15:  # also NaN; the squares of larger ones overflow float32
        raise ValueError("features must be finite, and at most 1e15")
    return (normalize(features) if metric == "cosine" else features).astype(np.float64)


def _weights(squared, vote, temperature):
    """Weight of each neighbour's vote [m, k] by its squared distance; None where all count the same."""
    if vote == "distance":  # where a training point equals the query, only such points vote
        exact = squared[:, :1] == 0
        return np.where(exact, squared == 0, 1 / np.sqrt(np.where(exact, 1, squared)))
    if vote == "softmax":  # similarity = 1 - squared / 2; less the nearest one's, which cancels and can not underflow
        with np.errstate(over="ignore"):
            return np.exp((squared[:, :1] - squared) / 2 / temperature)
    return None


class Search:
    """Exact search in blocks of training points. `blocks(start)` is float64 [n, D] for every start in `starts`."""

    def __init__(self, blocks, starts, n, device):
        self.blocks, self.starts, self.n, self.device = blocks, starts, n, device

    def __call__(self, queries, k, own=None):
        """Squared distances and indices [m, k] of the k nearest to queries [m, D], the lowest index first among equals.

        own: for leave-one-out, the index [m] of each query among the training points; it is not its own neighbour.
        """
        take = min(k + 1 + (own is not None), self.n)  # one more than k, to see whether equal distances straddle k
        squared, indices = self.nearest(queries, self.blocks(0), take)
        for start in self.starts[1:]:
            found = self.nearest(queries, self.blocks(start), take)
            squared, indices = np.hstack([squared, found[0]]), np.hstack([indices, found[1] + start])
            order = squared.argsort(axis=1, kind="stable")[:, :take]
            squared, indices = np.take_along_axis(squared, order, 1), np.take_along_axis(indices, order, 1)
        if own is not None:
            other = indices != own[:, None]
            other[other.all(axis=1), -1] = False  # so many equal points that the query itself was not found
            squared, indices = (array[other].reshape(len(queries), -1) for array in (squared, indices))

        # What float64 can not tell apart is one group: the lower index first, the same distance for all.
        tolerance = squared + (queries**2).sum(1, keepdims=True)
        tolerance *= 8 * queries.shape[1] ** 0.5 * np.finfo(np.float64).eps  # several times the error measured
        apart = squared > tolerance
        apart[:, 1:] = np.diff(squared, axis=1) > tolerance[:, 1:]
        tied = np.flatnonzero(~apart.all(axis=1))
        group = apart[tied].cumsum(1)
        order = np.lexsort((indices[tied], group))
        indices[tied] = np.take_along_axis(indices[tied], order, 1)
        if squared.shape[1] > k:
            straddles = group[:, k] == group[:, k - 1]
            first = (group[straddles] < group[straddles, k, None]).sum(1)
            self.refill(indices, tied[straddles], first, k, queries, squared, tolerance, own)
        squared[tied] = np.maximum.accumulate(np.where(apart[tied], squared[tied], 0), axis=1)
        return squared[:, :k], indices[:, :k]

    def nearest(self, queries, block, take):
        """Squared distances and indices [m, take] of the nearest points of one block, ascending."""
        take = min(take, len(block))
        if self.device is None:
            distances, indices = NearestNeighbors(algorithm="brute").fit(block).kneighbors(queries, take)
            return np.square(distances, out=distances), indices
        parts = [part.topk(take, largest=False) for part in self.distances(queries, block)]
        return tuple(torch.cat(columns).cpu().numpy() for columns in zip(*parts))

    def distances(self, queries, block):
        """Yield squared distances [rows, n] as float64 tensors on the device, some rows at a time."""
        block = torch.from_numpy(block).to(self.device or "cpu")
        norms = (block**2).sum(1)
        for rows in torch.from_numpy(queries).split(max(1, BUDGET // (8 * len(block)))):
            rows = rows.to(block.device)
            part = torch.addmm(norms, rows, block.T, alpha=-2)  # float64: TF32 has no say in it
            yield part.add_((rows**2).sum(1, keepdim=True)).clamp_(min=0)

    def refill(self, indices, rows, first, k, queries, squared, tolerance, own):
        """Where equal distances straddle k, fill places first:k with the lowest indices at that distance."""
        low, high = squared[rows, first] - tolerance[rows, first] / 2, squared[rows, k] + tolerance[rows, k]
        place = first.copy()
        for start in self.starts if len(rows) else ():
            done = 0
            for part in self.distances(queries[rows], self.blocks(start)):
                part = part.cpu().numpy()
                for i, distances in enumerate(part, done):
                    lowest = start + np.flatnonzero((distances >= low[i]) & (distances <= high[i]))
                    if own is not None:
                        lowest = lowest[lowest != own[rows[i]]]
                    lowest = lowest[: k - place[i]]
                    indices[rows[i], place[i] : place[i] + len(lowest)] = lowest
                    place[i] += len(lowest)
                done += len(part)


@dataclass
class Args:
    """Sweep k over written embeddings: the accuracy of a vote of the k nearest training points on the test points."""

    inputs: Annotated[tyro.conf.Positional[Tuple[str, ...]], tyro.conf.arg(metavar="[RUN ...]")] = ()
    """run folders or .npz files (none: every run under runs/)"""
    ks: Tuple[int, ...] = (1, 2, 3, 4, 5, 10, 20, 50, 70, 100, 200, 500, 1000)
    """numbers of neighbours; those above the number of training points are dropped"""
    metric: Literal["cosine", "euclidean"] = "cosine"
    """distance between features"""
    vote: Literal["uniform", "distance", "softmax", "balanced"] = "uniform"
    """majority; by 1 / distance; by exp(similarity / temperature); by share of the class's training points"""
    temperature: float = 0.07
    """of the softmax vote"""
    loo: bool = True
    """choose k by leave-one-out on the training points"""
    pixels: bool = False
    """judge the raw pixels of the runs' data sets as well"""
    cache_dir: str = "cache"
    """where the runs keep the decoded images of a folder"""
    probe: bool = False
    """fit a linear probe as well: logistic regression on the frozen features, no augmentation"""
    confusion: bool = False
    """show the confusion matrix at the chosen k"""
    embedding_2d: Literal["pca", "tsne", "none"] = "pca"
    """how to draw the test features in two dimensions"""
    output: Optional[str] = None
    """folder for all files (unset: beside each input)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to search"""
    track: bool = False
    """log to Weights & Biases"""
    wandb_project: str = "ssl"
    """project there"""
    wandb_entity: Optional[str] = None
    """user or team there"""


PIXEL_KEYS = ("dataset", "data_dir", "image_size")  # what a run's meta names its images by


def plain(text):
    """Text out of a foreign file, short and on one line."""
    return "".join(c if c.isprintable() else "?" for c in str(text))[:80]


def read_embeddings(path):
    """The arrays and the meta of a run folder or an .npz file, without unlabelled rows. UserError."""
    from common import UserError, check, read_npz

    path = path / "embeddings.npz" if os.path.isdir(path) else path
    where = repr(str(path))
    check(os.path.isfile(path), f"{where} is not there; name the folder of a finished run, or an .npz file")
    data = read_npz(path, ["train_features", "train_labels", "test_features", "test_labels"], ["class_names", "meta"])
    for part in ("train", "test"):
        features, labels = data[f"{part}_features"], data[f"{part}_labels"]
        is_float = features.dtype.name in ("float16", "float32", "float64")
        check(is_float and features.ndim == 2 and features.shape[1] > 0,
              f"{where}: {part}_features is {features.dtype} {list(features.shape)}, not float [N, D]")  # fmt: skip
        labelling = labels.dtype.kind in "iu" and labels.shape == features.shape[:1]
        check(labelling, f"{where}: {part}_labels is {labels.dtype} {list(labels.shape)}, not {len(features)} integers")
        check(len(features) > 0, f"{where}: {part}_features has no rows: nothing to judge")
        check(np.isfinite(features).all(), f"{where}: {part}_features has values that are not finite")
        labels = labels.astype(np.int64)
        labelled = labels != -1
        check(labelled.any(), f"{where}: all {part} images are unlabelled: nothing to judge")
        if not labelled.all():
            print(f"{where}: dropped {(~labelled).sum()} unlabelled of {len(labels)} {part} images")
            features, labels = features[labelled], labels[labelled]
        data[f"{part}_features"], data[f"{part}_labels"] = features, labels
    widths = [data[f"{part}_features"].shape[1] for part in ("train", "test")]
    check(widths[0] == widths[1], f"{where}: train_features is {widths[0]} wide, test_features {widths[1]}")
    try:
        data["meta"] = dict(json.loads(str(data.get("meta", "{}"))))
        if data.setdefault("class_names", np.array([], str)).ndim != 1:
            raise ValueError
        data["class_names"] = [plain(name) for name in data["class_names"].tolist()]
    except Exception:  # whatever json and NumPy raise on foreign text
        raise UserError(f"{where}: meta must be a JSON object, and class_names strings") from None
    return data


def pixel_data(meta, cache_dir):
    """The raw pixels of the data set that a run's meta names, in the form of read_embeddings. UserError."""
    from common import UserError, check, load_images, square

    try:
        check(4 <= meta["image_size"] <= 1024, f"--pixels: an image size of {meta['image_size']} in the run's meta")
        images = load_images(meta["dataset"], meta["data_dir"], meta["image_size"], cache_dir=cache_dir)
    except KeyError:
        raise UserError(f"--pixels: no data set is called {plain(meta['dataset'])!r}, as the run's meta says") from None
    data = {"meta": {key: meta[key] for key in PIXEL_KEYS}, "class_names": images.class_names}
    for part in ("train", "test"):
        pixels, labels = getattr(images, part), getattr(images, f"{part}_labels")
        check((labels != -1).any(), f"--pixels: {meta['dataset']} has no labelled {part} images")
        pixels = torch.cat(
            [square(pixels[rows], images.size) for rows in (labels != -1).nonzero().flatten().split(1024)]
        )
        pixels = pixels[:, : 1 if images.grey else 3]  # three equal channels tell no more than one
        data[f"{part}_features"], data[f"{part}_labels"] = pixels.flatten(1).numpy(), labels[labels != -1].numpy()
    return data


def wilson(share, n, z=1.96):
    """95 % interval of a share observed on n points (Wilson 1927)."""
    centre, half = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def linear_probe(data):
    """Logistic regression on standardised frozen features, C chosen on a fifth of the training set; None: too few."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = data["train_features"].astype(np.float32), data["train_labels"]
    sizes = np.unique(labels, return_counts=True)[1]
    if len(sizes) < 2 or min(sizes) < 5:
        return None
    strengths = (0.001, 0.01, 0.1, 1, 10)
    probes = {C: make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000)) for C in strengths}
    fit, held_out, fit_labels, held_out_labels = train_test_split(
        features, labels, test_size=max(len(sizes), len(labels) // 5), stratify=labels, random_state=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged after 1,000 iterations is good enough to compare
        C = max(probes, key=lambda C: probes[C].fit(fit, fit_labels).score(held_out, held_out_labels))
        accuracy = probes[C].fit(features, labels).score(data["test_features"].astype(np.float32), data["test_labels"])
    return {"C": C, "test_accuracy": accuracy}


def evaluate(name, data, args, device):
    """Sweep k over one input: what its knn.json holds. UserError."""
    from common import UserError, check

    train, labels, test, truth = (data[f"{p}_{what}"] for p in ("train", "test") for what in ("features", "labels"))
    ks = [k for k in sorted(set(args.ks)) if k <= len(train)]
    check(ks, f"{name}: the smallest k, {min(args.ks)}, is above the {len(train)} training points; give a smaller --ks")
    if len(ks) < len(set(args.ks)):
        print(f"{name}: dropped every k above {len(train)}, the number of training points")
    options = dict(metric=args.metric, vote=args.vote, temperature=args.temperature, device=device)
    try:
        predictions = knn_sweep(train, labels, test, ks, progress=f"{name}, test", **options)
        ks = [k for k in ks if k < len(train)] if args.loo else []
        loo = knn_sweep(train, labels, None, ks, progress=f"{name}, leave-one-out", **options) if ks else {}
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    loo = {k: float((predicted == labels).mean()) for k, predicted in loo.items()}
    everywhere, classes = np.union1d(labels, truth).tolist(), np.unique(truth)
    truth_ids = np.searchsorted(classes, truth)
    sweep = []
    for k, predicted in predictions.items():
        right = predicted == truth
        per_class = np.bincount(truth_ids, right) / np.bincount(truth_ids)
        low, high = wilson(right.mean(), len(truth))
        sweep.append({"k": k, "accuracy": float(right.mean()), "low": low, "high": high, "leave_one_out": loo.get(k),
                      "balanced_accuracy": per_class.mean(), "per_class": per_class.tolist()})  # fmt: skip
    best = max(loo, key=loo.get) if loo else min(predictions) if len(predictions) == 1 else None  # smallest of equals
    accuracy = {row["k"]: row["accuracy"] for row in sweep}
    names = {c: data["class_names"][c] if 0 <= c < len(data["class_names"]) else str(c) for c in everywhere}
    result = {
        "name": name, "meta": data["meta"], "metric": args.metric, "vote": args.vote,
        "temperature": args.temperature if args.vote == "softmax" else None,
        "n_train": len(train), "n_test": len(test), "dim": train.shape[1], "classes": [names[c] for c in classes],
        "sweep": sweep, "chosen_k": best, "test_accuracy": accuracy.get(best),
        "chosen_by": "leave-one-out on the training set" if loo else "being the only k" if best else None,
        "versions": {"numpy": np.__version__, "scikit-learn": sklearn.__version__, "torch": torch.__version__},
        "command": shlex.join(sys.argv),
    }  # fmt: skip
    if args.confusion:
        check(best, "--confusion is that of the chosen k, and --no-loo chooses none; leave out one, or give one k")
        check(len(names) <= 1000, f"{name}: --confusion of {len(names)} classes; it shows at most 1000")
        cells = [np.searchsorted(everywhere, ids) for ids in (truth, predictions[best])]
        matrix = np.bincount(cells[0] * len(names) + cells[1], minlength=len(names) ** 2).reshape(len(names), -1)
        result["confusion"] = {"classes": list(names.values()), "true_by_predicted": matrix.tolist()}
    return result


def report(results, args):
    """Print the inputs, the table of accuracies, and for each input the chosen k with its accuracy."""
    for i, result in enumerate(results, 1):
        meta = {key: plain(result["meta"][key]) for key in ("encoder", "epochs", "seed") if key in result["meta"]}
        facts = {"n_train": result["n_train"], "n_test": result["n_test"], "D": result["dim"], **meta}
        print(f"[{i}] {result['name']}: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"\naccuracy on the test set in %, metric {args.metric}, vote {args.vote}"
          + (f", temperature {args.temperature}" if args.vote == "softmax" else ""))  # fmt: skip
    sweeps = [{row["k"]: 100 * row["accuracy"] for row in result["sweep"]} for result in results]
    table = [["k", *(f"[{i}] " for i in range(1, len(results) + 1))]]
    for k in sorted(set().union(*sweeps)):
        table.append([k, *(f"{s[k]:.2f}{'*' if s[k] == max(s.values()) else ' '}" if k in s else "" for s in sweeps)])
    to_100 = [[accuracy for k, accuracy in sweep.items() if k <= 100] for sweep in sweeps]
    table.append(["mean to 100", *(f"{np.mean(found):.2f} " if found else "" for found in to_100)])
    for row in table:
        print(f"{row[0]:>12}" + "".join(f"{cell:>9}" for cell in row[1:]))
    print("* best of its column, found by looking at the test labels: not a result\n")
    for i, result in enumerate(results, 1):
        row = next((row for row in result["sweep"] if row["k"] == result["chosen_k"]), None)
        if row is None:
            print(f"[{i}] no k chosen: --no-loo, and more than one k")
            continue
        print(f"[{i}] chosen k = {row['k']}, test accuracy = {100 * row['accuracy']:.2f} % "
              f"(95 % interval {100 * row['low']:.2f} to {100 * row['high']:.2f})")  # fmt: skip
        worst = int(np.argmin(row["per_class"]))
        print(f"    k chosen by {result['chosen_by']}; balanced accuracy = {100 * row['balanced_accuracy']:.2f} %, "
              f"lowest: class {result['classes'][worst]} with {100 * row['per_class'][worst]:.2f} %")  # fmt: skip
        if "confusion" in result:
            print("    confusion: rows are true classes, columns predicted ones; the last column is the % right")
            matrix, width = result["confusion"]["true_by_predicted"], max(4, len(str(result["n_test"])))
            for name, counts, j in zip(result["confusion"]["classes"], matrix, range(len(matrix))):
                right = f"{100 * counts[j] / sum(counts):9.2f}" if sum(counts) else "        -"
                print(f"{name[:14]:>18}" + "".join(f" {count:{width}}" for count in counts) + right)
    for i, result in enumerate(results, 1):
        probe = result.get("probe")
        if probe:
            print(f"[{i}] linear probe on the frozen features, no augmentation: test accuracy = "
                  f"{100 * probe['test_accuracy']:.2f} % (C = {probe['C']})")  # fmt: skip
        elif "probe" in result:
            print(f"[{i}] no linear probe: it needs two classes, and five training points of each")


def draw_sweep(path, results, args):
    """A PNG: accuracy over k with 95 % bands, a curve an input; raw pixels and untrained encoders in grey."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

    from common import atomic_write, matplotlib_colours

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    references = ["pixels" if result.get("pixels") else "untrained" if result["meta"].get("epochs") == 0 else None
                  for result in results]  # fmt: skip
    colours = iter(matplotlib_colours(references.count(None)))
    for i, (result, reference) in enumerate(zip(results, references), 1):
        ks = [row["k"] for row in result["sweep"]]
        curves = [[100 * row[key] for row in result["sweep"]] for key in ("accuracy", "low", "high")]
        colour, line = ("0.4", "--" if reference == "pixels" else ":") if reference else (next(colours), "-")
        label = f"[{i}] {result['name']}" + (" (untrained)" if reference == "untrained" else "")
        axes.plot(ks, curves[0], line, marker=".", color=colour, label=label)
        axes.fill_between(ks, curves[1], curves[2], color=colour, alpha=0.08 if reference else 0.15, linewidth=0)
        if result["chosen_k"]:
            chosen = curves[0][ks.index(result["chosen_k"])]
            axes.plot(result["chosen_k"], chosen, "o", markersize=11, fillstyle="none", color=colour)
    axes.set(xscale="log", xlabel="k (ring: the chosen one)", ylabel="accuracy on the test set in %",
             title=f"kNN, {args.metric}, {args.vote} vote, 95 % bands")  # fmt: skip
    shown = sorted({row["k"] for result in results for row in result["sweep"]})
    if len(shown) <= 20:
        axes.set_xticks(shown)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside lower center", ncols=2, frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120, format="png")


def points_2d(features, args):
    """Features [M, D] in two dimensions [M, 2]; None where there are too few to show."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if args.embedding_2d == "none" or len(features) < 5 or features.shape[1] < 2:
        return None
    features = features.astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a collapsed encoder: there is no variance to explain
        points = PCA(2, random_state=0).fit_transform(features)
        if args.embedding_2d == "tsne" and points.std() > 0:
            tsne = TSNE(perplexity=min(30, len(features) / 4), metric=args.metric, random_state=0)
            points = tsne.fit_transform(features)
    return points


def main(args):
    """Evaluate every input, and only then write the files. Returns what each knn.json holds."""
    from common import Tracker, UserError, atomic_write, check, draw_embedding, git_commit, pick_device

    check(args.ks, "--ks is empty; give one k or more, as in --ks 1 5 20")
    check(min(args.ks) >= 1, f"--ks {min(args.ks)}: every k must be at least 1")
    check(0 < args.temperature < np.inf, f"--temperature {args.temperature} must be above 0 and finite")
    check(args.vote != "softmax" or args.metric == "cosine", "--vote softmax weighs similarities; use --metric cosine")
    device = pick_device(args.device)
    device = device if device.type == "cuda" else None

    data = {Path(name): read_embeddings(Path(name)) for name in args.inputs}
    for path in sorted(Path("runs").glob("*/")) if not args.inputs else ():
        try:
            data[path] = read_embeddings(path)
        except UserError as error:  # an unfinished or unlabelled run does not hide the others
            print(f"left out: {error}", file=sys.stderr)
    check(data, "no run under runs/ can be judged; train one, as by python simclr.py, or name an .npz file")
    called = {path: path.parent if path.name == "embeddings.npz" else path if path.is_dir() else path.with_suffix("")
              for path in data}  # fmt: skip
    called = {path: "".join(c if c.isalnum() or c in "._-" else "_" for c in short.resolve().name)[:80]
              for path, short in called.items()}  # fmt: skip
    names = {path: f"{name}-{i}" if len(set(called.values())) < len(called) else name
             for i, (path, name) in enumerate(called.items(), 1)}  # fmt: skip
    folders = {path: Path(args.output or (path if path.is_dir() else path.parent)) for path in data}
    together = next(iter(folders.values()))
    for folder in folders.values():
        there = next(part for part in (folder.absolute(), *folder.absolute().parents) if os.path.exists(part))
        writable = os.path.isdir(there) and os.access(there, os.W_OK)
        check(writable, f"can not write to {str(folder)!r}; name another --output")

    results, files = [], []  # all is computed before anything is written: a failure leaves the files of before alone
    for path, arrays in data.items():
        result = evaluate(names[path], arrays, args, device)
        if args.probe:
            result["probe"] = linear_probe(arrays)
        alone = list(folders.values()).count(folders[path]) == 1
        results.append(result)
        files.append((folders[path], "" if alone else f"{names[path]}-"))
    if args.pixels:
        metas = [arrays["meta"] for arrays in data.values()]
        metas = [meta for meta in metas if [type(meta.get(key)) for key in PIXEL_KEYS] == [str, str, int]]
        named = {str([meta[key] for key in PIXEL_KEYS]): meta for meta in metas}
        check(named, "--pixels needs a run: the meta of its embeddings.npz names the data set, and no input has one")
        for i, meta in enumerate(named.values(), 1):
            result = evaluate(f"pixels of {meta['dataset']}", pixel_data(meta, args.cache_dir), args, device)
            results.append({**result, "pixels": True})
            files.append((together, f"pixels{i}-" if len(named) > 1 else "pixels-"))

    try:
        together.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can not write to {str(together)!r} ({error.strerror}); name another --output") from None
    pictures = {"knn": together / "knn.png"}
    for (path, arrays), (folder, prefix) in zip(data.items(), files):
        every = slice(None, None, -(-len(arrays["test_features"]) // 5_000))  # of all classes, which may come in order
        points = points_2d(arrays["test_features"][every], args)
        if points is not None:
            picture = pictures[f"embedding_2d/{names[path]}"] = folder / f"{prefix}embedding_2d.png"
            title = f"{names[path]}: test features, {args.embedding_2d.replace('pca', 'PCA').replace('tsne', 't-SNE')}"
            draw_embedding(picture, points, arrays["test_labels"][every], arrays["class_names"], title)
    draw_sweep(pictures["knn"], results, args)
    for result, (folder, prefix) in zip(results, files):
        text = io.StringIO()
        table = csv.DictWriter(text, list(result["sweep"][0])[:-1], extrasaction="ignore")  # all but per_class
        table.writeheader()
        table.writerows(result["sweep"])
        for ending, content in (("knn.csv", text.getvalue()), ("knn.json", json.dumps(result, indent=2))):
            with atomic_write(folder / f"{prefix}{ending}") as file:
                file.write(content.encode())
    report(results, args)
    print("\nwrote", *(folder / f"{prefix}knn.json" for folder, prefix in files), *pictures.values())

    tracker = Tracker(args.track, args.wandb_project, args.wandb_entity, together, f"knn-{results[0]['name']}",
                      {**asdict(args), "runs": {result["name"]: result["meta"] for result in results},
                       "command": shlex.join(sys.argv), "commit": git_commit()})  # fmt: skip
    sweeps = {result["name"]: {row["k"]: row["accuracy"] for row in result["sweep"]} for result in results}
    shown = sorted(set().union(*sweeps.values()))
    tracker.log_table("knn", ["k", *sweeps], [[k, *(sweep.get(k) for sweep in sweeps.values())] for k in shown])
    for k in shown:
        tracker.log({"k": k, **{f"knn/{name}": sweep[k] for name, sweep in sweeps.items() if k in sweep}})
    for result in results:
        if result["chosen_k"]:
            tracker.log({f"{key}/{result['name']}": result[key] for key in ("chosen_k", "test_accuracy")})
    for key, path in pictures.items():
        tracker.log_image(key, path)
    tracker.finish()
    return results


if __name__ == "__main__":
    from common import cli

    cli(Args, main)
