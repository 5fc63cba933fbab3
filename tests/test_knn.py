"""knn_eval.py: knn_sweep against scikit-learn and naive loops, and the command line."""

import csv
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

import knn_eval
from knn_eval import knn_sweep

KS = (1, 2, 3, 4, 5, 10, 20, 50, 70, 100, 200, 500, 1000)


def clusters(n=1200, m=300, dim=32, classes=7, seed=0, dtype=np.float32):
    """Overlapping clusters without distance ties: train features, labels, test features, labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n + m)
    noise = 2.5 * rng.normal(size=(n + m, dim))
    features = (rng.normal(size=(classes, dim))[labels] + noise).astype(dtype)
    return features[:n], labels[:n], features[n:], labels[n:]


def digits():
    images, labels = load_digits(return_X_y=True)
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def naive(train, labels, test, k, weigh, leave_one_out=False):
    """One query at a time in float64; weigh(distances, labels of the neighbors, own index)."""
    predicted = []
    for i, query in enumerate(test.astype(np.float64)):
        distances = np.sqrt(((train.astype(np.float64) - query) ** 2).sum(1))
        order = np.argsort(distances, kind="stable")
        order = order[order != i][:k] if leave_one_out else order[:k]
        weights = weigh(distances[order], labels[order], i)
        classes = np.unique(labels)
        votes = [weights[labels[order] == label].sum() for label in classes]
        predicted.append(classes[int(np.argmax(votes))])
    return np.array(predicted)


def uniform(distances, labels, i):
    return np.ones(len(distances))


@pytest.mark.parametrize("vote", ["uniform", "distance"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("data", [clusters, digits])
def test_knn_sweep_equals_scikit_learn(data, dtype, metric, vote):
    """Every prediction is KNeighborsClassifier's, unless a tie of two labels straddles k."""
    train, labels, test, _ = data()
    train, test = train.astype(dtype), test.astype(dtype)
    found = knn_sweep(train, labels, test, KS, metric=metric, vote=vote)
    a, b = (normalize(train), normalize(test)) if metric == "cosine" else (train, test)
    squared = ((b.astype(np.float64)[:, None] - a.astype(np.float64)) ** 2).sum(2)
    ascending, excluded = np.sort(squared, axis=1), 0
    assert list(found) == list(KS)
    for k in KS:
        last, following = ascending[:, k - 1 : k + 1].T
        tied = np.flatnonzero(following - last <= 1e-12 * following)
        at_k = [labels[np.abs(squared[i] - last[i]) <= 1e-12 * last[i]] for i in tied]
        tied = [i for i, group in zip(tied, at_k) if len(set(group)) > 1]
        expected = KNeighborsClassifier(k, weights=vote).fit(a, labels).predict(b)
        assert (np.delete(found[k], tied) == np.delete(expected, tied)).all()
        excluded += len(tied)
    assert excluded <= (0.08 * len(test) * len(KS) if data is digits else 0)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_leave_one_out_equals_naive_loop(device):
    """test_features=None predicts each training point from all the others."""
    train, labels, _, _ = clusters(300, 1)
    found = knn_sweep(train, labels, None, [1, 2, 30, 299], metric="euclidean", device=device)
    for k in found:
        assert (found[k] == naive(train, labels, train, k, uniform, leave_one_out=True)).all()


def test_leave_one_out_among_equal_points():
    """A point never votes for itself, even with more equal points than neighbors."""
    train = np.ones((21, 3), np.float32)
    train[20] = (1, -1, 0)
    labels = np.array([0] * 10 + [1] * 10 + [7])
    for k in (1, 5):
        assert 7 not in knn_sweep(train, labels, None, [k])[k]
    predicted = knn_sweep(train, labels, None, [19])[19]
    assert predicted[0] == 1 and predicted[19] == 0


@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_softmax_vote_equals_naive_loop(temperature):
    """vote="softmax" weighs by exp(similarity / temperature)."""
    train, labels, test, _ = clusters(400, 100)

    def softmax(distances, labels, i):
        return np.exp((1 - distances**2 / 2) / temperature)

    found = knn_sweep(train, labels, test, [5, 50, 400], vote="softmax", temperature=temperature)
    for k in found:
        expected = naive(normalize(train), labels, normalize(test), k, softmax)
        assert (found[k] == expected).all()
    assert (found[400] != knn_sweep(train, labels, test, [400])[400]).any()


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_balanced_vote_equals_naive_loop(leave_one_out):
    """vote="balanced" divides by the class size, without the point itself under leave-one-out."""
    train, labels, test, _ = clusters(120, 100, classes=5)
    labels = np.where(labels > 1, 4, labels)
    test = train if leave_one_out else test
    sizes = np.bincount(labels)

    def share(distances, found, i):
        own = (found == labels[i]) if leave_one_out else 0
        return 1 / (sizes[found] - own)

    queries = None if leave_one_out else test
    found = knn_sweep(train, labels, queries, [7, 60], vote="balanced")
    for k in found:
        expected = naive(normalize(train), labels, normalize(test), k, share, leave_one_out)
        assert (found[k] == expected).all()
    assert (found[60] != knn_sweep(train, labels, queries, [60])[60]).any()


