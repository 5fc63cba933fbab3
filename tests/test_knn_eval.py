"""knn_eval.py: exact against scikit-learn and against naive loops, and calm about bad input."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import knn_eval  # noqa: E402
from knn_eval import knn_sweep  # noqa: E402

KS = (1, 2, 3, 4, 5, 10, 20, 50, 70, 100, 200, 500, 1000)


def clusters(n=1200, m=300, dim=32, classes=7, seed=0, dtype=np.float32):
    """Overlapping clusters without ties: features and labels to train on, features and labels to test on."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n + m)
    features = (rng.normal(size=(classes, dim))[labels] + 2.5 * rng.normal(size=(n + m, dim))).astype(dtype)
    return features[:n], labels[:n], features[n:], labels[n:]


def digits():
    images, labels = load_digits(return_X_y=True)
    return images[:1400].astype(np.float32), labels[:1400], images[1400:].astype(np.float32), labels[1400:]


def lattice(n=700, m=150, seed=0):
    """Points of a small integer lattice: nearly every distance occurs many times, and many points are equal."""
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 3, (n + m, 4)).astype(np.float32)
    return points[:n], rng.integers(0, 4, n), points[n:]


def naive(train, labels, test, k, vote=lambda squared: np.ones(len(squared)), leave_one_out=False):
    """One query at a time in float64: stable sort, so the lowest index wins; the smallest label wins a tied vote."""
    out = []
    for i, query in enumerate(test.astype(np.float64)):
        squared = ((train.astype(np.float64) - query) ** 2).sum(1)
        order = np.argsort(squared, kind="stable")
        order = order[order != i][:k] if leave_one_out else order[:k]
        weights = vote(squared[order])
        votes = {label: weights[labels[order] == label].sum() for label in np.unique(labels[order])}
        out.append(max(sorted(votes), key=votes.get))
    return np.array(out)


def one_over_distance(squared):
    return (squared == 0).astype(float) if (squared == 0).any() else 1 / np.sqrt(squared)


@pytest.fixture(autouse=True)
def one_thread():
    """What is tested here is small: more threads would only wait for each other."""
    with threadpool_limits(1):
        yield


# ------------------------------------------------------------------------------------------ knn_sweep


