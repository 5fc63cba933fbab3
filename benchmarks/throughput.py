"""Samples per second of train_step and of its parts, next to the same work in lightly.

    python benchmarks/throughput.py --flags="--compile" --output benchmarks/results/throughput.json
    python benchmarks/throughput.py --no-lightly --flags="--compile" --variant="--no-compile"
    python benchmarks/throughput.py --flags="--batch-size 32" --images 640 --warmup 2 --seconds 2

A sample is one image, two views. The contenders of a method:

- step: a batch of random images, two_views and train_step, as main calls them;
- model: train_step alone, on the same two views (forward, backward, update);
- views: two_views alone;
- variant: step with the flags of --variant;
- lightly tuned, lightly shipped: lightly's transform in a DataLoader and its loss, with the same
  network, batch size and parameters of the views. Shipped: float32 and 8 workers, as in its
  examples. Tuned: the precision of step, channels_last, a persistent worker per core;
- again: step once more, which shows the noise.

All are warmed up, then take turns in one process in the order A B C C B A: a block, which gives one
ratio of each pair. Batches that lightly's workers made before a turn are not counted. Reported:
geometric mean and 95 % t-interval over the blocks. lightly is not in requirements.txt: install it,
or use --no-lightly.
"""

import importlib
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace

import joblib
import numpy as np
import torch
import tyro
from accuracy import write
from PIL import Image
from scipy import stats
from torch.utils.data import DataLoader, default_collate

import common

PAIRS = ["step/model", "step/views", "again/step", "variant/step"]
PAIRS += ["step/lightly tuned", "step/lightly shipped"]


@dataclass
class Args:
    """Samples per second of training steps, and ratios between them."""

    methods: tuple[str, ...] = ("simclr", "byol", "barlow_twins")
    """method files"""
    flags: str = ""
    """flags of the methods, in one string, as in --flags="--compile --batch-size 128" """
    images: int = 50000
    """number of random images"""
    image_size: int = 32
    """their side in pixels"""
    variant: str | None = None
    """more flags, of a second step to compare with"""
    lightly: bool = True
    """compare with lightly"""
    shipped: bool = True
    """also as shipped, which takes long where a step does"""
    blocks: int = 8
    """blocks; each contender has two turns in each"""
    seconds: float = 5.0
    """length of a turn"""
    warmup: int = 50
    """steps before anything is timed"""
    profile: bool = False
    """print what takes the time of ten steps"""
    output: str | None = None
    """write the result to this JSON file"""


# Each method's network, and its own arguments of train_step.
NETWORK = dict(simclr="SimCLR", byol="BYOL", barlow_twins="BarlowTwins")
OWN = dict(simclr=dict(temperature=0.5), byol=dict(ema=0.99), barlow_twins=dict(lambd=5e-3))


def network_of(method, args, size):
    """The network of a method file."""
    encoder, dim = common.build_encoder(args.encoder, size, args.width)
    heads = args.hidden_dim, args.projection_dim, args.projection_layers
    return getattr(importlib.import_module(method), NETWORK[method])(encoder, dim, *heads)


class Step:
    """The steps of a method file's main, without its run folder."""

    # untimed steps at the start of a turn
    lead = 0

    def __init__(self, method, args, images, fresh_views=True, train=True):
        self.module = importlib.import_module(method)
        self.args = args = common.resolve(args, self.module.RECIPES)
        self.device, self.amp_dtype = common.set_up(args)
        self.images, self.fresh_views, self.train = images.to(self.device), fresh_views, train
        size = images.shape[2]
        self.view = self.module.choose_view(args.augment, False, size)
        network = network_of(method, args, size)
        network.to(self.device, memory_format=torch.channels_last)
        self.own = OWN[method]
        self.optimizer = self.module.make_optimizer(network, args.weight_decay)
        fp16 = self.amp_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.model = common.distribute(network, self.device, args.compile)
        self.two_views = self.module.two_views
        if args.compile and self.device.type == "cuda":
            self.two_views = torch.compile(self.two_views, options=dict(layout_optimization=False))
        self.pair = self.draw()

    def draw(self):
        rows = torch.randint(len(self.images), (self.args.batch_size,), device=self.device)
        return self.two_views(self.images[rows], self.view, None, 0.5, 0.25)

    def run(self, steps):
        for _ in range(steps):
            v1, v2 = self.draw() if self.fresh_views else self.pair
            if self.train:
                settings = dict(lr=0.01, amp_dtype=self.amp_dtype, **self.own)
                self.module.train_step(self.model, self.optimizer, self.scaler, v1, v2, **settings)


def pil_loader(images, transform, batch_size, **options):
    """A DataLoader of uint8 images [N, 3, H, W] through a transform of PIL images."""
    pils = [*map(Image.fromarray, images.permute(0, 2, 3, 1).contiguous().numpy())]
    options |= dict(shuffle=True, drop_last=True)
    options["collate_fn"] = lambda batch: default_collate([transform(pil) for pil in batch])
    return DataLoader(pils, batch_size, **options)


def lightly_transform(view, size, mean, std):
    """lightly's transform of PIL images with the parameters of a View of a method file."""
    from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform

    transforms = []
    for blur_p, solarize_p in zip(view.blur_p, view.solarize_p):
        names = ("cj_bright", "cj_contrast", "cj_sat", "cj_hue")
        transform = BYOLView1Transform(
            **dict(zip(names, view.jitter)),
            cj_prob=view.jitter_p,
            cj_strength=1.0,
            random_gray_scale=view.grayscale_p,
            gaussian_blur=blur_p,
            solarization_prob=solarize_p,
            hf_prob=view.flip_p,
            input_size=size,
            min_scale=view.crop[0],
            normalize=dict(mean=mean, std=std),
        )
        transforms.append(transform)
    return BYOLTransform(*transforms)


