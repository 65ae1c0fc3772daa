"""What the datasets are: layouts, splits, queries, galleries and trials; paths and ids, no pixels.

As a script, check whether a download is complete:

    python data_manager.py --dataset sysu --data-path DIR

The layouts and protocols are those of docs/method.md, section 8.
"""

import argparse
import contextlib
import os
import random
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
import scipy.io

from utils import Parser, UserError, log, run_script

CAPTURED = ("visible", "infrared")  # by cameras; aux images are made of visible ones
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
BOTH_WAYS = {"visible-to-infrared": "visible", "infrared-to-visible": "infrared"}


@dataclass(frozen=True)
class Dataset:
    """The facts of a dataset that training and evaluation take as their defaults (docs/method.md)."""

    title: str
    height: int  # pixels
    width: int  # pixels
    num_pos: int  # P, images per identity and modality in a batch
    recipe: str  # whose augmentation: "sysu" or "regdb"
    decay_epochs: tuple[int, int]  # the rate falls tenfold after the first, and again from the second on
    trials: range
    query_modality: dict[str, str]  # mode -> the modality of its queries; the gallery is of the other
    index_folder: str  # holds the files that list the splits

    @property
    def modes(self) -> tuple[str, ...]:
        """The evaluation modes, the default first."""
        return tuple(self.query_modality)

    def gallery_modality(self, mode: str) -> str:
        """The modality of a mode's gallery."""
        return "infrared" if self.query_modality[mode] == "visible" else "visible"


_SYSU_MODES = {"all": "infrared", "indoor": "infrared"}
DATASETS = {
    "sysu": Dataset("SYSU-MM01", 384, 128, 4, "sysu", (20, 40), range(10), _SYSU_MODES, "exp"),
    "regdb": Dataset("RegDB", 288, 144, 5, "regdb", (30, 60), range(1, 11), BOTH_WAYS, "idx"),
    "llcm": Dataset("LLCM", 384, 144, 4, "sysu", (20, 40), range(10), BOTH_WAYS, "idx"),
}

# Images in folders camN/PID of these: modality -> camid -> folder. All of SYSU-MM01, LLCM's test split.
_CAMERA_FOLDERS = {
    "sysu": {
        "visible": {camid: f"cam{camid}" for camid in (1, 2, 4, 5)},
        "infrared": {camid: f"cam{camid}" for camid in (3, 6)},
    },
    "llcm": {
        "visible": {camid: f"test_vis/cam{camid}" for camid in range(1, 10)},
        "infrared": {camid: f"test_nir/cam{camid}" for camid in (1, 2, 4, 5, 6, 7, 8, 9)},
    },
}
_SYSU_GALLERY_CAMERAS = {"all": (1, 2, 4, 5), "indoor": (1, 2)}
# Images that index files list, with the files' words for a modality: RegDB, LLCM's training split.
_INDEX_WORDS = {
    "regdb": {"visible": "visible", "infrared": "thermal"},
    "llcm": {"visible": "vis", "infrared": "nir"},
}
_REGDB_CAMIDS = {"visible": 1, "infrared": 2}

# (splits, modality, camera) -> (identities, images); None where no number is published.
_PUBLISHED = {
    "sysu": {
        (("train",), "both", "all"): (296, None),
        (("val",), "both", "all"): (99, None),
        (("train", "val"), "visible", "all"): (395, 22258),
        (("train", "val"), "infrared", "all"): (395, 11909),
        (("test",), "visible", "1"): (None, 1374),
        (("test",), "visible", "2"): (None, 1565),
        (("test",), "infrared", "3"): (None, 1883),
        (("test",), "visible", "4"): (None, 1918),
        (("test",), "visible", "5"): (None, 1918),
        (("test",), "infrared", "6"): (None, 1920),
        (("test",), "infrared", "all"): (None, 3803),
        (("test",), "both", "all"): (96, None),
    },
    "regdb": {
        ((f"{split} {trial}",), modality, str(camid)): (206, 2060)
        for trial in DATASETS["regdb"].trials
        for split in ("train", "test")
        for modality, camid in _REGDB_CAMIDS.items()
    },
    "llcm": {
        (("train",), "both", "all"): (713, None),
        (("train", "test"), "both", "all"): (1064, 46767),
    },
}

