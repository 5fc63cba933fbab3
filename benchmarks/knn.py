"""knn_sweep against the usual loop: a fit and predict of KNeighborsClassifier for every k.

python benchmarks/knn.py                             # 50,000 x 10,000 x 512, 13 k: minutes
python benchmarks/knn.py --train 2000 --test 500     # to try it
"""

import time
from dataclasses import dataclass

import numpy as np
import tyro
from accuracy import ROOT, write
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

import knn_eval


@dataclass
class Args:
    """Time knn_sweep."""

    train: int = 50_000
    """training points"""
    test: int = 10_000
    """test points"""
    dim: int = 512
    """dimensions of the random features"""
    output: str = str(ROOT / "benchmarks/results/knn-cpu.json")
    """JSON file to write"""


def loop(train, labels, test, ks):
    train, test = normalize(train), normalize(test)
    return {k: KNeighborsClassifier(k).fit(train, labels).predict(test) for k in ks}


def main(args):
    # Ten overlapping clusters, positive like an encoder's output.
    rng = np.random.default_rng(0)
    centers = 0.25 * rng.standard_normal((10, args.dim), np.float32)
    labels = rng.integers(0, 10, args.train + args.test)
    noise = rng.standard_normal((len(labels), args.dim), np.float32)
    train, test = np.split(np.maximum(noise + centers[labels], 0), [args.train])
    ks = [k for k in knn_eval.Args.ks if k < len(train)]
    seconds, predictions = [], []
    for function in (loop, knn_eval.knn_sweep):
        start = time.perf_counter()
        predictions.append(function(train, labels[: args.train], test, ks))
        seconds.append(time.perf_counter() - start)
    ratio = round(seconds[0] / seconds[1], 2)
    differing = sum(int((predictions[0][k] != predictions[1][k]).sum()) for k in ks)
    print(f"{ratio} times as fast; {differing} predictions differ")
    result = dict(ks=ks, ratio=ratio, predictions=len(test) * len(ks), differing=differing)
    write(args.output, train=args.train, test=args.test, dim=args.dim, **result)


if __name__ == "__main__":
    main(tyro.cli(Args))
