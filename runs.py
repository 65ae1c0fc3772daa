"""The files of a training run: its name, lock, log, TensorBoard events and checkpoints.

<model_path>/<run>_best.t and <run>_last.t, <log_path>/<dataset>_log/<run>.log, <log_path>/vis_log/<run>/.
"""

import argparse
import contextlib
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from filelock import FileLock, Timeout

from checkpoints import load_checkpoint, save_checkpoint
from utils import UserError, log

# Settings that may differ between the parts of one run; every other one is fixed by its checkpoint.
MAY_CHANGE = {
    "data_path", "array_path", "model_path", "log_path", "epochs", "workers", "gpu", "cache", "test_batch",
    "resume", "overwrite", "check",
}  # fmt: skip


STATE_OF_TRAINING = {"optimizer", "scaler", "epoch", "best", "cmc", "mAP", "mINP", "log_size"}


def run_name(settings: Mapping[str, object], defaults: Mapping[str, object]) -> str:
    """A name that tells two runs with different settings apart.

    Dataset, P, B, rate and seed always; of the other settings those that differ from their defaults, unless
    they may change within a run; last the trial of RegDB, as `_trial_<t>`.
    """
    name = clean("{dataset}_p{num_pos}_n{batch_size}_lr{lr}_seed{seed}".format_map(settings))
    always = {"dataset", "num_pos", "batch_size", "lr", "seed", "trial"}
    others = ""
    for key in sorted(set(defaults) - always - MAY_CHANGE):
        if settings[key] != defaults[key]:
            value = settings[key]
            text = "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            others += f"_{key.replace('_', '-')}-{text}"
    words = clean(others)
    if words != others or len(words.encode()) > 120:  # a path, say, or more than a file's name can hold
        words = f"{words[:60]}_{hashlib.sha256(others.encode()).hexdigest()[:8]}"
    return name + words + (clean(f"_trial_{settings['trial']}") if settings["dataset"] == "regdb" else "")


def clean(text: str) -> str:
    """text with what does not belong in a file's name made hyphens."""
    return re.sub(r"[^\w.+-]+", "-", text)


def existing(folder: Path) -> Path:
    """The folder, or where it is not there yet the nearest above it that is."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


class LogFile(logging.FileHandler):
    """A log file whose full disk ends the run, in one line."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by logging where writing a record failed; UserError naming the file."""
        error = sys.exc_info()[1]
        raise UserError(f"cannot write {self.baseFilename}: {getattr(error, 'strerror', error)}") from error


