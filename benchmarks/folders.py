"""Large folders of images: how fast they are decoded, how soon a second start begins, what memory they take.

    python benchmarks/folders.py --output benchmarks/results/folders-cpu.json             # 20 GB of disk, half an hour
    python benchmarks/folders.py --photos 200 --entries 1000 --steps 2                    # a rehearsal
    python benchmarks/folders.py --cifar10 cifar10-jpeg                                   # that folder as well

The photographs are made from scikit-learn's two: pieces of them, 300 to 800 pixels a side, as JPEG files.

- decoding: images per second and core of a first start against a loop over the same files with Pillow alone, on one core,
  that opens, converts, crops and resizes as ours; A B B A, the geometric mean of the blocks' ratios and their range;
- start: seconds of a first start and of a second one, which finds the images decoded;
- memory: the peak of a process that decodes the entries (links to the photographs) and reads them all once, batch by batch;
- waiting: the share of a step of SimCLR on a ResNet-18 at 96 pixels that is spent waiting for images from the disk.
"""

import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from sklearn.datasets import load_sample_images  # noqa: E402

import common  # noqa: E402
import simclr  # noqa: E402


@dataclass
class Args:
    """Measure large folders."""

    photos: int = 20_000
    """photographs to make"""
    entries: int = 200_000
    """entries of the folder whose memory is measured: links to the photographs"""
    cifar10: Optional[str] = None
    """a folder of CIFAR-10 as JPEG files, to be measured as well"""
    blocks: int = 4
    """blocks of A B B A"""
    steps: int = 20
    """steps of training whose waiting is measured"""
    batch_size: int = 64
    """images of such a step"""
    output: Optional[str] = None
    """write the result to this JSON file"""
    memory_of: Optional[str] = None
    """used by the script itself: measure the memory that this folder takes, and end"""


