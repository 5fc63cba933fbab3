"""The command line: bad input, help, progress, notebooks, what is read and written."""

import ast
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import METHODS, ROOT, flags
from PIL import Image

import common
import knn_eval
import simclr

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture
def script(monkeypatch, capsys):
    """script(name, *words): `python name.py words` in this process; its status, stdout, stderr."""

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        return exit.value.code or 0, *capsys.readouterr()

    return run


def snapshot(root):
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*")}


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "name, changes, says",
    [
        ("simclr", dict(seed=-1), "--seed -1"),
        ("simclr", dict(epochs=-1), "--epochs -1"),
        ("simclr", dict(batch_size=1), "--batch-size 1"),
        ("simclr", dict(batch_size=97), "--batch-size 97 is more than the 96 training images"),
        ("simclr", dict(lr="nan"), "--lr nan"),
        ("simclr", dict(lr="inf"), "--lr inf"),
        ("simclr", dict(weight_decay=-0.1), "--weight-decay -0.1"),
        ("simclr", dict(warmup_epochs=-1), "--warmup-epochs -1"),
        ("simclr", dict(width=8), "--width 8"),
        ("simclr", dict(image_size=2), "--image-size 2"),
        ("simclr", dict(projection_layers=-1), "--projection-layers -1"),
        ("simclr", dict(hidden_dim=0), "--hidden-dim 0"),
        ("simclr", dict(projection_dim=0), "--projection-dim 0"),
        ("simclr", dict(eval_every=-1), "--eval-every -1"),
        ("simclr", dict(checkpoint_every=0), "--checkpoint-every 0"),
        ("simclr", dict(knn_k=0), "--knn-k 0"),
        ("simclr", dict(resume=True), "--resume needs --run-dir"),
        ("simclr", dict(precision="fp16"), "--precision fp16 needs --device cuda"),
        ("simclr", dict(run_dir=f"{__file__}/run"), "cannot write to --run-dir"),
        ("simclr", dict(data_dir="nowhere.npz"), "nowhere.npz"),
        ("simclr", dict(data_dir=__file__), "test_cli.py"),
        ("simclr", dict(dataset="folder", data_dir="nowhere"), "--data-dir 'nowhere'"),
        ("simclr", dict(temperature=0), "--temperature 0"),
        ("simclr", dict(temperature="nan"), "--temperature nan"),
        ("byol", dict(ema=1.1), "--ema 1.1"),
        ("byol", dict(ema="nan"), "--ema nan"),
        ("barlow_twins", dict(lambd=-0.1), "--lambd -0.1"),
        ("barlow_twins", dict(lambd="nan"), "--lambd nan"),
    ],
    ids=str,
)
def test_method_refuses_bad_values(refused, tiny, name, changes, says):
    """One error line names the flag and the value, and nothing is written."""
    refused(importlib.import_module(name), *flags(**tiny(**changes)), says=[says])


@pytest.mark.parametrize(
    "words, says",
    [
        ([], "no run under runs/"),
        (["nowhere"], "'nowhere"),
        ([__file__], "test_cli.py"),
        (["{run}", "--ks", "0"], "--ks 0"),
        (["{run}", "--ks"], "--ks : give numbers above 0"),
        pytest.param(["{run}", "--device", "cuda"], "--device cuda", marks=no_gpu),
    ],
    ids=str,
)
def test_knn_eval_refuses_bad_values(refused, finished, words, says):
    """One error line names the flag or the input, and nothing is written."""
    run = finished("simclr")
    refused(knn_eval, *(word.format(run=run) for word in words), says=[says])


@no_gpu
def test_device_cuda_without_a_gpu(refused, tiny, method):
    """--device cuda on a machine without one is an error line that names the way out."""
    words = flags(**tiny(device="cuda"))
    refused(method, *words, says=["--device cuda", "use --device auto or cpu"])


@pytest.mark.parametrize(
    "name, wrong, says",
    [
        ("simclr", "--epoch", "--epochs"),
        ("byol", "--emma", "--ema"),
        ("barlow_twins", "--lambda", "--lambd"),
        ("knn_eval", "--metrics", "--metric"),
        ("simclr", "--no-such-flag", "--no-such-flag"),
    ],
)
def test_unknown_flag(script, name, wrong, says):
    """tyro ends a mistyped flag with exit status 2, and suggests the right one."""
    status, _, err = script(name, wrong, "3")
    assert status == 2 and re.search(rf"{says}\b", err.replace(wrong, "", says != wrong))


# ---------------------------------------------------------------- help


