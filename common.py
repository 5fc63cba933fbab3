"""Plumbing that simclr.py, byol.py, barlow_twins.py and knn_eval.py share.

Images, encoder, processes, the kNN monitor, and the run folder with its log and checkpoint. These
affect the gradient: `build_encoder`, `gather` and `distribute` (several processes), `epoch_order`
(the images of a batch), `seed_draws` (random numbers).
"""

import csv
import glob
import hashlib
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import unicodedata
import warnings
import zipfile
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from itertools import chain, islice
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

# Set by torchrun.
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
# tqdm's `disable`: None shows a progress bar in a terminal only.
SILENT = True if RANK else None


# ---------------------------------------------------------------- errors and the command line


class UserError(Exception):
    """A mistake the user can fix, printed without a traceback."""


def check(condition, message):
    """Raise UserError(message) unless condition holds."""
    if not condition:
        raise UserError(message)


def note(text):
    """Print on rank 0 only."""
    if RANK == 0:
        print(text)


@contextmanager
def user_errors(message, types=Exception):
    """Turn exceptions of these types inside the block into UserError("message (reason)")."""
    try:
        yield
    except UserError:
        raise
    except types as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{message} ({reason})") from error


def cli(args_class, main, recipes=None):
    """Parse the command line into args_class and call main(args); a UserError ends the process.

    With `recipes`, --help shows the values that the recipe of --dataset gives to unset flags.
    """
    import tyro

    # In a cell pasted into a notebook argv is the kernel's; under `%run file.py --flag` it is ours.
    argv = [] if "kernel_launcher" in sys.argv[0] else sys.argv[1:]
    default = None
    if recipes and {"-h", "--help"} & set(argv):
        dataset = re.findall(r"--dataset[ =](\w+)", " ".join(argv)) or [args_class.dataset]
        default = args_class(**recipes.get(dataset[-1], {}))
    try:
        main(tyro.cli(args_class, args=argv, default=default))
    except UserError as error:
        if RANK:
            # Rank 0 has usually met the same error and prints it; torchrun then ends this rank.
            time.sleep(5)
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def resolve(args, recipes, n=50_000):
    """Fill unset arguments (None or "auto") from the recipe of the data set; check the values.

    With n training images, an unset batch size is at most a quarter of them. The recipe of folder
    and npz is for 50,000 images: unset epochs give its number of steps, up to 1,000 epochs. A
    warm-up, given or not, is cut to half of the epochs.
    """
    recipe = dict(recipes[args.dataset], fit="crop")
    usual = recipe["batch_size"]
    most = max(2, n // 4 // WORLD_SIZE) * WORLD_SIZE
    recipe["batch_size"] = args.batch_size or min(usual, most)
    # Linear scaling rule (Goyal et al. 2017, arXiv:1706.02677).
    recipe["lr"] *= recipe["batch_size"] / usual
    if args.dataset in ("folder", "npz"):
        steps = recipe["epochs"] * (50_000 // usual)
        epochs = math.ceil(steps / max(1, n // recipe["batch_size"]))
        recipe["epochs"] = max(recipe["epochs"], min(1000, epochs))
    if args.init and args.init != "imagenet":
        made, keys = load_torch(args.init), ("encoder", "width", "image_size", "fit")
        with user_errors(f"--init {args.init} is neither an encoder.pt nor a state dict"):
            recipe |= {key: made[key] for key in keys if made.get(key)}
    for key, value in recipe.items():
        if getattr(args, key) in (None, "auto"):
            args = replace(args, **{key: value})
    args = replace(args, warmup_epochs=min(args.warmup_epochs, args.epochs / 2))

    # Below 16 channels, oneDNN's backward of strided 1x1 convolutions corrupts memory (its #6035).
    least = dict(width=16, batch_size=2 * WORLD_SIZE, image_size=4, temperature=1e-6)
    least |= dict.fromkeys("hidden_dim projection_dim knn_k checkpoint_every".split(), 1)
    for key, value in vars(args).items():
        if isinstance(value, int | float):
            low, flag = least.get(key, 0), key.replace("_", "-")
            check(low <= value < math.inf, f"--{flag} {value} must be at least {low}")
    message = f"--batch-size {args.batch_size} is global; it must be a multiple of {WORLD_SIZE}"
    check(args.batch_size % WORLD_SIZE == 0, f"{message}, the number of processes")
    check(args.run_dir or not args.resume, "--resume needs --run-dir, the folder of the run")
    return args


def start(args, recipes):
    """Fill and check the arguments, join torchrun's processes, load the images.

    Returns the arguments, the images, the device, and the dtype of autocast (None: float32).
    """
    # Mistakes in flags show before the images are read, whose number then fills unset flags.
    checked = resolve(args, recipes)
    device, amp_dtype = set_up(checked)
    keys = "dataset data_dir image_size cache_dir labels window fit".split()
    images = load_images(**{key: getattr(checked, key) for key in keys}, device=device)
    return resolve(args, recipes, len(images.train)), images, device, amp_dtype


# ---------------------------------------------------------------- device and processes


def pick_device(name):
    """'auto' takes CUDA, else Apple's MPS, else the CPU. UserError if the device is missing."""
    if name == "auto":
        mps = torch.backends.mps.is_available() and WORLD_SIZE == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    device = torch.device(name, LOCAL_RANK if name == "cuda" else None)
    with user_errors(f"--device {name} (rank {RANK}) is not available; use --device auto or cpu"):
        torch.empty(1, device=device)
    return device


def set_up(args):
    """Join torchrun's processes; return the device and the dtype of autocast (None: float32)."""
    device, precision = pick_device(args.device), args.precision
    cuda = device.type == "cuda"
    if precision == "auto":
        # torch.cuda.is_bf16_supported() counts emulation, so ask for the capability.
        native = cuda and torch.cuda.get_device_capability(device) >= (8, 0)
        precision = "bf16" if native else "fp16" if cuda else "fp32"
        if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
            # Of a ResNet-18 (benchmarks/README.md, speed). float32 stays the default.
            note("note: on this processor --precision bf16 is 1.7 times as fast (with AMX 2.4)")
    check(cuda or precision != "fp16", f"--precision fp16 needs --device cuda, not {device.type}")
    torch.backends.cudnn.benchmark = not args.deterministic
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    if args.deterministic:
        # cuBLAS reads it when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if WORLD_SIZE > 1 and not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(device)
        # Ranks wait for hours where rank 0 decodes or evaluates.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6))
    return device, dict(fp32=None, bf16=torch.bfloat16, fp16=torch.float16)[precision]


def seed_draws(seed, purpose, step=0):
    """Seed PyTorch only by (seed, purpose, step), so that a resumed run draws the same numbers.

    purpose: "weights", the same on every rank, or "views", each rank its own.
    """
    # Not 0: that is the stream of epoch_order.
    stream = RANK + 3 if purpose == "views" else 1
    state = np.random.SeedSequence([seed, step, stream]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)


def gather(z):
    """All-gather z [N, D] of every rank -> [WORLD_SIZE * N, D], with gradient.

    If every rank computes the loss of the gathered batch, DDP's mean gradient equals that of a
    single process.
    """
    if WORLD_SIZE == 1:
        return z
    z = z.contiguous()
    parts = [torch.empty_like(z) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, z.detach())
    parts[RANK] = z
    z = torch.cat(parts)
    if z.requires_grad:
        # A rank gives the gradient of its own slice only; DDP divides the sum by WORLD_SIZE.
        z.register_hook(lambda gradient: WORLD_SIZE * gradient)
    return z


def distribute(network, device, compile=False):
    """Wrap in DDP (with SyncBatchNorm on GPUs) and torch.compile; unchanged on one process."""
    if WORLD_SIZE > 1:
        if device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        network = nn.parallel.DistributedDataParallel(network)
    return torch.compile(network) if compile else network


def broadcast(value):
    """Broadcast a Python object from rank 0."""
    box = [value]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(box)
    return box[0]


# ---------------------------------------------------------------- images


@dataclass
class Images:
    """A data set. Labels are -1 where unlabeled."""

    # uint8 [N, C, S, S], S >= size: on the device, in memory, or mapped from a decoded folder.
    train: torch.Tensor
    test: torch.Tensor
    # int64 [N] on the CPU
    train_labels: torch.Tensor
    test_labels: torch.Tensor
    class_names: list
    # side of the encoder's input in pixels
    size: int
    # float32 [C, 1, 1] on the device, of the training images in [0, 1]
    mean: torch.Tensor
    std: torch.Tensor
    # not red, green and blue, or all three equal
    gray: bool
    # the values that became 0 and 255, of images with more than 8 bits
    window: tuple | None
    # more arrays of embeddings.npz: train_files, train_groups, test_files, test_groups
    extra: dict


def load_images(
    dataset,
    data_dir="data",
    image_size=None,
    cache_dir="cache",
    labels=None,
    window=None,
    fit="crop",
    device="cpu",
):
    """Load a data set as uint8 squares for an encoder that sees image_size pixels a side.

    image_size None: the size of the images, at most 224. labels: the CSV file of a folder's labels.
    window (low, high): the values that become 0 and 255 in images with more than 8 bits; None: the
    0.1 and 99.9 percentile. fit: see `square`. The images stay on a GPU if they take less than a
    quarter of its free memory. UserError if data is missing or broken.
    """
    check(not labels or dataset == "folder", f"--labels needs --dataset folder, not {dataset}")
    device, root = torch.device(device), Path(data_dir)
    if dataset == "folder":
        files, ids, class_names, extra = _list_folder(root, labels)
        sizes, values = _sample_files(root, files[0])
    else:
        load = dict(digits=_digits, npz=_npz).get(dataset, _torchvision)
        arrays, ids, class_names, extra = load(dataset, root)
        sizes = [sorted(arrays[0].shape[1:3])]
        values = [sample_pixels(arrays[0], 10**6)] if arrays[0].dtype != np.uint8 else []
    usual, window = size_and_window(sizes, values, window, fit)
    image_size = image_size or min(224, usual)
    # Larger than the encoder's input, for the crops, where the images are.
    side = max(image_size, min(image_size * 3 // 2, usual))
    if dataset == "folder":
        images = _decode_folder(root, files, Path(cache_dir), side, window, fit)
    else:
        with user_errors(f"cannot use {data_dir!r}", ValueError):
            images = [_squares(array, side, window, fit) for array in arrays]
    both = {*extra.get("train_groups", ())} & {*extra.get("test_groups", ())}
    if both:
        note(f"warning: {len(both)} groups are in training and test: accuracies are too high")

    # A sample of 32 MB gives the mean and the standard deviation.
    sample = images[0][:: math.ceil(images[0].numel() / 2**25)]
    std, mean = torch.std_mean(sample.double() / 255, (0, 2, 3), correction=0, keepdim=True)
    mean, std = (value[0].float().to(device) for value in (mean, std.clamp(min=1e-3)))
    gray = len(mean) != 3 or bool((sample == sample[:, :1]).all())
    size = sum(part.numel() for part in images)
    if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 4:
        images = [part.to(device) for part in images]
    labels = (torch.as_tensor(part).long() for part in ids)
    return Images(*images, *labels, class_names, image_size, mean, std, gray, window, extra)


def square(images, size, fit="crop"):
    """uint8 images [N, C, H, W], or one of Pillow's, as squares of `size` pixels, antialiased.

    fit: "crop" the center, "pad" with black, or "stretch".
    """
    from torchvision.transforms.functional import center_crop, get_image_size, resize

    if fit != "stretch":
        # A larger center_crop pads.
        images = center_crop(images, dict(crop=min, pad=max)[fit](get_image_size(images)))
    return resize(images, [size, size], antialias=True)


def _squares(array, size, window, fit):
    """[N, H, W] or [N, H, W, C] -> uint8 [N, C, size, size]; gray images get three channels."""
    array, squares = array if array.ndim == 4 else array[..., None], []
    # At least one chunk, also of no images. np.interp takes 16 bytes a pixel.
    for chunk in np.array_split(array, len(array) // 256 + 1):
        chunk = torch.from_numpy(to_uint8(chunk, window)).permute(0, 3, 1, 2)
        chunk = chunk.expand(-1, 3, -1, -1) if chunk.shape[1] == 1 else chunk
        squares.append(square(chunk, size, fit))
    return torch.cat(squares)


def sample_pixels(values, n):
    """n random elements of an array, the same for the same size."""
    return np.random.default_rng(0).choice(np.ravel(values), n)


def size_and_window(sizes, values, window, fit):
    """Median side of the squares; the window if most images have more than 8 bits, else None.

    sizes: sorted sides of sampled images; values: pixels of each of them with more than 8 bits.
    """
    short, long = np.array(sizes).T
    if fit == "crop" and (short / long).mean() < 0.5:
        note("note: center squares keep less than half of the pixels; see --fit pad and stretch")
    deep = len(values) > len(sizes) / 2
    fits = not window or (deep and -math.inf < window[0] < window[1] < math.inf)
    check(fits, f"--window {window} must be LOW HIGH, and is for images with more than 8 bits")
    if deep and not window:
        low, high = np.percentile(np.concatenate(values), (0.1, 99.9)).tolist()
        window = low, max(high, low + 1e-6)
    return int(np.median(long if fit == "pad" else short)), window


def to_uint8(values, window):
    """Map the window (low, high) of an array of finite pixels to 0..255; None keeps 8 bits."""
    if window is None:
        return values
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    return np.rint(np.interp(values, window, (0, 255))).astype(np.uint8)


def _digits(dataset, root):
    """scikit-learn's 1,797 digits, 8x8 pixels, in a fixed stratified split of 1,437 and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, labels = to_uint8(digits.images, (0, 16)), digits.target
    parts = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
    return parts[:2], parts[2:], list("0123456789"), {}


def _torchvision(dataset, root):
    import torchvision

    name = dict(fashion_mnist="FashionMNIST").get(dataset, dataset.upper())
    # STL10's second argument is split, that of the others train.
    splits = ("train+unlabeled", "test") if dataset == "stl10" else (True, False)
    help = f"place its original files in {str(root)!r} as torchvision does"
    with user_errors(f"could not get {dataset}; {help}"), file_lock(root / ".download.lock"):
        data_class = getattr(torchvision.datasets, name)
        sets = [data_class(root, split, download=True) for split in splits]
    images = [np.asarray(part.data) for part in sets]
    if dataset == "stl10":
        images = [array.transpose(0, 2, 3, 1) for array in images]
    labels = [part.labels if dataset == "stl10" else part.targets for part in sets]
    return images, labels, sets[0].classes, {}


def _npz(dataset, path):
    """MedMNIST's form, also of more channels and bits; all but train_images are optional."""
    from sklearn.utils import check_consistent_length

    images, labels, extra = [], [], {}
    # Without pickles, reading runs no code.
    failed = f"cannot use {str(path)!r} as an .npz file"
    with user_errors(failed), np.load(path, allow_pickle=False) as arrays:
        first = arrays["train_images"]
        for part in ("train", "test"):
            x = arrays.get(f"{part}_images", first[:0])
            fits = x.ndim in (3, 4) and min(x.shape[1:3]) >= 4 and x.shape[3:] <= (32,)
            fits = fits and len(first) and x.dtype.kind in "uif" and x.dtype == first.dtype
            fits = fits and x.shape[3:] == first.shape[3:]
            form = f"{part}_images must be numbers [N, H, W] or [N, H, W, C], H and W from 4"
            found = f"as in train_images, not {x.dtype} {list(x.shape)}"
            check(fits, f"{str(path)!r}: {form}, N from 1, C to 32, {found}")
            y = arrays.get(f"{part}_labels", np.full(len(x), -1)).flatten()
            groups = arrays.get(f"{part}_groups", y).flatten()
            with user_errors(f"{str(path)!r}: {part}_images, labels and groups do not fit"):
                check_consistent_length(x, y, groups)
                # Negative labels are unlabeled.
                labels.append(y.astype(np.int64, casting="same_kind").clip(-1))
            images.append(x)
            if f"{part}_groups" in arrays:
                extra[f"{part}_groups"] = groups
    return images, labels, [], extra


IMAGE_ENDINGS = ".jpg .jpeg .png .bmp .gif .tif .tiff .webp .ppm .pgm".split()


def _image_files(root):
    """Names of the image files below root, sorted, and a Counter of the endings of other files.

    Links are followed; hidden files and folders are left out.
    """
    check(root.is_dir(), f"--data-dir {str(root)!r} is not a folder; name the root of the images")
    names, others = [], Counter()
    found = sorted(glob.glob("**", root_dir=root, recursive=True), key=os.path.split)
    # The pictures of runs and evaluations are no data.
    marks = "args.json", "knn.json"
    runs = {Path(name).parent for name in found if os.path.basename(name) in marks}
    for name in found:
        ending = Path(name).suffix
        if runs and runs & {*Path(name).parents}:
            others[f"in folders with {' or '.join(marks)}"] += 1
        elif ending.lower() in IMAGE_ENDINGS:
            names.append(name)
        elif not os.path.isdir(root / name):
            others[ending or "without ending"] += 1
    with user_errors(f"--data-dir {str(root)!r}: rename files, their names must be UTF-8"):
        "".join(names).encode()
    return names, others


def _list_folder(root, table):
    """[train, test] file names below root and class ids, class names, and Images.extra.

    The layout is train/<class>/* with test/ or val/; images of train/ outside of a class folder are
    unlabeled, as is any other tree. table: a CSV file with the columns file and label, and where
    wanted split (train or test) and group; its labels replace those of the layout.
    """
    names, others = _image_files(root)
    listed, layout = _read_table(table, names) if table else {}, (root / "train").is_dir()
    tests, rows = ("test", "test" if (root / "test").is_dir() else "val"), []
    for name in names:
        parts = Path(name).parts
        place = parts[0] if layout else "train"
        # A listed image may be anywhere.
        if name not in listed and place not in ("train", *tests):
            others["images outside of train and test; to use them, move them into train"] += 1
            continue
        folder = parts[1] if layout and not table and len(parts) > 2 else ""
        row = dict(split=place, label=folder, group=name) | listed.get(name, {})
        rows.append((name, row["split"] in tests, row["label"], row["group"]))
    ignored = ", ".join(f"{n} {key}" for key, n in others.most_common(10)) or "no files"
    none = f"--data-dir {str(root)!r}: no images found, in train/ if there is one"
    kinds = " ".join(IMAGE_ENDINGS)
    check(not all(row[1] for row in rows), f"{none}; images end in {kinds}; ignored: {ignored}")

    files, test, labels, groups = map(np.array, zip(*rows))
    class_names = sorted({*labels[~test].tolist()} - {""})
    # A single class says nothing, as in train/images/*.
    class_names = class_names if len(class_names) > 1 else []
    unknown = {*labels[test].tolist()} - {"", *class_names}
    message = f"no training images of the test classes {[*unknown][:5]}"
    check(not unknown or not class_names, message)
    ids = {name: i for i, name in enumerate(class_names)}
    labels = np.array([ids.get(name, -1) for name in labels])
    parts, extra = dict(train=~test, test=test), {}
    for part, chosen in parts.items():
        extra[f"{part}_files"] = files[chosen]
        # By default an image is a group of its own.
        if (groups != files).any():
            extra[f"{part}_groups"] = groups[chosen]
    n, unlabeled = test.sum(), (labels[~test] == -1).sum()
    note(f"{root}: {len(rows)} images, {n} for testing; {unlabeled} of the others unlabeled")
    shown = ", ".join(class_names[:10])
    note(f"{root}: {len(class_names)} classes: {shown}; ignored: {ignored}")
    labels = [labels[chosen] for chosen in parts.values()]
    return [extra["train_files"], extra["test_files"]], labels, class_names, extra


def _read_table(path, names):
    """The rows of --labels by file name. UserError names the line of a mistake."""
    with user_errors(f"cannot read --labels {path!r} as CSV in UTF-8"):
        with open(path, newline="", encoding="utf-8-sig") as file:
            # Excel separates by semicolons where a comma is decimal.
            delimiter = max(",;\t", key=file.readline().count)
            file.seek(0)
            reader = csv.DictReader(file, restval="", delimiter=delimiter, skipinitialspace=True)
            columns = [name.strip().lower() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            lines = [(reader.line_num, row) for row in reader]
    known = {"file", "label"} <= {*columns}
    check(known, f"--labels {path!r} needs the columns file and label in line 1, not {columns}")
    # Macs decompose accented letters.
    names = {unicodedata.normalize("NFC", name): name for name in names}
    rows, mistakes = {}, []
    for number, row in lines:
        # Values beyond the last column.
        if any(row.pop(None, ())):
            mistakes.append(f"line {number}: more values than columns")
        row = {key: value.strip() for key, value in row.items() if value.strip()}
        if not row:
            continue
        file, split = row.get("file", ""), row.get("split", "train")
        name = names.get(unicodedata.normalize("NFC", os.path.normpath(file)))
        if not name:
            mistakes.append(f"line {number}: {file!r} is not an image below --data-dir")
        elif name in rows:
            mistakes.append(f"line {number}: {name!r} is listed twice")
        elif split not in ("train", "test"):
            mistakes.append(f"line {number}: split is {split!r}, not train or test")
        rows[name] = row
    check(not mistakes, "\n".join(f"--labels {path!r}, {line}" for line in mistakes[:20]))
    return rows


def _sample_files(root, names):
    """Sorted sides of up to 100 files; pixels of those with more than 8 bits."""
    sizes, values = [], []
    for name in names[:: math.ceil(len(names) / 100)]:
        # Decoding names every broken file.
        with suppress(Exception), Image.open(root / name) as image:
            sizes.append(sorted(image.size))
            if image.mode[0] in "IF":
                values.append(sample_pixels(np.asarray(image, np.float32), 10**4))
    return sizes or [(224, 224)], values


def _decode_folder(root, files, cache_dir, side, window, fit):
    """Decode [train, test] files once into a file under cache_dir; map it as uint8 [N, 3, S, S].

    UserError names every broken file.
    """
    names, broken = np.concatenate(files).tolist(), []

    def decode(name):
        try:
            return read_image(root / name, side, window, fit).tobytes()
        except UserError as error:
            broken.append(f"{error}; fix or delete it, or give all images by --dataset npz")

    failed = f"cannot use {str(root)!r} with --cache-dir {str(cache_dir)!r}"
    with user_errors(failed, (OSError, ValueError)):
        stats = [os.stat(root / name) for name in names]
        times = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
        # Another number where read_image gives other pixels.
        facts = json.dumps([2, str(root.resolve()), side, fit, window, names, times])
        fingerprint = hashlib.sha256(facts.encode()).hexdigest()[:16]
        path = cache_dir / f"{root.resolve().name}-{side}px-{fingerprint}.bin"
        cache_dir.mkdir(parents=True, exist_ok=True)
        with file_lock(f"{path}.lock"):
            if not path.exists():
                with atomic_write(path) as file:
                    images = prefetch(decode, names, os.cpu_count())
                    for image in tqdm(images, "decoding", len(names), leave=False, disable=SILENT):
                        file.write(image or b"")
                    check(not broken, "\n".join(sorted(broken)))
        images = np.memmap(path, np.uint8, "r", shape=(len(names), 3, side, side))
    with warnings.catch_warnings():
        # PyTorch's on read-only memory.
        warnings.simplefilter("ignore")
        images = torch.from_numpy(images)
    return images.split([len(part) for part in files])


def read_image(path, side, window=None, fit="crop"):
    """An image file as uint8 RGB [3, side, side], resized with antialiasing.

    window: the values that become 0 and 255 in files with more than 8 bits; fit: as in `square`.
    UserError where Pillow would drop bits, channels or frames, or cannot read the file.
    """
    with user_errors(f"{str(path)!r} cannot be read"), Image.open(path) as image:
        deep, bands = image.mode[0] in "IF", len(image.getbands())
        # MPO: a photograph with another of its views.
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise ValueError("several frames; save each as a file")
        # Of TIFF: samples per pixel, and the bits of each.
        tags = getattr(image, "tag_v2", {})
        samples, bits = tags.get(277, bands), max(tags.get(258, (8,)))
        tile = str(image.tile)
        # How Pillow decodes a PPM file ends in its largest value.
        most = int(re.findall(r"\d+", tile)[-1]) if "'ppm" in tile else 0
        wide = not deep and (bits > 8 or most > 255 or ";16" in tile)
        if samples != bands or wide or (tags and image.mode == "RGBA"):
            raise ValueError("Pillow drops channels or bits; save transparency as .png")
        if deep != (window is not None):
            raise ValueError(f"{'more than ' * deep}8 bits, unlike the other images")
        # JPEG: decode at a lower resolution that still suffices for the resize.
        image.draft(None, (2 * side, 2 * side))
        image = ImageOps.exif_transpose(image)
        if deep:
            image = Image.fromarray(to_uint8(np.asarray(image, np.float32), window))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        image = image.convert("RGB")
        # Before the resize, the square of a panorama would fill the memory.
        pad = fit == "pad"
        image = ImageOps.pad(image, (side, side)) if pad else square(image, side, fit)
    return np.asarray(image).transpose(2, 0, 1)


def prefetch(function, items, threads):
    """Yield function(item) in order, computed ahead by threads."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def take(images, indices, device):
    """Yield images[index] on the device for every index; a few threads read ahead from the host."""
    if images.device.type == device.type:
        yield from (images[index] for index in indices)
        return

    def read(index):
        batch = images[index]
        if device.type == "cuda":
            # Otherwise a thread would start a CUDA context on GPU 0.
            torch.cuda.set_device(device)
            batch = batch.pin_memory()
        return batch

    for batch in prefetch(read, indices, threads=4):
        # On MPS, PyTorch may read a batch that is gone already (its #189690).
        yield batch.to(device, non_blocking=device.type == "cuda")


def epoch_order(n, batch_size, seed, epoch):
    """Rows of this rank's images in each batch of an epoch, int64 [n // batch_size, local_batch].

    All ranks share one permutation of range(n); the last partial batch is dropped.
    """
    state = np.random.SeedSequence([seed, epoch]).generate_state(1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(int(state[0])))
    order = order[: n // batch_size * batch_size]
    return order.view(-1, WORLD_SIZE, batch_size // WORLD_SIZE)[:, RANK]


def batches(images, args, first_step, device):
    """Yield this rank's uint8 batch of every step from first_step to the end, on the device."""
    form = len(images), args.batch_size, args.seed
    # To the device once an epoch, so that no step waits for a copy.
    orders = (epoch_order(*form, epoch).to(images.device) for epoch in range(args.epochs))
    return take(images, islice(chain.from_iterable(orders), first_step, None), device)


# ---------------------------------------------------------------- encoder and monitors


def build_encoder(name, image_size, width=64, channels=3):
    """torchvision's ResNet without its classifier, and its feature dimension.

    width: channels of the first stage. Up to 64 px the stem is one 3x3 convolution without max-pool
    (SimCLR, appendix B.9). State-dict keys are torchvision's.
    """
    from torchvision.models import resnet

    class ResNet(resnet.ResNet):
        def _make_layer(self, block, planes, *args, **kwargs):
            if planes == 64:
                self.inplanes = width
            return super()._make_layer(block, planes * width // 64, *args, **kwargs)

    blocks = dict(resnet10=[1] * 4, resnet18=[2] * 4, resnet34=[3, 4, 6, 3], resnet50=[3, 4, 6, 3])
    check(name in blocks, f"encoder {name} is not one of {', '.join(blocks)}; build it yourself")
    block = resnet.Bottleneck if name == "resnet50" else resnet.BasicBlock
    encoder = ResNet(block, blocks[name])
    encoder.bn1 = nn.BatchNorm2d(width)
    kernel, stride, padding = (3, 1, 1) if image_size <= 64 else (7, 2, 3)
    encoder.conv1 = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
    nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    if image_size <= 64:
        encoder.maxpool = nn.Identity()
    encoder.fc = nn.Identity()
    # encoder.pt names only encoders that this function can build again.
    encoder.architecture = name
    return encoder, 8 * width * block.expansion


def start_encoder(args, images):
    """build_encoder by the arguments for these images, with the weights of --init, if any.

    Those weights come with the mean and std of their inputs, which replace those of images.
    """
    encoder, dim = build_encoder(args.encoder, images.size, args.width, len(images.mean))
    if args.init:
        mean, std = load_weights(encoder, args.init)
        if len(mean) == len(images.mean):
            images.mean, images.std = mean.to(images.mean), std.to(images.std)
    return encoder, dim


def load_weights(encoder, init):
    """Start from an encoder.pt, a state dict with torchvision's keys, or "imagenet". UserError.

    A first convolution of other input channels is averaged over them and rescaled.
    Returns the mean and std [C, 1, 1] of the inputs, ImageNet's unless an encoder.pt names them.
    """
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    name = encoder.architecture
    if init == "imagenet":
        from torchvision.models import get_model

        failed = f"cannot get torchvision's weights of {name} for --init imagenet"
        with user_errors(failed):
            state = get_model(name, weights="DEFAULT").state_dict()
    else:
        state = load_torch(init)
        mean, std = state.get("mean", mean), state.get("std", std)
        state = state.get("state_dict", state)
    own = encoder.state_dict()
    with user_errors(f"--init {init} holds no ResNet with torchvision's keys"):
        stem, channels = state["conv1.weight"], own["conv1.weight"].shape[1]
        if stem.shape[1] != channels:
            stem = stem.mean(1, keepdim=True) * (stem.shape[1] / channels)
            state["conv1.weight"] = stem.expand(-1, channels, -1, -1)
        same = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    check(len(same) > len(own) / 2, f"--init {init} does not fit --encoder {name} and --width")
    left = encoder.load_state_dict(same, strict=False).missing_keys
    unused = [key for key in state if key not in same]
    note(f"--init {init}: loaded {len(same)} tensors; not loaded {left}, not used {unused[:9]}")
    return mean, std


def load_encoder(path, encoder=None):
    """The encoder of an encoder.pt in eval mode, and the file's other entries as a dict.

    encoder: your own or changed one, into which the weights are loaded.
    `encoder(normalize(images, info["mean"], info["std"]))` gives features [N, D] of images of
    info["image_size"] pixels. An array of more than 8 bits first becomes
    `torch.from_numpy(to_uint8(array, info["window"]))`.
    UserError if it is damaged or not an encoder.pt.
    """
    info = load_torch(path)
    with user_errors(f"{str(path)!r} is not an encoder.pt of these scripts"):
        size, channels = info["image_size"], len(info["mean"])
        if encoder is None:
            encoder, _ = build_encoder(info["encoder"], size, info["width"], channels)
        encoder.load_state_dict(info.pop("state_dict"))
    return encoder.eval(), info


@torch.no_grad()
def encode_files(path, files, device="cpu", encoder=None):
    """Features [N, D] float32 of image files by `load_encoder`, decoded as in training."""
    encoder, info = load_encoder(path, encoder)
    encoder.to(device)
    form, features = [info[key] for key in ("side", "window", "fit")], []
    for start in range(0, len(files), 256):
        images = np.stack([read_image(file, *form) for file in files[start : start + 256]])
        images = square(torch.from_numpy(images), info["image_size"])
        images = normalize(images, info["mean"], info["std"])
        features.append(encoder(images.to(device)).float().cpu())
    return torch.cat(features).numpy()


def normalize(images, mean, std):
    """uint8 or [0, 1] float images [N, C, H, W] -> (images - mean) / std, both [C, 1, 1]."""
    images = images / 255 if images.dtype == torch.uint8 else images
    return (images - mean) / std


@torch.no_grad()
def embed(encoder, images, part):
    """Features [N, D] float32 of images.train or images.test, in eval mode."""
    pixels, size, features = getattr(images, part), images.size, []
    # Some modules of your encoder may be frozen.
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    rows = torch.arange(len(pixels), device=pixels.device)
    # 500 images of 224 pixels would take 5 GB.
    for batch in take(pixels, rows.split(min(500, 2**21 // size**2 + 1)), images.mean.device):
        batch = normalize(square(batch, size), images.mean, images.std)
        features.append(encoder(batch).float().cpu())
    for module, mode in modes:
        module.training = mode
    features = torch.cat(features)
    check(features.isfinite().all(), "the features are not finite; a lower --lr may help")
    return features.numpy()


def spread(z):
    """sqrt(D) x standard deviation of L2-normalized z [N, D]: 1 isotropic, 0 collapsed."""
    z = F.normalize(z.float(), dim=1)
    return z.std(0, correction=0).mean() * z.shape[1] ** 0.5


def knn_monitor(encoder, images, k):
    """{"effective_rank": of the training features, "knn_acc": cosine majority vote, if labeled}.

    knn_acc is of the test images, or by leave-one-out without labeled test images.
    """
    from knn_eval import effective_rank, knn_sweep

    train, test = (embed(encoder, images, part) for part in ("train", "test"))
    labels, truth = images.train_labels.numpy(), images.test_labels.numpy()
    record, known, asked = dict(effective_rank=effective_rank(train)), labels != -1, truth != -1
    test, truth, groups, most = test[asked], truth[asked], None, known.sum()
    if not asked.any():
        # Each training image is predicted from those of other groups.
        groups = images.extra.get("train_groups", np.arange(len(labels)))[known]
        test, truth = None, labels[known]
        most -= np.unique(groups, return_counts=True)[1].max(initial=0)
    if most:
        # More neighbors than a class has images would outvote it.
        k = min(k, most, np.bincount(labels[known]).max())
        device = images.mean.device if images.mean.is_cuda else None
        predicted = knn_sweep(train[known], labels[known], test, [k], device=device, groups=groups)
        record["knn_acc"] = float((predicted[k] == truth).mean())
    return record


# ---------------------------------------------------------------- files


@contextmanager
def atomic_write(path):
    """Yield a binary file that becomes `path` once it is complete; a failure keeps the old file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with user_errors(f"cannot write {str(path)!r}", OSError):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def file_lock(path):
    """Other runs and ranks wait for the block to end, unless the file system has no locks."""
    lock = filelock.FileLock(path)
    with suppress(OSError, NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def save_torch(path, content):
    """torch.save, complete or not at all."""
    # On a full disk, torch.save to a file raises a RuntimeError that does not say so.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def load_torch(path):
    """torch.load to the CPU without running code from the file. UserError if it is damaged."""
    with user_errors(f"cannot read {str(path)!r}"):
        # torch.load does not verify checksums. Files from before PyTorch 1.6 have none.
        broken = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()
        check(not broken, f"cannot read {str(path)!r} (wrong checksum)")
        return torch.load(path, map_location="cpu", weights_only=True)


def git_commit():
    """The commit of these files, with "-dirty" after changes; None outside of git."""
    command = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def draw_curves(path, records):
    """Plot the loss and, where evaluated, the kNN accuracy of log records over the epochs."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    for axes, key in zip(figure.subplots(2, sharex=True), ("loss", "knn_acc")):
        points = [(record["epoch"], record[key]) for record in records if key in record]
        axes.plot(*zip(*points or [(0, math.nan)]), ".-")
        axes.set(xlabel="epoch", ylabel=key)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120, format="png")


# ---------------------------------------------------------------- run folder


class Run:
    """A run folder with its log, evaluations and checkpoints.

    The constructor resumes from the folder's checkpoint, if any, and writes args.json; `batches`
    feeds the loop, `record` follows every step, and `finish` writes the results.
    """

    # Arguments that the results do not depend on.
    NOT_KEPT = (
        "run_dir resume device precision compile deterministic eval_every checkpoint_every knn_k "
        "track wandb_project"
    ).split()
    # Those that a resumed run may change: paths, and what depends on the number of epochs.
    MAY_CHANGE = "data_dir cache_dir labels epochs warmup_epochs ema".split()

    # In a notebook the process lives on after an error, and may resume the run.
    lock = None

    def __init__(self, method, args, images, encoder, network, optimizer, scaler):
        self.method, self.images, self.encoder = method, images, encoder
        # build_encoder's is named by its architecture, another by its class.
        name = getattr(encoder, "architecture", type(encoder).__name__)
        message = "--init is for start_encoder's encoder; load the weights of another in main"
        check(not args.init or hasattr(encoder, "architecture"), message)
        self.args = args = replace(args, image_size=images.size, window=images.window, encoder=name)
        self.state = dict(network=network, optimizer=optimizer, scaler=scaler)
        n, self.device = len(images.train), images.mean.device
        self.steps_per_epoch = n // args.batch_size
        message = f"--batch-size {args.batch_size} is more than the {n} training images"
        check(self.steps_per_epoch or not args.epochs, message)
        self.steps, self.first_step = args.epochs * self.steps_per_epoch, 0
        self.warmup_steps = round(args.warmup_epochs * self.steps_per_epoch)
        # Sums of loss and spread over the steps of the epoch, on the device.
        self.totals = torch.zeros(2, device=self.device)
        self.stop_signal = 0
        # The lines of log.jsonl. The checkpoint precedes the evaluation of the last one.
        self.records = []
        # What embeddings.npz says of the run, and a resumed run must have in common with its start.
        self.facts = dict(method=method, optimizer=type(optimizer).__name__, images=n)
        self.facts |= {k: v for k, v in asdict(args).items() if k not in self.NOT_KEPT}

        # To the microsecond: runs may start together.
        name = f"{method}-{args.dataset}-s{args.seed}-{datetime.now():%Y%m%d-%H%M%S-%f}"
        self.dir = Path(broadcast(args.run_dir or f"runs/{name}"))
        checkpoint = broadcast(None if RANK else self._open())
        self.wandb_id = os.urandom(4).hex()
        if checkpoint:
            path = self.dir / "checkpoint.pt"
            with user_errors(f"{str(path)!r} does not fit this run; name another --run-dir"):
                self._resume(checkpoint)
        if RANK == 0:
            self._start()

    def _open(self):
        """Create and lock the folder; return its checkpoint, or None."""
        path = self.dir / "checkpoint.pt"
        holds_run = path.exists() or (self.dir / "embeddings.npz").exists()
        message = f"--run-dir {str(self.dir)!r} holds a run; add --resume or name another"
        check(self.args.resume or not holds_run, message)
        with user_errors(f"cannot write to --run-dir {str(self.dir)!r}", OSError):
            self.dir.mkdir(parents=True, exist_ok=True)
            if Run.lock:
                Run.lock.release()
            Run.lock = filelock.FileLock(self.dir / ".lock")
            used = f"--run-dir {str(self.dir)!r} is in use by another run"
            # Some file systems have no locks.
            with suppress(OSError, NotImplementedError):
                # Another user's lock may not be opened.
                with user_errors(used, (filelock.Timeout, PermissionError)):
                    self.lock.acquire(timeout=0)
        return load_torch(path) if path.exists() else None

    def _resume(self, checkpoint):
        for key, value in self.facts.items():
            old = checkpoint["facts"].get(key)
            message = f"cannot resume {str(self.dir)!r}: {key} was {old} and is {value}"
            check(old == value or key in self.MAY_CHANGE, message)
        self.first_step, self.wandb_id = checkpoint["step"], checkpoint["wandb_id"]
        message = f"{str(self.dir)!r} has trained for more than --epochs {self.args.epochs}"
        check(self.first_step <= self.steps, message)
        self.records = checkpoint["records"]
        self.totals.copy_(checkpoint["totals"])
        for name, module in self.state.items():
            # The scaler's state is empty if the run was not in fp16 before.
            if checkpoint[name]:
                module.load_state_dict(checkpoint[name])

    def _start(self):
        """Write args.json and the log, start Weights & Biases."""
        import torchvision

        cuda = self.device.type == "cuda"
        versions = dict(torch=torch.__version__, torchvision=torchvision.__version__)
        versions["python"] = sys.version.split()[0]
        config = dict(
            method=self.method,
            args=asdict(self.args),
            device=torch.cuda.get_device_name(self.device) if cuda else self.device.type,
            processes=WORLD_SIZE,
            versions=versions,
            command=shlex.join(sys.argv),
            commit=git_commit(),
            wandb_id=self.wandb_id,
        )
        with atomic_write(self.dir / "args.json") as file:
            file.write(json.dumps(config, indent=2).encode())
        print(f"{self.method} on {config['device']}: {self.dir}")
        print("  " + "  ".join(f"{k}={v}" for k, v in config["args"].items() if v is not None))
        group = f"{self.method}-{self.args.dataset}"
        self.tracker = Tracker(
            self.args, self.dir, name=self.dir.name, group=group, config=config, id=self.wandb_id
        )
        path = self.dir / "log.jsonl"
        logged = [*map(json.loads, path.open())][: len(self.records)] if path.exists() else []
        # The log may hold the evaluation of the last epoch, which the checkpoint precedes.
        self.records[: len(logged)] = logged
        if len(logged) < len(self.records):
            self._log()
        else:
            self._write_log()

    def draw_views(self, draw):
        """views.png: each row an image, then three pairs of views by draw(images) -> (v1, v2)."""
        from torchvision.utils import save_image

        if RANK:
            return
        seed_draws(self.args.seed, "views")
        train = self.images.train
        # At random: the images may be sorted by class.
        sample = train[torch.randperm(len(train))[:8]].to(self.device)
        columns = [square(sample, self.images.size) / 255]
        columns += [view for _ in range(3) for view in draw(sample)]
        rows = torch.stack(columns, 1).flatten(0, 1)
        # The first three channels, or the first of two.
        rows = rows[:, : 3 if rows.shape[1] > 2 else 1]
        rows = F.interpolate(rows, scale_factor=max(1, 64 // rows.shape[2]))
        with atomic_write(self.dir / "views.png") as file:
            save_image(rows, file, "png", nrow=len(columns))

    def batches(self):
        """Yield (step, this rank's uint8 images) from the first step to the last.

        Meanwhile Ctrl-C and SIGTERM end the run after the current step, with a checkpoint.
        """

        def stop(number, frame):
            self.stop_signal = number
            if WORLD_SIZE == 1:
                # A second signal ends the process at once. torchrun repeats its own.
                signal.signal(number, before[number])

        before = {}
        # Python refuses in other threads, in which wandb.agent calls a function.
        with suppress(ValueError):
            before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
        first = self.first_step
        self.epoch_start = time.perf_counter(), first
        steps = batches(self.images.train, self.args, first, self.device)
        bar = tqdm(steps, total=self.steps, initial=first, unit="step", disable=SILENT)
        try:
            yield from enumerate(bar, first)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def record(self, step, loss, z, lr):
        """Count a step; log, evaluate, save when due; stop when asked to. UserError on NaN.

        loss and the embeddings z of one view are tensors on the device, read only now and then.
        """
        self.totals += torch.stack([loss, spread(z)])
        epoch, i = divmod(step + 1, self.steps_per_epoch)
        # Ranks agree on a signal only now and then; torchrun waits for them for 30 seconds.
        every = 1 if self.device.type == "cpu" else 10 if WORLD_SIZE > 1 else 50
        if i % every and not (self.stop_signal and WORLD_SIZE == 1):
            return
        asked = torch.tensor(self.stop_signal, device=self.device)
        if WORLD_SIZE > 1:
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            dist.all_reduce(self.totals)
            self.totals /= WORLD_SIZE
        agreed_signal = int(asked)
        finite = self.totals[0].isfinite()
        check(finite, f"step {step}: the loss is not finite; a lower --lr may help")
        if i == 0:
            start, first = self.epoch_start
            seconds = time.perf_counter() - start
            speed = (step + 1 - first) * self.args.batch_size / seconds
            record = dict(epoch=epoch, step=step + 1)
            record["loss"], record["spread"] = (self.totals / self.steps_per_epoch).tolist()
            record |= dict(lr=lr, seconds=seconds, samples_per_sec=speed)
            self.totals.zero_()
            self.records.append(record)
        due = epoch % self.args.checkpoint_every == 0 or epoch == self.args.epochs
        if agreed_signal or (i == 0 and due):
            self._save(step)
        if agreed_signal:
            if WORLD_SIZE > 1:
                # torchrun ends all ranks once one has exited, and rank 0 may still be writing.
                dist.barrier()
            if RANK == 0:
                self.tracker.finish()
                hint = f"add --run-dir {shlex.quote(str(self.dir))} --resume to the same command"
                print(f"stopped; to resume, {hint}", file=sys.stderr)
                self.lock.release()
            sys.exit(128 + agreed_signal)
        if i == 0:
            # After the checkpoint: the evaluation may take long.
            if RANK == 0:
                self._log()
            self.epoch_start = time.perf_counter(), step + 1

    def _write_log(self):
        with atomic_write(self.dir / "log.jsonl") as file:
            file.writelines(json.dumps(record).encode() + b"\n" for record in self.records)

    def _log(self):
        """Evaluate, if due, write log.jsonl, print the epoch, send it to Weights & Biases."""
        record, every = self.records[-1], self.args.eval_every
        epoch = record["epoch"]
        if epoch == self.args.epochs or (every and epoch % every == 0):
            record |= knn_monitor(self.encoder, self.images, self.args.knn_k)
        self._write_log()
        shown = ("loss", "samples_per_sec", "effective_rank", "knn_acc")
        values = [f"{key} {record[key]:.4g}" for key in shown if key in record]
        tqdm.write("  ".join([f"epoch {epoch} of {self.args.epochs}", *values]))
        # Through a pipe, as on Colab, lines would otherwise appear late.
        sys.stdout.flush()
        if record.get("spread", 1) < 0.05:
            text = f"warning: the embeddings collapse (spread {record['spread']:.3f})"
            print(text, file=sys.stderr)
        self.tracker.log(record)

    def _save(self, step):
        if RANK:
            return
        state = {name: module.state_dict() for name, module in self.state.items()}
        finite = all(p.isfinite().all() for p in self.state["network"].parameters())
        check(finite, f"step {step}: the weights are not finite; a lower --lr may help")
        state |= dict(step=step + 1, totals=self.totals, facts=self.facts, wandb_id=self.wandb_id)
        state["records"] = self.records
        save_torch(self.dir / "checkpoint.pt", state)

    def finish(self):
        """Write encoder.pt, embeddings.npz and curves.png; return the folder."""
        if WORLD_SIZE > 1:
            dist.destroy_process_group()
        if RANK:
            return self.dir
        images, args = self.images, self.args
        if not args.epochs and not self.first_step:
            # A later --resume compares its arguments.
            self._save(-1)
            self.records = [dict(epoch=0, step=0)]
            self._log()
        arrays = dict(images.extra, class_names=np.array(images.class_names, np.str_))
        for part in ("train", "test"):
            arrays[f"{part}_features"] = embed(self.encoder, images, part)
            arrays[f"{part}_labels"] = getattr(images, f"{part}_labels").numpy()
        with atomic_write(self.dir / "embeddings.npz") as file:
            np.savez(file, **arrays, meta=np.array(json.dumps(self.facts)))
        content = dict(
            self.facts,
            side=images.train.shape[3],
            mean=images.mean.cpu(),
            std=images.std.cpu(),
            state_dict={k: v.cpu() for k, v in self.encoder.state_dict().items()},
        )
        save_torch(self.dir / "encoder.pt", content)
        draw_curves(self.dir / "curves.png", self.records)
        self.tracker.log({name: self.dir / f"{name}.png" for name in ("curves", "views")})
        self.tracker.finish()
        self.lock.release()
        print(f"wrote {self.dir}; next: python knn_eval.py {shlex.quote(str(self.dir))} --pixels")
        return self.dir


class Tracker:
    """Weights & Biases with --track. A failure is printed once, and the run goes on without it."""

    run = None

    def __init__(self, args, folder, **options):
        if args.track:
            with self._failures():
                import wandb

                self.image, settings = wandb.Image, wandb.Settings(init_timeout=60)
                if hasattr(settings, "finish_timeout"):
                    # Newer versions: an unreachable server must not block the end of the run.
                    settings.finish_timeout = 120.0
                options |= dict(project=args.wandb_project, dir=str(folder), resume="allow")
                self.run = wandb.init(settings=settings, **options)

    @contextmanager
    def _failures(self):
        try:
            yield
        except Exception as error:
            self.run = None
            text = f"note: Weights & Biases failed; continuing without it ({error!r})"
            print(text, file=sys.stderr)

    def log(self, record):
        """Log a dict of numbers and paths of pictures.

        W&B drops steps that it has seen, such as those repeated after a kill.
        """
        with self._failures():
            if self.run:
                pictures = {k: self.image(str(v)) for k, v in record.items() if isinstance(v, Path)}
                self.run.log(record | pictures, step=record.get("step"), commit=True)

    def finish(self):
        """Upload the remaining data and end the W&B run."""
        with self._failures():
            if self.run:
                self.run.finish()
