"""Read and write checkpoints: their keys, whose network a file holds, and no code that is ever run.

A checkpoint of this project is a dict:

- `net`: the network's state dict. `args`: {flag: value} that it was trained with; arch and stem rebuild it.
- `epoch cmc mAP mINP`: the last evaluation. `protocol best selection data`: what else an evaluation repeats.
- `loss optimizer scaler evaluated world_size`: what continuing a run needs beside these (STATE).

Other people's files have the weights under `net`, `state_dict` or `model`, or nothing else. docs/runtimes.md
lists the networks that are read.
"""

import argparse
import errno
import hashlib
import os
import pathlib
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy._core import multiarray  # NumPy 1.26 has it too

from data_manager import DATASETS
from utils import UserError, log, whole_file

STATE = {
    "loss", "optimizer", "scaler", "epoch", "evaluated", "best", "cmc", "mAP", "mINP", "data", "world_size",
}  # fmt: skip
FACTS = ("epoch", "selection", "protocol", "best", "data")  # what an evaluation repeats of them
WRAPPERS = ("net", "state_dict", "model")  # keys of the weights, in this order
AGW_SIZE = 288, 144  # height, width; the files of AGW's family do not say theirs


# --- whose network it is: names there (whole keys) -> names here; None: only training needs it

CLASSES = {r"\w*(memory|classifier)\w*(\.\w+)?": None}  # tables of class memories and classifiers
RELEASED = CLASSES | {
    r"backbone\.conv1\.(.+)": r"stems.shared.0.\1",
    r"backbone\.bn1\.(.+)": r"stems.shared.1.\1",
    r"backbone\.((layer\d|NL_[23]|pool)\..+)": r"\1",
    r"bn_neck\.(.+)": r"neck.\1",
}
AGW = CLASSES | {
    r"visible_module\.visible\.conv1\.(.+)": r"stems.visible.0.\1",
    r"visible_module\.visible\.bn1\.(.+)": r"stems.visible.1.\1",
    r"thermal_module\.thermal\.conv1\.(.+)": r"stems.infrared.0.\1",
    r"thermal_module\.thermal\.bn1\.(.+)": r"stems.infrared.1.\1",
    r"base_resnet\.base\.(layer\d\..+)": r"\1",
    r"(NL_[23]\..+)": r"\1",
    r"bottleneck\.(.+)": r"neck.\1",
    # Each of the three is a whole ResNet, of which the forward pass uses a part.
    r"(visible_module\.visible|thermal_module\.thermal)\.(layer\d|fc)\..+": None,
    r"base_resnet\.base\.(conv1|bn1|fc)\..+": None,
}
OTHERS = {  # networks that are not built here, by a module that they alone have
    "DEEN": r"DEE\.",
    "MPANet": r"spatial_attention\.|visible_classifier\.",
    "fast-reid": r"heads\.",
    "torchreid": r"(conv1|features)\..+",  # with a classifier; torchvision calls it fc
}
BLOCKS = {"2": 2, "3": 3}  # NL_2.0 follows block 2 of layer2's four, NL_3.0 block 3 of layer3's six


class Network(NamedTuple):
    """What a checkpoint says of its network, and the weights under this project's names."""

    arch: object
    stem: object
    pooling: str  # "gem": with a learnt exponent; "agw": with the exponent 3; "mean": and no non-local blocks
    state: dict[str, torch.Tensor]


def network_of(checkpoint: dict, path: str | os.PathLike) -> Network:
    """The network of a checkpoint of this project, of the released code, or of AGW's family.

    UserError, naming path and the module, for a module that the released code's or AGW's network lacks.
    """
    state = weights_of(checkpoint)
    if _has(state, r"backbone\."):
        return Network("resnet50", "shared", "gem", _renamed(state, RELEASED, path))
    if is_agw(checkpoint):
        pooling = "agw" if _has(state, r"NL_[23]\.") else "mean"  # nothing else in the file says so
        return Network("resnet50", "two-stream", pooling, _renamed(state, AGW, path))
    args = _as_dict(checkpoint.get("args"))
    return Network(args.get("arch"), args.get("stem"), "gem", state)


def weights_of(checkpoint: dict) -> dict[str, torch.Tensor]:
    """The state dict of load_checkpoint's dict, without the prefix of DataParallel."""
    return {key.removeprefix("module."): value for key, value in checkpoint.get("net", {}).items()}


