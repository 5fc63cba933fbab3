"""knn_sweep against the usual loop: a fit and predict of KNeighborsClassifier for every k.

    python benchmarks/knn.py                             # 50,000 x 10,000 x 512, 13 k: minutes
    python benchmarks/knn.py --train 2000 --test 500     # to try it

A block times the loop once and the sweep twice, in alternating order, then the sweep of
knn_eval.py (test and leave-one-out) and its table of few labels.
"""

import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np
import sklearn
import tyro
from accuracy import processor_name
from ops import seconds
from scipy import stats
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

import knn_eval
from knn_eval import knn_sweep

KS = (1, 2, 3, 4, 5, 10, 20, 50, 70, 100, 200, 500, 1000)


@dataclass
class Args:
    """Time knn_sweep."""

    train: int = 50_000
    """training points"""
    test: int = 10_000
    """test points"""
    dim: int = 512
    """dimensions of the random features"""
    blocks: int = 2
    """blocks of one loop and two sweeps"""
    output: str = str(ROOT / "benchmarks/results/knn-cpu.json")
    """JSON file to write"""


def features(n, dim, seed):
    """Ten overlapping clusters, positive like an encoder's output: float32 [n, dim], labels [n]."""
    rng = np.random.default_rng(seed)
    centers = 0.25 * np.random.default_rng(0).standard_normal((10, dim), np.float32)
    labels = rng.integers(0, 10, n)
    return np.maximum(rng.standard_normal((n, dim), np.float32) + centers[labels], 0), labels


def loop(train, labels, test, ks):
    train, test = normalize(train), normalize(test)
    return {k: KNeighborsClassifier(k).fit(train, labels).predict(test) for k in ks}


def few_labels_over_sweep(train, labels, test, truth):
    """Time of knn_eval.py's default table of few labels over that of its sweep."""
    parts = []
    for name, x, y in (("train", train, labels), ("test", test, truth)):
        rows = np.arange(len(x))
        parts.append(knn_eval.Part(name, x, y, rows, rows, rows))
    entry = SimpleNamespace(name="", class_name=str, predictions=[])
    entry.train, entry.test = entry.voters, entry.queries = parts
    args, tables = knn_eval.Args(device=None), dict(knn={}, labels={})
    sweep = seconds(lambda: knn_eval.sweep(entry, args, tables["knn"]))
    return seconds(lambda: knn_eval.labels_needed(entry, args, tables)) / sweep


def main(args):
    train, labels = features(args.train, args.dim, 1)
    test, truth = features(args.test, args.dim, 2)
    ks, predictions, ratios, shares = [k for k in KS if k < len(train)], {}, [], []

    def run(function):
        def call():
            predictions[function] = function(train, labels, test, ks)

        return seconds(call)

    for block in range(args.blocks):
        order = (loop, knn_sweep, knn_sweep)[:: 1 if block % 2 == 0 else -1]
        times = [(function, run(function)) for function in order]
        slow, fast = (sum(t for f, t in times if f is function) for function in (loop, knn_sweep))
        ratios.append(round(2 * slow / fast, 2))
        shares.append(round(few_labels_over_sweep(train, labels, test, truth), 2))
        print(f"block {block + 1}: {ratios[-1]} times as fast, few labels {shares[-1]}", flush=True)
    result = dict(command=shlex.join(["python", "benchmarks/knn.py", *sys.argv[1:]]))
    result |= dict(train=len(train), test=len(test), dim=args.dim, ks=ks)
    result |= dict(ratio=round(float(stats.gmean(ratios)), 2), ratios=ratios)
    result["few_labels_over_sweep"] = shares
    result["predictions"] = len(test) * len(ks)
    found, expected = predictions[knn_sweep], predictions[loop]
    result["differing"] = sum(int((found[k] != expected[k]).sum()) for k in ks)
    result |= dict(processor=processor_name(), cores=len(os.sched_getaffinity(0)))
    result |= {"numpy": np.__version__, "scikit-learn": sklearn.__version__}
    print(f"{result['ratio']} times as fast; {result['differing']} predictions differ")
    Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
