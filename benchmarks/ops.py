"""The parts of a step against what one would write without thinking of speed, as ratios taken in one run.

    python benchmarks/ops.py --output benchmarks/results/ops-cpu.json

- info_nce against a row-by-row loop in Python, N = 512 pairs of 128 numbers, forward and backward;
- the pair of views against torchvision's transforms on PIL images with the same recipe, on one thread;
- ema_update against a loop that rebinds `.data` of every parameter, on a ResNet-18.

Each pair runs in the order A B B A; a block gives one ratio; the result is their geometric mean and their range.
"""

import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torchvision
import tyro
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import transforms as T

import simclr
from byol import ema_update


@dataclass
class Args:
    """Ratios of the parts of a step."""

    blocks: int = 8
    """blocks of A B B A"""
    n: int = 512
    """pairs of embeddings; images of a batch of views"""
    output: Optional[str] = None
    """write the result to this JSON file"""


def rowwise_info_nce(z1, z2, temperature):
    """NT-Xent as a first listing has it: a row of the similarity matrix at a time, exp and sum in Python's loop."""
    z = torch.nn.functional.normalize(torch.cat([z1, z2]), dim=1)
    n, losses = len(z1), []
    for i in range(2 * n):
        row = torch.nn.functional.cosine_similarity(z[i : i + 1], z) / temperature
        others = torch.exp(row).sum() - torch.exp(row[i])
        losses.append(-torch.log(torch.exp(row[(i + n) % (2 * n)]) / others))
    return torch.stack(losses).mean()


def rebinding_ema(target, online, ema):
    """The usual listing: a new tensor for every parameter."""
    for old, new in zip(target.parameters(), online.parameters()):
        old.data = ema * old.data + (1 - ema) * new.data


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(slow, fast, blocks):
    """Time of slow / time of fast."""
    slow(), fast()
    ratios = []
    for _ in range(blocks):
        a1, b1, b2, a2 = seconds(slow), seconds(fast), seconds(fast), seconds(slow)
        ratios.append((a1 + a2) / (b1 + b2))
    mean = math.exp(statistics.mean(map(math.log, ratios)))
    return dict(ratio=round(mean, 2), lowest=round(min(ratios), 2), highest=round(max(ratios), 2), blocks=blocks)


def main(args):
    torch.manual_seed(0)
    result = {}

    z1, z2 = torch.randn(2, args.n, 128).requires_grad_().unbind()
    ours, theirs = simclr.info_nce(z1, z2, 0.5).item(), rowwise_info_nce(z1, z2, 0.5).item()
    result["info_nce"] = compare(lambda: rowwise_info_nce(z1, z2, 0.5).backward(),
                                 lambda: simclr.info_nce(z1, z2, 0.5).backward(), args.blocks)  # fmt: skip
    result["info_nce"]["difference"] = abs(ours - theirs)

    online, target = torchvision.models.resnet18(), torchvision.models.resnet18()
    few = 20  # one update takes a millisecond
    result["ema_update"] = compare(lambda: [rebinding_ema(target, online, 0.99) for _ in range(few)],
                                   lambda: [ema_update(target, online, 0.99) for _ in range(few)], args.blocks)  # fmt: skip

    torch.set_num_threads(1)
    pictures = [torch.tensor(p).permute(2, 0, 1) for p in load_sample_images().images]
    images = []
    for i in range(args.n):  # pieces of real photographs, 32 x 32
        picture = pictures[i % 2]
        top, left = (int(torch.randint(side - 96, ())) for side in picture.shape[1:])
        images.append(picture[:, top : top + 96 : 3, left : left + 96 : 3])
    images = torch.stack(images)
    pils = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    for name, blur in (("views", 0.0), ("views_with_blur", 0.5)):
        view = simclr.View(crop=(0.2, 1.0), flip_p=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grey_p=0.2, blur_p=blur)
        steps = [T.RandomResizedCrop(32, (0.2, 1.0)), T.RandomHorizontalFlip(),
                 T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), T.RandomGrayscale(0.2)]  # fmt: skip
        steps += [T.RandomApply([T.GaussianBlur(3)], blur)] if blur else []
        pipeline = T.Compose([*steps, T.ToTensor()])
        result[name] = compare(lambda: torch.stack([pipeline(image) for image in pils for _ in range(2)]),
                               lambda: simclr.two_views(images, (view, view)), args.blocks)  # fmt: skip

    result = dict(command=f"python benchmarks/ops.py --blocks {args.blocks} --n {args.n}", device="cpu",
                  torch=torch.__version__, torchvision=torchvision.__version__, **result)  # fmt: skip
    print(json.dumps(result, indent=2))
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
