"""Samples per second of the three scripts' own training step, beside its parts and beside the same work in lightly.

    python benchmarks/throughput.py --compile --output benchmarks/results/throughput-h200.json  # a GPU, full size
    python benchmarks/throughput.py --no-lightly --variant="--compile" --profile                # eager against compiled
    python benchmarks/throughput.py --batch-size 32 --images 640 --warmup 2 --steps 2 --blocks 6  # a CPU

A sample is one image, two views. The contenders of a method:

- step: the script's own main(args), evaluation off, paused between turns after a step of its loop;
- model: the same with the views of the first batch kept, so that forward, loss, backward and update are left;
- views: the script's two_views alone, called as the script calls it;
- variant: main(args) with the flags of --variant as well;
- lightly tuned, lightly shipped: lightly's transform in a DataLoader, its heads and its loss, with the same encoder,
  widths, batch size, parameters of the views, and batches that BatchNorm sees. Shipped: float32 and 8 workers, as its
  examples. Tuned: the script's precision (and --compile), channels_last, a persistent worker a core, pinned memory;
- again: step once more, which shows the noise.

All are warmed up, and then take turns in one process in the order A B C C B A: a block, which gives one ratio of each
pair. What is reported is their geometric mean with a 95 % t-interval over the blocks. lightly (github.com/lightly-ai)
is not among the requirements: install it, or leave it out by --no-lightly.
"""

import contextlib
import copy
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import platform
import shlex
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional, Tuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
import tyro  # noqa: E402
from accuracy import commit  # noqa: E402
from PIL import Image  # noqa: E402
from scipy import stats  # noqa: E402  (comes with scikit-learn)
from torch import nn  # noqa: E402

import common  # noqa: E402

SHIPPED_WORKERS = 8  # of the DataLoader in lightly's examples
PAIRS = ("step/model", "step/views", "again/step", "variant/step", "step/lightly tuned", "step/lightly shipped")


