"""Read and write checkpoints and weights: never run code, never leave a partly written file."""

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from numpy._core import multiarray  # NumPy 1.26 has it too

from utils import UserError, whole_file


def numpy_globals() -> list:
    """The globals that pickled NumPy numbers and arrays need, under the module names of NumPy 1 and 2."""
    allowed = [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]
    for function in (multiarray.scalar, multiarray._reconstruct):
        allowed += [
            (function, f"numpy.{module}.multiarray.{function.__name__}") for module in ("core", "_core")
        ]
    return allowed


def read_torch_file(path: str | os.PathLike) -> object:
    """Read a file of torch.save onto the CPU: tensors, NumPy values and plain Python data, never code.

    Raises:
        UserError: the file does not exist, is broken, or contains code (which is not run).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file at {path}")
    try:
        with torch.serialization.safe_globals(numpy_globals()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load may raise anything for a broken file
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a truncated zip file
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        holds_code = "unsupported global" in str(error).lower()
        reason = "it is not a complete file of torch.save"
        if holds_code:
            reason = "it contains code, which is never run"
        raise UserError(f"{path} is refused: {reason}") from error


def is_state_dict(value: object) -> bool:
    """Whether value maps names to tensors."""
    return (
        isinstance(value, dict) and all(isinstance(v, torch.Tensor) for v in value.values()) and bool(value)
    )


def load_weights(path: str | os.PathLike) -> dict:
    """Read a state dict, bare or under `state_dict` or `model`; or a complete checkpoint, if it has `net`.

    Raises UserError, naming path, for anything else.
    """
    weights = read_torch_file(path)
    if isinstance(weights, dict):
        if is_state_dict(weights.get("net")):
            return weights
        weights = weights.get("state_dict", weights.get("model", weights))
    if not is_state_dict(weights):
        raise UserError(f"{path} holds no state dict")
    return weights


def load_checkpoint(path: str | os.PathLike) -> dict:
    """Read a checkpoint of this project or of the released code: a dict with the weights under `net`.

    Raises UserError, naming path, if it is missing, refused (see read_torch_file) or not a checkpoint.
    """
    checkpoint = read_torch_file(path)
    if not isinstance(checkpoint, dict) or not is_state_dict(checkpoint.get("net")):
        raise UserError(f"{path} is not a checkpoint: it has no `net` with the weights of a network")
    return checkpoint


def fingerprint(checkpoint: dict) -> str:
    """Sixteen hexadecimal digits that identify a checkpoint's network: a sha256 of its weights."""
    digest = hashlib.sha256()
    for key, value in sorted(checkpoint["net"].items()):
        value = value.detach().cpu().contiguous()
        digest.update(repr((key.removeprefix("module."), value.dtype, tuple(value.shape))).encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def save_checkpoint(checkpoint: dict, path: str | os.PathLike) -> None:
    """Write a checkpoint; path keeps its old content until the new file is complete."""
    with whole_file(path) as temporary:
        try:
            torch.save(checkpoint, temporary)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch's zip writer does not raise OSError on a full disk
            if "CUDA" in str(error):
                raise
            raise OSError(
                errno.ENOSPC, "torch could not write the complete file: is the disk full?"
            ) from error
