"""Time from the command to the first training step, at SYSU-MM01's size.

Runs `train.py --check`, which starts like a run, but does not rebuild the memory. The image files are empty,
since training does not read them, and the arrays are zeros.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import row
from benchmarks.workload import draw_sysu

REPOSITORY = Path(__file__).resolve().parent.parent
SYSU = {"visible": 22_258, "infrared": 11_909}


def run(device: str = "cpu", quick: bool = False) -> list[dict]:
    """Return one row, without a baseline."""
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
    return [row(work, (None, seconds), "< 10 s", note)]


def first_step(command: list, folder: str) -> float:
    """Seconds from the start of command to the start of its first step."""
    start, seconds = time.perf_counter(), None
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if step := re.match(r"one step: loss \S+ ([\d.]+) s", line):
                seconds = time.perf_counter() - start - float(step[1])
    if process.returncode or seconds is None:
        raise RuntimeError(f"train.py --check ended with status {process.returncode}")
    return seconds
