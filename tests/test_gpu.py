"""A GPU against the CPU: losses, ops, views, whole runs, resuming, the search of knn_eval.py.

SSL_TEST_DEVICE=cpu rehearses it on a CPU, without fp16, which needs a GPU.
"""

import contextlib
import os
import signal

# cuBLAS reads it when it starts; for --deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import pytest
import test_methods
import torch
import torch.nn.functional as F
from conftest import at_step, read_log
from test_knn import test_device_and_small_chunks_change_no_prediction  # noqa: F401
from test_losses import losses, test_loss_and_gradient_equal_float64  # noqa: F401
from test_methods import resumed, small, watched_run  # noqa: F401

import byol
import common
import simclr

DEVICE = os.environ.get("SSL_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(),
    reason="needs a CUDA GPU; SSL_TEST_DEVICE=cpu rehearses it",
)
PRECISIONS = ["fp32", "bf16"] + ["fp16"] * (DEVICE == "cuda")
N, SIZE = 64, 32


@contextlib.contextmanager
def sync_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch):
    """PyTorch itself refuses to wait for a GPU; --deterministic sets it for the whole process."""
    if DEVICE == "cuda":
        monkeypatch.setattr(test_methods, "WATCH", [sync_is_an_error])
    yield
    torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------- losses, ops, views


def photos():
    """Random smooth images in [0, 1]."""
    torch.manual_seed(0)
    return F.interpolate(torch.rand(N, 3, 8, 8), (SIZE, SIZE), mode="bilinear")


# As in main.
OPTIONS = dict(layout_optimization=False)
# Each op of images x with parameters p between -1 and 1, [N, 4].
OPS = {
    "crop_resize": lambda x, p: (x, *(8 * p.abs() + 8).split(1, 1), p[:, :1] > 0, 24),
    "affine": lambda x, p: (x, 30 * p[:, 0], p[:, 1] / 5, p[:, 2] / 5, 1 + p[:, 3] / 5),
    "adjust_hue": lambda x, p: (x, p[:, 0] / 2),
    "color_jitter": lambda x, p: (x.clone(), 1 + p[:, :3], p[:, 3] / 2, p[:, :3].argsort(1)),
    "gaussian_blur": lambda x, p: (x, 1.05 + 0.95 * p[:, 0], 5),
}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_op_equals_the_cpu(name, compile):
    """The same parameters on both devices."""
    x, parameters = photos(), torch.rand(N, 4) * 2 - 1
    op, arguments = getattr(simclr, name), OPS[name]
    ours = torch.compile(op, fullgraph=True, options=OPTIONS) if compile else op
    found = ours(*arguments(x.to(DEVICE), parameters.to(DEVICE)))
    assert found.device.type == DEVICE
    torch.testing.assert_close(found.cpu(), op(*arguments(x, parameters)), rtol=0, atol=1e-4)


def seeded_views(two_views, view, device, seed=3):
    """Two views of 2,048 copies of one image, in batches of N: [2, 2048, 3, 32, 32]."""
    images = (photos()[:1] * 255).byte().expand(N, -1, -1, -1).to(device)
    torch.manual_seed(seed)
    pairs = [two_views(images, view) for _ in range(32)]
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in pairs[-1])
    assert {v.device.type for v in pairs[-1]} == {device}
    return torch.cat([torch.stack(pair) for pair in pairs], dim=1)


def assert_same_distribution(ours, cpu):
    """Mean and spread of a CPU's; every image has its own."""
    assert -1e-5 < ours.min() and ours.max() < 1 + 1e-5
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(statistic(ours.cpu(), 1), statistic(cpu, 1), rtol=0, atol=0.05)
    assert all(len(v.flatten(1).sum(1).unique()) > 1980 for v in ours)


