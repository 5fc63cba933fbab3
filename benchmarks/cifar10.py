"""CIFAR-10 in full: with --cpu what a CPU core learns in an hour a method, else the default runs.

    python benchmarks/cifar10.py --cpu --data-dir cifar10-jpeg
    python benchmarks/cifar10.py --methods byol --seeds 1 2 3 --extra="--compile"

--data-dir is a folder of CIFAR-10 as files (train/<class>/*, test/<class>/*), or torchvision
downloads the data set to it. Every run is `python METHOD.py`, then `python knn_eval.py --probe`,
plain and with --whiten. It appends a line to --output: accuracy over k, with few labels and by
logistic regression, and loss, kNN accuracy and effective rank over the epochs. Recorded runs are
not repeated, and a run that was stopped is resumed from its folder under --runs.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from accuracy import ROOT, means, record, recorded, train_and_evaluate

import common

CPU = (
    "--encoder resnet10 --width 16 --epochs 25 --warmup-epochs 1 --eval-every 5 --batch-size 128 "
    "--precision bf16 --compile"
)


@dataclass
class Args:
    """Train each method, evaluate, record."""

    cpu: bool = False
    """the setting for an hour of one CPU core"""
    data_dir: str = "data"
    """folder of the data set"""
    methods: tuple[str, ...] = ("simclr", "byol", "barlow_twins")
    """method files"""
    seeds: tuple[int, ...] = (1,)
    """seeds of each method"""
    extra: str = ""
    """more flags for the methods, in one string; they become part of the recorded name"""
    runs: str = "runs/cifar10-benchmark"
    """folder of the runs"""
    output: str = ""
    """file to append the lines to (unset: results/cifar10-cpu.jsonl or cifar10-gpu.jsonl)"""


def main(args):
    """The untrained encoder and pixels, then every method and seed."""
    data = f"cifar10-{'cpu' if args.cpu else 'gpu'}"
    output = args.output or str(ROOT / f"benchmarks/results/{data}.jsonl")
    as_files = Path(args.data_dir, "train").is_dir()
    settings = ["--dataset", "folder" if as_files else "cifar10"]
    settings += [*shlex.split(CPU * args.cpu), *shlex.split(args.extra)]
    done = recorded(output, "name", "seed")
    for method, seed in [("untrained", 1), *((m, s) for m in args.methods for s in args.seeds)]:
        name = f"{method} {args.extra}".strip()
        if (name, seed) in done:
            continue
        script = "simclr.py" if method == "untrained" else f"{method}.py"
        flags = [*settings, *["--epochs", "0"] * (method == "untrained"), "--seed", str(seed)]
        folder = f"{args.runs}/{name.replace(' ', '')}-s{seed}"
        source = ["--data-dir", args.data_dir]
        options = dict(pixels=method == "untrained")
        found = train_and_evaluate(script, [*flags, *source], folder, "--probe", **options)
        knn, *pixels, whitened = found
        for result in pixels:
            record(output, result, data=data, name="pixels", seed=seed)
        keys = ("epoch", "loss", "seconds", "knn_acc", "effective_rank")
        log = [json.loads(line) for line in Path(folder, "run/log.jsonl").open()]
        line = dict(curve=[{key: row[key] for key in keys if key in row} for row in log])
        line |= {f"whitened_{name}": means(t) for name, t in whitened["tables"].items()}
        line |= dict(command=shlex.join(["python", script, *flags]))
        record(output, knn, data=data, name=name, seed=seed, **line)


if __name__ == "__main__":
    common.cli(Args, main)
