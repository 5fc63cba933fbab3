"""The three methods against lightly's, at equal cost: kNN accuracy, paired by seed.

    python benchmarks/versus_lightly.py --data-dir cifar10-jpeg
    python benchmarks/versus_lightly.py --data-dir cifar10-jpeg --methods byol --seeds 1 2

Protocol, written before the first run. Data: CIFAR-10 as JPEG files (quality 75), the first 1,000
training images of each class, all 10,000 test images. ResNet-10 of width 16, batch 64, 30 epochs,
bf16, the last epoch is evaluated, by scikit-learn alone: majority of the 20 nearest (cosine), and
of 200 weighted by exp(similarity / 0.1). Within a seed all sides start from the same encoder; in
arm A also from the same heads.

- lightly: its transforms on PIL images, heads, losses and EMA, in the recipe of its CIFAR-10
  benchmark: SGD, lr 0.06 x batch / 128, weight decay 5e-4 on all parameters, cosine per epoch.
- arm A: that recipe in the functions of our method file. BYOL's loss here is 4 times lightly's,
  Barlow Twins' is divided by D: lr and weight decay are scaled so that the updates are the same.
- arm B: our own recipe, `python METHOD.py` with the encoder, batch size and epochs above.
- Controls: the untrained encoder, raw pixels, shuffled labels (of arm A's features), and a bug
  planted in arm A that the protocol must notice: BYOL without predictor, Barlow Twins with
  lambda 0. (Added later: lambda 0 went unnoticed, as Barlow Twins learns next to nothing in arm A,
  so it was also planted in arm B, "bug B", to be compared with arm B.) Also recorded: how far three
  updates of both sides on the same views are apart, for SimCLR also where lightly's side runs both
  views as one batch, as ours does: lightly has a forward for each view, so its batch normalization
  sees half as many images.

The result is the mean difference over at least 5 seeds with its 95 % t-interval. A method is
"equivalent" only if the 90 % interval lies within 1 point of zero, which is the two one-sided
tests' criterion. Every run appends a line to --output, and recorded runs are not repeated:
processes with different --methods or --seeds can share the work. lightly is not in
requirements.txt.
"""

import copy
import importlib
import itertools
import math
import shlex
import tempfile
from dataclasses import dataclass

import numpy as np
import torch
from accuracy import ROOT, append, first_of_each_class, recorded, run
from sklearn.neighbors import KNeighborsClassifier
from throughput import NETWORK, OWN, lightly_loss, lightly_transform, pil_loader
from torch import nn

import common

SIDES = ("lightly", "arm A", "arm B", "bug", "bug B")
NO_BUG = {("simclr", "bug"), ("simclr", "bug B"), ("byol", "bug B")}
SETTING = "--encoder resnet10 --width 16 --batch-size 64 --epochs 30 --precision bf16"
BATCH, EPOCHS = 64, 30
# lightly's gradient / ours, at the same embeddings.
SCALE = dict(simclr=1, byol=1 / 4, barlow_twins=2048)


@dataclass
class Args:
    """Train the methods and lightly's, record the accuracy of each run."""

    data_dir: str
    """CIFAR-10 as files: train/<class>/* and test/<class>/*"""
    methods: tuple[str, ...] = ("simclr", "byol", "barlow_twins")
    """method files"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    """seeds of each method and side"""
    sides: tuple[str, ...] = SIDES
    """sides to train"""
    output: str = str(ROOT / "benchmarks/results/versus-lightly-cpu.jsonl")
    """file to append the lines to"""


def start(method, seed):
    """The encoder that `python METHOD.py --seed SEED` starts from, and lightly's heads for it."""
    from lightly.models.modules import heads

    common.seed_draws(seed, "weights")
    encoder, dim = common.build_encoder("resnet10", 32, 16)
    if method == "simclr":
        return encoder, heads.SimCLRProjectionHead(dim, 512, 128), None
    if method == "byol":
        projector = heads.BYOLProjectionHead(dim, 1024, 256)
        return encoder, projector, heads.BYOLPredictionHead(256, 1024, 256)
    norm = nn.BatchNorm1d(2048)
    blocks = [(dim, 2048, norm, nn.ReLU()), (2048, 2048, None, None)]
    return encoder, heads.ProjectionHead(blocks), None