Cells = dict[tuple[int, int], list[str]]  # (pid, camid) -> image paths in file-name order; none is empty


@dataclass(frozen=True, eq=False)
class Samples:
    """N images of one modality: where they are and who is in them."""

    paths: list[str]  # N
    pids: np.ndarray  # (N,) int64, as the dataset writes them
    camids: np.ndarray  # (N,) int64
    modality: str  # "visible" or "infrared"

    def __len__(self) -> int:
        return len(self.paths)


def dataset_root(name: str, data_path: str | os.PathLike | None = None) -> Path:
    """The folder of a dataset: data_path, or data/<name>; UserError if the dataset is not there."""
    dataset = DATASETS[_choose("--dataset", name, tuple(DATASETS))]
    root = Path(data_path or Path("data", name))
    if not (root / dataset.index_folder).is_dir():
        raise UserError(
            f"{root}: no {dataset.title} here: looked for the folder {root / dataset.index_folder} "
            "(--data-path says where the dataset is; `python demo.py` needs no dataset)"
        )
    return root


def train_samples(
    name: str, root: str | os.PathLike, trial: int | None = None, split: str = "trainval"
) -> dict[str, Samples]:
    """The training images: {"visible": Samples, "infrared": Samples}, of the same pids.

    split: "trainval", or, for SYSU-MM01, "train": the 296 ids alone. trial: RegDB's split, 1..10.
    SYSU-MM01 comes in the order id, camera, file name; RegDB and LLCM in that of their index files, with the
    labels written there as pids. An id of SYSU-MM01 with images in one modality only is left out with a
    warning. camids: RegDB 1 visible, 2 infrared; LLCM by the file name's _cNN_, else 0.
    UserError: a missing or malformed index file, an image that is not there, an id without images, an id of
    RegDB or LLCM in one modality only.
    """
    dataset = DATASETS[_choose("--dataset", name, tuple(DATASETS))]
    trial = _choose("--trial", trial, dataset.trials)
    _choose("split", split, ("trainval", "train") if name == "sysu" else ("trainval",))
    if name != "sysu":
        return _index_split(name, root, "train", trial)

    cells = _folder_split(name, root, split)
    pids = {modality: {pid for pid, _ in cells[modality]} for modality in CAPTURED}
    lonely = pids["visible"] ^ pids["infrared"]
    if lonely:
        log.warning("%s: left out of training, in one modality only: id %s", root, _names(lonely))
    return {
        modality: _samples(
            {key: paths for key, paths in part.items() if key[0] not in lonely}, modality, root
        )
        for modality, part in cells.items()
    }


def class_labels(samples: dict[str, Samples]) -> dict[str, np.ndarray]:
    """Labels 0..C-1 of training images, identities sorted by pid: {modality: (N,) int64}."""
    pids = np.unique(np.concatenate([part.pids for part in samples.values()]))
    return {modality: np.searchsorted(pids, part.pids).astype(np.int64) for modality, part in samples.items()}


def query_samples(
    name: str, root: str | os.PathLike, mode: str | None = None, trial: int | None = None, split: str = "test"
) -> Samples:
    """The query images of a mode (default: the first) in the order id, camera, file name.

    RegDB: those of the trial's index file, in its order. split: "test", or, for SYSU-MM01, "val".
    UserError: an unknown mode, trial or split, a missing or malformed index file, an image that is not there,
    an id without images.
    """
    dataset, mode, trial = _protocol(name, mode, trial, split)
    modality = dataset.query_modality[mode]
    if name == "regdb":
        return _index_samples(name, root, "test", modality, trial)
    return _samples(_folder_split(name, root, split)[modality], modality, root)


