"""The datasets: layouts, splits, queries, galleries and trials. Paths and ids only, no pixels.

docs/method.md, section 8, defines layouts and protocols; readers/own_data.py reads own images.
"""

import functools
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from readers import own_data
from readers.lists import (
    Cells,
    image_paths,
    index_labels,
    listed,
    number,
    published_order,
    read_ids,
    read_index,
    refuse,
)
from utils import UserError, log

CAPTURED = ("visible", "infrared")  # by cameras; aux images are made from visible ones
BOTH_WAYS = {"visible-to-infrared": "visible", "infrared-to-visible": "infrared"}


@dataclass(frozen=True)
class Dataset:
    """The facts of a dataset; training and evaluation use them as defaults (docs/method.md)."""

    title: str
    height: int  # pixels
    width: int  # pixels
    num_pos: int  # P, images per identity and modality in a batch
    recipe: str  # of augmentation: "sysu" or "regdb"
    decay_epochs: tuple[int, int]  # the rate falls tenfold after the first and again at the second
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


DATASETS = {
    "sysu": Dataset(
        "SYSU-MM01", 384, 128, 4, "sysu", (20, 40), range(10),
        {"all": "infrared", "indoor": "infrared"}, "exp",
    ),
    "regdb": Dataset(
        "RegDB", 288, 144, 5, "regdb", (30, 60), range(1, 11), BOTH_WAYS, "idx",
    ),
    "llcm": Dataset(
        "LLCM", 384, 144, 4, "sysu", (20, 40), range(10), BOTH_WAYS, "idx",
    ),
    # RegDB's protocol, preprocessing, recipe, size and schedule: they were chosen together.
    "folder": Dataset("own images", 288, 144, 5, "regdb", (30, 60), range(1), BOTH_WAYS, ""),
}  # fmt: skip

# modality -> camid -> folder with images in camN/PID: all of SYSU-MM01, and LLCM's test split.
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
# modality -> its name in index files, which list the images of RegDB and of LLCM's training split.
_INDEX_WORDS = {
    "regdb": {"visible": "visible", "infrared": "thermal"},
    "llcm": {"visible": "vis", "infrared": "nir"},
}
_REGDB_CAMIDS = {"visible": 1, "infrared": 2}


@dataclass(frozen=True, eq=False)
class Samples:
    """N images of one modality, with their identities and cameras."""

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
            f"{root}: {dataset.title} not found: there is no folder {root / dataset.index_folder} "
            "(set --data-path; `python demo.py` needs no dataset)"
        )
    return root


def train_samples(
    name: str, root: str | os.PathLike, trial: int | None = None, split: str = "trainval"
) -> dict[str, Samples]:
    """The training images {"visible": Samples, "infrared": Samples}. Both have the same pids.

    SYSU-MM01's are sorted by id, camera and file name. RegDB's and LLCM's have the order of the index files,
    whose labels are the pids. Own images are as own_data.read_split returns them. Ids of SYSU-MM01 and of own
    images that are in only one modality are left out with a warning. camids: RegDB 1 visible, 2 infrared;
    LLCM the NN of _cNN_ in the file name, else 0.

    Args:
        name: a key of DATASETS.
        root: the dataset's folder.
        trial: RegDB's split, 1..10; None: the first.
        split: "trainval", or, for SYSU-MM01, "train" (the 296 train ids without the val ids).

    Raises:
        UserError: a missing or malformed index file, a missing image file, an id without images, an id of
            RegDB or LLCM in only one modality, or images or ids that are also in the test split.
    """
    dataset = DATASETS[_choose("--dataset", name, tuple(DATASETS))]
    trial = _choose("--trial", trial, dataset.trials)
    _choose("split", split, ("trainval", "train") if name == "sysu" else ("trainval",))
    refuse_shared(name, root, trial)
    if name != "sysu":
        return read_split(name, root, "train", trial)

    cells = _folder_split(name, root, split)
    pids = {modality: {pid for pid, _ in cells[modality]} for modality in cells}
    unpaired = pids["visible"] ^ pids["infrared"]
    if unpaired and all(pids.values()):  # _samples refuses a modality without any image
        log.warning("%s: left out of training, because in only one modality: id %s", root, listed(unpaired))
        cells = {
            modality: {key: paths for key, paths in cells[modality].items() if key[0] not in unpaired}
            for modality in cells
        }
    return {modality: _samples(cells[modality], modality, root, split) for modality in cells}


