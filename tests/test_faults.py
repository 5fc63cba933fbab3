"""What happens to a run outside of it: kills, a strange environment, folders as people have them."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import METHODS, ROOT, flags
from PIL import Image

simclr = importlib.import_module("simclr")


def photos(root, names, size=8):
    """Image files of random colours."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path, "PNG")
    return root


def contents(root):
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*")}


@pytest.mark.parametrize("name", METHODS)
def test_killed_at_random_moments(name, tmp_path):
    """benchmarks/kill.py, which kills a hundred times, here with four: it must find nothing wrong."""
    command = [sys.executable, "benchmarks/kill.py", "--kills", "4", "--methods", name, "--output", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done
    line = json.loads((tmp_path / "out").read_text())
    assert line["kills"] == 4 and line["method"] == name and line["wrong"] == []


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_to_a_real_process(tiny, tmp_path, number, status):
    words = flags(**tiny(run_dir=tmp_path / "run", epochs=100_000, checkpoint_every=100_000))
    process = subprocess.Popen([sys.executable, ROOT / "simclr.py", *words], stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in said, said
    assert said.splitlines()[-1].startswith("stopped; go on with: python ") and "--resume" in said
    assert (tmp_path / "run" / "checkpoint.pt").exists() and not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize("locale, track", [("C", False), ("C.UTF-8", True)])  # W&B itself can not log in plain ASCII
def test_a_strange_environment(tmp_path, locale, track):
    """The C locale, a home that can not be written, names with spaces, newlines and letters of other scripts: real
    processes, a run and its evaluation, end well.
    """
    root = photos(tmp_path / "фото и 写真\nalbum", [f"{part}/кла сс {c}\n/图 {i}.png" for part in ("train", "test")
                                                   for c in range(2) for i in range(8)])  # fmt: skip
    home = tmp_path / "a file"
    home.write_text("")  # what is no folder can not be written into, not even by root
    environment = {key: value for key, value in os.environ.items() if key[:4] not in ("XDG_", "LANG")}
    environment.update(HOME=str(home), LC_ALL=locale, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", WANDB_MODE="offline",
                       MPLCONFIGDIR="", WANDB_SILENT="false")  # fmt: skip
    run = tmp_path / "прогон\n1"
    words = flags(dataset="folder", data_dir=root, run_dir=run, epochs=1, batch_size=8, width=16, hidden_dim=16,
                  projection_dim=16, track=track, device="cpu")  # fmt: skip
    done = subprocess.run([sys.executable, ROOT / "simclr.py", *words], env=environment, cwd=tmp_path,
                          capture_output=True, timeout=240)  # fmt: skip
    assert done.returncode == 0 and b"Traceback" not in done.stderr and b"note:" not in done.stderr, done
    assert bool(list(run.glob("wandb/offline-run-*/*.wandb"))) == track
    done = subprocess.run([sys.executable, ROOT / "knn_eval.py", run, "--pixels", "--ks", "1", "3"], env=environment,
                          cwd=tmp_path, capture_output=True, timeout=240)  # fmt: skip
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done
    with np.load(run / "embeddings.npz") as file:
        assert all((root / str(name)).is_file() for name in file["train_files"])
        assert [name.encode("utf-8", "surrogateescape").decode() for name in file["class_names"]] == [
            "кла сс 0\n", "кла сс 1\n"]  # fmt: skip


@pytest.mark.parametrize("now", [0.0, 2.0**33])
def test_a_clock_that_is_wrong(run_cli, tiny, finished, tmp_path, monkeypatch, now):
    """1970, as on a board without a battery, and 2242, standing still: the same features."""
    monkeypatch.chdir(tmp_path)
    there = time.gmtime(now)
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(time, "localtime", lambda *args: there)
    monkeypatch.setattr(time, "strftime", lambda form, *args, f=time.strftime: f(form, there))
    result = run_cli(simclr, *flags(**tiny()))
    assert result.status == 0 and not result.err, result
    (folder,) = (tmp_path / "runs").iterdir()
    assert str(there.tm_year) in folder.name
    with np.load(folder / "embeddings.npz") as mine, np.load(finished("simclr") / "embeddings.npz") as theirs:
        assert np.array_equal(mine["test_features"], theirs["test_features"])


def test_data_folder_is_only_read(run_cli, tiny, tmp_path):
    """Nothing is written among the images, so that the folder may be read-only."""
    root = photos(tmp_path / "photos", [f"{part}/{c}/{i}.png" for part in ("train", "test") for c in "ab"
                                        for i in range(8)])  # fmt: skip
    for folder in [root, *root.rglob("*")]:
        folder.chmod(0o555 if folder.is_dir() else 0o444)
    before = contents(root)
    result = run_cli(simclr, *flags(**tiny(dataset="folder", data_dir=root, run_dir=tmp_path / "run", batch_size=8)))
    for folder in [root, *root.rglob("*")]:
        folder.chmod(0o755)
    assert result.status == 0, result
    assert contents(root) == before


def test_three_broken_files_among_100_000(refused, tiny, tmp_path):
    """All three are named, a line each, and nothing is trained."""
    root = photos(tmp_path / "photos", [f"{i}/0.png" for i in range(100)])
    for i in range(100):
        for j in range(1, 1000):
            os.link(root / f"{i}/0.png", root / f"{i}/{j}.png")
    broken = ["7/3.png", "42/999.png", "99/500.png"]
    for name, content in zip(broken, (b"", b"\x89PNG\r\n\x1a\n" + bytes(50), (root / "0/0.png").read_bytes()[:-40])):
        (root / name).unlink()
        (root / name).write_bytes(content)
    refused(simclr, *flags(**tiny(dataset="folder", data_dir=root, run_dir=tmp_path / "run")), says=broken, lines=3)
