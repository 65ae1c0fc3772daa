"""The files of a training run: its name, lock, checkpoints, log, the log's numbers, and TensorBoard events.

<model_path>/<run>_best.t and <run>_last.t; <log_path>/<dataset>_log/<run>.log and <run>.jsonl;
<log_path>/vis_log/<run>/. The history of a run, a list with a record of each epoch, is part of `_last.t`.
The JSON lines are written anew from it after each checkpoint, and when a run is continued: so they hold each
epoch once, wherever the run was killed.
"""

import contextlib
import datetime
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from checkpoints import load_checkpoint, save_checkpoint
from utils import LOG_FORMAT, UserError, log, refuse_unwritable, versions, whole_file

# Settings that may change when a run is resumed; all others are fixed by its checkpoint.
MAY_CHANGE = {
    "data_path", "array_path", "model_path", "log_path", "epochs", "workers", "gpu", "cache", "test_batch",
    "name", "resume", "overwrite", "check", "test_identities",
}  # fmt: skip
IN_NAME = ("dataset", "num_pos", "batch_size", "lr", "seed", "trial")


def run_name(settings: Mapping[str, object], defaults: Mapping[str, object]) -> str:
    """A short name for a run: different settings give different names. Run appends RegDB's trial.

    It consists of dataset, P, B, rate and seed. If other fixed settings differ from their defaults, six hex
    digits of a hash over these follow; the log's first lines list them.
    """
    name = "{dataset}_p{num_pos}_n{batch_size}_lr{lr}_seed{seed}".format_map(settings)
    others = sorted(defaults.keys() - MAY_CHANGE - set(IN_NAME))
    changed = {key: settings[key] for key in others if settings[key] != defaults[key]}
    digits = hashlib.sha256(repr(changed).encode("utf-8", "surrogateescape")).hexdigest()[:6]
    return f"{name}_{digits}" if changed else name


class LogFile(logging.FileHandler):
    """A log file that ends the run with a UserError when it cannot be written."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise UserError with the file's name; logging calls this when it could not write a record."""
        error = sys.exc_info()[1]
        raise UserError(f"cannot write {self.baseFilename}: {getattr(error, 'strerror', error)}") from error


