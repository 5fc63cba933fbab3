"""How many flipped labels knn_eval.py's suspects.csv finds.

    python benchmarks/suspects.py runs/simclr runs/byol runs/barlow_twins

5 % of the training labels of each run's embeddings are replaced by another class; the share of
flipped labels in the first 5 % of suspects.csv is both precision and recall.
"""

import csv
import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from accuracy import processor_name

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    """Flip labels, look for them."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN ...")]
    """finished runs with labels"""
    share: float = 0.05
    """share of the training labels to flip"""
    output: str = str(ROOT / "benchmarks/results/suspects-cpu.json")
    """JSON file to write"""


def main(args):
    """Flip, evaluate, count."""
    rows = []
    for run in args.runs:
        arrays = dict(np.load(Path(run, "embeddings.npz")))
        meta, rng = json.loads(str(arrays["meta"])), np.random.default_rng(0)
        labels, classes = arrays["train_labels"], len(arrays["class_names"])
        flipped = rng.permutation(len(labels))[: round(args.share * len(labels))]
        labels[flipped] += rng.integers(1, classes, len(flipped))
        labels[flipped] %= classes
        with tempfile.TemporaryDirectory() as folder:
            np.savez(Path(folder, "flipped.npz"), **arrays)
            command = [sys.executable, str(ROOT / "knn_eval.py"), f"{folder}/flipped.npz"]
            command += ["--output", f"{folder}/knn", "--labels-per-class"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            with open(Path(folder, "knn/suspects.csv")) as file:
                suspects = [int(line["file"]) for line in csv.DictReader(file)]
        found = {*suspects[: len(flipped)]} & {*flipped.tolist()}
        row = dict(method=meta["method"], dataset=meta["dataset"], seed=meta["seed"])
        row |= dict(flipped=len(flipped), found=len(found), listed=len({*suspects} & {*flipped}))
        rows.append(dict(row, suspects=len(suspects)))
        print(rows[-1], flush=True)
    command = shlex.join(["python", "benchmarks/suspects.py", *args.runs])
    result = dict(command=command, runs=rows, processor=processor_name())
    Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
