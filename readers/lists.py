"""The files of a dataset: find images, read lists of ids and images; lists of values in messages."""

import os
import re
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath

import numpy as np
import scipy.io

from utils import UserError, log

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".tga",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k",
)  # fmt: skip
Cells = dict[tuple[int, int], list[str]]  # (pid, camid) -> image paths in file-name order; none is empty


def refuse(message: str, problems: list[str] | None) -> None:
    """Raise UserError; or, if problems is a list, append to it: tools.check reports all problems at once."""
    if problems is None:
        raise UserError(message)
    problems.append(message)


def listed(values: Iterable, most: int = 30) -> str:
    """Values for a message: `1, 2, 3`, at most `most` of them; sets are sorted."""
    words = [str(value) for value in (sorted(values) if isinstance(values, set) else values)]
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def number(text: str) -> int | None:
    """text as a number; None unless it consists of 1 to 18 digits, which fit int64."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def image_paths(folder: str | os.PathLike, problems: list[str] | None = None) -> list[str]:
    """The images of a folder in file-name order; none if the folder does not exist.

    Hidden files and files without an image's suffix (Thumbs.db) are left out. A folder or a dangling link
    with an image's name is refused: skipping it would silently change every gallery drawn after it.
    """
    names = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not entry.name.lower().endswith(IMAGE_SUFFIXES):
                    continue
                if entry.is_file():
                    names.append(entry.name)
                else:
                    refuse(f"{entry.path}: named like an image, but a folder or a dangling link", problems)
    except FileNotFoundError:
        return []
    except OSError as error:
        refuse(f"{folder}: cannot be listed: {error.strerror}", problems)
    return [os.path.join(folder, name) for name in sorted(names)]


def read_text(path: Path) -> str:
    """A text file's content without its BOM; UserError if it is missing, unreadable or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; it lists a split of the dataset") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(line number, line) of a text file, without CR, trailing commas and blank lines."""
    lines = enumerate((line.strip().rstrip(",").rstrip() for line in read_text(path).split("\n")), start=1)
    return [(count, line) for count, line in lines if line]


def read_ids(path: Path) -> list[int]:
    """The ids of a file of comma-separated ids, sorted, each once."""
    pids = set()
    lines = read_lines(path)
    if not lines:
        raise UserError(f"{path}: lists no ids")
    for count, line in lines:
        for word in filter(None, map(str.strip, line.split(","))):
            if (pid := number(word)) is None:
                raise UserError(f"{path}, line {count}: {word!r} is not an id")
            pids.add(pid)
    return sorted(pids)


def read_index(path: Path) -> list[tuple[int, str, str]]:
    """(line number, path, label) of each line `path label` of a list; the label is "" if it is missing."""
    split = ((count, *line.rsplit(None, 1)) for count, line in read_lines(path))  # a path may hold spaces
    return [(count, os.path.normpath(words[0]), "".join(words[1:])) for count, *words in split]


def path_problem(root: str | os.PathLike, path: str) -> str | None:
    """Describe what is wrong with a path from a list; None if it is valid.

    A path must be relative to root, the dataset's folder, and stay below it.
    """
    parts = PureWindowsPath(path)  # knows both kinds of slash, and drives
    if parts.anchor or ".." in parts.parts:
        for base in (os.path.abspath(root), os.path.realpath(root)):
            inside = os.path.relpath(os.path.join(base, path), base)
            if not parts.drive and "\\" not in path and not inside.startswith(os.pardir):
                return f"{path!r} must be written relative to {root}, as {inside!r}"
        return f"{path!r} is outside the dataset"
    if "\0" in path or not os.path.isfile(os.path.join(root, path)):
        return f"there is no image file {path!r} in {root}"
    return None


def index_labels(file: Path, root: str | os.PathLike, problems: list[str] | None = None) -> dict[str, int]:
    """{path relative to root: label} of a list of images, in its order.

    Args:
        file: the list, with lines `path label`.
        root: the dataset's folder.
        problems: a list that collects problems, instead of raising UserError.

    Raises:
        UserError: a wrong label, an invalid path, a path with two labels, or an empty list.
    """
    labels, repeated = {}, []
    for count, path, label in read_index(file):
        where = f"{file}, line {count}"
        if not label:
            refuse(f"{where}: {path!r} has no label", problems)
        elif (pid := number(label)) is None:
            refuse(f"{where}: the label {label!r} is not a number", problems)
        elif problem := path_problem(root, path):
            refuse(f"{where}: {problem}", problems)
        elif path not in labels:
            labels[path] = pid
        elif labels[path] == pid:
            repeated.append(count)
        else:
            refuse(f"{where}: {path!r} has label {pid} here and {labels[path]} above", problems)
    if repeated:
        log.warning("%s: images that are listed twice are used once: line %s", file, listed(repeated))
    if not labels:
        refuse(f"{file}: lists no images", problems)
    return labels


def _read_permutations(path: Path) -> list[np.ndarray]:
    """Each camera's cells of SYSU-MM01's rand_perm_cam.mat; UserError if it is missing or malformed.

    Cell [pid - 1] holds (10 trials, images) 1-based positions.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: missing; the authors of SYSU-MM01 publish it in their evaluation repository "
            "(wuancong/SYSU-MM01 on GitHub) under evaluation/data_split; --galleries seeded works without it"
        )
    try:
        cells = scipy.io.loadmat(path, variable_names=["rand_perm_cam"])["rand_perm_cam"]
    except Exception as error:  # scipy may raise anything for a broken file
        raise UserError(f"{path}: not a MATLAB file with a variable rand_perm_cam") from error
    if (
        cells.shape not in ((6, 1), (1, 6))
        or cells.dtype != object
        or any(c.dtype != object for c in cells.flat)
    ):
        raise UserError(f"{path}: rand_perm_cam is not a cell array (6, 1) of cell arrays, one cell per id")
    return [cell.ravel() for cell in cells.flat]


def published_order(root: str | os.PathLike, cells: Cells, camids: tuple[int, ...], trial: int) -> Cells:
    """SYSU-MM01's test cells of some cameras, with their images in the published order.

    Args:
        root: the dataset's folder.
        cells: the images of each (pid, camid).
        camids: the cameras of the gallery.
        trial: 0..9.

    Raises:
        UserError: rand_perm_cam.mat is missing, malformed, or made for other images.
    """
    path = Path(root, "exp", "rand_perm_cam.mat")
    cameras = _read_permutations(path)
    ordered = {}
    for pid in read_ids(Path(root, "exp", "test_id.txt")):
        if pid == 0:
            raise UserError(f"{path}: has no id 0, which test_id.txt lists: its ids start at 1")
        for camid in camids:
            where = f"{path}: id {pid}, camera {camid}"
            images = cells.get((pid, camid), [])
            camera = cameras[camid - 1]
            positions = camera[pid - 1] if pid <= len(camera) else np.empty((10, 0))
            if positions.size == 0 and not images:
                continue
            if positions.ndim != 2 or len(positions) != 10 or positions.dtype.kind not in "uif":
                raise UserError(f"{where}: shape {positions.shape} is not (10 trials, images)")
            row = positions[trial]
            if row.max(initial=0) > len(images):
                raise UserError(f"{where}: points to image {row.max():g}, but there are {len(images)}")
            # Positions refer to the sorted files: an extra file would silently shift the others.
            if sorted(row) != list(range(1, len(images) + 1)):
                raise UserError(f"{where}: trial {trial} does not order the folder's {len(images)} images")
            ordered[pid, camid] = [images[int(position) - 1] for position in row]
    return ordered
