"""A substitute for SYSU-MM01: files in its layout, arrays of its size, and a Training on them."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

import data_manager
from devices import Processes
from engine.settings import parse_args
from engine.training import Training, build_training
from readers.arrays import ArrayFiles, fingerprint

CAMERAS = {"visible": (1, 2, 4, 5), "infrared": (3, 6)}
TEST_IDS = 4


def draw_sysu(
    root: Path, identities: int, counts: dict[str, int], height: int, width: int, noise: bool
) -> None:
    """Write a dataset into root. The files of training images are empty: only preprocessing reads them.

    Args:
        root: a new folder.
        identities: for training; images are distributed evenly.
        counts: {modality: number of training images}.
        height, width: of the arrays, in pixels.
        noise: random pixels; else zeros in sparse files, which take no disk space.
    """
    pids = np.arange(1, identities + 1)
    test_pids = range(identities + 1, identities + 1 + TEST_IDS)
    picture = io.BytesIO()
    Image.new("RGB", (8, 24)).save(picture, "JPEG")
    (root / "exp").mkdir(parents=True)
    for split, members in (("train", pids[1:]), ("val", pids[:1]), ("test", test_pids)):
        (root / "exp" / f"{split}_id.txt").write_text(",".join(map(str, members)) + "\n")
    for modality, cameras in CAMERAS.items():
        for k in range(counts[modality]):
            camera, pid = cameras[k // identities % len(cameras)], pids[k % identities]
            _write(root, camera, pid, k // identities + 1, b"")
        for camera in cameras:
            for pid in test_pids:
                _write(root, camera, pid, 1, picture.getvalue())

    samples = data_manager.train_samples("sysu", root)
    labels, rng = data_manager.class_labels(samples), np.random.default_rng(0)
    arrays = ArrayFiles(root, height, width)
    for modality, (image_file, label_file) in arrays.files.items():
        shape = (counts[modality], height, width, 3)
        images = np.lib.format.open_memmap(image_file, "w+", np.uint8, shape)
        if noise:
            images[:] = rng.integers(0, 256, shape, dtype=np.uint8)
        images.flush()
        np.save(label_file, labels[modality])
    manifest = {
        "height": height,
        "width": width,
        "images": counts,
        "pids": pids.tolist(),
        "fingerprint": fingerprint({modality: samples[modality].paths for modality in samples}),
    }
    arrays.manifest.write_text(json.dumps(manifest))


def _write(root: Path, camera: int, pid: int, index: int, content: bytes) -> None:
    folder = root / f"cam{camera}" / f"{pid:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{index:04d}.jpg").write_bytes(content)


def training_of(root: Path, device: str, *words: object) -> Training:
    """Build what train.py trains with.

    Args:
        root: the dataset's folder.
        device: "cpu" or "cuda".
        words: further words of train.py's command line.
    """
    gpu = -1 if device == "cpu" else 0
    args = parse_args(["--data-path", str(root), "--weights", "none", "--gpu", str(gpu), *map(str, words)])
    return build_training(args, None, Processes())