@pytest.mark.parametrize("vote", ["uniform", "distance"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("data", [clusters, digits])
def test_equals_scikit_learn(data, metric, vote):
    train, labels, test = data()[:3]
    found = knn_sweep(train, labels, test, KS, metric=metric, vote=vote)
    assert list(found) == list(KS)
    a, b = (normalize(train), normalize(test)) if metric == "cosine" else (train, test)
    squared = ((b.astype(np.float64)[:, None] - a.astype(np.float64)[None]) ** 2).sum(2)
    ascending = np.sort(squared, axis=1)
    differ = excluded = 0
    for k in KS:
        expected = KNeighborsClassifier(k, weights=vote).fit(a, labels).predict(b)
        defined = ascending[:, k - 1] != ascending[:, k]
        for i in np.flatnonzero(~defined):  # scikit-learn's answer depends on the number of queries if labels differ
            defined[i] = len(set(labels[squared[i] == ascending[i, k]])) == 1
        excluded += (~defined).sum()
        differ += (expected != found[k])[defined].sum()
    assert differ == 0
    assert excluded <= (0.08 * len(test) * len(KS) if data is digits and metric == "euclidean" else 0)


def test_float64_float16_and_integers():
    train, labels, test, _ = clusters(dtype=np.float64)
    expected = KNeighborsClassifier(20).fit(normalize(train), labels).predict(normalize(test))
    assert (knn_sweep(train, labels, test, [20])[20] == expected).all()
    half = train.astype(np.float16), labels, test.astype(np.float16)
    expected = knn_sweep(half[0].astype(np.float32), labels, half[2].astype(np.float32), [20])[20]
    assert (knn_sweep(*half, [20])[20] == expected).all()
    train, labels, test = lattice()
    whole = knn_sweep(train.astype(np.uint8), labels, test.astype(np.uint8), KS[:9], metric="euclidean")
    parts = knn_sweep(train, labels, test, KS[:9], metric="euclidean")
    assert all((whole[k] == parts[k]).all() for k in KS[:9])


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("vote", ["uniform", "distance"])
def test_ties_take_the_lowest_index(vote, device):
    train, labels, test = lattice()
    found = knn_sweep(train, labels, test, range(1, 60), metric="euclidean", vote=vote, device=device)
    weigh = one_over_distance if vote == "distance" else lambda squared: np.ones(len(squared))
    for k in (1, 2, 3, 7, 20, 40, 59):
        assert (found[k] == naive(train, labels, test, k, weigh)).all()
        alone = knn_sweep(train, labels, test, [k], metric="euclidean", vote=vote, device=device)
        assert (found[k] == alone[k]).all()


@pytest.mark.parametrize("device", [None, "cpu"])
def test_ties_of_copies(device):
    """Equal rows whose distances float64 rounds differently: still the lowest index."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 300)).astype(np.float32)
    train = np.concatenate([rows] * 9)[rng.permutation(360)] + np.float32(3)
    labels, test = rng.integers(0, 5, 360), rng.normal(size=(50, 300)).astype(np.float32) + np.float32(3)
    for metric in ("euclidean", "cosine"):
        a, b = (normalize(train), normalize(test)) if metric == "cosine" else (train, test)
        found = knn_sweep(train, labels, test, range(1, 40), metric=metric, device=device)
        for k in (1, 2, 4, 5, 13, 39):
            assert (found[k] == naive(a, labels, b, k)).all()


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("data", [lattice, clusters])
def test_leave_one_out(data, device):
    train, labels = data()[:2]
    train, labels = np.concatenate([train[:200], train[:150]]), np.concatenate([labels[:200], labels[50:200]])
    found = knn_sweep(train, labels, None, [1, 2, 5, 30, 349], metric="euclidean", device=device)
    for k in (1, 2, 5, 30, 349):
        assert (found[k] == naive(train, labels, train, k, leave_one_out=True)).all()
    with pytest.raises(ValueError, match="349"):
        knn_sweep(train, labels, None, [350])


def test_leave_one_out_among_copies():
    """More copies than neighbours: the search may not even find the query itself."""
    labels = np.array([0, 1, 2, 3] * 25 + [3])
    train = np.ones((101, 3), np.float32)
    train[100] = (1, -1, 0)  # else the encoder would count as collapsed
    found = knn_sweep(train, labels, None, [1, 3])
    assert found[1][:100].tolist() == [1] + [0] * 99  # the lowest index is 0, except for point 0 itself
    assert (found[3] == naive(train, labels, train, 3, leave_one_out=True)).all()


@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_softmax(temperature):
    train, labels, test, _ = clusters(400, 100)
    a, b = normalize(train), normalize(test)
    found = knn_sweep(train, labels, test, [1, 5, 50, 400], vote="softmax", temperature=temperature)
    for k in (1, 5, 50, 400):
        expected = naive(a, labels, b, k, lambda squared: np.exp((1 - squared / 2) / temperature))
        assert (found[k] == expected).all()
    assert (found[400] != knn_sweep(train, labels, test, [400])[400]).any()  # the weights do matter


def test_softmax_at_extreme_temperatures():
    train, labels, test, _ = clusters(400, 100)
    nearest, majority = knn_sweep(train, labels, test, [1, 50]).values()
    assert (knn_sweep(train, labels, test, [50], vote="softmax", temperature=1e-300)[50] == nearest).all()
    assert (knn_sweep(train, labels, test, [50], vote="softmax", temperature=1e300)[50] == majority).all()


def test_balanced_leave_one_out_judges_each_point_by_the_others_alone():
    train, labels, _, _ = clusters(60, 2, dim=5, classes=3)
    labels[:45] = labels[0]
    found = knn_sweep(train, labels, None, [2, 5, 20], vote="balanced")
    for k in found:
        for i in range(len(train)):
            others = np.arange(len(train)) != i
            alone = knn_sweep(train[others], labels[others], train[i : i + 1], [k], vote="balanced")[k]
            assert found[k][i] == alone[0]


def test_balanced():
    train, labels, test, _ = clusters(600, 200, classes=5)
    labels = np.where(labels > 1, 4, labels)  # 3 of 5 points are of one class
    found = knn_sweep(train, labels, test, [1, 7, 100], vote="balanced")
    a, b = normalize(train), normalize(test)
    for k in (1, 7, 100):
        expected = []
        for query in b.astype(np.float64):
            order = np.argsort(((a - query) ** 2).sum(1), kind="stable")[:k]
            shares = [(labels[order] == c).sum() / (labels == c).sum() for c in (0, 1, 4)]
            expected.append([0, 1, 4][int(np.argmax(shares))])
        assert (found[k] == expected).all()
    plain = knn_sweep(train, labels, test, [100])[100]
    assert (found[100] == 4).sum() < (plain == 4).sum()


def test_torch_path_and_chunks_change_nothing(monkeypatch):
    whole = {}
    for data, small in ((clusters, 2**14), (lattice, 2**11)):  # three blocks of training points, a query at a time
        train, labels, test = data(160, 15)[:3]
        for budget in (2**28, small):
            monkeypatch.setattr(knn_eval, "BUDGET", budget)
            for device in (None, "cpu"):
                for queries in (test, None):
                    found = knn_sweep(train, labels, queries, [1, 4, 30], vote="distance", device=device)
                    expected = whole.setdefault((data, queries is None), found)
                    assert all((found[k] == expected[k]).all() for k in found), (budget, device)


@pytest.mark.parametrize("names", [[-9, 0, 7], [-(2**63), 2**63 - 1, 5], [3, 1, 2], [10**12, 10**12 + 1, -1]])
def test_labels_may_be_any_integers(names):
    train, ids, test, _ = clusters(300, 100, classes=3)
    names = np.sort(np.array(names))
    expected, found = knn_sweep(train, ids, test, [1, 2, 9]), knn_sweep(train, names[ids], test, [1, 2, 9])
    assert all((found[k] == names[expected[k]]).all() and found[k].dtype == names.dtype for k in found)


def test_collapsed_features():
    labels = np.array([2, 2, 5, 5, 5, 5, 9, 2, 9, 9])
    for metric in ("cosine", "euclidean"):
        for value in (0, 1, 0.1):
            train, test = np.full((10, 4), value, np.float32), np.full((3, 4), value, np.float32)
            for vote in ("uniform", "distance"):
                found = knn_sweep(train, labels, test, [1, 2, 6, 10], metric=metric, vote=vote)
                assert {k: set(v) for k, v in found.items()} == {1: {5}, 2: {5}, 6: {5}, 10: {5}}  # the majority class
    rng = np.random.default_rng(0)
    labels = rng.choice(3, 3000, p=[0.2, 0.6, 0.2])
    found = knn_sweep(np.ones((3000, 8)), labels, np.ones((2100, 8)), [101, 1001])
    assert all((v == 1).all() for v in found.values())


@pytest.mark.parametrize("change", [
    dict(ks=[]), dict(ks=[0, 1]), dict(ks=[-1]), dict(ks=[301]), dict(metric="manhattan"), dict(vote="loud"),
    dict(vote="softmax", temperature=0), dict(vote="softmax", temperature=-1), dict(vote="softmax", temperature=np.nan),
    dict(vote="softmax", metric="euclidean"), dict(train_labels=np.zeros(299, int)), dict(train_labels=np.zeros(300)),
    dict(test_features=np.zeros((5, 31))), dict(test_features=np.zeros((0, 32))), dict(test_features=np.zeros(32)),
    dict(train_features=np.zeros((300, 0)), test_features=np.zeros((5, 0))),
    dict(test_features=np.full((5, 32), np.nan)), dict(test_features=np.full((5, 32), np.inf)),
    dict(test_features=np.full((5, 32), 1e30, np.float32)),
])  # fmt: skip
def test_knn_sweep_refuses(change):
    train, labels, test, _ = clusters(300, 100)
    with pytest.raises(ValueError):
        knn_sweep(**{**dict(train_features=train, train_labels=labels, test_features=test, ks=[1, 5]), **change})


def test_arguments_are_left_alone():
    train, labels, test, _ = clusters(300, 100)
    before = [array.copy() for array in (train, labels, test)]
    knn_sweep(train, labels, test, [1, 5])
    assert all((a == b).all() for a, b in zip(before, (train, labels, test)))


# ------------------------------------------------------------------------------------------ the command


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run the command in an empty folder: command(*flags, status=0) -> (what main returned, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdout.reconfigure", lambda **kwargs: None, raising=False)

    def run(*argv, status=0):
        monkeypatch.setattr(sys, "argv", ["knn_eval.py", *map(str, argv)])
        returned, ended = [], 0
        try:
            common.cli(knn_eval.Args, lambda args: returned.append(knn_eval.main(args)))
        except SystemExit as end:
            ended = end.code
        out, err = capsys.readouterr()
        assert ended == status, err
        return (returned[0] if returned else None), out, err

    return run


def refused(command, *argv):
    """The one line that refuses: exit status 2, no traceback."""
    _, out, err = command(*argv, status=2)
    lines = [line for line in err.splitlines() if not line.startswith("left out: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def write(path, meta=None, **arrays):
    """An .npz like a method's, with `arrays` in place of its own; None leaves one out."""
    train, labels, test, truth = clusters(160, 60, dim=8, classes=3, seed=len(str(path)))
    meta = meta if isinstance(meta, np.ndarray) else np.array(json.dumps(meta or {}))
    arrays = {"train_features": train, "train_labels": labels, "test_features": test, "test_labels": truth,
              "class_names": np.array(["ant", "bee", "cat"]), "meta": meta, **arrays}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


META = dict(method="simclr", dataset="digits", data_dir="data", image_size=8, encoder="resnet18", epochs=60, seed=1)


def test_a_run_folder(command, tmp_path):
    path = write(tmp_path / "runs/a b/embeddings.npz", META)
    (result,), out, err = command("runs/a b", "--confusion", "--probe")
    assert err == ""
    data = np.load(path)
    arrays = [data[name] for name in ("train_features", "train_labels", "test_features")]
    expected = knn_sweep(*arrays, KS[:10])
    loo = knn_sweep(*arrays[:2], None, KS[:10])
    truth, labels = data["test_labels"], data["train_labels"]
    written = json.loads((tmp_path / "runs/a b/knn.json").read_text())
    assert written == json.loads(json.dumps(result))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "runs/a b/knn.csv").read_text())))
    assert [int(row["k"]) for row in rows] == [row["k"] for row in result["sweep"]] == list(KS[:10])
    for row, line in zip(result["sweep"], rows):
        right = expected[row["k"]] == truth
        assert row["accuracy"] == float(line["accuracy"]) == right.mean()
        assert row["leave_one_out"] == float(line["leave_one_out"]) == (loo[row["k"]] == labels).mean()
        per_class = [right[truth == c].mean() for c in range(3)]
        assert np.allclose(row["per_class"], per_class) and np.isclose(row["balanced_accuracy"], np.mean(per_class))
        assert row["low"] < row["accuracy"] < row["high"]
    best = max(row["leave_one_out"] for row in result["sweep"])
    assert result["chosen_k"] == min(row["k"] for row in result["sweep"] if row["leave_one_out"] == best)
    matrix = np.array(result["confusion"]["true_by_predicted"])
    chosen = expected[result["chosen_k"]]
    assert all(matrix[i, j] == ((truth == i) & (chosen == j)).sum() for i in range(3) for j in range(3))
    assert f"chosen k = {result['chosen_k']}, test accuracy = {100 * (chosen == truth).mean():.2f} %" in out
    assert "dropped every k above 160" in out and "ant" in out and "n_train 160, n_test 60, D 8" in out
    assert result["probe"]["test_accuracy"] > 0.5 and "no augmentation" in out
    for name in ("knn.png", "embedding_2d.png"):
        assert (tmp_path / "runs/a b" / name).read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "runs/a b").iterdir())) == 5  # no temporary file stays