def is_agw(checkpoint: dict) -> bool:
    """Whether a checkpoint is of AGW's family, whose files do not say the images' size (AGW_SIZE)."""
    return _has(weights_of(checkpoint), r"visible_module\.visible\.")


def is_others(checkpoint: dict) -> bool:
    """Whether a checkpoint is of the released code or of AGW's family."""
    return _has(weights_of(checkpoint), r"backbone\.") or is_agw(checkpoint)


def _has(state: dict, pattern: str) -> bool:
    return any(re.match(pattern, key) for key in state)


def _renamed(state: dict, names: dict[str, str | None], path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The weights under this project's names; UserError for a key that names does not have."""
    renamed, inner = {}, {}
    for key, value in state.items():
        pattern = next((pattern for pattern in names if re.fullmatch(pattern, key)), None)
        if pattern is None or (pattern in CLASSES and value.ndim > 2):
            raise UserError(
                f"{path}: {key} is no part of the network that the file is otherwise of; "
                "evaluate its features instead, with test.py --features"
            )
        if names[pattern] is None:
            continue
        key = re.sub(pattern, names[pattern], key)
        if match := re.fullmatch(r"NL_([23])\.(\d)\.(.+)", key):
            layer, k, rest = match.groups()
            prefix = f"layer{layer}.{BLOCKS[layer] + 2 * int(k) + 1}"
            if match := re.fullmatch(r"(theta|phi|g\.0)\.(weight|bias)", rest):
                inner.setdefault(f"{prefix}.theta_phi_g.{match[2]}", {})[match[1]] = value
            else:
                renamed[f"{prefix}.{rest.replace('W.0.', 'expand.').replace('W.1.', 'bn.')}"] = value
        elif match := re.fullmatch(r"layer([23])\.(\d)\.(.+)", key):
            layer, k = match[1], int(match[2])
            # each non-local block moves the blocks after it by one
            renamed[f"layer{layer}.{k + max(0, k - BLOCKS[layer])}.{match[3]}"] = value
        else:
            renamed[key] = value
    for key, parts in inner.items():
        if any(len(value) != 1 for value in parts.values()):
            raise UserError(
                f"{path}: its non-local blocks have {len(next(iter(parts.values())))} inner channels, those "
                "here have one; evaluate its features instead, with test.py --features"
            )
        renamed[key] = torch.cat([parts[name] for name in ("theta", "phi", "g.0") if name in parts])
    return renamed


# --- what it says of itself


def saved_settings(checkpoint: dict, path: str | os.PathLike) -> dict[str, object]:
    """The settings that a checkpoint was trained with, by train.py's flags; of other people's, their sizes.

    Raises UserError, naming path, if a setting that evaluation reads is invalid.
    """

    def number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    valid = {
        "dataset": lambda value: isinstance(value, str) and value in DATASETS,
        "img_h": lambda value: number(value) and value >= 8,
        "img_w": lambda value: number(value) and value >= 8,
        "amp": lambda value: value in ("auto", "bf16", "fp16", "off"),
        "trial": lambda value: value is None or (isinstance(value, str) and value.isdecimal()),
        "pixel_range": lambda value: value is None or (len(value) == 2 and all(map(number, value))),
    }
    settings = _as_dict(checkpoint.get("args"))
    if is_others(checkpoint):  # their flags of the same names need not mean the same
        settings = {key: settings[key] for key in ("img_h", "img_w") if key in settings}
    for key, holds in valid.items():
        try:
            good = key not in settings or holds(settings[key])
        except TypeError:  # no length, say
            good = False
        if not good:
            raise UserError(f"{path}: invalid settings: {key} {settings[key]!r}")
    return settings


def image_size(
    checkpoint: dict, path: str | os.PathLike, height: int | None, width: int | None, dataset: str
) -> tuple[int, int]:
    """Height and width of a network's images: as typed, else as the checkpoint says, else its family's.

    AGW's family does not say them (AGW_SIZE; the log tells), the released code takes the dataset's.
    """
    saved, usual = saved_settings(checkpoint, path), (DATASETS[dataset].height, DATASETS[dataset].width)
    if is_agw(checkpoint):
        usual = AGW_SIZE
        if not (height or "img_h" in saved) or not (width or "img_w" in saved):
            log.info("%s does not say its images' size: %dx%d, unless --img-h and --img-w do", path, *usual)
    return height or saved.get("img_h", usual[0]), width or saved.get("img_w", usual[1])


# --- files


def plain_dict(*_factory) -> dict:
    """What a defaultdict is read as; _factory: what makes its values."""
    return {}


def harmless_globals() -> list:
    """What files may name besides torch's own: NumPy's numbers and arrays, and plain containers of Python.

    Each under the module names of all versions that write it.
    """
    allowed = [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]
    for function in (multiarray.scalar, multiarray._reconstruct):
        allowed += [
            (function, f"numpy.{module}.multiarray.{function.__name__}") for module in ("core", "_core")
        ]
    # torch puts no items into a defaultdict, allowed or not: read it as the dict that it is but for new keys.
    allowed += [argparse.Namespace, (plain_dict, "collections.defaultdict"), dict, list, int, float, str]
    for name in ("PosixPath", "WindowsPath"):  # as text: a path of another system cannot be made here
        allowed += [(pathlib.PurePosixPath, f"{module}.{name}") for module in ("pathlib", "pathlib._local")]
    return allowed


def read_torch_file(path: str | os.PathLike) -> object:
    """Read a file of torch.save onto the CPU: tensors, NumPy values and plain Python data, never code.

    Raises:
        UserError: the file does not exist, is broken, or contains a type that could run code (it is not run).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file at {path}")
    try:
        with torch.serialization.safe_globals(harmless_globals()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load may raise anything for a broken file
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a truncated zip file
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        reason = "it is not a complete file of torch.save"
        if refused := re.search(r"unsupported global:? (?:global )?([\w.]+)", str(error), re.IGNORECASE):
            name = refused[1].removeprefix("builtins.")  # as torch 2.6 says it
            reason = (
                f"it holds {name}, which is no plain data (code is never run); "
                "where it was written, save the network's state_dict() instead"
            )
        raise UserError(f"{path} is refused: {reason}") from error


def is_state_dict(value: object) -> bool:
    """Whether value maps names to tensors."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(key, str) and isinstance(v, torch.Tensor) for key, v in value.items())
    )


