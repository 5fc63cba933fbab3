"""Every numeric flag of the four commands at its edges: it works, or one line that names it refuses it.

The flags come from the dataclasses, so that a new one is tested without anyone remembering.
"""

import dataclasses
import importlib
import itertools
import math
import os
import resource
import signal
import typing

import numpy as np
import pytest
import torch
from conftest import METHODS, flags

import common

COMMANDS = [*METHODS, "knn_eval"]
EDGES = {
    int: [0, -1, 10**12, 10**400, "1.5", "nan", "many", ""],
    float: [0.0, -1.0, -0.5, 1e-320, 1e30, 1e308, math.nan, math.inf, -math.inf, "many", ""],
}
ABSURD = (1e-320, 1e30, 1e308)  # legal for some flags, and a training may diverge by them
ENDLESS = [("epochs", 10**12)]  # legal, and no one would wait for the end: stopped at the first step

MOST_SECONDS, MOST_MEMORY = 20, 2**32  # of one case; the memory is beside what the tests before left in this process


def number(hint):
    """int or float where a flag of this type takes such numbers, alone, as an option, or several; else None."""
    inner = [number(part) for part in typing.get_args(hint)] + [hint]
    return next((kind for kind in (float, int) if kind in inner), None)


def numeric_flags(module):
    """name -> int or float."""
    hints = typing.get_type_hints(module.Args)
    kinds = {field.name: number(hints[field.name]) for field in dataclasses.fields(module.Args)}
    return {name: kind for name, kind in kinds.items() if kind}


def is_refused_for_sure(value):
    return isinstance(value, str) or value < 0 or value == 10**400 or not math.isfinite(value)


CASES = [(name, key, value) for name in COMMANDS for key, kind in numeric_flags(importlib.import_module(name)).items()
         for value in EDGES[kind]]  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Whether a file reaches the disk is asked elsewhere, and takes a tenth of a run's time."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


