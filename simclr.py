"""SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709) in one file.

    python simclr.py                                   # scikit-learn's digits: no download
    python simclr.py --dataset cifar10 --track         # downloads it, logs to W&B
    python simclr.py --dataset folder --data-dir photos --run-dir runs/photos --resume
    python knn_eval.py                                 # evaluates the runs under runs/

CIFAR-10 (JPEG q75), 25 epochs of a ResNet-10 of width 16 in bf16, 33 minutes on one core of an
AMD EPYC: kNN accuracy 66.4 %, 69.3 % with whitened features, seeds 1 to 3; raw pixels 36.7 %
(benchmarks/cifar10.py --cpu). Digits, default flags, seeds 1 to 3: 84.6 % from one label per class,
98.4 % from all; raw pixels 65.4 % and 98.1 % (benchmarks/accuracy.py). PyTorch 2.14, torchvision
0.29.

Everything above `main` needs PyTorch only: copy this file to use the method in your own code.
Implementation details and differences from the paper: README.md, section SimCLR.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Args:
    """SimCLR. Unset flags take the recipe of the data set (RECIPES in this file)."""

    # run
    seed: int = 1
    """seed of the weights, the order of the images and their views"""
    run_dir: str | None = None
    """folder of the run (unset: a new one under runs/)"""
    resume: bool = False
    """resume from --run-dir; start fresh if it is empty"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """device to train on"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs of capability 8.0 and up, fp16 on older ones, fp32 elsewhere"""
    compile: bool = False
    """torch.compile network and (on a GPU) views: a slow start, and no gain on a CPU"""
    deterministic: bool = False
    """bitwise reproducible on a GPU, but slower (CPU runs always are reproducible)"""
    track: bool = False
    """log to Weights & Biases"""
    wandb_project: str = "ssl"
    """Weights & Biases project"""
    # data
    dataset: Literal[
        "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "stl10", "folder", "npz"
    ] = "digits"
    """digits needs no download; folder and npz are your own images"""
    data_dir: str = "data"
    """where data sets are downloaded; for folder the root of the images, for npz the file"""
    labels: str | None = None
    """for folder: a CSV file with the columns file and label (and split, group)"""
    window: tuple[float, float] | None = None
    """for images with more than 8 bits: values of black and white (unset: their percentiles)"""
    fit: Literal["crop", "pad", "stretch"] | None = None
    """how images become square (unset: crop, or that of --init)"""
    cache_dir: str = "cache"
    """where the decoded images of a folder are kept"""
    image_size: int | None = None
    """side of the encoder's input in pixels (unset: that of the images, at most 224)"""
    augment: Literal["auto", "photo", "overhead", "symbol", "none"] = "auto"
    """auto: recipe's; photo: crops, flips, color; overhead: rotations too; symbol: shifts, zooms"""
    encoder: Literal["resnet10", "resnet18", "resnet34", "resnet50"] | None = None
    """torchvision's ResNet (resnet10: one block a stage); a 3x3 stem up to 64 pixels"""
    init: str | None = None
    """start from an encoder.pt, a state dict with torchvision's keys, or imagenet"""
    width: int | None = None
    """channels of the encoder's first stage, at least 16 (64 is torchvision's)"""
    # method
    temperature: float | None = None
    """divides the cosine similarities"""
    hidden_dim: int | None = None
    """width of the projector's hidden layers"""
    projection_dim: int | None = None
    """width of the embedding z"""
    projection_layers: int | None = None
    """linear layers of the projector (0: z is h)"""
    # optimization
    epochs: int | None = None
    """passes over the training images (unset: more if few); 0: evaluate the initial encoder"""
    batch_size: int | None = None
    """global batch size (unset: at most a quarter of the images)"""
    lr: float | None = None
    """peak learning rate (unset: the recipe's, scaled linearly with --batch-size)"""
    weight_decay: float | None = None
    """weight decay, not applied to biases and norms"""
    warmup_epochs: float | None = None
    """epochs of linear warm-up before the cosine decay; at most half of the run"""
    # evaluation
    eval_every: int = 10
    """epochs between kNN evaluations on the test split (0: only the last epoch)"""
    knn_k: int = 20
    """neighbors of the kNN evaluation"""
    checkpoint_every: int = 10
    """epochs between checkpoints"""


PHOTO = dict(augment="photo", encoder="resnet18", width=64,
             temperature=0.2, hidden_dim=512, projection_dim=128, projection_layers=2,
             epochs=200, batch_size=512, lr=0.48, weight_decay=5e-4, warmup_epochs=10)  # fmt: skip