def test_smallest_label_wins_tied_vote():
    """At k = 2, two neighbors of different labels give the smaller one, whichever is nearer."""
    train = np.array([[0.0], [1.0], [10.0], [11.0]])
    labels, test = np.array([9, -3, -8, 2]), np.array([[0.1], [10.9]])
    found = knn_sweep(train, labels, test, [1, 2], metric="euclidean")
    assert found[1].tolist() == [9, 2] and found[2].tolist() == [-3, -8]


@pytest.mark.parametrize("queries", ["test", "leave-one-out"])
@pytest.mark.parametrize("vote", ["uniform", "distance", "softmax", "balanced"])
def test_torch_device_and_small_chunks_equal_scikit_learn(vote, queries, monkeypatch):
    """device="cpu" and a small BUDGET, with many blocks and chunks, change no prediction."""
    train, labels, test, _ = clusters(160, 40)
    test = test if queries == "test" else None
    expected = knn_sweep(train, labels, test, [1, 4, 30], vote=vote)
    for budget in (2**28, 2**14):
        monkeypatch.setattr(knn_eval, "BUDGET", budget)
        for device in (None, "cpu"):
            found = knn_sweep(train, labels, test, [1, 4, 30], vote=vote, device=device)
            assert all((found[k] == expected[k]).all() for k in expected), (budget, device)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_collapsed_features_give_majority_class(metric):
    """Equal training points have no nearest ones: every k predicts the largest class."""
    labels = np.array([2, 2, 5, 5, 5, 5, 9, 2, 9, 9])
    for value in (0, 0.1):
        found = knn_sweep(np.full((10, 4), value), labels, np.ones((3, 4)), [1, 6], metric=metric)
        assert {k: set(predicted) for k, predicted in found.items()} == {1: {5}, 6: {5}}


