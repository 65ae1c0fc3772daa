"""Own images as a dataset: the identity and split of each image, from folders or from a CSV file.

DIR/visible/<pid>/… and DIR/infrared/<pid>/…    the split is drawn once, by draw_split
DIR/train/visible/<pid>/…, DIR/test/infrared/<pid>/…    and so on: the split by folders
DIR/images.csv    the columns path, pid and modality; camid and split if they are known

docs/own-data.md is a guide from a folder of images to a table of results.
"""

import csv
import io
import os
import random
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from readers.lists import (
    JUNK,
    JUNK_KIND,
    Finder,
    listed,
    number,
    path_problem,
    read_text,
    refuse_separator,
    warn_once,
)  # fmt: skip
from readers.samples import BOTH_WAYS, CAPTURED, Dataset, Samples, make_samples
from utils import UserError, log, whole_file

CSV_FILE = "images.csv"
SPLIT_FILE = "test_identities.txt"  # the test pids, one per line; the others are for training
SPLITS = ("train", "test")
REQUIRED, OPTIONAL = ("path", "pid", "modality"), ("camid", "split")
CAMERA = re.compile(r"(?:^|_)c([0-9]{1,9})(?:s[0-9]+)?_")  # as LLCM, Market-1501 and DukeMTMC-reID name files


class Image(NamedTuple):
    """One image; pid, camid and split as folders and names or the CSV file have them, "" if unknown."""

    path: str
    pid: str
    camid: str
    modality: str
    split: str


class OwnImages(Dataset):
    """See the file's docstring. Every test image is a query of one mode and in the gallery of the other."""

    def read(self, root, split, trial, problems=None) -> dict[str, Samples]:
        """See Dataset; images are sorted by pid and path.

        Pids and camids that are words become numbers, in sorted order; an unknown camid is 0. An identity in
        only one modality is left out of training, with a warning.
        """
        images = with_splits(root, read_images(root))
        shared = set.intersection(
            *({image.pid for image in images if image.split == name} for name in SPLITS)
        )
        if shared:
            raise UserError(f"{root}: in both the train and the test split: pid {listed(shared, 10)}")
        pids = {
            modality: {image.pid for image in images if (image.modality, image.split) == (modality, split)}
            for modality in CAPTURED
        }
        for modality in CAPTURED:
            if not pids[modality]:
                raise UserError(f"{root}: the {split} split has no {modality} images")
        both = pids["visible"] & pids["infrared"]
        if not both:
            raise UserError(f"{root}: no identity of the {split} split has images of both modalities")
        if split == "train" and (lonely := pids["visible"] ^ pids["infrared"]):
            warn_once(f"{root}: left out of training, because in only one modality: pid {listed(lonely)}")
        pid_of = numbers(image.pid for image in images)
        camid_of = numbers({image.camid for image in images} - {""}, 1)
        samples = {}
        for modality in CAPTURED:
            rows = sorted(
                (pid_of[image.pid], image.path, camid_of.get(image.camid, 0))
                for image in images
                if (image.modality, image.split) == (modality, split)
                and (split == "test" or image.pid in both)
            )
            pids, paths, camids = zip(*rows, strict=True)
            samples[modality] = make_samples(paths, pids, camids, modality)
        return samples


# RegDB's protocol, preprocessing, recipe, size and schedule: they were chosen together.
DATASET = OwnImages("own images", 288, 144, 5, "regdb", (30, 60), range(1), BOTH_WAYS, "")


def numbers(words: Iterable[str], first: int = 0) -> dict[str, int]:
    """{word: number}. Words that are distinct numbers, at least `first`, keep them.

    Otherwise the sorted words are numbered from `first`.
    """
    words = sorted(set(words))
    values = [number(word) for word in words]
    if None not in values and len(set(values)) == len(values) and min(values, default=first) >= first:
        return dict(zip(words, values, strict=True))
    return {word: place for place, word in enumerate(words, start=first)}