class Run:
    """A run's files, of which one process writes any."""

    def __init__(self, name: str, dataset: str, model_path: str | os.PathLike, log_path: str | os.PathLike):
        self.name = name
        self.best = Path(model_path) / f"{name}_best.t"
        self.last = Path(model_path) / f"{name}_last.t"
        self.log = Path(log_path) / f"{dataset}_log" / f"{name}.log"
        self.events = Path(log_path) / "vis_log" / name
        folders = {self.last.parent.resolve(), self.log.parent.resolve()}  # a run shares neither with another
        self._locks = [FileLock(folder / f".{name}.lock") for folder in sorted(folders)]
        self._handler: logging.Handler | None = None

    def folders(self) -> tuple[Path, ...]:
        """The folders that the run writes in."""
        return self.last.parent, self.log.parent, self.events.parent

    def refuse_unwritable(self) -> None:
        """UserError naming a folder that files cannot be written in; leaves nothing behind."""
        for folder in self.folders():
            try:
                with tempfile.TemporaryFile(dir=existing(folder)) as probe:
                    probe.write(b"can this be written?")
            except OSError as error:
                raise UserError(f"cannot write in {folder}: {error.strerror or error}") from error

    def acquire(self) -> None:
        """Take the run's lock, which ends with this process however it ends; UserError if another has it."""
        try:
            for folder in self.folders():
                folder.mkdir(parents=True, exist_ok=True)
            for lock in self._locks:
                lock.acquire(timeout=0)
        except Timeout as error:
            for lock in self._locks:
                lock.release()
            folder = Path(error.lock_file).parent
            raise UserError(f"another process is training {self.name} in {folder} right now") from error
        except OSError as error:
            raise UserError(f"cannot write {error.filename}: {error.strerror or error}") from error
        for path in (self.best, self.last):
            for leftover in path.parent.glob(f".{path.name}.*.part"):  # of a process that was killed writing
                leftover.unlink(missing_ok=True)

    def release(self) -> None:
        """Give the lock back and close the log."""
        if self._handler is not None:
            log.removeHandler(self._handler)
            with contextlib.suppress(OSError):  # what a full disk did not take was reported when it came
                self._handler.close()
        for lock in self._locks:
            lock.release()

    def refuse_to_overwrite(self, epochs: int) -> None:
        """UserError if the run is there already, saying whether it is finished."""
        if self.last.exists():
            done = load_checkpoint(self.last).get("epoch", 0)
            if done >= epochs:
                raise UserError(
                    f"{self.last} is a finished run ({done} epochs): --overwrite would replace it"
                )
            raise UserError(
                f"{self.last} is a run that stopped after epoch {done} of {epochs}: "
                "--resume auto continues it, --overwrite replaces it"
            )

    def remove(self) -> None:
        """Delete what a former run of this name left."""
        for path in (self.best, self.last, self.log):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.events, ignore_errors=True)

    def open_log(self, size: int = 0) -> None:
        """Log to the run's file too, behind its first size bytes: what a resumed run will repeat goes."""
        with open(self.log, "ab") as file:
            file.truncate(min(size, self.log.stat().st_size))
        self._handler = LogFile(self.log, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(self._handler)

    def log_size(self) -> int:
        """How many bytes the log has: what a checkpoint remembers of it."""
        return self.log.stat().st_size

    def save(self, checkpoint: dict, is_best: bool, selection: str) -> None:
        """Write `_last.t`, and before it `_best.t`: how it was chosen, and not the state of training."""
        if is_best:
            training = ("optimizer", "scaler", "log_size")
            best = {key: value for key, value in checkpoint.items() if key not in training}
            save_checkpoint(best | {"selection": selection}, self.best)
        save_checkpoint(checkpoint, self.last)


def open_run(args: argparse.Namespace, trial: int) -> tuple[argparse.Namespace, Run, dict | None]:
    """The settings, files and checkpoint (None at its start) of the run that the command line means.

    --resume FILE: the run of that checkpoint, in its folder. --resume auto, and each run of --trial all: the
    run of these settings, from its last checkpoint if there is one.
    """
    resume = args.resume or ("auto" if args.trial == "all" and not args.overwrite else None)
    checkpoint = None
    if resume not in (None, "auto"):
        checkpoint = load_checkpoint(resume)
        args = resume_settings(args, checkpoint, Path(resume))
        args.defaults = args.defaults | args.dataset_defaults(args.dataset)  # which the run's name leaves out
        if "model_path" not in args.typed:
            args.model_path = str(Path(resume).parent)
    else:
        args = argparse.Namespace(**vars(args) | {"trial": str(trial)})
    run = Run(run_name(vars(args), args.defaults), args.dataset, args.model_path, args.log_path)
    if resume == "auto" and run.last.exists():
        checkpoint = load_checkpoint(run.last)
        args = resume_settings(args, checkpoint, run.last)
    return args, run, checkpoint


def resume_settings(args: argparse.Namespace, checkpoint: dict, path: Path) -> argparse.Namespace:
    """The settings of a resumed run: its checkpoint's, and what was typed of those that may change.

    Raises UserError for a checkpoint that is not of this kind of run or a typed flag that contradicts it.
    """
    saved = checkpoint.get("args")
    whole = isinstance(saved, dict) and args.defaults.keys() <= saved.keys()
    if not whole or not checkpoint.keys() >= STATE_OF_TRAINING or not isinstance(checkpoint["epoch"], int):
        raise UserError(f"--resume {path} holds no state of training: resume from a run's _last.t")
    for key in args.typed:
        value = vars(args)[key]  # of --trial all: the one whose turn it is
        if key not in MAY_CHANGE and saved.get(key) != value:
            flag = "--" + key.replace("_", "-")
            raise UserError(f"{flag} {value} contradicts {path}, whose run has {saved.get(key)}")
    changed = {key: vars(args)[key] for key in MAY_CHANGE if key in args.typed}
    return argparse.Namespace(**vars(args) | saved | changed | {"resume": str(path)})


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    packages = {"torch": torch, "torchvision": torchvision, "numpy": np, "Pillow": PIL}
    return {"Python": platform.python_version()} | {k: str(p.__version__) for k, p in packages.items()}


def environment() -> list[str]:
    """What a result depends on besides the settings: command, versions, source revision."""
    revision = "unknown"
    if shutil.which("git"):
        command = ["git", "-C", Path(__file__).resolve().parent, "describe", "--always", "--dirty"]
        git = subprocess.run(command, capture_output=True, text=True, check=False)
        revision = git.stdout.strip() or revision
    return [
        f"command: {shlex.join(['python', *sys.argv])}",
        f"versions: {', '.join(map(' '.join, versions().items()))}; source {revision}",
    ]
