"""A notebook on Colab: what to install, and the ways to run a method file in a real kernel."""

import importlib.metadata
import re
import shutil

import nbclient
import nbformat
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

COLAB = (ROOT / "README.md").read_text().split("## Colab")[1].split("\n## ")[0]
CELLS = re.findall(r"^```\n(.*?)\n```$", COLAB, re.DOTALL | re.MULTILINE)

# googlecolab/backend-info on GitHub, pip-freeze.gpu.txt of February 2026 (commit 4647a1d).
ON_COLAB = {
    "torch": "2.10.0+cu128",
    "torchvision": "0.25.0+cu128",
    "numpy": "2.0.2",
    "scikit-learn": "1.6.1",
    "matplotlib": "3.10.0",
    "tqdm": "4.67.3",
    "wandb": "0.25.0",
    "filelock": "3.24.3",
    "pillow": "11.3.0",
    "typing-extensions": "4.15.0",
    "typeguard": "4.5.1",
    "docstring-parser": "0.17.0",
}


def missing(lines):
    """Names of the requirements that Colab does not meet."""
    requirements = map(Requirement, lines)
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    versions = {r: ON_COLAB.get(canonicalize_name(r.name)) for r in needed}
    return [r.name for r, v in versions.items() if not v or not r.specifier.contains(v)]


def test_colab_lacks_only_tyro():
    """The first cell installs all of requirements.txt that is missing, and replaces nothing."""
    assert missing((ROOT / "requirements.txt").read_text().split()) == ["tyro"]
    assert not set(missing(importlib.metadata.requires("tyro"))) & set(ON_COLAB)
    assert re.findall("^!pip .*", "\n".join(CELLS), re.MULTILINE) == ["!pip install -q tyro"]


def test_ways_to_run_in_a_kernel(tmp_path):
    """A pasted method file trains, %run takes flags, main can be imported, cells show plots."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    assert "`%run byol.py --ema 0.99`" in COLAB
    call = "from byol import Args, main; main(Args(ema=0.99))"
    assert call in " ".join(COLAB.split())
    pasted = (ROOT / "simclr.py").read_text()
    for name, value in dict(epochs=1, width=16).items():
        default = f"{name}: int | None = None"
        assert default in pasted
        pasted = pasted.replace(default, f"{name}: int | None = {value}")
    cells = [
        pasted,
        "%run byol.py --ema 0.98 --epochs 1 --width 16 --run-dir runs/byol",
        call.replace("ema=0.99", "ema=0.99, epochs=1, width=16"),
        # In this kernel, which is faster than a new process.
        CELLS[1].replace("!python", "%run"),
    ]
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, cells)])
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()

    texts = ["".join(o.get("text", "") for o in cell.outputs) for cell in notebook.cells]
    for text, words in zip(texts, ("simclr on ", "ema=0.98 ", "ema=0.99 ")):
        assert words in text and "width=16" in text and "epochs=1 " in text and "wrote runs" in text
    assert "test accuracy = " in texts[3] and "pixels: effective rank" in texts[3]
    assert len(list(tmp_path.glob("runs/*/embeddings.npz"))) == 3
    assert sum("image/png" in o.get("data", {}) for o in notebook.cells[3].outputs) == 5
