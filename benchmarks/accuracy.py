"""kNN accuracy of raw pixels, the untrained encoder and the methods, by the real commands.

    python benchmarks/accuracy.py digits
    python benchmarks/accuracy.py fashion_mnist --methods simclr --seeds 1
    python benchmarks/accuracy.py cifar10_jpeg --data-dir cifar10-jpeg --seeds 1
    python benchmarks/accuracy.py cifar10 --output benchmarks/results/cifar10.jsonl
    python benchmarks/accuracy.py cifar10 --methods byol --holdout 500 --extra="--lr 0.5"

digits and cifar10 are the default runs. fashion_mnist and cifar10_jpeg (a folder of image files, of
which the first 1,000 training and 200 test images of a class are taken) are short runs of a narrow
network. Each run is `python METHOD.py`, then `python knn_eval.py`; a JSON line a run is appended to
--output. With --holdout, for tuning, so many training images of each class, the same for every run,
are left out of the training and take the place of the test images.
"""

import itertools
import json
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from tyro.conf import Positional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common

SHORT = shlex.split(
    "--encoder resnet10 --width 16 --hidden-dim 512 --projection-dim 128 --batch-size 128 "
    "--lr 0.06 --warmup-epochs 0.5 --eval-every 0 --epochs 5"
)
SETS = {
    "digits": [],
    "fashion_mnist": ["--dataset", "fashion_mnist", "--image-size", "16", *SHORT],
    "cifar10_jpeg": ["--dataset", "folder", *SHORT],
    "cifar10": ["--dataset", "cifar10"],
}


@dataclass
class Args:
    """Train, evaluate, record."""

    data: Positional[Literal["digits", "fashion_mnist", "cifar10_jpeg", "cifar10"]] = "digits"
    """data set"""
    data_dir: str = "data"
    """its place"""
    methods: tuple[str, ...] = ("simclr", "byol", "barlow_twins")
    """method files"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of each method"""
    holdout: int = 0
    """training images of each class that replace the test images"""
    extra: str = ""
    """more flags for the methods, in one string; they become part of the recorded name"""
    output: str = str(ROOT / "benchmarks/results/accuracy-cpu.jsonl")
    """file to append the lines to"""


def first_of_each_class(source, folder, most=1000):
    """A folder of links to the first images of every class."""
    for part, n in (("train", most), ("test", most // 5)):
        for images in sorted(Path(source, part).iterdir()):
            Path(folder, part, images.name).mkdir(parents=True)
            for image in sorted(images.iterdir())[:n]:
                Path(folder, part, images.name, image.name).symlink_to(image.resolve())


def hold_out(args, path):
    """Write the training images as an .npz file with --holdout of each class as its test images."""
    dataset = "folder" if args.data == "cifar10_jpeg" else args.data
    images = common.load_images(dataset, args.data_dir)
    labels, n = images.train_labels.numpy(), args.holdout * len(images.class_names)
    split = train_test_split(np.arange(len(labels)), test_size=n, stratify=labels, random_state=0)
    arrays = {}
    for part, rows in zip(("train", "test"), map(np.sort, split)):
        pixels = images.train[torch.from_numpy(rows)]
        arrays[f"{part}_images"] = pixels.permute(0, 2, 3, 1).numpy()
        arrays[f"{part}_labels"] = labels[rows]
    np.savez(path, **arrays)


def run(script, *flags):
    """Run a script of the repository; return its seconds."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / script), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def record(args, name, seed, knn, **more):
    """Append the content of a knn.json as one line."""
    line = dict(data=args.data, name=f"{name} {args.extra}".strip(), seed=seed)
    line |= dict(n_train=knn["n_train"], n_test=knn["n_test"], holdout=args.holdout)
    line["accuracy"] = {row["k"]: round(row["accuracy"], 6) for row in knn["sweep"]}
    line |= dict(chosen_k=knn["chosen_k"], chosen_k_accuracy=round(knn["test_accuracy"], 6), **more)
    with open(args.output, "a") as file:
        file.write(json.dumps(line) + "\n")
    to_100 = [accuracy for k, accuracy in line["accuracy"].items() if k <= 100]
    shown = f"{args.data} {name} seed {seed}: mean to 100 = {100 * np.mean(to_100):.2f} %"
    print(shown, flush=True)


def processor_name():
    """The CPU's model name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


def main(args):
    """Raw pixels once; for every seed the untrained encoder and each method."""
    settings = [*SETS[args.data], *shlex.split(args.extra)]
    place = tempfile.TemporaryDirectory()
    if args.data == "cifar10_jpeg":
        first_of_each_class(args.data_dir, place.name)
        args.data_dir = place.name
    source = [] if args.data == "digits" else ["--data-dir", args.data_dir]
    if args.holdout:
        common.check(source, "--holdout trains with the recipe of npz, which does not fit digits")
        hold_out(args, f"{place.name}/heldout.npz")
        source = ["--dataset", "npz", "--data-dir", f"{place.name}/heldout.npz"]
    for n, (seed, name) in enumerate(itertools.product(args.seeds, ("untrained", *args.methods))):
        script = f"{args.methods[0] if name == 'untrained' else name}.py"
        flags = [*settings, *["--epochs", "0"] * (name == "untrained"), "--seed", str(seed)]
        with tempfile.TemporaryDirectory() as folder:
            seconds = run(script, *flags, *source, "--run-dir", folder + "/run")
            run("knn_eval.py", folder + "/run", "--output", folder + "/knn", "--pixels")
            config = json.loads(Path(folder, "run/args.json").read_text())
            names = ("pixels-knn.json", "knn.json")
            pixels, knn = (json.loads(Path(folder, "knn", name).read_text()) for name in names)
        if n == 0:
            record(args, "pixels", None, pixels)
        facts = {key: config[key] for key in ("versions", "commit", "device")}
        facts |= dict(processor=processor_name(), seconds=round(seconds, 1))
        record(args, name, seed, knn, command=shlex.join(["python", script, *flags]), **facts)


if __name__ == "__main__":
    common.cli(Args, main)
