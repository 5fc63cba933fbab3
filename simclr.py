"""SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709): one file, from the pair of views to the saved encoder.

    python simclr.py                                    # scikit-learn's digits: no download, no GPU, a few minutes
    python simclr.py --dataset cifar10 --track          # downloads CIFAR-10 into data/, logs to Weights & Biases
    python simclr.py --dataset folder --data-dir photos --run-dir runs/photos --resume
    python knn_eval.py                                  # judges the runs under runs/ by their nearest neighbours

A run leaves args.json, log.jsonl, checkpoint.pt, encoder.pt, embeddings.npz and three pictures in its folder.
To use the method in your own code, copy this file: all above `main` needs PyTorch only, and `main` needs common.py.
Implementation details and differences from the paper: README.md, section SimCLR.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Literal, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Args:
    """SimCLR. A flag left unset takes the recipe of the data set: RECIPES in simclr.py."""

    # run
    seed: int = 1
    """seed of the weights, the order of the images and their views"""
    run_dir: Optional[str] = None
    """folder of the run (unset: a new one under runs/)"""
    resume: bool = False
    """go on with the run in --run-dir, or start it where there is none"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to compute"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs of capability 8.0 and up, fp16 on older ones, fp32 elsewhere"""
    compile: bool = False
    """torch.compile the network: a minute at the start, then faster on recent GPUs"""
    deterministic: bool = False
    """the same bytes from the same seed on a GPU too, more slowly (a CPU gives them always)"""
    track: bool = False
    """log to Weights & Biases"""
    wandb_project: str = "ssl"
    """project there"""
    wandb_entity: Optional[str] = None
    """user or team there"""
    # data
    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "stl10", "folder", "npz"] = "digits"
    """digits needs no download; folder and npz are your own images"""
    data_dir: str = "data"
    """folder of the data set's files; for folder the root of the images; for npz the file"""
    cache_dir: str = "cache"
    """where the images of a folder are kept once they are decoded"""
    image_size: Optional[int] = None
    """pixels a side (unset: the images' own, at most 224)"""
    augment: Literal["auto", "photo", "symbol", "none"] = "auto"
    """photo: crops, flips, colours; symbol: shifts, zooms, turns, no flips; none: two identical copies"""
    encoder: Optional[Literal["resnet10", "resnet18", "resnet34", "resnet50"]] = None
    """torchvision's network, resnet10 with one block a stage; a 3x3 stem without max-pool up to 64 pixels"""
    width: Optional[int] = None
    """channels of the encoder's first stage (64 is torchvision's)"""
    # method
    temperature: Optional[float] = None
    """divides the cosine similarities"""
    hidden_dim: Optional[int] = None
    """width of the projector's hidden layers"""
    projection_dim: Optional[int] = None
    """width of the embedding z"""
    projection_layers: Optional[int] = None
    """linear layers of the projector; 0: none, z is h"""
    # optimisation
    epochs: Optional[int] = None
    """passes over the training images; 0 writes the untrained encoder's embeddings"""
    batch_size: Optional[int] = None
    """images a step"""
    lr: Optional[float] = None
    """peak learning rate of SGD"""
    weight_decay: Optional[float] = None
    """on weights; biases and norms have none"""
    warmup_epochs: Optional[float] = None
    """epochs of linear warm-up before the cosine to zero"""
    # evaluation
    eval_every: int = 10
    """epochs between kNN evaluations on the test split (0: only at the end); nothing is chosen by them"""
    knn_k: int = 20
    """neighbours of the kNN evaluation"""
    knn_temperature: Optional[float] = None
    """weigh their votes by exp(similarity / temperature) (unset: majority)"""
    checkpoint_every: int = 10
    """epochs between checkpoints"""


PHOTO = dict(augment="photo", encoder="resnet18", width=64,
             temperature=0.5, hidden_dim=512, projection_dim=128, projection_layers=2,
             epochs=200, batch_size=512, lr=0.24, weight_decay=5e-4, warmup_epochs=10)  # fmt: skip
SYMBOL = dict(PHOTO, augment="symbol", encoder="resnet10", width=32,
              epochs=75, batch_size=128, lr=0.1, weight_decay=1e-4, warmup_epochs=5)  # fmt: skip
