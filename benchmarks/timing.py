"""Measure two implementations alternately, so that other load on the machine affects both."""

import contextlib
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def row(
    work: str, seconds: tuple[float | None, float], bound: object, note: str, met: bool | None = None
) -> dict:
    """A row of the table.

    Args:
        work: what is measured.
        seconds: of (baseline, ours); the first is None where there is no baseline.
        bound: a minimum ratio, `>= N x`, `< N s`, or other words, for which met decides; None: no bound.
        note: what else is known.
        met: whether the bound is met, where its words do not say.
    """
    baseline_s, ours_s = seconds
    ratio = baseline_s / ours_s if baseline_s else None
    row = {"work": work, "baseline_s": baseline_s, "ours_s": ours_s, "ratio": ratio, "bound": bound}
    return row | {"note": note} | ({} if met is None else {"met": met})


def compare(baseline: Callable[[], object], ours: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Return the median seconds of (baseline, ours), run alternately, repeats times, after one run of ours.

    On a GPU the callables must wait for it (torch.cuda.synchronize) before they return.
    """
    ours()  # the first call pays for threads, allocations and lazy imports
    seconds = alternate(baseline, ours, repeats)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def alternate(
    baseline: Callable[[], object], ours: Callable[[], object], repeats: int
) -> tuple[list[float], list[float]]:
    """Return the seconds of every run of (baseline, ours), run alternately."""
    seconds = [], []
    for _ in range(repeats):
        for function, taken in zip((baseline, ours), seconds, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return seconds


def wait_for(device: torch.device | str) -> None:
    """Wait until a GPU has finished its work; on the CPU, return at once."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def run_alone(prepare: Callable[..., Callable[[], object]], *args) -> tuple[float, int]:
    """Return (seconds, bytes) of the callable that prepare(*args) returns, called in a new process.

    bytes: the peak increase in resident memory during the call, after prepare (Linux only). With
    functools.partial as prepare, what the call imports is counted too.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, prepare, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"{prepare} failed in its own process") from None
    finally:
        process.join()


def run_on_gpu(prepare: Callable[..., Callable[[], object]], *args) -> tuple[float, int]:
    """Return (seconds, bytes of GPU memory beyond what prepare took) of the second call of prepare(*args)."""
    function = prepare(*args)
    function()  # loads kernels
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() - before


def _measure(sender, prepare: Callable[..., Callable[[], object]], args: tuple) -> None:
    function = prepare(*args)
    # Resets the peak. Where this is not allowed, the increase is above the peak of prepare.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before, start = _peak(), time.perf_counter()
    function()
    sender.send((time.perf_counter() - start, _peak() - before))


def _peak() -> int:
    """Peak resident bytes; getrusage would include the parent's, from before exec."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024
