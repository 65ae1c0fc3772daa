"""Synthetic visible-infrared re-identification datasets as image files; `python -m synthetic` draws one.

The folder has the exact layout of SYSU-MM01, RegDB or LLCM (docs/method.md, section 8), or that of own images
(docs/own-data.md), so that every script of this project can read it. people.py and scenes.py draw the images.
"""

import io
import multiprocessing
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from synthetic.people import make_identity, render
from synthetic.scenes import MOMENT, SPLIT, make_camera
from utils import UserError, whole_file

# Defaults per dataset: training identities, test identities, images per identity and camera.
SIZES = {"sysu": (100, 40, 5), "regdb": (50, 50, 10), "llcm": (60, 30, 3), "folder": (60, 30, 4)}
CAMERAS = {
    "sysu": {"visible": (1, 2, 4, 5), "infrared": (3, 6)},
    "regdb": {"visible": (1,), "infrared": (1,)},
    "llcm": {"visible": tuple(range(1, 10)), "infrared": (1, 2, 4, 5, 6, 7, 8, 9)},
    "folder": {"visible": (1, 2), "infrared": (1, 2)},
}
TRIALS = 10  # RegDB's splits, and the permutations of rand_perm_cam.mat


@dataclass(frozen=True)
class Photo:
    """An image to draw: its path relative to the dataset's root, and what it shows; index counts from 0."""

    path: str
    pid: int
    camid: int
    modality: str
    index: int


@dataclass(frozen=True)
class Plan:
    """A dataset to draw: its images, and its other files {path relative to the root: content}."""

    dataset: str
    photos: list[Photo]
    texts: dict[str, str]
    permutations: np.ndarray | None = None  # SYSU-MM01's rand_perm_cam