def lightly_loss(method, temperature=0.5, ema=0.0, lambd=5e-3):
    """lightly's loss of a network's output."""
    from lightly import loss as losses

    if method == "byol":
        criterion = losses.NegativeCosineSimilarity()
        return lambda out: 0.5 * (criterion(out[0], out[3]) + criterion(out[1], out[2]))
    simclr = method == "simclr"
    criterion = losses.NTXentLoss(temperature) if simclr else losses.BarlowTwinsLoss(lambd)
    return lambda out: criterion(*out)


class Lightly(Step):
    """The same network with lightly's transform in a DataLoader and lightly's loss."""

    def __init__(self, method, args, images, tuned):
        super().__init__(method, args, images)
        transform = lightly_transform(self.view, images.shape[2], [0.5] * 3, [0.25] * 3)
        workers = joblib.cpu_count() if tuned else 8
        more = dict(persistent_workers=tuned, pin_memory=tuned and self.device.type == "cuda")
        loader = pil_loader(images, transform, self.args.batch_size, num_workers=workers, **more)
        self.batches = (batch for _ in iter(int, 1) for batch in loader)
        # The batches that a DataLoader makes ahead of a turn.
        self.lead = 2 * workers
        self.loss, self.layout = lightly_loss(method, **self.own), torch.channels_last
        if not tuned:
            self.layout = torch.contiguous_format
            self.model.to(memory_format=self.layout)
            # Its momentum has the layout of the weights.
            self.optimizer = self.module.make_optimizer(self.model, self.args.weight_decay)

    def run(self, steps):
        from lightly.models.utils import update_momentum

        for _ in range(steps):
            v1, v2 = (v.to(self.device, non_blocking=True) for v in next(self.batches))
            v1, v2 = (v.contiguous(memory_format=self.layout) for v in (v1, v2))
            if hasattr(self.model, "target"):
                update_momentum(self.model.online, self.model.target, m=0.99)
            with torch.autocast(self.device.type, self.amp_dtype, self.amp_dtype is not None):
                loss = self.loss(self.model(v1, v2))
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()


def timed(contender, steps):
    """Seconds of some steps, with the device idle before and after."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    contender.run(contender.lead)
    synchronize()
    start = time.perf_counter()
    contender.run(steps)
    synchronize()
    seconds = time.perf_counter() - start
    # The workers of a DataLoader fill their queue again before the next contender's turn.
    time.sleep(contender.lead * seconds / steps)
    return seconds


def interval(ratios):
    """Geometric mean of ratios and its 95 % t-interval."""
    logs = np.log(ratios)
    low, high = stats.ttest_1samp(logs, 0).confidence_interval()
    low, ratio, high = np.exp([low, logs.mean(), high]).round(4).tolist()
    return dict(ratio=ratio, low=low, high=high, blocks=len(logs))


def contenders_of(method, args, images):
    """Everything that takes a turn, by name."""
    args_class = importlib.import_module(method).Args
    base = tyro.cli(args_class, args=["--dataset", "cifar10", *shlex.split(args.flags)])
    step = Step(method, base, images)
    found = dict(step=step, model=Step(method, base, images, fresh_views=False))
    found["views"] = Step(method, base, images, train=False)
    if args.variant is not None:
        changed = tyro.cli(args_class, args=shlex.split(args.variant), default=base)
        found["variant"] = Step(method, changed, images)
    if args.lightly:
        found["lightly tuned"] = Lightly(method, base, images, tuned=True)
    if args.lightly and args.shipped:
        shipped = replace(base, precision="fp32", compile=False)
        found["lightly shipped"] = Lightly(method, shipped, images, tuned=False)
    return {**found, "again": step}


def profile(step):
    """Print the operators that take the time of ten steps."""
    with torch.profiler.profile() as profiler:
        step.run(10)
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=25), file=sys.stderr)


def measure(method, contenders, args):
    """Samples per second of every contender of one method, and ratios."""
    steps, rates = {}, {name: [] for name in contenders}
    for name, contender in contenders.items():
        timed(contender, max(1, args.warmup))
        steps[name] = max(1, math.ceil(args.seconds / timed(contender, 1)))
    for block in range(args.blocks):
        print(f"{method}: block {block + 1} of {args.blocks}", file=sys.stderr, flush=True)
        spent = dict.fromkeys(contenders, 0.0)
        for name in [*contenders, *reversed(contenders)]:
            spent[name] += timed(contenders[name], steps[name])
        for name, seconds in spent.items():
            samples = 2 * steps[name] * contenders["step"].args.batch_size
            rates[name].append(samples / seconds)
    ratios = {}
    for pair in PAIRS:
        over, under = pair.split("/")
        if over in rates and under in rates:
            ratios[pair] = interval(np.divide(rates[over], rates[under]))
    means = {name: round(stats.gmean(found), 1) for name, found in rates.items()}
    settings = asdict(contenders["step"].args)
    return dict(args=settings, samples_per_sec=means, ratios=ratios)


def main(args):
    """Every method, and the JSON file after each of them."""
    shape = args.images, 3, args.image_size, args.image_size
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    methods = {}
    for method in args.methods:
        contenders = contenders_of(method, args, images)
        found = methods[method] = measure(method, contenders, args)
        for name, rate in found["samples_per_sec"].items():
            print(f"{method:13} {name:16} {rate:10.1f} samples/s")
        for pair, row in found["ratios"].items():
            print(f"{method:13} {pair:21} {row['ratio']:.3f} ({row['low']} to {row['high']})")
        if args.output:
            write(args.output, methods=methods, threads=torch.get_num_threads())
        if args.profile:
            profile(contenders["step"])


if __name__ == "__main__":
    common.cli(Args, main)
