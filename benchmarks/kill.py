"""SIGKILL at random moments of short runs, each gone on with by --resume until it ends: is anything lost, or partial?

    python benchmarks/kill.py              # 100 kills of each method; ends with status 1 where anything is wrong

Half of the kills come at a random time, half while a file is being written. After each kill every file that exists
under its final name is read whole. In the end the features must be, byte for byte, those of a run that nobody killed,
log.jsonl must have every epoch once, and no temporary file may be left.
"""

import json
import multiprocessing
import os
import random
import runpy
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Tuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from PIL import Image  # noqa: E402

import common  # noqa: E402

EPOCHS = 5
FILES = ("args.json", "log.jsonl", "views.png", "checkpoint.pt", "encoder.pt", "embeddings.npz", "curves.png",
         "embedding_2d.png")  # fmt: skip
FLAGS = ["--dataset", "npz", "--device", "cpu", "--width", "16", "--hidden-dim", "16", "--projection-dim", "16",
         "--batch-size", "32", "--lr", "0.05", "--warmup-epochs", "1", "--eval-every", "2", "--checkpoint-every", "1",
         "--epochs", str(EPOCHS), "--resume"]  # fmt: skip
READERS = {
    ".json": lambda path: json.loads(path.read_text()),
    ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
    ".png": lambda path: Image.open(path).load(),
    ".pt": lambda path: torch.load(path, weights_only=True),
    ".npz": lambda path: dict(np.load(path)),
}


@dataclass
class Args:
    """Kill, resume, compare."""

    kills: int = 100
    """how often each method is killed"""
    methods: Tuple[str, ...] = ("simclr", "byol", "barlow_twins")
    """which methods"""
    seed: int = 0
    """seed of the moments"""
    output: str = str(ROOT / "benchmarks/results/kill-cpu.jsonl")
    """a line for each method is appended here"""


def train(method, data, folder):
    """The real script with its real flags. In a fork of this process, which has imported torch and never computed."""
    said = os.open(f"{folder}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1), os.dup2(said, 2)
    sys.argv = [f"{method}.py", *FLAGS, "--data-dir", str(data), "--run-dir", str(folder)]
    torch.set_num_threads(1)
    runpy.run_path(str(ROOT / f"{method}.py"), run_name="__main__")


def wait(process, folder, moment, dice, seconds):
    """Until the moment to kill, or the end of the process."""
    log = folder / "log.jsonl"

    def size():
        return log.stat().st_size if log.exists() else 0

    if moment == "any time":
        process.join(dice.uniform(0, seconds))
    elif moment == "log.jsonl":
        before = size()
        while process.is_alive() and size() <= before:
            before = min(before, size())  # a resumed run cuts off the epochs after its checkpoint
    else:
        while process.is_alive() and not (folder / f".{moment}.tmp").exists():
            pass
        time.sleep(dice.uniform(0, 0.002))


def partial(folder):
    """Which files under their final names can not be read whole, and why."""
    broken = {}
    for path in folder.iterdir() if folder.exists() else ():
        try:
            if path.name in FILES:
                READERS[path.suffix](path)
        except Exception as error:
            broken[path.name] = str(error)
    return broken


def result(folder):
    """What the end of a run must be: its features' bytes, the epochs in the log, the names in the folder."""
    with np.load(folder / "embeddings.npz") as file:
        features = file["train_features"].tobytes() + file["test_features"].tobytes()
    epochs = [json.loads(line)["epoch"] for line in (folder / "log.jsonl").read_text().splitlines()]
    return features, epochs, sorted(path.name for path in folder.iterdir())


def torture(method, kills, data, place, dice):
    """One line of the record; `wrong` in it lists what should never be."""
    spawn = multiprocessing.get_context("fork").Process
    began, whole = time.perf_counter(), place / "whole"
    process = spawn(target=train, args=(method, data, whole))
    process.start(), process.join()
    seconds, expected = time.perf_counter() - began, result(whole)
    wrong, killed, writing, runs = [], Counter(), Counter(), 0
    assert expected[1:] == (list(range(1, EPOCHS + 1)), sorted(FILES)), expected[1:]
    while sum(killed.values()) < kills:
        folder, runs = place / f"{runs}", runs + 1
        while not wrong:
            last = sum(killed.values()) >= kills  # the last run goes to its end undisturbed
            moment = dice.choice(["any time"] * len(FILES) + list(FILES))
            process = spawn(target=train, args=(method, data, folder))
            process.start()
            if not last:
                wait(process, folder, moment, dice, seconds)
                process.kill()
            process.join()
            if process.exitcode == 0:
                if result(folder) != expected:
                    wrong.append(f"run {runs} ended with other files, epochs or features than the whole one")
                break
            if process.exitcode != -9:
                wrong.append(f"run {runs} ended with {process.exitcode}: {Path(f'{folder}.out').read_text()[-500:]}")
            killed[moment] += 1
            writing.update(path.name for path in folder.glob(".*.tmp"))
            wrong += [f"run {runs}: partial {broken}" for broken in [partial(folder)] if broken]
    return dict(method=method, kills=sum(killed.values()), runs=runs, aimed_at=dict(killed),
                temporary_files_left_by_a_kill=dict(writing), wrong=wrong)  # fmt: skip


def main(args):
    """Every method; status 1 where anything was wrong."""
    wrong = False
    with tempfile.TemporaryDirectory() as place:
        images = common.load_images("digits")
        data = Path(place, "tiny.npz")
        np.savez(data, train_images=images.train[:96, 0].numpy(), train_labels=images.train_labels[:96].numpy(),
                 test_images=images.test[:40, 0].numpy(), test_labels=images.test_labels[:40].numpy())  # fmt: skip
        for method in args.methods:
            Path(place, method).mkdir()
            line = torture(method, args.kills, data, Path(place, method), random.Random(args.seed))
            line.update(seed=args.seed, torch=torch.__version__)
            print(json.dumps(line), flush=True)
            with open(args.output, "a") as file:
                file.write(json.dumps(line) + "\n")
            wrong |= bool(line["wrong"])
    sys.exit(int(wrong))


if __name__ == "__main__":
    main(tyro.cli(Args))