@dataclass
class Args:
    """Samples per second of training steps, and ratios between them."""

    methods: Tuple[Literal["simclr", "byol", "barlow_twins"], ...] = ("simclr", "byol", "barlow_twins")
    """which methods"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to compute"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """of the scripts and of lightly tuned"""
    compile: bool = False
    """torch.compile the networks of the scripts and of lightly tuned"""
    encoder: Optional[Literal["resnet10", "resnet18", "resnet34", "resnet50"]] = None
    """the network (unset, as in the next two, the recipe's: for photos resnet18)"""
    width: Optional[int] = None
    """channels of its first stage (64)"""
    batch_size: Optional[int] = None
    """images a step (512)"""
    data: Optional[str] = None
    """an .npz file of images (unset: random ones)"""
    images: int = 50000
    """how many random images"""
    image_size: int = 32
    """and their pixels a side"""
    extra: str = ""
    """more flags for the scripts, in one string, as in --extra="--dataset digits" """
    variant: Optional[str] = None
    """flags of a second training step to compare with the first"""
    lightly: bool = True
    """compare with lightly, which has to be installed"""
    shipped: bool = True
    """with lightly as shipped, too"""
    blocks: int = 8
    """blocks; each contender has two turns in each"""
    seconds: float = 5.0
    """of a turn"""
    steps: Optional[int] = None
    """steps of a turn, instead of --seconds"""
    warmup: int = 50
    """steps before anything is timed"""
    profile: bool = False
    """show by torch.profiler what takes the time of ten steps"""
    output: Optional[str] = None
    """write the result to this JSON file"""


# ------------------------------------------------------------------------------------------ contenders


class Script:
    """main(args) of a method file, in a thread that works only while `run` waits for it.

    It is the real file, loaded anew, so that what is replaced in it is replaced for this contender alone.
    """

    lead = 0  # untimed steps at the start of a turn

    def __init__(self, method, args, resident=False):
        spec = importlib.util.spec_from_file_location(f"{method}_{id(self)}", ROOT / f"{method}.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(module)
        self.two_views, module.two_views = module.two_views, self.draw
        self.resident, self.training, self.drawn, self.advanced, self.error = resident, False, None, 0, None
        self.around = contextlib.nullcontext()
        self.may_work, self.has_paused = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self.work, args=(module.main, args), daemon=True)
        self.thread.script = self
        self.thread.start()

    def work(self, main, args):
        self.may_work.acquire()
        try:
            main(args)
            self.error = RuntimeError("the script ended before its time")
        except BaseException as error:  # whatever it is, it is raised where the turn was asked for
            self.error = error
        self.has_paused.release()

    def draw(self, *args, **kwargs):
        """In place of two_views: the same, but that a resident contender keeps the views of its first step."""
        if not self.training:  # for views.png
            return self.two_views(*args, **kwargs)
        self.asked = args, kwargs
        if self.drawn is None:
            self.began = time.perf_counter()
        if self.drawn is None or not self.resident:
            self.drawn = self.two_views(*args, **kwargs)
        return self.drawn

    def advance(self):
        """After a step, in the script's thread."""
        self.advanced, self.left = self.advanced + 1, self.left - 1
        if self.left == 0:
            self.around.__exit__(None, None, None)
            self.has_paused.release()
            self.may_work.acquire()
            if self.left < 0:
                raise SystemExit
            self.around.__enter__()

    def run(self, steps):
        self.left = steps
        self.may_work.release()
        self.has_paused.acquire()
        if self.error:
            raise self.error

    def end(self):
        self.left = -1
        self.may_work.release()
        self.thread.join()


@contextlib.contextmanager
def hooks():
    """common.Run tells the script whose thread it works in when the loop starts, and after every step."""
    training, advance = common.Run.training, common.Run.advance

    def now_training(run, *args):
        threading.current_thread().script.training = True
        return training(run, *args)

    def now_advance(run, *args):
        advance(run, *args)
        threading.current_thread().script.advance()

    common.Run.training, common.Run.advance = now_training, now_advance
    try:
        yield
    finally:
        common.Run.training, common.Run.advance = training, advance


class Views:
    """The script's two_views, with the arguments of the script's last call."""

    lead = 0

    def __init__(self, script):
        self.script = script

    def run(self, steps):
        args, kwargs = self.script.asked
        for _ in range(steps):
            self.script.two_views(*args, **kwargs)

    def end(self):
        pass


class PilImages(torch.utils.data.Dataset):
    """uint8 [N, 3, H, W] as PIL images through a transform, as torchvision's CIFAR10 does it."""

    def __init__(self, images, transform):
        self.images, self.transform = images[:].permute(0, 2, 3, 1).contiguous().numpy(), transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i]))


