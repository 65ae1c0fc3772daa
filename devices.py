"""Devices, precision, seeds, and the processes that torchrun starts."""

import datetime
import os
import random
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from utils import UserError, log


def select_device(gpu: int) -> torch.device:
    """The device that --gpu names: an index; the CPU for -1 and where there is no GPU (a line says so)."""
    count = torch.cuda.device_count()
    if gpu >= 0 and count:
        if gpu >= count:
            raise UserError(f"--gpu {gpu}: this machine's GPUs are 0 to {count - 1}")
        torch.cuda.set_device(gpu)
        return torch.device("cuda", gpu)
    log.info("running on the CPU (%s)", "--gpu -1" if gpu < 0 else "torch sees no GPU here")
    return torch.device("cpu")


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """What --amp means on device, None for float32: `auto` is the fastest that the device does natively.

    `off` means all of float32: on GPUs it turns off TF32 too, which cuDNN would use for convolutions.
    """
    torch.backends.cudnn.allow_tf32 = amp != "off"
    torch.backends.cuda.matmul.allow_tf32 = False  # the losses', the memory's and the metrics' products
    if amp == "auto":
        if device.type == "cuda":
            if torch.cuda.get_device_capability(device) >= (8, 0):
                return torch.bfloat16
            return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else None
        return torch.bfloat16 if cpu_has_bfloat16() else None
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; on the CPU it is auto, bf16 or off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX-512 BF16 or AMX), as Linux tells."""
    try:
        return bool({"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))
    except OSError:
        return False


WAIT = datetime.timedelta(hours=4)  # for a process that decodes a dataset's images while the others wait()


class Processes:
    """This process among those that torchrun started: rank, world_size and the collectives of a run.

    Alone (world_size 1) every collective gives what it was given, so that callers have one path.
    """

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))

    def start(self, device: torch.device) -> None:
        """Join the other processes, over NCCL on GPUs and gloo on the CPU; again is no harm."""
        if self.world_size > 1 and not torch.distributed.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend)
            # On the host: agreeing there waits for no GPU, and has more patience than a GPU's collectives.
            self.host = torch.distributed.new_group(backend="gloo", timeout=WAIT)

    def stop(self) -> None:
        """Leave the other processes, when all are done: after an error this would wait for them."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if self.rank == 0:  # it holds the store through which the others take their leave:
                time.sleep(0.5)  # torch 2.6's gloo hung about once in ten times when it was gone first
            torch.distributed.destroy_process_group()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every process's tensor, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """The largest of every process's number."""
        if self.world_size == 1:
            return number
        everyones = torch.tensor(number)
        torch.distributed.all_reduce(everyones, torch.distributed.ReduceOp.MAX, self.host)
        return int(everyones)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every process's tensor (n, ...), stacked in the order of ranks: (world_size, n, ...)."""
        if self.world_size == 1:
            return tensor[None]
        everyone = tensor.new_empty(self.world_size, *tensor.shape)
        torch.distributed.all_gather(list(everyone), tensor.contiguous())
        return everyone

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every process the first one's tensors, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, 0)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            torch.distributed.barrier(self.host)


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch; deterministic: only algorithms whose results do not vary between runs."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # none is read
    torch.backends.cudnn.benchmark = not deterministic
