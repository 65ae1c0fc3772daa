"""Rounding errors of reduced precision over networks, sizes and seeds: the table in docs/performance.md.

    python -m tests.rounding

Few CPUs multiply reduced precisions, and where they must emulate them it takes 50 times as long. So here they
are computed as hardware does it: factors are rounded, added up in float32, and the sum is rounded.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import TwoStreamResNet
from precision import BOUND, errors_of

aten = torch.ops.aten
CONVOLUTIONS = {  # in inference mode it is called by its other name
    aten.convolution.default: "convolution",
    aten.conv2d.default: "convolution",
    aten.convolution_backward.default: "convolution_backward",
}
KINDS = ("untrained", "trained", "uneven")


class Hardware(TorchDispatchMode):
    """Inside, convolutions of reduced precision are those of a machine that may have a fault.

    spoil: changes results in place; called with the operation's name, its results and its arguments.
    """

    def __init__(self, spoil=lambda *_: None):
        super().__init__()
        self.spoil = spoil

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Compute in float32 what torch asks for in reduced precision."""
        dtype = args[0].dtype if args and isinstance(args[0], torch.Tensor) else None
        if func not in CONVOLUTIONS or dtype == torch.float:
            return func(*args, **(kwargs or {}))
        results = func(*(a.float() if isinstance(a, torch.Tensor) else a for a in args))
        several = [results] if isinstance(results, torch.Tensor) else results
        several = [result if result is None else result.to(dtype) for result in several]
        self.spoil(CONVOLUTIONS[func], several, args)
        return several[0] if isinstance(results, torch.Tensor) else several


def network(arch, kind, seed):
    """A network: untrained, with the statistics of a trained one, or with channels of very different size."""
    torch.manual_seed(seed)
    model = TwoStreamResNet(arch).to(memory_format=torch.channels_last)
    for module in model.modules() if kind != "untrained" else ():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.2, 1.5) if kind == "trained" else module.weight.data.normal_()
            module.bias.data.normal_(0, 0.3)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 1.7)
        elif isinstance(module, torch.nn.Conv2d) and kind == "uneven":
            module.weight.data *= torch.randn(1, module.in_channels, 1, 1).exp()
            module.weight.data *= 10.0 ** torch.randint(-9, 1, (module.out_channels, 1, 1, 1))
    return model


def images(height, width, n=4, seed=0):
    """Smooth images with a black border, as padding makes them: {modality: (n / 2, 3, H, W)}."""
    rng = torch.Generator().manual_seed(seed)
    small = torch.randn(n, 3, 8, 4, generator=rng)
    batch = torch.nn.functional.interpolate(small, (height, width), mode="bilinear")
    batch[:, :, : height // 8] = -2.118
    return {"visible": batch[: n // 2], "infrared": batch[n // 2 :]}


def main(args):
    """Print, for each network, size and precision, the largest error in units of epsilon, and where it is."""
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    print("| network | size | | precision | mode | seeds | largest error / epsilon | of |")
    print("|---|---|---|---|---|---:|---:|---|")
    for arch, (height, width), kind, dtype, training in product(
        args.archs, sizes, KINDS, (torch.bfloat16, torch.float16), (True, False)
    ):
        worst = []
        for seed in range(args.seeds):
            with Hardware():
                batch = images(height, width, args.images, seed)
                errors = errors_of(network(arch, kind, seed), batch, dtype, training)
            place, error = max(errors.items(), key=lambda item: item[1])
            worst.append((error / torch.finfo(dtype).eps, f"{place[1]} of {place[0]}"))
        error, place = max(worst)
        words = arch, f"{height}x{width}", kind, str(dtype).removeprefix("torch.")
        words += "training" if training else "evaluation", args.seeds, f"{error:.2f}", place
        print(f"| {' | '.join(map(str, words))} |", flush=True)
    print(f"bound: {BOUND}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure rounding errors of reduced precision.")
    parser.add_argument("--archs", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--sizes", nargs="+", default=["32x16", "64x32", "288x144", "384x128"])
    parser.add_argument("--images", type=int, default=6, help="of both modalities together")
    parser.add_argument("--seeds", type=int, default=3)
    main(parser.parse_args())
