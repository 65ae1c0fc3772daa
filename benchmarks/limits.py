"""The operations of a training step, the speed of the machine, and a profile of a step.

    python -m benchmarks.limits
    python -m benchmarks.limits cuda

Operations are counted for the network's forward and backward pass at full size, on tensors without data, so
the counts do not depend on the machine. The profile is of train.py's own loop.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.__main__ import duration, machine
from benchmarks.timing import compare, wait_for
from benchmarks.training_step import FULL, SMALL
from benchmarks.workload import draw_sysu, training_of
from model import TwoStreamResNet
from train import train_one_epoch
from utils import MODALITIES


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of the tensors that operations read and write, without views.

    total: of all operations. products: of convolutions and matrix products only, which fusion cannot avoid.
    """

    def __init__(self):
        super().__init__()
        self.total = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run func and count."""
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view and "empty" not in func.name():
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            size = sum(tensor.nbytes for tensor in tensors)
            self.total += size
            if any(word in func.name() for word in ("convolution", "::mm", "::bmm", "::addmm")):
                self.products += size
        return out


def count(num_images: int, height: int, width: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(operations, bytes of all operations, bytes of the products) of a forward and backward pass."""
    split, counter = 2 * num_images // 3, ByteCounter()
    with FakeTensorMode():
        network = TwoStreamResNet("resnet50")
        images = torch.empty(num_images, 3, height, width).to(memory_format=torch.channels_last)
        with FlopCounterMode(display=False) as operations, counter:
            with torch.autocast("cpu", dtype):
                outputs = network(images[:split], images[split:])
            outputs.sum().backward()
    return operations.get_total_flops(), counter.total, counter.products


def machine_rates(device: str) -> dict[str, float]:
    """Operations per second of a large product, in float32 and bfloat16, and bytes per second of a copy.

    On a CPU, of one thread and per CPU time, so that other work on the machine matters little.
    """
    side, clock = (8192, time.perf_counter) if device == "cuda" else (2048, time.process_time)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def rate(amount: float, function: Callable[[], object]) -> float:
        seconds = []
        for _ in range(10):
            start = clock()
            function()
            wait_for(device)
            seconds.append(clock() - start)
        return amount / min(seconds)

    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, side, side, device=device, dtype=dtype)
        rates[str(dtype).removeprefix("torch.")] = rate(2 * side**3, lambda a=a, b=b: a @ b)
    source, target = torch.randn(2, 64 * 2**20, device=device)
    rates["copy"] = rate(2 * source.nbytes, lambda: target.copy_(source))
    torch.set_num_threads(threads)
    return rates


def main(device: str = "cpu") -> None:
    """Print everything."""
    sizes = FULL if device == "cuda" else SMALL
    full, num_images = 3 * FULL["batch-size"] * FULL["num-pos"], 3 * sizes["batch-size"] * sizes["num-pos"]
    print(machine(device))
    operations, total, products = count(full, FULL["img-h"], FULL["img-w"], torch.bfloat16)
    parameters = sum(p.numel() for p in TwoStreamResNet("resnet50").parameters())
    size = f"{FULL['img-h']}x{FULL['img-w']}"
    print(f"a step of {full} images {size}, bfloat16: {operations / 1e12:.2f} TFLOP")
    print(f"bytes: {total / 1e9:.1f} GB by all operations, {products / 1e9:.1f} GB by products alone")
    print(f"Adam: {7 * 4 * parameters / 1e9:.2f} GB for {parameters / 1e6:.1f} million weights")
    rates, threads = machine_rates(device), 1 if device == "cuda" else torch.get_num_threads()
    print(
        f"{'a GPU' if device == 'cuda' else 'a core'}: {rates['float32'] / 1e9:.0f} GFLOP/s float32, "
        f"{rates['bfloat16'] / 1e9:.0f} GFLOP/s bfloat16, copies {rates['copy'] / 1e9:.1f} GB/s"
    )
    share = num_images / full
    print(
        f"so {num_images} images take at least "
        f"{duration(share * operations / rates['bfloat16'] / threads)} for products and "
        f"{duration((share * total + 28 * parameters) / rates['copy'] / threads)} for bytes"
    )
    with tempfile.TemporaryDirectory() as folder:
        counts = dict.fromkeys(("visible", "infrared"), 160)
        draw_sysu(Path(folder, "sysu"), 40, counts, sizes["img-h"], sizes["img-w"], noise=True)
        words = [word for name, value in sizes.items() for word in (f"--{name}", value)]
        training = training_of(Path(folder, "sysu"), device, *words)
        training.bank.reset({m: torch.randn_like(training.bank.shared.proxies) for m in MODALITIES})

        def step():
            train_one_epoch(training, islice(training.loader.epoch(0), 1), 0)

        print(f"a step of train_one_epoch: {duration(compare(step, step, 3)[1])}")
        with torch.profiler.profile() as profile:
            step()
    by = f"self_{'cuda' if device == 'cuda' else 'cpu'}_time_total"
    print(profile.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=44))


if __name__ == "__main__":
    main(*sys.argv[1:])