SYMBOL = dict(PHOTO, augment="symbol", encoder="resnet10", width=32, temperature=0.5,
              epochs=75, batch_size=128, lr=0.1, weight_decay=1e-4, warmup_epochs=5)  # fmt: skip
RECIPES = dict.fromkeys("fashion_mnist cifar10 cifar100 stl10 folder npz".split(), PHOTO)
RECIPES |= dict(digits=SYMBOL, mnist=SYMBOL)


# ---------------------------------------------------------------- views


@dataclass(frozen=True)
class View:
    """Distribution of the views. Every image draws its own parameters; *_p are probabilities."""

    # area of the random resized crop, as a share of the image
    crop: tuple = (1.0, 1.0)
    flip_p: float = 0.0
    # largest rotation in degrees, shift as a share of the side, change of scale
    rotate: float = 0.0
    shift: float = 0.0
    zoom: float = 0.0
    warp_p: float = 0.0
    # brightness, contrast, saturation, hue
    jitter: tuple = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.8
    grayscale_p: float = 0.0
    # of the first and the second view
    blur_p: tuple = (0.0, 0.0)
    solarize_p: tuple = (0.0, 0.0)
    # largest standard deviation of added gray noise
    noise: float = 0.0
    # flips upside down and quarter turns
    turn_p: float = 0.0


PHOTO_VIEW = View(
    (0.2, 1.0), flip_p=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grayscale_p=0.2, blur_p=(0.5, 0.5)
)
OVERHEAD_VIEW = View((0.2, 1.0), flip_p=0.5, turn_p=0.5, jitter=(0.2, 0.2, 0.2, 0.05))
SYMBOL_VIEW = View(rotate=10, shift=0.1, zoom=0.1, warp_p=0.5, jitter=(0.6, 0, 0, 0), noise=0.2)
AUGMENT = dict(photo=PHOTO_VIEW, overhead=OVERHEAD_VIEW, symbol=SYMBOL_VIEW, none=View())


def choose_view(augment, gray, image_size):
    """The View settings: without color ops on gray images, without blur up to 64 pixels."""
    view = AUGMENT[augment]
    if gray:
        view = replace(view, jitter=(*view.jitter[:2], 0, 0), grayscale_p=0.0)
    # As in the paper's CIFAR-10 recipe.
    return replace(view, blur_p=(0.0, 0.0)) if image_size <= 64 else view


def uniform(x, low, high, *shape):
    """Random numbers between low and high, float32 of this shape, on the device of x."""
    return low + (high - low) * torch.rand(shape, device=x.device)


def crop_boxes(x, scale):
    """RandomResizedCrop's box of each image x [N, C, H, W]: top, left, height, width, each [N, 1].

    As torchvision: the first of ten tries that fits, aspect ratio 3/4 to 4/3, else the whole image.
    """
    n, _, height, width = x.shape
    area = height * width * uniform(x, *scale, n, 10)
    ratio = uniform(x, -math.log(4 / 3), math.log(4 / 3), n, 10).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    # An eleventh try that always fits: the whole image.
    w, h = F.pad(w, (0, 1), value=width), F.pad(h, (0, 1), value=height)
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.float().argmax(1, keepdim=True)
    w, h = w.gather(1, first), h.gather(1, first)
    top = uniform(x, 0, height - h + 1, n, 1).floor()
    left = uniform(x, 0, width - w + 1, n, 1).floor()
    return top, left, h, w


def crop_resize(x, top, left, height, width, flip, size):
    """Crop a box of each image x [N, C, H, W], flip where `flip`, each [N, 1]; resize to `size`."""
    # For much larger images, average several samples per pixel (antialiasing).
    samples = max(1, round(x.shape[2] / size))
    side = samples * size
    centers = (torch.arange(side, device=x.device) + 0.5) / side

    def axis(start, length, full, positions):
        # Sampling positions in grid_sample's units, clamped to the pixels of the crop.
        pixels = (start + positions * length - 0.5).clamp(start, start + length - 1)
        return (2 * pixels + 1) / full - 1

    xs = axis(left, width, x.shape[3], torch.where(flip, 1 - centers, centers))
    ys = axis(top, height, x.shape[2], centers)
    grid = torch.stack(torch.broadcast_tensors(xs[:, None], ys[:, :, None]), dim=3)
    x = F.grid_sample(x, grid, align_corners=False)
    return F.avg_pool2d(x, samples) if samples > 1 else x


