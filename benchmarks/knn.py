"""The sweep of knn_eval.py against the loop it replaces: one KNeighborsClassifier fit and predict for every k.

    python benchmarks/knn.py                             # 50,000 x 10,000 x 512, 13 k: several minutes on 2 cores
    python benchmarks/knn.py --memory                    # memory of the sweep above its features, 200,000 x 4,000 x 512
    python benchmarks/knn.py --train 2000 --test 500     # to try it

Times are ratios of blocks that alternate in one process, a loop and two sweeps each, with the ratio of every block.
The time of the processors is given beside that on the clock, for a machine that does other work as well.
"""

import argparse
import json
import math
import os
import platform
import resource
import sys
import threading
import time
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from knn_eval import knn_sweep  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
KS = (1, 2, 3, 4, 5, 10, 20, 50, 70, 100, 200, 500, 1000)


def features(n, dim, classes, seed):
    """Clusters that overlap, as float32 [n, dim] that are positive like an encoder's, and labels [n]."""
    rng = np.random.default_rng(seed)
    centres, labels = np.random.default_rng(0).standard_normal((classes, dim), np.float32), rng.integers(0, classes, n)
    points = rng.standard_normal((n, dim), np.float32)
    for start in range(0, n, 10_000):
        points[start : start + 10_000] += 0.25 * centres[labels[start : start + 10_000]]
    return np.maximum(points, 0, out=points), labels


def loop(train, labels, test, ks):
    """The way it is usually written."""
    train, test = normalize(train), normalize(test)
    return {k: KNeighborsClassifier(n_neighbors=k).fit(train, labels).predict(test) for k in ks}


def resident():
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_above(call):
    """The most bytes that a call holds at any time above what is resident before it, sampled every 10 ms."""
    before, peak, done = resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    call()
    done.set()
    thread.join()
    return peak[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=None, help="training points (50000; with --memory 200000)")
    parser.add_argument("--test", type=int, default=None, help="queries (10000; with --memory 4000)")
    parser.add_argument("--dim", type=int, default=512, help="width of the features")
    parser.add_argument("--blocks", type=int, default=2, help="blocks of one loop and two sweeps")
    parser.add_argument("--run", default=None, help="a run's embeddings.npz, instead of random features")
    parser.add_argument("--memory", action="store_true", help="measure the memory of the sweep instead of times")
    parser.add_argument("--output", default=None, help="JSON to write (benchmarks/results/knn-*.json)")
    args = parser.parse_args()
    n, m = args.train or (200_000 if args.memory else 50_000), args.test or (4_000 if args.memory else 10_000)
    train, labels = features(n, args.dim, 10, 1)
    test, truth = features(m, args.dim, 10, 2)
    if args.run:
        with np.load(args.run, allow_pickle=False) as file:
            train, labels, test, truth = (file[f"{p}_{x}"] for p in ("train", "test") for x in ("features", "labels"))
        n, m, args.dim = len(train), len(test), train.shape[1]
    ks = [k for k in KS if k <= n]
    command = " ".join(["python benchmarks/knn.py", *sys.argv[1:]])
    result = {"command": command, "train": n, "test": m, "dim": args.dim, "ks": ks}

    if args.memory:
        knn_sweep(train[:2000], labels[:2000], test[:100], [1])  # what is allocated once, by threads and libraries
        result["features_mb"] = round((train.nbytes + test.nbytes) / 2**20)
        for name, device in (("scikit-learn", None), ("torch on the CPU", "cpu")):
            peak = peak_above(lambda device=device: knn_sweep(train, labels, test, ks, device=device))
            result[f"peak_above_features_mb_{name}"] = round(peak / 2**20)
            print(f"{name}: {peak / 2**20:.0f} MB above {result['features_mb']} MB of features")
        write(result, args.output or RESULTS / "knn-memory.json")
        return

    seconds, cpu_seconds, ratios, cpu_ratios, noise, found = {}, {}, [], [], [], {}
    for block in range(args.blocks):
        for way in ("loop", "sweep", "sweep") if block % 2 == 0 else ("sweep", "sweep", "loop"):
            start = time.perf_counter(), time.process_time()
            found[way] = (loop if way == "loop" else knn_sweep)(train, labels, test, ks)
            seconds.setdefault((block, way), []).append(time.perf_counter() - start[0])
            cpu_seconds.setdefault((block, way), []).append(time.process_time() - start[1])
        for taken, into in ((seconds, ratios), (cpu_seconds, cpu_ratios)):
            into.append(round(taken[block, "loop"][0] / np.mean(taken[block, "sweep"]), 2))
        noise.append(round(max(seconds[block, "sweep"]) / min(seconds[block, "sweep"]), 2))
        print(f"block {block + 1}: {ratios[-1]} times as fast ({cpu_ratios[-1]} by the processors' time); "
              f"its two sweeps differ by a factor of {noise[-1]}", flush=True)  # fmt: skip
        differing = sum(int((found["sweep"][k] != found["loop"][k]).sum()) for k in ks)
        result.update(
            ratio=round(math.exp(np.mean(np.log(ratios))), 2), ratios=ratios, cpu_ratios=cpu_ratios,
            sweep_against_sweep=noise, predictions=m * len(ks), differing=differing,
            accuracy={k: float((found["sweep"][k] == truth).mean()) for k in ks},
        )  # fmt: skip
        write(result, args.output or RESULTS / "knn-cpu.json")
    print(f"the sweep is {result['ratio']} times as fast; {differing} of {m * len(ks)} predictions differ")


def write(result, path):
    """JSON with what it was measured on."""
    versions = {"numpy": np.__version__, "scikit-learn": sklearn.__version__, "torch": torch.__version__}
    versions = {"python": platform.python_version(), **versions}
    result = {**result, "cores": len(os.sched_getaffinity(0)), "versions": versions}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