def gallery_samples(
    name: str,
    root: str | os.PathLike,
    mode: str | None = None,
    trial: int | None = None,
    shot: int = 1,
    galleries: str = "seeded",
    split: str = "test",
    allow_short: bool = False,
) -> Samples:
    """The gallery of a mode and trial (default: the first ones) in the order id, camera, then as drawn.

    SYSU-MM01: shot images of each (id, camera) of the mode: drawn by random.Random(trial) ("seeded"), or, for
    the test split, the first of the authors' exp/rand_perm_cam.mat ("published"). LLCM: one seeded image of
    each (id, camera). RegDB: every image of the trial's index file. allow_short takes what there is where an
    (id, camera) has fewer than shot images.
    UserError: as query_samples; too few images without allow_short; a rand_perm_cam.mat that is missing,
    unreadable, of another shape, or orders other images than those that are there.
    """
    dataset, mode, trial = _protocol(name, mode, trial, split)
    _choose("--galleries", galleries, ("seeded", "published") if name == "sysu" else ("seeded",))
    if shot < 1 or (shot > 1 and name != "sysu"):
        raise UserError(f"--shot {shot}: {dataset.title} has {'1 or more' if name == 'sysu' else 'only 1'}")
    modality = dataset.gallery_modality(mode)
    if name == "regdb":
        return _index_samples(name, root, "test", modality, trial)

    cells = _folder_split(name, root, split)[modality]
    if name == "sysu":
        cells = {key: paths for key, paths in cells.items() if key[1] in _SYSU_GALLERY_CAMERAS[mode]}
    if galleries == "published":
        if split != "test":
            raise UserError(f"--galleries published: published for the test ids, not for {split}")
        cells = _published_order(root, cells, mode, trial)
    short = [key for key, paths in cells.items() if len(paths) < shot and not allow_short]
    if short:
        those = ", ".join(f"id {pid} camera {camid} ({len(cells[pid, camid])})" for pid, camid in short)
        raise UserError(f"{root}: too few images for --shot {shot}, unless with --allow-short: {those}")
    rng = random.Random(trial)
    drawn = {  # a sample of one takes from the generator what choice, the protocol's word, takes
        key: paths[:shot] if galleries == "published" else rng.sample(paths, min(shot, len(paths)))
        for key, paths in cells.items()
    }
    return _samples(drawn, modality, root)


# --- names, ids and lines


def _choose(flag: str, value: object, valid: Sequence) -> object:
    """value, or the first of valid for None; UserError if it is none of them."""
    if value is None:
        return valid[0]
    if value not in valid:
        raise UserError(f"{flag} {value}: choose from {_names(valid)}")
    return value


def _protocol(name, mode, trial, split) -> tuple[Dataset, str, int]:
    dataset = DATASETS[_choose("--dataset", name, tuple(DATASETS))]
    _choose("split", split, ("test", "val") if name == "sysu" else ("test",))
    return dataset, _choose("--mode", mode, dataset.modes), _choose("--trial", trial, dataset.trials)


def _names(values: Iterable) -> str:
    return ", ".join(map(str, sorted(values) if isinstance(values, set) else values))


def _refuse(message: str, problems: list[str] | None) -> None:
    """Raise UserError; or, for the check, which reports everything at once, append to problems."""
    if problems is None:
        raise UserError(message)
    problems.append(message)


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None  # 18 digits fit int64


def _lines(path: Path) -> list[tuple[int, str]]:
    """(line number, line) of what a text file holds, without BOM, CR, trailing commas and blank lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; it lists a split of the dataset") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    lines = enumerate((line.strip().rstrip(",").rstrip() for line in text.split("\n")), start=1)
    return [(number, line) for number, line in lines if line]


def _split_pids(name: str, root: str | os.PathLike, split: str) -> list[int]:
    """The ids of a split, sorted, each once: comma-separated in <split>_id.txt."""
    pids = set()
    for part in ("train", "val") if split == "trainval" else (split,):
        path = Path(root, DATASETS[name].index_folder, f"{part}_id.txt")
        lines = _lines(path)
        if not lines:
            raise UserError(f"{path}: lists no ids")
        for number, line in lines:
            for word in filter(None, map(str.strip, line.split(","))):
                if (pid := _number(word)) is None:
                    raise UserError(f"{path}, line {number}: {word!r} is not an id")
                pids.add(pid)
    return sorted(pids)


# --- splits whose images are found in folders


def _image_paths(folder: str, problems: list[str] | None = None) -> list[str]:
    """The images of a folder in file-name order; none if it does not exist.

    Hidden files and other suffixes (Thumbs.db, .DS_Store) are passed over. What has an image's name and is no
    file is refused: leaving it out would silently change every gallery drawn after it.
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
                    _refuse(f"{entry.path}: named like an image, but a folder or a dangling link", problems)
    except FileNotFoundError:
        return []
    except OSError as error:
        _refuse(f"{folder}: cannot be listed: {error.strerror}", problems)
    return [os.path.join(folder, name) for name in sorted(names)]


