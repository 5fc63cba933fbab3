"""Digits, default runs: accuracy of raw pixels, the untrained encoder and the methods.

    python benchmarks/accuracy.py
    python benchmarks/accuracy.py --methods simclr --seeds 1 --extra="--lr 0.5"

Each run is `python METHOD.py`, then `python knn_eval.py`, with --whiten and with --probe. It
appends a line to --output. Recorded runs are not repeated, and a run that was stopped is resumed
from its folder under --runs.
"""

import importlib.metadata
import itertools
import json
import platform
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common


@dataclass
class Args:
    """Train, evaluate, record."""

    methods: tuple[str, ...] = ("simclr", "byol", "barlow_twins")
    """method files"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of each method"""
    extra: str = ""
    """more flags for the methods, in one string; they become part of the recorded name"""
    baselines: bool = True
    """also the untrained encoder and raw pixels"""
    runs: str = "runs/benchmark"
    """folder of the runs"""
    output: str = str(ROOT / "benchmarks/results/digits-cpu.jsonl")
    """file to append the lines to"""


def first_of_each_class(source, folder, train, test):
    """A folder of links to the first images of every class."""
    for part, n in (("train", train), ("test", test)):
        for images in sorted(Path(source, part).iterdir()):
            Path(folder, part, images.name).mkdir(parents=True)
            for image in sorted(images.iterdir())[:n]:
                Path(folder, part, images.name, image.name).symlink_to(image.resolve())


def run(script, *flags):
    """Run a script of the repository; return its seconds."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / script), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def evaluate(folder, *options):
    """The results of knn_eval.py for a run: of its features, then of raw pixels (--pixels)."""
    run("knn_eval.py", folder, "--output", f"{folder}/knn", *options)
    return json.loads(Path(folder, "knn/knn.json").read_text())["results"]


def means(table):
    """{k, or labels per class: mean accuracy} of a table of knn.json."""
    return {n: round(float(np.mean(draws)), 6) for n, draws in table.items()}


def record(output, result, **line):
    """Append a result of knn.json as one line."""
    line |= {key: result[key] for key in ("n_train", "n_test", "k", "effective_rank")}
    tables = {name: means(table) for name, table in result["tables"].items() if table}
    line["accuracy_at_chosen_k"] = tables["knn"].pop("chosen k")
    line |= dict(accuracy=tables.pop("knn"), **tables)
    append(output, **line)
    few, full = line["labels"]["1"], line["accuracy_at_chosen_k"]
    shown = f"1 label a class {100 * few:.2f} %, all {100 * full:.2f} %"
    print(f"{line['name']} seed {line['seed']}: {shown}", flush=True)


def recorded(output, *keys):
    """The values of these keys in the lines of a file, as a set of tuples."""
    lines = Path(output).read_text().splitlines() if Path(output).exists() else []
    return {tuple(json.loads(line)[key] for key in keys) for line in lines}


def processor_name():
    """The CPU's model name; where it is unknown, its architecture."""
    path = Path("/proc/cpuinfo")
    names = re.findall("model name\t: (.+)", path.read_text()) if path.exists() else []
    return [*names, platform.machine()][0]


def facts():
    """What a result was measured with."""
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    names = ("torch", "torchvision", "numpy", "scikit-learn", "lightly")
    result = dict(command=shlex.join(["python", *sys.argv]), commit=common.git_commit())
    result |= dict(versions={name: installed.get(name) for name in names})
    result |= dict(processor=processor_name(), cores=joblib.cpu_count())
    cuda = torch.cuda.is_available()
    return dict(result, device=torch.cuda.get_device_name() if cuda else "cpu")


def write(path, **result):
    """Write a result and its facts as a JSON file."""
    Path(path).write_text(json.dumps(facts() | result, indent=2) + "\n")


def append(path, **line):
    """Append a result and its facts to a file of JSON lines."""
    with open(path, "a") as file:
        file.write(json.dumps(facts() | line) + "\n")


def main(args, settings=()):
    """For every seed each method and the untrained encoder; raw pixels once."""
    done = recorded(args.output, "name", "seed")
    names = [*args.methods, *["untrained"] * args.baselines]
    for seed, method in itertools.product(args.seeds, names):
        name, untrained = f"{method} {args.extra}".strip(), method == "untrained"
        if (name, seed) in done:
            print(f"{name} seed {seed}: already in {args.output}")
            continue
        script = f"{args.methods[0] if untrained else method}.py"
        flags = [*settings, *shlex.split(args.extra), "--seed", str(seed)]
        flags += ["--epochs", "0"] * untrained
        folder = f"{args.runs}/{name}-s{seed}".replace(" ", "")
        # Of a resumed run the time is not known.
        fresh = not Path(folder).exists()
        seconds = run(script, *flags, "--run-dir", folder, "--resume")
        (whitened,) = evaluate(folder, "--whiten")
        (knn,) = evaluate(folder, "--probe")
        if untrained and seed == args.seeds[0]:
            # Logistic regressions on the pixels of 50,000 images take a quarter of an hour.
            _, pixels = evaluate(folder, "--pixels")
            record(args.output, pixels, name="pixels", seed=seed)
        keys = ("epoch", "loss", "seconds", "knn_acc", "effective_rank")
        log = [json.loads(line) for line in Path(folder, "log.jsonl").open()]
        line = dict(curve=[{key: row[key] for key in keys if key in row} for row in log])
        line |= {f"whitened_{name}": means(t) for name, t in whitened["tables"].items()}
        line |= dict(whitened=whitened["accuracy"], command=shlex.join(["python", script, *flags]))
        line["seconds"] = round(seconds, 1) if fresh else None
        record(args.output, knn, name=name, seed=seed, **line)


if __name__ == "__main__":
    common.cli(Args, main)
