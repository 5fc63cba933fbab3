"""SIGKILL at random moments of short runs, each resumed until it ends: is anything lost or partial?

    python benchmarks/kill.py              # 100 kills of each method; status 1 if anything is wrong

Half of the kills come at a random time, half while a file is being written. After each kill every
file under its final name is read. At the end the features must be, byte for byte, those of a run
that was not killed, log.jsonl must have every epoch once, and no temporary file may be left.
"""

import json
import multiprocessing
import os
import random
import runpy
import shlex
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import tyro
from PIL import Image

import common

EPOCHS = 5
FILES = "args.json log.jsonl views.png checkpoint.pt encoder.pt embeddings.npz curves.png".split()
FLAGS = shlex.split(
    "--device cpu --width 16 --hidden-dim 16 --projection-dim 16 --batch-size 400 --lr 0.05 "
    "--warmup-epochs 1 --eval-every 2 --checkpoint-every 1 --resume"
)
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
    """kills of each method"""
    methods: tuple[str, ...] = ("simclr", "byol", "barlow_twins")
    """method files"""
    seed: int = 0
    """seed of the moments"""
    output: str = str(ROOT / "benchmarks/results/kill-cpu.jsonl")
    """file to append a line per method to"""


def train(method, folder):
    """The real script, in a fork of this process, which has imported torch and computed nothing."""
    output = os.open(f"{folder}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.argv = [f"{method}.py", *FLAGS, "--epochs", str(EPOCHS), "--run-dir", str(folder)]
    torch.set_num_threads(1)
    runpy.run_path(str(ROOT / f"{method}.py"), run_name="__main__")


def wait(process, folder, moment, rng, seconds):
    """Until the moment to kill, or the end of the process."""
    if moment == "any time":
        process.join(rng.uniform(0, seconds))
    else:
        while process.is_alive() and not (folder / f".{moment}.tmp").exists():
            pass
        time.sleep(rng.uniform(0, 0.002))


def partial(folder):
    """Files under their final names that cannot be read, and why."""
    broken = {}
    for path in folder.iterdir() if folder.exists() else ():
        try:
            if path.name in FILES:
                READERS[path.suffix](path)
        except Exception as error:
            broken[path.name] = str(error)
    return broken


def result(folder):
    """What the end of a run must be: the features' bytes, the epochs logged, the file names."""
    with np.load(folder / "embeddings.npz") as file:
        features = file["train_features"].tobytes() + file["test_features"].tobytes()
    epochs = [json.loads(line)["epoch"] for line in (folder / "log.jsonl").open()]
    return features, epochs, sorted(path.name for path in folder.iterdir() if path.suffix)


def torture(method, kills, place, rng):
    """One line of the record; `wrong` in it lists what should never be."""

    def start(folder):
        process = multiprocessing.get_context("fork").Process(target=train, args=(method, folder))
        process.start()
        return process

    began, whole = time.perf_counter(), place / "whole"
    start(whole).join()
    seconds, expected = time.perf_counter() - began, result(whole)
    assert expected[1:] == (list(range(1, EPOCHS + 1)), sorted(FILES)), expected[1:]
    wrong, killed, runs, exitcode = [], Counter(), 0, 0
    while not wrong and (exitcode or killed.total() < kills):
        runs += exitcode == 0
        folder = place / f"{runs}"
        moment = rng.choice(["any time"] * len(FILES) + FILES)
        process = start(folder)
        if killed.total() < kills:
            wait(process, folder, moment, rng, seconds)
            process.kill()
        process.join()
        exitcode = process.exitcode
        if exitcode == 0 and result(folder) != expected:
            wrong.append(f"run {runs} ended with other files, epochs or features")
        if exitcode not in (0, -9):
            wrong.append(f"run {runs}: {exitcode}, {Path(f'{folder}.out').read_text()[-500:]}")
        if exitcode:
            killed[moment] += 1
            wrong += [f"run {runs}: partial {broken}" for broken in [partial(folder)] if broken]
    return dict(method=method, kills=killed.total(), runs=runs, aimed_at=killed, wrong=wrong)


def main(args):
    """Every method; status 1 if anything was wrong."""
    wrong = False
    with tempfile.TemporaryDirectory() as place:
        for method in args.methods:
            Path(place, method).mkdir()
            rng = random.Random(args.seed)
            line = torture(method, args.kills, Path(place, method), rng)
            line |= dict(seed=args.seed, torch=torch.__version__, commit=common.git_commit())
            print(json.dumps(line), flush=True)
            with open(args.output, "a") as file:
                file.write(json.dumps(line) + "\n")
            wrong |= bool(line["wrong"])
    sys.exit(int(wrong))


if __name__ == "__main__":
    main(tyro.cli(Args))
