"""What a run's log tells of it: the command, the versions, and its curves."""

import re
from pathlib import Path
from typing import NamedTuple

from utils import UserError

EPOCH = re.compile(r"\bepoch (\d+)/\d+: loss ([\d.]+) \(([^)]*)\)")
TERM = re.compile(r"([\w-]+) ([\d.]+)")
NUMBERS = {  # what else stands in an epoch's line
    "rate": re.compile(r"\brate ([\d.e+-]+\d)"),
    "images/s": re.compile(r"([\d.]+) images/s"),
}
RESULT = re.compile(r"(rank-1|mAP|mINP) ([\d.]+)")
FACT = re.compile(r"\b(command|versions|device|network): (.+)")

Curve = dict[int, float]  # epoch, from 1 -> value


class Log(NamedTuple):
    """curves: {"loss", a loss term, "rate", "images/s", "rank-1", "mAP", "mINP" (per cent): Curve}.

    facts: (name, text) of command, versions, network and device in the log's order, each once.
    """

    curves: dict[str, Curve]
    facts: list[tuple[str, str]]


def log_file(checkpoint: Path, saved: dict[str, object], log_path: str | None = None) -> Path | None:
    """Where the log of a checkpoint's run is: log_path, else its own --log-path as seen from here or from
    the checkpoint's folder or the one above; None if it is in none of them.

    Raises UserError if log_path was given and does not hold it.
    """
    name = re.sub(r"_(best|last)$", "", checkpoint.stem)
    below = Path(f"{saved.get('dataset', 'sysu')}_log", f"{name}.log")
    own = str(saved.get("log_path", "log"))
    folders = [Path(own), checkpoint.parent / own, checkpoint.parent.parent / own, checkpoint.parent / "log"]
    found = next(
        (folder / below for folder in ([log_path] if log_path else folders) if Path(folder, below).is_file()),
        None,
    )
    if log_path and not found:
        raise UserError(f"--log-path {log_path}: no log at {Path(log_path, below)}")
    return found


def read_log(path: Path) -> Log:
    """Read a run's log; of an epoch that was run again the last line counts. Lines of no known kind are
    passed over. UserError if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    curves: dict[str, Curve] = {}
    facts: dict[tuple[str, str], None] = {}
    epoch = 0
    for line in lines:
        if match := EPOCH.search(line):
            epoch = int(match[1])
            values = {"loss": match[2]} | dict(TERM.findall(match[3]))
            found = ((name, pattern.search(line)) for name, pattern in NUMBERS.items())
            values |= {name: match[1] for name, match in found if match}
        elif "rank-1" in line and epoch:
            values = dict(RESULT.findall(line)) if "mAP" in line else {}
        else:
            values = {}
            if match := FACT.search(line):
                facts[match[1], match[2]] = None
        for name, value in values.items():
            curves.setdefault(name, {})[epoch] = float(value)
    return Log(curves, list(facts))