RECIPES = {
    "digits": SYMBOL, "mnist": SYMBOL, "fashion_mnist": PHOTO, "cifar10": PHOTO, "cifar100": PHOTO,
    "stl10": PHOTO, "folder": PHOTO, "npz": PHOTO,
}  # fmt: skip


# ------------------------------------------------------------------------------------------ views


@dataclass(frozen=True)
class View:
    """How one view is drawn. Every image draws for itself; `_p` is the probability that an image gets the op."""

    crop: Tuple[float, float] = (1.0, 1.0)  # share of the area that a random resized crop keeps
    flip_p: float = 0.0
    turn: float = 0.0  # degrees, either way
    shift: float = 0.0  # share of the side, either way
    zoom: float = 0.0  # 1 +- zoom
    warp_p: float = 1.0  # turn, shift and zoom together
    jitter: Tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    grey_p: float = 0.0
    blur_p: float = 0.0
    solarize_p: float = 0.0
    noise: float = 0.0  # largest standard deviation of added grey Gaussian noise


PHOTO_VIEW = View(crop=(0.2, 1.0), flip_p=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grey_p=0.2, blur_p=0.5)
SYMBOL_VIEW = View(turn=10, shift=0.1, zoom=0.1, warp_p=0.5, jitter=(0.6, 0.0, 0.0, 0.0), noise=0.2)
AUGMENT = {"photo": (PHOTO_VIEW, PHOTO_VIEW), "symbol": (SYMBOL_VIEW, SYMBOL_VIEW), "none": (View(), View())}


