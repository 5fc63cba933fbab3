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
import scipy
import torch
from conftest import Code
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, LeaveOneOut
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

import knn_eval
import simclr
from knn_eval import effective_rank, knn_sweep, whiten

KS = (1, 2, 3, 4, 5, 10, 20, 50, 70, 100, 200, 500, 1000)


def clusters(n=1200, m=300, dim=32, classes=7, seed=0, dtype=np.float32):
    """Overlapping clusters without distance ties: train features, labels, test features, labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n + m)
    noise = 2.5 * rng.normal(size=(n + m, dim))
    features = (rng.normal(size=(classes, dim))[labels] + noise).astype(dtype)
    return features[:n], labels[:n], features[n:], labels[n:]


def digits():
    """With noise that leaves no two distances equal."""
    images, labels = load_digits(return_X_y=True)
    images += 1e-3 * np.random.default_rng(0).random(images.shape)
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("data", [clusters, digits])
def test_knn_sweep_equals_scikit_learn(data, dtype, metric):
    """Every prediction is KNeighborsClassifier's, where no distances are equal."""
    train, labels, test, _ = data()
    labels = 2 * labels - 5
    train, test = train.astype(dtype), test.astype(dtype)
    found = knn_sweep(train, labels, test, KS, metric=metric)
    a, b = (normalize(train), normalize(test)) if metric == "cosine" else (train, test)
    assert list(found) == list(KS)
    for k in KS:
        assert (found[k] == KNeighborsClassifier(k).fit(a, labels).predict(b)).all()


@pytest.mark.parametrize("groups", [None, np.random.default_rng(1).integers(0, 20, 200)])
def test_leave_one_out_equals_scikit_learn(groups):
    """test_features=None predicts a training point from all others, or those of other groups."""
    train, labels, _, _ = clusters(200, 1)
    own = np.arange(200) if groups is None else groups
    ks = [1, 5, 200 - np.bincount(own).max()]
    found = knn_sweep(train, labels, None, ks, "euclidean", groups=groups)
    for k in ks:
        for i in range(200):
            model = KNeighborsClassifier(k).fit(train[own != own[i]], labels[own != own[i]])
            assert found[k][i] == model.predict(train[[i]])
    with pytest.raises(ValueError):
        knn_sweep(train, labels, None, [ks[-1] + 1], groups=groups)


def test_leave_one_out_among_equal_points():
    """A point never votes for itself, even with more equal points than neighbors."""
    train, labels = np.ones((21, 3)), np.array([0] * 10 + [1] * 10 + [7])
    for k in (1, 5, 20):
        found = knn_sweep(train, labels, None, [k])[k]
        assert found[20] != 7
    assert found[0] == 1 and found[19] == 0


@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_softmax_vote_equals_scikit_learn(temperature):
    """vote="softmax" weighs by exp(similarity / temperature)."""
    train, labels, test, _ = clusters(400, 100)

    def softmax(distances):
        return np.exp((1 - distances**2 / 2) / temperature)

    found = knn_sweep(train, labels, test, [5, 50, 400], vote="softmax", temperature=temperature)
    for k in found:
        model = KNeighborsClassifier(k, weights=softmax).fit(normalize(train), labels)
        assert (found[k] == model.predict(normalize(test))).all()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("queries", ["test", "leave-one-out"])
@pytest.mark.parametrize("vote", ["uniform", "softmax"])
def test_device_and_small_chunks_change_no_prediction(vote, queries, metric, monkeypatch):
    """Those of the CPU and one chunk equal scikit-learn's (above); TF32 would change them."""
    train, labels, test, _ = clusters()
    data = train, labels, test if queries == "test" else None, KS[:10]
    expected = knn_sweep(*data, metric, vote)
    for chunk in (512, 97):
        monkeypatch.setattr(knn_eval, "CHUNK", chunk)
        for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
            found = knn_sweep(*data, metric, vote, device=device)
            assert all((found[k] == expected[k]).all() for k in expected), (chunk, device)