def _folder_split(
    name: str, root: str | os.PathLike, split: str, problems: list[str] | None = None
) -> dict[str, Cells]:
    """{modality: cells} of a split of SYSU-MM01, or LLCM's test split, in the order id, camera, file name."""
    pids = _split_pids(name, root, split)
    cells = {}
    for modality, folders in _CAMERA_FOLDERS[name].items():
        found = {
            (pid, camid): _image_paths(os.path.join(root, folder, f"{pid:04d}"), problems)
            for pid in pids
            for camid, folder in folders.items()
        }
        cells[modality] = {key: paths for key, paths in found.items() if paths}
    empty = set(pids) - {pid for part in cells.values() for pid, _ in part}
    if empty:
        _refuse(f"{root}: no images of the {split} split's id {_names(empty)}", problems)
    return cells


def _samples(cells: Cells, modality: str, root: str | os.PathLike) -> Samples:
    keys = np.array([key for key, paths in cells.items() for _ in paths], dtype=np.int64).reshape(-1, 2)
    if not len(keys):
        raise UserError(f"{root}: the split has no {modality} images to take")
    return Samples([path for paths in cells.values() for path in paths], keys[:, 0], keys[:, 1], modality)


def _read_permutations(path: Path) -> list[np.ndarray]:
    """Each camera's cells of rand_perm_cam; cell [pid-1] holds (10 trials, images) 1-based positions."""
    if not path.is_file():
        raise UserError(
            f"{path}: missing; the authors of SYSU-MM01 publish it in their evaluation repository "
            "(wuancong/SYSU-MM01 on GitHub) under evaluation/data_split; --galleries seeded needs none"
        )
    try:
        cells = scipy.io.loadmat(path, variable_names=["rand_perm_cam"])["rand_perm_cam"]
    except Exception as error:  # a file from a stranger: scipy raises whatever its bytes lead to
        raise UserError(f"{path}: not a MATLAB file with a variable rand_perm_cam") from error
    if (
        cells.shape not in ((6, 1), (1, 6))
        or cells.dtype != object
        or any(c.dtype != object for c in cells.flat)
    ):
        raise UserError(f"{path}: rand_perm_cam is not a cell array (6, 1) of cell arrays, one cell per id")
    return [cell.ravel() for cell in cells.flat]


def _published_order(root: str | os.PathLike, cells: Cells, mode: str, trial: int) -> Cells:
    """The cells of a mode with their images in the published order of a trial."""
    path = Path(root, "exp", "rand_perm_cam.mat")
    cameras = _read_permutations(path)
    ordered = {}
    for pid in _split_pids("sysu", root, "test"):
        if pid == 0:
            raise UserError(
                f"{path}: cannot have a gallery of id 0, which test_id.txt lists: its ids start at 1"
            )
        for camid in _SYSU_GALLERY_CAMERAS[mode]:
            where = f"{path}: id {pid}, camera {camid}"
            images = cells.get((pid, camid), [])
            camera = cameras[camid - 1]
            positions = camera[pid - 1] if pid <= len(camera) else np.empty((10, 0))
            if positions.size == 0 and not images:
                continue
            if positions.ndim != 2 or len(positions) != 10 or positions.dtype.kind not in "uif":
                raise UserError(f"{where}: {positions.shape} is not the shape (10 trials, images)")
            row = positions[trial]
            if row.max(initial=0) > len(images):
                raise UserError(f"{where}: points to image {row.max():g}, there are {len(images)}")
            # The positions count the sorted files: one file too many shifts the others, unnoticed.
            if sorted(row) != list(range(1, len(images) + 1)):
                raise UserError(
                    f"{where}: trial {trial} does not order the {len(images)} images that are there"
                )
            ordered[pid, camid] = [images[int(position) - 1] for position in row]
    return ordered


# --- splits that index files list


