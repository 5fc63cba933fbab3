"""CIFAR-10 in full: with --cpu what a CPU core learns in an hour a method, else the default runs.

    python benchmarks/cifar10.py --cpu --data-dir cifar10-jpeg
    python benchmarks/cifar10.py --methods byol --seeds 1 2 3 --extra="--compile"
    python benchmarks/cifar10.py --cpu --data-dir cifar10-jpeg --holdout 500 --extra="--lr 0.1"

--data-dir is a folder of CIFAR-10 as files (train/<class>/*, test/<class>/*), or torchvision
downloads the data set to it. Every run is `python METHOD.py`, then `python knn_eval.py --probe`,
plain and with --whiten (pixels and the untrained encoder without --probe). It appends a line to
--output: accuracy over k, with few labels and by logistic regression, and loss, kNN accuracy and
effective rank over the epochs. Recorded runs are not repeated, and a run that was stopped is
resumed from its folder under --runs. With --holdout, for tuning, so many training images of each
class take the place of the test images.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from accuracy import ROOT, means, record, recorded, train_and_evaluate
from sklearn.model_selection import train_test_split

import common

CPU = (
    "--encoder resnet10 --width 16 --epochs 25 --warmup-epochs 1 --eval-every 5 --batch-size 128 "
    "--compile"
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
    holdout: int = 0
    """training images of each class that replace the test images"""
    extra: str = ""
    """more flags for the methods, in one string; they become part of the recorded name"""
    runs: str = "runs/cifar10-benchmark"
    """folder of the runs"""
    output: str = ""
    """file to append the lines to (unset: results/cifar10-cpu.jsonl, cifar10-gpu.jsonl)"""


def hold_out(dataset, data_dir, n, path):
    """Write the training images as an .npz file, n of each class as its test images."""
    images = common.load_images(dataset, data_dir)
    labels, arrays = images.train_labels.numpy(), {}
    n *= len(images.class_names)
    split = train_test_split(np.arange(len(labels)), test_size=n, stratify=labels, random_state=0)
    for part, rows in zip(("train", "test"), map(np.sort, split)):
        arrays[f"{part}_images"] = images.train[rows].permute(0, 2, 3, 1).numpy()
        arrays[f"{part}_labels"] = labels[rows]
    np.savez(path, **arrays)


def main(args):
    """The untrained encoder and pixels, then every method and seed."""
    data = f"cifar10-{'cpu' if args.cpu else 'gpu'}{'-holdout' if args.holdout else ''}"
    output = args.output or str(ROOT / f"benchmarks/results/{data}.jsonl")
    dataset = "folder" if Path(args.data_dir, "train").is_dir() else "cifar10"
    if args.holdout:
        path = Path(args.runs, f"holdout{args.holdout}.npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        hold_out(dataset, args.data_dir, args.holdout, path)
        dataset, args.data_dir = "npz", str(path)
    settings = ["--dataset", dataset, *shlex.split(CPU * args.cpu)]
    # Emulated, it is slower than float32.
    bf16 = args.cpu and torch.cpu._is_avx512_bf16_supported()
    settings += [*["--precision", "bf16"] * bf16, *shlex.split(args.extra)]
    done = recorded(output, "name", "seed")
    for method, seed in [("untrained", 1), *((m, s) for m in args.methods for s in args.seeds)]:
        name = f"{method} {args.extra}".strip()
        if (name, seed) in done:
            print(f"{name} seed {seed}: already in {output}")
            continue
        script = "simclr.py" if method == "untrained" else f"{method}.py"
        flags = [*settings, *["--epochs", "0"] * (method == "untrained"), "--seed", str(seed)]
        folder = f"{args.runs}/{name.replace(' ', '')}-s{seed}"
        source, pixels = ["--data-dir", args.data_dir], method == "untrained"
        # Logistic regressions on 50,000 images' pixels take most of an hour.
        options = [] if pixels else ["--probe"]
        found = train_and_evaluate(script, [*flags, *source], folder, *options, pixels=pixels)
        knn, *pixels, whitened = found
        for result in pixels:
            record(output, result, name="pixels", seed=seed)
        keys = ("epoch", "loss", "seconds", "knn_acc", "effective_rank")
        log = [json.loads(line) for line in Path(folder, "run/log.jsonl").open()]
        line = dict(curve=[{key: row[key] for key in keys if key in row} for row in log])
        line |= {f"whitened_{name}": means(t) for name, t in whitened["tables"].items()}
        line |= dict(whitened=whitened["accuracy"], command=shlex.join(["python", script, *flags]))
        record(output, knn, name=name, seed=seed, **line)


if __name__ == "__main__":
    common.cli(Args, main)
