"""What a step launches and moves on a GPU, counted without one.

    python benchmarks/kernels.py --output benchmarks/results/kernels.json
    python benchmarks/kernels.py --methods byol --sizes 224 --operators

Runs two_views on the meta device and train_step in bf16 on fake tensors, eagerly, and counts the
operators that are not views of their input, each roughly a kernel, and the bytes of their inputs
and outputs. `backward` includes the loss, `optimizer` BYOL's EMA.
"""

import importlib
from collections import Counter
from dataclasses import dataclass

import torch
import tyro
from accuracy import write
from throughput import OWN, network_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common

# Not kernels: memory that is reserved but not written, views, and what stays on the host.
FREE = "empty empty_strided empty_like new_empty new_empty_strided detach _unsafe_view device"
FREE = f"{FREE} promote_types _record_function_enter_new _record_function_exit".split()


@dataclass
class Args:
    """Count kernels and bytes."""

    methods: tuple[str, ...] = ("simclr", "byol", "barlow_twins")
    """method files"""
    sizes: tuple[int, ...] = (32, 96, 224)
    """sides of the images in pixels"""
    batch_size: int = 512
    """images of a step"""
    operators: bool = False
    """also print the operators that move the most"""
    output: str | None = None
    """write the counts to this JSON file"""


class Count(TorchDispatchMode):
    """Counts operators, and the bytes of their inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.kernels, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and name not in FREE:
            # What is only written counts once.
            inputs = [value for key, value in (kwargs or {}).items() if key != "out"]
            inputs += args[1:] if name in ("copy_", "index_put_") else args
            tensors = [t for t in tree_leaves([inputs, result]) if torch.is_tensor(t)]
            # An operator on a list of tensors, as of the optimizer, is one kernel.
            self.kernels[name] += 1
            self.bytes[name] += sum(map(size_of, tensors))
        return result


def size_of(tensor):
    """Bytes of a tensor in memory: expanded dimensions take none."""
    sizes = zip(tensor.shape, tensor.stride())
    return tensor.element_size() * torch.Size(n for n, step in sizes if step or n == 0).numel()


def counted(function, *args, **options):
    """Kernels and bytes of a call."""
    with Count() as count:
        function(*args, **options)
    return count


def parts_of(method, size, args):
    """{part of a step: its Count} of one method at one size."""
    module = importlib.import_module(method)
    flags = module.Args(dataset="folder", batch_size=args.batch_size)
    flags = common.resolve(flags, module.RECIPES)
    with torch.device("meta"):
        images = torch.empty(args.batch_size, 3, size, size, dtype=torch.uint8)
        mean = torch.empty(3, 1, 1)
        view = module.choose_view("photo", False, size)
        two_views = counted(module.two_views, images, view, size, mean, mean)
    network, own = network_of(method, flags, size), OWN[method]
    optimizer, scaler = module.make_optimizer(network, 1e-4), torch.amp.GradScaler(enabled=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        pair = torch.empty(2, args.batch_size, 3, size, size).unbind()
        with torch.autocast("cpu", torch.bfloat16):
            forward = counted(network, *pair)
        step = network, optimizer, scaler, *pair, 0.1
        total = counted(module.train_step, *step, amp_dtype=torch.bfloat16, **own)
        update = counted(optimizer.step)
    return {"two_views": two_views, "forward": forward, "train_step": total, "SGD": update}


def main(args):
    """Count every part of every method and size."""
    lines = []
    for method in args.methods:
        for size in args.sizes:
            for part, count in parts_of(method, size, args).items():
                kernels, gb = sum(count.kernels.values()), sum(count.bytes.values()) / 1e9
                line = dict(method=method, size=size, part=part, kernels=kernels, gb=round(gb, 3))
                lines.append(line)
                print(*line.values(), flush=True)
                for name, n in count.bytes.most_common(30 * args.operators):
                    print(f"   {name:30} {count.kernels[name]:5} {n / 1e9:8.3f} GB")
    if args.output:
        write(args.output, batch_size=args.batch_size, lines=lines)


if __name__ == "__main__":
    main(tyro.cli(Args))
