"""What is told of anyone's features, query and gallery before they are judged."""

from collections.abc import Sequence

import numpy as np
import torch

from data_manager import CAPTURED, DATASETS, Samples
from evaluation.protocols import Protocol
from readers.regdb import CAMIDS
from readers.sysu import GALLERY_CAMERAS
from utils import UserError, log

BLOCK = 4096  # rows that are checked at a time
UNIT = 1e-6  # how far a norm in float32 may be from 1, and equal features from each other


def refuse_wrong_cameras(protocol: Protocol, q_camids: np.ndarray, g_camids: np.ndarray, name: str) -> None:
    """Raise UserError where cameras show that query and gallery are swapped, or are not the dataset's."""
    facts = DATASETS[protocol.dataset]
    if protocol.dataset == "folder" or not (q_camids.any() or g_camids.any()):
        return
    known = facts.cameras or {modality: (camid,) for modality, camid in CAMIDS.items()}  # RegDB has no more
    cameras = {modality: set(known[modality]) for modality in CAPTURED}
    asked, searched = facts.query_modality[protocol.mode], facts.gallery_modality(protocol.mode)
    queries, images = set(q_camids.tolist()), set(g_camids.tolist())
    wanted = set(GALLERY_CAMERAS[protocol.mode]) if protocol.dataset == "sysu" else cameras[searched]
    if queries <= cameras[asked] and images <= wanted:
        return
    shown = f"query cameras {sorted(queries)[:9]}, gallery cameras {sorted(images)[:9]}"
    if queries <= cameras[asked] and images <= cameras[searched]:
        raise UserError(f"{name}: not a gallery of --mode {protocol.mode}: {shown}")
    if queries <= cameras[searched] and images <= cameras[asked]:
        raise UserError(f"{name}: query and gallery are swapped for {protocol.mode}: {shown}")
    if protocol.dataset != "regdb":  # whose cameras may have any numbers
        zero = ": they count from 0, and the dataset from 1" if 0 in queries | images else ""
        raise UserError(
            f"{name}: not {facts.title}'s {asked} queries in a gallery of {searched} images: {shown}{zero}"
        )


def own_shot(protocol: Protocol, gallery: Samples, name: str) -> int:
    """The most images of an id and camera in a gallery of SYSU-MM01; UserError for one and --shot 10."""
    if protocol.dataset != "sysu":
        return protocol.shot
    largest = int(np.unique([gallery.pids, gallery.camids], axis=1, return_counts=True)[1].max())
    if largest == 1 < protocol.shot:
        raise UserError(f"{name}: one gallery image of an id and camera, which is not --shot {protocol.shot}")
    return largest


def check(array: np.ndarray, name: str, names: Sequence[str], distance: str) -> tuple[torch.Tensor, str]:
    """Features (N, D) as float32, for the cosine distance divided by their norms, and what they are in words.

    array: of any floating-point type; one of float32 is changed in place.

    Raises:
        UserError: not finite, too large for float32, or without a length to divide by.
    """
    words = f"{array.shape[1]:,} {array.dtype.newbyteorder('=')} each"
    single = array.dtype == np.float32 and array.dtype.isnative and array.flags.c_contiguous
    features = array if single and array.flags.writeable else np.empty(array.shape, np.float32)
    norms = np.empty(len(array))  # in float64 infinite or NaN only where a number is
    for start in range(0, len(array), BLOCK):
        part = slice(start, start + BLOCK)
        rows = array[part].astype(np.float32 if array.dtype.itemsize <= 4 else np.float64)
        norms[part] = torch.linalg.vector_norm(torch.from_numpy(rows), dim=1, dtype=torch.float64)
        with np.errstate(all="ignore"):  # what goes wrong is told below
            if distance == "cosine":
                off = np.abs(norms[part] - 1) > UNIT
                rows[off] /= norms[part][off, None].astype(rows.dtype)
            features[part] = rows
    if len(bad := np.flatnonzero(~np.isfinite(norms))):
        raise UserError(f"{name}: {len(bad):,} features are not finite, for instance of {names[bad[0]]}")
    if distance == "euclidean":
        if norms.max() > np.finfo(np.float32).max ** 0.5:
            raise UserError(
                f"{name}: features are too large for single precision: norms up to {norms.max():.4g}"
            )
        return torch.from_numpy(features), f"{words}, Euclidean distance"
    if not norms.all():
        raise UserError(f"{name}: a feature is zero: {names[int(norms.argmin())]}")
    if norms.min() < 0.99 or norms.max() > 1.01:
        log.warning(
            "%s: features are not unit (norms %.4g to %.4g) and are divided by their norms",
            name, norms.min(), norms.max(),
        )  # fmt: skip
        words += f", divided by norms of {norms.min():.4g} to {norms.max():.4g}"
    return torch.from_numpy(features), f"{words}, cosine distance"


def refuse_equal(features: torch.Tensor, rows: Sequence[int], name: str) -> None:
    """Raise UserError if these rows of unit or other features are all the same but for rounding."""
    first = features[rows[0]]
    blocks = (features[list(rows[k : k + BLOCK])] for k in range(0, len(rows), BLOCK))
    if len(rows) > 1 and all((block - first).abs().max() <= UNIT * first.abs().max() for block in blocks):
        raise UserError(f"{name}: all {len(rows):,} features are equal")
