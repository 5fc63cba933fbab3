"""The measuring scripts through their real commands, in a small setting: what they count, and what they record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import cifar10  # noqa: E402
import throughput  # noqa: E402

import common  # noqa: E402
import knn_eval  # noqa: E402

TINY = "--encoder resnet10 --width 16 --hidden-dim 16 --projection-dim 16 --batch-size 32"


def run(script, *words):
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Links to 280 files of CIFAR-10 where SSL_TEST_CIFAR10 names them, else so many pieces of two photographs."""
    place, cifar10 = tmp_path_factory.mktemp("data"), os.environ.get("SSL_TEST_CIFAR10")
    for part, n in (("train", 120), ("test", 20)):
        for name, picture in zip(("automobile", "frog"), load_sample_images().images):
            (place / part / name).mkdir(parents=True)
            found = sorted(Path(cifar10, part, name).iterdir())[:n] if cifar10 else []
            for image in found:
                (place / part / name / image.name).symlink_to(image)
            for i in range(0 if cifar10 else n):
                top, left = (37 * i) % 300, (53 * i + 7 * (part == "test")) % 500
                Image.fromarray(picture[top : top + 32, left : left + 32]).save(place / part / name / f"{i}.png")
    return place


def test_throughput(tmp_path):
    """Every contender does its steps and no others, in the loop of the script itself; ratios are those of the rates."""
    run("throughput.py", "--methods", "simclr", "byol", "--no-lightly", "--images", 64, "--image-size", 8,
        "--warmup", 2, "--steps", 3, "--blocks", 2, f"--extra={TINY}", "--variant=--precision bf16", "--profile",
        "--output", tmp_path / "out.json")  # fmt: skip
    result = json.loads((tmp_path / "out.json").read_text())
    assert list(result["methods"]) == ["simclr", "byol"] and result["versions"]["torch"] == torch.__version__
    for name, method in result["methods"].items():
        found, ratios = method["contenders"], method["ratios"]
        assert list(found) == ["step", "model", "views", "variant", "again"]
        assert method["args"]["batch_size"] == 32 and method["args"]["width"] == 16
        assert all(one["steps"] == 12 and one["seconds"] > 0 and one["samples_per_sec"] > 0 for one in found.values())
        # the first, the warm-up, two turns of three steps in two blocks; as often for "again"
        assert found["step"]["steps_in_all"] == found["again"]["steps_in_all"] == 1 + 2 + 2 * 12
        assert found["model"]["steps_in_all"] == found["variant"]["steps_in_all"] == 1 + 2 + 12
        assert set(ratios) == {"step/model", "step/views", "again/step", "variant/step"}
        for pair, one in ratios.items():
            over, under = (found[side]["samples_per_sec"] for side in pair.split("/"))
            assert one["ratio"] == pytest.approx(over / under, rel=1e-2) and one["low"] <= one["ratio"] <= one["high"]
        assert found["views"]["samples_per_sec"] > found["step"]["samples_per_sec"]  # a step has views, and more
        assert 0.5 < sum(row["share"] for row in method["profile"]) < 1.01  # of the twenty largest
        assert torch.cuda.is_available() or "convolution" in str(method["profile"])  # kernels have other names
        assert ("peak_gpu_bytes" in found["step"]) == torch.cuda.is_available()
    assert str(tmp_path) not in json.dumps(result["methods"])


def test_throughput_says_that_lightly_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightly", None)
    with pytest.raises(common.UserError, match="^lightly is not installed; pip install lightly, or --no-lightly$"):
        throughput.main(throughput.Args())


def test_cifar10(folder, tmp_path):
    """A line a run, with what knn.json and log.jsonl of that run say; the same accuracies as knn_eval.py by hand."""
    words = ["--dataset", "folder", "--data-dir", folder, "--methods", "byol", "--seeds", 3, "--epochs", 2,
             f"--extra={TINY} --eval-every 1", "--runs", tmp_path / "runs",
             "--output", tmp_path / "out.jsonl"]  # fmt: skip
    run("cifar10.py", *words)
    (line,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    run_dir = tmp_path / "runs/byol-s3"
    log = [json.loads(row) for row in (run_dir / "log.jsonl").read_text().splitlines()]
    config = json.loads((run_dir / "args.json").read_text())
    assert (line["n_train"], line["n_test"], line["epochs"], line["seed"]) == (240, 40, 2, 3)
    assert line["loss"] == [row["loss"] for row in log] and len(log) == 2
    assert line["knn_acc"] == {str(row["epoch"]): row["knn_acc"] for row in log}
    assert 0 < line["train_seconds"] < line["wall_seconds"] and line["versions"] == config["versions"]
    assert line["command"] == f"python byol.py --dataset folder {TINY} --eval-every 1 --epochs 2 --seed 3"
    assert (line["peak_gpu_bytes"] is None) != torch.cuda.is_available()
    # Judged once more, by what a user would type.
    same = dict(inputs=(str(run_dir),), embedding_2d="none", output=str(tmp_path))
    (knn,) = knn_eval.main(knn_eval.Args(**same))
    assert line["accuracy"] == {str(row["k"]): pytest.approx(row["accuracy"], abs=1e-6) for row in knn["sweep"]}
    assert line["chosen_k"] == knn["chosen_k"]
    assert line["chosen_k_accuracy"] == pytest.approx(knn["test_accuracy"], abs=1e-6)
    (knn,) = knn_eval.main(knn_eval.Args(vote="softmax", temperature=0.1, ks=(200,), **same))
    assert line["softmax_200_accuracy"] == pytest.approx(knn["test_accuracy"], abs=1e-6)
    assert all(0 <= accuracy <= 1 for accuracy in [*line["accuracy"].values(), line["softmax_200_accuracy"]])


def test_cifar10_holds_out_training_images_alone(folder, tmp_path):
    found = []
    for name in ("a", "b"):
        path = str(tmp_path / f"{name}.npz")
        place = cifar10.hold_out(cifar10.Args(dataset="folder", data_dir=str(folder), holdout=30), path)
        assert place == ["--dataset", "npz", "--data-dir", path]
        found.append(common.load_images("npz", path))
    whole = common.load_images("folder", folder)
    assert torch.equal(found[0].train, found[1].train) and torch.equal(found[0].test, found[1].test)
    assert torch.bincount(found[0].test_labels).tolist() == [30, 30]
    parts = torch.cat([found[0].train, found[0].test]).flatten(1)
    labels = torch.cat([found[0].train_labels, found[0].test_labels])
    pieces = [sorted(zip(map(bytes, images.numpy()), classes.tolist()))
              for images, classes in ((parts, labels), (whole.train.flatten(1), whole.train_labels))]  # fmt: skip
    assert pieces[0] == pieces[1]  # every training image once, under its class, and no other