def class_labels(samples: dict[str, Samples]) -> dict[str, np.ndarray]:
    """Labels 0..C-1 of training images, identities sorted by pid: {modality: (N,) int64}."""
    pids = np.unique(np.concatenate([images.pids for images in samples.values()]))
    return {m: np.searchsorted(pids, images.pids).astype(np.int64) for m, images in samples.items()}


def query_samples(
    name: str, root: str | os.PathLike, mode: str | None = None, trial: int | None = None, split: str = "test"
) -> Samples:
    """The query images, sorted by id, camera and file name; RegDB's in the order of the index file.

    Args:
        name: a key of DATASETS.
        root: the dataset's folder.
        mode: one of the dataset's modes; None: the first.
        trial: RegDB's split, 1..10; None: the first.
        split: "test", or, for SYSU-MM01, "val".

    Raises:
        UserError: an unknown mode, trial or split, a missing or malformed index file, a missing image file,
            an id without images, or images or ids that are also in the training split.
    """
    dataset, mode, trial = _protocol(name, mode, trial, split)
    modality = dataset.query_modality[mode]
    refuse_shared(name, root, trial, split)
    if name == "regdb":
        return _index_samples(name, root, "test", modality, trial)
    if name == "folder":
        return _own_samples(root, "test")[modality]
    return _samples(_folder_split(name, root, split)[modality], modality, root, split)


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
    """The gallery of a mode and trial, sorted by id and camera, then as drawn.

    SYSU-MM01: shot images per (id, camera) of the mode. LLCM: one image per (id, camera), drawn. RegDB: every
    image of the trial's index file. Own images: every test image.

    Args:
        name: a key of DATASETS.
        root: the dataset's folder.
        mode, trial: of the dataset; None: the first one.
        shot: images per (id, camera); only SYSU-MM01 has more than 1.
        galleries: "seeded": drawn by random.Random(trial); "published", for SYSU-MM01's test split: the first
            images in the authors' exp/rand_perm_cam.mat.
        split: "test", or, for SYSU-MM01, "val".
        allow_short: take all images where an (id, camera) has fewer than shot.

    Raises:
        UserError: see query_samples; or too few images without allow_short; or a rand_perm_cam.mat that is
            missing, malformed or made for other images.
    """
    dataset, mode, trial = _protocol(name, mode, trial, split)
    _choose("--galleries", galleries, ("seeded", "published") if name == "sysu" else ("seeded",))
    if shot < 1 or (shot > 1 and name != "sysu"):
        raise UserError(f"--shot {shot}: {dataset.title} has {'1 or more' if name == 'sysu' else 'only 1'}")
    modality = dataset.gallery_modality(mode)
    if name == "regdb":
        return _index_samples(name, root, "test", modality, trial)
    if name == "folder":
        return _own_samples(root, "test")[modality]

    cells = _folder_split(name, root, split)[modality]
    if name == "sysu":
        cells = {key: paths for key, paths in cells.items() if key[1] in _SYSU_GALLERY_CAMERAS[mode]}
    if galleries == "published":
        if split != "test":
            raise UserError(f"--galleries published: only the test ids have published galleries, not {split}")
        cells = published_order(root, cells, _SYSU_GALLERY_CAMERAS[mode], trial)
    short = [key for key, paths in cells.items() if len(paths) < shot and not allow_short]
    if short:
        counts = ", ".join(f"id {pid} camera {camid} ({len(cells[pid, camid])})" for pid, camid in short)
        raise UserError(f"{root}: too few images for --shot {shot} (--allow-short accepts them): {counts}")
    rng = random.Random(trial)
    drawn = {  # with one image, sample() draws the same as the protocol's choice()
        key: paths[:shot] if galleries == "published" else rng.sample(paths, min(shot, len(paths)))
        for key, paths in cells.items()
    }
    return _samples(drawn, modality, root, split)


