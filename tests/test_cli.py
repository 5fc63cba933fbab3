"""The command line: bad input, help, progress, notebooks, what is read and written."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import METHODS, ROOT

import common
import simclr

# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "command",
    [
        "simclr --seed -1",
        "simclr --epochs -1",
        "simclr --batch-size 1",
        "simclr --batch-size 97",
        "simclr --lr nan",
        "simclr --lr inf",
        "simclr --weight-decay -0.1",
        "simclr --warmup-epochs -1",
        "simclr --width 8",
        "simclr --image-size 2",
        "simclr --temperature 0",
        "simclr --hidden-dim 0",
        "simclr --projection-layers -1",
        "simclr --eval-every -1",
        "simclr --checkpoint-every 0",
        "simclr --knn-k 0",
        "simclr --resume",
        "simclr --precision fp16",
        # On Linux.
        "simclr --device mps",
        "byol --ema 1.1",
        "byol --ema nan",
        "barlow_twins --lambd -0.1",
        "barlow_twins --lambd nan",
    ],
)
def test_method_refuses_bad_values(refused, tiny, command):
    """One error line names the flag and the value, and nothing is written."""
    name, words = command.split(" ", 1)
    refused(importlib.import_module(name), *words.split(), says=[words], **tiny())


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(run_dir=f"{__file__}/run"), "cannot write to --run-dir"),
        (dict(data_dir="nowhere.npz"), "nowhere.npz"),
        (dict(dataset="folder", data_dir="nowhere"), "--data-dir 'nowhere'"),
    ],
)
def test_method_refuses_bad_paths(refused, tiny, changes, says):
    """One error line names the path, and nothing is written."""
    refused(simclr, says=[says], **tiny(**changes))


# ---------------------------------------------------------------- help


def entries(help):
    """flag -> its entry in the text of --help."""
    text = " ".join(re.sub("[─-╿]", " ", help).split())
    return {
        entry.split()[0].strip(","): entry for entry in re.split(r" --(?=[\w-]+,? [^a-z(])", text)
    }


@pytest.mark.parametrize(
    "words, dataset",
    [([], "digits"), (["--dataset", "cifar10"], "cifar10"), (["--dataset=stl10"], "stl10")],
    ids=["default", "two words", "one word"],
)
def test_help_shows_the_recipe(run_cli, method, words, dataset):
    """--help shows the values that unset flags take with --dataset."""
    result = run_cli(method, *words, "--help")
    shown, recipe = entries(result.out), method.RECIPES[dataset]
    assert not result.err and inspect.getsource(method).endswith("cli(Args, main, RECIPES)\n")
    assert dataset == "digits" or (recipe["epochs"], recipe["batch_size"]) == (200, 512)
    for key, value in recipe.items():
        assert f"(default: {value})" in shown[key.replace("_", "-")]


@pytest.mark.parametrize("name", [*METHODS, "knn_eval"])
def test_help_has_a_sentence_for_every_flag(run_cli, name):
    """--help prints the string below each field of Args, which is one line."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    body = next(node for node in tree.body if getattr(node, "name", "") == "Args").body[1:]
    help = run_cli(importlib.import_module(name), "--help").out
    out = " ".join(re.sub("[─-╿]", " ", help).split())
    for field, text in zip(body[::2], body[1::2], strict=True):
        assert isinstance(field, ast.AnnAssign)
        assert text.lineno == text.end_lineno and text.value.value in out


@pytest.mark.parametrize("words", ["--help", "--epoch 3"])
def test_help_and_typos_are_answered_at_once(words):
    """Neither waits for the imports of a training."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "byol.py"), *words.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (0 if words == "--help" else 2) and "tyro" in done.stderr
    assert not re.findall(r"\| +(torchvision|sklearn|matplotlib|wandb)\b", done.stderr)


# ---------------------------------------------------------------- progress


def test_progress_in_a_file(train, folder, monkeypatch):
    """Without a terminal there is one plain line an epoch; without --track, wandb is not needed."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = train(epochs=2)
    assert not result.err and not re.search(r"[\r\x1b]", result.out)
    # The note on bf16 depends on the processor.
    lines = [line for line in result.out.splitlines() if not line.startswith("note: on this")]
    head, arguments, *epochs, end = lines
    assert head == f"simclr on cpu: {folder}"
    assert "lr=0.05" in arguments.split() and "weight_decay=0.0005" in arguments.split()
    assert [line.split("  ")[0] for line in epochs] == ["epoch 1 of 2", "epoch 2 of 2"]
    assert end == f"wrote {folder}; next: python knn_eval.py '{folder}' --pixels"


# ---------------------------------------------------------------- folders and notebooks


def test_run_dir_by_default(run_cli, tiny):
    """Without --run-dir a run makes its own folder under runs/."""
    run_cli(simclr, **tiny(seed=7, epochs=0))
    (folder,) = os.listdir("runs")
    assert re.fullmatch(r"simclr-npz-s7-\d{8}-\d{6}-\d{6}", folder)


def test_pasted_cell_ignores_the_argv_of_colab(monkeypatch):
    """test_notebook.py has a kernel of Jupyter's."""
    seen = []
    monkeypatch.setattr(sys, "argv", "/lib/colab_kernel_launcher.py -f kernel.json".split())
    common.cli(simclr.Args, seen.append)
    assert seen == [simclr.Args()]


@pytest.mark.parametrize("units", [True, False])
def test_note_on_a_cpu_with_bf16_units(monkeypatch, capsys, units):
    """--precision auto stays float32 on a CPU, and names bf16 and its gain where it is fast."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    _, amp_dtype = common.set_up(common.resolve(simclr.Args(device="cpu"), simclr.RECIPES))
    assert amp_dtype is None and ("bf16 is 1.7 times" in capsys.readouterr().out) == units
