"""The views against torchvision, or the parts of a step against another version of the files.

    python benchmarks/ops.py --output benchmarks/results/ops-cpu.json
    python benchmarks/ops.py --against ../before        # time of the files in ../before / time here

By default two views at 32 pixels, with and without blur, against torchvision's transforms on PIL
images; with --against also `info_nce` and `barlow_twins_loss` of 512 pairs, forward and backward,
and `ema_update` of a ResNet-18.

One thread. Each pair runs in the order A B B A; a block gives one ratio. Reported: their geometric
mean, its 95 % t-interval, and their range.
"""

import importlib.util
import json
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torchvision
import tyro
from PIL import Image
from sklearn.datasets import load_sample_images
from throughput import interval, processor_name
from torchvision import transforms as T


@dataclass
class Args:
    """Ratios of the parts of a step."""

    blocks: int = 8
    """blocks of A B B A"""
    n: int = 512
    """pairs of embeddings, and images of a batch"""
    against: str | None = None
    """folder of another version of the files to compare with"""
    output: str | None = None
    """write the result to this JSON file"""


def photo_pieces(n):
    """n pieces of scikit-learn's two photographs, uint8 [n, 3, 32, 32]."""
    pictures = [torch.tensor(p).permute(2, 0, 1) for p in load_sample_images().images]
    images = []
    for i in range(n):
        picture = pictures[i % 2]
        top, left = (int(torch.randint(side - 96, ())) for side in picture.shape[1:])
        images.append(picture[:, top : top + 96 : 3, left : left + 96 : 3])
    return torch.stack(images)


def torchvision_views(images, blur):
    """A function that draws two views of every image by torchvision's transforms."""
    pils = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    steps = [T.RandomResizedCrop(32, (0.2, 1.0)), T.RandomHorizontalFlip()]
    jitter = T.ColorJitter(0.4, 0.4, 0.4, 0.1)
    steps += [T.RandomApply([jitter], 0.8), T.RandomGrayscale(0.2)]
    steps += [T.RandomApply([T.GaussianBlur(3)], blur)] if blur else []
    pipeline = T.Compose([*steps, T.ToTensor()])
    return lambda: torch.stack([pipeline(image) for image in pils for _ in range(2)])


def load(folder, name):
    """A method file of another folder, as a module under another name."""
    spec = importlib.util.spec_from_file_location(f"{name}_of_{folder}", Path(folder, f"{name}.py"))
    # dataclasses look their module up.
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ours(folder, inputs):
    """The parts in the files of a folder: functions by name."""
    simclr, byol, barlow_twins = (load(folder, f) for f in ("simclr", "byol", "barlow_twins"))
    (z1, z2), images, networks = inputs
    blurred = simclr.AUGMENT["photo"]
    if isinstance(blurred, list):
        # Older versions had a View for each of the two.
        plain = [replace(view, blur_p=0.0) for view in blurred]
    else:
        plain = replace(blurred, blur_p=(0.0, 0.0))
    return {
        "info_nce": lambda: simclr.info_nce(z1, z2, 0.5).backward(),
        "barlow_twins_loss": lambda: barlow_twins.barlow_twins_loss(z1, z2, 0.0051).backward(),
        "views": lambda: simclr.two_views(images, plain),
        "views_with_blur": lambda: simclr.two_views(images, blurred),
        # One update takes a millisecond.
        "ema_update": lambda: [byol.ema_update(*networks, 0.99) for _ in range(20)],
    }


def seconds(call, least=0.0):
    """Seconds per call; it is repeated until `least` seconds have passed."""
    calls, start = 0, time.perf_counter()
    while not calls or time.perf_counter() - start < least:
        call()
        calls += 1
    return (time.perf_counter() - start) / calls


def compare(slow, fast, blocks):
    """Time of slow / time of fast."""
    slow(), fast()
    ratios = []
    for _ in range(blocks):
        a1, b1, b2, a2 = (seconds(call, 0.1) for call in (slow, fast, fast, slow))
        ratios.append((a1 + a2) / (b1 + b2))
    return dict(interval(ratios), lowest=round(min(ratios), 4), highest=round(max(ratios), 4))


def main(args):
    """Compare every part, print and write the ratios."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pair = torch.randn(2, args.n, 128).requires_grad_().unbind()
    networks = torchvision.models.resnet18(), torchvision.models.resnet18()
    inputs = pair, photo_pieces(args.n), networks
    here = ours(ROOT, inputs)
    if args.against:
        other = ours(args.against, inputs)
    else:
        options = dict(views=0.0, views_with_blur=0.5)
        other = {name: torchvision_views(inputs[1], blur) for name, blur in options.items()}
    command = shlex.join(["python", "benchmarks/ops.py", *sys.argv[1:]])
    result = dict(command=command, device=processor_name(), torch=torch.__version__)
    for name, call in other.items():
        result[name] = compare(call, here[name], args.blocks)
        print(name, *(f"{key} {value}" for key, value in result[name].items()), flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
