"""The training step against the bare network's, and against a plain loop.

The bare step is the forward pass, a weighted sum, the backward pass and the optimiser's step on a batch that
is already on the device, with the same network, precision and optimiser. The plain loop is the obvious
implementation: float32, NCHW, augmentation image by image, the quadratic non-local block, the loss and update
of memory_and_loss.py, and PyTorch's default Adam.
"""

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.memory_and_loss import baseline_loss, baseline_update, tables_of
from benchmarks.plain_input import baseline_step as baseline_input
from benchmarks.plain_input import check as check_input
from benchmarks.timing import compare, row, wait_for
from benchmarks.workload import draw_sysu, training_of
from engine.training import Training
from model import GeM, NonLocal
from train import train_one_epoch
from utils import MODALITIES

FULL = {"arch": "resnet50", "img-h": 384, "img-w": 128, "batch-size": 8, "num-pos": 4}
SMALL = FULL | {"batch-size": 4, "num-pos": 1}  # feasible on two cores
TINY = {"arch": "resnet18", "img-h": 64, "img-w": 32, "batch-size": 4, "num-pos": 2}


class PlainNonLocal(nn.Module):
    """The non-local block as in the paper: an affinity (N, HW, HW), then expand, batch norm and sum."""

    def __init__(self, block: NonLocal):
        super().__init__()
        self.theta_phi_g, self.expand, self.bn = block.theta_phi_g, block.expand, block.bn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, K, H, W) -> (N, K, H, W)."""
        theta, phi, g = self.theta_phi_g(x).flatten(2).split(1, dim=1)  # (N, 1, HW) each
        affinity = theta.transpose(1, 2) @ phi / theta.shape[2]  # (N, HW, HW)
        y = (affinity @ g.transpose(1, 2)).view(len(x), 1, *x.shape[2:])
        return self.bn(self.expand(y)) + x


class PlainGeM(nn.Module):
    """GeM pooling as in its definition."""

    def __init__(self, pool: GeM):
        super().__init__()
        self.p = pool.p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, K, H, W) -> (N, K)."""
        return x.clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p)


def plain_network(model: nn.Module) -> nn.Module:
    """A copy of model with the plain blocks above, NCHW."""
    model = copy.deepcopy(model)
    for layer in (model.layer2, model.layer3):
        for k, block in enumerate(layer):
            if isinstance(block, NonLocal):
                layer[k] = PlainNonLocal(block)
    model.pool = PlainGeM(model.pool)
    return model.to(memory_format=torch.contiguous_format)


def plain_loss(network, images, labels, proxies, centers) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of images {modality: (n, 3, H, W)}, and the unit features."""
    outputs = network(torch.cat([images["visible"], images["aux"]]), images["infrared"])
    visible, aux, infrared = F.normalize(outputs).chunk(3)
    features = {"visible": visible, "infrared": infrared, "aux": aux}
    return baseline_loss(features, labels, proxies, centers), features


def check(training: Training) -> None:
    """In float32, train.py's step has the plain loop's loss and gradients, on a batch of the loader."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32 = cudnn.benchmark = False  # benchmark: it takes long, for two steps
    images, labels = next(iter(training.loader.epoch(0)))
    torch.manual_seed(0)
    for module in training.model.modules():
        if isinstance(module, NonLocal):
            nn.init.normal_(module.bn.weight, std=0.1)  # otherwise the blocks would be the identity
    plain = plain_network(training.model).train()
    expected = plain_loss(plain, images, labels, *tables_of(training.bank))[0]
    expected.backward()
    exact = replace(training, dtype=None, scaler=torch.amp.GradScaler(enabled=False))
    losses = train_one_epoch(exact, [(images, labels)], 0)
    torch.testing.assert_close(losses[0, 0], expected.detach().cpu(), rtol=1e-3, atol=0)
    cudnn.allow_tf32, cudnn.benchmark = before
    gradients = [
        torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        for network in (training.model, plain)
    ]
    agreement = F.cosine_similarity(*gradients, dim=0).item()
    assert agreement > 0.99, f"the gradients of the step and of the plain loop disagree: cosine {agreement}"


