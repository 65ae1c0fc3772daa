"""Devices, seeds, and the processes that torchrun starts."""

import contextlib
import datetime
import os
import random
import signal
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch

from utils import UserError, log


def select_device(gpu: int | None) -> torch.device:
    """Return the device that --gpu names, and make a GPU the current one; the CPU for -1 or without a GPU.

    None means the first GPU or, with torchrun, the GPU of the local rank. The log says when the CPU is used.
    Raises UserError for a GPU that this machine does not have.
    """
    count = torch.cuda.device_count()
    if gpu is None:
        gpu = int(os.environ.get("LOCAL_RANK", 0))
    if gpu >= 0 and count:
        if gpu >= count:
            raise UserError(f"--gpu {gpu}: this machine's GPUs are 0 to {count - 1}")
        torch.cuda.set_device(gpu)
        return torch.device("cuda", gpu)
    log.info("running on the CPU (%s)", "--gpu -1" if gpu < 0 else "torch sees no GPU here")
    return torch.device("cpu")


# Processes wait this long at a barrier, since process 0 may have to decode a dataset's images.
PATIENCE = datetime.timedelta(hours=4)


class Processes:
    """The processes that torchrun started: this one's rank, world_size, and collective operations.

    With one process every collective returns its argument, so that callers need no second path.
    """

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))

    def refuse_one_gpu(self, gpu: int | None) -> None:
        """UserError where --gpu names one GPU for several processes."""
        if self.world_size > 1 and gpu is not None and gpu >= 0:
            raise UserError(
                f"--gpu {gpu}: leave it out with torchrun: each process takes the GPU of its local rank"
            )

    def join(self, gpu: int | None) -> torch.device:
        """Join the others; return this one's device. UserError: see refuse_one_gpu, select_device."""
        self.refuse_one_gpu(gpu)
        device = select_device(gpu)
        self.start(device)
        return device

    def start(self, device: torch.device) -> None:
        """Join the other processes, over NCCL on GPUs and gloo on the CPU; a second call does nothing."""
        if self.world_size > 1 and not torch.distributed.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            # torchrun --max-restarts keeps its store over the attempts, with the addresses of processes that
            # have ended: each attempt has to have names of its own in it.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            with _ended_at_once():
                store, rank, world_size = next(torch.distributed.rendezvous("env://"))
                store = torch.distributed.PrefixStore(f"attempt {attempt}", store)
                torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)
                # NCCL gives up after ten minutes, and its barrier waits for the GPU, so barriers use gloo.
                self.host = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    def stop(self) -> None:
        """Leave the process group at the end of a run; after an error this would wait for the others."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if self.rank == 0:  # It hosts the store that the others need to leave:
                time.sleep(0.5)  # with torch 2.6's gloo, about one in ten runs hung if it left first.
            torch.distributed.destroy_process_group()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum the tensors of all processes, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean of the tensors of all processes, in place."""
        return self.all_reduce(tensor).div_(self.world_size) if self.world_size > 1 else tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate the tensors (n, ...) of all processes, in order of rank: (world_size * n, ...).

        With gradient: see AllGather.
        """
        return AllGather.apply(tensor) if self.world_size > 1 else tensor

    def of_others(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate the tensors (n, ...) of the other processes: ((world_size - 1) * n, ...)."""
        n = len(tensor)
        return self.all_gather(tensor).roll(-n * self.rank, 0)[n:]

    def all_gather_object(self, value: object) -> list:
        """What every process has, in order of rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(values, value, self.host)
        return values

    def barrier(self) -> None:
        """Wait until every process has called this."""
        if self.world_size > 1:
            torch.distributed.barrier(self.host)


@contextlib.contextmanager
def _ended_at_once() -> Iterator[None]:
    """SIGTERM ends this process as it ends any other.

    Who waits for a process that was killed before it joined waits inside torch, where Python hears of no
    signal: torchrun would kill it only after 30 seconds. Nothing is being written meanwhile.
    """
    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most gigabytes that this process has taken so far: {"process": …, "GPU": …}, as far as known."""
    peak = {}
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak["process"] = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
    if device.type == "cuda":
        peak["GPU"] = torch.cuda.max_memory_reserved(device) / 1e9
    return peak


class AllGather(torch.autograd.Function):
    """Processes.all_gather; a process's gradient is the sum of what all processes' losses have for its rows.

    DistributedDataParallel divides it by their number, so that it becomes that of the mean of the losses.
    torch's own functions do not agree on this factor (torch.distributed._functional_collectives.all_reduce
    has 1 in 2.6 and the number of processes in 2.14).
    """

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        """(n, ...) -> (world_size * n, ...)."""
        gathered = tensor.new_empty(torch.distributed.get_world_size(), *tensor.shape)
        torch.distributed.all_gather(list(gathered), tensor.contiguous())
        return gathered.flatten(0, 1)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        """(world_size * n, ...) -> (n, ...)."""
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def seed_globally(seed: int, deterministic: bool = False) -> None:
    """Seed the generators of Python, NumPy and torch in this process.

    deterministic: torch uses only algorithms whose results are the same in every run.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # not needed: none is read
    torch.backends.cudnn.benchmark = not deterministic


# NumPy arrays or tensors: the arguments of metrics and re-ranking

Array = np.ndarray | torch.Tensor


def as_tensor(values: Array) -> torch.Tensor:
    """Return values as a tensor, which shares their memory unless torch cannot (read-only, big-endian)."""
    if isinstance(values, torch.Tensor):
        return values.detach()
    values = np.asarray(values)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"numbers are needed, not {values.dtype}")
    native = np.float64 if values.dtype == np.longdouble else values.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(values, native, "CW"))  # torch warns of read-only arrays


def as_ids(values: Array, name: str) -> torch.Tensor:
    """Return int64 pids or camids; floats are taken if they are whole numbers, as MATLAB's are.

    Raises ValueError, with the name, for text and for numbers that are not whole.
    """
    try:
        ids = as_tensor(values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    whole = ids.long()
    if ids.is_floating_point() and not torch.equal(whole.to(ids.dtype), ids):
        example = ids[whole.to(ids.dtype) != ids].flatten()[0].item()
        raise ValueError(f"{name} must be whole numbers, and {example:g} is none")
    return whole


def as_features(values: Array) -> torch.Tensor:
    """Return a float32 tensor of features (N, D).

    Raises:
        ValueError: another shape, NaN or infinity.
    """
    features = as_tensor(values).float()
    if features.ndim != 2:
        raise ValueError(f"features must be (N, D), not {tuple(features.shape)}")
    if features.numel() and not torch.isfinite(torch.stack(features.aminmax())).all():
        raise ValueError("features hold NaN or infinity")
    return features


def unit_features(values: Array) -> torch.Tensor:
    """Return a float32 tensor of unit features (N, D); half precision's rounding of the norm is allowed.

    Raises:
        ValueError: see as_features; or norms that differ from 1 by more than 0.01.
    """
    features = as_features(values)
    if features.numel():
        shortest, longest = torch.linalg.vector_norm(features, dim=1).aminmax()
        if shortest < 0.99 or longest > 1.01:
            raise ValueError(
                f"features must be unit, and their norms are {shortest:.4g} to {longest:.4g}: "
                "divide each by its norm"
            )
    return features
