"""Own images as a dataset: the identity and split of each image, from folders or from a CSV file.

DIR/visible/<pid>/… and DIR/infrared/<pid>/…    the split is drawn once, by draw_split
DIR/train/visible/<pid>/…, DIR/test/infrared/<pid>/…    and so on: the split by folders
DIR/images.csv    the columns path, pid and modality; camid and split if they are known

docs/own-data.md is a guide from a folder of images to a table of results.
"""

import csv
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from readers.lists import image_paths, listed, number, path_problem, read_text
from utils import UserError, log, whole_file

CSV_FILE = "images.csv"
SPLIT_FILE = "test_identities.txt"  # the test pids, one per line; the others are for training
MODALITIES = ("visible", "infrared")
SPLITS = ("train", "test")
REQUIRED, OPTIONAL = ("path", "pid", "modality"), ("camid", "split")


class OwnImage(NamedTuple):
    """One image; pid, camid and split as the folder or the CSV file has them, "" if unknown."""

    path: str
    pid: str
    camid: str
    modality: str
    split: str


def read_split(root: str | os.PathLike, split: str) -> dict[str, tuple[list[str], list[int], list[int]]]:
    """{modality: (paths, pids, camids)} of the images of a split, sorted by pid and path.

    Pids and camids that are words become numbers, in sorted order; an unknown camid is 0. An identity in only
    one modality is left out of training, with a warning.

    Args:
        root: the folder of the images.
        split: "train" or "test".

    Raises:
        UserError: a modality or split without images, an image or identity in both splits, no identity in
            both modalities, a malformed line in a file, or no split.
    """
    images = with_splits(root, read_images(root))
    shared = set.intersection(*({image.pid for image in images if image.split == name} for name in SPLITS))
    if shared:
        raise UserError(f"{root}: in both the train and the test split: pid {listed(shared, 10)}")
    parts = {
        modality: [image for image in images if (image.modality, image.split) == (modality, split)]
        for modality in MODALITIES
    }
    pids = [{image.pid for image in part} for part in parts.values()]
    if not all(pids):
        modality = MODALITIES[0 if not pids[0] else 1]
        raise UserError(f"{root}: the {split} split has no {modality} images")
    both = pids[0] & pids[1]
    if not both:
        raise UserError(f"{root}: no identity of the {split} split has images of both modalities")
    if split == "train" and (lonely := pids[0] ^ pids[1]):
        log.warning("%s: left out of training, because in only one modality: pid %s", root, listed(lonely))
        parts = {modality: [image for image in part if image.pid in both] for modality, part in parts.items()}
    pid_of, camid_of = numbers(image.pid for image in images), numbers({i.camid for i in images} - {""}, 1)
    columns = {}
    for modality, part in parts.items():
        rows = sorted((pid_of[image.pid], image.path, camid_of.get(image.camid, 0)) for image in part)
        columns[modality] = (
            [path for _, path, _ in rows],
            [pid for pid, *_ in rows],
            [row[2] for row in rows],
        )
    return columns


def numbers(words: Iterable[str], first: int = 0) -> dict[str, int]:
    """{word: number}. Words that are distinct numbers, at least `first`, keep them.

    Otherwise the sorted words are numbered from `first`.
    """
    words = sorted(set(words))
    values = [number(word) for word in words]
    if None not in values and len(set(values)) == len(values) and min(values, default=first) >= first:
        return dict(zip(words, values, strict=True))
    return {word: place for place, word in enumerate(words, start=first)}


def read_images(root: str | os.PathLike) -> list[OwnImage]:
    """All images of the dataset in the folder root; UserError if it has none of the three layouts."""
    root = Path(root)
    split_folders = [split for split in SPLITS if (root / split).is_dir()]
    folders = [modality for modality in MODALITIES if (root / modality).is_dir()]
    if (root / CSV_FILE).exists():
        images = _csv_images(root)
    elif split_folders and folders:
        raise UserError(f"{root}: has both {split_folders[0]} and {folders[0]}: remove one of them")
    elif split_folders:
        images = [image for split in SPLITS for image in _folder_images(root / split, split)]
    elif folders:
        images = _folder_images(root, "")
    else:
        raise UserError(
            f"{root}: no images found: neither {CSV_FILE} nor the folders visible and infrared exist"
        )
    for modality in MODALITIES:
        if all(image.modality != modality for image in images):
            raise UserError(f"{root}: no {modality} images; both modalities are needed")
    return images


def _folder_images(folder: Path, split: str) -> list[OwnImage]:
    """The images in <modality>/<pid>/, at any depth."""
    images = []
    for modality in MODALITIES:
        if stray := image_paths(folder / modality):
            raise UserError(f"{stray[0]}: not in an identity's folder: move it to {folder / modality}/<pid>")
        for inner, below, _ in os.walk(folder / modality, followlinks=True):
            below[:] = sorted(name for name in below if not name.startswith("."))
            if paths := image_paths(inner):
                pid = Path(inner).relative_to(folder / modality).parts[0]
                images += [OwnImage(path, pid, "", modality, split) for path in paths]
    return images


