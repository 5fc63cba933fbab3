"""What the tests share: tiny data, tiny runs, and the commands run inside this process."""

import importlib
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["WANDB_MODE"] = "offline"  # no test may reach a server
os.environ["WANDB_SILENT"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from functorch.compile import make_boxed_func  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch._ops import OpOverload  # noqa: E402

import common  # noqa: E402

torch.set_num_threads(1)  # the same sums in the same order on every machine, and no fight for the cores

METHODS = ["simclr", "byol", "barlow_twins"]
# 96 images of 8 x 8 pixels in 3 steps an epoch: an epoch takes a tenth of a second.
TINY = dict(dataset="npz", device="cpu", width=16, hidden_dim=16, projection_dim=16, batch_size=32, epochs=3, lr=0.05,
            warmup_epochs=1.0, eval_every=0, knn_k=5, checkpoint_every=1)  # fmt: skip


def flags(**values):
    """Arguments of a method as the words of a command line."""
    words = []
    for key, value in values.items():
        key = "--" + key.replace("_", "-")
        words += [key if value else key.replace("--", "--no-", 1)] if isinstance(value, bool) else [key, str(value)]
    return words


# Methods of a tensor that read it, and operators that ask the device for a value, or for a shape that depends on one.
READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__"}
WAITS = {"_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "is_nonzero", "equal", "unique_dim",
         "_unique2", "unique_consecutive", "bincount", "repeat_interleave"}  # fmt: skip


def waits(operator, args):
    """Whether an ATen operator makes the host wait for the device; args are tensors or nodes of a graph."""
    name = operator.overloadpacket.__name__
    indices = [i for i in args[1] if i is not None] if name in ("index", "index_put", "index_put_") else []
    return name in WAITS or any((i.meta["val"] if hasattr(i, "meta") else i).dtype == torch.bool for i in indices)


def one_graph(function):
    """The function compiled as one graph, forward and backward, in which nothing waits: else a call is an error.

    fullgraph alone does not see to the second: PyTorch traces .item() and boolean masks into the graph.
    """

    def inspect(graph, inputs):
        for node in graph.graph.nodes:
            reads = node.op == "call_method" and node.target in READS
            assert not (reads or isinstance(node.target, OpOverload) and waits(node.target, node.args)), (
                f"waits: {node.target}"
            )
        return make_boxed_func(graph.forward)

    def both(graph, inputs):  # what was written, in which .item() still stands, and the operators that it comes down to
        inspect(graph, inputs)
        return aot_autograd(fw_compiler=inspect)(graph, inputs)

    torch.compiler.reset()  # it gives up on a line that has been compiled too often
    return torch.compile(function, fullgraph=True, backend=both)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """Each test in a folder of its own: what goes to runs/ or cache/ by default stays out of the project."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture(params=METHODS)
def method(request):
    """Each of the three method modules."""
    return importlib.import_module(request.param)


@pytest.fixture(scope="session")
def tiny_npz(tmp_path_factory):
    """96 training and 40 test digits in MedMNIST's form."""
    images = common.load_images("digits")
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, train_images=images.train[:96, 0].numpy(), train_labels=images.train_labels[:96, None].numpy(),
             test_images=images.test[:40, 0].numpy(), test_labels=images.test_labels[:40, None].numpy())  # fmt: skip
    return path


@pytest.fixture(scope="session")
def tiny(tiny_npz):
    """tiny(**changes): the arguments of a run that takes a moment, as a dict."""
    return lambda **changes: {**TINY, "data_dir": str(tiny_npz), **changes}


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """finished(name): the folder of one whole tiny run of a method, shared by all tests, which must not change it."""
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
    """run_cli(module, *words): the command line inside this process. Returns status, out and err."""

    def run(module, *words):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
        capsys.readouterr()
        status = 0
        with warnings.catch_warnings(record=True) as caught:  # pytest would hide what a user sees on stderr
            warnings.simplefilter("default")
            warnings.simplefilter("ignore", ResourceWarning)  # Python itself hides these
            try:
                common.cli(module.Args, module.main)
            except SystemExit as exit:
                status = exit.code
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err, warnings=[str(w.message) for w in caught])

    return run


@pytest.fixture
def refused(run_cli, monkeypatch, tmp_path):
    """refused(module, *words, says=(...)): the command must end with `lines` error lines, and leave no trace."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def contents():
        return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if not p.is_dir()}

    def folders():
        return {str(p) for p in tmp_path.rglob("*") if p.is_dir()}

    def run(module, *words, says=(), status=2, lines=1):
        before = contents(), folders()
        result = run_cli(module, *words)
        assert result.status == status, result
        assert "Traceback" not in result.err and not result.warnings, result
        errors = result.err.splitlines()
        assert len(errors) == lines and all(line.startswith("error: ") for line in errors), result.err
        for word in says:
            assert word in result.err, (word, result.err)
        assert (contents(), folders()) == before
        return result

    return run