def test_the_best_of_each_column_is_marked(command, tmp_path):
    write(tmp_path / "a.npz")
    (result,), out, _ = command("a.npz", "--no-loo", "--ks", 1, 5, 50)
    best = max(row["accuracy"] for row in result["sweep"])
    marked = [line.split() for line in out.splitlines() if line.rstrip().endswith("*")]
    assert marked and all(row[1] == f"{100 * best:.2f}*" for row in marked)
    assert result["chosen_k"] is None and "no k chosen" in out and "chosen k =" not in out
    assert "not a result" in out


def test_k_is_chosen_without_the_test_labels(command, tmp_path):
    data = clusters(160, 60, dim=8, classes=3)
    write(tmp_path / "a.npz", **dict(zip(("train_features", "train_labels", "test_features", "test_labels"), data)))
    write(tmp_path / "b.npz", train_features=data[0], train_labels=data[1], test_features=data[2],
          test_labels=np.roll(data[3], 7))  # fmt: skip
    (a, b), _, _ = command("a.npz", "b.npz")
    assert a["chosen_k"] == b["chosen_k"] and a["test_accuracy"] != b["test_accuracy"]


def test_no_input_takes_every_run(command, tmp_path):
    assert "no run" in refused(command)
    write(tmp_path / "runs/one/embeddings.npz", META)
    write(tmp_path / "runs/two/embeddings.npz", {**META, "epochs": 0})
    (tmp_path / "runs/unfinished").mkdir()
    results, out, err = command("--pixels", "--ks", 1, 3)
    assert [result["name"] for result in results] == ["one", "two", "pixels of digits"]
    assert err.startswith("left out: ") and "unfinished" in err
    for name in ("one/knn.json", "two/knn.json", "one/knn.png", "one/pixels-knn.json"):
        assert (tmp_path / "runs" / name).exists()
    images = common.load_images("digits")
    train, test = (getattr(images, part).numpy()[:, 0].reshape(-1, 64) for part in ("train", "test"))
    found = knn_sweep(train, images.train_labels.numpy(), test, [1, 3])
    accuracy = {row["k"]: row["accuracy"] for row in results[2]["sweep"]}
    assert all(accuracy[k] == (found[k] == images.test_labels.numpy()).mean() for k in (1, 3))
    assert "--pixels" in refused(command, write(tmp_path / "plain.npz"), "--pixels")
    for change in (dict(dataset="x\n"), dict(image_size=0), dict(image_size=10**9), dict(image_size="8"),
                   dict(data_dir=3), dict(dataset="folder", data_dir="no\0where"), dict(dataset="npz")):  # fmt: skip
        refused(command, write(tmp_path / "plain.npz", {**META, **change}), "--pixels")


