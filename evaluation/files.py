"""The formats of files of features, told apart by what is in them.

By path, for every protocol of the dataset:
    FILE.npz, FILE.mat   what test.py --save-features writes: <modality>_features, _paths, _pids, _camids
    FILE.npy             with --images LIST: a path a line, in the order of the rows
    FOLDER               feature_cam<N>.mat, as test.py --save-mat and SYSU-MM01's authors have them
One row of a table, with the gallery that the file holds:
    FILE.npz, FILE.mat   query_f, query_label, query_cam, gallery_f, gallery_label, gallery_cam
"""

import argparse
import csv
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import scipy  # its parts are imported when they are first used: scipy.io takes 0.2 s

import data_manager
from data_manager import CAPTURED
from readers.lists import read_lines, read_text
from utils import UserError, log

NAMES = {  # what the field calls an array of a query or gallery, after query_ or gallery_
    "features": ("f", "feature", "features", "feat", "feats"),
    "pids": ("label", "labels", "id", "ids", "pid", "pids"),
    "camids": ("cam", "cams", "camid", "camids"),
}


def mat_file(folder: str | os.PathLike, camid: int) -> Path:
    """Where the features of a camera of SYSU-MM01 are, for the authors' MATLAB evaluation."""
    return Path(folder, f"feature_cam{camid}.mat")


def read_arrays(args: argparse.Namespace, name: str) -> dict:
    """What a file or folder holds, by path or as one query and gallery.

    Args:
        args: dataset, data_path and images, as typed.
        name: of the file or folder.

    Returns:
        {"images": (paths, features (N, D), pids (N,) or None)}, or {"query": …, "gallery": …}, each with
        "features" (N, D), "pids" (N,) and "camids" (N,) or None.

    Raises:
        UserError: a file that is missing, or of none of the formats.
    """
    path = Path(name)
    if not path.exists():
        raise UserError(f"--features {name}: no such file")
    if path.suffix == ".npy" and not args.images:
        raise UserError(f"--features {name}: a .npy needs --images LIST")
    if path.is_dir():
        return _read_cells(args, path)
    arrays = _load(path)
    if isinstance(arrays, np.ndarray):
        return {"images": (_read_list(Path(args.images)), _table(arrays, name, "features"), None)}
    if any(f"{modality}_features" in arrays for modality in CAPTURED):
        parts = []
        for modality in CAPTURED:
            names = [f"{modality}_{key}" for key in ("features", "paths", "pids")]
            if lacking := [key for key in names if key not in arrays]:
                raise UserError(f"{name}: lacks {', '.join(lacking)}")
            part = _table(arrays[names[0]], name, names[0]), _texts(arrays[names[1]])
            parts.append((*part, _numbers(arrays[names[2]], name, names[2])))
            for key, values in zip(names[1:], parts[-1][1:], strict=True):
                if len(values) != len(part[0]):
                    raise UserError(f"{name}: {len(values):,} {key} for features {part[0].shape}")
        features, paths, pids = zip(*parts, strict=True)
        if len({part.shape[-1] for part in features}) > 1:
            raise UserError(f"{name}: features of {features[0].shape} and {features[1].shape}")
        return {
            "images": ([p for part in paths for p in part], np.concatenate(features), np.concatenate(pids))
        }
    return {side: _side(arrays, side, name) for side in ("query", "gallery")}


