"""Run the benchmarks and print one table:

    python -m benchmarks
    python -m benchmarks --device cuda --format markdown
    python -m benchmarks --quick --only training_step extraction

Seconds are medians, where a loop takes long of one run. A baseline and ours run alternately in one process;
both are checked to give the same.
"""

import argparse
import datetime
import gc
import importlib
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from utils import Parser, UserError, run_script, versions

NAMES = (
    "evaluation", "reranking", "memory_and_loss", "training_step", "processes", "extraction", "embedding",
    "search", "start_up", "preprocessing",
)  # fmt: skip
COLUMNS = ("work", "baseline", "ours", "ratio", "target", "met", "note")


def get_args_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m benchmarks", description="Measure this project's speed; one table.")
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    add("--quick", action="store_true", help="take tiny sizes, to check that everything runs")
    only = f"measure only some of {', '.join(NAMES)} (default: all)"
    add("--only", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=only)
    add("--format", choices=("text", "markdown"), default="text", help="format of the table")
    return parser


def machine(device: str) -> str:
    """The hardware, date and versions in one line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (model := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        cpu = model[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{cpu}, {cores} cores", f"{torch.get_num_threads()} threads"]
    if device == "cuda":
        parts.append(torch.cuda.get_device_name())
    if hasattr(os, "getloadavg"):  # other work at the same time
        parts.append(f"load {os.getloadavg()[1]:.1f}")
    parts += [str(datetime.date.today()), ", ".join(map(" ".join, versions().items()))]
    return "; ".join(parts)


def target_met(row: dict) -> bool | None:
    """Whether a row meets its bound (a minimum ratio, `>= N x` or `< N s`, or `met`); None: no bound."""
    bound = row["bound"]
    if "met" in row or bound is None:
        return row.get("met")
    if isinstance(bound, float | int):
        return row["ratio"] >= bound
    if match := re.match(r">= ([\d.]+) x", bound):
        return row["ratio"] >= float(match[1])
    if match := re.match(r"< ([\d.]+) s", bound):
        return row["ours_s"] < float(match[1])
    raise ValueError(f"{row['work']}: a bound that is neither a ratio nor seconds needs `met`: {bound!r}")


def duration(seconds: float | None) -> str:
    """Seconds with three digits and a unit."""
    if seconds is None:
        return "–"
    for unit, factor in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            break
    value = seconds * factor
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def cells(row: dict) -> list[str]:
    """A row of the table, in the order of COLUMNS."""
    bound, met = row["bound"], target_met(row)
    target = "–" if bound is None else f">= {bound:g} x" if isinstance(bound, float | int) else bound
    ratio = "–" if row["ratio"] is None else f"{row['ratio']:.{2 if row['ratio'] < 10 else 0}f} x"
    times = duration(row["baseline_s"]), duration(row["ours_s"])
    return [row["work"], *times, ratio, target, {None: "–", True: "yes", False: "no"}[met], row["note"]]


def table(rows: Sequence[dict], style: str) -> str:
    """All rows, aligned as text or as Markdown."""
    lines = [list(COLUMNS), *map(cells, rows)]
    if style == "markdown":
        lines.insert(1, ["---", "---:", "---:", "---:", "---:", "---", "---"])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main(args: argparse.Namespace) -> None:
    """Run the benchmarks in the table's order, then print the table."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here")
    rows, start = [], time.perf_counter()
    try:
        for name in NAMES:
            if name in args.only:
                print(f"{time.perf_counter() - start:5.0f} s  {name} ...", file=sys.stderr, flush=True)
                for row in importlib.import_module(f"benchmarks.{name}").run(args.device, args.quick):
                    rows.append(row)
                gc.collect()
                torch.cuda.empty_cache()  # for the process of start_up
    finally:  # print what was measured, row by row, even if a benchmark fails or is stopped
        heading = f"{machine(args.device)}; {time.perf_counter() - start:.0f} s in all"
        print(("### " if args.format == "markdown" else "") + heading + "\n")
        print(table(rows, args.format))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args)