class Run:
    """The files of a run. Only one process may write them.

    Args:
        name: of the run: run_name, or --name.
        dataset: a key of DATASETS; names the folder of the log.
        model_path: folder of checkpoints.
        log_path: folder of logs and TensorBoard events.
        trial: RegDB's; None for other datasets.
    """

    def __init__(
        self,
        name: str,
        dataset: str,
        model_path: str | os.PathLike,
        log_path: str | os.PathLike,
        trial: str | int | None = None,
    ):
        self.name = re.sub(r"[^\w.+-]+", "-", name) + (f"_trial_{trial}" if trial is not None else "")
        self.best = Path(model_path) / f"{self.name}_best.t"
        self.last = Path(model_path) / f"{self.name}_last.t"
        self.log = Path(log_path, f"{dataset}_log", f"{self.name}.log")
        self.history = self.log.with_suffix(".jsonl")
        self.events = Path(log_path) / "vis_log" / self.name
        self._lock = FileLock(self.last.parent / f".{self.name}.lock")
        self._handler: logging.Handler | None = None
        self._logged: set[str] = set()  # lines about epochs that the log has
        self.begun = False  # whether this process has opened the run's log

    def refuse_unwritable(self) -> None:
        """Raise UserError if one of the run's folders cannot be written; leaves nothing behind."""
        for folder in (self.last.parent, self.log.parent, self.events.parent):
            refuse_unwritable(folder)

    def acquire(self) -> None:
        """Lock the run until this process ends; UserError if another process has locked it."""
        try:
            for folder in (self.last.parent, self.log.parent, self.events.parent):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            folder = self.last.parent
            raise UserError(f"another process is training {self.name} in {folder} right now") from error
        except OSError as error:
            raise UserError(f"cannot write {error.filename}: {error.strerror or error}") from error
        for path in (self.best, self.last):
            for leftover in path.parent.glob(f".{path.name}.*.part"):  # a process was killed while it wrote
                leftover.unlink(missing_ok=True)

    def release(self) -> None:
        """Release the lock and close the log."""
        if self._handler is not None:
            log.removeHandler(self._handler)
            with contextlib.suppress(OSError):  # a full disk was reported when it occurred
                self._handler.close()
        self._lock.release()

    def refuse_to_overwrite(self, epochs: int) -> None:
        """UserError if the run exists, saying whether it is finished: trained, and evaluated after that."""
        if self.last.exists():
            checkpoint = load_checkpoint(self.last)
            done = checkpoint.get("epoch", 0)
            if done >= epochs and checkpoint.get("evaluated", done) == done:
                raise UserError(
                    f"{self.last} is a finished run ({done} epochs): --overwrite would replace it"
                )
            raise UserError(
                f"{self.last} is a run that stopped after epoch {done} of {epochs}: "
                "--resume auto continues it, --overwrite replaces it"
            )
        if self.best.exists():
            raise UserError(
                f"{self.best} is of a run whose {self.last.name} is gone: --overwrite replaces it"
            )

    def remove(self) -> None:
        """Delete what an earlier run of this name left."""
        for path in (self.best, self.last, self.log, self.history):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.events, ignore_errors=True)

    def open_log(self, header: Mapping[str, str]) -> None:
        """Write a header {what: words} to the run's log file, and from now on all log messages."""
        self.begun = True
        self._handler = LogFile(self.log, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter(*LOG_FORMAT))
        self._logged = {line[20:] for line in self.log.read_text("utf-8", "replace").splitlines()}
        for name, words in header.items():
            self._handler.handle(log.makeRecord(log.name, logging.INFO, "", 0, "%s: %s", (name, words), None))
        log.addHandler(self._handler)

    def publish(self, history: list[dict]) -> None:
        """Write the JSON lines, and log what the log does not have yet of the last epoch.

        Call it when a run is continued; save does. Raises UserError: a file cannot be written.
        """
        if not history:  # of a run that begins, or that an earlier version finished
            return
        with whole_file(self.history) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in history), encoding="utf-8")
        for line in lines_of(history[-1]):
            if line not in self._logged:
                log.info("%s", line)
                self._logged.add(line)

    def save(self, checkpoint: dict, is_best: bool = False, selection: str = "") -> None:
        """Write `_last.t`, before it `_best.t` if this epoch is the best so far; then publish the history.

        Args:
            checkpoint: Training.state() and Progress.state().
            is_best: write `_best.t` too, without what only training needs.
            selection: how the best epoch is chosen, recorded in `_best.t`.

        Raises:
            UserError: a file cannot be written.
        """
        if is_best:
            training = ("loss", "optimizer", "scaler", "history")
            best = {key: value for key, value in checkpoint.items() if key not in training}
            save_checkpoint(best | {"selection": selection}, self.best)
        save_checkpoint(checkpoint, self.last)
        self.publish(checkpoint["history"])


def lines_of(record: Mapping) -> list[str]:
    """What the log says of an epoch: of its training, and of its evaluation, where there was one."""
    lines = []
    if "loss" in record:
        total, *terms = ((name, f"{value:.3f}") for name, value in record["loss"].items())
        seconds = record["seconds"]
        waiting = 100 * seconds["waiting"] / seconds["steps"]
        left = datetime.timedelta(seconds=round(seconds["left"]))
        lines.append(
            f"epoch {record['epoch']}/{record['epochs']}: "
            f"loss {total[1]} ({', '.join(map(' '.join, terms))}), rate {record['rate']:.2e}; "
            f"memory {seconds['memory']:.1f} s, steps {seconds['steps']:.1f} s, "
            f"{record['images_per_second']:.0f} images/s, waiting for input {waiting:.1f} %; {left} left"
        )
    if evaluation := record.get("evaluation"):
        words = "  ".join(f"{name} {100 * value:.2f}" for name, value in evaluation["metrics"].items())
        best = "  (best so far)" if evaluation["best"] else ""
        lines.append(f"  {evaluation['protocol']}, after epoch {record['epoch']}: {words}{best}")
    return lines


def environment() -> dict[str, str]:
    """What a result depends on besides the settings: command; versions and source revision."""
    revision = "unknown"
    if shutil.which("git"):
        command = ["git", "-C", Path(__file__).resolve().parent, "describe", "--always", "--dirty"]
        git = subprocess.run(command, capture_output=True, text=True, check=False)
        revision = git.stdout.strip() or revision
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": f"{', '.join(map(' '.join, versions().items()))}; source {revision}",
    }
