"""What the tests share: tiny data and runs, the command line in this process, stops."""

import importlib
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# No test may reach a server.
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

import common
import simclr

# The same sums in the same order on every machine.
torch.set_num_threads(1)

# A method of this collection is one line here: the loss of its file m and its network's output.
LOSS = {
    "simclr": lambda m, out, temperature: m.info_nce(*out, temperature),
    "byol": lambda m, out, ema: m.byol_loss(out[0], out[3]) + m.byol_loss(out[1], out[2]),
    "barlow_twins": lambda m, out, lambd: m.barlow_twins_loss(*out, lambd) / out[0].shape[1],
}
METHODS = list(LOSS)
# 96 images of 8 x 8 pixels in 3 steps an epoch: an epoch takes a tenth of a second.
TINY = dict(dataset="npz", device="cpu", width=16, hidden_dim=16, projection_dim=16, batch_size=32)
TINY |= dict(epochs=3, lr=0.05, warmup_epochs=1.0, eval_every=0, knn_k=5, checkpoint_every=1)


def flags(**values):
    """Keyword values as the words of a command line; None is left out."""
    words = []
    for key, value in values.items():
        key = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no-{key}")
        elif value is not None:
            words += [f"--{key}", str(value)]
    return words


class Code:
    """Its pickle creates a file where it is loaded."""

    def __reduce__(self):
        return open, ("the code ran", "w")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def at_step(monkeypatch, chosen, action):
    """Call action(), or raise that signal, while this step is under way."""
    record = common.Run.record

    def recording(run, step, *rest):
        if step == chosen:
            action() if callable(action) else signal.raise_signal(action)
        record(run, step, *rest)

    monkeypatch.setattr(common.Run, "record", recording)


def one_graph(function):
    """Compile as one graph, forward and backward."""
    # The compiler gives up on a line that it has compiled too often.
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.fixture(autouse=True)
def own_folder(tmp_path_factory, monkeypatch):
    """Run each test in a folder of its own: runs/ and cache/ stay out of the project."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(params=METHODS)
def method(request):
    """Each method module."""
    return importlib.import_module(request.param)


@pytest.fixture(scope="session")
def tiny_npz(tmp_path_factory):
    """96 training and 40 test digits in MedMNIST's form."""
    images = common.load_images("digits")
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    arrays = {}
    for part, n in (("train", 96), ("test", 40)):
        arrays[f"{part}_images"] = getattr(images, part)[:n, 0].numpy()
        arrays[f"{part}_labels"] = getattr(images, f"{part}_labels")[:n, None].numpy()
    np.savez(path, **arrays)
    return path


@pytest.fixture
def cifar10():
    """The folder of CIFAR-10 as JPEG files, train/<class>/*.jpg and test/<class>/*.jpg."""
    if "SSL_TEST_CIFAR10" not in os.environ:
        pytest.skip("SSL_TEST_CIFAR10 does not name the folder with train/ and test/")
    return Path(os.environ["SSL_TEST_CIFAR10"])


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """32 training and 8 test images of 24x30 pixels in two classes."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(40):
        name = f"{'test' if i % 5 == 4 else 'train'}/class {i % 2}/{i}.png"
        write(root / name, noise(24, 30, 3, seed=i))
    return root


@pytest.fixture(scope="session")
def tiny(tiny_npz):
    """tiny(**changes): the arguments of a run of a moment, as a dict."""
    return lambda **changes: {**TINY, "data_dir": str(tiny_npz), **changes}


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """finished(name): the folder of one whole tiny run of a method, shared: do not change it."""
    runs = {}

    def run(name):
        if name not in runs:
            module = importlib.import_module(name)
            folder = tmp_path_factory.mktemp("runs") / name
            runs[name] = Path(module.main(module.Args(**tiny(run_dir=str(folder)))))
        return runs[name]

    return run


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """run_cli(module, *words, **values): a command in this process -> out, err, warnings.

    It ends with `status` and prints the words of `says`; status 2 prints only `lines` error lines.
    """

    def run(module, *words, status=0, says=(), lines=1, **values):
        words = map(str, [*flags(**values), *words])
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *words])
        capsys.readouterr()
        found = 0
        # pytest would hide the warnings that a user sees on stderr.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            # Python itself hides these.
            warnings.simplefilter("ignore", ResourceWarning)
            try:
                common.cli(module.Args, module.main, getattr(module, "RECIPES", None))
            except SystemExit as end:
                found = end.code
        out, err = capsys.readouterr()
        shown = err if status else out + err
        assert found == status and all(word in shown for word in says), (found, out, err)
        if status == 2:
            assert [line[:7] for line in err.splitlines()] == ["error: "] * lines, err
        messages = [str(warning.message) for warning in caught]
        return SimpleNamespace(out=out, err=err, warnings=messages)

    return run


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "a run"


@pytest.fixture
def train(run_cli, tiny, folder):
    """train(module, **changes): the command line of a tiny run in `folder`."""

    def run(module=simclr, **changes):
        return run_cli(module, **tiny(**{"run_dir": folder, **changes}))

    return run


@pytest.fixture
def refused(run_cli, monkeypatch, tmp_path):
    """refused(module, ...): run_cli with an error that leaves no file."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def facts(path):
        stat = path.stat()
        return path.is_dir() or (stat.st_size, stat.st_mtime_ns)

    def contents():
        # Some versions of filelock write to a lock or delete it.
        return {path: facts(path) for path in tmp_path.rglob("*") if path.name != ".lock"}

    def run(module, *words, **values):
        before = contents()
        result = run_cli(module, *words, status=2, **values)
        assert contents() == before and not result.warnings, result

    return run
