"""What the readers of datasets share: images with identities and cameras, and what a dataset can do."""

import functools
import hashlib
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from readers.lists import Finder, index_labels, listed, read_ids, refuse, warn_once
from utils import UserError

CAPTURED = ("visible", "infrared")  # by cameras; aux images are made from visible ones
BOTH_WAYS = {"visible-to-infrared": "visible", "infrared-to-visible": "infrared"}
Cells = dict[tuple[int, int], list[str]]  # (pid, camid) -> image paths in file-name order; none is empty


@dataclass(frozen=True, eq=False)
class Samples:
    """N images of one modality, with their identities and cameras."""

    paths: list[str]  # N
    pids: np.ndarray  # (N,) int64, as the dataset writes them
    camids: np.ndarray  # (N,) int64
    modality: str  # "visible" or "infrared"

    def __len__(self) -> int:
        return len(self.paths)


def make_samples(paths: Sequence[str], pids: Sequence, camids: Sequence, modality: str) -> Samples:
    """Samples of lists."""
    return Samples(list(paths), np.array(pids, dtype=np.int64), np.array(camids, dtype=np.int64), modality)


@dataclass(frozen=True)
class Dataset(ABC):
    """A dataset: the facts that training and evaluation use as defaults (docs/method.md), and its reader.

    Every method reads the folder root, and raises UserError where that has not what the dataset should have.
    """

    title: str
    height: int  # pixels
    width: int  # pixels
    num_pos: int  # P, images per identity and modality in a batch
    recipe: str  # of augmentation: "sysu" or "regdb"
    decay_epochs: tuple[int, int]  # the rate falls tenfold after the first and again at the second
    trials: range
    query_modality: dict[str, str]  # mode -> the modality of its queries; the gallery is of the other
    index_folder: str  # holds the files that list the splits
    splits: tuple[str, ...] = ("train", "test")
    galleries: tuple[str, ...] = ("seeded",)
    multi_shot: bool = False  # galleries with several images of each (id, camera)
    repeating: tuple[str, ...] = ()  # folders that hold images of the splits' folders again
    # modality -> camid -> a folder that holds the images of id 1 in 0001
    cameras: dict[str, dict[int, str]] = field(default_factory=dict)
    # (splits, modality, camera) -> (identities, images) as published; None: not published
    published: dict[tuple[tuple[str, ...], str, str], tuple[int | None, int | None]] = field(
        default_factory=dict
    )

    @property
    def modes(self) -> tuple[str, ...]:
        """The evaluation modes, the default first."""
        return tuple(self.query_modality)

    def gallery_modality(self, mode: str) -> str:
        """The modality of a mode's gallery."""
        return "infrared" if self.query_modality[mode] == "visible" else "visible"

    @abstractmethod
    def read(
        self, root: str | os.PathLike, split: str, trial: int | None, problems: list[str] | None = None
    ) -> dict[str, Samples]:
        """Every image of a split, by modality, without modalities that have none; problems: see refuse."""

    def train(self, root: str | os.PathLike, trial: int | None, split: str) -> dict[str, Samples]:
        """The training images of both modalities, which have the same pids."""
        return self.read(root, "train", trial)

    def test(self, root: str | os.PathLike, modality: str, trial: int | None, split: str) -> Samples:
        """All test images of a modality: the queries."""
        samples = self.read(root, split, trial)
        if modality not in samples:
            raise UserError(f"{root}: the {split} split has no {modality} images")
        return samples[modality]

    def gallery(
        self,
        root: str | os.PathLike,
        mode: str,
        trial: int,
        shot: int,
        galleries: str,
        split: str,
        short: bool,
    ) -> Samples:
        """The gallery of a mode and trial; short: where an (id, camera) has fewer images than shot, all."""
        return self.test(root, self.gallery_modality(mode), trial, split)

    def refuse_shared(self, root: str | os.PathLike, trial: int | None, split: str) -> None:  # noqa: B027
        """Refuse images or identities that the files of the splits list for training and for testing."""

    def trained(self, split: str) -> tuple[str, ...]:
        """The splits that are trained on, where split is tested on."""
        return ("train",)

    def unknown_cameras(self, root: str | os.PathLike) -> list[str]:
        """Folders with content that are named like a camera, such as cam7, but are not in cameras."""
        known = {folder for folders in self.cameras.values() for folder in folders.values()}
        existing = {
            os.path.join(parent, folder.name)
            for parent in map(os.path.dirname, known)
            for folder in Path(root, parent).glob("cam[0-9]*")
            if folder.is_dir() and any(folder.iterdir())
        }
        return sorted(existing - known)

    def cells(
        self, root: str | os.PathLike, split: str, id_files: Sequence[Path], problems: list[str] | None = None
    ) -> dict[str, Cells]:
        """{modality: cells} of the ids in id_files, from the folders of cameras; sorted by id and camera."""
        pids = sorted({pid for file in id_files for pid in read_ids(file)})
        if others := self.unknown_cameras(root):
            warn_once(f"{root}: not read, because {self.title} has no such camera: {listed(others)}")
        finder, cells = Finder(root, problems), {}
        for modality, folders in self.cameras.items():
            images = {
                (pid, camid): finder.images(os.path.join(root, folder, f"{pid:04d}"))
                for pid in pids
                for camid, folder in folders.items()
            }
            cells[modality] = {key: paths for key, paths in images.items() if paths}
        finder.report()
        if empty := set(pids) - {pid for keys in cells.values() for pid, _ in keys}:
            refuse(f"{root}: no images of the {split} split's id {listed(empty)}", problems)
        return cells

    def copies(self, root: str | os.PathLike, trial: int | None, split: str) -> str:
        """Words on test images that are training images by their content; "" if there are none."""
        try:
            trained, tested = (
                [path for part in parts for samples in self.read(root, part, trial, []).values()
                 for path in samples.paths]
                for parts in (self.trained(split), (split,))
            )  # fmt: skip
        except UserError:  # only one of the splits is here, or it cannot be read, which its user is told
            return ""
        pairs = same_content(trained, tested)
        if not pairs:
            return ""
        example = " is ".join(os.path.relpath(path, root) for path in pairs[0][::-1])
        return f"{root}: {len(pairs)} {split} images are also training images, byte for byte: {example}"