def affine(x, degrees, shift_x, shift_y, zoom):
    """Rotate clockwise, zoom, then shift by a share of the side, each [N]; outside is black."""
    radians = degrees * math.pi / 180
    cos, sin = radians.cos() / zoom, radians.sin() / zoom
    # affine_grid measures the image from -1 to 1.
    dx, dy = 2 * shift_x, 2 * shift_y
    theta = torch.stack([cos, sin, -cos * dx - sin * dy, -sin, cos, sin * dx - cos * dy], dim=1)
    grid = F.affine_grid(theta.view(-1, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def luma(x):
    """Weights [C] of the channels of x [N, C, H, W] in its gray image; equal unless C is 3."""
    channels = x.shape[1]
    weights = [0.2989, 0.587, 0.114] if channels == 3 else [1 / channels] * channels
    # Filled on the device: a copy from the host could wait.
    return torch.stack([torch.full((), weight, device=x.device) for weight in weights])


def adjust_hue(x, shift):
    """Shift the hue of x [N, 3, H, W] by shift [N] turns of the color circle."""
    r, g, b = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    # Hue in sixths of the circle, first times chroma.
    sixths = torch.add(r - g, chroma, alpha=4)
    sixths = torch.where(value == g, torch.add(b - r, chroma, alpha=2), sixths)
    sixths = torch.where(value == r, g - b, sixths).div_(chroma.clamp(min=1e-12))
    # Distance of the new hue from red, green and blue, in turns.
    turns = 1.5 + shift.view(-1, 1, 1, 1) - torch.arange(3, device=x.device).view(3, 1, 1) / 3
    distance = torch.add(turns, sixths[:, None], alpha=1 / 6).frac_().sub_(0.5).abs_()
    # Up to a sixth a channel has the full value, from a third on the lowest.
    full = (value + chroma)[:, None]
    return torch.addcmul(full, chroma[:, None], distance.clamp_(1 / 6, 1 / 3), value=-6)


def color_jitter(x, factors, hue, order):
    """Brightness, contrast, saturation by factors [N, 3] in each image's order [N, 3], and hue [N].

    Overwrites x. Equals torchvision's functional ops one after the other. The first quarter of the
    images gets the hue first, the last quarter last, so that this costly op runs once per image:
    pass the images in random order.
    """
    n, weights = len(x), luma(x)
    cuts = [n * i // 4 for i in (1, 2, 3)]
    # Blends with black (op 0), the mean gray (1) or gray (2): x -> matrix x + to_mean mean(x).
    order, factors = order[..., None, None], factors.gather(1, order)[..., None, None]
    to_mean = (1 - factors) * (order == 1) * weights[:, None]
    eye = torch.eye(len(weights), device=x.device)
    matrices = torch.lerp((order == 2) * weights, eye, factors)

    def blend(t, rows):
        part = x[rows]
        mean = part.mean((2, 3))[:, None] @ to_mean[rows, t]
        blended = torch.baddbmm(mean, matrices[rows, t], part.flatten(2)).view_as(part)
        # part is a view of x, which changes here.
        torch.clamp(blended, 0, 1, out=part)

    # Blends before the hue: of all but the first quarter, of the last two, of the last.
    for t, cut in enumerate(cuts):
        blend(t, slice(cut, n))
    if len(weights) == 3:
        x = adjust_hue(x, hue)
    # After it: of the first quarter, of the first two, of all but the last.
    for t, cut in enumerate(cuts):
        blend(t, slice(0, cut))
    return x


def gaussian_blur(x, sigma, size):
    """Blur x [N, C, H, W] by a Gaussian of sigma [N] pixels and `size` taps (odd)."""
    taps = torch.arange(size, device=x.device) - size // 2
    weights = (-0.5 * (taps / sigma[:, None]) ** 2).softmax(1)
    # Each channel of each image has its own filter, first along columns, then along rows.
    filters = weights.repeat_interleave(x.shape[1], 0)[:, None, :, None]
    padded = F.pad(x, [size // 2] * 4, mode="reflect").flatten(0, 1)[None]
    blurred = F.conv2d(padded, filters, groups=len(filters))
    return F.conv2d(blurred, filters.mT, groups=len(filters)).view_as(x)


def augment(images, view, size):
    """Two random views of uint8 images [N, C, H, W]: float32 [2N, C, size, size] in [0, 1].

    Returns them in the random order that color_jitter needs, and that order [2N]: i stands for the
    first view of image i, N + i for its second.
    """
    n, m = len(images), 2 * len(images)
    order = torch.rand(m, device=images.device).argsort()
    x = images[order % n] / 255

    def chosen(p):
        # p: of all views, or of the first and the second.
        p = torch.where(order < n, *p) if isinstance(p, tuple) else p
        return (torch.rand(m, device=x.device) < p).view(m, 1, 1, 1)

    if view.crop != (1.0, 1.0) or view.flip_p or (size, size) != x.shape[2:]:
        x = crop_resize(x, *crop_boxes(x, view.crop), chosen(view.flip_p).flatten(1), size)
    if view.turn_p:
        x = torch.where(chosen(view.turn_p), x.flip(2), x)
        # Where x comes first, its memory layout stays.
        x = torch.where(chosen(1 - view.turn_p), x, x.mT)
    if view.warp_p:
        degrees, dx, dy, zoom = (uniform(x, -1, 1, m, 4) * chosen(view.warp_p).flatten(1)).T
        x = affine(x, view.rotate * degrees, view.shift * dx, view.shift * dy, 1 + view.zoom * zoom)
    if any(view.jitter):
        change = torch.stack([uniform(x, -most, most, m) for most in view.jitter], dim=1)
        change = change * chosen(view.jitter_p).flatten(1)
        ops = uniform(x, 0, 1, m, 3).argsort(1)
        x = color_jitter(x, (1 + change[:, :3]).clamp(min=0), change[:, 3], ops)
    if view.grayscale_p:
        eye = torch.eye(x.shape[1], device=x.device)
        mix = torch.where(chosen(view.grayscale_p).flatten(2), luma(x), eye)
        x = (mix @ x.flatten(2)).view_as(x)
    if any(view.blur_p):
        # A sigma of almost zero changes nothing. The filter is a tenth of the side, odd.
        sigma = torch.where(chosen(view.blur_p).flatten(), uniform(x, 0.1, 2.0, m), 1e-3)
        x = gaussian_blur(x, sigma, max(3, 2 * (size // 20) + 1))
    if any(view.solarize_p) and x.shape[1] == 3:
        # Inverts what is above a half.
        limit = torch.where(chosen(view.solarize_p), 1.0, 2.0)
        x = torch.minimum(x, limit - x)
    if view.noise:
        # The same in all channels.
        noise = uniform(x, 0, view.noise, m, 1, 1, 1) * torch.randn_like(x[:, :1])
        x = (x + noise).clamp_(0, 1)
    return x, order


@torch.no_grad()
def two_views(images, view=PHOTO_VIEW, size=None, mean=0.0, std=1.0):
    """Two random views v1, v2 of uint8 images [N, C, H, W]: float32 [N, C, size, size].

    They are channels_last. Values are (view in [0, 1] - mean) / std; mean and std are numbers or
    tensors [C, 1, 1]. Every image draws its own parameters.
    """
    assert images.dtype == torch.uint8, f"two_views needs uint8 images, not {images.dtype}"
    n, channels, height = images.shape[:3]
    size = size or height
    # On a CPU small parts stay in its cache; on a GPU one large part launches fewer kernels. With
    # two images or more, a part has all four places of the hue in color_jitter.
    parts = math.ceil(n * size**2 / 65536) if images.device.type == "cpu" else 1
    parts = max(1, min(parts, n // 2))
    # Channels last.
    pair = torch.empty(2, n, size, size, channels, device=images.device).movedim(4, 2)
    for part, out in zip(images.tensor_split(parts), pair.tensor_split(parts, dim=1)):
        x, order = augment(part, view, size)
        # Back into the order of the images: view 0 or 1, image.
        out[order // len(part), order % len(part)] = x
        out.sub_(mean).div_(std)
    return pair.unbind()


# ---------------------------------------------------------------- network and loss


def mlp(in_dim, hidden_dim, out_dim, layers):
    """`layers` linear layers with BatchNorm and ReLU between them; 0 layers: the identity."""
    if layers == 0:
        return nn.Identity()
    modules = []
    for _ in range(layers - 1):
        modules += [
            nn.Linear(in_dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(),
        ]
        in_dim = hidden_dim
    return nn.Sequential(*modules, nn.Linear(in_dim, out_dim, bias=False))


class SimCLR(nn.Module):
    """Any encoder from images to features h [N, feature_dim], and a projector from h to z."""

    def __init__(
        self, encoder, feature_dim, hidden_dim=512, projection_dim=128, projection_layers=2
    ):
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(feature_dim, hidden_dim, projection_dim, projection_layers)

    def forward(self, v1, v2):
        # One forward over both views, as in the paper's code: BatchNorm sees 2N views.
        return self.projector(self.encoder(torch.cat([v1, v2]))).chunk(2)


def info_nce(z1, z2, temperature=0.5):
    """NT-Xent, equation 1 of the paper, of embeddings z1, z2 [N, D] of the two views.

    Mean cross-entropy over the 2N views, each picking its partner out of the other 2N - 1. Inputs
    have any float dtype and need not be normalized; computed in float32 (float64 stays), even under
    autocast.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.cat([z1, z2])
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
        logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
        # The partner of view i is view i + N (mod 2N).
        partner = torch.arange(len(z), device=z.device).roll(len(z1))
        return F.cross_entropy(logits, partner)


# ---------------------------------------------------------------- training


def learning_rate(step, steps, warmup_steps, lr):
    """Linear warm-up to lr over warmup_steps, then a cosine to zero at `steps`."""
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(network, weight_decay):
    """SGD with momentum 0.9 for a network on its device; no weight decay on biases and norms."""
    params = [p for p in network.parameters() if p.requires_grad]
    decayed = dict(params=[p for p in params if p.ndim > 1], weight_decay=weight_decay)
    other = dict(params=[p for p in params if p.ndim <= 1], weight_decay=0.0)
    # For another optimizer, replace all lines from here on, and choose --lr for it: the recipes'
    # are SGD's, and train_step sets the lr of all groups. A fused one skips the steps in which fp16
    # overflows without waiting for the GPU.
    optimizer = torch.optim.SGD([decayed, other], lr=0.0, momentum=0.9, fused=True)
    for p in params:
        # Fused SGD leaves its momentum uninitialized if the first step is skipped.
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def train_step(
    network, optimizer, scaler, v1, v2, lr, temperature, amp_dtype=None, gather=lambda z: z
):
    """From two views to updated weights. Returns loss and z1 [N, D], detached, for the log.

    amp_dtype: dtype of autocast, None for float32; scaler: a GradScaler, enabled for fp16 only;
    gather: all-gathers z across processes with gradient, if there are several. The host never
    waits for the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    # One cast for all forwards.
    v1, v2 = v1.to(dtype=amp_dtype), v2.to(dtype=amp_dtype)
    with torch.autocast(v1.device.type, amp_dtype, enabled=amp_dtype is not None):
        z1, z2 = network(v1, v2)
    loss = info_nce(gather(z1), gather(z2), temperature)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach(), z1.detach()


def main(args):
    """Train with the arguments, write the run folder, and return its path."""
    import common

    # Fills unset flags from the recipe and the number of images; joins torchrun's processes. images
    # holds the data set as uint8, its size in pixels, its mean and std.
    args, images, device, amp_dtype = common.start(args, RECIPES)
    view = choose_view(args.augment, images.gray, images.size)

    common.seed_draws(args.seed, "weights")
    # Your own encoder and its number of features go here; --encoder, --width and --init apply to
    # this one only. With --init, images.mean and images.std become those of the weights.
    encoder, feature_dim = common.start_encoder(args, images)
    network = SimCLR(
        encoder, feature_dim, args.hidden_dim, args.projection_dim, args.projection_layers
    )
    network.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(network, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)

    # Loads the checkpoint in --run-dir, if any, into network, optimizer and scaler.
    run = common.Run("simclr", args, images, encoder, network, optimizer, scaler)
    run.draw_views(lambda batch: two_views(batch, view, images.size))
    # The network in DistributedDataParallel (several processes) and torch.compile.
    model = common.distribute(network, device, args.compile)
    # On a CPU, compiled views are not faster. In channels_last, cuDNN may blur in TF32.
    options = dict(layout_optimization=False)
    compiled = args.compile and device.type == "cuda"
    draw = torch.compile(two_views, options=options) if compiled else two_views
    for step, batch in run.batches():
        common.seed_draws(args.seed, "views", step)
        v1, v2 = draw(batch, view, images.size, images.mean, images.std)
        lr = learning_rate(step, run.steps, run.warmup_steps, args.lr)
        loss, z1 = train_step(
            model, optimizer, scaler, v1, v2, lr, args.temperature, amp_dtype, common.gather
        )
        run.record(step, loss, z1, lr)
    return run.finish()


if __name__ == "__main__":
    from common import cli

    cli(Args, main, RECIPES)