# --- names


def _choose(flag: str, value: object, valid: Sequence) -> object:
    """value, or the first valid one if it is None; UserError if it is not valid."""
    if value is None:
        return valid[0]
    if value not in valid:
        raise UserError(f"{flag} {value}: choose from {listed(valid)}")
    return value


def _protocol(name, mode, trial, split) -> tuple[Dataset, str, int]:
    dataset = DATASETS[_choose("--dataset", name, tuple(DATASETS))]
    _choose("split", split, ("test", "val") if name == "sysu" else ("test",))
    return dataset, _choose("--mode", mode, dataset.modes), _choose("--trial", trial, dataset.trials)


# --- splits whose images are found in folders


def _id_files(name: str, root: str | os.PathLike, split: str) -> list[Path]:
    """The files that list the ids of a split of SYSU-MM01, or of LLCM's test split."""
    prefixes = ("train", "val") if split == "trainval" else (split,)
    return [Path(root, DATASETS[name].index_folder, f"{prefix}_id.txt") for prefix in prefixes]


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _folder_split(
    name: str, root: str | os.PathLike, split: str, problems: list[str] | None = None
) -> dict[str, Cells]:
    """{modality: cells} of a split of SYSU-MM01 or of LLCM's test split, sorted by id, camera, file name."""
    pids = sorted({pid for file in _id_files(name, root, split) for pid in read_ids(file)})
    if others := unknown_cameras(name, root):
        _warn_once(f"{root}: not read, because {DATASETS[name].title} has no such camera: {listed(others)}")
    cells = {}
    for modality, folders in _CAMERA_FOLDERS[name].items():
        images = {
            (pid, camid): image_paths(os.path.join(root, folder, f"{pid:04d}"), problems)
            for pid in pids
            for camid, folder in folders.items()
        }
        cells[modality] = {key: paths for key, paths in images.items() if paths}
    empty = set(pids) - {pid for keys in cells.values() for pid, _ in keys}
    if empty:
        refuse(f"{root}: no images of the {split} split's id {listed(empty)}", problems)
    return cells


def _samples(cells: Cells, modality: str, root: str | os.PathLike, split: str) -> Samples:
    keys = np.array([key for key, paths in cells.items() for _ in paths], dtype=np.int64).reshape(-1, 2)
    if not len(keys):
        raise UserError(f"{root}: the {split} split has no {modality} images")
    return Samples([path for paths in cells.values() for path in paths], keys[:, 0], keys[:, 1], modality)


# --- splits that index files list


def _index_file(name: str, root: str | os.PathLike, split: str, modality: str, trial: int) -> Path:
    ending = f"_{trial}.txt" if name == "regdb" else ".txt"
    return Path(root, DATASETS[name].index_folder, f"{split}_{_INDEX_WORDS[name][modality]}{ending}")


def _index_samples(
    name: str,
    root: str | os.PathLike,
    split: str,
    modality: str,
    trial: int,
    problems: list[str] | None = None,
) -> Samples:
    """The images of an index file, in its order; each line is a relative path, white space and a label."""
    labels = index_labels(_index_file(name, root, split, modality, trial), root, problems)
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
    unpaired = set(samples["visible"].pids.tolist()) ^ set(samples["infrared"].pids.tolist())
    if unpaired:
        of_trial = f" {trial}" if name == "regdb" else ""
        refuse(f"{root}: {split} split{of_trial}, in only one modality: id {listed(unpaired)}", problems)
    return samples