def read_images(root: str | os.PathLike) -> list[Image]:
    """All images of the dataset in the folder root; UserError if it has none of the three layouts."""
    root, finder = Path(root), Finder(root)
    parts = {split: [m for m in CAPTURED if (root / split / m).is_dir()] for split in (*SPLITS, "")}
    split_folders = [split for split in SPLITS if (root / split).is_dir()]
    if (root / CSV_FILE).exists():
        images = _csv_images(root, finder)
    elif split_folders and parts[""]:
        raise UserError(f"{root}: has both {split_folders[0]} and {parts[''][0]}: remove one of them")
    elif split_folders or parts[""]:
        images = _folder_images(root, finder, [(split, m) for split in parts for m in parts[split]])
    else:
        raise UserError(
            f"{root}: no images found: neither {CSV_FILE} nor the folders visible and infrared exist"
        )
    finder.report()
    for modality in CAPTURED:
        if all(image.modality != modality for image in images):
            raise UserError(f"{root}: no {modality} images; both modalities are needed")
    forms: dict[str, str] = {}
    for pid in sorted({image.pid for image in images}):
        if (other := forms.setdefault(unicodedata.normalize("NFC", pid), pid)) != pid:
            raise UserError(f"{root}: pid {pid} is written in two Unicode forms, {other!a} and {pid!a}")
    return images


def _folder_images(root: Path, finder: Finder, parts: list[tuple[str, str]]) -> list[Image]:
    """The images in <split>/<modality>/<pid>/ of the parts (split, modality), at any depth."""
    tops = {str(root / split / modality): (split, modality) for split, modality in parts}
    images = []
    for folder in finder.walk(list(tops)):
        top = next(top for top in tops if folder.path == top or folder.path.startswith(top + os.sep))
        if folder.path == top and folder.images:
            raise UserError(f"{folder.images[0]}: not in an identity's folder: move it to {top}/<pid>")
        folder.refuse_misnamed()
        split, modality = tops[top]
        pid = folder.path.removeprefix(top + os.sep).split(os.sep)[0]
        for path in folder.images:
            camera = CAMERA.search(os.path.basename(path))
            images.append(Image(path, pid, camera[1] if camera else "", modality, split))
    return images


def _csv_images(root: Path, finder: Finder) -> list[Image]:
    file = root / CSV_FILE
    try:
        lines = csv.reader(io.StringIO(read_text(file)), strict=True, skipinitialspace=True)
        header, *rows = list(lines) or [[]]
    except csv.Error as error:
        raise UserError(f"{file}: not a CSV file: {error}") from error
    header, known = [word.strip().lower() for word in header], ",".join((*REQUIRED, *OPTIONAL))
    refuse_separator(file, header)
    if missing := [column for column in REQUIRED if column not in header]:
        raise UserError(f"{file}: its first line has no column {listed(missing)}: {known}")
    if unknown := [column for column in header if column not in (*REQUIRED, *OPTIONAL)]:
        index = " (pandas writes one without a name, unless index=False)" if "" in unknown else ""
        raise UserError(f"{file}: unknown column {listed(unknown)}{index}: only {known} are known")
    if len(set(header)) < len(header):
        raise UserError(f"{file}: a column appears twice: {listed(header)}")
    images: dict[str, Image] = {}
    for count, row in enumerate(rows, start=2):
        if not "".join(row).strip():
            continue
        where = f"{file}, line {count}"
        if len(row) != len(header):
            raise UserError(f"{where}: {len(row)} values, not {len(header)}")
        values = dict(zip(header, (word.strip() for word in row), strict=True))
        path = os.path.normpath(values.pop("path"))
        if problem := path_problem(root, path):
            raise UserError(f"{where}: {problem}")
        if not values["pid"]:
            raise UserError(f"{where}: no pid")
        if values["modality"] not in CAPTURED:
            raise UserError(f"{where}: the modality {values['modality']!r} is neither visible nor infrared")
        if "split" in values and values["split"] not in SPLITS:
            raise UserError(f"{where}: the split {values['split']!r} is neither train nor test")
        image = Image(str(root / path), **({"camid": "", "split": ""} | values))
        if images.setdefault(path, image) != image:
            raise UserError(f"{where}: {path!r} has different values on an earlier line")
    if not images:
        raise UserError(f"{file}: lists no images")
    finder.passed[JUNK_KIND] += [image.path for image in images.values() if image.pid == JUNK]
    return [image for image in images.values() if image.pid != JUNK]


def with_splits(root: str | os.PathLike, images: list[Image]) -> list[Image]:
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
    pids = [{image.pid for image in images if image.modality == modality} for modality in CAPTURED]
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