BAD_ARGUMENTS = {
    "no k": dict(ks=[]),
    "k above n": dict(ks=[301]),
    "metric": dict(metric="manhattan"),
    "vote": dict(vote="loud"),
    "softmax of euclidean": dict(vote="softmax", metric="euclidean"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_knn_sweep_raises_value_error(name):
    """Arguments without an answer raise ValueError."""
    train, labels, test, _ = clusters(300, 100)
    arguments = dict(train_features=train, train_labels=labels, test_features=test, ks=[1, 5])
    with pytest.raises(ValueError):
        knn_sweep(**{**arguments, **BAD_ARGUMENTS[name]})


def test_file_alone_gives_knn_sweep(tmp_path):
    """knn_eval.py imports and works in an empty folder, without common.py."""
    shutil.copy(knn_eval.__file__, tmp_path)
    code = (
        "import numpy as np, knn_eval as e; x = np.eye(4); print(e.knn_sweep(x, range(4), x, [1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "{1: array([0, 1, 2, 3])}\n" and done.stderr == ""


META = dict(dataset="digits", data_dir="data", image_size=8, encoder="resnet18", epochs=60, seed=1)


def write(path, **arrays):
    """An embeddings.npz; None leaves an array out."""
    names = ("train_features", "train_labels", "test_features", "test_labels")
    default = dict(zip(names, clusters(160, 60, dim=8, classes=3)))
    default.update(class_names=np.array(["ant", "bee", "cat"]), meta=np.array(json.dumps(META)))
    arrays = {key: value for key, value in {**default, **arrays}.items() if value is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return arrays


def knn_json(folder, prefix=""):
    return json.loads((Path(folder) / f"{prefix}knn.json").read_text())


@pytest.mark.parametrize("projection", ["pca", "tsne"])
def test_run_folder_gets_all_files(run_cli, tmp_path, projection):
    """--confusion --probe: knn.json, knn.csv and stdout hold the accuracies of knn_sweep."""
    run = tmp_path / "a b"
    data = write(run / "embeddings.npz")
    done = run_cli(knn_eval, run, "--confusion", "--probe", "--embedding-2d", projection)
    assert done.status == 0 and done.err == ""
    train, labels, test, truth, *_ = data.values()
    predicted, loo = (knn_sweep(train, labels, queries, KS[:10]) for queries in (test, None))
    result = knn_json(run)
    with open(run / "knn.csv") as file:
        lines = list(csv.DictReader(file))
    assert result["meta"] == META and result["name"] == "a_b"
    assert (
        [int(line["k"]) for line in lines] == [row["k"] for row in result["sweep"]] == list(KS[:10])
    )
    for row, line in zip(result["sweep"], lines):
        correct = predicted[row["k"]] == truth
        per_class = [correct[truth == c].mean() for c in range(3)]
        assert row["accuracy"] == float(line["accuracy"]) == correct.mean()
        assert row["leave_one_out"] == (loo[row["k"]] == labels).mean()
        assert row["per_class"] == pytest.approx(per_class)
        assert row["balanced_accuracy"] == pytest.approx(np.mean(per_class))
        assert row["low"] < row["accuracy"] < row["high"]
    best = max(row["leave_one_out"] for row in result["sweep"])
    chosen = min(row["k"] for row in result["sweep"] if row["leave_one_out"] == best)
    pairs = [[((truth == i) & (predicted[chosen] == j)).sum() for j in range(3)] for i in range(3)]
    assert result["confusion"] == {"classes": ["ant", "bee", "cat"], "true_by_predicted": pairs}
    accuracy = 100 * (predicted[chosen] == truth).mean()
    assert f"[1] chosen k = {chosen}, test accuracy = {accuracy:.2f} % (95 %" in done.out
    assert "a_b: dropped every k above 160" in done.out
    assert "[1] a_b: n_train 160, n_test 60, D 8, encoder resnet18, epochs 60, seed 1" in done.out
    assert f"test accuracy = {100 * result['probe']['test_accuracy']:.2f} % (C = " in done.out
    names = {"embeddings.npz", "knn.json", "knn.csv", "knn.png", "embedding_2d.png"}
    assert {path.name for path in run.iterdir()} == names
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in names if "png" in name)


def test_k_is_chosen_without_test_labels(run_cli, tmp_path):
    """Other test labels change the accuracy, not the chosen k; --no-loo chooses none."""
    data = write(tmp_path / "a.npz")
    write(tmp_path / "b.npz", test_labels=np.roll(data["test_labels"], 7))
    run_cli(knn_eval, tmp_path / "a.npz", tmp_path / "b.npz")
    a, b = (knn_json(tmp_path, prefix) for prefix in ("a-", "b-"))
    assert a["chosen_k"] == b["chosen_k"] and a["test_accuracy"] != b["test_accuracy"]
    out = run_cli(knn_eval, tmp_path / "a.npz", "--no-loo", "--ks", 1, 5).out
    assert "no k chosen" in out and knn_json(tmp_path)["chosen_k"] is None


def test_every_run_and_pixels(run_cli, refused, tmp_path, monkeypatch):
    """Without inputs every run under runs/ is evaluated; --pixels adds its data set."""
    from common import load_images

    assert "no run" in refused(knn_eval).err
    write(Path("runs/one/embeddings.npz"))
    write(Path("runs/two/embeddings.npz"))
    Path("runs/unfinished").mkdir()
    done = run_cli(knn_eval, "--pixels", "--ks", 1, 3)
    assert done.err.startswith("left out: ") and "unfinished" in done.err
    assert "[3] pixels of digits: n_train 1437, n_test 360, D 64" in done.out
    assert knn_json("runs/one")["name"] == "one" and knn_json("runs/two")["name"] == "two"
    images, result = load_images("digits", "data"), knn_json("runs/one", "pixels-")
    train, test = (part.numpy()[:, 0].reshape(-1, 64) for part in (images.train, images.test))
    found = knn_sweep(train, images.train_labels.numpy(), test, [1, 3])
    expected = [(found[k] == images.test_labels.numpy()).mean() for k in found]
    assert [row["accuracy"] for row in result["sweep"]] == expected


def test_output_folder_keeps_equal_names_apart(run_cli, finished, tmp_path):
    """--output: one folder for all inputs, equal names numbered; also of a run of simclr.py."""
    write(tmp_path / "simclr/embeddings.npz")
    words = [finished("simclr"), tmp_path / "simclr/embeddings.npz", "--embedding-2d", "none"]
    assert run_cli(knn_eval, *words, "--output", tmp_path / "new/out").status == 0
    names = [f"simclr-{i}-knn.{ending}" for i in (1, 2) for ending in ("csv", "json")]
    assert sorted(path.name for path in (tmp_path / "new/out").iterdir()) == ["knn.png", *names]


def test_unlabelled_rows_are_dropped(run_cli, tmp_path):
    """Label -1 is dropped with a note; classes missing from one split keep their names."""
    train, labels, test, truth = clusters(160, 60, dim=8, classes=3)
    kept, seen = np.arange(160) % 4 > 0, truth != 2
    unlabelled = dict(
        train_labels=np.where(kept, labels, -1), test_labels=np.where(seen, truth, -1)
    )
    write(tmp_path / "a.npz", **unlabelled)
    done = run_cli(knn_eval, tmp_path / "a.npz", "--ks", 7, "--confusion")
    result = knn_json(tmp_path)
    assert "dropped 40 unlabelled of 160 train images" in done.out
    found = knn_sweep(train[kept], labels[kept], test[seen], [7])[7]
    assert result["test_accuracy"] == (found == truth[seen]).mean()
    assert result["classes"] == ["ant", "bee"] and len(result["confusion"]["classes"]) == 3


@pytest.mark.parametrize("n, dim, classes, scale", [(1, 1, 1, 1), (30, 1, 2, 1), (50, 4, 3, 0)])
def test_tiny_and_collapsed_features(run_cli, tmp_path, n, dim, classes, scale):
    """One point, one dimension, a collapsed encoder: an answer without warnings."""
    features, labels = (
        scale * np.random.default_rng(0).normal(size=(n, dim)),
        np.arange(n) % classes,
    )
    arrays = dict(train_features=features, train_labels=labels, class_names=None)
    write(tmp_path / "a.npz", test_features=features, test_labels=labels, **arrays)
    done = run_cli(knn_eval, tmp_path / "a.npz", "--embedding-2d", "tsne", "--probe")
    assert done.status == 0 and done.err == "", done


MISTAKES = {
    "missing array": (dict(test_labels=None), [], "test_labels"),
    "integer features": (dict(train_features=np.ones((160, 8), int)), [], "train_features"),
    "float labels": (dict(test_labels=np.ones(60)), [], "test_labels"),
    "nan": (dict(test_features=np.full((60, 8), np.nan)), [], "not finite"),
    "other width": (dict(test_features=np.ones((60, 7))), [], "7"),
    "all unlabelled": (dict(test_labels=np.full(60, -1)), [], "unlabelled"),
    "meta": (dict(meta=np.array("[1]")), [], "meta"),
    "k above n": ({}, ["--ks", 500], "160 training points"),
    "temperature": ({}, ["--temperature", 0], "--temperature 0"),
    "softmax": ({}, ["--vote", "softmax", "--metric", "euclidean"], "--metric cosine"),
    "output": ({}, ["--output", __file__], "--output"),
    "pixels": (dict(meta=np.array("{}")), ["--pixels"], "--pixels"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_error_line(refused, tmp_path, name):
    """A mistake in flags or arrays gives one error line, and nothing is written."""
    arrays, flags, says = MISTAKES[name]
    write(tmp_path / "a.npz", **arrays)
    refused(knn_eval, tmp_path / "a.npz", *flags, says=[says])


def test_damaged_npz_is_one_error_line(refused, tmp_path):
    """A truncated .npz, another file and an empty one are refused by name."""
    write(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    for content in (b"", b"text", whole[:100], whole[:-100], whole[:3000] + whole[3100:]):
        (tmp_path / "a.npz").write_bytes(content)
        refused(knn_eval, tmp_path / "a.npz", says=["a.npz"])


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["train_features", "class_names", "meta", "file"])
def test_pickle_is_not_run(refused, tmp_path, name):
    """Pickled arrays, or a pickle in place of the file, are refused and run no code."""
    path, payload = tmp_path / "a.npz", Payload(tmp_path / "harm")
    write(path, **({} if name == "file" else {name: np.array([payload] * 160, dtype=object)}))
    if name == "file":
        path.write_bytes(pickle.dumps(payload))
    refused(knn_eval, path)
    assert not (tmp_path / "harm").exists()


def test_failure_leaves_earlier_files(run_cli, tmp_path, monkeypatch):
    """An exception in the last step before writing keeps its traceback and changes no file."""
    for name in ("a", "b"):
        write(tmp_path / name / "embeddings.npz")
    words = [tmp_path / "a", tmp_path / "b", "--ks"]
    run_cli(knn_eval, *words, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    monkeypatch.setattr(knn_eval, "draw_embedding", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_cli(knn_eval, *words, 2)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
