"""Reports of test.py beside the numbers that the paper reports, in Markdown."""

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from evaluation.protocols import Protocol

PAPER = {  # (dataset, mode, shot): rank-1, mAP in per cent; docs/method.md, section 8
    ("sysu", "all", 1): (74.77, 72.01),
    ("sysu", "indoor", 1): (83.48, 86.06),
    ("regdb", "visible-to-infrared", 1): (93.15, 88.32),
    ("regdb", "infrared-to-visible", 1): (93.42, 87.95),
}
HEADS = ("protocol", "rank-1", "mAP", "paper's rank-1", "paper's mAP", "Δ rank-1", "Δ mAP")


def spread(values: list[float]) -> str:
    """Mean, and of several seeds ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def markdown(rows: list[tuple[object, ...]]) -> str:
    """A table, heads first."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def tables(reports: Sequence[Path], stem: str) -> list[str]:
    """Paragraphs on a dataset's models with one stem: results beside the paper's, each trial, settings.

    reports: files of test.py's --json, with seed<N> in their names; those that are missing are left out.
    """
    rows, trials, settings = {}, [], {}
    for path in filter(Path.exists, reports):
        report = json.loads(path.read_text(encoding="utf-8"))
        settings, seed = report["checkpoints"][0], re.search(r"seed(\d+)", path.name)[1]
        for row in report["results"]:
            key = tuple(row[k] for k in ("dataset", "mode", "shot", "galleries"))
            rows.setdefault(key, []).append((100 * row["mean"]["cmc"][0], 100 * row["mean"]["mAP"]))
            own = {t: f"{100 * of['cmc'][0]:.2f} / {100 * of['mAP']:.2f}" for t, of in row["trials"].items()}
            trials.append((Protocol(*key).row, seed, own))
    if not rows:
        return [f"Stem `{stem}`: not measured."]
    lines = [HEADS]
    for key, found in rows.items():
        ours, paper = list(zip(*found, strict=True)), PAPER.get(key[:3])
        gaps = [f"{statistics.mean(o) - p:+.2f}" for o, p in zip(ours, paper, strict=True)] if paper else "--"
        lines.append((Protocol(*key).row, *map(spread, ours), *(paper or "--"), *gaps))
    heads = ("protocol", "seed", *trials[0][2])
    return [
        f"Stem `{stem}`, per cent. Tested: {settings['selection']}.",
        markdown(lines),
        "Rank-1 / mAP of each trial:",
        markdown([heads, *((row, seed, *own.values()) for row, seed, own in trials)]),
        "Settings: " + ", ".join(f"{k} {v}" for k, v in settings["args"].items() if k != "command") + ".",
    ]
