"""Plumbing that simclr.py, byol.py, barlow_twins.py and knn_eval.py share.

Whatever changes a gradient is in the method files. This file feeds them (images, encoders), measures (kNN monitor,
spread), records (run folder, checkpoint, log, pictures, Weights & Biases) and turns mistakes into one-line errors.
"""

import copy
import errno
import hashlib
import io
import json
import math
import mmap
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import List, Optional, Union

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from tqdm.auto import tqdm

# What torchrun says: which of how many processes this is, on all machines and on this one.
RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ.get(key, alone)) for key, alone in
                                (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))  # fmt: skip

# ------------------------------------------------------------------------------------------ errors, command line


class UserError(Exception):
    """What a user can mend: each line is printed behind 'error: ', and the process ends with `status`."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


def check(condition, message):
    """Raise UserError(message) unless condition holds."""
    if not condition:
        raise UserError(message)


def cli(args_class, main):
    """Read the flags of `args_class` with tyro, run `main(args)`, and end as README.md's 'Exit status' says."""
    import tyro

    if hasattr(sys.stdout, "reconfigure"):  # a file name must not break printing, whatever the locale
        sys.stdout.reconfigure(errors="backslashreplace")
    # In a cell pasted into a notebook argv is the kernel's own; under `%run file.py --flag` it is the user's.
    argv = [] if "kernel_launcher" in sys.argv[0] else sys.argv[1:]
    try:
        main(tyro.cli(args_class, args=argv))
        sys.stdout.flush()  # here, where what goes wrong is said
    except UserError as error:
        _let_the_first_speak()
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(error.status)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a path too long, a file that may not be read: what is named in it is all there is to say
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            reason = " ".join(str(error).split())[:200]
            message = f"not enough memory; make the images, the batch or the network smaller ({reason})"
        elif WORLD_SIZE > 1 and ("gloo" in str(error) or isinstance(error, dist.DistError)):
            message = f"process {RANK} lost another one; go on with --resume"
            time.sleep(5)  # torchrun ends this one meanwhile, and the other has said why
        else:
            raise
        _let_the_first_speak()
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _let_the_first_speak():
    """Where all processes meet the same error the first one says it, and torchrun ends the others meanwhile."""
    if RANK:
        time.sleep(5)


def check_args(args):
    """Refuse numbers that the methods can not work with; tyro has refused wrong types. UserError."""
    limits = dict(
        seed=(0, 2**63), image_size=(4, 1024), hidden_dim=(1, 2**16), projection_dim=(1, 2**16),
        projection_layers=(0, 16), epochs=(0, 10**12), batch_size=(2, 10**12), lr=(0, None), weight_decay=(0, None),
        warmup_epochs=(0, 10**6), eval_every=(0, 10**12), knn_k=(1, 10**12), checkpoint_every=(1, 10**12),
        width=(16, 1024),  # narrower, oneDNN's backward of strided 1x1 convolutions writes past its memory (its issue 6035)
    )  # fmt: skip
    for key, (low, high) in limits.items():
        value = getattr(args, key)
        if value is not None:  # image_size: the images' own
            check(low <= value <= (high or value) and math.isfinite(value), f"--{key.replace('_', '-')} {value} must be at "
                  f"least {low} and {f'at most {high}' if high else 'finite'}")  # fmt: skip
    check(args.batch_size % WORLD_SIZE == 0 and args.batch_size >= 2 * WORLD_SIZE, f"--batch-size {args.batch_size} is "
          f"of all {WORLD_SIZE} processes; it must be a multiple of {WORLD_SIZE}, two images each or more")  # fmt: skip
    check(args.lr > 0, "--lr 0 trains nothing; use --epochs 0 for the untrained encoder")
    check(args.knn_temperature is None or 0 < args.knn_temperature < math.inf,
          f"--knn-temperature {args.knn_temperature} must be above 0 and finite")  # fmt: skip


def count_steps(n, args):
    """Steps of an epoch: whole batches only, what is left over comes in another epoch. UserError where there is none."""
    check(n >= args.batch_size or args.epochs == 0, f"--batch-size {args.batch_size} is more than the {n} training "
          f"images; use at most {n}")  # fmt: skip
    return n // args.batch_size


def pick_device(name, deterministic=False):
    """'auto' takes CUDA, else Apple's MPS, else the CPU. UserError where the named one is not there.

    deterministic: from here on PyTorch's slower kernels that always sum in one order; it warns where it has none.
    """
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available() and WORLD_SIZE == 1,
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, available in there.items() if available)
    check(there[name], f"--device {name}: no such device here; use --device auto or cpu")
    if name == "cuda" and WORLD_SIZE > 1:
        check(LOCAL_RANK < torch.cuda.device_count(), f"{torch.cuda.device_count()} GPUs for more processes; "
              "set torchrun's --nproc-per-node to the number of GPUs")  # fmt: skip
        return torch.device("cuda", LOCAL_RANK)
    return torch.device(name)


def pick_precision(name, device):
    """'auto': bf16 where the GPU computes it natively (capability 8.0 and up), fp16 on older ones, fp32 elsewhere."""
    if name == "auto":
        # torch.cuda.is_bf16_supported() counts emulation, so ask for the capability itself.
        name = "fp32" if device.type != "cuda" else "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    check(name != "fp16" or device.type == "cuda", f"--precision fp16 needs --device cuda, not {device.type}")
    return name


def seed_step(seed, step, stream=None):
    """Make every later draw a pure function of (seed, step, stream), so that a resumed run repeats nothing.

    `stream` tells apart what is drawn at the same step: 1 the weights, 2 the pictures, else the views of each process.
    """
    if stream is None:
        stream = RANK and RANK + 2
    torch.manual_seed(int(np.random.SeedSequence([seed, step, stream]).generate_state(1, np.uint64)[0] >> 1))