def test_output_folder_and_names(command, tmp_path):
    write(tmp_path / "x/run/embeddings.npz")
    write(tmp_path / "y/run/embeddings.npz")
    write(tmp_path / "one.npz")
    write(tmp_path / "two.npz")
    write(tmp_path / "z/run-1.npz")  # called like what the first of two equal names would become
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    command(
        "x/run", "y/run/embeddings.npz", "z/run-1.npz", "--output", "new/folder", "--ks", 1, "--embedding-2d", "none"
    )
    written = sorted(p.name for p in (tmp_path / "new/folder").iterdir())
    assert written == ["knn.png", "run-1-3-knn.csv", "run-1-3-knn.json", "run-1-knn.csv", "run-1-knn.json",
                       "run-2-knn.csv", "run-2-knn.json"]  # fmt: skip
    assert before == sorted(p for p in tmp_path.rglob("*") if p.is_file() and p.parent.name != "folder")
    command("one.npz", "two.npz", "--ks", 1, 2, "--embedding-2d", "none")
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {
        "one.npz", "two.npz", "knn.png", "one-knn.json", "one-knn.csv", "two-knn.json", "two-knn.csv"}  # fmt: skip


def test_unlabelled_rows_and_missing_classes(command, tmp_path):
    train, labels, test, truth = clusters(160, 60, dim=8, classes=3)
    some, seen = np.where(np.arange(160) % 4 == 0, -1, labels), np.where(truth == 2, -1, truth)
    write(tmp_path / "a.npz", train_features=train, train_labels=some, test_features=test, test_labels=seen)
    (result,), out, _ = command("a.npz", "--ks", 1, 7, "--confusion")
    assert result["n_train"] == (some >= 0).sum() and result["n_test"] == (seen >= 0).sum() and "dropped 40" in out
    kept = some >= 0
    found = knn_sweep(train[kept], labels[kept], test[truth != 2], [7])[7]
    assert result["sweep"][1]["accuracy"] == (found == truth[truth != 2]).mean()
    assert result["classes"] == ["ant", "bee"] and len(result["confusion"]["classes"]) == 3
    write(tmp_path / "b.npz", train_features=train, train_labels=np.where(labels == 2, 40, labels) - 7,
          test_features=test, test_labels=truth)  # fmt: skip
    (result,), _, _ = command("b.npz", "--ks", 1, "--confusion", "--probe")
    assert result["confusion"]["classes"] == ["-7", "-6", "ant", "bee", "cat", "33"]
    assert result["test_accuracy"] == 0 and result["probe"]["test_accuracy"] == 0
    for part in ("train", "test"):
        arrays = {f"{part}_labels": np.full(160 if part == "train" else 60, -1)}
        assert "nothing to judge" in refused(command, write(tmp_path / "c.npz", **arrays))