def _index_samples(
    name: str,
    root: str | os.PathLike,
    split: str,
    modality: str,
    trial: int,
    problems: list[str] | None = None,
) -> Samples:
    """The images of an index file, in its order: lines of a relative path, white space and a label."""
    ending = f"_{trial}.txt" if name == "regdb" else ".txt"
    file = Path(root, DATASETS[name].index_folder, f"{split}_{_INDEX_WORDS[name][modality]}{ending}")
    labels, repeated = {}, []
    for number, line in _lines(file):
        where = f"{file}, line {number}"
        path, *label = line.rsplit(None, 1)  # the path itself may hold spaces
        parts = PureWindowsPath(path)  # knows both kinds of slash, and drives
        path = os.path.normpath(path)
        if not label:
            _refuse(f"{where}: {line!r} has no label", problems)
        elif (pid := _number(label[0])) is None:
            _refuse(f"{where}: the label {label[0]!r} is not a number", problems)
        elif parts.anchor or ".." in parts.parts:
            _refuse(f"{where}: {path!r} would be read from outside the dataset", problems)
        elif "\0" in path or not os.path.isfile(os.path.join(root, path)):
            _refuse(f"{where}: there is no image file {path!r} in {root}", problems)
        elif path not in labels:
            labels[path] = pid
        elif labels[path] == pid:
            repeated.append(number)
        else:
            _refuse(f"{where}: {path!r} has label {pid} here and {labels[path]} above", problems)
    if repeated:
        log.warning("%s: the same image again, dropped: line %s", file, _names(repeated))
    if not labels:
        _refuse(f"{file}: lists no images", problems)
    if name == "regdb":
        camids = [_REGDB_CAMIDS[modality]] * len(labels)
    else:
        matches = [re.search(r"_c([0-9]{1,9})_", os.path.basename(path)) for path in labels]
        camids = [int(match[1]) if match else 0 for match in matches]
    return Samples(
        [os.path.join(root, path) for path in labels],
        np.array(list(labels.values()), dtype=np.int64),
        np.array(camids, dtype=np.int64),
        modality,
    )


def _index_split(
    name: str, root: str | os.PathLike, split: str, trial: int, problems: list[str] | None = None
) -> dict[str, Samples]:
    """{modality: Samples} of a split of RegDB, or LLCM's training split; both must have the same pids."""
    samples = {
        modality: _index_samples(name, root, split, modality, trial, problems) for modality in CAPTURED
    }
    lonely = set(samples["visible"].pids.tolist()) ^ set(samples["infrared"].pids.tolist())
    if lonely:
        of_trial = f" {trial}" if name == "regdb" else ""
        _refuse(f"{root}: {split} split{of_trial}, in one modality only: id {_names(lonely)}", problems)
    return samples


# --- is a download complete?


