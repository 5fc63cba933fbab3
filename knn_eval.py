"""Evaluate embeddings by their nearest neighbors: sweep over k, labels needed, pictures.

    python knn_eval.py                           # every run under runs/, seeds averaged
    python knn_eval.py runs/a runs/b --pixels    # two runs, and the raw pixels of their data set
    python knn_eval.py features.npz --metric euclidean --ks 1 5 20

An input is a run folder, or an .npz with train_features [N, D] and, where known, train_labels [N],
train_groups [N], test_features [M, D] and test_labels [M]; label -1 is unlabeled. k is chosen by
leave-one-out on the training images, without the test labels.

To sweep k in your own code, copy everything above the section 'the command line'. README.md,
section kNN evaluation, explains the output.
"""

import numpy as np
import torch
from scipy.stats import entropy
from sklearn.preprocessing import normalize
from sklearn.utils import check_array, check_consistent_length, column_or_1d, gen_batches
from tqdm import tqdm

# Queries searched at a time: 512 x 1.28 million float64 distances take 5 GB.
CHUNK = 512
FLOATS = [np.float32, np.float64]


def knn_sweep(
    train_features,
    train_labels,
    test_features,
    ks,
    metric="cosine",
    vote="uniform",
    temperature=0.07,
    device=None,
    groups=None,
    return_shares=False,
):
    """Predict labels by a vote of the k nearest training points, for every k from one search.

    train_features [N, D], train_labels [N] and test_features [M, D] are NumPy arrays. Without
    test_features (None), each training point is predicted from the others (leave-one-out), or,
    given groups [N], from those of other groups. Returns a dict from each k to the
    predicted labels [M]; with return_shares also a dict from each k to the share of the votes [M]
    that the predicted label got. Raises ValueError on bad arguments.

    metric: "euclidean", or "cosine" (Euclidean distance between L2-normalized rows).
    vote: "uniform" (majority), or "softmax": exp(-distance**2 / 2 / temperature), for cosine
        proportional to exp(similarity / temperature) (Wu et al. 2018, arXiv:1805.01978). The
        smallest label wins a tied vote.
    device: PyTorch device of the search (None: the CPU).

    Predictions ("uniform") equal those of scikit-learn's KNeighborsClassifier, except
    where training points of different labels at the same distance straddle k.
    """
    if metric not in ("cosine", "euclidean") or vote not in ("uniform", "softmax"):
        raise ValueError(f"unknown metric {metric!r} or vote {vote!r}")
    train_labels = column_or_1d(train_labels)
    check_consistent_length(train_features, train_labels, groups)
    n, own, ks = len(train_features), None, sorted(set(ks))
    if test_features is None:
        test_features = train_features
        own = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
        groups = own
        n -= np.bincount(groups).max()
    if not ks or ks[0] < 1 or ks[-1] > n:
        raise ValueError(f"needs 1 <= k <= {n}, not {ks}")
    classes, train_ids = np.unique(train_labels, return_inverse=True)
    predictions = {k: np.empty(len(test_features), classes.dtype) for k in ks}
    shares = {k: np.empty(len(test_features)) for k in ks}
    chunks = nearest(train_features, test_features, ks[-1], metric, device, groups, own)
    # A uniform vote is the softmax of infinite temperature.
    temperature = temperature if vote == "softmax" else np.inf
    for rows, distances, neighbors in chunks:
        # Relative to the nearest neighbor, against underflow.
        weights = torch.exp((distances[:, :1] ** 2 - distances**2) / 2 / temperature)
        ids = torch.from_numpy(train_ids)[neighbors]
        votes = weights.new_zeros(len(ids), len(classes))
        for last, k in zip([0, *ks], ks):
            votes.scatter_add_(1, ids[:, last:k], weights[:, last:k])
            predictions[k][rows] = classes[votes.argmax(1).numpy()]
            shares[k][rows] = votes.amax(1) / votes.sum(1)
    return (predictions, shares) if return_shares else predictions