def _load(path: Path) -> Mapping | np.ndarray:
    """The arrays of a .npz or .mat by name, or that of a .npy; UserError for other files."""
    if path.suffix not in (".npy", ".npz", ".mat"):
        raise UserError(f"{path}: not a .npz, .mat or .npy")
    try:
        if path.suffix == ".mat":
            return {key: value for key, value in scipy.io.loadmat(path).items() if not key.startswith("__")}
        loaded = np.load(path, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else dict(loaded)
    except NotImplementedError as error:  # scipy's word for HDF5
        raise UserError(f"{path}: a MATLAB 7.3 file; save it with -v7") from error
    except MemoryError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a complete {path.suffix} of numbers and texts") from error
    except Exception as error:  # scipy may raise anything for a broken file
        raise UserError(f"{path}: not a complete MATLAB file") from error


def _side(arrays: Mapping, side: str, name: str) -> dict[str, np.ndarray | None]:
    """Features, pids and camids (None: not there) of a query or gallery."""
    found: dict[str, np.ndarray | None] = {"camids": None}
    for key, endings in NAMES.items():
        there = [f"{side}_{ending}" for ending in endings if f"{side}_{ending}" in arrays]
        if len(there) > 1:
            raise UserError(f"{name}: {' and '.join(there)}: which one?")
        if there:
            value = arrays[there[0]]
            check = _table if key == "features" else _numbers
            found[key] = check(value, name, there[0])
        elif key != "camids":
            raise UserError(
                f"{name}: no {side}_{endings[0]} (nor {', '.join(f'_{e}' for e in endings[1:])}); it holds "
                + (", ".join(sorted(arrays)[:12]) or "nothing")
            )
    for key in ("pids", "camids"):
        if found[key] is not None and len(found[key]) != len(found["features"]):
            shape = found["features"].shape
            hint = "; features are (N, D)" if len(found[key]) in shape else ""
            raise UserError(f"{name}: {len(found[key]):,} {side} {key} for features {shape}{hint}")
    return found


def _table(values: np.ndarray, name: str, key: str) -> np.ndarray:
    """values, if they are floating-point numbers (N, D); else UserError."""
    if values.ndim != 2 or values.dtype.kind != "f" or not values.size:
        raise UserError(
            f"{name}: {key} must be floating-point numbers (N, D), not {values.dtype} {values.shape}"
        )
    return values


def _numbers(values: np.ndarray, name: str, key: str) -> np.ndarray:
    """(N,) int64 of an array (N,), (1, N) or (N, 1); UserError for text and for fractions."""
    flat = np.asarray(values)
    if flat.ndim > 2 or flat.size != max(flat.shape, default=0) or flat.dtype.kind not in "iuf":
        raise UserError(f"{name}: {key} must be whole numbers (N,), not {flat.dtype} {flat.shape}")
    flat = flat.ravel()
    with np.errstate(invalid="ignore"):
        whole = flat.astype(np.int64)
    if len(wrong := np.flatnonzero(whole != flat)):
        raise UserError(f"{name}: {key} must be whole numbers, and {flat[wrong[0]]:g} is none")
    if flat.dtype.kind == "f":
        log.info("%s: %s is stored as %s, and all are whole numbers", name, key, flat.dtype)
    return whole


def _texts(values: np.ndarray) -> list[str]:
    """Paths of an array of text, or of MATLAB's padded rows or cells."""
    texts = (np.asarray(value).item() for value in np.asarray(values).ravel())
    return [(t.decode(errors="replace") if isinstance(t, bytes) else str(t)).rstrip() for t in texts]


def _read_cells(args: argparse.Namespace, folder: Path) -> dict:
    """The features of feature_cam<N>.mat: row i of feature{pid} is of its i-th image in the camera."""
    if args.dataset != "sysu":
        raise UserError(f"--features {folder}: a folder is SYSU-MM01's MATLAB cells, not {args.dataset}")
    root = data_manager.dataset_root("sysu", args.data_path)
    paths, parts = [], []
    for samples in data_manager.read_split("sysu", root, "test").values():
        for camid in np.unique(samples.camids).tolist():
            file = mat_file(folder, camid)
            if not file.exists():
                continue
            cells = _load(file).get("feature")
            if cells is None or cells.dtype != object:
                raise UserError(f"{file}: no cell array `feature`")
            for pid in np.unique(samples.pids).tolist():
                images = np.flatnonzero((samples.camids == camid) & (samples.pids == pid))
                cell = cells.ravel()[pid - 1] if pid <= cells.size else np.empty((0, 0))
                if len(cell) != len(images):
                    raise UserError(
                        f"{file}: id {pid}: {len(cell)} features, and {len(images)} images in {root}"
                    )
                if len(cell):
                    parts.append(cell)
                    paths += [samples.paths[k] for k in images]
    if not parts:
        raise UserError(f"--features {folder}: no feature_cam<N>.mat in it")
    if len({part.shape[1] for part in parts}) > 1:
        raise UserError(f"--features {folder}: cells of features of several lengths")
    return {"images": (paths, np.concatenate(parts), None)}


def _read_list(path: Path) -> list[str]:
    """The paths of a text file, one a line, or of a CSV: its column path, or its first if it has no such."""
    if not path.exists():
        raise UserError(f"--images {path}: no such file")
    if path.suffix != ".csv":
        return [line for _, line in read_lines(path)]
    try:
        rows = [
            row for row in csv.reader(read_text(path).splitlines(), strict=True, skipinitialspace=True) if row
        ]
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV: {error}") from error
    column = rows[0].index("path") if rows and "path" in rows[0] else None
    return [row[column or 0] for row in rows[column is not None :] if len(row) > (column or 0)]
