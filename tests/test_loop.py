"""The training loop never waits for the device: it reads nothing from it between two calls of common.Run.advance."""

import contextlib

import numpy as np
import pytest
import torch
from conftest import READS, waits
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import common


class NoReads(TorchFunctionMode):
    """Calls of Python that read a tensor; on a CPU most of them leave no trace below."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        to_cpu = name == "to" and "cpu" in [v for v in [*args[1:], *(kwargs or {}).values()] if isinstance(v, str)]
        assert not (name in READS or to_cpu), f"the loop waits: Tensor.{name}"
        return function(*args, **(kwargs or {}))


class NoWaits(TorchDispatchMode):
    """Operators that wait, also those that other operators and the optimizer call."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not waits(function, args), f"the loop waits: {function}"
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting(device):
    """On a GPU PyTorch itself refuses every synchronisation, on a CPU the two modes refuse what would be one."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with NoReads(), NoWaits():
            yield


@contextlib.contextmanager
def watched(monkeypatch, device):
    """Refuse to wait between any two calls of Run.advance in one epoch. Yields the steps watched."""
    advance, steps, inside = common.Run.advance, [], contextlib.ExitStack()

    def advancing(self, i, stats, lr, epoch, step):
        inside.close()
        if i:
            steps.append(step)
        advance(self, i, stats, lr, epoch, step)
        if i + 1 < len(stats):  # after the last step of an epoch its averages are read
            inside.enter_context(no_waiting(device))

    monkeypatch.setattr(common.Run, "advance", advancing)
    with inside:
        yield steps


def run_watched(method, tiny, folder, monkeypatch, device, **changes):
    """A tiny run whose every step but the first of each epoch is watched."""
    with watched(monkeypatch, device) as steps:
        method.main(method.Args(**tiny(run_dir=str(folder), device=device, **changes)))
    assert steps == [1, 2, 4, 5, 7, 8]


@pytest.fixture(scope="session")
def colour_npz(tmp_path_factory):
    """96 images in colour: on grey ones the colour ops are left out."""
    images = np.random.default_rng(0).integers(0, 256, (96, 8, 8, 3), np.uint8)
    path = tmp_path_factory.mktemp("data") / "colour.npz"
    np.savez(path, train_images=images)
    return str(path)


@pytest.mark.parametrize("augment, precision", [("photo", "fp32"), ("symbol", "bf16")])
def test_the_loop_never_waits(method, tiny, colour_npz, tmp_path, monkeypatch, augment, precision):
    size = 66 if augment == "photo" else 8  # above 64 pixels photos are blurred, too
    run_watched(method, tiny, tmp_path / "run", monkeypatch, "cpu", augment=augment, precision=precision,
                data_dir=colour_npz, image_size=size, encoder="resnet10")  # fmt: skip


@pytest.mark.parametrize("wait", [
    lambda z: z.norm().item(),
    lambda z: float(z.norm()),
    lambda z: z.sum() if z.norm() > 0 else 0,
    lambda z: z.cpu(),
    lambda z: z.to("cpu"),
    lambda z: z.tolist(),
    lambda z: z[z > 0],
    lambda z: z.masked_select(z > 0),
    lambda z: (z > 0).nonzero(),
    lambda z: z.unique(),
    lambda z: torch.arange(len(z)).repeat_interleave((z[:, 0] > 0).long()),
], ids=["item", "float", "if", "cpu", "to", "tolist", "mask", "select", "nonzero", "unique", "repeat"])  # fmt: skip
def test_a_loop_that_waits_is_caught(tiny, tmp_path, monkeypatch, wait):
    """The test above fails wherever the step does one of these; here in the place of the spread."""
    import simclr

    spread = common.spread
    monkeypatch.setattr(common, "spread", lambda z: (wait(z.detach()), spread(z))[1])
    with pytest.raises(AssertionError, match="the loop waits"):
        run_watched(simclr, tiny, tmp_path / "run", monkeypatch, "cpu")