def _attendance(rng: np.random.Generator, cameras: tuple[int, ...]) -> list[int]:
    """The cameras that saw an identity: most, but not always all, as in the real datasets."""
    missing = rng.integers(0, (len(cameras) + 2) // 4 + 1) if len(cameras) > 1 else 0
    return sorted(rng.permutation(cameras)[missing:].tolist())


def _sparse_pids(rng: np.random.Generator, count: int) -> list[int]:
    """count pids from 1 upward, with gaps as in the real datasets, where a pid is not a label; shuffled."""
    return rng.permutation(np.arange(1, count + count // 10 + 2))[:count].tolist()


def _line(pids: list[int]) -> str:
    return ",".join(map(str, sorted(pids))) + "\n"


def plan_sysu(identities: int, test_identities: int, images: int, seed: int) -> Plan:
    """SYSU-MM01's layout; a fifth of the training identities (at least one) is for validation."""
    rng = np.random.default_rng([seed, SPLIT])
    pids = _sparse_pids(rng, identities + test_identities)
    held = max(1, identities // 5)
    splits = {"val": pids[:held], "train": pids[held:identities], "test": pids[identities:]}
    photos = []
    cells = np.empty((6, 1), object)
    for camera in range(6):
        cells[camera, 0] = np.empty((max(pids), 1), object)
        for cell in range(max(pids)):
            cells[camera, 0][cell, 0] = np.zeros((TRIALS, 0), np.uint8)
    for pid in sorted(pids):
        for modality, cameras in CAMERAS["sysu"].items():
            for camid in _attendance(rng, cameras):
                names = [f"cam{camid}/{pid:04d}/{index + 1:04d}.jpg" for index in range(images)]
                photos += [Photo(name, pid, camid, modality, index) for index, name in enumerate(names)]
                orders = np.stack([rng.permutation(images) + 1 for _ in range(TRIALS)])
                cells[camid - 1, 0][pid - 1, 0] = orders.astype(np.uint8 if images < 256 else np.uint16)
    texts = {f"exp/{split}_id.txt": _line(members) for split, members in splits.items()}
    return Plan("sysu", photos, texts, cells)


def plan_regdb(identities: int, test_identities: int, images: int, seed: int) -> Plan:
    """RegDB's layout: ten random splits of all identities into training and test."""
    rng = np.random.default_rng([seed, SPLIT])
    photos, texts = [], {}
    for pid in range(1, identities + test_identities + 1):
        for modality, folder in (("visible", "Visible"), ("infrared", "Thermal")):
            names = [f"{folder}/{pid}/{folder[0].lower()}_{index + 1:05d}.bmp" for index in range(images)]
            photos += [Photo(name, pid, 1, modality, index) for index, name in enumerate(names)]
    for trial in range(1, TRIALS + 1):
        pids = rng.permutation(np.arange(1, identities + test_identities + 1)).tolist()
        for split, members in (("train", sorted(pids[:identities])), ("test", sorted(pids[identities:]))):
            labels = {pid: label for label, pid in enumerate(members)}
            for modality, name in (("visible", "visible"), ("infrared", "thermal")):
                rows = [s for s in photos if s.modality == modality and s.pid in labels]
                texts[f"idx/{split}_{name}_{trial}.txt"] = "".join(
                    f"{s.path} {labels[s.pid]}\n" for s in rows
                )
    return Plan("regdb", photos, texts)


def plan_llcm(identities: int, test_identities: int, images: int, seed: int) -> Plan:
    """LLCM's layout: training images by identity, test images by camera."""
    rng = np.random.default_rng([seed, SPLIT])
    pids = _sparse_pids(rng, identities + test_identities)
    labels = {pid: label for label, pid in enumerate(sorted(pids[:identities]))}
    photos = []
    texts = {"idx/train_vis.txt": "", "idx/train_nir.txt": "", "idx/test_id.txt": _line(pids[identities:])}
    for pid in sorted(pids):
        for modality, name in (("visible", "vis"), ("infrared", "nir")):
            for camid in _attendance(rng, CAMERAS["llcm"][modality]):
                for index in range(images):
                    second, frame = rng.integers(100000, 240000), rng.integers(100, 9999)
                    file = f"{pid:04d}_c{camid:02d}_s{second}_f{frame}_{name}.jpg"
                    if pid in labels:
                        file = f"{name}/{pid:04d}/{file}"
                        texts[f"idx/train_{name}.txt"] += f"{file} {labels[pid]}\n"
                    else:
                        file = f"test_{name}/cam{camid}/{pid:04d}/{file}"
                    photos.append(Photo(file, pid, camid, modality, index))
    return Plan("llcm", photos, texts)


def plan_folder(identities: int, test_identities: int, images: int, seed: int) -> Plan:
    """Own images in folders of identities, visible/<pid> and infrared/<pid>, not split."""
    photos = [
        Photo(f"{modality}/p{pid:03d}/c{camid}_{index + 1:04d}.jpg", pid, camid, modality, index)
        for pid in range(1, identities + test_identities + 1)
        for modality, cameras in CAMERAS["folder"].items()
        for camid in cameras
        for index in range(images)
    ]
    return Plan("folder", photos, {})


PLANS = {"sysu": plan_sysu, "regdb": plan_regdb, "llcm": plan_llcm, "folder": plan_folder}


def draw_photo(photo: Photo, root: str, dataset: str, seed: int, height: int, width: int) -> None:
    """Draw one image file. Its bytes depend only on the arguments.

    Args:
        photo: what to draw.
        root: the dataset's folder.
        dataset: a key of PLANS; RegDB's infrared images are thermal.
        seed: of the dataset.
        height, width: of the image, in pixels.
    """
    camera = make_camera(seed, photo.modality, photo.camid, thermal=dataset == "regdb")
    rng = np.random.default_rng([seed, MOMENT, camera.key[2], photo.pid, photo.camid, photo.index])
    image = render(make_identity(seed, photo.pid), camera, rng, height, width)
    image.save(Path(root, photo.path), quality=90)  # BMP has no quality and ignores it


def draw_dataset(
    plan: Plan, root: str | os.PathLike, seed: int = 0, height: int = 160, width: int = 64, workers: int = 1
) -> None:
    """Draw a planned dataset into the folder root, completely or not at all.

    Args:
        plan: what to draw, from one of PLANS.
        root: a new or empty folder.
        seed: the same seed and plan give the same bytes, with any number of workers.
        height, width: of the images, in pixels.
        workers: processes that draw; 0 or 1: only this process.

    Raises:
        UserError: root is not empty, or cannot be written.
    """
    root = Path(root)
    temporary = None
    try:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise UserError(f"--data-path {root}: not an empty folder; nothing was drawn")
        root.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}.", suffix=".part", dir=root.parent))
        inside = temporary / "dataset"  # mkdtemp's folder is private; this one has the usual permissions
        for folder in {Path(name).parent for name in [*plan.texts, *(photo.path for photo in plan.photos)]}:
            (inside / folder).mkdir(parents=True, exist_ok=True)
        for name, text in plan.texts.items():
            (inside / name).write_text(text)
        if plan.permutations is not None:
            (inside / "exp" / "rand_perm_cam.mat").write_bytes(_mat_bytes(plan.permutations))
        _draw_all(plan, inside, seed, height, width, workers)
        if root.exists():
            root.rmdir()
        inside.rename(root)
    except OSError as error:
        raise UserError(f"--data-path {root}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _mat_bytes(permutations: np.ndarray) -> bytes:
    """rand_perm_cam.mat, with a fixed text where SciPy's header has the time: same seed, same bytes."""
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"rand_perm_cam": permutations})
    return b"MATLAB 5.0 MAT-file, drawn by synthetic".ljust(116) + buffer.getvalue()[116:]


def _draw_all(plan: Plan, root: Path, seed: int, height: int, width: int, workers: int) -> None:
    draw = partial(draw_photo, root=str(root), dataset=plan.dataset, seed=seed, height=height, width=width)
    progress = partial(tqdm, total=len(plan.photos), desc="drawing", unit="image", disable=None)
    if workers <= 1:
        for _ in progress(map(draw, plan.photos)):
            pass
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for _ in progress(pool.map(draw, plan.photos, chunksize=8)):
            pass


def contact_sheet(plan: Plan, root: str | os.PathLike, path: str | os.PathLike, identities: int = 8) -> None:
    """Write a picture of a drawn dataset: a row per identity, a column per camera (several if there are few).

    Args:
        plan: of the dataset.
        root: the dataset's folder.
        path: of the picture, a PNG file.
        identities: rows; those that most cameras saw are shown.

    Raises:
        UserError: path cannot be written.
    """
    cameras = sorted({(photo.modality != "visible", photo.camid) for photo in plan.photos})
    repeats = max(1, 6 // len(cameras))
    photos = {(s.pid, s.modality != "visible", s.camid, s.index): s for s in plan.photos if s.index < repeats}
    columns = [(*camera, index) for camera in cameras for index in range(repeats)]
    pids = sorted({photo.pid for photo in plan.photos})
    pids.sort(key=lambda pid: -sum((pid, *column) in photos for column in columns))
    pids = sorted(pids[:identities])
    with Image.open(Path(root, plan.photos[0].path)) as first:
        width, height = first.size
    gap, left, top = 4, 54, 34
    sheet = Image.new("RGB", (left + len(columns) * (width + gap), top + len(pids) * (height + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (infrared, camid, _) in enumerate(columns):
        word = "visible" if not infrared else "thermal" if plan.dataset == "regdb" else "infrared"
        pen.text((left + i * (width + gap), 3), f"camera {camid}\n{word}", "black", font)
        for j, pid in enumerate(pids):
            if i == 0:
                pen.text((4, top + j * (height + gap) + height // 2), f"id {pid:04d}", "black", font)
            if (photo := photos.get((pid, *columns[i]))) is not None:
                with Image.open(Path(root, photo.path)) as image:
                    sheet.paste(image, (left + i * (width + gap), top + j * (height + gap)))
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")