@pytest.mark.parametrize("augment", ["photo", "symbol"])
def test_two_views_have_the_distribution_of_the_cpu(method, augment):
    """The same views from the same seed."""
    view = method.AUGMENT[augment]
    ours, again = (seeded_views(method.two_views, view, DEVICE) for _ in range(2))
    assert torch.equal(ours, again)
    assert_same_distribution(ours, seeded_views(method.two_views, view, "cpu", seed=4))


@pytest.mark.parametrize("size", [12, 96])
def test_no_op_waits(size):
    """Every op of two_views; a run of the digits has few."""
    images, mean = (photos() * 255).byte().to(DEVICE), torch.rand(3, 1, 1).to(DEVICE)
    for watched in (False, True):
        with contextlib.ExitStack() as inside:
            for watch in test_methods.WATCH * watched:
                inside.enter_context(watch())
            simclr.two_views(images, test_methods.VIEW, size, mean, mean)


@pytest.mark.parametrize("augment", ["photo", "symbol"])
def test_compiled_two_views_have_the_distribution_of_the_cpu(augment):
    """The compiler draws random numbers of its own."""
    view = byol.choose_view(augment, gray=False, image_size=SIZE)
    compiled = torch.compile(byol.two_views, fullgraph=True, options=OPTIONS)
    cpu = seeded_views(byol.two_views, view, "cpu")
    assert_same_distribution(seeded_views(compiled, view, DEVICE), cpu)


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("precision", PRECISIONS)
def test_run_learns_without_waiting(method, watched_run, monkeypatch, precision):  # noqa: F811
    """Eager and compiled: the loop never waits, the losses agree."""
    # TF32 in one of the two runs would change the loss.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.compiler.reset()
    first = []
    for compile in (False, True):
        # Compiled, the views would draw other random numbers.
        changes = dict(device=DEVICE, precision=precision, compile=compile, augment="none")
        folder = watched_run(method, run_dir=f"compile-{compile}", **changes)
        log = read_log(folder)
        assert np.isfinite([line["loss"] for line in log]).all() and log[-1]["spread"] > 0.05
        first.append(log[0]["loss"])
        state = torch.load(folder / "checkpoint.pt")["network"]
        assert not any(key.startswith(("module.", "_orig_mod.")) for key in state)
    assert first[1] == pytest.approx(first[0], rel=1e-3 if precision == "fp32" else 0.1)


def test_images_in_the_memory_of_the_host(watched_run, monkeypatch):  # noqa: F811
    """Too many for the GPU, they are read ahead: the same run, and no step waits."""
    changes, logs = dict(device=DEVICE, precision="fp32", deterministic=True), []
    for name in "ab":
        log = read_log(watched_run(simclr, run_dir=name, **changes))
        logs.append([line["loss"] for line in log])
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    assert logs[0] == logs[1]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_deterministic_run_resumes_to_the_same_bytes(method, resumed, precision):  # noqa: F811
    """--deterministic: stopped in its second epoch, resumed, as if never stopped."""
    resumed(method, device=DEVICE, precision=precision, deterministic=True)


def test_checkpoint_resumes_on_the_other_device(method, tiny, small, monkeypatch):  # noqa: F811
    """Started on the GPU, ended on the CPU; encoder.pt gives the CPU's features."""
    changes = tiny(run_dir="run", resume=True, precision="fp32")
    at_step(monkeypatch, 4, signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        method.main(method.Args(**dict(changes, device=DEVICE)))
    folder = method.main(method.Args(**changes))
    assert [line["epoch"] for line in read_log(folder)] == [1, 2, 3]


def test_embeddings_of_a_gpu_equal_the_cpu(method, tiny):
    """encoder.pt and embeddings.npz of a run on a GPU, without a GPU."""
    folder = method.main(method.Args(**tiny(device=DEVICE, epochs=1, precision="fp32")))
    encoder, _ = common.load_encoder(folder / "encoder.pt")
    images = common.load_images("npz", tiny()["data_dir"])
    expected = common.embed(encoder, images, "train")
    found = np.load(folder / "embeddings.npz")["train_features"]
    # cuDNN's convolutions may use TF32.
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)
