"""knn_sweep against the usual loop: a fit and predict of KNeighborsClassifier for every k.

    python benchmarks/knn.py                             # 50,000 x 10,000 x 512, 13 k: minutes
    python benchmarks/knn.py --memory                    # peak memory of leave-one-out
    python benchmarks/knn.py --train 2000 --test 500     # to try it

A block times the loop once and the sweep twice, in alternating order. Processor time is recorded
next to wall time, for machines that do other work as well.
"""

import json
import os
import platform
import resource
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sklearn
import tyro
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from knn_eval import knn_sweep

RESULTS = Path(__file__).resolve().parent / "results"
KS = (1, 2, 3, 4, 5, 10, 20, 50, 70, 100, 200, 500, 1000)


@dataclass
class Args:
    """Time (or with --memory, weigh) knn_sweep."""

    train: int = 50_000
    """training points"""
    test: int = 10_000
    """test points"""
    dim: int = 512
    """dimensions of the random features"""
    blocks: int = 2
    """blocks of one loop and two sweeps"""
    run: str | None = None
    """embeddings.npz of a run, instead of random features"""
    memory: bool = False
    """measure the peak memory of leave-one-out instead of times"""
    output: str | None = None
    """JSON to write (unset: benchmarks/results/knn-cpu.json or knn-memory.json)"""


def features(n, dim, seed):
    """Ten overlapping clusters, positive like an encoder's output: float32 [n, dim], labels [n]."""
    rng = np.random.default_rng(seed)
    centers = 0.25 * np.random.default_rng(0).standard_normal((10, dim), np.float32)
    labels = rng.integers(0, 10, n)
    return np.maximum(rng.standard_normal((n, dim), np.float32) + centers[labels], 0), labels


def loop(train, labels, test, ks):
    train, test = normalize(train), normalize(test)
    return {k: KNeighborsClassifier(k).fit(train, labels).predict(test) for k in ks}


def timed(function, *args):
    """Result, wall seconds and processor seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*args)
    return result, time.perf_counter() - wall, time.process_time() - cpu


def peak_memory(train, labels, ks):
    """MB of leave-one-out above what the process held before."""
    knn_sweep(train[:2000], labels[:2000], train[:100], [1])
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    knn_sweep(train, labels, None, ks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return {"features_mb": train.nbytes >> 20, "peak_above_mb": (peak - before) >> 20}


def compare(train, labels, test, truth, ks, blocks):
    """Times of loop and sweep, their ratio in each block, and predictions that differ."""
    ratios, cpu_ratios, noise = [], [], []
    for block in range(blocks):
        runs = {loop: [], knn_sweep: []}
        for function in (loop, knn_sweep, knn_sweep)[:: 1 if block % 2 == 0 else -1]:
            runs[function].append(timed(function, train, labels, test, ks))
        (expected, *one), (found, *two), (_, *three) = runs[loop] + runs[knn_sweep]
        wall, cpu = (round(2 * a / (b + c), 2) for a, b, c in zip(one, two, three))
        ratios.append(wall)
        cpu_ratios.append(cpu)
        noise.append(round(max(two[0], three[0]) / min(two[0], three[0]), 2))
        print(f"block {block + 1}: {wall} times as fast ({cpu} by processor time)", flush=True)
    return {
        "ratio": round(float(np.exp(np.mean(np.log(ratios)))), 2),
        "ratios": ratios,
        "cpu_ratios": cpu_ratios,
        "sweep_against_sweep": noise,
        "predictions": len(test) * len(ks),
        "differing": sum(int((found[k] != expected[k]).sum()) for k in ks),
        "accuracy": {k: float((found[k] == truth).mean()) for k in ks},
    }


def main(args):
    train, labels = features(args.train, args.dim, 1)
    test, truth = features(args.test, args.dim, 2)
    if args.run:
        names = ("train_features", "train_labels", "test_features", "test_labels")
        with np.load(args.run) as file:
            train, labels, test, truth = (file[name] for name in names)
    ks = [k for k in KS if k < len(train)]
    result = {"command": "python " + shlex.join(["benchmarks/knn.py", *sys.argv[1:]])}
    result |= {"train": len(train), "test": len(test), "dim": train.shape[1], "ks": ks}
    if args.memory:
        result |= peak_memory(train, labels, ks)
        print(f"{result['peak_above_mb']} MB above {result['features_mb']} MB of features")
    else:
        result |= compare(train, labels, test, truth, ks, args.blocks)
        differ = f"{result['differing']} of {result['predictions']} predictions differ"
        print(f"the sweep is {result['ratio']} times as fast; {differ}")
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    result |= {"cores": len(os.sched_getaffinity(0))}
    result |= {"versions": {**versions, "scikit-learn": sklearn.__version__}}
    name = "knn-memory.json" if args.memory else "knn-cpu.json"
    Path(args.output or RESULTS / name).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
