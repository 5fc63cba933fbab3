"""two_views against torchvision's transforms on PIL images.

    python benchmarks/ops.py

Two views at 32 pixels, with and without blur, on one thread. Each pair runs in the order A B B A; a
block gives one ratio. Reported: their geometric mean, its 95 % t-interval, and their range.
"""

import functools
import timeit
from dataclasses import dataclass, replace

import torch
import tyro
from accuracy import ROOT, write
from PIL import Image
from throughput import interval
from torchvision import transforms as T

import simclr


@dataclass
class Args:
    """Ratios of the views."""

    blocks: int = 8
    """blocks of A B B A"""
    n: int = 512
    """images of a batch"""
    output: str = str(ROOT / "benchmarks/results/ops-cpu.json")
    """JSON file to write"""


def torchvision_views(images, blur):
    """A function that draws two views of every image by torchvision's transforms."""
    pils = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    steps = [T.RandomResizedCrop(32, (0.2, 1.0)), T.RandomHorizontalFlip()]
    jitter = T.ColorJitter(0.4, 0.4, 0.4, 0.1)
    steps += [T.RandomApply([jitter], 0.8), T.RandomGrayscale(0.2)]
    steps += [T.RandomApply([T.GaussianBlur(3)], blur)] if blur else []
    pipeline = T.Compose([*steps, T.ToTensor()])
    return lambda: torch.stack([pipeline(image) for image in pils for _ in range(2)])


def seconds(call):
    """Seconds per call; it is repeated until 0.2 seconds have passed."""
    calls, total = timeit.Timer(call).autorange()
    return total / calls


def compare(slow, fast, blocks):
    """Time of slow / time of fast."""
    slow(), fast()
    ratios = []
    for _ in range(blocks):
        a1, b1, b2, a2 = map(seconds, (slow, fast, fast, slow))
        ratios.append((a1 + a2) / (b1 + b2))
    return dict(interval(ratios), lowest=round(min(ratios), 4), highest=round(max(ratios), 4))


def main(args):
    """Compare, print and write the ratios."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images = torch.randint(0, 256, (args.n, 3, 32, 32), dtype=torch.uint8)
    result = {}
    for name, blur in dict(views=0.0, views_with_blur=0.5).items():
        view = replace(simclr.PHOTO_VIEW, blur_p=(blur, blur))
        ours = functools.partial(simclr.two_views, images, view)
        result[name] = compare(torchvision_views(images, blur), ours, args.blocks)
        print(name, *(f"{key} {value}" for key, value in result[name].items()), flush=True)
    write(args.output, **result)


if __name__ == "__main__":
    main(tyro.cli(Args))
