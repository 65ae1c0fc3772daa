"""The datasets: splits, queries, galleries and trials. Paths and ids only, no pixels.

docs/method.md, section 8, defines layouts and protocols; readers/ has a file for each dataset.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from readers import llcm, own, regdb, sysu
from readers.lists import listed, warn_once
from readers.samples import BOTH_WAYS, CAPTURED, Dataset, Samples
from utils import UserError

__all__ = ["BOTH_WAYS", "CAPTURED", "DATASETS", "Dataset", "Samples"]  # beside the functions below

DATASETS = {"sysu": sysu.DATASET, "regdb": regdb.DATASET, "llcm": llcm.DATASET, "folder": own.DATASET}


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
    whose labels are the pids. Own images are sorted by pid and path. Ids of SYSU-MM01 and of own
    images that are in only one modality are left out with a warning. camids: RegDB 1 visible, 2 infrared;
    LLCM and own images the NN of _cNN_ in the file name, else 0.

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
    _choose("split", split, ("trainval", "train") if "val" in dataset.splits else ("trainval",))
    dataset.refuse_shared(root, trial, "test")
    return dataset.train(root, trial, split)


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
    dataset.refuse_shared(root, trial, split)
    return dataset.test(root, dataset.query_modality[mode], trial, split)


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
    _choose("--galleries", galleries, dataset.galleries)
    if shot < 1 or (shot > 1 and not dataset.multi_shot):
        raise UserError(
            f"--shot {shot}: {dataset.title} has {'1 or more' if dataset.multi_shot else 'only 1'}"
        )
    return dataset.gallery(root, mode, trial, shot, galleries, split, allow_short)


def read_split(
    name: str,
    root: str | os.PathLike,
    split: str,
    trial: int | None = None,
    problems: list[str] | None = None,
) -> dict[str, Samples]:
    """Every image of a split, {modality: Samples}, without modalities that have no images.

    problems: a list that collects problems, instead of raising UserError. Else as train_samples.
    """
    dataset = DATASETS[name]
    return dataset.read(root, _choose("split", split, dataset.splits), trial, problems)


def refuse_shared(
    name: str, root: str | os.PathLike, trial: int | None = None, split: str = "test", copies: bool = True
) -> None:
    """Refuse a test split that shares images or identities with what is trained on.

    It compares the files that list the splits, if they exist, and then the images' bytes: a copy under
    another name is refused among own images, and warned of in a published dataset, which nobody can change.

    Args:
        name: a key of DATASETS.
        root: the dataset's folder.
        trial: RegDB's split, 1..10; None: the first.
        split: "test", or, for SYSU-MM01, "val" (compared with the train ids).
        copies: compare the bytes in a published dataset too, which reads all of its images.

    Raises:
        UserError: with the file and what it shares.
    """
    dataset = DATASETS[name]
    trial = _choose("--trial", trial, dataset.trials)
    dataset.refuse_shared(root, trial, split)
    own = name == "folder"
    if (copies or own) and (found := dataset.copies(root, trial, split)):
        if own:
            raise UserError(found)
        warn_once(found)


def _choose(flag: str, value: object, valid: Sequence) -> object:
    """value, or the first valid one if it is None; UserError if it is not valid."""
    if value is None:
        return valid[0]
    if value not in valid:
        raise UserError(f"{flag} {value}: choose from {listed(valid)}")
    return value


def _protocol(name, mode, trial, split) -> tuple[Dataset, str, int]:
    dataset = DATASETS[_choose("--dataset", name, tuple(DATASETS))]
    _choose("split", split, ("test", "val") if "val" in dataset.splits else ("test",))
    return dataset, _choose("--mode", mode, dataset.modes), _choose("--trial", trial, dataset.trials)