BAD_ARGUMENTS = {
    "no k": dict(ks=[]),
    "k above n": dict(ks=[301]),
    "metric": dict(metric="manhattan"),
    "vote": dict(vote="loud"),
    "other length": dict(train_labels=[0, 1]),
    "other length of groups": dict(test_features=None, groups=[0, 1]),
    "one-hot labels": dict(train_labels=np.eye(300)),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_knn_sweep_raises_value_error(name):
    """Arguments without an answer raise ValueError."""
    train, labels, test, _ = clusters(300, 100)
    arguments = dict(train_features=train, train_labels=labels, test_features=test, ks=[1, 5])
    with pytest.raises(ValueError):
        knn_sweep(**{**arguments, **BAD_ARGUMENTS[name]})


def test_labels_in_a_column():
    """Labels [N, 1], as of MedMNIST, are those of [N]."""
    train, labels, test, _ = clusters(300, 100)
    found, expected = (knn_sweep(train, y, test, [5])[5] for y in (labels[:, None], labels))
    np.testing.assert_array_equal(found, expected)


def test_first_part_alone_gives_knn_sweep(tmp_path):
    """What is above the command line works in an empty folder, without common.py and tyro."""
    code = Path(knn_eval.__file__).read_text().partition("# -----")[0]
    (tmp_path / "part.py").write_text(code)
    code = "import sys, numpy as np; sys.modules |= dict(tyro=None); import part; "
    code += "x = np.eye(4); print(part.knn_sweep(x, range(4), x, [1]))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "{1: array([0, 1, 2, 3])}\n" and done.stderr == ""


# ---------------------------------------------------------------- monitors


def test_effective_rank_equals_its_formula():
    """In float64, of every third of 6,000 rows; 1 of zeros."""
    assert effective_rank(np.zeros((50, 8), np.float32)) == pytest.approx(1)
    features = np.random.default_rng(0).normal(size=(6000, 8)) * np.arange(1, 9)
    values = np.sqrt(np.linalg.eigvalsh(features[::3].T @ features[::3]))
    shares = values / values.sum()
    assert effective_rank(features) == pytest.approx(np.prod(shares**-shares))


@pytest.mark.parametrize("n, dim", [(500, 6), (20, 50)])
def test_whiten_by_the_root_of_the_covariance(n, dim):
    """ZCA of both parts with a ridge, also in more dimensions than points."""
    train, _, test, _ = clusters(n, 40, dim=dim, dtype=np.float64)
    covariance = np.cov(train, rowvar=False)
    covariance += 0.01 * covariance.trace() / dim * np.eye(dim)
    root = np.real(scipy.linalg.sqrtm(np.linalg.inv(covariance)))
    for found, part in zip(whiten(train, test), (train, test)):
        np.testing.assert_allclose(found, (part - train.mean(0)) @ root, atol=1e-6)


# ---------------------------------------------------------------- the command line


META = dict(dataset="digits", data_dir="data", image_size=8, encoder="resnet18", epochs=60, seed=1)


def write(path, **arrays):
    """An embeddings.npz; None leaves an array out."""
    names = ("train_features", "train_labels", "test_features", "test_labels")
    default = dict(zip(names, clusters(160, 60, dim=8, classes=3, seed=6)))
    default.update(class_names=np.array(["ant", "bee", "cat"]), meta=np.array(json.dumps(META)))
    arrays = {key: value for key, value in {**default, **arrays}.items() if value is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return arrays


def results(folder):
    return json.loads((Path(folder) / "knn.json").read_text())["results"]


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_run_gets_a_folder_with_all_files(run_cli, tmp_path):
    """knn/ in the run's folder: knn.json, knn.csv, results.csv and stdout hold the accuracies."""
    run = tmp_path / "a b"
    train, labels, test, truth, *_ = write(run / "embeddings.npz").values()
    done = run_cli(knn_eval, run)
    assert not done.err
    ks = KS[:10]
    predicted, loo = (knn_sweep(train, labels, queries, ks) for queries in (test, None))
    (result,) = results(run / "knn")
    accuracy = {k: (predicted[k] == truth).mean() for k in ks}
    leave_one_out = {str(k): (loo[k] == labels).mean() for k in ks}
    chosen = max(ks, key=lambda k: leave_one_out[str(k)])
    assert result["meta"] == META and result["name"] == str(run)
    assert result["k"] == chosen and result["leave_one_out"] == leave_one_out
    lines = {line["k"]: float(line["mean"]) for line in rows(run / "knn/knn.csv")}
    assert lines == {**{str(k): a for k, a in accuracy.items()}, "chosen k": accuracy[chosen]}
    correct = predicted[chosen] == truth
    recalls = {n: correct[truth == c].mean() for c, n in enumerate(["ant", "bee", "cat"])}
    assert result["per_class"] == pytest.approx(recalls)
    assert result["low"] < result["accuracy"] < result["high"]
    assert f"k = {chosen}, test accuracy = {100 * accuracy[chosen]:.2f} % (" in done.out
    (line,) = rows(run / "knn/results.csv")
    assert float(line["accuracy"]) == accuracy[chosen] and line["encoder"] == "resnet18"
    names = "embedding_2d.png knn.csv knn.json knn.png labels.csv labels.png pairs.csv results.csv"
    found = sorted(path.name for path in (run / "knn").iterdir())
    assert found == [*names.split(), "suspects.csv"]


def test_leave_one_out_without_test_images(run_cli, tmp_path):
    """Without test images or their labels, the result is the leave-one-out accuracy."""
    for changes in (dict(test_features=None, test_labels=None), dict(test_labels=None)):
        data = write(tmp_path / "a.npz", **changes)
        done = run_cli(knn_eval, tmp_path / "a.npz")
        found = knn_sweep(data["train_features"], data["train_labels"], None, KS[:10])
        accuracy = max(100 * (found[k] == data["train_labels"]).mean() for k in found)
        assert not done.err
        assert f"leave-one-out accuracy = {accuracy:.2f} %" in done.out
        assert rows(tmp_path / "a/knn/labels.csv")


def test_groups_change_the_chosen_k(run_cli, tmp_path):
    """Near-copies in one group: k = 1 is perfect only without train_groups, or in a single one."""
    train, labels, _, _ = clusters(60, 1, dim=8, classes=3)
    copies = np.repeat(train, 3, axis=0) + 1e-3 * np.random.default_rng(0).normal(size=(180, 8))
    arrays = dict(train_features=copies, train_labels=np.repeat(labels, 3))
    groups = np.repeat([f"patient {i}" for i in range(60)], 3)
    for name, value in dict(with_groups=groups, without=None, one=groups == "").items():
        write(tmp_path / f"{name}.npz", **arrays, train_groups=value)
        run_cli(knn_eval, tmp_path / f"{name}.npz", "--output", tmp_path / name)
    (grouped,), (single,) = results(tmp_path / "with_groups"), results(tmp_path / "without")
    assert single["k"] == 1 and single["leave_one_out"]["1"] == 1
    assert results(tmp_path / "one")[0]["leave_one_out"] == single["leave_one_out"]
    assert grouped["k"] > 1 and grouped["leave_one_out"]["1"] < 0.95
    # So is k among the drawn labels, and the copies are not pairs.
    assert grouped["tables"]["labels"]["20"] != single["tables"]["labels"]["20"]
    pairs = [rows(tmp_path / name / "pairs.csv")[0] for name in ("with_groups", "without")]
    assert float(pairs[0]["similarity"]) < 0.999 < float(pairs[1]["similarity"])


# ---------------------------------------------------------------- few labels


def test_labels_needed_equals_scikit_learn(run_cli, tmp_path):
    """Each draw: KNeighborsClassifier on n labels a class, k by leave-one-out among them."""
    data = write(tmp_path / "a.npz")
    # No class has 100 images.
    words = ["--labels-per-class", 1, 4, 100, "--ks", 1, 3, "--probe"]
    run_cli(knn_eval, tmp_path / "a.npz", *words)
    (result,) = results(tmp_path / "a/knn")
    train, labels, test, truth = [*data.values()][:4]
    train, test = normalize(train), normalize(test)
    for n, table in result["tables"]["labels"].items():
        for seed, accuracy in enumerate([] if n == "all" else table):
            order = np.random.default_rng(seed).permutation(len(labels))
            known = [i for c in range(3) for i in order[labels[order] == c][: int(n)]]
            x, y = train[known], labels[known]
            grid = dict(n_neighbors=[1, 3][: 1 + (n == "4")])
            model = GridSearchCV(KNeighborsClassifier(), grid, cv=LeaveOneOut()).fit(x, y)
            assert accuracy == pytest.approx(model.score(test, truth)), (n, seed)
    assert [*result["tables"]["labels"]] == ["1", "4", "all"]
    assert result["tables"]["labels"]["all"] == result["accuracy"]
    probe = result["tables"]["probe"]
    assert len(probe["1"]) == 20 and np.mean(probe["1"]) < np.mean(probe["4"]) < probe["all"]


@pytest.mark.parametrize("sizes, found", [((60, 5, 5), ["1", "2", "all"]), ((2, 1, 1), [])])
def test_labels_needed_without_test_images(run_cli, tmp_path, sizes, found):
    """The images that are not drawn are predicted, while each class has some left."""
    labels = np.repeat([0, 1, 2], sizes)
    features = np.random.default_rng(0).normal(size=(len(labels), 8))
    arrays = dict(train_features=features, train_labels=labels, test_features=None)
    for groups in (None, labels, np.arange(len(labels)) % 2):
        write(tmp_path / "a.npz", **arrays, test_labels=None, train_groups=groups)
        run_cli(knn_eval, tmp_path / "a.npz", "--ks", 1)
        (result,) = results(tmp_path / "a/knn")
        # Of groups that are classes, nothing is left, and of two groups little.
        assert [*result["tables"]["labels"]] == (found if groups is None else [])
        assert result["column"].endswith("(leave-one-out)")


# ---------------------------------------------------------------- pairs and suspects


def test_pairs_and_leaks(run_cli, tmp_path):
    """Planted copies come first in pairs.csv, and copies across the splits are counted."""
    train, labels, test, truth = clusters(160, 60, dim=8, classes=3)
    train[7], test[3], test[5] = train[40] + 1e-4, train[11], train[12]
    names = [np.array([f"{part}/{i}.jpg" for i in range(n)]) for part, n in (("a", 160), ("b", 60))]
    arrays = dict(train_features=train, test_features=test)
    write(tmp_path / "x.npz", **arrays, train_files=names[0], test_files=names[1])
    done = run_cli(knn_eval, tmp_path / "x.npz")
    lines = rows(tmp_path / "x/knn/pairs.csv")
    assert [line["part"] for line in lines] == ["train"] * 100 + ["test"] * 100
    assert {lines[0]["file"], lines[0]["train_file"]} == {"a/7.jpg", "a/40.jpg"}
    pairs = {(line["file"], line["train_file"]) for line in lines[100:102]}
    assert pairs == {("b/3.jpg", "a/11.jpg"), ("b/5.jpg", "a/12.jpg")}
    assert "2 test images have a training image's features" in done.out
    x = normalize(train.astype(np.float64))
    expected = np.sort((x @ x.T)[np.triu_indices(160, 1)])[::-1][:100]
    found = [float(line["similarity"]) for line in lines[:100]]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_suspects_find_flipped_labels(run_cli, tmp_path):
    """Of 5 % flipped labels of the digits' pixels, most are in the first 5 % of suspects.csv."""
    images, labels, test, truth = digits()
    flipped = np.random.default_rng(0).permutation(1400)[:70]
    wrong = labels.copy()
    wrong[flipped] = (labels[flipped] + 1 + np.arange(70) % 9) % 10
    arrays = dict(train_features=images, train_labels=wrong, test_features=test, test_labels=truth)
    write(tmp_path / "a.npz", **arrays, class_names=None)
    # The first chooses k = 1, at which all shares are 1: those at 200 order the rows.
    for ks in ((1, 200), KS):
        run_cli(knn_eval, tmp_path / "a.npz", "--labels-per-class", "--ks", *ks)
        lines = rows(tmp_path / "a/knn/suspects.csv")
        shares = [float(line["share"]) for line in lines]
        assert shares == sorted(shares, reverse=True)
        found = {int(line["file"]) for line in lines[:70]}
        assert len(found & {*flipped.tolist()}) >= 60
    says = {int(line["file"]): int(line["neighbors_say"]) for line in lines}
    assert np.mean([says.get(i) == labels[i] for i in flipped.tolist()]) > 0.9


# ---------------------------------------------------------------- several runs


SEEDS = dict(ema=0.9), dict(ema=0.9, seed=2), dict(ema=0.99)


def test_unlabeled_images_are_predicted_and_do_not_vote(run_cli, tmp_path):
    """By scikit-learn at the chosen k, most certain first, ties by the other k.

    Classes missing from one split keep their names.
    """
    data = write(tmp_path / "embeddings.npz")
    train, labels, test, truth = [*data.values()][:4]
    train, test, expected = normalize(train), normalize(test), []
    labels[np.arange(160) % 4 > 0] = truth[truth == 2] = -1
    write(tmp_path / "embeddings.npz", **data)
    run_cli(knn_eval, tmp_path, "--ks", 1, 2, 7)
    (result,) = results(tmp_path / "knn")
    known, chosen = labels >= 0, [1, 2, 7].index(result["k"])
    models = [KNeighborsClassifier(k).fit(train[known], labels[known]) for k in (1, 2, 7)]
    for part, x, y in (("train", train, labels), ("test", test, truth)):
        files = np.flatnonzero(y < 0)
        votes = np.array([model.predict_proba(x[files]) for model in models])
        says, shares = votes.argmax(axis=2), votes.max(axis=2)
        agree = (shares * (says == says[chosen])).mean(axis=0)
        for i in np.lexsort([-agree, -shares[chosen]]):
            name = ["ant", "bee", "cat"][says[chosen, i]]
            expected.append([part, str(files[i]), name, str(shares[chosen, i])])
    assert [[*row.values()] for row in rows(tmp_path / "knn/predictions.csv")] == expected
    assert result["accuracy"] == models[chosen].score(test[truth >= 0], truth[truth >= 0])
    assert [*result["per_class"]] == ["ant", "bee"] and result["n_train"] == 40


def write_runs(*changes):
    """Runs 0, 1, ... of BYOL with these changes of meta, of different features."""
    for i, change in enumerate(changes):
        train, _, test, _ = clusters(160, 60, dim=8, classes=3, seed=i)
        meta = np.array(json.dumps(META | dict(method="byol") | change))
        write(Path(f"{i}/embeddings.npz"), train_features=train, test_features=test, meta=meta)
    return [str(i) for i in range(len(changes))]


@pytest.mark.parametrize(
    "changes, columns",
    [
        (SEEDS, ["byol ema 0.9", "byol ema 0.9", "byol ema 0.99"]),
        ([{}, {}, dict(epochs=0, ema=3)], ["byol 0", "byol 1", "untrained"]),
        ([dict(epochs=0, init="imagenet")], ["init imagenet"]),
        # Many flags: by the folder.
        ([{}, dict.fromkeys(("lr", "width", "ema", "augment"), 7)], ["byol", "byol 1"]),
    ],
)
def test_names_of_columns(changes, columns):
    """The method and the flags that differ; the run where nothing but its name differs."""
    inputs = knn_eval.read_inputs(write_runs(*changes))
    knn_eval.name_columns(inputs)
    assert [entry.column for entry in inputs] == columns


def test_seeds_are_one_column(run_cli):
    """Runs that differ in the seed only are averaged."""
    done = run_cli(knn_eval, *write_runs(*SEEDS), "--ks", 1, 5)
    header = next(line for line in done.out.splitlines() if line.startswith("|"))
    assert header.split() == "| k | byol ema 0.9 | byol ema 0.99 |".split()
    pair = [result["tables"]["knn"]["5"] for result in results("runs/knn")][:2]
    found = {(line["column"], line["k"]): line for line in rows("runs/knn/knn.csv")}
    line = found["byol ema 0.9", "5"]
    assert float(line["mean"]) == pytest.approx(np.mean(pair))
    assert float(line["std"]) == pytest.approx(np.std(pair, ddof=1))
    folders = [path for path in Path("runs/knn").iterdir() if path.is_dir()]
    assert len(folders) == len(rows("runs/knn/results.csv")) == 3


def test_table_formats(run_cli, tmp_path):
    """The printed tables are Markdown, or LaTeX by --table latex, with the same numbers."""
    write(tmp_path / "a_b.npz")
    words = tmp_path / "a_b.npz", "--ks", 1, 5
    md, latex = (run_cli(knn_eval, *words, *more).out for more in ([], ["--table", "latex"]))
    (result,) = results(tmp_path / "a_b/knn")
    for k in "15":
        value = f"{100 * result['tables']['knn'][k]:.2f}"
        assert f"| {k} | {value} |" in " ".join(md.split())
        assert rf"{k} & {value} \\" in " ".join(latex.split())
    assert r"\begin{tabular}{lr}" in latex and r"a\_b" in latex and r"$\pm$" in latex
    lines = [line for line in md.splitlines() if line.startswith("|")]
    assert all(line.count("|") == 3 for line in lines) and set(lines[1]) == set("|- ")


def test_options_reach_the_vote_and_replace_earlier_files(run_cli, tmp_path):
    """--metric, --vote and --whiten; tables that an evaluation does not make do not stay."""
    write(tmp_path / "embeddings.npz")
    options = "--metric euclidean --vote softmax --whiten --ks 5".split()
    run_cli(knn_eval, tmp_path, *options, says=[f"to {tmp_path / 'knn'}"])
    data = dict(np.load(tmp_path / "embeddings.npz"))
    train, test = whiten(data["train_features"], data["test_features"])
    found = knn_sweep(train, data["train_labels"], test, [5], "euclidean", "softmax")[5]
    (result,) = results(tmp_path / "knn")
    assert result["accuracy"] == (found == data["test_labels"]).mean()
    assert (tmp_path / "knn/labels.csv").exists() and (tmp_path / "knn/knn.csv").exists()
    run_cli(knn_eval, tmp_path, "--ks", 5, "--labels-per-class")
    assert not (tmp_path / "knn/labels.csv").exists()
    write(tmp_path / "embeddings.npz", train_labels=None)
    run_cli(knn_eval, tmp_path)
    assert not (tmp_path / "knn/knn.csv").exists()


def test_every_run_and_pixels(run_cli, refused, finished, monkeypatch):
    """Without inputs every finished run under runs/ is evaluated; --pixels adds its data set."""
    from common import load_images

    refused(knn_eval, says=["no run"])
    for name in ("simclr", "byol"):
        shutil.copytree(finished(name), f"runs/{name}")
    Path("runs/unfinished").mkdir()
    assert not run_cli(knn_eval, "--pixels", "--ks", 1, 3).err
    images = load_images("npz", results("runs/knn")[0]["meta"]["data_dir"])
    train, test = (part.numpy().reshape(len(part), -1) for part in (images.train, images.test))
    found = knn_sweep(train, images.train_labels.numpy(), test, [1, 3])
    expected = {str(k): (found[k] == images.test_labels.numpy()).mean() for k in found}
    byol, _, pixels = results("runs/knn")
    assert (byol["name"], pixels["column"]) == ("runs/byol", "pixels")
    assert expected.items() <= pixels["tables"]["knn"].items()
    for name in ("byol", "simclr"):
        with Image.open(f"runs/knn/runs_{name}/neighbors.png") as picture:
            picture.load()
    # A second call does not take runs/knn for a run, and leaves no file that it did not write.
    Path("runs/knn/runs_byol/predictions.csv").touch()
    run_cli(knn_eval, "--ks", 1)
    assert len(results("runs/knn")) == 2
    assert not Path("runs/knn/runs_byol/predictions.csv").exists()
    # Of two data sets, the pixels of each.
    run_cli(simclr, epochs=0, encoder="resnet10", width=16, run_dir="runs/digits")
    run_cli(knn_eval, "runs/byol", "runs/digits", "--pixels", "--ks", 1, "--labels-per-class")
    columns = [result["column"] for result in results("runs/knn")][2:]
    assert columns == ["pixels npz", "pixels digits"]


def test_pictures_only_of_the_same_images(run_cli, finished, tmp_path):
    """Data that has moved is one note; a missing data set is not downloaded."""
    with np.load(finished("simclr") / "embeddings.npz") as file:
        arrays = dict(file)
    moved, other = "no pictures: --data-dir 'moved' does not exist", "/a have changed"
    for dataset, says in (("npz", moved), ("cifar10", moved), ("digits", other)):
        meta = dict(META, dataset=dataset, data_dir="moved" if says == moved else "data")
        np.savez(tmp_path / "a.npz", **arrays | dict(meta=np.array(json.dumps(meta))))
        done = run_cli(knn_eval, tmp_path / "a.npz", "--ks", 1)
        assert done.out.count(says) == 1
        assert not (tmp_path / "a/knn/neighbors.png").exists()
        assert (tmp_path / "a/knn/embedding_2d.png").exists()


def test_unlabeled_run(run_cli, finished, tmp_path):
    """Without labels: effective rank, pairs, neighbors and the 2-D plot, no accuracies."""
    shutil.copytree(finished("simclr"), tmp_path / "run")
    with np.load(tmp_path / "run/embeddings.npz") as file:
        arrays = {name: file[name] for name in file if "labels" not in name}
    np.savez(tmp_path / "run/embeddings.npz", **arrays)
    done = run_cli(knn_eval, tmp_path / "run")
    assert not done.err and "accuracy" not in done.out
    names = {path.name for path in (tmp_path / "run/knn").iterdir()}
    assert names == set("embedding_2d.png knn.json neighbors.png pairs.csv results.csv".split())


@pytest.mark.parametrize("n, dim, classes, scale", [(2, 1, 1, 1), (30, 1, 2, 1), (50, 8, 3, 0)])
def test_tiny_and_collapsed_features(run_cli, tmp_path, n, dim, classes, scale):
    """Two points, one dimension, a collapsed encoder: an answer without warnings."""
    features = scale * np.random.default_rng(0).normal(size=(n, dim))
    labels = np.arange(n) % classes
    arrays = dict(train_features=features, train_labels=labels, class_names=None)
    write(tmp_path / "a.npz", test_features=features, test_labels=labels, **arrays)
    for words in ([], ["--whiten"], ["--embedding-2d", "tsne"]):
        done = run_cli(knn_eval, tmp_path / "a.npz", *words)
        assert not done.err and not done.warnings, done


def test_files_with_little_in_them(run_cli, tmp_path):
    """A single image without labels; a meta with a data set alone; a name like a formula."""
    np.savez(tmp_path / "one.npz", train_features=np.ones((1, 5)))
    run_cli(knn_eval, tmp_path / "one.npz")
    write(tmp_path / "a$^$b.npz", meta=np.array(json.dumps(dict(dataset="digits"))))
    run_cli(knn_eval, tmp_path / "a$^$b.npz", "--ks", 5, says=["no pictures"])


MISTAKES = {
    "missing array": (dict(train_features=None), [], "train_features"),
    "unfinished run": ({}, [Path(__file__).parent], "does not exist; a run writes it at its end"),
    "text": (dict(train_features=np.full((160, 8), "a")), [], "a.npz"),
    "float labels": (dict(test_labels=np.ones(60)), [], "a.npz"),
    "few labels": (dict(test_labels=np.ones(59, int)), [], "a.npz"),
    "scalar": (dict(train_features=np.array(1.0)), [], "a.npz"),
    "nan": (dict(test_features=np.full((60, 8), np.nan)), [], "test_features contains NaN"),
    "other width": (dict(test_features=np.ones((60, 7))), [], "[8, 7]"),
    "no row": (dict(train_features=np.ones((0, 8))), [], "0 sample"),
    "meta": (dict(meta=np.array("[1]")), [], "a.npz"),
    "k above n": ({}, ["--ks", 0, 500], "less their largest group, not (0, 500)"),
    "no k": ({}, ["--ks"], "--ks needs a number"),
    "temperature": ({}, ["--temperature", 0], "--temperature 0"),
    "output": ({}, ["--output", __file__], "--output"),
    "output of others": ({}, ["--output", Path(__file__).parent], "holds other files"),
    "pixels": (dict(meta=np.array("{}")), ["--pixels"], "--pixels"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_error_line(refused, tmp_path, name):
    """A mistake in flags or arrays gives one error line, and nothing is written."""
    arrays, flags, says = MISTAKES[name]
    write(tmp_path / "a.npz", **arrays)
    refused(knn_eval, tmp_path / "a.npz", *flags, says=[says])


def test_damaged_npz_is_one_error_line(refused, tmp_path):
    """A truncated .npz, another file, an empty one, a pickle are refused by name; no code runs."""
    path = tmp_path / "a.npz"
    write(path, meta=np.array([Code()]))
    # Which sees that there is no new file.
    refused(knn_eval, path, says=["a.npz"])
    write(path)
    whole = path.read_bytes()
    code = pickle.dumps(Code())
    for content in (b"", b"text", code, whole[:100], whole[:-100], whole[:3000] + whole[3100:]):
        path.write_bytes(content)
        refused(knn_eval, path, says=["a.npz"])


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
