"""Preprocessing: JPEG files -> one array of resized images on disk.

The baseline is the obvious implementation: load, resize and collect one image after another, then save the
array. Both files are identical.
"""

import functools
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.timing import compare, row, run_alone
from readers.arrays import write_array

HEIGHT, WIDTH = 384, 128
WORKERS = 2


def draw_jpegs(folder: Path, number: int) -> list[str]:
    """Write smooth random JPEGs of about 300x120 pixels."""
    rng = np.random.default_rng(0)
    paths = []
    for k in range(number):
        small = Image.fromarray(rng.integers(0, 256, (24, 10, 3), dtype=np.uint8))
        size = (int(rng.integers(90, 150)), int(rng.integers(240, 360)))
        paths.append(str(folder / f"{k:05d}.jpg"))
        small.resize(size, Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def baseline(paths: list[str], file: Path) -> None:
    """One image at a time, all of them in memory."""
    images = []
    for path in paths:
        image = Image.open(path).convert("RGB")
        image = image.resize((WIDTH, image.height), Image.Resampling.LANCZOS)  # as images.py does, see there
        images.append(np.array(image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)))
    np.save(file, np.array(images))


def ours(paths: list[str], file: Path) -> None:
    """Decoded by threads, written batch by batch."""
    write_array(paths, file, HEIGHT, WIDTH, WORKERS)


def run(device: str = "cpu", quick: bool = False) -> list[dict]:
    """Return the rows of the table of benchmarks. Preprocessing always runs on the CPU."""
    number, repeats, many = (24, 2, 240) if quick else (300, 7, 4500)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = draw_jpegs(folder, number)
        slow, fast = folder / "baseline.npy", folder / "ours.npy"
        seconds = compare(lambda: baseline(paths, slow), lambda: ours(paths, fast), repeats)
        if slow.read_bytes() != fast.read_bytes():
            raise AssertionError("the two arrays differ")
        _, peak = run_alone(functools.partial, ours, (paths * many)[:many], fast)
    slow, fast = (f"{number / s:.0f}" for s in seconds)
    speed = f"{fast} images/s, baseline {slow}, {WORKERS} threads"
    memory = f"peak {peak / 1e6:.0f} MB for an array of {many * HEIGHT * WIDTH * 3 / 1e6:.0f} MB"
    return [row(f"preprocessing, {number} JPEGs -> {HEIGHT}x{WIDTH}", seconds, 1.8, f"{speed}; {memory}")]
