"""The network in every process that torchrun started: batch statistics and gradients of the whole batch."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from devices import AllGather, Processes
from model import NonLocal, TwoStreamResNet, moments, track


def moments_of_all(
    x: torch.Tensor, dims: tuple[int, ...] | None = None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """model.moments of the tensors of all processes, which have the same shape; with gradient."""
    var, mean, count = moments(x, dims)
    gathered = AllGather.apply(torch.stack([var, mean])).unflatten(0, (-1, 2))  # (world_size, 2, ...)
    variances, means = gathered.unbind(1)
    mean = means.mean(0)
    return (variances + (means - mean).square()).mean(0), mean, count * len(means)


class HostBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What nn.SyncBatchNorm computes, on the CPU, where that one refuses to."""

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Every number of dimensions is as good."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, K, ...) -> (N, K, ...), with the statistics of all processes while training."""
        if not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            var, mean, count = moments_of_all(x.float(), (0, *range(2, x.ndim)))
            track(self, var, mean, count)
            scale, shape = self.weight * (var + self.eps).rsqrt(), (-1, *[1] * (x.ndim - 2))
            normal = (x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)
        return normal.to(x.dtype)


def distribute(
    model: TwoStreamResNet,
    loss: nn.Module,
    device: torch.device,
    dtype: torch.dtype | None,
    processes: Processes,
) -> nn.Module:
    """The network as a step calls it, the gradients of its weights and the loss's averaged over processes.

    One process has them as they are.

    Args:
        model: on device; what it computes in training becomes that of the whole batch.
        loss: with a baseline's classifier, or without weights.
        device: of both.
        dtype: autocast's in a step.
        processes: that share the batch.
    """
    if processes.world_size == 1:
        return model
    for module in model.modules():
        if isinstance(module, NonLocal):
            module.moments = moments_of_all
        elif device.type == "cpu" and isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.__class__ = HostBatchNorm  # the same weights and names in a checkpoint
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def average(weight: nn.Parameter) -> None:
        processes.mean(weight.grad)

    for weight in loss.parameters():
        weight.register_post_accumulate_grad_hook(average)
    network = DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)
    network.broadcast_buffers = False  # they are the same in all processes
    sort_gradients(network, device, dtype)
    return network


def sort_gradients(network: DistributedDataParallel, device: torch.device, dtype: torch.dtype | None) -> None:
    """Let DistributedDataParallel see a backward pass, and forget what it computed.

    It sums the gradients of the first pass in another order than those of all later ones. With three
    processes or more rounding depends on that, and a resumed run would not be the undisturbed one.
    """
    kept = [buffer.clone() for buffer in network.buffers()]
    images = torch.zeros(2, 3, 32, 32, device=device)
    network.train()
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        outputs, _ = network(images, images, with_pooled=True)
    outputs.sum().backward()
    network.zero_grad(set_to_none=True)
    for buffer, value in zip(network.buffers(), kept, strict=True):
        buffer.copy_(value)