class Lightly:
    """A training loop as lightly's examples have it, of the same work as the script's."""

    def __init__(self, method, config, views, normalize, images, device, tuned):
        from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform

        a, self.method, self.device, self.tuned = config["args"], method, device, tuned
        self.precision = config["precision"] if tuned else "fp32"
        transforms = [BYOLView1Transform(
            input_size=a["image_size"], cj_prob=view.jitter_p, cj_strength=1.0, cj_bright=view.jitter[0],
            cj_contrast=view.jitter[1], cj_sat=view.jitter[2], cj_hue=view.jitter[3], min_scale=view.crop[0],
            random_gray_scale=view.grey_p, gaussian_blur=view.blur_p, solarization_prob=view.solarize_p,
            hf_prob=view.flip_p, normalize=normalize) for view in views]  # fmt: skip
        workers = len(os.sched_getaffinity(0)) if tuned else SHIPPED_WORKERS
        more = dict(persistent_workers=True, pin_memory=device.type == "cuda") if tuned else {}
        dataset = PilImages(images, BYOLTransform(*transforms))
        more.update(shuffle=True, drop_last=True, num_workers=workers)
        self.loader = torch.utils.data.DataLoader(dataset, a["batch_size"], **more)
        self.lead = 2 * workers  # so many batches the workers have made before the turn
        self.batches = self.endless()
        torch.manual_seed(a["seed"])
        self.loss, network = self.build(a)
        self.network = network.to(device, memory_format=torch.channels_last if tuned else torch.preserve_format)
        self.model = torch.compile(self.network) if tuned and a["compile"] else self.network
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.06, momentum=0.9, weight_decay=5e-4)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")

    def build(self, a):
        """The loss of a batch as a function of model, v1 and v2, and the network."""
        from lightly import loss as losses
        from lightly.models.modules import heads

        encoder, dim = common.build_encoder(a["encoder"], a["image_size"], a["width"])
        sizes = a["hidden_dim"], a["projection_dim"]
        if self.method == "simclr":
            criterion = losses.NTXentLoss(a["temperature"])
            network = nn.Sequential(encoder, heads.SimCLRProjectionHead(dim, *sizes, a["projection_layers"]))
            return lambda model, v1, v2: criterion(*model(torch.cat([v1, v2])).chunk(2)), network
        if self.method == "barlow_twins":
            criterion = losses.BarlowTwinsLoss(a["lambd"])
            network = nn.Sequential(encoder, heads.BarlowTwinsProjectionHead(dim, *sizes))
            return lambda model, v1, v2: criterion(model(v1), model(v2)), network
        criterion = losses.NegativeCosineSimilarity()
        network = LightlyBYOL(
            encoder, heads.BYOLProjectionHead(dim, *sizes), heads.BYOLPredictionHead(sizes[1], *sizes)
        )

        def loss(model, v1, v2):
            p1, p2, z1, z2 = model(v1, v2)
            return 0.5 * (criterion(p1, z2) + criterion(p2, z1))

        return loss, network

    def endless(self):
        while True:
            yield from self.loader

    def run(self, steps):
        total, dtype = 0, dict(bf16=torch.bfloat16, fp16=torch.float16).get(self.precision)
        for _ in range(steps):
            v1, v2 = (v.to(self.device, non_blocking=self.tuned) for v in next(self.batches))
            if self.tuned:
                v1, v2 = (v.contiguous(memory_format=torch.channels_last) for v in (v1, v2))
            if self.method == "byol":
                from lightly.models.utils import update_momentum

                update_momentum(self.network.online, self.network.target, m=0.99)
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                loss = self.loss(self.model, v1, v2)
            total += loss.detach()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()

    def end(self):
        self.batches.close()


class LightlyBYOL(nn.Module):
    """Online and target encoder with lightly's heads."""

    def __init__(self, encoder, projector, predictor):
        super().__init__()
        self.online, self.predictor = nn.Sequential(encoder, projector), predictor
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, v1, v2):
        p1, p2 = (self.predictor(self.online(v)) for v in (v1, v2))
        with torch.no_grad():
            z1, z2 = self.target(v1), self.target(v2)
        return p1, p2, z1, z2


# ------------------------------------------------------------------------------------------ measuring


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def timed(contender, steps, device):
    synchronize(device)
    start = time.perf_counter()
    contender.run(steps)
    synchronize(device)
    return time.perf_counter() - start


