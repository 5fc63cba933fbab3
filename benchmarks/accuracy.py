"""kNN accuracy of the three methods, of the untrained encoder they start from and of raw pixels, by the real commands.

    python benchmarks/accuracy.py digits                                        # the default run, seeds 1, 2, 3
    python benchmarks/accuracy.py fashion_mnist --data-dir data --seeds 1
    python benchmarks/accuracy.py cifar10_jpeg --data-dir cifar10-jpeg --seeds 1  # a folder with train/ and test/

Each run is `python <method>.py`, then `python knn_eval.py`; a JSON line a run is appended to --output.
"""

import itertools
import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Tuple

import tyro
from tyro.conf import Positional

ROOT = Path(__file__).parent.parent
# Short runs of a narrow network, that a CPU ends in minutes: enough to tell learning from not learning.
SHORT = ["--encoder", "resnet10", "--width", "16", "--hidden-dim", "512", "--projection-dim", "128", "--batch-size",
         "128", "--lr", "0.06", "--warmup-epochs", "0.5", "--eval-every", "0"]  # fmt: skip
SETS = {
    "digits": [],
    "fashion_mnist": ["--dataset", "fashion_mnist", "--image-size", "16", "--epochs", "5", *SHORT],
    "cifar10_jpeg": ["--dataset", "folder", "--epochs", "5", *SHORT],
}
PER_CLASS = 1000  # training images of a class of cifar10_jpeg, the first by name, and a fifth as many test images


@dataclass
class Args:
    """Train, evaluate, record."""

    data: Positional[Literal["digits", "fashion_mnist", "cifar10_jpeg"]] = "digits"
    """what to train on"""
    data_dir: str = "data"
    """its place"""
    methods: Tuple[str, ...] = ("simclr", "byol", "barlow_twins")
    """which methods"""
    seeds: Tuple[int, ...] = (1, 2, 3)
    """which seeds"""
    extra: str = ""
    """more flags for the methods, in one string; they become part of the recorded name"""
    output: str = str(ROOT / "benchmarks/results/accuracy-cpu.jsonl")
    """where the lines go"""


def run(script, *flags):
    subprocess.run([sys.executable, str(ROOT / script), *flags], check=True, stdout=subprocess.DEVNULL)


def commit():
    """The git commit of these files, with "-dirty" where they have been changed since; None where there is no git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def record(args, name, seed, knn, command, versions):
    """Append what a knn.json holds, as one line."""
    name = f"{name} {args.extra}".strip()
    line = dict(data=args.data, name=name, seed=seed, command=command, n_train=knn["n_train"], n_test=knn["n_test"],
                accuracy={row["k"]: round(row["accuracy"], 6) for row in knn["sweep"]}, chosen_k=knn["chosen_k"],
                chosen_k_accuracy=round(knn["test_accuracy"], 6), versions=versions)  # fmt: skip
    with open(args.output, "a") as file:
        file.write(json.dumps(line) + "\n")
    shown = [accuracy for k, accuracy in line["accuracy"].items() if k <= 100]
    print(f"{args.data} {name} seed {seed}: mean over k up to 100 = {100 * sum(shown) / len(shown):.2f} %", flush=True)


def link_part(source, folder):
    """A folder of links to the first images of every class."""
    for part, n in (("train", PER_CLASS), ("test", PER_CLASS // 5)):
        for images in sorted(Path(source, part).iterdir()):
            Path(folder, part, images.name).mkdir(parents=True)
            for image in sorted(images.iterdir())[:n]:
                Path(folder, part, images.name, image.name).symlink_to(image.resolve())


def main(args):
    """Raw pixels once, and for every seed the untrained encoder, which the methods have in common, and each method."""
    settings = [*SETS[args.data], *shlex.split(args.extra)]
    links = tempfile.TemporaryDirectory()
    if args.data == "cifar10_jpeg":
        link_part(args.data_dir, links.name)
        args.data_dir = links.name
    place = [] if args.data == "digits" else ["--data-dir", args.data_dir]
    for n, (seed, name) in enumerate(itertools.product(args.seeds, ("untrained", *args.methods))):
        script = f"{args.methods[0] if name == 'untrained' else name}.py"
        flags = [*settings, *["--epochs", "0"] * (name == "untrained"), "--seed", str(seed)]
        with tempfile.TemporaryDirectory() as folder:
            run(script, *flags, *place, "--run-dir", folder + "/run")
            run("knn_eval.py", folder + "/run", "--output", folder + "/knn", *["--pixels"] * (n == 0))
            knn = {path.name: json.loads(path.read_text()) for path in Path(folder, "knn").glob("*.json")}
            versions = json.loads(Path(folder, "run", "args.json").read_text())["versions"]
        if n == 0:
            record(args, "pixels", None, knn["pixels-knn.json"], None, versions)
        record(args, name, seed, knn["knn.json"], shlex.join(["python", script, *flags]), versions)


if __name__ == "__main__":
    main(tyro.cli(Args))
