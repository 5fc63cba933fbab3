"""What a user sees: the help, the answer to a mistyped flag, the progress in a terminal and in a file, the pictures."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import METHODS, ROOT, flags
from PIL import Image

import common

COMMANDS = [*METHODS, "knn_eval"]


# ------------------------------------------------------------------------------------------ help


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_two_screens(run_cli, name, monkeypatch):
    """100 lines of 120 columns; every flag with a sentence of its own and no word of it cut off."""
    monkeypatch.setenv("COLUMNS", "120")
    module = importlib.import_module(name)
    result = run_cli(module, "--help")
    assert result.status == 0 and not result.err
    lines = result.out.splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 120, len(lines)
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.out).split())
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    body = next(node for node in tree.body if getattr(node, "name", "") == "Args").body[1:]
    assert len(body) == 2 * len(module.Args.__dataclass_fields__)
    for field, sentence in zip(body[::2], body[1::2]):
        assert " ".join(sentence.value.value.split()) in text, field.target.id
        assert field.target.id == "inputs" or re.search(rf"--{field.target.id.replace('_', '-')}[ ,]", text)


@pytest.mark.parametrize("name, wrong, right", [
    ("simclr", "--epoch", "--epochs"), ("byol", "--emma", "--ema"), ("barlow_twins", "--lambda", "--lambd"),
    ("knn_eval", "--metrics", "--metric"), ("simclr", "--batchsize", "--batch-size"),
])  # fmt: skip
def test_a_mistyped_flag_suggests_the_right_one(run_cli, name, wrong, right):
    result = run_cli(importlib.import_module(name), wrong, "3")
    assert result.status == 2 and "Traceback" not in result.err
    suggested = result.err.split("Perhaps you meant:")[1]
    assert re.search(rf"{right}[ ,]", suggested), result.err


# ------------------------------------------------------------------------------------------ progress


def test_progress_in_a_terminal(tiny, tmp_path):
    """A real terminal of 80 columns: a bar with loss, kNN accuracy, samples/s and time left, no line longer than it."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, b"\x18\x00\x50\x00\x00\x00\x00\x00")  # 24 lines of 80
    command = [sys.executable, str(ROOT / "simclr.py"), *flags(**tiny(run_dir=tmp_path / "run", eval_every=1))]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait(60) == 0, seen
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", seen.decode())
    drawn = [line for line in re.split(r"[\r\n]+", text) if " left" in line]
    bar = r"epoch [23]/3 \|.+\| \d+ %, [\d.k]+ samples/s, \d\d:\d\d left, loss \d\.\d+, knn \d+\.\d %"
    assert any(re.fullmatch(bar, line) for line in drawn), drawn
    assert max(map(len, drawn)) <= 80
    kept = [
        line for line in re.split(r"[\r\n]+", text) if re.match(r"epoch \d/3  loss .* samples/s  knn \d+\.\d %$", line)
    ]
    assert len(kept) == 3, text