def photographs(folder, n, low=300, high=800):
    """n JPEG files: pieces of scikit-learn's two photographs, scaled to low to high pixels a side; a class each."""
    dice, pictures = np.random.default_rng(0), [Image.fromarray(picture) for picture in load_sample_images().images]
    for i in range(n):
        picture, part = pictures[i % 2], "test" if i % 10 >= 8 else "train"
        side, width, height = int(dice.integers(200, 420)), *dice.integers(low, high + 1, 2).tolist()
        left, top = (int(dice.integers(full - side)) for full in picture.size)
        path = Path(folder, part, f"class {i % 2}", f"{i:06}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.resize((width, height), box=(left, top, left + side, top + side)).save(path, quality=85)


def links(folder, source, n):
    """A folder of n links to the files of another one."""
    files = sorted(path for path in Path(source).rglob("*.jpg"))
    for i in range(n):
        path = Path(folder, files[i % len(files)].parent.relative_to(source), f"{i}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(files[i % len(files)])


def pillow_alone(files, side):
    """What a start does with each file, in one thread."""
    for path in files:
        with Image.open(path) as image:
            image.draft(None, (2 * side, 2 * side))
            image = ImageOps.exif_transpose(image)
            image = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BILINEAR)
        np.asarray(image).transpose(2, 0, 1).tobytes()


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def decoding(folder, size, blocks, place):
    """Ratio of images per second and core, first start against Pillow alone, on up to 2,000 of the folder's files."""
    part, cores = Path(place, "part"), os.cpu_count()
    links(part, folder, min(2000, sum(1 for _ in Path(folder).rglob("*.jpg"))))
    files = sorted(part.rglob("*.jpg"))
    side = common.load_images("folder", part, size, cache_dir=f"{place}/look").train.shape[3]

    def ours():
        shutil.rmtree(f"{place}/cache", ignore_errors=True)
        common.load_images("folder", part, size, cache_dir=f"{place}/cache")

    ratios, rates = [], []
    for _ in range(blocks):
        b1, a1, a2, b2 = (seconds(call) for call in (lambda: pillow_alone(files, side), ours, ours,
                                                     lambda: pillow_alone(files, side)))  # fmt: skip
        ratios.append((b1 + b2) / (a1 + a2) / cores)
        rates.append(2 * len(files) / (a1 + a2) / cores)
    shutil.rmtree(part)
    return dict(files=len(files), side=side, cores=cores, images_per_second_and_core=round(statistics.mean(rates)),
                ratio=round(math.exp(statistics.mean(map(math.log, ratios))), 3), lowest=round(min(ratios), 3),
                highest=round(max(ratios), 3), blocks=blocks)  # fmt: skip


def starts(folder, size, place):
    """Seconds of a first and of a second start on the whole folder."""
    found = {}
    for name in ("first", "second"):
        found[f"{name}_start_s"] = round(
            seconds(lambda: common.load_images("folder", folder, size, cache_dir=f"{place}/cache")), 2
        )
    return dict(files=sum(1 for _ in Path(folder).rglob("*.jpg")), **found)


def memory(folder, cache, size=128):
    """Decode, then read every training image once in batches of 512: the process's peak of resident memory."""
    common._memory = lambda: 0  # leave the images on disk, however large this machine is
    images = common.load_images("folder", folder, size, cache_dir=cache)
    args = simclr.Args(batch_size=512, epochs=1)
    read = sum(len(batch) for batch in common.feed(images.train, args, 0, torch.device("cpu")))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    on_disk = sum(path.stat().st_size for path in Path(cache).iterdir())
    print(json.dumps(dict(images=len(images.train) + len(images.test), side=images.train.shape[3], read=read,
                          bytes_on_disk=on_disk, peak_bytes=peak)))  # fmt: skip


class Enough(Exception):
    """The steps that were asked for are done."""


def waiting(folder, steps, batch_size, place):
    """The share of SimCLR's own steps that passes in waiting for the next batch."""
    feed, advance, memory_of_machine = common.feed, common.Run.advance, common._memory
    waited, ends = [], []

    def timed_feed(*args):
        batches = iter(feed(*args))
        while True:
            start = time.perf_counter()
            batch = next(batches)
            waited.append(time.perf_counter() - start)
            yield batch

    def counted(self, *args):
        advance(self, *args)
        ends.append(time.perf_counter())
        if len(ends) > steps:
            raise Enough

    common.feed, common.Run.advance, common._memory = timed_feed, counted, lambda: 0
    try:
        simclr.main(simclr.Args(dataset="folder", data_dir=str(folder), cache_dir=f"{place}/cache", image_size=96,
                                encoder="resnet18", batch_size=batch_size, epochs=100, run_dir=f"{place}/run"))  # fmt: skip
    except Enough:
        pass
    finally:
        common.feed, common.Run.advance, common._memory = feed, advance, memory_of_machine
    return dict(steps=steps, batch_size=batch_size, step_s=round((ends[-1] - ends[0]) / steps, 3),
                share=round(sum(waited[1:]) / (ends[-1] - ends[0]), 6), longest_s=round(max(waited[1:]), 4))  # fmt: skip


def main(args):
    """All of it, in one run."""
    if args.memory_of:
        memory(args.memory_of, args.memory_of + "-cache")
        return
    result = {}
    with tempfile.TemporaryDirectory() as place:
        photos = Path(place, "photos")
        photographs(photos, args.photos)
        result["decoding"] = {
            f"photographs at {size}": decoding(photos, size, args.blocks, place) for size in (96, 160)
        }
        result["start"] = {"photographs at 96": starts(photos, 96, place)}
        if args.cifar10:
            result["decoding"]["CIFAR-10 (JPEG)"] = decoding(args.cifar10, 32, args.blocks, place)
            result["start"]["CIFAR-10 (JPEG)"] = starts(args.cifar10, 32, place)
        result["waiting"] = waiting(photos, args.steps, args.batch_size, place)
        links(Path(place, "many"), photos, args.entries)
        done = subprocess.run([sys.executable, __file__, "--memory-of", f"{place}/many"], check=True, capture_output=True,
                              text=True)  # fmt: skip
        result["memory"] = json.loads(done.stdout.splitlines()[-1])
    words = [f"--photos {args.photos} --entries {args.entries} --blocks {args.blocks} --steps {args.steps}",
             f"--batch-size {args.batch_size}", *["--cifar10 cifar10-jpeg"] * bool(args.cifar10)]  # fmt: skip
    result = dict(command=" ".join(["python benchmarks/folders.py", *words]), device="cpu", threads=torch.get_num_threads(),
                  torch=torch.__version__, pillow=Image.__version__, **result)  # fmt: skip
    print(json.dumps(result, indent=2))
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
