"""Run the repository's own scripts, as a user types them, for tools that orchestrate others."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from utils import UserError

HERE = Path(__file__).resolve().parents[1]


def words_of(script: str, *words: object) -> list[str]:
    """What a user types: `python train.py …`, or for a script such as "-m tools.check" `python -m …`."""
    return ["python", *script.split(), *map(str, words)]


def machine_flags(args: argparse.Namespace) -> list[object]:
    """--gpu and the like, for train.py and test.py."""
    words = ["--amp", args.amp, "--workers", args.workers, "--test-batch", args.test_batch]
    return words if args.gpu is None else ["--gpu", args.gpu, *words]


def run(
    script: str, *words: object, quiet: bool = False, accepted: tuple[int, ...] = (0,)
) -> tuple[int, str]:
    """Print a command and run it, from whatever folder.

    Args:
        script: a file of the repository, train.py say, or "-m PACKAGE".
        words: its arguments.
        quiet: keep what it prints instead of showing it.
        accepted: exit statuses that are no failure.

    Returns:
        Its exit status, and what it printed if quiet.

    Raises:
        UserError: it ended with another status.
    """
    print(f"$ {shlex.join(words_of(script, *words))}", flush=True)
    place = [HERE / script] if script.endswith(".py") else script.split()
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if quiet else {}
    done = subprocess.run(
        [sys.executable, *place, *map(str, words)], env=os.environ | {"PYTHONPATH": str(HERE)},
        text=True, check=False, **output,
    )  # fmt: skip
    if done.returncode not in accepted:
        why = (done.stdout or "see above").strip()[-500:]
        raise UserError(f"{script} failed with status {done.returncode}: {why}")
    return done.returncode, done.stdout or ""