def test_progress_in_a_file(run_cli, tiny, tmp_path, monkeypatch):
    """One line an epoch, and nothing that only a terminal understands; a terminal may claim to have no columns."""
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((0, 0)))
    result = run_cli(importlib.import_module("simclr"), *flags(**tiny(run_dir=tmp_path / "run", eval_every=2)))
    text = result.out + result.err
    assert result.status == 0 and not re.search(r"[\r\x1b|]", text), text
    lines = [line for line in text.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert ["knn" in line for line in lines] == [False, True, False]
    assert all(re.search(r"loss \d+\.\d+  spread \d\.\d\d  \d+ samples/s", line) for line in lines), lines


# ------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("fails", ["draw_curves", "draw_embedding"])
def test_a_picture_that_fails_loses_nothing(run_cli, tiny, finished, tmp_path, monkeypatch, fails):
    finished("simclr")  # with its pictures

    def fail(path, *args):
        with common.atomic_write(path) as file:
            file.write(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(common, fails, fail)
    simclr = importlib.import_module("simclr")
    result = run_cli(simclr, *flags(**tiny(run_dir=tmp_path / "run")))
    assert result.status == 0 and result.err.startswith("note: a picture could not be drawn"), result
    assert len(result.err.splitlines()) == 1 and "next: python knn_eval.py" in result.out
    with np.load(tmp_path / "run" / "embeddings.npz") as mine, np.load(finished("simclr") / "embeddings.npz") as theirs:
        assert np.array_equal(mine["test_features"], theirs["test_features"])
    assert not list((tmp_path / "run").glob(".*"))


def test_a_kill_while_drawing_leaves_nothing(tiny, finished, tmp_path, monkeypatch):
    """What such a kill leaves: temporary files, which the next start removes, and a picture of before or none."""
    simclr = importlib.import_module("simclr")
    folder = shutil.copytree(finished("simclr"), tmp_path / "run")
    for name in ("curves.png", "embedding_2d.png"):
        (folder / name).unlink()
        (folder / f".{name}.tmp").write_bytes(b"half")
    with monkeypatch.context() as context:  # killed again before it draws
        context.setattr(common.Run, "_draw", lambda *args: None)
        simclr.main(simclr.Args(**tiny(run_dir=str(folder), resume=True)))
    assert not list(folder.glob(".*")) and not (folder / "curves.png").exists()
    simclr.main(simclr.Args(**tiny(run_dir=str(folder), resume=True)))
    for name in ("curves.png", "embedding_2d.png"):
        with Image.open(folder / name) as picture:
            picture.load()
            assert picture.width > 400


def colours(path):
    """The strong colours of a picture, as sets of (red, green, blue) in steps of 32."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    pixels = pixels[np.ptp(pixels, axis=1) > 60]
    found, counts = np.unique(pixels // 32, axis=0, return_counts=True)
    return {tuple(colour) for colour in found[counts > 20].tolist()}


def test_curves_show_the_accuracy_where_there_is_any(tmp_path):
    records = [dict(epoch=i, loss=1 / i, **({"knn_acc": 0.5} if i == 2 else {})) for i in range(1, 4)]
    common.draw_curves(tmp_path / "both.png", records)
    common.draw_curves(tmp_path / "loss.png", records[2:])
    both, loss = (Image.open(tmp_path / f"{name}.png") for name in ("both", "loss"))
    assert both.height > 1.5 * loss.height
    assert len(colours(tmp_path / "both.png")) > len(colours(tmp_path / "loss.png")) > 0  # a second curve, one point


def test_the_embedding_shows_all_classes(run_cli, tmp_path, monkeypatch):
    """Of a test set that is sorted by class as a folder's is, and larger than what is drawn; and strange names."""
    names = ["$\\x$", "cat_1", "\u732b", "\udcff", "a" * 200, "b\nc"]
    labels = np.repeat(np.arange(6), 2000)
    points = np.random.default_rng(0).normal(size=(12000, 8)).astype(np.float32)
    drawn = []
    draw = common.draw_embedding
    monkeypatch.setattr(common, "draw_embedding", lambda *args: drawn.append(args) or draw(*args))
    run = common.Run("simclr", importlib.import_module("simclr").Args(run_dir=str(tmp_path), epochs=0))
    (tmp_path / "log.jsonl").touch()
    run.tracker = common.Tracker(False, None, None, None, None, None)
    run._draw(torch.from_numpy(points), torch.from_numpy(labels), names)
    assert (tmp_path / "embedding_2d.png").exists()
    np.savez(tmp_path / "some.npz", train_features=points[::100], train_labels=labels[::100], test_features=points,
             test_labels=labels, class_names=[name for name in names if name.isprintable()])  # fmt: skip
    assert run_cli(importlib.import_module("knn_eval"), tmp_path / "some.npz", "--ks", "1").status == 0
    assert len(drawn) == 2
    for path, shown, of, _, _ in drawn:
        assert len(shown) == len(of) == 4000 and set(np.bincount(of)) == {666, 667}
    assert len(colours(tmp_path / "embedding_2d.png")) >= 6