def test_collapsed_and_tiny_inputs(command, tmp_path):
    """A constant encoder, one point, one class, one dimension: an answer, no warning, the pictures that make sense."""
    sizes = {"collapsed": (50, 20, 4, 3), "single": (1, 1, 1, 1), "class": (30, 9, 3, 1), "line": (20, 6, 1, 2)}
    for name, (n, m, dim, classes) in sizes.items():
        features = np.random.default_rng(0).normal(size=(n + m, dim)) * (name != "collapsed")
        labels = np.arange(n + m) % classes
        write(tmp_path / f"{name}.npz", train_features=features[:n], train_labels=labels[:n],
              test_features=features[n:], test_labels=labels[n:], class_names=None)  # fmt: skip
        for flags in (["--embedding-2d", "tsne"], ["--metric", "euclidean", "--vote", "distance", "--probe"]):
            (result,), _, err = command(f"{name}.npz", *flags)
            assert result["sweep"] and err == ""


def test_strange_names_do_no_harm(command, tmp_path):
    names = np.array(["$\\frac{", "_hidden\n\x1b[31m", "\ud800 ç"])
    meta = {**META, "epochs": 0, "encoder": "\x1b]0;x\x07", "seed": [1] * 1000}
    write(tmp_path / "$x_{$ é\n.npz", meta, class_names=names)
    _, out, err = command("$x_{$ é\n.npz", "--confusion")
    assert err == "" and "\x1b" not in out and (tmp_path / "knn.png").exists()


