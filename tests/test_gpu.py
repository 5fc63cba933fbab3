"""What runs on a GPU against the same on a CPU: losses, augmentation, whole runs, resuming, the search of knn_eval.py.

SSL_TEST_DEVICE=cpu rehearses all of it on a CPU but fp16, which these scripts refuse there.
"""

import json
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for --deterministic; cuBLAS reads it once, when it starts

import numpy as np
import pytest
import torch
from conftest import flags
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize
from test_knn_eval import KS, clusters, lattice
from test_loop import colour_npz, watched  # noqa: F401
from test_losses import LOSSES, draw
from test_runs import features, interrupt, train

import common
import knn_eval
import simclr

DEVICE = os.environ.get("SSL_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(),
                                reason="needs a CUDA GPU; SSL_TEST_DEVICE=cpu rehearses it")  # fmt: skip
PRECISIONS = [
    "fp32",
    "bf16",
    pytest.param("fp16", marks=pytest.mark.skipif(DEVICE == "cpu", reason="fp16 needs a GPU")),
]
N, SIZE = 64, 32


@pytest.fixture(autouse=True)
def nothing_stays():
    """--deterministic sets PyTorch for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)


def uniform(low, high, *shape):
    return torch.rand(*shape) * (high - low) + low


# ------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("loss, naive, parameter", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_value_and_gradient_are_those_of_float64_on_a_cpu(loss, naive, parameter, dtype, autocast):
    inputs = [z.detach().to(dtype) for z in draw(n=256, d=128)]
    ours = [z.to(DEVICE, copy=True).requires_grad_() for z in inputs]
    theirs = [z.double().requires_grad_() for z in inputs]
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        value = loss(*ours, parameter)
    expected = loss(*theirs, parameter)  # test_losses.py compares it in float64 with a naive loop
    assert value.dtype == torch.float32 and value.device.type == DEVICE
    torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-5, atol=1e-5)  # TF32 would be off by 1e-3
    value.backward()
    expected.backward()
    for a, b in zip(ours, theirs):
        error = (a.grad.cpu().double() - b.grad).abs().max() / b.grad.abs().max()
        assert a.grad.dtype == dtype and error < {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]


# ------------------------------------------------------------------------------------------ views


def photos(seed=0):
    """Images with smooth edges in [0, 1]."""
    torch.manual_seed(seed)
    return torch.nn.functional.interpolate(torch.rand(N, 3, 8, 8), (SIZE, SIZE), mode="bilinear")


def crop(x, to):
    boxes = simclr.crop_boxes(N, SIZE, SIZE, (0.08, 1.0), "cpu")
    return simclr.crop_resize(x, *map(to, boxes), to(torch.arange(N) % 2 == 0), 24)


OPS = {
    "crop": crop,
    "affine": lambda x, to: simclr.affine(x, to(uniform(-30, 30, N)), *to(uniform(-0.2, 0.2, 2, N)),
                                          to(uniform(0.8, 1.2, N))),
    "grey": lambda x, to: simclr.to_grey(x),
    "hue": lambda x, to: simclr.adjust_hue(x, to(uniform(-0.5, 0.5, N))),
    "jitter": lambda x, to: simclr.color_jitter(x, to(uniform(0.2, 1.8, N, 3)), to(uniform(-0.4, 0.4, N)),
                                                to(torch.rand(N, 3).argsort(1))),
    "blur": lambda x, to: simclr.gaussian_blur(x, to(uniform(0.1, 2.0, N)), 5),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_an_op_is_that_of_a_cpu(name):
    x = photos()
    torch.manual_seed(1)
    expected = OPS[name](x, lambda parameter: parameter)
    torch.manual_seed(1)
    found = OPS[name](x.to(DEVICE), lambda parameter: parameter.to(DEVICE))
    assert found.device.type == DEVICE and not torch.equal(expected, x)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["photo", "symbol"])
def test_views_are_drawn_alike(method, name):
    """Image by image, the same ones from the same seed, and in the mean those of a CPU."""
    images = (photos() * 255).byte()
    many = images[:1].expand(1000, -1, -1, -1)
    found, expected = [], []
    for device, views in ((DEVICE, found), (DEVICE, expected), ("cpu", expected)):
        torch.manual_seed(3)
        views.append(method.two_views(many.to(device), method.AUGMENT[name]))
    for ours, again, theirs in zip(found[0], *expected):
        assert ours.device.type == DEVICE and ours.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ours, again) and -1e-5 < ours.min() and ours.max() < 1 + 1e-5
        assert len(ours.flatten(1).sum(1).unique()) > 970
        for statistic in (torch.mean, torch.std):
            torch.testing.assert_close(statistic(ours.cpu(), 0), statistic(theirs, 0), rtol=0, atol=0.06)
    assert not torch.equal(*found[0])


# ------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_a_run(method, tiny, colour_npz, tmp_path, monkeypatch, precision, compile):  # noqa: F811
    """It learns without waiting for the device, and what it leaves is right on a CPU."""
    torch.compiler.reset()
    changes = dict(
        device=DEVICE, precision=precision, compile=compile, encoder="resnet10", data_dir=colour_npz, epochs=6
    )
    with watched(monkeypatch, DEVICE) as steps:
        folder = train(method, tiny, tmp_path / "run", **changes)
    assert len(steps) == 12
    config = json.loads((folder / "args.json").read_text())
    assert config["precision"] == precision and (config["device"] == "cpu") == (DEVICE == "cpu")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(log) == 6 and np.isfinite([line["loss"] for line in log]).all() and log[-1]["spread"] > 0.05
    assert ("skipped_steps" in log[0]) == (precision == "fp16") and log[-1].get("skipped_steps", 0) < 3
    encoder, info = common.load_encoder(folder / "encoder.pt")
    images = common.load_images("npz", colour_npz)
    with np.load(folder / "embeddings.npz") as file:
        found = torch.from_numpy(file["train_features"])
    expected = common.embed(encoder, images.train, info["mean"], info["std"])
    assert (found - expected).norm() / expected.norm() < 0.01  # cuDNN's convolutions may use TF32
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
    assert not any(key.startswith(("module.", "_orig_mod.")) for key in state["network"])
    if compile:  # the same views and weights: only sums in another order
        eager = train(method, tiny, tmp_path / "eager", **{**changes, "compile": False})
        first = json.loads((eager / "log.jsonl").read_text().splitlines()[0])
        assert log[0]["loss"] == pytest.approx(first["loss"], rel=1e-3 if precision == "fp32" else 0.1)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_stopped_and_resumed_ends_with_the_same_bytes(method, tiny, run_cli, tmp_path, monkeypatch, precision):
    changes = dict(device=DEVICE, precision=precision, deterministic=True, checkpoint_every=2)
    whole = train(method, tiny, tmp_path / "whole", **changes)
    words = flags(**tiny(run_dir=tmp_path / "run", resume=True, **changes))
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        assert run_cli(method, *words).status == 130
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["step"] == 5
    assert run_cli(method, *words).status == 0
    assert features(tmp_path / "run") == features(whole)


def test_a_checkpoint_goes_on_on_the_other_device(method, tiny, run_cli, tmp_path, monkeypatch):
    """Begun on the GPU, ended on the CPU."""
    words = flags(**tiny(run_dir=tmp_path / "run", resume=True))
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        assert run_cli(method, *words, "--device", DEVICE, "--precision", "fp32").status == 130
    assert run_cli(method, *words, "--device", "cpu").status == 0
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2, 3]


# ------------------------------------------------------------------------------------------ neighbours


@pytest.mark.parametrize("vote", ["uniform", "distance"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("budget", [2**28, 2**16])
def test_knn_sweep_equals_scikit_learn(metric, vote, budget, monkeypatch):
    monkeypatch.setattr(knn_eval, "BUDGET", budget)  # in one block, and in many
    train, labels, test, _ = clusters()
    found = knn_eval.knn_sweep(train, labels, test, KS, metric=metric, vote=vote, device=torch.device(DEVICE))
    a, b = (normalize(train), normalize(test)) if metric == "cosine" else (train, test)
    for k in KS:
        assert (found[k] == KNeighborsClassifier(k, weights=vote).fit(a, labels).predict(b)).all()


@pytest.mark.parametrize("vote, data", [("uniform", lattice), ("balanced", lattice), ("softmax", clusters)])
def test_ties_and_leave_one_out_are_those_of_the_cpu(vote, data):
    train, labels, test = data()[:3]
    for queries in (test, None):
        ours, theirs = (knn_eval.knn_sweep(train, labels, queries, KS[:10], vote=vote, device=device)
                        for device in (torch.device(DEVICE), None))  # fmt: skip
        assert all((ours[k] == theirs[k]).all() for k in ours)


def test_the_command_and_the_monitor(finished, tmp_path):
    """knn_eval.py and the kNN monitor judge a run on the GPU as they do on the CPU."""
    folder = finished("simclr")
    args = dict(inputs=(str(folder),), ks=(1, 5, 20), embedding_2d="none", output=str(tmp_path))
    found, expected = (knn_eval.main(knn_eval.Args(device=device, **args))[0] for device in (DEVICE, "cpu"))
    assert found["sweep"] == expected["sweep"] and found["chosen_k"] == expected["chosen_k"]
    with np.load(folder / "embeddings.npz") as file:
        names = ("train_features", "train_labels", "test_features", "test_labels")
        parts = [torch.from_numpy(file[name]) for name in names]
    for temperature in (None, 0.1):
        ours = common.knn_accuracy(*(part.to(DEVICE) for part in parts), k=5, temperature=temperature)
        assert abs(ours - common.knn_accuracy(*parts, k=5, temperature=temperature)) <= 1 / len(parts[3])