def _csv_images(root: Path) -> list[OwnImage]:
    file = root / CSV_FILE
    lines = read_text(file).splitlines()
    try:
        header, *rows = csv.reader(lines, strict=True, skipinitialspace=True) if lines else [[]]
    except csv.Error as error:
        raise UserError(f"{file}: not a CSV file: {error}") from error
    header = [word.strip().lower() for word in header]
    if missing := [column for column in REQUIRED if column not in header]:
        raise UserError(
            f"{file}: its first line has no column {listed(missing)}: path,pid,camid,modality,split"
        )
    if unknown := [column for column in header if column not in (*REQUIRED, *OPTIONAL)]:
        raise UserError(
            f"{file}: unknown column {listed(unknown)}: only path,pid,camid,modality,split are known"
        )
    if len(set(header)) < len(header):
        raise UserError(f"{file}: a column appears twice: {listed(header)}")
    images: dict[str, OwnImage] = {}
    for count, row in enumerate(rows, start=2):
        if not "".join(row).strip():
            continue
        where = f"{file}, line {count}"
        if len(row) != len(header):
            raise UserError(f"{where}: {len(row)} values, not {len(header)}")
        values = dict(zip(header, (word.strip() for word in row), strict=True))
        path = os.path.normpath(values["path"])
        if problem := path_problem(root, path):
            raise UserError(f"{where}: {problem}")
        if not values["pid"]:
            raise UserError(f"{where}: no pid")
        if values["modality"] not in MODALITIES:
            raise UserError(f"{where}: the modality {values['modality']!r} is neither visible nor infrared")
        if "split" in values and values["split"] not in SPLITS:
            raise UserError(f"{where}: the split {values['split']!r} is neither train nor test")
        image = OwnImage(
            str(root / path),
            values["pid"],
            values.get("camid", ""),
            values["modality"],
            values.get("split", ""),
        )
        if images.setdefault(path, image) != image:
            raise UserError(f"{where}: {path!r} has different values on an earlier line")
    if not images:
        raise UserError(f"{file}: lists no images")
    return list(images.values())


def with_splits(root: str | os.PathLike, images: list[OwnImage]) -> list[OwnImage]:
    """The images with their splits; SPLIT_FILE gives them if folders or CSV file do not."""
    if images[0].split:
        return images
    file = Path(root, SPLIT_FILE)
    if not file.exists():
        raise UserError(
            f"{root}: not split yet: --test-identities N of train.py or tools.check draws the split"
        )
    tested = _read_split_file(file)
    if unknown := tested - {image.pid for image in images}:
        raise UserError(f"{file}: lists identities without images: {listed(unknown)}")
    return [image._replace(split="test" if image.pid in tested else "train") for image in images]


def _read_split_file(file: Path) -> set[str]:
    lines = {line.strip() for line in read_text(file).splitlines() if not line.startswith("# ")} - {""}
    if not lines:
        raise UserError(f"{file}: lists no identities")
    return lines


def draw_split(root: str | os.PathLike, test_identities: int, seed: int) -> None:
    """Draw the test identities and write them to SPLIT_FILE in root, unless it exists.

    Args:
        root: the folder of the images.
        test_identities: how many to draw, of the identities with images of both modalities.
        seed: of the draw.

    Raises:
        UserError: fewer than two identities would be left for training, SPLIT_FILE has another number of
            identities, the images have a split already, or the folder cannot be written.
    """
    flag, file = f"--test-identities {test_identities}", Path(root, SPLIT_FILE)
    images = read_images(root)
    if images[0].split:
        raise UserError(f"{flag}: the images in {root} are already split")
    if file.exists():
        if (drawn := len(_read_split_file(file))) != test_identities:
            raise UserError(f"{flag}: {file} lists {drawn}; remove it to draw again")
        return
    pids = [{image.pid for image in images if image.modality == modality} for modality in MODALITIES]
    both = sorted(pids[0] & pids[1])
    if test_identities > len(both) - 2:
        raise UserError(
            f"{flag}: {len(both)} identities have both modalities, and at least 2 must stay for training"
        )
    drawn = sorted(random.Random(seed).sample(both, test_identities))
    head = (
        f"# Test identities, not trained on: {len(drawn)} of {len(both)} identities, drawn with seed {seed}."
    )
    with whole_file(file) as temporary:
        temporary.write_text("\n".join([head, *drawn]) + "\n", encoding="utf-8")
    log.info("wrote %s: %d of %d identities are for testing", file, len(drawn), len(both))