def _own_samples(root: str | os.PathLike, split: str) -> dict[str, Samples]:
    return {
        modality: Samples(paths, np.array(pids, dtype=np.int64), np.array(camids, dtype=np.int64), modality)
        for modality, (paths, pids, camids) in own_data.read_split(root, split).items()
    }


# --- what else a split can have wrong


def read_split(
    name: str,
    root: str | os.PathLike,
    split: str,
    trial: int | None = None,
    problems: list[str] | None = None,
) -> dict[str, Samples]:
    """Every image of a split, {modality: Samples}, without modalities that have no images.

    Args:
        name: a key of DATASETS.
        root: the dataset's folder.
        split: "train" or "test", or, for SYSU-MM01, "val".
        trial: RegDB's split, 1..10.
        problems: a list that collects problems, instead of raising UserError.

    Raises:
        UserError: see train_samples and query_samples.
    """
    if name == "folder":
        return _own_samples(root, split)
    if name == "regdb" or (name, split) == ("llcm", "train"):
        return _index_split(name, root, split, trial, problems)
    cells = _folder_split(name, root, split, problems)
    return {m: _samples(cells[m], m, root, split) for m in cells if cells[m]}


def unknown_cameras(name: str, root: str | os.PathLike) -> list[str]:
    """Folders below root that are named like a camera, such as cam7, but are not part of the layout."""
    known = {folder for cameras in _CAMERA_FOLDERS.get(name, {}).values() for folder in cameras.values()}
    parents = {os.path.dirname(folder) for folder in known}
    existing = {
        os.path.join(parent, folder.name)
        for parent in parents
        for folder in Path(root, parent).glob("cam[0-9]*")
        if folder.is_dir() and any(folder.iterdir())
    }
    return sorted(existing - known)


def refuse_shared(name: str, root: str | os.PathLike, trial: int | None = None, split: str = "test") -> None:
    """Raise UserError if test and training split share images or identities.

    It compares the files that list the splits, if they exist. RegDB's labels start at 0 in each file, so its
    identities are the folders, unless a folder has several labels. An LLCM training image's id is the number
    of its folder. Own images are compared whenever they are read.

    Args:
        name: a key of DATASETS.
        root: the dataset's folder.
        trial: RegDB's split, 1..10; None: the first.
        split: "test", or, for SYSU-MM01, "val" (compared with the train ids).
    """
    if name == "folder":
        return
    if name == "regdb":
        trial = _choose("--trial", trial, DATASETS[name].trials)
        for modality in CAPTURED:
            files = [_index_file(name, root, kind, modality, trial) for kind in ("train", "test")]
            if all(file.is_file() for file in files):
                trained, tested = ({path: label for _, path, label in read_index(file)} for file in files)
                _refuse_both(*files, "image", trained.keys() & tested.keys())
                _refuse_both(*files, "folder", _identity_folders(trained) & _identity_folders(tested))
        return
    (tests,) = _id_files(name, root, split)
    tested = set(read_ids(tests)) if tests.is_file() else set()
    if name == "sysu":
        for file in _id_files(name, root, "trainval" if split == "test" else "train"):
            if file.is_file():
                _refuse_both(file, tests, "id", tested & set(read_ids(file)))
        return
    for modality in CAPTURED:
        file = _index_file(name, root, "train", modality, 0)
        paths = [path for _, path, _ in read_index(file)] if file.is_file() else []
        trained = {number(os.path.basename(os.path.dirname(path))) for path in paths}
        _refuse_both(file, tests, "id", tested & trained)


def _refuse_both(trained: Path, tested: Path, kind: str, shared: set) -> None:
    if shared:
        raise UserError(
            f"{tested}: also in {trained.name}, so trained on and tested on: {kind} {listed(shared, 10)}"
        )


def _identity_folders(labels: dict[str, str]) -> set[str]:
    """The folders of {path: label}; none if a folder has several labels, so is not a single identity."""
    pairs = {(os.path.dirname(path), label) for path, label in labels.items()}
    folders = {folder for folder, _ in pairs}
    return folders if len(folders) == len(pairs) else set()
