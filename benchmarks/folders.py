"""Folders of images: how fast they are decoded, and how soon a second start begins.

    python benchmarks/folders.py --cifar10 cifar10-jpeg --output benchmarks/results/folders-cpu.json
    python benchmarks/folders.py --photos 200 --blocks 1

The photographs are pieces of scikit-learn's two, 300 to 800 pixels a side, as JPEG files.

- decoding: images per second and core of a first start, against a loop with Pillow in one thread
  that opens, converts, crops and resizes the same files; A B B A, geometric mean and range;
- start: seconds of a first start and of a second one, which maps the decoded images.
"""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np
import PIL
import tyro
from accuracy import processor_name
from ops import compare, seconds
from PIL import Image
from sklearn.datasets import load_sample_images

import common


@dataclass
class Args:
    """Measure folders of images."""

    photos: int = 2000
    """photographs to make"""
    cifar10: str | None = None
    """a folder of CIFAR-10 as JPEG files, measured as well"""
    blocks: int = 4
    """blocks of A B B A"""
    output: str | None = None
    """write the result to this JSON file"""


def photographs(folder, n):
    """n JPEG files in two classes, pieces of two photographs scaled to 300 to 800 pixels a side."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    for i in range(n):
        picture, part = pictures[i % 2], "test" if i % 10 >= 8 else "train"
        side, size = int(rng.integers(200, 420)), rng.integers(300, 801, 2).tolist()
        left, top = (int(rng.integers(full - side)) for full in picture.size)
        path = Path(folder, part, f"class {i % 2}", f"{i:06}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.resize(size, box=(left, top, left + side, top + side)).save(path, quality=85)


def links(folder, files, root):
    """A folder of links to some files below root."""
    for file in files:
        path = Path(folder, file.relative_to(root))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(file.resolve())


def decoding(root, size, blocks, place):
    """Decoding of 2,000 files of a folder against Pillow in one thread, per core."""
    files = sorted(Path(root).rglob("*.jpg"))
    part, cache = Path(place, "part"), Path(place, "cache")
    links(part, files[:: max(1, len(files) // 2000)], root)
    files, cores = sorted(part.rglob("*.jpg")), os.cpu_count()
    side = common.load_images("folder", part, size, cache).train.shape[3]

    def ours():
        shutil.rmtree(cache)
        common.load_images("folder", part, size, cache)

    def pillow():
        for file in files:
            common.read_image(file, side)

    found = compare(pillow, ours, blocks)
    for key in ("ratio", "low", "high", "lowest", "highest"):
        found[key] = round(found[key] / cores, 3)
    found |= dict(files=len(files), side=side, cores=cores)
    found["images_per_second_and_core"] = round(len(files) / seconds(ours) / cores)
    shutil.rmtree(part)
    return found


def starts(root, size, place):
    """Seconds of a first and of a second start on the whole folder."""
    times = [seconds(lambda: common.load_images("folder", root, size, place)) for _ in range(2)]
    first, second = (round(value, 2) for value in times)
    files = sum(1 for _ in Path(root).rglob("*.jpg"))
    return dict(files=files, first_start_s=first, second_start_s=second)


def main(args):
    """All of it, in one run."""
    command = f"python benchmarks/folders.py --photos {args.photos} --blocks {args.blocks}"
    command += " --cifar10 cifar10-jpeg" if args.cifar10 else ""
    result = dict(command=command, processor=processor_name(), pillow=PIL.__version__)
    with tempfile.TemporaryDirectory() as place:
        photos = Path(place, "photos")
        photographs(photos, args.photos)
        folders = {"photographs at 96": (photos, 96), "photographs at 160": (photos, 160)}
        if args.cifar10:
            folders["CIFAR-10 (JPEG)"] = (args.cifar10, 32)
        rows = {name: decoding(*folder, args.blocks, place) for name, folder in folders.items()}
        result["decoding"] = rows
        result["start"] = {
            name: starts(*folder, f"{place}/starts") for name, folder in folders.items()
        }
    print(json.dumps(result, indent=2))
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