BAD_ARRAYS = {
    "lacks": dict(test_labels=None),
    "objects": dict(train_features=np.array([[{}] * 8] * 160, dtype=object)),
    "object labels": dict(train_labels=np.array([{}] * 160, dtype=object)),
    "integers": dict(train_features=np.ones((160, 8), int)),
    "complex": dict(train_features=np.ones((160, 8), complex)),
    "text": dict(test_features=np.full((60, 8), "x")),
    "records": dict(test_features=np.zeros(60, "f4,f4")),
    "float labels": dict(test_labels=np.ones(60)),
    "boolean labels": dict(test_labels=np.ones(60, bool)),
    "nan": dict(test_features=np.full((60, 8), np.nan, np.float32)),
    "one inf": dict(train_features=np.where(np.arange(1280).reshape(160, 8) == 77, -np.inf, 1.0)),
    "too large": dict(train_features=np.full((160, 8), 1e30)),
    "train lengths": dict(train_labels=np.zeros(159, int)),
    "test lengths": dict(test_labels=np.zeros(61, int)),
    "widths": dict(test_features=np.ones((60, 7), np.float32)),
    "no test rows": dict(test_features=np.ones((0, 8), np.float32), test_labels=np.zeros(0, int)),
    "no train rows": dict(train_features=np.ones((0, 8), np.float32), train_labels=np.zeros(0, int)),
    "no width": dict(train_features=np.ones((160, 0), np.float32), test_features=np.ones((60, 0), np.float32)),
    "flat": dict(train_features=np.ones(160, np.float32)),
    "cube": dict(train_features=np.ones((160, 2, 4), np.float32)),
    "label matrix": dict(train_labels=np.zeros((160, 1), int)),
    "meta list": dict(meta=np.array("[1, 2]")),
    "meta text": dict(meta=np.array("{'a': 1}")),
    "meta deep": dict(meta=np.array("[" * 100_000)),
    "meta number": dict(meta=np.array(3.5)),
    "meta object": dict(meta=np.array({}, dtype=object)),
    "names object": dict(class_names=np.array([{}], dtype=object)),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays(command, tmp_path, case):
    write(tmp_path / "good.npz")
    write(tmp_path / "bad.npz", **BAD_ARRAYS[case])
    line = refused(command, "good.npz", "bad.npz")
    assert "bad" in line and sorted(p.name for p in tmp_path.iterdir()) == ["bad.npz", "good.npz"]


BAD_FLAGS = [
    ["--ks"], ["--ks", 0], ["--ks", 1, -3], ["--ks", 500], ["--temperature", 0], ["--temperature", -1],
    ["--temperature", "nan"], ["--temperature", "inf"], ["--vote", "softmax", "--metric", "euclidean"],
    ["--confusion", "--no-loo"], ["--output", "good.npz"], ["--output", "good.npz/below"], ["--output", "x" * 300],
]  # fmt: skip


@pytest.mark.parametrize("flags", BAD_FLAGS, ids=lambda flags: " ".join(map(str, flags))[:40])
def test_bad_flags(command, tmp_path, flags):
    write(tmp_path / "good.npz")
    flags = flags if "--output" in flags else [*flags, "--output", "new"]
    refused(command, "good.npz", *flags)
    assert [p.name for p in tmp_path.iterdir()] == ["good.npz"]


def test_bad_flags_that_tyro_refuses(command, tmp_path):
    write(tmp_path / "good.npz")
    for flags in (
        "--ks 1.5",
        "--ks many",
        "--metric l1",
        "--vote x",
        "--nonsense",
        "--device tpu",
        "--temperature warm",
    ):
        _, _, err = command("good.npz", *flags.split(), status=2)
        assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["good.npz"]


def test_huge_k_is_dropped_with_a_word(command, tmp_path):
    write(tmp_path / "good.npz")
    (result,), out, _ = command("good.npz", "--ks", 10**30, 160, 1, 1)
    assert [row["k"] for row in result["sweep"]] == [1, 160] and "dropped every k above 160" in out
    assert result["sweep"][1]["leave_one_out"] is None and result["chosen_k"] == 1  # the others are only 159


@pytest.mark.parametrize("name", ["absent.npz", "empty", "", "a\nb", "x" * 5000, "empty/embeddings.npz"])
def test_bad_paths(command, tmp_path, name):
    (tmp_path / "empty").mkdir()
    refused(command, name)


def test_bad_files(command, tmp_path):
    """Truncated at 50 places, not a zip, an .npy, a zip of something else, random bytes, flipped bytes."""
    whole = write(tmp_path / "whole.npz").read_bytes()
    rng = np.random.default_rng(0)
    contents = [whole[:cut] for cut in rng.integers(0, len(whole) - 1, 50)]
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3))
    contents += [b"", b"\x80\x04N.", rng.bytes(1000), whole[:4], b"PK\x05\x06" + bytes(18), buffer.getvalue()]
    for content in contents:
        (tmp_path / "bad.npz").write_bytes(content)
        assert "bad.npz" in refused(command, "bad.npz")
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        for name in ("train_features", "train_labels", "test_features", "test_labels"):
            archive.writestr(f"{name}.npy", rng.bytes(500))
    assert "bad.npz" in refused(command, "bad.npz")
    for _ in range(60):  # each either works or is refused in one line
        content = bytearray(whole)
        for place in rng.integers(0, len(content), rng.integers(1, 4)):
            content[place] = rng.integers(256)
        (tmp_path / "bad.npz").write_bytes(bytes(content))
        try:
            refused(command, "bad.npz", "--ks", 1, "--embedding-2d", "none", "--no-loo")
        except AssertionError as error:
            assert "assert 0 == 2" in str(error)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_is_not_run(command, tmp_path):
    for name in ("train_features", "train_labels", "class_names", "meta"):
        payload = np.empty(160, dtype=object)
        payload[:] = [Payload(tmp_path / "harm")] * 160
        refused(command, write(tmp_path / "bad.npz", **{name: payload}))
    import pickle

    (tmp_path / "bad.npz").write_bytes(pickle.dumps(Payload(tmp_path / "harm")))
    refused(command, "bad.npz")
    assert not (tmp_path / "harm").exists()