def epoch_order(n, batch_size, seed, epoch):
    """This process's images of each batch of one epoch, int64 [n // batch_size, batch_size / processes] on the CPU.

    One permutation of range(n) for all processes, a function of the seed and the epoch; what is left over is dropped.
    """
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
    order = torch.randperm(n, generator=generator)[: n // batch_size * batch_size]
    return order.view(-1, WORLD_SIZE, batch_size // WORLD_SIZE)[:, RANK]


# ------------------------------------------------------------------------------------------ processes


def join_processes(device):
    """Join the other processes that torchrun started: over NCCL on GPUs, over gloo elsewhere."""
    if WORLD_SIZE > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        check("MASTER_ADDR" in os.environ, "WORLD_SIZE is set, but not by torchrun; unset it, or start with torchrun")
        # The others wait hours where the first one downloads or evaluates for long; torchrun ends them if it dies.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))


def distribute(network, device):
    """The network behind DistributedDataParallel, which averages the gradients of all processes; alone, itself.

    On GPUs its BatchNorms see the global batch (SyncBatchNorm, in place); on CPUs each process's own part.
    """
    if WORLD_SIZE == 1:
        return network
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return nn.parallel.DistributedDataParallel(network, [device] if device.type == "cuda" else None)


class _Gather(torch.autograd.Function):
    """[...] of every process -> [processes, ...] on each; its gradient is summed over what all made of it."""

    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(WORLD_SIZE, *x.shape)
        dist.all_gather_into_tensor(out.flatten(0, 1), x.contiguous())
        return out

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[RANK]


def gather(z1, z2):
    """z1 and z2 [N, D] of all processes in their order [M, D], and the row of this process's first; with gradient."""
    if WORLD_SIZE == 1:
        return z1, z2, 0
    return *_Gather.apply(torch.stack([z1, z2])).transpose(0, 1).flatten(1, 2), RANK * len(z1)


@contextmanager
def first_of_each_machine_first():
    """The first process on each machine does what is inside (downloads, decodes), and the others when it is done."""
    if LOCAL_RANK:
        dist.barrier()
    yield
    if WORLD_SIZE > 1 and not LOCAL_RANK:
        dist.barrier()


def of_all(value):
    """What each process has, in their order, on every process."""
    box = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(box, value)
    return box


def of_the_first(value):
    """What process 0 has, on every process."""
    box = [value]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(box)
    return box[0]


# ------------------------------------------------------------------------------------------ images


@dataclass
class Images:
    """A data set. Labels are -1 where unlabelled; `mean` and `std` are of the training images in [0, 1]."""

    train: Union[torch.Tensor, "OnDisk"]  # uint8 [N, 3, S, S] on the device, in memory or on disk; S >= size
    train_labels: torch.Tensor  # int64 [N] on the CPU
    test: Union[torch.Tensor, "OnDisk"]  # uint8 [M, 3, S, S]; M may be 0
    test_labels: torch.Tensor  # int64 [M]
    class_names: List[str]
    size: int  # pixels a side of what the encoder sees
    mean: List[float]
    std: List[float]
    grey: bool  # the three channels are equal
    train_files: Optional[List[str]] = None  # relative to data_dir, for images that came as files
    test_files: Optional[List[str]] = None


def load_images(dataset, data_dir="data", image_size=None, device="cpu", cache_dir="cache"):
    """Load a data set as uint8 images, square, RGB, for an encoder that sees `image_size` pixels (None: their own size).

    They lie on the device where they fit, else in memory; a folder's else in the file under cache_dir where each image is
    kept once it is decoded. UserError where the data is missing, broken, or can not be trained on.
    """
    train_files = test_files = None
    if dataset == "folder":
        train_files, train_labels, test_files, test_labels, class_names = _list_folder(Path(data_dir))
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # what claims that many pixels is broken
            images, image_size = _decoded(Path(data_dir), train_files + test_files, image_size, Path(cache_dir))
        train_files, test_files = ([name for name, *_ in files] for files in (train_files, test_files))
        train, test = images.part(0, len(train_files)), images.part(len(train_files), len(images))
    else:
        if dataset == "digits":
            train, train_labels, test, test_labels = _digits()
            class_names = [str(i) for i in range(10)]
        elif dataset == "npz":
            train, train_labels, test, test_labels = _npz(Path(data_dir))
            class_names = [str(i) for i in range(int(max([-1, *train_labels, *test_labels])) + 1)]
        else:
            train, train_labels, test, test_labels, class_names = _torchvision(dataset, data_dir)
        train, test = torch.as_tensor(train), torch.as_tensor(test)
        if dataset != "stl10":  # that one comes channels first
            train, test = _channels_first(train), _channels_first(test)
        image_size = image_size or min(224, *train.shape[2:])
        train, test = square(train, image_size), square(test, image_size)
    check(image_size >= 4, f"the images are {image_size} pixels a side; give --image-size 4 or more")
    labels = [torch.as_tensor(part).long() for part in (train_labels, test_labels)]
    missing = [name for name, part in zip(("training", "test"), labels) if not (part >= 0).any()]
    if missing and RANK == 0:
        print(f"no labels in the {' and the '.join(missing)} images: no kNN accuracy")

    some = train[:: math.ceil(math.prod(train.shape) / 2**28)]  # up to 256 MB of them tell the mean and the deviation
    counts = sum(torch.stack([torch.bincount(chunk[:, c].flatten(), minlength=256) for c in range(3)])
                 for chunk in some.split(max(1, 2**23 // image_size**2))).double()  # fmt: skip
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts * values).sum(1) / counts.sum(1)
    std = ((counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1)).sqrt().clamp(min=1e-3)
    grey = bool((some[:, 0] == some[:, 1]).all() and (some[:, 0] == some[:, 2]).all())
    train, test = _place([train, test], torch.device(device))
    return Images(train, labels[0], test, labels[1], class_names, image_size, mean.tolist(), std.tolist(), grey,
                  train_files, test_files)  # fmt: skip


def _place(parts, device):
    """The images on the device where they fit, else in memory where they do, else where they are."""
    size, memory = sum(math.prod(part.shape) for part in parts), _memory() / 4
    room = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else memory
    if size > max(room, memory):
        return parts
    moved = []
    for part in parts:
        place = torch.empty(part.shape, dtype=torch.uint8, device=device if size <= room else "cpu")
        for start in range(0, len(part), 1024):
            place[start : start + 1024] = part[start : start + 1024]
        moved.append(place)
    return moved


def _memory():
    """This process's share of the machine's memory in bytes."""
    if not hasattr(os, "sysconf"):  # Windows
        return 2**33
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in map(Path, ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        text = path.read_text().strip() if path.exists() else ""  # a container's own limit
        limits += [int(text)] if text.isdigit() else []
    return min(limits) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _channels_first(images):
    """[N, H, W] or [N, H, W, 3] -> [N, 3, H, W]."""
    return images.permute(0, 3, 1, 2) if images.ndim == 4 else images[:, None].expand(-1, 3, -1, -1)


def square(images, size):
    """Shorter side of images [N, 3, H, W] resized to `size` with antialiasing; centre square."""
    height, width = images.shape[2:]
    if min(height, width) != size and len(images):
        shape = [side * size // min(height, width) for side in (height, width)]
        resized = []
        for chunk in images.split(1024):
            chunk = F.interpolate(chunk.float(), shape, mode="bilinear", antialias=True)
            resized.append(chunk.round().clamp(0, 255).byte())
        images = torch.cat(resized)
        height, width = shape
    top, left = (height - size) // 2, (width - size) // 2
    return images[:, :, top : top + size, left : left + size].contiguous()


def _digits():
    """scikit-learn's 1,797 digits of 8x8 pixels in a fixed stratified split, 1,437 to train and 360 to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    train, test, train_labels, test_labels = train_test_split(
        images, digits.target, test_size=360, stratify=digits.target, random_state=0
    )
    return train, train_labels, test, test_labels


def _torchvision(dataset, data_dir):
    name = dict(mnist="MNIST", fashion_mnist="FashionMNIST", cifar10="CIFAR10", cifar100="CIFAR100", stl10="STL10")
    check(dataset in name, f"there is no data set {dataset!r}")
    data_class = getattr(torchvision.datasets, name[dataset])
    parts = dict(split="train+unlabeled"), dict(split="test")
    if dataset != "stl10":
        parts = dict(train=True), dict(train=False)
    try:
        with first_of_each_machine_first():
            train, test = (data_class(data_dir, download=True, **part) for part in parts)
    except Exception as error:  # no network, a full disk, a damaged archive: many types, one remedy
        reason = " ".join(str(error).split()) or type(error).__name__
        place = Path(data_dir) / (f"{name[dataset]}/raw" if "mnist" in dataset else "")
        raise UserError(
            f"could not get {dataset} ({reason}); place its original files in {str(place)!r}, or use --dataset folder"
        ) from None
    labels = [getattr(part, "labels" if dataset == "stl10" else "targets") for part in (train, test)]
    return train.data, labels[0], test.data, labels[1], list(train.classes)


def _npz(path):
    """MedMNIST's form: train_images uint8 [N, H, W] or [N, H, W, 3]; train_labels, test_images, test_labels optional."""
    arrays = read_npz(path, ["train_images"], ["train_labels", "test_images", "test_labels"])
    train = arrays["train_images"]
    test = arrays.get("test_images", train[:0] if train.ndim else train)
    parts = []
    for part, images in (("train", train), ("test", test)):
        shape_fits = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
        check(images.dtype == np.uint8 and shape_fits, f"{str(path)!r}: {part}_images is {images.dtype} "
              f"{list(images.shape)}; it must be uint8 [N, H, W] or [N, H, W, 3]")  # fmt: skip
        check(min(images.shape[1:]) > 0, f"{str(path)!r}: {part}_images has no pixels")
        images = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
        labels = arrays.get(f"{part}_labels", np.full(len(images), -1))
        check(np.issubdtype(labels.dtype, np.integer) and labels.size == len(images), f"{str(path)!r}: {part}_labels "
              f"is {labels.dtype} {list(labels.shape)}; it must hold one integer for each of {len(images)} images")  # fmt: skip
        check(labels.size == 0 or -1 <= labels.min() <= labels.max() < 1e6,
              f"{str(path)!r}: {part}_labels must be 0 to 999999, or -1 for unlabelled")  # fmt: skip
        parts += [images, labels.reshape(-1).astype(np.int64)]
    check(len(train) > 0, f"{str(path)!r}: train_images is empty")
    check(len(np.unique(parts[1])) > 1 or parts[1][0] < 0, f"{str(path)!r}: one class only, {parts[1][:1]}")
    return parts


def read_npz(path, needed, optional=()):
    """Read arrays from an untrusted .npz: no pickles, and little memory for a small file. UserError."""
    path = Path(path)
    check(path.is_file(), f"{str(path)!r} is no file; name an .npz file")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            missing = [name for name in needed if name not in members]
            check(not missing, f"{str(path)!r} lacks {', '.join(missing)}")
            wanted = {name: members[name] for name in [*needed, *optional] if name in members}
            size, room = sum(info.file_size for info in wanted.values()), max(2**27, 20 * path.stat().st_size)
            check(size <= room, f"{str(path)!r} would unpack to {size} bytes; write it uncompressed, by numpy.savez")
            return {name: _read_npy(archive, info) for name, info in wanted.items()}
    except UserError:
        raise
    except Exception as error:  # numpy, zipfile and zlib raise a dozen types on damaged files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{str(path)!r} is no readable .npz file: {reason}") from None


def _read_npy(archive, info):
    npy = np.lib.format
    with archive.open(info) as file:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{info.filename} is neither stored nor deflated")
        read_header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if not dtype.itemsize:  # as many of them as one likes, in no bytes
            raise ValueError(f"{info.filename} is of {dtype}")
        if not dtype.hasobject and math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
            raise ValueError(f"{info.filename} claims {dtype} {list(shape)} and holds something else")
    with archive.open(info) as file:
        return npy.read_array(file, allow_pickle=False)


IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".jp2"}


def _list_folder(root):
    """Files and labels of `train/<class>/*` with `test/` or `val/`, or of any tree of images without labels.

    A file is (name relative to root, bytes, time of its last change).
    """
    check(root.is_dir(), f"--data-dir {str(root)!r} is no folder; name the root of the images")
    train_root = root / "train" if (root / "train").is_dir() else root
    test_root = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if train_root == root:
        test_root = None
    found, parents, ignored = [], [], 0  # parents: the folders of each file below train/ and below test/
    for part in (train_root, test_root):
        files = _find_files(part) if part else []
        images = [file for file in files if os.path.splitext(file[0])[1].lower() in IMAGE_ENDINGS]
        ignored += len(files) - len(images)
        parents.append([name.split(os.sep)[:-1] for name, *_ in images])
        below = "" if part in (root, None) else part.name + os.sep
        found.append([(below + name, *facts) for name, *facts in images])
    if ignored and RANK == 0:
        print(f"ignored {ignored} files whose names do not end like an image's")
    check(found[0], f"--data-dir {str(root)!r}: no images found in {str(train_root)!r}")
    loose = [name for (name, *_), above in zip(found[0], parents[0]) if not above]
    has_classes = train_root != root and not loose
    if train_root != root and 0 < len(loose) < len(found[0]) and RANK == 0:
        print(f"no labels: {str(root / loose[0])!r} is in no class's folder")
    class_names = sorted({above[0] for above in parents[0]}) if has_classes else []
    check(len(class_names) != 1, f"--data-dir {str(root)!r}: one class only, {class_names[:1]}; "
          "put each class in a folder of its own, or all images in one folder without train/")  # fmt: skip
    strangers = sorted({above[0] for above in parents[1] if above} - set(class_names)) if has_classes else []
    check(not strangers, f"{str(test_root)!r} has classes that train/ lacks: {strangers[:5]}")
    if test_root and not has_classes and any(parents[1]) and RANK == 0:
        print(f"the classes' folders in {str(test_root)!r} are no labels, since {str(train_root)!r} has none")
    index = {name: i for i, name in enumerate(class_names)}
    labels = [[index[above[0]] if has_classes and above else -1 for above in part] for part in parents]
    return found[0], labels[0], found[1], labels[1], class_names


def _find_files(root):
    """(name, bytes, time of the last change) of the files below root, sorted by name.

    Links are followed, each folder once; what is hidden (.ipynb_checkpoints) is not.
    """
    found, seen, start = [], set(), len(os.path.join(root, ""))

    def unreadable(error):
        raise UserError(f"{error.filename!r} can not be read ({error.strerror}); mend or remove it")

    for folder, folders, names in os.walk(root, onerror=unreadable, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = sorted(
            f
            for f in folders
            if f[0] != "." and real not in seen and not os.path.exists(os.path.join(folder, f, "args.json"))
        )  # a run's pictures
        names = names if real not in seen else ()
        seen.add(real)
        for name in names:
            path = os.path.join(folder, name)
            try:
                facts = os.stat(path)
                kept = stat.S_ISREG(facts.st_mode)  # no pipes
            except OSError:
                kept, facts = True, os.lstat(path)  # a link to nothing is a broken image
            if kept and name[0] != ".":
                found.append((path[start:], facts.st_size, facts.st_mtime_ns))
    return sorted(found)


def _usual_side(root, files):
    """The median shorter side of up to 100 files in pixels; 224 where none can be read."""
    sides = []
    for name, *_ in files[:: max(1, len(files) // 100)]:
        try:
            with Image.open(root / name) as image:
                sides.append(min(image.size))
        except Exception:
            continue  # _decode names it
    return int(np.median(sides)) if sides else 224


HEADER = 4096  # bytes before the images in a file of decoded ones


def _decoded(root, files, image_size, cache_dir):
    """The images of `files` below root, from the file under cache_dir where they are kept once they are decoded.

    Returns OnDisk and the image size. They are kept an eighth larger than that, for the crops, where they are as large.
    The file is decoded anew where an image, the size or this code has changed. UserError.
    """
    usual = _usual_side(root, files)
    image_size = image_size or min(224, usual)
    side = max(image_size, min(image_size * 8 // 7, usual))
    images = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    header = json.dumps(dict(version=1, images=images, shape=[len(files), 3, side, side])).encode().ljust(HEADER)
    size = HEADER + len(files) * 3 * side * side
    root_hash = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8]
    path = (
        cache_dir / f"{''.join(c if c.isalnum() else '_' for c in root.resolve().name)[:40]}-{root_hash}-{side}.images"
    )

    def is_whole():
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return file.read(HEADER) == header and path.stat().st_size == size

    with first_of_each_machine_first():
        try:
            new = not cache_dir.exists()
            if not is_whole() and not LOCAL_RANK:
                cache_dir.mkdir(parents=True, exist_ok=True)
                with _locked(cache_dir) as alone:
                    cache_dir.mkdir(exist_ok=True)  # the run that we waited for has removed it where it failed
                    if not is_whole():  # nor has it decoded the same images
                        if path.exists():
                            print(
                                f"{str(path)!r} is of other images or another version, or damaged: decoding them anew"
                            )
                        for left in cache_dir.glob(f".{path.name}.*.tmp") if alone else ():
                            left.unlink()  # by a run that was killed
                        room = shutil.disk_usage(cache_dir).free
                        check(room > size, f"no room for the decoded images in --cache-dir {str(cache_dir)!r}: they take "
                              f"{size} bytes, and {room} are free; name another folder, or a smaller --image-size")  # fmt: skip
                        with atomic_write(path, f".{os.urandom(4).hex()}") as file:  # without locks two may decode
                            file.write(header)
                            for rows in _decode(root, [name for name, *_ in files], side):
                                file.write(rows)
        except BaseException as error:
            if new and cache_dir.is_dir() and not any(cache_dir.iterdir()):
                cache_dir.rmdir()
            if not isinstance(error, OSError):
                raise
            raise UserError(f"--cache-dir {str(cache_dir)!r} can not be used: {error.strerror}; name another") from None
        check(is_whole(), f"{str(path)!r} is not what was decoded: another run has the same --cache-dir; start again")
        return OnDisk(path, (len(files), 3, side, side)), image_size


def _decode(root, names, side):
    """Decode image files in parallel: yields uint8 [n, 3, side, side] in their order.

    Every broken file is named in the UserError that comes in the end.
    """

    def decode(name):
        with Image.open(root / name) as image:
            image.draft(None, (2 * side, 2 * side))  # JPEG: no larger than a good resize needs (as Pillow's thumbnail)
            image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise ValueError("32-bit floats, of which nothing says what is white; save it with 8 or 16 bits")
            if image.mode.startswith("I"):  # 16 bits a pixel: keep the upper 8
                image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
            image = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BILINEAR)
        return np.asarray(image).transpose(2, 0, 1)

    def decode_all(names):
        rows, broken = np.zeros((len(names), 3, side, side), np.uint8), []
        for i, name in enumerate(names):
            try:
                rows[i] = decode(name)
            except Exception as error:
                reason = " ".join(str(error).split())
                broken.append(f"{str(root / name)!r} is no readable image ({reason}); mend or remove it")
        return rows, broken

    n = max(1, min(32, 2**22 // (3 * side**2)))  # up to 4 MB, since two parts a core wait for the disk
    parts, broken = [names[i : i + n] for i in range(0, len(names), n)], []
    with tqdm(total=len(names), desc="decoding", unit="image", leave=False, disable=not _interactive()) as bar:
        for rows, lines in ahead(decode_all, parts, os.cpu_count() or 1, 2 * (os.cpu_count() or 1)):
            broken += lines
            bar.update(len(rows))
            yield rows
    check(not broken, "\n".join(broken))


class OnDisk:
    """uint8 images [N, 3, S, S] in a file: an index or a slice copies those rows into memory, and no more stays there."""

    def __init__(self, path, shape):
        with open(path, "rb") as file:  # to read only: Linux refuses a mapping to write that is larger than the memory
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of what it may not write to; nothing here does
            self.rows = torch.frombuffer(self.map, dtype=torch.uint8, offset=HEADER).view(shape)
        self.shape = self.rows.shape

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        index = index if isinstance(index, torch.Tensor) else torch.arange(len(self))[index]
        size, first = math.prod(self.shape[1:]), HEADER + self.rows.storage_offset()
        copies, n = torch.empty(len(index), *self.shape[1:], dtype=torch.uint8), max(1, 2**26 // size)
        for part, copied in zip(index.split(n), copies.split(n)):
            for i in part.tolist() if hasattr(mmap, "MADV_WILLNEED") else ():  # ask the disk for all of them at once
                page = (first + i * size) // mmap.PAGESIZE * mmap.PAGESIZE
                self.map.madvise(mmap.MADV_WILLNEED, page, first + i * size + size - page)
            torch.index_select(self.rows, 0, part, out=copied)
            if hasattr(mmap, "MADV_DONTNEED"):
                self.map.madvise(mmap.MADV_DONTNEED)  # the system's cache of the file stays; it is nobody's memory
        return copies

    def part(self, start, end):
        """The images start:end as another one of these."""
        other = copy.copy(self)
        other.rows = self.rows[start:end]
        other.shape = other.rows.shape
        return other


def ahead(call, items, threads, depth):
    """Yield call(item) for every item in order, computed by threads, up to `depth` of them before they are asked for."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _is_on(images, device):
    return isinstance(images, torch.Tensor) and images.device.type == device.type  # "cuda" is not equal to "cuda:0"


def take(images, orders, device):
    """Yield images[order] on the device for every order. From memory or disk a thread reads them two steps ahead."""
    if _is_on(images, device):
        yield from (images[order] for order in orders)
        return
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch(order):
        if not stream:
            return images[order.cpu()].to(device)
        # beside the stream that computes; without the device this thread would take memory of GPU 0 as well
        with torch.cuda.device(device), torch.cuda.stream(stream):
            batch = images[order.cpu()].pin_memory().to(device, non_blocking=True)
            stream.synchronize()  # holds up this thread alone
        return batch

    for batch in ahead(fetch, orders, threads=1, depth=2):
        if stream:
            batch.record_stream(torch.cuda.current_stream())  # its memory is not free before the step is done
        yield batch


def feed(images, args, first_step, device):
    """Yield this process's uint8 images of every step from first_step to the end of the run, on the device."""

    def orders():
        steps = len(images) // args.batch_size
        for epoch in range(first_step // max(1, steps), args.epochs):
            order = epoch_order(len(images), args.batch_size, args.seed, epoch)
            order = order.to(device) if _is_on(images, device) else order  # once an epoch, not at every step
            yield from order[max(0, first_step - epoch * steps) :]

    return take(images, orders(), device)


# ------------------------------------------------------------------------------------------ encoder and evaluation


class _ResNet(torchvision.models.ResNet):
    """torchvision's ResNet with `width` channels in the first stage instead of 64."""

    def __init__(self, block, layers, width):
        self.width = width
        super().__init__(block, layers)

    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64:
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // 64, *args, **kwargs)


def build_encoder(name, image_size, width=64):
    """torchvision's ResNet without its classifier, and the width D of its features.

    Up to 64 px the stem is one 3x3 convolution without max-pool (SimCLR, appendix B.9). The keys of the state dict are
    torchvision's.
    """
    resnet = torchvision.models.resnet
    block, layers = {
        "resnet10": (resnet.BasicBlock, [1, 1, 1, 1]),
        "resnet18": (resnet.BasicBlock, [2, 2, 2, 2]),
        "resnet34": (resnet.BasicBlock, [3, 4, 6, 3]),
        "resnet50": (resnet.Bottleneck, [3, 4, 6, 3]),
    }[name]
    encoder = _ResNet(block, layers, width)
    encoder.bn1 = nn.BatchNorm2d(width)
    small = image_size <= 64
    encoder.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False) if small else nn.Conv2d(3, width, 7, 2, 3, bias=False)
    nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    if small:
        encoder.maxpool = nn.Identity()
    encoder.fc = nn.Identity()
    return encoder, 8 * width * block.expansion


def load_encoder(path):
    """The encoder in an encoder.pt, in eval mode, and the rest of that file as a dict: image_size, mean, std and so on.

    `encoder(normalise(images, info["mean"], info["std"]))` gives features [N, info["feature_dim"]] of images of that
    size. The file is read as untrusted: UserError where it is damaged or something else.
    """
    info = load_torch(path, "name the encoder.pt of a run")
    try:
        kinds = dict(encoder=str, width=int, image_size=int, mean=list, std=list, class_names=list, state_dict=dict)
        wrong = [key for key, kind in kinds.items() if not isinstance(info[key], kind) or isinstance(info[key], bool)]
        wrong += [key for key in ("mean", "std") if [type(v) for v in info[key]] != [float] * 3]
        if wrong or not all(type(name) is str for name in info["class_names"]):
            raise ValueError(f"{(wrong or ['class_names'])[0]} is of another kind")
        if not (4 <= info["image_size"] <= 1024 and 1 <= info["width"] <= 1024 and all(map(math.isfinite, info["mean"] + info["std"]))
                and min(info["std"]) > 0):  # fmt: skip
            raise ValueError("image_size, mean or std is out of range")
        with torch.device("meta"):  # no memory for what a damaged file may claim
            encoder, info["feature_dim"] = build_encoder(info["encoder"], info["image_size"], info["width"])
        state = info.pop("state_dict")
        for key, like in encoder.state_dict().items():
            if not (expect(state.get(key), like).is_contiguous() and torch.isfinite(state[key]).all()):
                raise ValueError("a tensor in it overlaps itself or is not finite")
            state[key] = state[key].clone()  # two may share their memory
        encoder.load_state_dict(state, assign=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{str(path)!r} is no encoder of these scripts: {reason}") from None
    return encoder.eval(), info


def normalise(images, mean, std):
    """uint8 or [0, 1] float images [N, 3, H, W] -> float32, zero mean and unit variance by the training images."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)


@torch.no_grad()
def embed(encoder, images, mean, std, size=None, rows=None, batch_size=None):
    """Features [N, D] float32 of clean uint8 images, by the encoder in eval mode (and its mode put back).

    images [N, 3, S, S] are resized to `size` (None: S). rows: indices of those to embed, else all.
    """
    training, device = encoder.training, next(encoder.parameters()).device
    size, rows = size or images.shape[3], torch.arange(len(images)) if rows is None else rows
    batch_size = batch_size or max(1, min(500, 2**21 // size**2))  # 500 images of 224 pixels fill 5 GB
    encoder.eval()
    features = [torch.zeros(0, encoder(torch.zeros(1, 3, size, size, device=device)).shape[1], device=device)]
    for batch in take(images, rows.split(batch_size), device):
        batch = normalise(square(batch, size), mean, std).contiguous(memory_format=torch.channels_last)
        features.append(encoder(batch).float())
    encoder.train(training)
    return torch.cat(features)


def spread(z):
    """How far embeddings z [N, D] spread once L2-normalised: sqrt(D) x standard deviation, 1 isotropic, 0 collapsed."""
    z = F.normalize(z.float(), dim=1)
    return z.std(0, correction=0).mean() * z.shape[1] ** 0.5


@torch.no_grad()
def knn_accuracy(train_features, train_labels, test_features, test_labels, k=20, temperature=None):
    """Accuracy of a cosine kNN vote in float32 on the features' device: the monitor inside training.

    temperature None: majority; else votes exp(similarity / temperature) (Wu et al. 2018). knn_eval.py is the exact one.
    """
    device = train_features.device
    classes, train_ids = train_labels.to(device).unique(return_inverse=True)
    train, test = F.normalize(train_features.float(), dim=1), F.normalize(test_features.float(), dim=1)
    k, right = min(k, len(train)), 0
    rows = max(1, min(1024, 2**27 // len(train)))  # up to 512 MB of similarities
    for queries, labels in zip(test.split(rows), test_labels.to(device).split(rows)):
        similarity, index = (queries @ train.T).topk(k)
        # Less the largest: exp can then neither overflow nor be zero for all, and the vote is the same.
        behind = similarity - similarity[:, :1]
        weight = torch.ones_like(behind) if temperature is None else (behind / temperature).exp()
        votes = torch.zeros(len(queries), len(classes), device=device).scatter_add_(1, train_ids[index], weight)
        right += (classes[votes.argmax(1)] == labels).sum()
    return float(right) / len(test)


# ------------------------------------------------------------------------------------------ pictures


def draw_views(path, images, views):
    """A PNG grid: each row one of the uint8 `images` [N, 3, S, S] and its random views, a list of [N, 3, H, H] in [0, 1]."""
    if RANK:
        return
    columns = [square(images, views[0].shape[3]).float() / 255, *views]
    rows = torch.stack([c.float().cpu().clamp(0, 1) for c in columns], 1).flatten(0, 1)
    rows = F.interpolate(rows, scale_factor=max(1, 64 // rows.shape[2]), mode="nearest")
    grid = torchvision.utils.make_grid(rows, nrow=len(columns), padding=2, pad_value=1.0)
    gap = torch.ones(3, grid.shape[1], 8)  # between the images and their views
    grid = torch.cat([grid[:, :, : rows.shape[3] + 2], gap, grid[:, :, rows.shape[3] + 2 :]], dim=2)
    with atomic_write(path) as file:
        Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "PNG")


def draw_curves(path, records):
    """A PNG of the loss over the epochs and, below it, of the kNN accuracy where it was evaluated."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    judged = [record for record in records if "knn_acc" in record]
    figure = Figure(figsize=(7, 6 if judged else 3.5), layout="constrained")
    axes = figure.subplots(2 if judged else 1, sharex=True, squeeze=False)[:, 0]
    curves = [
        (records, "loss", 1, "loss, mean of the epoch"),
        (judged, "knn_acc", 100, "kNN accuracy on the test set in %"),
    ]
    for part, (points, key, scale, label), colour in zip(axes, curves, ("tab:blue", "tab:orange")):
        line = "-" if len(points) > 60 else ".-"
        part.plot([point["epoch"] for point in points], [scale * point[key] for point in points], line, color=colour)
        part.set(ylabel=label)
        part.xaxis.set_major_locator(MaxNLocator(integer=True))
        part.grid(alpha=0.3)
    axes[-1].set(xlabel="epoch")
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120, format="png")


def draw_embedding(path, points, labels, class_names, title):
    """A PNG of points [M, 2] coloured by class, in a random order, so that no class covers another."""
    from matplotlib.figure import Figure

    def shown(text, most=40):  # `$` is matplotlib's sign of mathematics, and a name that is no text would stop it
        return str(text)[:most].encode("utf-8", "replace").decode().replace("$", r"\$")

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    present, ids = np.unique(labels, return_inverse=True)
    colours, order = matplotlib_colours(len(present)), np.random.default_rng(0).permutation(len(points))
    axes.scatter(*np.asarray(points)[order].T, s=8, color=colours[ids[order]], alpha=0.7, linewidths=0)
    for colour, label in zip(colours, present if len(present) <= 20 else ()):
        name = class_names[label] if 0 <= label < len(class_names) else "unlabelled" if label == -1 else label
        axes.scatter([], [], s=8, color=colour, label=shown(name))
    if 1 < len(present) <= 20:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=2)
    axes.set(title=shown(title, 80), xticks=[], yticks=[])
    with atomic_write(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that its font lacks
        figure.savefig(file, dpi=120, format="png")


def matplotlib_colours(n):
    """n colours as told apart as matplotlib's maps allow."""
    import matplotlib

    return matplotlib.colormaps["tab10" if n <= 10 else "tab20" if n <= 20 else "turbo"](
        np.arange(n) if n <= 20 else np.linspace(0, 1, n)
    )


# ------------------------------------------------------------------------------------------ run folder


@contextmanager
def atomic_write(path, own=""):
    """Yield a binary file that becomes `path` only when it is whole; a failure leaves the earlier file. UserError.

    own: part of its temporary name, where several processes may write the same file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}{own}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass
        if not isinstance(error, OSError):
            raise
        raise _write_error(path, error) from None


def _write_error(path, error):
    no_room = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    what = f"could not write {str(path)!r}: {error.strerror or error}"
    return UserError(f"{what}; make room; a training goes on with --resume" if no_room else what, 1 if no_room else 2)


def lock(folder, wait):
    """Lock a folder against other processes, until the returned descriptor is closed or this process ends.

    BlockingIOError where it is locked already and we do not wait. None where there are no locks.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None  # Windows
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return descriptor
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None  # a file system without locks, such as Google Drive's


@contextmanager
def _locked(folder):
    try:
        descriptor = lock(folder, wait=False)
    except BlockingIOError:
        print(f"waiting for another run that decodes images into {str(folder)!r}")
        descriptor = lock(folder, wait=True)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _interactive():
    return RANK == 0 and sys.stderr.isatty() or "ipykernel" in type(sys.stdout).__module__


def git_commit():
    """The commit of these files, "-dirty" behind it where files were changed since; None outside of git."""
    command = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


class Run:
    """A run folder: args.json, log.jsonl, checkpoint.pt, and progress, signals and Weights & Biases around them."""

    # A resumed run may differ from the first start in these; all else must agree.
    MAY_CHANGE = {"run_dir", "resume", "device", "precision", "compile", "deterministic", "data_dir", "cache_dir",
                  "eval_every", "checkpoint_every", "knn_k", "knn_temperature", "track", "wandb_project", "wandb_entity"}  # fmt: skip

    def __init__(self, method, args):
        """Find the folder and read the checkpoint in it; nothing is written before start(). UserError.

        Of several processes the first alone reads and writes the folder; the others get from it what they need.
        """
        for rank, theirs in enumerate(of_all(asdict(args))):
            other = [
                f"--{key.replace('_', '-')} {theirs[key]}"
                for key, value in asdict(args).items()
                if value != theirs[key]
            ]
            check(not other, f"process {rank} was started with {', '.join(other)}, unlike process {RANK}")
        self.method, self.args, self.checkpoint, self.before = method, args, None, {}
        self.asked, self.stopped, self.bar, self.lock = 0, 0, None, None
        self.knn_shown = ""  # on the progress bar, the last accuracy
        self.read, self.skipped_in_a_row = 0, 0  # rows of the epoch's statistics that advance() has seen
        check(args.run_dir or not args.resume, "--resume needs --run-dir: the folder of the run to go on with")
        name = f"{method}-{args.dataset}-s{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.dir = Path(args.run_dir or Path("runs") / name)
        while not args.run_dir and self.dir.exists():  # two runs started in the same second
            self.dir = self.dir.with_name(self.dir.name + "x")
        if RANK == 0 and args.resume:
            self.checkpoint = self._read_checkpoint()
            self.before = self.checkpoint or self._read_config()
            if self.before:
                self._compare()
        elif RANK == 0:
            self._check_empty()
        self.dir, self.checkpoint = of_the_first((self.dir, self.checkpoint))

    def _check_empty(self):
        held = [f for f in ("args.json", "checkpoint.pt", "log.jsonl", "embeddings.npz") if (self.dir / f).exists()]
        check(not held, f"--run-dir {str(self.dir)!r} already holds a run ({held[0] if held else ''}); "
              "go on with it by --resume, or name another folder")  # fmt: skip

    def _read_checkpoint(self):
        path = self.dir / "checkpoint.pt"
        if not path.exists():
            return None
        checkpoint = load_torch(path, "remove it to start anew")
        kinds = dict(method=str, args=dict, step=int, epochs_logged=int, stats=torch.Tensor, state=dict, wandb_id=str)
        check(isinstance(checkpoint, dict) and all(type(checkpoint.get(key)) is kind for key, kind in kinds.items())
              and all(isinstance(v, (str, int, float, type(None))) for v in checkpoint["args"].values())
              and checkpoint["stats"].ndim == 2, f"{str(path)!r} is no checkpoint of these scripts")  # fmt: skip
        check(checkpoint["method"] == self.method, f"{str(path)!r} is a checkpoint of {checkpoint['method']!r}, not of "
              f"{self.method!r}; name another --run-dir")  # fmt: skip
        return checkpoint

    def _read_config(self):
        """What args.json says of a run that has no checkpoint (yet): its method must agree, its arguments are compared."""
        path = self.dir / "args.json"
        if not path.exists():
            return {}
        try:
            config = json.loads(path.read_text())
            method, before, wandb_id = config["method"], dict(config["args"]), str(config["wandb_id"])
        except Exception:
            whole = (self.dir / "embeddings.npz").exists()
            check(not whole, f"{str(path)!r} can not be read, and the folder holds a finished run; name another folder")
            return {}
        check(method == self.method, f"{str(self.dir)!r} holds a run of {method!r}, not of {self.method!r}; name another "
              "--run-dir")  # fmt: skip
        return {"args": before, "wandb_id": wandb_id}

    def _compare(self):
        """Refuse to resume with other arguments than before; what is not known yet (None) is let pass."""
        before, now = self.before["args"], asdict(self.args)
        changed = [f"--{key.replace('_', '-')} was {before.get(key)!r:.99} and is {now[key]!r}" for key in now
                   if key not in self.MAY_CHANGE and now[key] is not None and before.get(key) != now[key]]  # fmt: skip
        check(not changed, f"can not resume {str(self.dir)!r} with other arguments: {'; '.join(changed)}")

    def start(self, device, precision, **extra):
        """Create or take over the folder, write args.json, drop log lines that the checkpoint does not cover."""
        self.device, self.precision = device, precision
        if RANK:
            return
        if self.before:
            self._compare()
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock()
            if not self.args.resume:
                self._check_empty()
            for name in ("args.json", "log.jsonl", "views.png", "checkpoint.pt", "encoder.pt", "embeddings.npz",
                         "curves.png", "embedding_2d.png"):  # fmt: skip
                (self.dir / f".{name}.tmp").unlink(missing_ok=True)  # left by a run that was killed while it wrote
            self.epochs_logged = self.checkpoint["epochs_logged"] if self.checkpoint else 0
            lines = []
            if (self.dir / "log.jsonl").exists():
                lines = (self.dir / "log.jsonl").read_text(errors="replace").splitlines(keepends=True)
            with atomic_write(self.dir / "log.jsonl") as file:
                file.write("".join(lines[: self.epochs_logged]).encode())
        except OSError as error:
            raise UserError(f"--run-dir {str(self.dir)!r} can not be written: {error.strerror or error}") from None
        self.wandb_id = self.before.get("wandb_id") or os.urandom(4).hex()
        config = {
            "method": self.method,
            "args": asdict(self.args),
            **extra,
            "precision": precision,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
            "processes": WORLD_SIZE,
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "torchvision": torchvision.__version__, "numpy": np.__version__},
            "command": shlex.join(sys.argv),
            "commit": git_commit(),
            "wandb_id": self.wandb_id,
        }  # fmt: skip
        with atomic_write(self.dir / "args.json") as file:
            file.write(json.dumps(config, indent=2).encode())
        print(f"{self.method} on {config['device']} in {precision}: {self.dir}")
        shown = "  ".join(f"{k}={v}" for k, v in config["args"].items() if v is not None)
        wrap = dict(initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
        print(textwrap.fill(shown, max(60, shutil.get_terminal_size().columns), **wrap))
        args = self.args
        self.tracker = Tracker(args.track, args.wandb_project, args.wandb_entity, self.dir, self.dir.name, config,
                               self.wandb_id)  # fmt: skip

    def _lock(self):
        """Refuse a second run in the same folder. The lock ends with the process, however that ends."""
        try:
            self.lock = lock(self.dir, wait=False)
        except BlockingIOError:
            raise UserError(
                f"--run-dir {str(self.dir)!r} is in use by another run; wait for it, or name another folder"
            ) from None

    def _unlock(self):
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    @contextmanager
    def training(self, step, steps):
        """Around the loop: a progress bar in a terminal or notebook, and the first Ctrl-C or SIGTERM sets `stopped`."""

        def stop(number, frame):
            if (
                self.asked and WORLD_SIZE > 1
            ):  # torchrun tells again those that were told already, and ends them in 30 s
                return
            if self.asked:
                raise KeyboardInterrupt  # the second one ends at once
            self.asked = number
            if WORLD_SIZE == 1:
                self.stopped = number
            more = "; once more to stop at once" if WORLD_SIZE == 1 else ""
            print(f"\nstopping after this step{more}", file=sys.stderr, flush=True)

        main_thread = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if main_thread else ()
        before = [signal.signal(number, stop) for number in numbers]
        size = self.args.batch_size
        self.bar = tqdm(total=steps * size, initial=step * size, unit=" samples", unit_scale=True, dynamic_ncols=True,
                        disable=not _interactive() or step == steps,
                        bar_format="{desc} |{bar}| {percentage:.0f} %, {rate_fmt}, {remaining} left{postfix}")  # fmt: skip
        try:
            yield
        except BaseException:
            self._unlock()  # a notebook's process lives on, and the run may go on in another
            raise
        finally:
            self.bar.close()
            for number, handler in zip(numbers, before):
                signal.signal(number, handler)

    def advance(self, i, stats, lr, epoch, step):
        """After every step. `stats` [steps of the epoch, 3] holds loss, spread, skipped; row i is new.

        It stays on the device and is read every 50 (10) steps on a GPU, so that the loop does not wait for it. Then all
        processes put their statistics together, and stop at the same step where one of them was asked to.
        """
        every = 50 if WORLD_SIZE == 1 else 10  # the others hear of a signal here alone, and torchrun waits 30 seconds
        if self.device.type == "cpu" or i % every == every - 1 or i + 1 == len(stats) or self.stopped:
            if WORLD_SIZE > 1:
                new, asked = stats[self.read : i + 1], torch.tensor(self.asked, device=self.device)
                dist.all_reduce(new)
                dist.all_reduce(asked, dist.ReduceOp.MAX)
                new /= WORLD_SIZE
                self.stopped = int(asked)
            for j, (loss, _, skipped) in enumerate(stats[self.read : i + 1].tolist(), self.read):
                at = f"at epoch {epoch}, step {step - i + j} (lr {lr:.4g}, {self.precision})"
                if not math.isfinite(loss):
                    raise self._diverged(f"loss is {loss} {at}")
                self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
                if self.skipped_in_a_row == 50:
                    raise self._diverged(f"gradients overflowed in 50 steps in a row, the last {at}")
            self.read = (i + 1) % len(stats)
            self.bar.set_postfix_str(f"loss {loss:.3f}{self.knn_shown}", refresh=False)
        self.bar.set_description_str(f"epoch {epoch}/{self.args.epochs}", refresh=False)
        self.bar.update(self.args.batch_size)

    def _diverged(self, what):
        kept = "; the last checkpoint is whole" if (self.dir / "checkpoint.pt").exists() else ""
        return UserError(f"the {what}; a lower --lr may help{kept}", 1)

    def averages(self, stats):
        """An epoch's mean loss and spread and, in fp16, how many of its steps GradScaler skipped."""
        loss, spread, skipped = stats.mean(0).tolist()
        counted = {"skipped_steps": round(skipped * len(stats))} if self.precision == "fp16" else {}
        return dict(loss=loss, spread=spread, **counted)

    def log(self, record):
        """Append one epoch's record to log.jsonl, print it, send it to Weights & Biases."""
        if RANK:
            return
        record = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in record.items()}
        try:
            with open(self.dir / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise _write_error(self.dir / "log.jsonl", error) from None
        self.epochs_logged += 1
        knn = f"  knn {100 * record['knn_acc']:.1f} %" if "knn_acc" in record else ""
        line = (f"epoch {record['epoch']}/{self.args.epochs}  loss {record['loss']:.4f}  spread {record['spread']:.2f}"
                f"  {record['samples_per_sec']:.0f} samples/s{knn}")  # fmt: skip
        self.knn_shown = knn.replace("  ", ", ") or self.knn_shown
        if self.bar is None or self.bar.disable:
            print(line, flush=True)
        elif knn:
            self.bar.set_postfix_str(f"loss {record['loss']:.3f}{self.knn_shown}", refresh=False)
            self.bar.write(line, file=sys.stdout)
        if record["spread"] < 0.05:
            print(f"warning: the embeddings collapse (spread {record['spread']:.3f}, 1 is isotropic)", file=sys.stderr)
        self.tracker.log(record)

    def save_checkpoint(self, step, stats, **modules):
        """Write checkpoint.pt: everything that resuming needs. Modules are whatever has a state_dict()."""
        if RANK:
            return
        state = {name: module.state_dict() for name, module in modules.items()}
        if not all(torch.isfinite(value).all() for value in state["network"].values()):  # the loss tells a step later
            raise self._diverged(f"weights are not finite after step {step - 1} ({self.precision})")
        # `args` for the comparison on resume; plain types and tensors only, so that weights_only=True reads them.
        save_torch(self.dir / "checkpoint.pt", dict(
            method=self.method, args=asdict(self.args), step=step, epochs_logged=self.epochs_logged, stats=stats,
            images=self._images_seen(), state=state, wandb_id=self.wandb_id))  # fmt: skip

    def _images_seen(self):
        """What tells training images from others: their number, mean and deviation (decoders differ in the last bits)."""
        return torch.tensor([len(self.images.train), *self.images.mean, *self.images.std], dtype=torch.float64)

    def restore(self, steps_per_epoch, **modules):
        """Load the checkpoint's state into the modules. UserError where it does not fit."""
        before = len(self.checkpoint["stats"])
        check(before == steps_per_epoch, f"can not resume {str(self.dir)!r}: the training images have changed "
              f"({before} steps an epoch before, {steps_per_epoch} now)")  # fmt: skip
        step, logged = self.checkpoint["step"], self.checkpoint["epochs_logged"]
        try:
            seen, now = self.checkpoint.get("images"), self._images_seen()
            if not torch.allclose(expect(seen, now), now, rtol=0, atol=1e-3):
                raise ValueError(f"the training images have changed ({int(seen[0])} before, {int(now[0])} now)")
            if not (0 <= step <= self.args.epochs * steps_per_epoch and logged == step // steps_per_epoch):
                raise ValueError("its step is out of range")
            self.checkpoint["stats"] = expect(self.checkpoint["stats"], torch.zeros(steps_per_epoch, 3)).clone()
            for name, module in modules.items():
                state, own = self.checkpoint["state"][name], module.state_dict()
                if name == "network":
                    for key, like in own.items():
                        expect(state.get(key), like)
                elif name == "optimizer":  # settings are this run's own; a copy has the memory layout of its weights
                    old, params = state["state"], [p for group in module.param_groups for p in group["params"]]
                    old = {i: expect(old[i]["momentum_buffer"], p) for i, p in enumerate(params)}
                    new = {i: {"momentum_buffer": torch.empty_like(params[i]).copy_(m)} for i, m in old.items()}
                    state = {**own, "state": new}
                elif not all(type(value) in (int, float) and math.isfinite(value) for value in state.values()):
                    raise ValueError("its scaler is none")
                if state or name != "scaler":  # empty where the run before was not in fp16: then a new scaler starts
                    module.load_state_dict(state)
            self.read = step % max(1, steps_per_epoch)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{str(self.dir / 'checkpoint.pt')!r} does not fit this run: {reason}") from None

    def stop(self):
        """End a run that was asked to: 130 after Ctrl-C, 143 after SIGTERM. The checkpoint is written."""
        if WORLD_SIZE > 1:
            dist.barrier()  # torchrun ends all as soon as one has ended, and the first may still be writing
        if RANK:
            sys.exit(128 + self.stopped)
        self.tracker.finish()
        start = "python" if WORLD_SIZE == 1 else f"torchrun --nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}"
        print(f"stopped; go on with: {start} {shlex.join(sys.argv)}" + ("" if self.args.resume else " --resume")
              + ("" if self.args.run_dir else f" --run-dir {shlex.quote(str(self.dir))}"), file=sys.stderr)  # fmt: skip
        sys.exit(128 + self.stopped)

    def knn(self, encoder, images):
        """The kNN monitor on the test split: {"knn_acc": accuracy in [0, 1]}, empty without labels to judge by."""
        labelled, judged = images.train_labels >= 0, images.test_labels >= 0
        if RANK or not labelled.any() or not judged.any():
            return {}
        parts = [(images.train, images.train_labels, labelled), (images.test, images.test_labels, judged)]
        args = []
        for part, labels, keep in parts:
            rows = keep.nonzero().flatten()
            args += [embed(encoder, part, images.mean, images.std, images.size, rows), labels[keep]]
        return {"knn_acc": knn_accuracy(*args, self.args.knn_k, self.args.knn_temperature)}

    def finish(self, encoder, images, feature_dim):
        """Write encoder.pt and embeddings.npz, say the kNN accuracy and what to run next."""
        if WORLD_SIZE > 1:
            dist.destroy_process_group()  # what is left to do is the first one's alone
        if RANK:
            return
        args, path = self.args, self.dir / "embeddings.npz"
        meta = dict(method=self.method, dataset=args.dataset, data_dir=args.data_dir, image_size=args.image_size,
                    encoder=args.encoder, width=args.width, epochs=args.epochs, seed=args.seed)  # fmt: skip
        train, test = (embed(encoder, part, images.mean, images.std, images.size).cpu()
                       for part in (images.train, images.test))  # fmt: skip
        if not (torch.isfinite(train).all() and torch.isfinite(test).all()):
            raise self._diverged("features are not finite")
        save_torch(self.dir / "encoder.pt", dict(
            encoder=args.encoder, width=args.width, feature_dim=feature_dim, image_size=args.image_size,
            mean=images.mean, std=images.std, class_names=images.class_names,
            state_dict={k: v.cpu().contiguous() for k, v in encoder.state_dict().items()}))  # fmt: skip
        arrays = dict(train_features=train.numpy(), train_labels=images.train_labels.numpy(), test_features=test.numpy(),
                      test_labels=images.test_labels.numpy(), class_names=np.array(images.class_names, dtype=np.str_),
                      meta=np.array(json.dumps(meta)))  # fmt: skip
        if images.train_files is not None:
            arrays.update(
                train_files=np.array(images.train_files, np.str_), test_files=np.array(images.test_files, np.str_)
            )
        with atomic_write(path) as file:
            np.savez(file, **arrays)
        labelled, judged = images.train_labels >= 0, images.test_labels >= 0
        if labelled.any() and judged.any():
            accuracy = knn_accuracy(train[labelled], images.train_labels[labelled], test[judged],
                                    images.test_labels[judged], args.knn_k, args.knn_temperature)  # fmt: skip
            print(f"kNN accuracy on the test split (k = {args.knn_k}, cosine): {100 * accuracy:.2f} %")
            self.tracker.log({"final_knn_acc": accuracy})
        self._draw(*((test, images.test_labels) if len(test) else (train, images.train_labels)), images.class_names)
        self.tracker.finish()
        self._unlock()
        judge = (
            f"; next: python knn_eval.py {shlex.quote(str(self.dir))} --pixels"
            if labelled.any() and judged.any()
            else ""
        )
        print(f"wrote {path}{judge}")

    def _draw(self, features, labels, class_names):
        """curves.png and embedding_2d.png, and all pictures to Weights & Biases. Without them a run is whole, too."""
        try:
            records = [json.loads(line) for line in (self.dir / "log.jsonl").read_text().splitlines()]
            if records:
                draw_curves(self.dir / "curves.png", records)
            if len(features) > 2:
                every = slice(None, None, -(-len(features) // 5000))  # of all classes, which may come in order
                seed_step(self.args.seed, 0, stream=2)
                u, s, _ = torch.pca_lowrank(features[every], min(6, len(features[every])))
                draw_embedding(self.dir / "embedding_2d.png", (u * s)[:, :2].numpy(), labels[every].numpy(),
                               class_names, f"{self.dir.name}: {len(u)} clean images, PCA of the features")  # fmt: skip
        except Exception as error:
            print(f"note: a picture could not be drawn ({' '.join(str(error).split())})", file=sys.stderr)
        for name in ("curves", "embedding_2d", "views"):
            if (self.dir / f"{name}.png").exists():
                self.tracker.log_image(name, self.dir / f"{name}.png")


def save_torch(path, content):
    """torch.save, whole or not at all."""
    buffer = io.BytesIO()  # torch.save to a full disk raises a RuntimeError that does not say so
    torch.save(content, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def expect(value, like):
    """`value`, out of an untrusted file, if it is a tensor in memory of the shape and type of `like`; else ValueError."""
    if not (type(value) is torch.Tensor and value.device.type == "cpu" and not value.requires_grad
            and (value.shape, value.dtype, value.layout) == (like.shape, like.dtype, like.layout)):  # fmt: skip
        raise ValueError("a tensor in it is missing, or of another shape or type")
    return value


def load_torch(path, remedy):
    """torch.load of an untrusted file: tensors and plain types only. UserError where it is damaged or something else."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load would also take older forms, and what unpacks to far more
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise ValueError("its parts are compressed")
            if sum(info.file_size for info in archive.infolist()) > os.path.getsize(path):
                raise ValueError("its parts claim more than it holds")
            if archive.testzip():  # PyTorch does not look at the checksums
                raise ValueError("a checksum in it is wrong")
        with warnings.catch_warnings():  # about what a foreign file may hold: what is not refused is used
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{str(path)!r} can not be read ({reason}); {remedy}") from None


class Tracker:
    """Weights & Biases behind --track: a failure is said once, and the work goes on without it."""

    def __init__(self, track, project, entity, run_dir, name, config, run_id=None):
        self.run = None
        if track:
            self._try(lambda: self._start(project, entity, run_dir, name, config, run_id))

    def _start(self, project, entity, run_dir, name, config, run_id):
        import wandb

        self.wandb, settings = wandb, wandb.Settings(init_timeout=60)
        if hasattr(settings, "finish_timeout"):  # not in older ones: a lost server must not hold up the end
            settings.finish_timeout = 120.0
        self.run = wandb.init(project=project, entity=entity, dir=str(run_dir), name=name, config=config, id=run_id,
                              resume="allow" if run_id else None, settings=settings)  # fmt: skip

    def _try(self, call):
        try:
            return call()
        except Exception as error:  # whatever W&B raises, the training matters more
            print(
                f"note: Weights & Biases failed ({' '.join(str(error).split())}); going on without it", file=sys.stderr
            )
            self.run = None

    def log(self, record):
        if self.run:
            # W&B drops what comes again for an earlier step: the epochs that a killed run repeats after its checkpoint.
            self._try(lambda: self.run.log(record, step=record.get("step"), commit=True))

    def log_image(self, key, path):
        if self.run:
            self._try(lambda: self.run.log({key: self.wandb.Image(str(path))}))

    def log_table(self, key, columns, rows):
        if self.run:
            self._try(
                lambda: self.run.log({key: self.wandb.Table(columns=list(columns), data=[list(r) for r in rows])})
            )

    def finish(self):
        if self.run:
            self._try(lambda: self.run.finish())