def interval(ratios):
    """Geometric mean of ratios and its 95 % t-interval."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, half = statistics.mean(logs), math.nan
    if len(logs) > 1:
        half = stats.t.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    low, high = (None if math.isnan(half) else round(math.exp(mean + side * half), 4) for side in (-1, 1))
    return dict(ratio=round(math.exp(mean), 4), low=low, high=high, blocks=len(logs))


def profiled(script, device, steps=10):
    """What takes the time of some steps: name, share of the time, calls; the largest first. The table is printed."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    script.around = torch.profiler.profile(activities=activities)
    script.run(steps)
    table, script.around = script.around.key_averages(), contextlib.nullcontext()
    kind = "device" if device.type == "cuda" else "cpu"
    print(table.table(sort_by=f"self_{kind}_time_total", row_limit=25, max_name_column_width=70), file=sys.stderr)
    # On a GPU the kernels alone: what launched them has their time as well.
    kept = [row for row in table if kind == "cpu" or row.device_type.name == "CUDA"]
    kept = [row for row in kept if not getattr(row, "is_user_annotation", False)]
    rows = sorted(((getattr(row, f"self_{kind}_time_total"), row.key[:120], row.count) for row in kept), reverse=True)
    total = sum(row[0] for row in rows)
    return [dict(name=name, share=round(own / total, 4), calls=calls) for own, name, calls in rows[:20]]


class Memory:
    """Peak bytes on the GPU of one contender: what it holds between turns, and what it takes during them."""

    def __init__(self, device):
        self.cuda, self.peak = device.type == "cuda", 0
        self.before = torch.cuda.memory_allocated() if self.cuda else 0

    def started(self):
        self.held = torch.cuda.memory_allocated() - self.before if self.cuda else 0

    @contextlib.contextmanager
    def turn(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            now = torch.cuda.memory_allocated()
        yield
        if self.cuda:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - now + self.held)