def same_content(first: Iterable[str], second: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of files with equal bytes, one of first and one of second; only files of equal size are read."""
    with ThreadPoolExecutor(16) as pool:  # waits for the disk, above all for one in a network

        def each(function: Callable, items: list) -> list:
            pieces = [items[start : start + 256] for start in range(0, len(items), 256)]  # tasks cost time
            return [
                result for part in pool.map(lambda piece: [*map(function, piece)], pieces) for result in part
            ]

        files = [each(_facts, list(dict.fromkeys(paths))) for paths in (first, second)]
        sizes = [{size for _, size, _ in part} for part in files]
        common = sizes[0] & sizes[1] - {0}
        files = [[file for file in part if file[1] in common] for part in files]
        digests = [list(zip(each(_digest, part), part, strict=True)) for part in files]
    known = dict(reversed(digests[0]))
    return [(known[digest][0], file[0]) for digest, file in digests[1] if digest and digest in known]


def _facts(path: str) -> tuple[str, int, int]:
    """A file's path, size in bytes and modification time."""
    try:
        status = os.stat(path)
    except OSError:  # decoding will report it
        return path, 0, 0
    return path, status.st_size, status.st_mtime_ns


@functools.cache  # RegDB's trials share their images, and SYSU-MM01's modes all of them
def _digest(file: tuple[str, int, int]) -> bytes:
    try:
        return hashlib.blake2b(Path(file[0]).read_bytes(), digest_size=16).digest()
    except OSError:
        return b""


def refuse_both(trained: Path, tested: Path, kind: str, shared: set) -> None:
    """Refuse what two files both list."""
    if shared:
        raise UserError(
            f"{tested}: also in {trained.name}, so trained on and tested on: {kind} {listed(shared, 10)}"
        )


# --- images in folders of cameras and identities: SYSU-MM01, and LLCM's test split


def cells_samples(cells: Cells, modality: str, root: str | os.PathLike, split: str) -> Samples:
    """The images of cells, in their order; UserError if there are none."""
    if not cells:
        raise UserError(f"{root}: the {split} split has no {modality} images")
    keys = [key for key, paths in cells.items() for _ in paths]
    return make_samples(
        [path for paths in cells.values() for path in paths], *zip(*keys, strict=True), modality
    )


def draw_cells(cells: Cells, shot: int, trial: int) -> Cells:
    """shot images of each cell, or all where there are fewer, drawn by random.Random(trial)."""
    rng = random.Random(trial)  # with one image, sample() draws the same as the protocol's choice()
    return {key: rng.sample(paths, min(shot, len(paths))) for key, paths in cells.items()}


# --- images in lists: RegDB, and LLCM's training split


def list_samples(
    file: Path,
    root: str | os.PathLike,
    modality: str,
    camid_of: Callable[[str], int],
    problems: list[str] | None = None,
) -> Samples:
    """The images of a list, in its order; camid_of gives a path's camid."""
    labels = index_labels(file, root, problems)
    paths = [os.path.join(root, path) for path in labels]
    return make_samples(paths, list(labels.values()), list(map(camid_of, labels)), modality)


def refuse_unpaired(
    samples: dict[str, Samples], root: str | os.PathLike, split: str, problems: list[str] | None
) -> dict[str, Samples]:
    """samples; refuses ids in only one modality."""
    unpaired = set(samples["visible"].pids.tolist()) ^ set(samples["infrared"].pids.tolist())
    if unpaired:
        refuse(f"{root}: {split}, in only one modality: id {listed(unpaired)}", problems)
    return samples
