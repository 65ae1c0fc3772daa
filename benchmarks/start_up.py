"""Time from the command to the first training step, and to the end of an evaluation, at SYSU-MM01's size.

Runs `train.py --check`, which starts like a run, but does not rebuild the memory. The image files are empty,
since training does not read them, and the arrays are zeros. `test.py --features` evaluates ten trials, and
is also run with --help: what importing and ending take.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.timing import row
from benchmarks.workload import CAMERAS, draw_sysu

REPOSITORY = Path(__file__).resolve().parent.parent
SYSU = {"visible": 22_258, "infrared": 11_909}
TESTED = {"visible": 6_775, "infrared": 3_803}  # of 96 identities


def run(device: str = "cpu", quick: bool = False) -> list[dict]:
    """Return two rows, without a baseline."""
    identities, counts, size = 395, SYSU, (384, 128)
    if quick:
        identities, counts, size = 20, {"visible": 400, "infrared": 200}, (64, 32)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name, "sysu")
        draw_sysu(root, identities, counts, *size, noise=False)
        flags = (
            f"--img-h {size[0]} --img-w {size[1]} --batch-size 2 --num-pos 1 --test-batch 1 --weights none"
        )
        flags += f" --gpu {-1 if device == 'cpu' else 0}"
        command = [sys.executable, REPOSITORY / "train.py", "--check", *flags.split(), "--data-path", root]
        seconds = statistics.median(first_step(command, name) for _ in range(1 if quick else 3))
    number = sum(counts.values())
    work = f"start-up of train.py, {number:,} images of {identities} identities"
    note = f"arrays of {number * size[0] * size[1] * 3 / 1e9:.1f} GB; without the memory rebuild"
    return [row(work, (None, seconds), "< 10 s", note), _evaluation(device, quick)]


def _evaluation(device: str, quick: bool) -> dict:
    """The row of test.py --features, ten trials with their intervals."""
    persons, counts, dim = (12, {"visible": 90, "infrared": 50}, 32) if quick else (96, TESTED, 2048)
    rng, arrays = np.random.default_rng(0), {}
    clean = rng.standard_normal((persons + 1, dim), np.float32)
    with tempfile.TemporaryDirectory() as name:
        root, file = Path(name, "sysu"), Path(name, "features.npz")
        (root / "exp").mkdir(parents=True)
        for split, first in (("train", 200), ("val", 400), ("test", 1)):
            text = ",".join(map(str, range(first, first + persons)))
            (root / "exp" / f"{split}_id.txt").write_text(text)
        for modality, cameras in CAMERAS.items():
            k = np.arange(counts[modality])
            pids, camids = 1 + k % persons, np.array(cameras)[k // persons % len(cameras)]
            paths = [
                f"cam{c}/{p:04d}/{n:04d}.jpg" for c, p, n in zip(camids, pids, k // persons + 1, strict=True)
            ]
            for path in paths:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).touch()
            features = clean[pids] + 4 * rng.standard_normal((len(k), dim), np.float32)
            features /= np.linalg.norm(features, axis=1, keepdims=True)
            arrays |= {f"{modality}_features": features, f"{modality}_paths": np.array(paths)}
            arrays |= {f"{modality}_pids": pids, f"{modality}_camids": camids}
        np.savez(file, **arrays)
        command = [sys.executable, REPOSITORY / "test.py", "--gpu", "-1" if device == "cpu" else "0"]
        words = "--dataset", "sysu", "--data-path", root, "--features", file
        alone, seconds = (
            statistics.median(_whole([*command, *more]) for _ in range(1 if quick else 5))
            for more in (("--help",), words)
        )
    work = f"test.py --features, {sum(counts.values()):,} x {dim:,}, ten trials with intervals"
    return row(work, (None, seconds), "< 3 s", f"{alone:.2f} s of it for --help")


def _whole(command: list) -> float:
    """Seconds that a command takes, from its start to its end."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def first_step(command: list, folder: str) -> float:
    """Seconds from the start of command to the start of its first step."""
    start, seconds = time.perf_counter(), None
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if step := re.search(r"one step: loss \S+, ([\d.]+) s; the first ([\d.]+) s", line):
                steps = float(step[2]) + 2 * float(step[1])  # of three, the shortest and the first are told
                seconds = time.perf_counter() - start - steps
    if process.returncode or seconds is None:
        raise RuntimeError(f"train.py --check ended with status {process.returncode}")
    return seconds