def crop_boxes(n, height, width, scale, device):
    """RandomResizedCrop's boxes for n images: top, left, height, width, whole numbers in float32 [n].

    As torchvision: the first of ten tries that fits, aspect ratio 3/4 to 4/3; where none fits, the whole image.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * torch.rand(n, 10, device=device))
    ratio = (math.log(4 / 3) * (2 * torch.rand(n, 10, device=device) - 1)).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.float().argmax(1, keepdim=True)
    w = torch.where(fits.any(1), w.gather(1, first)[:, 0], width)
    h = torch.where(fits.any(1), h.gather(1, first)[:, 0], height)
    top = torch.minimum((torch.rand(n, device=device) * (height - h + 1)).floor(), height - h)
    left = torch.minimum((torch.rand(n, device=device) * (width - w + 1)).floor(), width - w)
    return top, left, h, w


def crop_resize(x, top, left, height, width, flip, size):
    """Crop a box [N] from each image of x [N, C, H, W], flip where flip [N] says, resize bilinearly to size x size."""
    centres = (torch.arange(size, device=x.device) + 0.5) / size

    def axis(start, length, full, unit):  # where to sample, clamped to the crop's own pixels, in grid_sample's units
        pixels = start[:, None] + unit * length[:, None] - 0.5
        pixels = torch.minimum(torch.maximum(pixels, start[:, None]), (start + length - 1)[:, None])
        return (2 * pixels + 1) / full - 1

    xs = axis(left, width, x.shape[3], torch.where(flip[:, None], 1 - centres, centres))
    ys = axis(top, height, x.shape[2], centres)
    grid = torch.stack([xs[:, None, :].expand(-1, size, -1), ys[:, :, None].expand(-1, -1, size)], dim=3)
    return F.grid_sample(x, grid, align_corners=False)


def affine(x, degrees, shift_x, shift_y, zoom):
    """Turn clockwise by degrees, zoom, then shift by a share of the side, each [N]; outside is black."""
    cos, sin = (degrees * math.pi / 180).cos() / zoom, (degrees * math.pi / 180).sin() / zoom
    dx, dy = 2 * shift_x, 2 * shift_y  # affine_grid measures the image from -1 to 1
    theta = torch.stack([cos, sin, -cos * dx - sin * dy, -sin, cos, sin * dx - cos * dy], dim=1)
    grid = F.affine_grid(theta.view(-1, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def to_grey(x):
    """Luma [N, 1, H, W] of x [N, 3, H, W]."""
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def adjust_hue(x, shift):
    """Shift the hue of x [N, 3, H, W] by shift [N] turns of the colour circle."""
    r, g, b = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    safe = chroma.where(chroma > 0, 1)
    sector = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    sector = (sector + 6 * shift.view(-1, 1, 1))[:, None]
    k = sector + torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)  # 5, 3, 1 for red, green, blue
    k = k - 6 * (k / 6).floor()  # k % 6, which is several times slower on a CPU
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def color_jitter(x, factors, hue, order):
    """Brightness, contrast and saturation by factors [N, 3], in the order [N, 3] of each image, and the hue by hue [N].

    The hue comes before step i * 4 // N of image i (0: first, 3: last), so that it is computed once for each image: let
    the caller shuffle. Needs N >= 4 for all 24 orders. Equals torchvision's functional ops one after the other.
    """
    x = x.clone()
    bounds = [-(-len(x) * t // 4) for t in range(5)]
    for t in range(4):
        part = slice(bounds[t], bounds[t + 1])
        x[part] = adjust_hue(x[part], hue[part])
        if t < 3:
            op, grey = order[:, t].view(-1, 1, 1, 1), to_grey(x)
            base = torch.where(op == 2, grey, torch.where(op == 1, grey.mean((2, 3), keepdim=True), 0))
            x = torch.lerp(base, x, factors.gather(1, order[:, t : t + 1]).view(-1, 1, 1, 1)).clamp_(0, 1)
    return x


def gaussian_blur(x, sigma, size):
    """Blur x [N, C, H, W] by a Gaussian of `size` pixels (odd) and standard deviation sigma [N]; edges are reflected."""
    taps = torch.arange(size, device=x.device) - size // 2
    weights = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).view(-1, size, 1, 1, 1)
    height, width = x.shape[2:]
    x = F.pad(x, [size // 2] * 4, mode="reflect")
    x = sum(weights[:, i] * x[:, :, i : i + height] for i in range(size))
    return sum(weights[:, i] * x[:, :, :, i : i + width] for i in range(size))


@torch.no_grad()
def augment(images, view, size):
    """One random view [N, 3, size, size] in [0, 1] of uint8 images [N, 3, H, W]; every image draws for itself."""
    n, device = len(images), images.device

    def uniform(low, high, *shape):
        return torch.rand(n, *shape, device=device) * (high - low) + low

    def chosen(p):
        return (torch.rand(n, device=device) < p).view(-1, 1, 1, 1)

    shuffle = torch.rand(n, device=device).argsort()  # for color_jitter
    x = images[shuffle].float() / 255
    if view.crop != (1.0, 1.0) or view.flip_p or (size, size) != x.shape[2:]:
        x = crop_resize(x, *crop_boxes(n, *x.shape[2:], view.crop, device), chosen(view.flip_p).view(-1), size)
    if view.turn or view.shift or view.zoom:
        degrees, dx, dy, zoom = (torch.rand(n, 4, device=device) * 2 - 1).mul(chosen(view.warp_p).view(-1, 1)).T
        x = affine(x, view.turn * degrees, view.shift * dx, view.shift * dy, 1 + view.zoom * zoom)
    if any(view.jitter):
        change = torch.stack([uniform(-most, most) for most in view.jitter], dim=1) * chosen(view.jitter_p).view(-1, 1)
        x = color_jitter(x, (1 + change[:, :3]).clamp(min=0), change[:, 3], torch.rand(n, 3, device=device).argsort(1))
    if view.grey_p:
        x = torch.where(chosen(view.grey_p), to_grey(x), x)
    if view.blur_p:
        x = torch.where(chosen(view.blur_p), gaussian_blur(x, uniform(0.1, 2.0), max(3, size // 10 | 1)), x)
    if view.solarize_p:
        x = torch.where(chosen(view.solarize_p) & (x >= 0.5), 1 - x, x)
    if view.noise:
        x = (x + uniform(0, view.noise, 1, 1, 1) * torch.randn_like(x[:, :1])).clamp(0, 1)  # the same in all channels
    return x[shuffle.argsort()]


def two_views(images, views=AUGMENT["photo"], size=None, mean=0.0, std=1.0):
    """Two random views v1, v2 of uint8 images [N, 3, H, W]: float32 [N, 3, size, size], (view in [0, 1] - mean) / std."""
    size = size or images.shape[2]
    # On a CPU small parts stay in its cache; on a GPU one large part costs fewer launches.
    parts = images.split(max(16, 2**17 // size**2) if images.device.type == "cpu" else len(images))
    v1, v2 = (torch.cat([augment(part, view, size) for part in parts]) for view in views)
    return tuple(((v - mean) / std).contiguous(memory_format=torch.channels_last) for v in (v1, v2))


# ------------------------------------------------------------------------------------------ network and loss


def mlp(in_dim, hidden_dim, out_dim, layers):
    """`layers` linear layers with BatchNorm and ReLU between them, and none after the last; 0 layers: the identity."""
    widths = [in_dim] + [hidden_dim] * (layers - 1) + [out_dim]
    modules = []
    for before, after in zip(widths, widths[1:] if layers else []):
        modules += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*modules[:-2])


class SimCLR(nn.Module):
    """Any encoder from images to features h [N, feature_dim], and the projector from h to z [N, projection_dim]."""

    def __init__(self, encoder, feature_dim, hidden_dim=512, projection_dim=128, projection_layers=2):
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(feature_dim, hidden_dim, projection_dim, projection_layers)

    def forward(self, v1, v2):
        # One forward over both views, as in the paper's code: BatchNorm sees the 2N views as one batch.
        return self.projector(self.encoder(torch.cat([v1, v2]))).chunk(2)


def info_nce(z1, z2, temperature=0.5, everyone=None):
    """NT-Xent, equation 1 of the paper. z1, z2 [N, D]: embeddings of the two views, any float dtype, not normalised.

    Each of the 2N views picks its partner among the other 2N - 1; the mean cross-entropy in float32 (float64 stays).
    Several processes: everyone = (z1, z2 of all [M, D], the row in them of this process's first). Its 2N views then pick
    among all 2M - 1, and the mean of the processes' losses is the loss of the whole batch.
    """
    all_z1, all_z2, first = everyone or (z1, z2, 0)
    with torch.autocast(z1.device.type, enabled=False):
        dtype = torch.promote_types(z1.dtype, torch.float32)
        z = F.normalize(torch.cat([z1, z2]).to(dtype), dim=1)
        all_z = z if all_z1 is z1 else F.normalize(torch.cat([all_z1, all_z2]).to(dtype), dim=1)
        own = torch.arange(first, first + len(z1), device=z.device)
        own, partner = torch.cat([own, own + len(all_z1)]), torch.cat([own + len(all_z1), own])
        logits = (z @ all_z.T / temperature).scatter(1, own[:, None], -math.inf)
        return F.cross_entropy(logits, partner)


def learning_rate(step, steps, warmup_steps, lr):
    """Linear warm-up to lr over warmup_steps, then a cosine to zero at `steps`: a pure function of the step."""
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def make_optimizer(network, weight_decay):
    """SGD with momentum 0.9; weight decay on matrices and kernels, none on biases and norms.

    The network has to be on its device already: the momentum is made there.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in trained if p.ndim > 1], weight_decay=weight_decay),
              dict(params=[p for p in trained if p.ndim <= 1], weight_decay=0.0)]  # fmt: skip
    fused = trained[0].device.type in ("cpu", "cuda")  # with it a GradScaler skips steps without asking the GPU
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=fused)
    for p in trained:  # else the fused one leaves its momentum uninitialised where the first step is skipped
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