def view_of(method):
    """The views of lightly's recipe."""
    view = importlib.import_module(method).View
    base = dict(crop=(0.08, 1.0), flip_p=0.5, grayscale_p=0.2)
    if method == "simclr":
        return view(jitter=(0.4, 0.4, 0.4, 0.1), **base)
    return view(jitter=(0.4, 0.4, 0.2, 0.1), solarize_p=(0.0, 0.2), **base)


def optimizer_for(network, scale=1):
    """lightly's optimizer, for a loss that is `scale` times smaller than lightly's."""
    params = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.SGD(params, lr=0.0, momentum=0.9, weight_decay=5e-4 / scale)


def lightly_side(method, seed, one_forward=False):
    """The encoder, and step(pair of views, lr) by lightly's public API.

    one_forward: both views in one forward, which is not how lightly does it.
    """
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    encoder, projector, predictor = start(method, seed)
    online = nn.Sequential(encoder, projector).to(memory_format=torch.channels_last)
    network, target = nn.ModuleList([online, predictor or nn.Identity()]), copy.deepcopy(online)
    deactivate_requires_grad(target)
    optimizer, loss_of = optimizer_for(network), lightly_loss(method, **OWN[method])

    def step(pair, lr, amp_dtype=torch.bfloat16):
        if predictor:
            update_momentum(online, target, m=OWN[method]["ema"])
        with torch.autocast("cpu", amp_dtype, amp_dtype is not None):
            out = online(torch.cat(pair)).chunk(2) if one_forward else [online(v) for v in pair]
            if predictor:
                out = [*map(predictor, out), *(target(v).detach() for v in pair)]
            loss = loss_of(out)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return encoder, step


def our_side(method, seed, bug=False):
    """The encoder, and step(pair of views, lr) by our method file, in lightly's recipe."""
    module = importlib.import_module(method)
    encoder, projector, predictor = start(method, seed)
    own, scale = dict(OWN[method]), SCALE[method]
    if method == "byol":
        network = module.BYOL(encoder, 1, projection_layers=0)
        network.online.projector = projector
        network.target = copy.deepcopy(network.online).requires_grad_(False)
        network.predictor = nn.Identity() if bug else predictor
    else:
        network = getattr(module, NETWORK[method])(encoder, 1)
        network.projector = projector
    if bug and method == "barlow_twins":
        own["lambd"] = 0.0
    network.to(memory_format=torch.channels_last)
    optimizer, scaler = optimizer_for(network, scale), torch.amp.GradScaler(enabled=False)

    def step(pair, lr, amp_dtype=torch.bfloat16):
        settings = dict(lr=lr * scale, amp_dtype=amp_dtype, **own)
        module.train_step(network, optimizer, scaler, *pair, **settings)

    return encoder, step


def lightly_pairs(method, seed, images):
    """A function of the epoch that yields its pairs of views by lightly's transform."""
    normalize = images.mean.flatten().tolist(), images.std.flatten().tolist()
    transform = lightly_transform(view_of(method), 32, *normalize)
    loader = pil_loader(images.train, transform, BATCH)
    # lightly's own random ops draw from NumPy.
    np.random.seed(seed)
    layout = dict(memory_format=torch.channels_last)
    return lambda epoch: ([v.contiguous(**layout) for v in pair] for pair in loader)


def our_pairs(method, seed, images):
    """A function of the epoch that yields its pairs of views by our two_views."""
    two_views, view = importlib.import_module(method).two_views, view_of(method)

    def pairs(epoch):
        for rows in common.epoch_order(len(images.train), BATCH, seed, epoch):
            yield two_views(images.train[rows], view, 32, images.mean, images.std)

    return pairs


