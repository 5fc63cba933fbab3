"""CIFAR-10 by the recipes of the three methods, by the real commands: kNN accuracy, time and memory, a JSON line a run.

    python benchmarks/cifar10.py                                                # downloads it; seeds 1, 2, 3
    python benchmarks/cifar10.py --dataset folder --data-dir cifar10-jpeg       # a folder with train/ and test/
    python benchmarks/cifar10.py --methods byol --holdout 500 --extra="--lr 0.5"  # tuning: see below
    python benchmarks/cifar10.py --methods simclr --runs runs/cifar10           # keeps runs; goes on with what is there

Each run is `python <method>.py`, then `python knn_eval.py` twice: all k by majority, k chosen by leave-one-out; and
k = 200 with votes exp(similarity / 0.1), as others report it. What is judged is the last encoder, not the best of the
epochs. With --holdout no network sees the test images: so many training images of each class, the same ones for every
run, are not trained on and stand in for them.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional, Tuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accuracy import commit, run  # noqa: E402
from sklearn.model_selection import train_test_split  # noqa: E402

import common  # noqa: E402

# The script as the main program of a process that writes down, when it ends, the most memory it had on the GPU.
WITH_MEMORY = """
import json, runpy, sys, torch
path, sys.argv = sys.argv[1], sys.argv[2:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    gpu = torch.cuda.is_initialized()
    json.dump([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if gpu else None, open(path, "w"))
"""


@dataclass
class Args:
    """Train, evaluate, record."""

    dataset: Literal["cifar10", "folder"] = "cifar10"
    """the original, or image files in train/<class>/ and test/<class>/"""
    data_dir: str = "data"
    """its place"""
    methods: Tuple[Literal["simclr", "byol", "barlow_twins"], ...] = ("simclr", "byol", "barlow_twins")
    """which methods"""
    seeds: Tuple[int, ...] = (1, 2, 3)
    """which seeds"""
    epochs: Optional[int] = None
    """passes over the training images (unset: the recipe's)"""
    extra: str = ""
    """more flags for the methods, in one string, as in --extra="--lr 0.5 --compile" """
    holdout: int = 0
    """for tuning: training images of each class that play test, and are not trained on"""
    runs: Optional[str] = None
    """folder that keeps the run folders, and where there are any goes on with them (unset: a temporary one)"""
    output: str = str(ROOT / "benchmarks/results/cifar10.jsonl")
    """where the lines go"""


def hold_out(args, path):
    """Training images alone as an .npz file: --holdout of each class, always the same ones, as its test images."""
    images = common.load_images(args.dataset, args.data_dir)
    labels, classes = images.train_labels.numpy(), len(images.class_names)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=args.holdout * classes, stratify=labels, random_state=0
    )
    arrays = {}
    for part, chosen in (("train", np.sort(train)), ("test", np.sort(test))):
        arrays[f"{part}_images"] = images.train[torch.from_numpy(chosen)].numpy().transpose(0, 2, 3, 1)
        arrays[f"{part}_labels"] = labels[chosen]
    np.savez(path, **arrays)
    return ["--dataset", "npz", "--data-dir", str(path)]


def train(script, flags, folder):
    """The real command in a process of its own. Returns its wall time and its peak bytes on the GPU, or None."""
    memory, start = Path(folder, "memory.json"), time.perf_counter()
    command = [sys.executable, "-c", WITH_MEMORY, str(memory), str(ROOT / script), *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    status = subprocess.run(command, env=environment, stdout=sys.stderr).returncode
    common.check(status == 0, f"{script} {shlex.join(flags)} ended with status {status}")
    return time.perf_counter() - start, json.loads(memory.read_text())


def one_run(args, method, seed, place, folder):
    """Train and judge; the line of the record."""
    flags = [*shlex.split(args.extra), *(["--epochs", str(args.epochs)] if args.epochs is not None else [])]
    flags += ["--seed", str(seed)]
    run_dir = Path(args.runs, f"{method}-s{seed}") if args.runs else Path(folder, "run")
    goes_on = (run_dir / "checkpoint.pt").exists()
    wall, memory = train(f"{method}.py", [*place, *flags, "--run-dir", str(run_dir), "--resume"], folder)
    judged = {}
    for name, more in (("all", ""), ("softmax", "--vote softmax --temperature 0.1 --ks 200 --no-loo")):
        run("knn_eval.py", str(run_dir), "--output", str(Path(folder, name)), "--embedding-2d", "none", *more.split())
        judged[name] = json.loads(Path(folder, name, "knn.json").read_text())
    config = json.loads((run_dir / "args.json").read_text())
    log = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    knn = judged["all"]
    return dict(
        method=method, seed=seed, data=args.dataset, holdout=args.holdout, epochs=config["args"]["epochs"],
        extra=args.extra, n_train=knn["n_train"], n_test=knn["n_test"],
        accuracy={row["k"]: round(row["accuracy"], 6) for row in knn["sweep"]},
        chosen_k=knn["chosen_k"], chosen_k_accuracy=round(knn["test_accuracy"], 6),
        softmax_200_accuracy=round(judged["softmax"]["test_accuracy"], 6),
        wall_seconds=None if goes_on else round(wall, 2),  # of the whole command; unknown where it began in another one
        train_seconds=round(sum(line["seconds"] for line in log), 2),
        samples_per_sec=round(statistics.median(line["samples_per_sec"] for line in log), 1) if log else None,
        peak_gpu_bytes=memory and memory[0], peak_gpu_bytes_reserved=memory and memory[1],
        device=config["device"], precision=config["precision"],
        args={key: value for key, value in config["args"].items() if key not in ("run_dir", "data_dir", "resume")},
        command=shlex.join(["python", f"{method}.py", "--dataset", args.dataset, *flags]),  # without a machine's paths
        versions=config["versions"], commit=commit(),
        loss=[line["loss"] for line in log], spread=[line["spread"] for line in log],
        knn_acc={line["epoch"]: line["knn_acc"] for line in log if "knn_acc" in line},
    )  # fmt: skip


def main(args):
    """Every seed of every method; a line as soon as there is one."""
    with tempfile.TemporaryDirectory() as folder:
        place = ["--dataset", args.dataset, "--data-dir", args.data_dir]
        if args.holdout:
            place = hold_out(args, Path(folder, "heldout.npz"))
        for seed in args.seeds:
            for method in args.methods:
                with tempfile.TemporaryDirectory(dir=folder) as own:
                    line = one_run(args, method, seed, place, own)
                with open(args.output, "a") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{method} seed {seed}: k = {line['chosen_k']} {100 * line['chosen_k_accuracy']:.2f} %, "
                      f"softmax 200 {100 * line['softmax_200_accuracy']:.2f} %, {line['train_seconds']} s, "
                      f"{line['samples_per_sec']} samples/s", flush=True)  # fmt: skip


if __name__ == "__main__":
    common.cli(Args, main)
