"""Colab: the README's cells, and the other ways to use a method file in a notebook, in a real Jupyter kernel."""

import importlib.metadata
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

README = (ROOT / "README.md").read_text()
COLAB = README.split("## Colab")[1].split("\n## ")[0]
CELLS = re.findall(r"^```\n(.*?)\n```$", COLAB, re.DOTALL | re.MULTILINE)

# What Google's list says of a GPU runtime: googlecolab/backend-info on GitHub, pip-freeze.gpu.txt of February 2026 (commit
# 4647a1d). That a runtime of today has these or newer versions is an assumption.
ON_COLAB = {"torch": "2.10.0+cu128", "torchvision": "0.25.0+cu128", "numpy": "2.0.2", "scikit-learn": "1.6.1",
            "matplotlib": "3.10.0", "tqdm": "4.67.3", "wandb": "0.25.0", "typing-extensions": "4.15.0",
            "typeguard": "4.5.1", "docstring-parser": "0.17.0"}  # fmt: skip


def test_colab_lacks_nothing_but_tyro():
    """requirements.txt against what is there: only tyro is installed, and what tyro needs replaces nothing."""

    def missing(requirements):
        found = [Requirement(line) for line in requirements]
        found = [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
        there = {r.name: ON_COLAB.get(canonicalize_name(r.name)) for r in found}
        return [r.name for r in found if not there[r.name] or not r.specifier.contains(there[r.name], prereleases=True)]

    lines = (ROOT / "requirements.txt").read_text().split()
    assert {"torch", "numpy", "wandb"} <= {Requirement(line).name for line in lines}
    assert missing(lines) == ["tyro"]
    assert not set(missing(importlib.metadata.requires("tyro") or [])) & set(ON_COLAB)
    assert [line for cell in CELLS for line in cell.splitlines() if "pip" in line] == ["!pip install -q tyro"]


def test_cells(tmp_path, monkeypatch):
    """One notebook, from the first cell to the last, with a folder in the place of Drive and shorter trainings."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    folder = tmp_path / "drive" / "MyDrive" / "ssl"
    (tmp_path / "google" / "colab").mkdir(parents=True)
    (tmp_path / "google" / "colab" / "__init__.py").write_text("")
    (tmp_path / "google" / "colab" / "drive.py").write_text(
        f"from pathlib import Path\ndef mount(place):\n    Path({str(tmp_path)!r}, 'mounted').write_text(place)\n"
    )
    folder.mkdir(parents=True)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # google.colab
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # tyro is here: nothing may be fetched
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")

    short = "--epochs 2 --eval-every 1 --width 16"
    training = CELLS[1]
    assert training.startswith("!python byol.py --ema 0.99 --run-dir /content/drive/") and training.endswith(
        " --resume"
    )
    whole = [*CELLS]
    whole[1] = f"{training} {short}"
    whole.insert(2, whole[1])  # the cell once more, as after a disconnection
    assert whole[-1].endswith("main(Args(ema=0.99))")
    whole[-1] = whole[-1].replace("ema=0.99", "ema=0.99, epochs=1, width=16") + "\nprint(folder)"
    assert "`%run byol.py --ema 0.99`" in COLAB
    whole.append(f"%run byol.py --ema 0.99 {short}")
    pasted = (folder / "byol.py").read_text()
    pasted = pasted.replace("epochs: Optional[int] = None", "epochs: Optional[int] = 1")
    whole.append(pasted.replace("width: Optional[int] = None", "width: Optional[int] = 16"))
    whole = [cell.replace("/content/drive", f"{tmp_path}/drive") for cell in whole]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in whole])
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    def said(i):
        return "".join(output.get("text", "") for output in notebook.cells[i].outputs)

    def shown(i):
        return [output for output in notebook.cells[i].outputs if "image/png" in output.get("data", {})]

    assert (tmp_path / "mounted").read_text() == f"{tmp_path}/drive"
    assert "ERROR" not in said(0), said(0)
    bar = r"epoch 2/2 \|.*?\| 100 %, [\d.k]+ samples/s, 00:00 left, loss \d\.\d+, knn \d+\.\d %"
    assert re.search(bar, said(1)) and "next: python knn_eval.py" in said(1), said(1)
    assert "epoch 1/2" not in said(2) and "kNN accuracy" in said(2), said(2)  # resumed: it was done already
    assert "chosen k = " in said(3) and "pixels of digits" in said(3), said(3)
    assert len(shown(4)) == 4
    for name in ("views", "curves", "embedding_2d", "knn"):
        with Image.open(folder / "runs" / "byol" / f"{name}.png") as picture:
            picture.load()
    assert "runs/byol-digits-s1-" in said(5).splitlines()[-1], said(5)
    assert re.search(bar, said(6)) and "ema=0.99" in said(6), said(6)
    assert "epochs=1 " in said(7) and "ema=0.9 " in said(7) and "embeddings.npz" in said(7), said(7)
    assert len(list(folder.glob("runs/*/embeddings.npz"))) == 4