def entries(help):
    """flag -> its entry in the text of --help."""
    text = " ".join(re.sub("[─-╿]", " ", help).split())
    return {
        entry.split()[0].strip(","): entry for entry in re.split(r" --(?=[\w-]+,? [^a-z(])", text)
    }


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "words, dataset",
    [([], "digits"), (["--dataset", "cifar10"], "cifar10"), (["--dataset=stl10"], "stl10")],
    ids=["default", "two words", "one word"],
)
def test_help_shows_the_recipe(script, name, words, dataset):
    """--help shows the values that unset flags take with --dataset."""
    status, out, err = script(name, *words, "--help")
    assert status == 0 and not err
    shown, recipe = entries(out), importlib.import_module(name).RECIPES[dataset]
    assert dataset == "digits" or (recipe["epochs"], recipe["batch_size"]) == (200, 512)
    for key, value in recipe.items():
        assert f"(default: {value})" in shown[key.replace("_", "-")]


@pytest.mark.parametrize("name", [*METHODS, "knn_eval"])
def test_help_has_a_sentence_for_every_flag(script, name):
    """--help prints the string below each field of Args, which is one line."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    body = next(node for node in tree.body if getattr(node, "name", "") == "Args").body[1:]
    out = " ".join(re.sub("[─-╿]", " ", script(name, "--help")[1]).split())
    for field, help in zip(body[::2], body[1::2], strict=True):
        assert isinstance(field, ast.AnnAssign)
        assert help.lineno == help.end_lineno and help.value.value in out


@pytest.mark.parametrize("words", ["--help", "--epoch 3"])
def test_help_and_typos_are_answered_at_once(words):
    """Neither waits for the imports of a training."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "byol.py"), *words.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (0 if words == "--help" else 2) and "tyro" in done.stderr
    assert not re.findall(r"\| +(torchvision|sklearn|matplotlib|wandb)\b", done.stderr)


# ---------------------------------------------------------------- progress


def test_progress_in_a_file(run_cli, tiny, tmp_path):
    """Without a terminal there is one plain line an epoch, after the resolved arguments."""
    result = run_cli(simclr, *flags(**tiny(run_dir=tmp_path / "run", epochs=2)))
    assert result.status == 0 and not result.err and not re.search(r"[\r\x1b]", result.out)
    # The note on bf16 depends on the processor.
    lines = [line for line in result.out.splitlines() if not line.startswith("note: on this")]
    head, arguments, *epochs, end = lines
    assert head == f"simclr on cpu: {tmp_path / 'run'}"
    assert "lr=0.05" in arguments.split() and "weight_decay=0.0005" in arguments.split()
    assert [line.split("  ")[0] for line in epochs] == ["epoch 1 of 2", "epoch 2 of 2"]
    assert end.startswith(f"wrote {tmp_path / 'run'}; next: python knn_eval.py")


# ---------------------------------------------------------------- folders and notebooks


def test_folders_with_spaces_are_only_read(run_cli, tiny, tmp_path):
    """Nothing is written in --data-dir, and printed commands quote a --run-dir with spaces."""
    root, run = tmp_path / "my photos", tmp_path / "my runs" / "run 1"
    rng = np.random.default_rng(0)
    for i in range(16):
        path = root / ("train", "test")[i % 2] / f"class {i // 2 % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
        path.chmod(0o444)
    for path in [root, *snapshot(root)]:
        path.chmod(path.stat().st_mode & 0o555)
    before = snapshot(root)
    words = tiny(dataset="folder", data_dir=root, run_dir=run, batch_size=4, epochs=1)
    result = run_cli(simclr, *flags(**words))
    assert result.status == 0 and snapshot(root) == before, result
    for path in [root, *before]:
        path.chmod(0o755)
    command = shlex.split(result.out.split("next: python ")[1])
    assert command[1] == str(run)
    assert run_cli(knn_eval, *command[1:]).status == 0


def test_run_dir_by_default(run_cli, tiny):
    """Without --run-dir a run makes its own folder under runs/."""
    result = run_cli(simclr, *flags(**tiny(seed=7, epochs=0)))
    assert result.status == 0
    (folder,) = os.listdir("runs")
    assert re.fullmatch(r"simclr-npz-s7-\d{8}-\d{6}", folder)


@pytest.mark.parametrize(
    "argv, epochs",
    [
        ("/lib/colab_kernel_launcher.py -f kernel.json", None),
        ("/lib/ipykernel_launcher.py --epochs 3", None),
        ("simclr.py --epochs 3", 3),
    ],
)
def test_notebook_ignores_the_argv_of_its_kernel(monkeypatch, argv, epochs):
    """A pasted cell takes the defaults; `%run simclr.py --epochs 3` takes its flags."""
    seen = []
    monkeypatch.setattr(sys, "argv", argv.split())
    common.cli(simclr.Args, seen.append, simclr.RECIPES)
    assert seen == [simclr.Args(epochs=epochs)]


@pytest.mark.parametrize("units", [True, False])
def test_note_on_a_cpu_with_bf16_units(monkeypatch, capsys, units):
    """--precision auto stays float32 on a CPU, and names bf16 and its gain where it is fast."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    _, amp_dtype = common.set_up(common.resolve(simclr.Args(device="cpu"), simclr.RECIPES))
    assert amp_dtype is None and ("bf16 is up to 1.8 times" in capsys.readouterr().out) == units