def nearest(train, queries, k, metric="cosine", device=None, groups=None, own=None):
    """Yield the k nearest training features [N, D] of queries [M, D], nearest first, in chunks.

    A chunk is a slice of the queries, distances [m, k], neighbors [m, k]. Given the groups [N] of
    the training points and the group of each query, own [M], neighbors are of other groups.
    """
    train, queries = (check_array(x, dtype=FLOATS, order="C") for x in (train, queries))
    if metric == "cosine":
        train, queries = normalize(train), normalize(queries)
    most = len(train) if own is None else len(train) - np.bincount(groups).max()
    # float64: the TF32 or float32 of a matrix product would change neighbors.
    train = torch.tensor(train, device=device or "cpu", dtype=torch.float64)
    norms = train.square().sum(1)
    chunks = [*gen_batches(len(queries), CHUNK)]
    for rows in tqdm(chunks, "neighbors", leave=False, delay=5, disable=None):
        chunk = torch.tensor(queries[rows]).to(train)
        # torch.cdist would copy train each time.
        squares = torch.addmm(norms, chunk, train.T, alpha=-2)
        if own is not None:
            squares[torch.from_numpy(groups == own[rows, None])] = torch.inf
        squares, neighbors = squares.topk(min(k, most), largest=False)
        squares += chunk.square().sum(1, keepdim=True)
        yield rows, squares.clamp(min=0).sqrt().cpu(), neighbors.cpu()


