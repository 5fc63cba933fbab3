"""CIFAR-10 in full: with --cpu what a CPU core learns in an hour a method, else the default runs.

    python benchmarks/cifar10.py --cpu --data-dir cifar10-jpeg
    python benchmarks/cifar10.py --methods byol --seeds 1 2 3 --extra="--compile"
    python benchmarks/cifar10.py --cpu --data-dir cifar10-jpeg --holdout 500 --extra="--lr 0.1"

--data-dir is a folder of CIFAR-10 as files (train/<class>/*, test/<class>/*), or torchvision
downloads the data set to it. With --holdout, for tuning, so many training images of each class take
the place of the test images. accuracy.py does the rest.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import accuracy
import numpy as np
import torch
from sklearn.model_selection import train_test_split

import common

CPU = "--encoder resnet10 --width 16 --epochs 25 --warmup-epochs 1 --eval-every 5 --batch-size 128"


@dataclass
class Args(accuracy.Args):
    """Train each method, evaluate, record."""

    cpu: bool = False
    """the setting for an hour of one CPU core"""
    data_dir: str = "data"
    """folder of the data set"""
    holdout: int = 0
    """training images of each class that replace the test images"""
    seeds: tuple[int, ...] = (1,)
    """seeds of each method"""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def main(args):
    """Settings for accuracy.py."""
    name = f"cifar10-{'cpu' if args.cpu else 'gpu'}{'-holdout' if args.holdout else ''}"
    output = args.output or str(accuracy.ROOT / f"benchmarks/results/{name}.jsonl")
    dataset, data_dir = (
        "folder" if Path(args.data_dir, "train").is_dir() else "cifar10",
        args.data_dir,
    )
    if args.holdout:
        path = Path(args.runs, f"holdout{args.holdout}.npz")
        hold_out(dataset, data_dir, args.holdout, path)
        dataset, data_dir = "npz", str(path)
    settings = ["--dataset", dataset, "--data-dir", data_dir, *CPU.split() * args.cpu]
    # Emulated, it is slower than float32.
    bf16 = args.cpu and torch.cpu._is_avx512_bf16_supported()
    settings += ["--precision", "bf16"] * bf16
    accuracy.main(replace(args, output=output), settings)


if __name__ == "__main__":
    common.cli(Args, main)