def measure(method, args, data, folder, device):
    """All contenders of one method: their samples a second, ratios, and what else the JSON file says of them."""
    module = importlib.import_module(method)
    base = module.Args(device=args.device, precision=args.precision, compile=args.compile, dataset="npz", data_dir=data,
                       encoder=args.encoder, width=args.width, batch_size=args.batch_size, epochs=10**9, eval_every=0,
                       checkpoint_every=10**9)  # fmt: skip

    def flags(name, more=""):
        run_dir = str(Path(folder, f"{method}-{name}"))
        return tyro.cli(module.Args, args=[*shlex.split(f"{args.extra} {more}"), "--run-dir", run_dir], default=base)

    found, contenders, memory = {}, {}, {}

    def add(name, make):
        """Make, warm up, and choose how many steps a turn has."""
        print(f"{method}: {name}", file=sys.stderr, flush=True)
        memory[name], began = Memory(device), time.perf_counter()
        contender = contenders[name] = make()
        contender.run(1)
        synchronize(device)
        first = time.perf_counter() - getattr(contender, "began", began)
        contender.run(max(1, args.warmup // 2))
        memory[name].started()
        few = max(1, args.warmup - args.warmup // 2)
        seconds = timed(contender, few, device) / few
        steps = args.steps or max(1, math.ceil(args.seconds / seconds))
        found[name] = dict(steps_a_turn=steps, first_step_seconds=round(first, 3), seconds=0.0, rates=[])
        time.sleep(contender.lead * seconds)

    add("step", lambda: Script(method, flags("step")))
    config = json.loads(Path(folder, f"{method}-step", "args.json").read_text())
    batch_size = config["args"]["batch_size"]
    add("model", lambda: Script(method, flags("model"), resident=True))
    add("views", lambda: Views(contenders["step"]))
    if args.variant is not None:
        add("variant", lambda: Script(method, flags("variant", args.variant)))
    if args.lightly:
        views, a = contenders["step"].asked[0][1], config["args"]
        fits = all(
            v.crop != (1.0, 1.0) and v.crop[1] == 1.0 and not (v.turn or v.shift or v.zoom or v.noise) for v in views
        )
        common.check(fits, f"lightly has no such views as --augment {a['augment']}; add --no-lightly")
        layers = {"simclr": a["projection_layers"], "byol": 2, "barlow_twins": 3}[method]
        common.check(
            a["projection_layers"] == layers >= 2, f"lightly's head of {method} has {layers} layers; add --no-lightly"
        )
        images = common.load_images(a["dataset"], a["data_dir"], a["image_size"])
        normalize = dict(mean=images.mean, std=images.std)
        for tuned in (True, False) if args.shipped else (True,):
            add(f"lightly {'tuned' if tuned else 'shipped'}",
                lambda: Lightly(method, config, views, normalize, images.train, device, tuned))  # fmt: skip
    contenders["again"], memory["again"] = contenders["step"], memory["step"]
    found["again"] = {**found["step"], "rates": []}

    for block in range(args.blocks):
        print(f"{method}: block {block + 1} of {args.blocks}", file=sys.stderr, flush=True)
        spent = dict.fromkeys(contenders, 0.0)
        for name in [*contenders, *reversed(contenders)]:
            contender, steps = contenders[name], found[name]["steps_a_turn"]
            if contender.lead:
                contender.run(contender.lead)
            with memory[name].turn():
                seconds = timed(contender, steps, device)
            spent[name] += seconds
            time.sleep(
                contender.lead * seconds / steps
            )  # its workers fill their queue and rest, then the next one works
        for name, seconds in spent.items():
            found[name]["seconds"] += seconds
            found[name]["rates"].append(2 * found[name]["steps_a_turn"] * batch_size / seconds)

    kept = {
        key: value for key, value in config["args"].items() if key not in ("run_dir", "data_dir")
    }  # no machine's paths
    result = dict(args=kept, precision=config["precision"], contenders=found, ratios={})
    for pair in PAIRS:
        over, under = pair.split("/")
        if over in found and under in found:
            ratios = [a / b for a, b in zip(found[over]["rates"], found[under]["rates"])]
            result["ratios"][pair] = interval(ratios)
    for name, one in found.items():
        one.update(
            samples_per_sec=round(statistics.geometric_mean(one.pop("rates")), 1), seconds=round(one["seconds"], 3)
        )
        one["steps"] = 2 * args.blocks * one["steps_a_turn"]
        if isinstance(contenders[name], Script):
            one["steps_in_all"] = contenders[name].advanced  # with warm-up, as the loop itself counts them
        if device.type == "cuda":
            one["peak_gpu_bytes"] = memory[name].peak
    if args.profile:
        result["profile"] = profiled(contenders["step"], device)
    del contenders["again"]
    for contender in contenders.values():
        contender.end()
    return result


def main(args):
    """Every method, and the JSON file after each of them."""
    if args.lightly:
        common.check(
            importlib.util.find_spec("lightly"), "lightly is not installed; pip install lightly, or --no-lightly"
        )
    device = common.pick_device(args.device)
    common._interactive = lambda: False  # no progress bars of paused scripts
    versions = {name: importlib.metadata.version(name) for name in ("numpy", "lightly")[: 1 + args.lightly]}
    result = dict(
        command=shlex.join(["python", "benchmarks/throughput.py", *sys.argv[1:]]),
        device=torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        cores=len(os.sched_getaffinity(0)), threads=torch.get_num_threads(), commit=commit(),
        versions=dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__,
                      cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), **versions),
        methods={},
    )  # fmt: skip
    with hooks(), tempfile.TemporaryDirectory() as folder:
        data = args.data or str(Path(folder, "random.npz"))
        if not args.data:
            shape = (args.images, args.image_size, args.image_size, 3)
            np.savez(data, train_images=np.random.default_rng(0).integers(0, 256, shape, np.uint8))
        for method in args.methods:
            with contextlib.redirect_stdout(io.StringIO()):  # the scripts' lines
                found = result["methods"][method] = measure(method, args, data, folder, device)
            for name, one in found["contenders"].items():
                print(f"{method:13} {name:16} {one['samples_per_sec']:10.1f} samples/s")
            for pair, one in found["ratios"].items():
                print(f"{method:13} {pair:21} {one['ratio']:.3f} ({one['low']} to {one['high']})", flush=True)
            if args.output:
                Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    common.cli(Args, main)