def load_checkpoint(path: str | os.PathLike) -> dict:
    """Read a file with the weights of a network: a dict with them under `net`, and what else the file says.

    The file may have the weights under `net`, `state_dict` or `model`, or be the state dict itself.

    Raises:
        UserError: it is missing, refused (see read_torch_file), no such file, or of a network in OTHERS.
    """
    content = read_torch_file(path)
    checkpoint = _as_dict(content)
    if checkpoint.keys().isdisjoint(WRAPPERS):
        checkpoint = {"net": content}
    wrapper = next((key for key in WRAPPERS if is_state_dict(checkpoint.get(key))), None)
    if wrapper is None:
        raise UserError(
            f"{path} is not a checkpoint: it is no state dict and has none as `net`, `state_dict` or `model`"
        )
    checkpoint = {"net": checkpoint.pop(wrapper)} | checkpoint
    state = weights_of(checkpoint)
    other = next((name for name, pattern in OTHERS.items() if _has(state, pattern)), None)
    if other and (other != "torchreid" or _has(state, r"classifier\.")):
        raise UserError(
            f"{path} is a network of {other}, which is not built here: "
            "evaluate its features instead, with test.py --features"
        )
    return checkpoint


def _as_dict(value: object) -> dict:
    """A dict as it is, a Namespace's attributes, {} for anything else."""
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return value if isinstance(value, dict) else {}


def fingerprint(checkpoint: dict) -> str:
    """Sixteen hexadecimal digits that identify a checkpoint's network: a sha256 of its weights."""
    digest = hashlib.sha256()
    for key, value in sorted(checkpoint["net"].items()):
        value = value.detach().cpu().contiguous()
        digest.update(repr((key.removeprefix("module."), value.dtype, tuple(value.shape))).encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def save_checkpoint(checkpoint: dict, path: str | os.PathLike) -> None:
    """Write a checkpoint, its weights contiguous; path keeps its old content until the new file is complete.

    Training holds weights channels-last, which other formats (safetensors) refuse to store.
    """
    checkpoint = checkpoint | {"net": {key: value.contiguous() for key, value in checkpoint["net"].items()}}
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
