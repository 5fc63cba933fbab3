"""Digits, default runs: accuracy of raw pixels, the untrained encoder and the methods.

    python benchmarks/accuracy.py
    python benchmarks/accuracy.py --methods simclr --seeds 1 --extra="--lr 0.5"

Each run is `python METHOD.py`, then `python knn_eval.py`, plain and with --whiten. It appends a
line to --output. Recorded runs are left out, so a stopped benchmark goes on.
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

import numpy as np

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
    print(f"{line['name']} seed {line['seed']}: {shown}", flush=True)


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
    done = recorded(args.output, "name", "seed")
    for seed, method in itertools.product(args.seeds, ("untrained", *args.methods)):
        name = f"{method} {args.extra}".strip()
        if (name, seed) in done:
            print(f"{name} seed {seed}: already in {args.output}")
            continue
        script = f"{args.methods[0] if method == 'untrained' else method}.py"
        flags = [*shlex.split(args.extra), "--seed", str(seed)]
        flags += ["--epochs", "0"] if method == "untrained" else []
        with tempfile.TemporaryDirectory() as folder:
            knn, pixels, whitened = train_and_evaluate(script, flags, folder)
        if ("pixels", None) not in done:
            done.add(("pixels", None))
            record(args.output, pixels, name="pixels", seed=None)
        line = dict(whitened=whitened["accuracy"], command=shlex.join(["python", script, *flags]))
        record(args.output, knn, name=name, seed=seed, **line)


if __name__ == "__main__":
    common.cli(Args, main)