def effective_rank(features):
    """RankMe (arXiv:2210.02885): exp of the entropy of the normalized singular values.

    Of at most 2,048 rows of features [N, D]; between 1 and min(N, D).
    """
    sample = features[:: -(-len(features) // 2048)].astype(np.float64)
    values = np.linalg.svd(sample, compute_uv=False)
    # Features that are all zero have rank 1.
    values[0] += 1e-12
    return float(np.exp(entropy(values)))


def whiten(train, test, ridge=0.01):
    """ZCA of features [N, D] and [M, D], float32 or float64, by train (arXiv:2408.07519).

    ridge times the mean variance is added to each variance.
    """
    train, test = (features - train.mean(axis=0) for features in (train, test))
    variances, axes = np.linalg.eigh(train.T @ train / max(1, len(train) - 1))
    variances += ridge * variances.mean() + 1e-12
    return [x @ (axes * variances**-0.5) @ axes.T for x in (train, test)]


# ---------------------------------------------------------------- the command line
# What follows also needs common.py, matplotlib and tyro.

import copy
import csv
import json
import re
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import tyro
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from scipy.stats import binomtest
from sklearn.metrics import recall_score

from common import Tracker, UserError, check, cli, load_images, pick_device, square, user_errors


@dataclass
class Args:
    """Evaluate embeddings by a vote of the k nearest training points."""

    inputs: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[RUN ...]")
    ] = ()
    """run folders or .npz files (none: every run under runs/)"""
    ks: tuple[int, ...] = (1, 2, 3, 4, 5, 10, 20, 50, 70, 100, 200, 500, 1000)
    """values of k; those above the number of training images are skipped"""
    metric: Literal["cosine", "euclidean"] = "cosine"
    """distance between features"""
    vote: Literal["uniform", "softmax"] = "uniform"
    """majority; weighted by exp(similarity / temperature)"""
    temperature: float = 0.07
    """temperature of the softmax vote"""
    whiten: bool = False
    """ZCA-whiten the features, fitted on the training features"""
    labels_per_class: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    """labels per class in the table of few labels (no value: no such table)"""
    pixels: bool = False
    """also evaluate the raw pixels of the runs' data sets, resized to at most 32 x 32"""
    probe: bool = False
    """also fit linear probes (logistic regression): few labels, and all"""
    embedding_2d: Literal["pca", "tsne"] = "pca"
    """projection for the 2-D plot of the features"""
    table: Literal["md", "latex"] = "md"
    """format of the printed tables"""
    output: str | None = None
    """folder of all files (unset: RUN/knn; of x.npz: x/knn; of several inputs: runs/knn)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """device of the neighbor search"""
    track: bool = False
    """log to Weights & Biases"""
    wandb_project: str = "ssl"
    """Weights & Biases project"""


# ---------------------------------------------------------------- inputs


@dataclass
class Part:
    """Training or test images: features [N, D], and per image label, file, group and row."""

    name: str
    features: np.ndarray
    labels: np.ndarray
    files: np.ndarray
    groups: np.ndarray
    rows: np.ndarray

    def __getitem__(self, rows):
        name, *arrays = vars(self).values()
        return Part(name, *(array[rows] for array in arrays))

    def __len__(self):
        return len(self.rows)


def read_embeddings(path):
    """An embeddings.npz as an object: train and test (arrays), meta, class_names. UserError."""
    name = str(path.parent if path.stem == "embeddings" else path.with_suffix(""))
    entry = SimpleNamespace(name=name)
    failed = f"cannot evaluate {str(path)!r} as an .npz file"
    with user_errors(failed), np.load(path, allow_pickle=False) as arrays:
        train = arrays["train_features"]
        for part, x in dict(train=train, test=arrays.get("test_features", train[:0])).items():
            name, least = f"{part}_features", int(part == "train")
            x = check_array(x, dtype=FLOATS, ensure_min_samples=least, input_name=name)
            index = np.arange(len(x))
            labels = arrays.get(f"{part}_labels", -1 + 0 * index)
            labels = labels.flatten().astype(np.int64, casting="same_kind")
            files, groups = (arrays.get(f"{part}_{name}", index) for name in ("files", "groups"))
            check_consistent_length(x, labels, files, groups)
            groups = np.unique(groups, return_inverse=True)[1]
            setattr(entry, part, Part(part, x, labels, files, groups, index))
        check_consistent_length(entry.train.features.T, entry.test.features.T)
        entry.meta = dict(json.loads(str(arrays.get("meta", "{}"))))
        names = {-1: "", **dict(enumerate(map(str, arrays.get("class_names", []))))}
    entry.class_name = lambda label: names.get(label, str(label))
    return entry


def read_inputs(names):
    """Every input; none given: every run under runs/. UserError."""
    paths = map(Path, names or sorted(Path("runs").glob("*/embeddings.npz")))
    paths = [path / "embeddings.npz" if path.is_dir() else path for path in paths]
    check(paths, "no run under runs/ to evaluate; train one (python simclr.py) or name an .npz")
    for path in paths:
        check(path.exists(), f"{str(path)!r} does not exist; a run writes it at its end")
    return [read_embeddings(path) for path in paths]


def name_columns(inputs):
    """Set each input's column in the tables: the method, and flags in which its runs differ."""
    sets = {str(entry.meta.get("dataset")) for entry in inputs}
    for entry in inputs:
        entry.column = entry.meta.get("method", entry.name)
        if entry.meta.get("epochs") == 0:
            init = entry.meta.get("init")
            entry.column = f"init {init}" if init else "untrained"
        if len(sets) > 1 and "dataset" in entry.meta:
            entry.column += f" {entry.meta['dataset']}"
    other = "method", "dataset", "seed", "cache_dir", "images"
    for column in {entry.column for entry in inputs}:
        same = [entry for entry in inputs if entry.column == column]
        for entry in same:
            flags = [
                f" {key.replace('_', '-')} {value}"
                for key, value in entry.meta.items()
                if key not in other and any(run.meta.get(key) != value for run in same)
            ]
            entry.column += "".join(flags) if len(flags) < 4 else f" {entry.name}"
            entry.run = entry.column, entry.meta.get("seed")
    for entry in inputs:
        if [other.run for other in inputs].count(entry.run) > 1:
            entry.column += f" {entry.name}"


def pictures(entry):
    """A function that gives images of a Part, uint8 tensor [N, S, S, C]. UserError."""
    keys = "dataset data_dir cache_dir image_size labels window fit".split()
    source = {key: entry.meta[key] for key in keys if key in entry.meta}
    check("dataset" in source, f"{entry.name} names no data set")
    # Missing data would be downloaded.
    folder = source.get("data_dir", "data")
    here = source["dataset"] == "digits" or Path(folder).exists()
    check(here, f"--data-dir {folder!r} does not exist")
    images = load_images(**source)
    for part in (entry.train, entry.test):
        rows = np.arange(len(getattr(images, part.name)))
        same = np.array_equal(images.extra.get(f"{part.name}_files", rows), part.files)
        check(same, f"the images of {entry.name} have changed")

    def get(part, most=224):
        pixels, size = getattr(images, part.name), min(images.size, most)
        # Resizing takes several times the memory of the images.
        chunks = np.array_split(part.rows, len(part) // 256 + 1)
        return torch.cat([square(pixels[rows], size) for rows in chunks]).permute(0, 2, 3, 1)

    return get


def visible(images):
    """Three channels of images [N, H, W, C]: the first three, or of two, the first again."""
    return images[..., np.arange(3) % images.shape[3]]


def pixels_of(runs):
    """The raw pixels of each data set that the runs' meta names, as inputs. UserError."""
    # A run of each data set.
    keys, sources, inputs = ("dataset", "data_dir", "labels"), {}, []
    for run in runs:
        if "dataset" in run.meta:
            sources[tuple(map(run.meta.get, keys))] = run
    check(sources, "--pixels needs a run: no input's meta names a data set")
    for values, run in sources.items():
        run.get = get = pictures(run)
        entry = copy.copy(run)
        entry.name, entry.meta = "pixels", dict(zip(keys, values), method="pixels")
        # Of photographs, a thumbnail.
        entry.train, entry.test = (
            replace(part, features=get(part, 32).flatten(1).float().numpy())
            for part in (run.train, run.test)
        )
        inputs.append(entry)
    return inputs


# ---------------------------------------------------------------- evaluation

# The tables: file name, and title of the first column.
TABLES = dict(knn="k", labels="labels per class", probe="labels per class, logistic regression")
# Rows of the tables that are not numbers.
WORDS = ("all", "chosen k")
# Files of an earlier evaluation in the same folder that must not stay next to the new ones.
KNOWN = (
    "knn.csv knn.png labels.csv labels.png probe.csv probe.png suspects.csv predictions.csv "
    "pairs.csv neighbors.png embedding_2d.png"
).split()


def vote(args, train, queries, ks):
    """Predictions and shares of knn_sweep between Parts; leave-one-out where queries is train."""
    data = train.features, train.labels, None if queries is train else queries.features, ks
    options = args.metric, args.vote, args.temperature, args.device, train.groups
    return knn_sweep(*data, *options, return_shares=True)


def leave_one_out(args, train, most=np.inf):
    """Predictions, shares and accuracies {k: ...} within train, for every possible k of --ks."""
    most = min(most, len(train) - np.bincount(train.groups).max())
    ks = [k for k in args.ks if 0 < k <= most]
    predictions, shares = vote(args, train, train, ks) if ks else ({}, {})
    return predictions, shares, {k: (predictions[k] == train.labels).mean() for k in predictions}


def evaluate(entry, args):
    """The result of an input, for knn.json. Sets what the pictures need on the input."""
    train, test = entry.train, entry.test
    result = dict(name=entry.name, column=entry.column, meta=entry.meta)
    result["effective_rank"] = effective_rank(train.features)
    if args.whiten:
        train.features, test.features = whiten(train.features, test.features)
    voters, queries = (part[part.labels != -1] for part in (train, test))
    result |= dict(n_train=len(voters), n_test=len(queries), dim=train.features.shape[1])
    result["tables"] = tables = {name: {} for name in TABLES}
    if not len(voters):
        voters, queries = train, test
    elif not len(queries):
        result["column"] += " (leave-one-out)"
    if len(voters) > 1 and not np.ptp(voters.groups):
        print(f"{entry.name}: all labels are of one group; leave-one-out ignores it")
        voters.groups = np.arange(len(voters))
    # The images that vote and those that are predicted; without test images, the same.
    entry.voters, entry.queries = voters, queries if len(queries) else voters
    # Without labels nothing is predicted, and nothing is wrong.
    entry.predicted, entry.files = entry.queries.labels, {}
    if result["n_train"]:
        result |= sweep(entry, args, tables["knn"])
        labels_needed(entry, args, tables)
    return result


def sweep(entry, args, table):
    """Fill {k: accuracy}; return the result at the k chosen by leave-one-out. UserError."""
    train, truth, name = entry.voters, entry.queries.labels, entry.class_name
    predictions, shares, loo = leave_one_out(args, train)
    message = f"{entry.name}: --ks needs a number from 1 to the number of training images"
    check(loo, f"{message} less their largest group, not {args.ks}")
    # The smallest k wins a tie.
    k = max(loo, key=loo.get)
    rows = [["file", "label", "neighbors_say", "share"]]
    for i, says, share in most_certain(predictions, shares, k):
        if says != train.labels[i]:
            rows.append([train.files[i], name(train.labels[i]), name(says), share])
    entry.files["suspects.csv"] = rows
    rows = [["part", "file", "neighbors_say", "share"]]
    for part in (entry.train, entry.test):
        rest = part[part.labels == -1]
        if len(rest):
            for i, says, share in most_certain(*vote(args, train, rest, loo), k):
                rows.append([part.name, rest.files[i], name(says), share])
    if rows[1:]:
        entry.files["predictions.csv"] = rows
    if entry.queries is not train:
        predictions, _ = vote(args, train, entry.queries, loo)
    table |= {k: (predictions[k] == truth).mean() for k in loo}
    table["chosen k"] = accuracy = table[k]
    entry.predicted, classes = predictions[k], np.unique(truth)
    recalls = recall_score(truth, predictions[k], labels=classes, average=None)
    low, high = binomtest(round(accuracy * len(truth)), len(truth)).proportion_ci(method="wilson")
    result = dict(k=k, accuracy=accuracy, low=low, high=high, leave_one_out=loo)
    per_class = dict(zip(map(name, classes), recalls))
    return dict(result, balanced_accuracy=recalls.mean(), per_class=per_class)


def most_certain(predictions, shares, k):
    """Yield row, prediction at k and its share of the votes, the largest share first.

    Ties, which are many at small k, by the mean share over all k.
    """
    agree = [(predictions[n] == predictions[k]) * shares[n] for n in shares]
    for i in np.lexsort([-np.mean(agree, axis=0), -shares[k]]):
        yield i, predictions[k][i], shares[k][i]


def labels_needed(entry, args, tables):
    """Fill {n: accuracies of 20 draws of n labels per class}, by the kNN vote and by --probe."""
    train, labels, by_test = entry.voters, entry.voters.labels, entry.queries is not entry.voters
    classes, sizes = np.unique(labels, return_counts=True)
    methods = dict(labels=few_labels)
    if args.probe and len(classes) > 1:
        methods["probe"] = probe
    # A class with fewer than n labels gives all, unless the rest of each class is predicted.
    most = sizes.max() if by_test else sizes.min() - 1
    for n in (n for n in args.labels_per_class if 0 < n <= most):
        for seed in range(20):
            # The same images for every input.
            order = np.random.default_rng(seed).permutation(len(labels))
            ordered = labels[order]
            known = train[np.concatenate([order[ordered == label][:n] for label in classes])]
            queries = entry.queries if by_test else train[~np.isin(train.groups, known.groups)]
            for name, predict in methods.items() if len(queries) else ():
                right = predict(known, queries, args, n) == queries.labels
                tables[name].setdefault(n, []).append(right.mean())
    for name in methods:
        # Where groups leave a draw nothing to predict, the rest would not compare.
        tables[name] = {n: right for n, right in tables[name].items() if len(right) >= 20}
    if tables["labels"]:
        tables["labels"]["all"] = tables["knn"]["chosen k"]
    elif args.labels_per_class:
        print(f"{entry.name}: too few images or groups for the table of few labels")
    if "probe" in methods and by_test:
        tables["probe"]["all"] = (probe(train, entry.queries) == entry.queries.labels).mean()


def few_labels(known, queries, args, n):
    """Predict by the kNN vote; k, at most n, is chosen by leave-one-out among the known labels."""
    *_, loo = leave_one_out(args, known, n)
    k = max(loo, key=loo.get, default=1)
    return vote(args, known, queries, [k])[0][k]


def probe(known, queries, *ignored):
    """Predict by logistic regression on standardized features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    with warnings.catch_warnings():
        # Not converged after 1,000 iterations is good enough to compare.
        warnings.simplefilter("ignore")
        return model.fit(known.features, known.labels).predict(queries.features)


def nearest_images(train, queries, k, args):
    """Distances and neighbors [M, k] between Parts: training images see those of other groups."""
    own = queries.groups if queries.name == "train" else None
    options = args.metric, args.device, train.groups, own
    chunks = nearest(train.features, queries.features, k, *options)
    return map(np.concatenate, zip(*(chunk[1:] for chunk in chunks)))


CLOSENESS = dict(cosine="similarity", euclidean="distance")


def closest_pairs(entry, args):
    """Rows of pairs.csv. Prints the number of test images that equal a training image."""
    train = entry.train
    rows = [["part", "file", "train_file", CLOSENESS[args.metric]]]
    for part in filter(len, (train, entry.test)):
        distances, neighbors = nearest_images(train, part, 20, args)
        equal = (distances[:, :1] < 1e-4).sum()
        if equal and part is not train:
            print(f"{entry.name}: {equal} test images have a training image's features: a leak")
        closest = np.argsort(distances, axis=None, kind="stable")[:200]
        i, j = np.unravel_index(closest, distances.shape)
        pairs = zip(distances[i, j], i, neighbors[i, j])
        # Within the training images, each pair comes twice.
        pairs = [pair for pair in pairs if part is not train or pair[1] < pair[2]]
        for distance, i, j in pairs[:100]:
            rows.append([part.name, part.files[i], train.files[j], closeness(distance, args)])
    return rows


def closeness(distance, args):
    """Cosine similarity, or Euclidean distance."""
    return 1 - distance**2 / 2 if args.metric == "cosine" else distance


# ---------------------------------------------------------------- pictures


def draw_neighbors(entry, get, args):
    """Eight queries, four of them wrong if so many are, with their six nearest training images."""
    train, queries = entry.voters, entry.queries
    wrong = entry.predicted != queries.labels
    # In random order, those predicted wrongly last.
    rows = np.random.default_rng(0).permutation(len(queries))
    rows = rows[wrong[rows].argsort(kind="stable")]
    rows = [*rows[:4], *rows[4:][-4:]]
    distances, neighbors = nearest_images(train, queries[rows], 6, args)
    figure = Figure(figsize=(9, 12), layout="constrained")
    figure.suptitle(
        "Left: a query, red if it is predicted wrongly. Right: the nearest training "
        f"images\nwith their {CLOSENESS[args.metric]}, red if they are of another class.",
        size=9,
    )
    axes = figure.subplots(len(rows), 7, squeeze=False, subplot_kw=dict(xticks=[], yticks=[]))

    def show(ax, part, row, red, number=""):
        ax.imshow(visible(get(part[[row]]))[0])
        ax.set_title(entry.class_name(part.labels[row]) + number, fontsize=8)
        ax.spines[:].set_color("tab:red" if red else "0.7")
        ax.spines[:].set_linewidth(3)

    for i, row in enumerate(rows):
        show(axes[i, 0], queries, row, wrong[row])
        for ax, distance, near in zip(axes[i, 1:], distances[i], neighbors[i]):
            red = train.labels[near] != queries.labels[row]
            show(ax, train, near, red, f" {closeness(distance, args):.2f}")
    return figure


def draw_embedding(entry, get, args):
    """The features in two dimensions, colored by class, and some of the images."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    part = entry.test if len(entry.test) else entry.train
    # At most 5,000 points, in random order, so that no class covers another.
    part = part[np.random.default_rng(0).permutation(len(part))[:5000]]
    features = part.features
    # Too few, or of a collapsed encoder.
    if min(features.shape) < 5 or not np.ptp(features, axis=0).any():
        return None
    project = PCA(2, random_state=0)
    if args.embedding_2d == "tsne":
        perplexity = min(30, len(features) / 4)
        project = TSNE(perplexity=perplexity, metric=args.metric, random_state=0)
    points = project.fit_transform(features)
    classes, first, ids = np.unique(part.labels, return_index=True, return_inverse=True)
    palette = colormaps["tab10" if len(classes) <= 10 else "tab20"]
    colors = palette(ids % palette.N)
    colors[part.labels == -1] = 0.7
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots()
    axes.scatter(*points.T, s=8, c=colors)
    if get:
        # One image in each cell of a grid of 20 x 20.
        cells = np.digitize(points, np.linspace(points.min(), points.max(), 21))
        for i in np.unique(cells, axis=0, return_index=True)[1]:
            frame = dict(edgecolor=colors[i], boxstyle="square,pad=0.1")
            (image,) = visible(get(part[[i]]).numpy())
            box = OffsetImage(image, zoom=24 / len(image))
            axes.add_artist(AnnotationBbox(box, points[i], bboxprops=frame))
    if len(classes) <= 20:
        for label, color in zip(classes, colors[first]):
            axes.scatter([], [], s=8, color=color, label=entry.class_name(label) or "unlabeled")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.set(title=f"{entry.name}: {part.name} features, {args.embedding_2d}", xticks=[], yticks=[])
    return figure


def draw_curves(rows, xlabel):
    """Accuracy over the integer labels of a table: a curve with a band for each column."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes, rows = figure.subplots(), [row for row in rows if row[1] not in WORDS]
    for i, column in enumerate(dict.fromkeys(row[0] for row in rows)):
        style = dict(pixels="--", untrained=":").get(column.split()[0], "-")
        color = f"C{i}" if style == "-" else "0.4"
        x, mean, std = np.transpose([row[1:] for row in rows if row[0] == column])
        low, high = 100 * (mean - std), 100 * (mean + std)
        axes.plot(x, 100 * mean, style, marker=".", color=color, label=column)
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set(xscale="log", xlabel=xlabel, ylabel="accuracy in %, band: standard deviation")
    ticks = [*{row[1] for row in rows}]
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside lower center", ncols=2, frameon=False)
    return figure


def details(entry, args):
    """Names and contents of the files of one input."""
    files = {**entry.files, "pairs.csv": closest_pairs(entry, args)}
    try:
        # With --pixels they are loaded already.
        get = getattr(entry, "get", None) or pictures(entry)
    except UserError as error:
        print(f"no pictures: {error}")
        get = None
    else:
        files["neighbors.png"] = draw_neighbors(entry, get, args)
    files["embedding_2d.png"] = draw_embedding(entry, get, args)
    return files.items()


# ---------------------------------------------------------------- tables


def summarize(results, name):
    """Rows [column, label, mean, standard deviation] of a table, over the runs of each column.

    Over the draws, if a column is a single run.
    """
    found = {}
    for result in results:
        for label, value in result["tables"][name].items():
            found.setdefault((result["column"], label), []).append(value)
    rows = []
    for key, values in found.items():
        values = np.ravel(values) if len(values) == 1 else [np.mean(v) for v in values]
        std = np.std(values, ddof=1) if len(values) > 1 else np.nan
        rows.append([*key, np.mean(values), std])
    return rows


def print_table(title, rows, style):
    """Accuracies in % as Markdown or LaTeX."""
    shown = {
        (column, label): f"{100 * mean:.2f} ± {100 * std:.2f}".removesuffix(" ± nan")
        for column, label, mean, std in rows
    }
    columns, labels = map(dict.fromkeys, zip(*shown))
    table = [[title, *columns]]
    for label in sorted(labels, key=lambda label: (label in WORDS, label)):
        table.append([str(label), *(shown.get((column, label), "") for column in columns)])
    widths = [max(map(len, column)) for column in zip(*table)]
    table = [[*map(str.rjust, row, widths)] for row in table]
    if style == "latex":
        text = "\n".join(" & ".join(row) + r" \\" for row in table)
        text = re.sub(r"([_%#$])", r"\\\1", text).replace("±", r"$\pm$")
        text = f"\\begin{{tabular}}{{l{'r' * len(columns)}}}\n{text}\n\\end{{tabular}}"
    else:
        table.insert(1, ["-" * width for width in widths])
        text = "\n".join(f"| {' | '.join(row)} |" for row in table)
    print(f"\n{text}\n")


def report(results, args):
    """Print tables and results; return the files that the inputs share."""
    content = dict(args=asdict(args), results=results)
    files = {"knn.json": json.dumps(content, indent=2)}
    for name, title in TABLES.items():
        rows = summarize(results, name)
        if rows:
            print_table(title, rows, args.table)
            files[f"{name}.csv"] = [["column", title, "mean", "std"], *rows]
            files[f"{name}.png"] = draw_curves(rows, title)
    lines = []
    for result in results:
        text = f"{result['name']}: effective rank {result['effective_rank']:.1f}"
        if "k" in result:
            kind = "test" if result["n_test"] else "leave-one-out"
            text += f", k = {result['k']}, {kind} accuracy = {100 * result['accuracy']:.2f} %"
            text += f" ({100 * result['low']:.2f} to {100 * result['high']:.2f})"
        print(text)
        line = {key: value for key, value in result.items() if not isinstance(value, dict)}
        lines.append(line | result["meta"])
    fields = [*dict.fromkeys(key for line in lines for key in line)]
    files["results.csv"] = [fields, *(map(line.get, fields) for line in lines)]
    return files


def write(folder, files):
    """Replace the files of an earlier evaluation by texts, rows of tables and figures."""
    paths = {folder / name: content for name, content in files.items()}
    for path, content in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        elif isinstance(content, list):
            with open(path, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(content)
        else:
            content.savefig(path, dpi=120)
    for place in {path.parent for path in paths}:
        for path in {place / name for name in KNOWN} - {*paths}:
            path.unlink(missing_ok=True)


def main(args):
    """Evaluate every input, then write the files. Returns the results."""
    check(args.temperature > 0, f"--temperature {args.temperature} must be above 0")
    cuda = pick_device(args.device).type == "cuda"
    args = replace(args, device="cuda" if cuda else None)
    runs = read_inputs(args.inputs)
    folder = Path(args.output or f"{runs[0].name if len(runs) == 1 else 'runs'}/knn")
    failed = f"cannot write to --output {str(folder)!r}"
    with user_errors(failed, OSError):
        # A labels.csv may be the user's own.
        ours = not folder.exists() or (folder / "knn.json").exists() or not any(folder.iterdir())
        check(ours, f"{failed}: it holds other files; name another folder")
    inputs = runs + (pixels_of(runs) if args.pixels else [])
    name_columns(inputs)
    results = [evaluate(entry, args) for entry in inputs]
    # A $ in a name starts no formula.
    with rc_context({"text.parse_math": False}), user_errors(failed, OSError):
        files = report(results, args)
        for entry in runs:
            # A folder for each of several runs.
            place = re.sub(r"[^\w-]+", "_", entry.name) + "/" if len(runs) > 1 else ""
            files |= {place + name: content for name, content in details(entry, args) if content}
        # A failure until here leaves earlier files as they are.
        write(folder, files)
    print(f"\nwrote {', '.join(name for name in files if '/' not in name)} to {folder}")
    name = f"knn-{runs[0].column}"
    tracker = Tracker(args, folder, name=name, group="knn", config=asdict(args))
    for column, k, accuracy, _ in summarize(results, "knn"):
        tracker.log({"k": k, f"knn/{column}": accuracy})
    tracker.log({name[:-4]: folder / name for name in files if name.endswith(".png")})
    tracker.finish()
    return results


if __name__ == "__main__":
    cli(Args, main)