@pytest.fixture(autouse=True)
def bounded():
    """A case that hangs or takes all memory must fail, and not take the other tests with it."""

    def hangs(number, frame):
        pytest.fail(f"still at work after {MOST_SECONDS} s")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MOST_MEMORY, limits[1]))
    before = signal.signal(signal.SIGPROF, hangs)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)  # of computing: the machine may have other work
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="session")
def embeddings(tmp_path_factory):
    """60 training and 30 test features of 4 numbers, in 3 classes."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("embeddings") / "some.npz"
    labels = np.arange(90) % 3
    features = (rng.normal(size=(90, 4)) + labels[:, None]).astype(np.float32)
    np.savez(path, train_features=features[:60], train_labels=labels[:60],
             test_features=features[60:], test_labels=labels[60:])  # fmt: skip
    return path


@pytest.fixture(scope="session")
def few_images(tiny_npz, tmp_path_factory):
    """24 training and 10 test images."""
    path = tmp_path_factory.mktemp("images") / "few.npz"
    with np.load(tiny_npz) as file:
        np.savez(path, **{name: array[: 24 if name.startswith("train") else 10] for name, array in file.items()})
    return path


@pytest.fixture
def words(tiny, embeddings, few_images, tmp_path):
    """words(name, **changes): a command line that takes a moment, and writes into tmp_path / "run" only."""

    def make(name, **changes):
        if name == "knn_eval":
            line = [embeddings]
            usual = dict(output=tmp_path / "run", ks=5, vote="softmax", embedding_2d="none", device="cpu")
        else:
            line = []
            usual = tiny(data_dir=few_images, batch_size=12, epochs=1, encoder="resnet10", run_dir=tmp_path / "run")
        for key, value in {**usual, **changes}.items():
            if isinstance(value, bool):
                line += flags(**{key: value})
            elif isinstance(value, tuple):
                line += ["--" + key, *value]
            elif value is not None:
                line.append("=".join(flags(**{key: value})))  # a word that begins with a minus would pass for a flag
        return line

    return make


def check_outcome(result, name, folder, named, may_diverge=False):
    """It worked, or was refused by one line with all of `named` in it, or diverged; nothing half-written in any case."""
    assert not result.warnings and "Traceback" not in result.err, result
    assert not list(folder.rglob("*.tmp"))
    if result.status == 0:
        assert result.err == "", result
        written = {p.name for p in folder.iterdir()}
        if name == "knn_eval":
            assert written == {"knn.json", "knn.csv", "knn.png"}
            return
        assert written | {"checkpoint.pt", "curves.png"} == {  # which --epochs 0 does not write
            "args.json", "checkpoint.pt", "curves.png", "embedding_2d.png", "embeddings.npz", "encoder.pt",
            "log.jsonl", "views.png"}  # fmt: skip
        with np.load(folder / "embeddings.npz") as file:
            assert all(np.isfinite(file[f"{part}_features"]).all() for part in ("train", "test"))
        return
    errors = result.err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: "), result
    if result.status == 2:
        assert all(word in errors[0] for word in named), (named, errors)
        assert not folder.exists()
    else:
        assert result.status == 1 and may_diverge and ("finite" in errors[0] or "loss is" in errors[0]), result
        assert not {"embeddings.npz", "encoder.pt"} & {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("name, key, value", CASES, ids=lambda v: str(v) or "empty")
def test_edges(run_cli, words, tmp_path, monkeypatch, name, key, value):
    module, flag, folder = importlib.import_module(name), "--" + key.replace("_", "-"), tmp_path / "run"
    endless = (key, value) in ENDLESS
    if endless:

        def stop(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(common.Run, "advance", stop)
    result = run_cli(module, *words(name, **{key: value}))
    if isinstance(value, str):  # tyro's own words
        assert result.status == 2 and flag in result.err and "Traceback" not in result.err, result
        assert not folder.exists()
    elif endless:
        assert result.status == 130 and result.err == "interrupted\n", result
    else:
        check_outcome(result, name, folder, [flag], may_diverge=value in ABSURD)
        assert result.status == 2 or not is_refused_for_sure(value)


# ------------------------------------------------------------------------------------------ flags that exclude another


without = {name: not there for name, there in (("cuda", torch.cuda.is_available()),
                                               ("mps", torch.backends.mps.is_available()))}  # fmt: skip
# Changes to a command line that works, and what the one line must name.
EXCLUDED = [
    *[(name, changes, named) for name in METHODS for changes, named in [
        (dict(resume=True, run_dir=None), ["--resume", "--run-dir"]),
        (dict(precision="fp16", device="cpu"), ["--precision fp16", "--device"]),
        (dict(batch_size=25), ["--batch-size 25", "24 training images"]),
        (dict(lr=0, epochs=0), ["--lr 0", "--epochs 0"]),
        (dict(dataset="folder", data_dir="nowhere"), ["--data-dir", "nowhere"]),
        (dict(dataset="npz", data_dir="nowhere"), ["nowhere"]),
        *[(dict(device=device), [f"--device {device}"]) for device in ("cuda", "mps") if without[device]],
    ]],
    *[("knn_eval", changes, named) for changes, named in [
        (dict(vote="softmax", metric="euclidean"), ["--vote softmax", "--metric cosine"]),
        (dict(confusion=True, loo=False, ks=(1, 5)), ["--confusion", "--no-loo"]),
        (dict(ks=()), ["--ks"]),
        (dict(ks=(61, 500)), ["--ks", "61", "60 training points"]),
        (dict(pixels=True), ["--pixels"]),
        *[(dict(device="cuda"), ["--device cuda"])] * without["cuda"],
    ]],
]  # fmt: skip


@pytest.mark.parametrize("name, changes, named", EXCLUDED, ids=lambda v: str(v))
def test_excluded(run_cli, words, tmp_path, monkeypatch, name, changes, named):
    monkeypatch.chdir(tmp_path)
    result = run_cli(importlib.import_module(name), *words(name, **changes))
    assert result.status == 2, result
    check_outcome(result, name, tmp_path / "run", named)
    assert not list(tmp_path.iterdir())


CHOICES = [("metric", "euclidean"), ("vote", "distance"), ("vote", "balanced"), ("vote", "softmax"), ("loo", False),
           ("probe", True), ("confusion", True), ("ks", (1, 5, 20))]  # fmt: skip
PAIRS = [pair for pair in itertools.combinations(CHOICES, 2) if pair[0][0] != pair[1][0]]


@pytest.mark.parametrize("one, two", PAIRS, ids=lambda v: "-".join(map(str, v)))
def test_pairs_of_choices(run_cli, words, tmp_path, one, two):
    """Any two choices of knn_eval.py work together, or both are named."""
    named = ["--" + flag.replace("loo", "no-loo") for flag in (one[0], two[0])]
    result = run_cli(importlib.import_module("knn_eval"), *words("knn_eval", **{"vote": "uniform", **dict([one, two])}))
    check_outcome(result, "knn_eval", tmp_path / "run", named)


@pytest.mark.parametrize("name, changes", [
    ("simclr", dict(hidden_dim=2**16, projection_layers=3)),
    ("barlow_twins", dict(projection_dim=2**16)),
])  # fmt: skip
def test_more_memory_than_there_is(run_cli, words, tmp_path, name, changes):
    """Legal flags, and one matrix of 16 GB: no traceback, and what could be done is said."""
    result = run_cli(importlib.import_module(name), *words(name, **changes))
    assert result.status == 1 and len(result.err.splitlines()) == 1 and not result.warnings, result
    assert result.err.startswith("error: ") and "memory" in result.err
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("e*"))


def test_number_of_cases():
    print(f"{len(CASES)} edges, {len(EXCLUDED)} exclusions, {len(PAIRS)} pairs of {', '.join(COMMANDS)}")
    assert len(CASES) >= 150
    for name in COMMANDS:
        assert [case for case in CASES if case[0] == name]