def check(name: str, root: str | os.PathLike) -> tuple[list[str], bool]:
    """Compare a dataset with what is published and decode every image: (lines to print, complete).

    Complete means that every published count matches and that no problem was found: an id without images, an
    id in two splits, a wrong index line, an image that cannot be decoded. Ids in no split are only noted.
    UserError: an unknown dataset.
    """
    title = DATASETS[_choose("--dataset", name, tuple(DATASETS))].title
    problems, notes = [], []
    splits = _all_splits(name, root, problems, notes)
    paths = [path for parts in splits.values() for part in parts.values() for path in part.paths]
    problems += _unreadable(paths)
    rows = _count_rows(splits, _PUBLISHED[name])
    wrong = sum(row[-1] == "differs" for row in rows)

    table = [("split", "modality", "camera", "ids", "published", "images", "published", ""), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [f"{title} in {root}", ""]
    for row in table:
        texts = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        texts[:2] = [text.ljust(width) for text, width in zip(row[:2], widths[:2], strict=True)]
        lines.append("  ".join(texts).rstrip())
    lines += ["", *(f"problem: {problem}" for problem in problems), *(f"note: {note}" for note in notes)]
    complete = not wrong and not problems
    lines.append(
        "complete" if complete else f"not complete: counts that differ {wrong}, problems {len(problems)}"
    )
    return lines, complete


@contextlib.contextmanager
def _collecting(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        problems.append(str(error))


def _all_splits(
    name: str, root: str | os.PathLike, problems: list[str], notes: list[str]
) -> dict[str, dict[str, Samples]]:
    """{split: {modality: Samples}} of every split that can be read; RegDB's are "train 1", "test 1", …"""
    splits = {}
    if name == "regdb":
        for trial in DATASETS[name].trials:
            for split in ("train", "test"):
                with _collecting(problems):
                    splits[f"{split} {trial}"] = _index_split(name, root, split, trial, problems)
        return splits
    if name == "llcm":
        with _collecting(problems):
            splits["train"] = _index_split(name, root, "train", 0, problems)
    known = set()
    for split in ("train", "val", "test") if name == "sysu" else ("test",):
        with _collecting(problems):
            pids = set(_split_pids(name, root, split))
            if known & pids:
                problems.append(f"{root}: in {split}_id.txt and in another split: id {_names(known & pids)}")
            known |= pids
            cells = _folder_split(name, root, split, problems)
            splits[split] = {
                modality: _samples(part, modality, root) for modality, part in cells.items() if part
            }
    folders = {
        folder
        for cameras in _CAMERA_FOLDERS[name].values()
        for camera in cameras.values()
        for folder in Path(root, camera).glob("[0-9]*")
    }
    named = [(_number(folder.name), folder) for folder in folders]
    extra = {pid for pid, folder in named if pid is not None and _image_paths(str(folder), [])}
    if extra - known:
        notes.append(f"{root}: not used, in no split: id {_names(extra - known)}")
    return splits


def _count_rows(splits: dict[str, dict[str, Samples]], published: dict) -> list[tuple[str, ...]]:
    """The table's rows: one for each split, modality and camera, and one for each published count."""
    counts = {key: (set(), []) for key in published}  # (splits, modality, camera) -> {(split, pid)}, [images]
    groups = list(dict.fromkeys([*((split,) for split in splits), *(key[0] for key in published)]))
    for group, split in [(together, split) for together in groups for split in together]:
        for modality, part in splits.get(split, {}).items():
            for camid in np.unique(part.camids):
                pids = part.pids[part.camids == camid].tolist()
                camera = (group, modality, str(camid))
                if len(group) == 1:
                    counts.setdefault(camera, (set(), []))
                for key in (camera, (group, modality, "all"), (group, "both", "all")):
                    if key in counts:
                        counts[key][0].update((split, pid) for pid in pids)
                        counts[key][1].append(len(pids))
    rows = []
    for key in sorted(
        counts, key=lambda key: (groups.index(key[0]), (*CAPTURED, "both").index(key[1]), key[2])
    ):
        found = len(counts[key][0]), sum(counts[key][1])
        expected = published.get(key, (None, None))
        differs = any(want not in (None, have) for have, want in zip(found, expected, strict=True))
        numbers = ("-" if n is None else f"{n:,}" for pair in zip(found, expected, strict=True) for n in pair)
        rows.append(("+".join(key[0]), *key[1:], *numbers, "differs" if differs else ""))
    return rows


def _unreadable(paths: Iterable[str]) -> list[str]:
    """One line for each image, of those named, that cannot be decoded."""
    from PIL import Image, UnidentifiedImageError  # only the check needs pixels
    from tqdm import tqdm

    def trouble(path: str) -> str | None:
        try:
            with Image.open(path) as image:
                image.load()
        except UnidentifiedImageError:
            return f"{path}: not an image"
        except Exception as error:  # a file from a stranger: Pillow raises whatever its bytes lead to
            return f"{path}: cannot be decoded: {error}"
        return None

    paths = list(dict.fromkeys(paths))
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        found = list(tqdm(pool.map(trouble, paths), "decoding", len(paths), unit="image", disable=None))
    return [line for line in found if line]


def get_args_parser() -> Parser:
    """The command line of the check."""
    parser = Parser(description="Check whether a dataset is complete; exit status 0 if it is, 1 if not.")
    parser.add_argument("--dataset", required=True, choices=DATASETS, help="which dataset")
    parser.add_argument("--data-path", metavar="DIR", help="the dataset's folder (data/<dataset>)")
    return parser


def main(args: argparse.Namespace) -> int:
    """Print the check; 0 if the dataset is complete, 1 if not."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold what a terminal cannot show
    lines, complete = check(args.dataset, dataset_root(args.dataset, args.data_path))
    print("\n".join(lines))
    return 0 if complete else 1


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args)