# ------------------------------------------------------------------------------------------ main


def main(args):
    """Train by the flags in args, write the run folder, and return its path."""
    import common

    args = replace(args, **{k: v for k, v in RECIPES[args.dataset].items() if getattr(args, k) in (None, "auto")})
    common.check_args(args)
    common.check(0 < args.temperature < math.inf, f"--temperature {args.temperature} must be above 0 and finite")
    device = common.pick_device(args.device, args.deterministic)
    common.join_processes(device)
    precision = common.pick_precision(args.precision, device)
    run = common.Run("simclr", args)
    images = run.images = common.load_images(args.dataset, args.data_dir, args.image_size, device, args.cache_dir)
    run.args = args = replace(args, image_size=images.size)
    steps_per_epoch = common.count_steps(len(images.train), args)
    steps, warmup_steps = args.epochs * steps_per_epoch, round(args.warmup_epochs * steps_per_epoch)

    views = AUGMENT[args.augment]
    if images.grey:  # colour means nothing there
        views = tuple(replace(view, jitter=(*view.jitter[:2], 0.0, 0.0), grey_p=0.0) for view in views)
    if args.image_size <= 64:  # no blur on small images, as in the paper's CIFAR-10 recipe
        views = tuple(replace(view, blur_p=0.0) for view in views)
    mean, std = (torch.tensor(m, device=device).view(3, 1, 1) for m in (images.mean, images.std))
    common.seed_step(args.seed, 0, stream=1)
    encoder, feature_dim = common.build_encoder(args.encoder, args.image_size, args.width)
    network = SimCLR(encoder, feature_dim, args.hidden_dim, args.projection_dim, args.projection_layers)
    network.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(network, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    modules = dict(network=network, optimizer=optimizer, scaler=scaler)

    first_step, stats, one = 0, None, torch.ones((), device=device)
    if run.checkpoint:
        run.restore(steps_per_epoch, **modules)
        first_step, stats = run.checkpoint["step"], run.checkpoint["stats"].to(device)
    run.start(device, precision, views=[vars(view) for view in views])
    common.seed_step(args.seed, 0, stream=2)
    pictured = images.train[:: math.ceil(len(images.train) / 8)].cpu()  # of all classes, which may come in order
    pairs = [view for _ in range(3) for view in two_views(pictured, views, args.image_size)]
    common.draw_views(run.dir / "views.png", pictured, pairs)
    model = common.distribute(network, device)
    model = torch.compile(model) if args.compile else model
    autocast = torch.autocast(device.type, dict(bf16=torch.bfloat16, fp16=torch.float16).get(precision),
                              enabled=precision != "fp32")  # fmt: skip

    batches = common.feed(images.train, args, first_step, device)
    with run.training(first_step, steps):
        for epoch in range(first_step // max(1, steps_per_epoch), args.epochs):
            start, first = time.perf_counter(), max(0, first_step - epoch * steps_per_epoch)
            if first == 0:
                stats = torch.zeros(steps_per_epoch, 3, device=device)  # of every step: loss, spread, skipped
            for i in range(first, steps_per_epoch):
                step = epoch * steps_per_epoch + i
                lr = learning_rate(step, steps, warmup_steps, args.lr)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                common.seed_step(args.seed, step)
                v1, v2 = two_views(next(batches), views, args.image_size, mean, std)
                with autocast:
                    z1, z2 = model(v1, v2)
                loss = info_nce(z1, z2, args.temperature, common.gather(z1, z2))
                optimizer.zero_grad(set_to_none=True)
                scale = scaler.scale(one)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                skipped = scaler.scale(one) < scale  # in fp16: gradients overflowed, so the scale was lowered
                stats[i] = torch.stack([loss, common.spread(z1), skipped]).detach()
                run.advance(i, stats, lr, epoch + 1, step)
                if run.stopped:
                    break
            done, now = step + 1, epoch + 1
            if done == now * steps_per_epoch:
                seconds = time.perf_counter() - start
                record = dict(epoch=now, step=done, **run.averages(stats), lr=lr, seconds=seconds,
                              samples_per_sec=(done - first - epoch * steps_per_epoch) * args.batch_size / seconds)  # fmt: skip
                if args.eval_every and now % args.eval_every == 0:
                    record.update(run.knn(network.encoder, images))
                run.log(record)
            if run.stopped or now % args.checkpoint_every == 0 or now == args.epochs:
                run.save_checkpoint(done, stats, **modules)
            if run.stopped:
                run.stop()
    run.finish(network.encoder, images, feature_dim)
    return run.dir


if __name__ == "__main__":
    from common import cli

    cli(Args, main)