def update_difference(method, images, **how):
    """Relative difference of three updates of both sides on the same views, in float32."""
    sides = lightly_side(method, 1, **how), our_side(method, 1)
    before = weights(start(method, 1)[0])
    for pair in itertools.islice(our_pairs(method, 1, images)(0), 3):
        for _, step in sides:
            step(pair, 0.03, None)
    theirs, ours = (weights(encoder) for encoder, _ in sides)
    return float((ours - theirs).norm() / (theirs - before).norm())


def weights(encoder):
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in encoder.parameters()])


def accuracies(encoder, images, shuffle=False):
    """kNN accuracy by scikit-learn; encoder None: of the pixels."""
    train, test = (getattr(images, part).flatten(1).numpy() / 255 for part in ("train", "test"))
    if encoder:
        train, test = (common.embed(encoder, images, part) for part in ("train", "test"))
    labels, truth = images.train_labels.numpy(), images.test_labels.numpy()
    if shuffle:
        labels = np.random.default_rng(0).permutation(labels)
    found = {}
    for k, weights in ((20, "uniform"), (200, lambda d: np.exp((1 - d) / 0.1))):
        model = KNeighborsClassifier(k, weights=weights, metric="cosine", algorithm="brute")
        found[f"k{k}"] = round(100 * model.fit(train, labels).score(test, truth), 2)
    return found


def train(method, side, seed, images, folder):
    """Train one side; returns its encoder."""
    if side in ("arm B", "bug B"):
        flags = [*shlex.split(SETTING), "--seed", str(seed), "--dataset", "folder"]
        flags += ["--lambd", "0"] * (side == "bug B")
        with tempfile.TemporaryDirectory() as place:
            run(f"{method}.py", *flags, "--data-dir", folder, "--run-dir", f"{place}/run")
            return common.load_encoder(f"{place}/run/encoder.pt")[0]
    if side == "lightly":
        (encoder, step), draw = lightly_side(method, seed), lightly_pairs
    else:
        (encoder, step), draw = our_side(method, seed, bug=side == "bug"), our_pairs
    pairs = draw(method, seed, images)
    common.seed_draws(seed, "views")
    for epoch in range(EPOCHS):
        # As torch's CosineAnnealingLR.
        lr = 0.06 * BATCH / 128 * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
        for pair in pairs(epoch):
            step(pair, lr)
    return encoder


def main(args):
    """Every side of every method and seed, and the controls."""
    done = recorded(args.output, "method", "side", "seed")

    def record(method, side, seed, result):
        append(args.output, method=method, side=side, seed=seed, **result)
        print(method, side, seed, result, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        first_of_each_class(args.data_dir, folder, 1000, 1000)
        images = common.load_images("folder", folder, cache_dir=f"{folder}/cache")
        if ("pixels", "control", 0) not in done:
            record("pixels", "control", 0, accuracies(None, images))
        for seed, method, side in itertools.product(args.seeds, args.methods, args.sides):
            if (method, "update", 1) not in done:
                done.add((method, "update", 1))
                apart = dict(difference=update_difference(method, images))
                if method == "simclr":
                    apart["one_forward"] = update_difference(method, images, one_forward=True)
                record(method, "update", 1, apart)
            if ("untrained", "control", seed) not in done:
                done.add(("untrained", "control", seed))
                encoder = start("simclr", seed)[0]
                record("untrained", "control", seed, accuracies(encoder, images))
            if (method, side, seed) in done or (method, side) in NO_BUG:
                continue
            encoder = train(method, side, seed, images, folder)
            record(method, side, seed, accuracies(encoder, images))
            if side == "arm A" and seed == 1:
                shuffled = accuracies(encoder, images, shuffle=True)
                record(method, "shuffled labels", seed, shuffled)


if __name__ == "__main__":
    common.cli(Args, main)
