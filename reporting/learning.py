"""What the history of a run tells: what it was made with, and its curves."""

import json
import re
from pathlib import Path
from typing import NamedTuple

from utils import UserError

Curve = dict[int, float]  # epoch, from 1 -> value


class History(NamedTuple):
    """What a run did.

    curves: {"loss", a loss term, "rate", "images/s", "rank-1", "mAP", "mINP" (per cent): Curve}.
    facts: (name, text) of command, versions, network and device in the run's order, each once.
    """

    curves: dict[str, Curve]
    facts: list[tuple[str, str]]


def history_file(checkpoint: Path, saved: dict[str, object], log_path: str | None = None) -> Path | None:
    """Find the history of a checkpoint's run, <log_path>/<dataset>_log/<run>.jsonl.

    Args:
        checkpoint: the checkpoint's file.
        saved: the settings in it.
        log_path: where to look; None: the run's own --log-path, as seen from here, or from the checkpoint's
            folder or the one above.

    Returns:
        The file; None where there is none, as of runs of earlier versions.

    Raises:
        UserError: log_path was given and does not hold it.
    """
    name = re.sub(r"_(best|last)$", "", checkpoint.stem)
    below = Path(f"{saved.get('dataset', 'sysu')}_log", f"{name}.jsonl")
    own = str(saved.get("log_path", "log"))
    folders = [Path(own), checkpoint.parent / own, checkpoint.parent.parent / own, checkpoint.parent / "log"]
    places = [Path(folder, below) for folder in ([log_path] if log_path else folders)]
    found = next((place for place in places if place.is_file()), None)
    if log_path and not found:
        raise UserError(f"--log-path {log_path}: no history at {places[0]}")
    return found


def read_history(path: Path) -> History:
    """Read the records of a run's epochs, a line of JSON each, as engine/files.py writes them.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    curves: dict[str, Curve] = {}
    facts: dict[tuple[str, str], None] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            facts |= dict.fromkeys(record["made_with"].items())
            values = {}
            if "loss" in record:
                values = {"loss": record["loss"].pop("total"), **record["loss"]}
                values |= {"rate": record["rate"], "images/s": record["images_per_second"]}
            metrics = record["evaluation"]["metrics"] if "evaluation" in record else {}
            values |= {name: 100 * metrics[name] for name in ("rank-1", "mAP", "mINP") if name in metrics}
            for name, value in values.items():
                curves.setdefault(name, {})[record["epoch"]] = float(value)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no history of a run: {error!r}") from error
    return History(curves, list(facts))
