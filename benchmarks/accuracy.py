"""kNN accuracy of raw pixels, the untrained encoder and the methods, by the real commands.

    python benchmarks/accuracy.py digits
    python benchmarks/accuracy.py fashion_mnist --methods simclr --seeds 1
    python benchmarks/accuracy.py cifar10_jpeg --data-dir cifar10-jpeg --seeds 1
    python benchmarks/accuracy.py fashion_mnist --methods byol --holdout 500 --extra="--lr 0.5"

digits are the default runs. fashion_mnist and cifar10_jpeg (a folder of image files, of
which the first 1,000 training and 200 test images of a class are taken) are short runs of a narrow
network. Each run is `python METHOD.py`, then `python knn_eval.py`, plain and with --whiten. A JSON
line a run is appended to --output; runs that it holds already are left out, so a stopped benchmark
goes on. With --holdout, for tuning, so many training images of each class, the same for every run,
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
    "--encoder resnet10 --width 16 --batch-size 128 --warmup-epochs 0.5 --eval-every 0 --epochs 5"
)
SETS = {
    "digits": [],
    "fashion_mnist": ["--dataset", "fashion_mnist", "--image-size", "16", *SHORT],
    "cifar10_jpeg": ["--dataset", "folder", *SHORT],
}


@dataclass
class Args:
    """Train, evaluate, record."""

    data: Positional[Literal["digits", "fashion_mnist", "cifar10_jpeg"]] = "digits"
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


def first_of_each_class(source, folder, train=1000, test=200):
    """A folder of links to the first images of every class."""
    for part, n in (("train", train), ("test", test)):
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


def train_and_evaluate(script, flags, folder, *options, pixels=True):
    """Train into folder/run by the real command, or resume it there; evaluate plain and whitened.

    Returns the results of knn.json, of the features, raw pixels (if asked for) and whitened
    features, with what a recorded line says of the run.
    """
    seconds = run(script, *flags, "--run-dir", f"{folder}/run", "--resume")
    results = []
    for name, more in (("knn", ["--pixels"] * pixels), ("whiten", ["--whiten"])):
        run("knn_eval.py", f"{folder}/run", "--output", f"{folder}/{name}", *more, *options)
        results += json.loads(Path(folder, name, "knn.json").read_text())["results"]
    config = json.loads(Path(folder, "run/args.json").read_text())
    facts = {key: config[key] for key in ("versions", "commit", "device")}
    facts |= dict(processor=processor_name())
    for result, more in zip(results, (dict(seconds=round(seconds, 1)), {}, {})):
        result["facts"] = facts | more
    return results


def means(table):
    """{k, or labels per class: mean accuracy} of a table of knn.json."""
    return {n: round(float(np.mean(draws)), 6) for n, draws in table.items()}


def record(output, result, **line):
    """Append a result of knn.json as one line."""
    line |= {key: result[key] for key in ("n_train", "n_test", "k", "effective_rank")}
    tables = {name: means(table) for name, table in result["tables"].items() if table}
    line["accuracy_at_chosen_k"] = tables["knn"].pop("chosen k")
    line |= dict(accuracy=tables.pop("knn"), **tables)
    with open(output, "a") as file:
        file.write(json.dumps(line | result["facts"]) + "\n")
    few, full = line["labels"]["1"], line["accuracy_at_chosen_k"]
    shown = f"1 label a class {100 * few:.2f} %, all {100 * full:.2f} %"
    print(f"{line['data']} {line['name']} seed {line['seed']}: {shown}", flush=True)


def recorded(output, *keys):
    """The values of these keys in the lines of a file, as a set of tuples."""
    lines = Path(output).read_text().splitlines() if Path(output).exists() else []
    return {tuple(json.loads(line)[key] for key in keys) for line in lines}


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
    done = recorded(args.output, "data", "name", "seed")
    for seed, method in itertools.product(args.seeds, ("untrained", *args.methods)):
        name = f"{method} {args.extra}".strip()
        if (args.data, name, seed) in done:
            continue
        script = f"{args.methods[0] if method == 'untrained' else method}.py"
        flags = [*settings, *["--epochs", "0"] * (method == "untrained"), "--seed", str(seed)]
        with tempfile.TemporaryDirectory() as folder:
            knn, pixels, whitened = train_and_evaluate(script, [*flags, *source], folder)
        line = dict(data=args.data, holdout=args.holdout)
        if (args.data, "pixels", None) not in done:
            done.add((args.data, "pixels", None))
            record(args.output, pixels, name="pixels", seed=None, **line)
        line |= dict(whitened=whitened["accuracy"], command=shlex.join(["python", script, *flags]))
        record(args.output, knn, name=name, seed=seed, **line)


if __name__ == "__main__":
    common.cli(Args, main)