def run(device: str = "cpu", quick: bool = False) -> Iterator[dict]:
    """Yield three rows: against the bare step, its wait for input, and against the plain loop.

    On a GPU two more: with float16, and compiled, both against the step without.
    """
    sizes = TINY if quick else FULL if device == "cuda" else SMALL
    steps, repeats = (2, 1) if quick else (20, 5) if device == "cuda" else (1, 5)
    few = min(steps, 2)  # of the plain loop, whose input takes long
    words = [word for name, value in sizes.items() for word in (f"--{name}", value)]
    identities = 8 if quick else 395 if device == "cuda" else 40
    counts = {"visible": 8 * identities, "infrared": 4 * identities}
    num_images = 3 * sizes["batch-size"] * sizes["num-pos"]
    size = f"{num_images} images {sizes['img-h']}x{sizes['img-w']}, {sizes['arch']}"
    with tempfile.TemporaryDirectory() as folder:
        draw_sysu(Path(folder, "sysu"), identities, counts, sizes["img-h"], sizes["img-w"], noise=True)
        training = training_of(Path(folder, "sysu"), device, *words)
        means = {modality: torch.randn_like(training.bank.shared.proxies) for modality in MODALITIES}
        training.bank.reset(means)
        check(training)
        pixels = training.loader.images["visible"][:16]
        check_input(pixels.cpu().numpy() if isinstance(pixels, torch.Tensor) else np.array(pixels), device)

        ours = our_steps(training, steps)
        on_gpu = _gpu_notes(training, ours, steps)  # before other networks use memory
        precision = str(training.dtype or torch.float32).removeprefix("torch.")
        bare_s, ours_s = (seconds / steps for seconds in compare(bare_steps(training, steps), ours, repeats))
        share, speed = f"{ours_s / bare_s:.2f} of the bare step", f"{num_images / ours_s:.1f} images/s"
        yield row(
            f"training step against the bare one, {size}", (bare_s, ours_s), "<= 1.10 of the bare step",
            ", ".join([precision, share, speed, *on_gpu]), met=ours_s <= 1.10 * bare_s,
        )  # fmt: skip
        waited_s = training.loader.wait_seconds / steps
        note = f"{100 * waited_s / ours_s:.1f} % of the step; pixels on the {training.loader.cache}"
        yield row(
            f"waiting for input in that step, {size}", (None, waited_s), "<= 1 % of the step", note,
            met=waited_s <= 0.01 * ours_s,
        )  # fmt: skip
        for name in ("--amp fp16", "--compile") if device == "cuda" and not quick else ():
            other = training_of(Path(folder, "sysu"), device, *words, *name.split())
            other.bank.reset(means)
            seconds = tuple(s / steps for s in compare(ours, our_steps(other, steps), repeats))
            note = f"the baseline: ours in {precision}, not compiled"
            yield row(f"training step with {name}, {size}", seconds, None, note)
        plain = plain_steps(training, few)
        plain()  # lets cuDNN choose its fastest convolutions
        plain_s, ours_s = compare(plain, ours, min(repeats, 3))
        tf32 = ", TF32 convolutions" if device == "cuda" and torch.backends.cudnn.allow_tf32 else ""
        work = f"training step against a plain float32 loop, {size}"
        yield row(work, (plain_s / few, ours_s / steps), 3.0, f"{precision} against float32{tf32}")


def our_steps(training: Training, steps: int):
    """Return a call of train.py's own loop, with input."""

    def ours():
        train_one_epoch(training, islice(training.loader.epoch(0), steps), 0)

    return ours


def bare_steps(training: Training, steps: int):
    """Return a call of only forward, backward and optimiser."""
    images, _ = next(iter(training.loader.epoch(0)))
    visible, infrared = torch.cat([images["visible"], images["aux"]]), images["infrared"]
    network = copy.deepcopy(training.model).train()
    optimizer = torch.optim.Adam(network.parameters(), training.args.lr, weight_decay=5e-4, fused=True)
    device, dtype, scaler = training.device, training.dtype, training.scaler
    # the gradient of a plain sum through a batch norm is zero
    weights = torch.randn(len(visible) + len(infrared), training.model.dim, device=device)

    def bare():
        for _ in range(steps):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                outputs = network(visible, infrared)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale((outputs * weights).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        wait_for(device)

    return bare


def plain_steps(training: Training, steps: int):
    """Return a call of the plain loop."""
    network = plain_network(training.model).train()
    optimizer = torch.optim.Adam(network.parameters(), training.args.lr, weight_decay=5e-4)
    (proxies, centers), args = tables_of(training.bank), training.args
    rows_of = {
        modality: {k: np.flatnonzero(labels == k).tolist() for k in range(int(labels.max()) + 1)}
        for modality, labels in training.loader.labels.items()
    }
    images_of = training.loader.images
    if training.loader.cache == "device":
        images_of = {modality: pixels.cpu().numpy() for modality, pixels in images_of.items()}

    def plain():
        for _ in range(steps):
            images, labels = baseline_input(
                images_of, rows_of, args.batch_size, args.num_pos, training.device
            )
            loss, features = plain_loss(network, images, labels, proxies, centers)
            optimizer.zero_grad()
            loss.backward()
            baseline_update(features, labels, proxies)
            optimizer.step()
        wait_for(training.device)

    return plain


def _gpu_notes(training: Training, ours, steps: int) -> list[str]:
    """Peak memory and kernels of a step, for a GPU."""
    if training.device.type != "cuda":
        return []
    ours()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ours()
        wait_for(training.device)
    kernels = sum(
        event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
        for event in profile.events()
    )
    memory = torch.cuda.max_memory_allocated() / 1e9
    return [f"peak {memory:.1f} GB", f"{kernels / steps:.0f} kernels a step"]