def npy(shape, data, dtype="<f4"):
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize("case", ["claims 4 TB", "claims 8 GB", "negative", "bomb", "long text"])
def test_a_small_file_takes_little_memory(command, tmp_path, case):
    content = {
        "claims 4 TB": lambda: npy((10**12, 1), b"\0" * 64),
        "claims 8 GB": lambda: npy((2 * 10**9, 1), b"\0" * 64),
        "negative": lambda: npy((-1, 8), b"\0" * 64),
        "bomb": lambda: npy((10**6, 75), bytes(3 * 10**8)),
        "long text": lambda: npy((1,), bytes(3 * 10**8), "<U75000000"),
    }[case]()
    good = write(tmp_path / "good.npz")
    bad = zipfile.ZipFile("bad.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with zipfile.ZipFile(good) as source, bad as archive:
        for name in source.namelist():
            replaced = "class_names.npy" if case == "long text" else "train_features.npy"
            archive.writestr(name, content if name == replaced else source.read(name))
    del content
    assert Path("bad.npz").stat().st_size < 3_000_000
    tracemalloc.start()
    try:
        refused(command, "bad.npz")
        assert tracemalloc.get_traced_memory()[1] < 2e8
    finally:
        tracemalloc.stop()


def test_a_failure_leaves_earlier_files_alone(command, tmp_path, monkeypatch):
    write(tmp_path / "a/embeddings.npz")
    write(tmp_path / "b/embeddings.npz")
    command("a", "b", "--ks", 1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.setattr(knn_eval, "linear_probe", lambda data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("a", "b", "--ks", 2, "--probe")
    (tmp_path / "b/embeddings.npz").write_bytes(b"damaged")
    before[tmp_path / "b/embeddings.npz"] = b"damaged"
    refused(command, "a", "b", "--ks", 2)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_wandb_offline(command, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for key, value in dict(
        MODE="offline", SILENT="true", DATA_DIR="data", CACHE_DIR="cache", CONFIG_DIR="config"
    ).items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    write(tmp_path / "run/embeddings.npz", META)
    _, out, err = command("run", "--track", "--ks", 1, 5)
    assert "failed" not in err
    wandb.teardown()  # the end of W&B's own process: only then is all of the file written for sure
    (log,) = tmp_path.glob("run/wandb/offline-run-*/*.wandb")
    for key in (b"knn/run", b"chosen_k/run", b"test_accuracy/run", b"embedding_2d/run"):
        assert key in log.read_bytes()
    media = [p.suffix for p in tmp_path.glob("run/wandb/offline-run-*/files/media/**/*") if p.is_file()]
    assert media.count(".png") == 2 and media.count(".json") == 1


def test_the_file_alone(tmp_path):
    """Copied without common.py, it imports without side effects, and knn_sweep works."""
    shutil.copy(ROOT / "knn_eval.py", tmp_path)
    code = ("import numpy as np; from knn_eval import knn_sweep; x = np.eye(4);"
            "assert knn_sweep(x, np.arange(4), x, [1])[1].tolist() == [0, 1, 2, 3]")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {"knn_eval.py", "__pycache__"}


def test_the_command_itself(tmp_path):
    write(tmp_path / "a.npz")
    code = ("import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
            "assert 'wandb' not in sys.modules")  # fmt: skip
    run = [sys.executable, "-c", code, ROOT / "knn_eval.py", "a.npz", "--ks", "1", "5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "chosen k =" in done.stdout and done.stderr == "", done.stderr
    run = [sys.executable, ROOT / "knn_eval.py", "a.npz", "--ks", "999"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
