"""How many flipped labels knn_eval.py's suspects.csv finds.

    python benchmarks/suspects.py runs/simclr runs/byol runs/barlow_twins

5 % of the training labels of each run's embeddings are replaced by another class; the share of
flipped labels in the first 5 % of suspects.csv is both precision and recall.
"""

import csv
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from accuracy import ROOT, write
from accuracy import run as evaluate


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
        rng = np.random.default_rng(0)
        labels, classes = arrays["train_labels"], len(arrays["class_names"])
        flipped = rng.permutation(len(labels))[: round(args.share * len(labels))]
        labels[flipped] += rng.integers(1, classes, len(flipped))
        labels[flipped] %= classes
        with tempfile.TemporaryDirectory() as folder:
            np.savez(Path(folder, "flipped.npz"), **arrays)
            options = "--output", f"{folder}/knn", "--labels-per-class"
            evaluate("knn_eval.py", f"{folder}/flipped.npz", *options)
            with open(Path(folder, "knn/suspects.csv")) as file:
                suspects = [int(line["file"]) for line in csv.DictReader(file)]
        found = {*suspects[: len(flipped)]} & {*flipped.tolist()}
        listed = len({*suspects} & {*flipped})
        rows.append(dict(run=run, flipped=len(flipped), found=len(found), listed=listed))
        print(rows[-1], flush=True)
    write(args.output, runs=rows)


if __name__ == "__main__":
    main(tyro.cli(Args))
