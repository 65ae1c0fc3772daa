"""SYSU-MM01: four visible and two infrared cameras (docs/method.md, section 8).

cam{1..6}/0001/0001.jpg       images of id 1
exp/{train,val,test}_id.txt   ids, comma-separated
exp/rand_perm_cam.mat         the authors' galleries, of which not every copy of the dataset has the file
"""

import os
from pathlib import Path

import numpy as np
import scipy  # its parts are imported when they are first used: scipy.io takes 0.2 s

from readers.lists import listed, read_ids, warn_once
from readers.samples import Cells, Dataset, Samples, cells_samples, draw_cells, refuse_both
from utils import UserError

GALLERY_CAMERAS = {"all": (1, 2, 4, 5), "indoor": (1, 2)}


def _id_files(root: str | os.PathLike, split: str) -> list[Path]:
    return [
        Path(root, "exp", f"{name}_id.txt")
        for name in (("train", "val") if split == "trainval" else (split,))
    ]


class SYSU(Dataset):
    """See the file's docstring; images are sorted by id, camera and file name."""

    def _cells(self, root, split, problems=None) -> dict[str, Cells]:
        return self.cells(root, split, _id_files(root, split), problems)

    def read(self, root, split, trial, problems=None) -> dict[str, Samples]:
        """See Dataset."""
        cells = self._cells(root, split, problems)
        return {m: cells_samples(cells[m], m, root, split) for m in cells if cells[m]}

    def train(self, root, trial, split) -> dict[str, Samples]:
        """See Dataset. An id in only one modality is left out, with a warning."""
        cells = self._cells(root, split)
        pids = {modality: {pid for pid, _ in cells[modality]} for modality in cells}
        unpaired = pids["visible"] ^ pids["infrared"]
        if unpaired and all(pids.values()):  # cells_samples refuses a modality without any image
            warn_once(f"{root}: left out of training, because in only one modality: id {listed(unpaired)}")
            cells = {
                modality: {key: paths for key, paths in cells[modality].items() if key[0] not in unpaired}
                for modality in cells
            }
        return {modality: cells_samples(cells[modality], modality, root, split) for modality in cells}

    def gallery(self, root, mode, trial, shot, galleries, split, short) -> Samples:
        """shot images of each (id, camera of the mode), drawn or published."""
        cameras = GALLERY_CAMERAS[mode]
        cells = {
            key: paths for key, paths in self._cells(root, split)["visible"].items() if key[1] in cameras
        }
        if galleries == "published":
            if split != "test":
                raise UserError(
                    f"--galleries published: only the test ids have published galleries, not {split}"
                )
            cells = _published_order(root, cells, cameras, trial)
        if few := {} if short else {key: len(paths) for key, paths in cells.items() if len(paths) < shot}:
            counts = ", ".join(f"id {pid} camera {camid} ({count})" for (pid, camid), count in few.items())
            raise UserError(
                f"{root}: too few images for --shot {shot} (--allow-short accepts them): {counts}"
            )
        if galleries == "published":
            cells = {key: paths[:shot] for key, paths in cells.items()}
        else:
            cells = draw_cells(cells, shot, trial)
        return cells_samples(cells, "visible", root, split)

    def trained(self, split) -> tuple[str, ...]:
        """See Dataset."""
        return ("train", "val") if split == "test" else ("train",)

    def refuse_shared(self, root, trial, split) -> None:
        """See Dataset."""
        (tests,) = _id_files(root, split)
        for name in self.trained(split) if tests.is_file() else ():
            if (file := Path(root, "exp", f"{name}_id.txt")).is_file():
                refuse_both(file, tests, "id", set(read_ids(tests)) & set(read_ids(file)))


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


def _published_order(root: str | os.PathLike, cells: Cells, camids: tuple[int, ...], trial: int) -> Cells:
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


DATASET = SYSU(
    "SYSU-MM01", 384, 128, 4, "sysu", (20, 40), range(10), {"all": "infrared", "indoor": "infrared"}, "exp",
    splits=("train", "val", "test"),
    galleries=("seeded", "published"),
    multi_shot=True,
    cameras={"visible": {c: f"cam{c}" for c in (1, 2, 4, 5)}, "infrared": {c: f"cam{c}" for c in (3, 6)}},
    published={
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
)  # fmt: skip
