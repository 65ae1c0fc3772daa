"""A stand-in for SYSU-MM01: files in its layout, arrays in its sizes, and what train.py makes of them."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

import data_manager
from devices import Processes
from runs.settings import parse_args
from storage.arrays import array_files, fingerprint
from training import Training, build_training

CAMERAS = {"visible": (1, 2, 4, 5), "infrared": (3, 6)}
TEST_IDS = 4


def draw_sysu(
    root: Path, identities: int, counts: dict[str, int], height: int, width: int, noise: bool
) -> None:
    """Write a dataset under root, with {modality: how many} training images, the identities taking turns.

    The training images' files are empty: nothing reads them but preprocessing. noise: random pixels, else
    zeros in files with holes, which take no space on the disk.
    """
    pids = np.arange(1, identities + 1)
    test_pids = range(identities + 1, identities + 1 + TEST_IDS)
    picture = io.BytesIO()
    Image.new("RGB", (8, 24)).save(picture, "JPEG")
    (root / "exp").mkdir(parents=True)
    for split, those in (("train", pids[1:]), ("val", pids[:1]), ("test", test_pids)):
        (root / "exp" / f"{split}_id.txt").write_text(",".join(map(str, those)) + "\n")
    for modality, cameras in CAMERAS.items():
        for k in range(counts[modality]):
            camera, pid = cameras[k // identities % len(cameras)], pids[k % identities]
            _write(root, camera, pid, k // identities + 1, b"")
        for camera in cameras:
            for pid in test_pids:
                _write(root, camera, pid, 1, picture.getvalue())

    samples = data_manager.train_samples("sysu", root)
    labels, rng = data_manager.class_labels(samples), np.random.default_rng(0)
    for modality, (image_file, label_file) in array_files(root).items():
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
        "fingerprint": fingerprint({modality: those.paths for modality, those in samples.items()}),
    }
    (root / "train_resized.json").write_text(json.dumps(manifest))


def _write(root: Path, camera: int, pid: int, index: int, content: bytes) -> None:
    folder = root / f"cam{camera}" / f"{pid:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{index:04d}.jpg").write_bytes(content)


def training_of(root: Path, device: str, *words: object) -> Training:
    """What train.py trains with on the dataset under root, given the words of its command line besides."""
    gpu = -1 if device == "cpu" else 0
    args = parse_args(["--data-path", str(root), "--weights", "none", "--gpu", str(gpu), *map(str, words)])
    return build_training(args, None, Processes())
