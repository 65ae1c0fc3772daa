"""From a command line to its runs: one, or all trials of RegDB; their beginning, their end, their errors."""

import argparse
import shlex
import signal
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from data_manager import DATASETS
from devices import Processes, select_device
from engine.files import Run, environment
from engine.settings import open_run, typed_settings
from engine.training import Progress, Training, build_test_images, build_training, draw_evaluation
from evaluation.embedding import TestImages
from utils import UserError, log, log_to_terminal

Fit = Callable[[Training, TestImages, Progress, Run], None]  # trains the remaining epochs of a run
Check = Callable[[Training, TestImages], None]  # tries whether that would work


def launch(command: list[str], fit: Fit, check: Check) -> int | None:
    """Train the run or runs of a command line, or check them.

    Returns:
        The exit status: 143 after SIGTERM, 130 after Ctrl-C, else None.

    Raises:
        UserError: bad input, or another process has failed.
    """
    typed, run, processes = typed_settings(command), None, Processes()
    log_to_terminal(quiet=processes.rank > 0, clock=True)
    processes.refuse_one_gpu(typed.get("gpu"))
    every_trial, results, told = typed.get("trial") == "all", [], {}
    try:
        for settings in trials_of(typed, processes) if every_trial else [typed]:
            args, run, checkpoint = open_run(settings, processes.world_size)
            if every_trial:
                log.info("RegDB, trial %s of 10", args.trial)
            results.append(train_run(args, run, checkpoint, processes, told, fit, check))
    except (KeyboardInterrupt, SystemExit) as stop:
        # Every finished epoch is saved already. The next Ctrl-C ends the process at once.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # An old run that is still there, because the new one has not begun, is still to be replaced.
        replaced = every_trial or (run is not None and run.begun)
        words = [word for word in sys.argv if word != "--overwrite" or not replaced]
        words += [] if "resume" in typed or "--overwrite" in words else ["--resume", "auto"]
        launcher = ["torchrun", "--nproc_per_node", str(processes.world_size)]
        words = [*(launcher if processes.world_size > 1 else ["python"]), *words]
        log.info("stopped; to continue: %s", shlex.join(words))
        return 130 if isinstance(stop, KeyboardInterrupt) else stop.code
    except RuntimeError as error:
        if processes.world_size > 1 and "by peer" in str(error):  # connection closed or reset
            raise UserError("another process has failed: see its error message") from error
        raise
    if every_trial and all(results):  # --check has none
        log.info("RegDB, mean of %d trials: %s", len(results), mean_of(results))
    processes.stop()
    return None


def trials_of(typed: dict[str, object], processes: Processes) -> list[dict[str, object]]:
    """The settings of each trial of --trial all, which is continued if it has begun.

    With --overwrite, what an earlier run left is removed now, for all trials: later, a trial that it had
    finished would count as done.
    """
    if typed.get("resume", "auto") != "auto":
        raise UserError(
            f"--resume {typed['resume']}: a file is one trial's run; --resume auto goes with --trial all"
        )
    numbers = map(str, DATASETS[typed.get("dataset", "sysu")].trials)
    trials = [
        typed | {"trial": number, "command": [*typed["command"], "--trial", number]} for number in numbers
    ]
    if "resume" in typed or "check" in typed:
        return trials
    if "overwrite" in typed:
        for settings in trials if processes.rank == 0 else ():
            _, run, _ = open_run(settings, processes.world_size)
            run.acquire()
            run.remove()
            run.release()
        if processes.world_size > 1:  # until then the others would find runs to continue
            processes.start(select_device(typed.get("gpu")))
            processes.barrier()
    fresh = ({key: own[key] for key in own if key != "overwrite"} for own in trials)
    return [settings | {"resume": "auto"} for settings in fresh]


def train_run(
    args: argparse.Namespace,
    run: Run,
    checkpoint: dict | None,
    processes: Processes,
    told: dict[str, str],
    fit: Fit,
    check: Check,
) -> dict[str, float] | None:
    """Train one run to its last epoch, or, with --check, only try whether that would work.

    Args:
        args: the run's settings.
        run: the run's files.
        checkpoint: where to continue; None: from the start.
        processes: the processes of the run; only process 0 writes files.
        told: what the terminal has been told of earlier runs, and is not told again; is added to.
        fit, check: see Fit and Check.

    Returns:
        The run's result, see Progress.result; None after --check.

    Raises:
        UserError: the run exists already, another process trains it, a file cannot be written, or the GPU has
            too little memory.
    """
    first, progress = processes.rank == 0, Progress.of(checkpoint)
    if first:
        run.refuse_unwritable()
        if not args.check:
            run.acquire()
    try:
        if checkpoint and progress.epoch >= args.epochs and progress.evaluated == progress.epoch:
            log.info("%s is finished: %d epochs", run.last, progress.epoch)
            if args.data_path != (began := checkpoint["args"].get("data_path")):  # moved, or another dataset
                log.warning("it was trained on what was in %s", began or Path("data", args.dataset))
            if first and not args.check:
                run.open_log({})
                run.publish(progress.history)
            return progress.result
        if checkpoint is None and first and not args.overwrite:
            run.refuse_to_overwrite(args.epochs)
        if args.test_identities is None:  # else build_training draws the split
            draw_evaluation(args)  # what cannot be evaluated is refused before images are read
        training = build_training(args, checkpoint, processes)
        test_images = build_test_images(training)
        header = environment() | training.describe() | {"run": str(run.last)}
        progress.made_with = {name: header[name] for name in ("command", "versions", "network", "device")}
        for name, words in header.items():
            if told.get(name) != words:
                log.info("%s: %s", name, words)
        told |= header
        if args.check:
            check(training, test_images)
            return None
        if first:
            if checkpoint is None:
                run.remove()
            run.open_log(header)
            run.publish(progress.history)
            if progress.best and not run.best.exists():  # renamed, or moved without it
                log.warning("%s is missing: epoch %d, the best so far", run.best, progress.best["epoch"])
        fit(training, test_images, progress, run)
        return progress.result
    except torch.OutOfMemoryError as error:
        sizes = f"--batch-size {args.batch_size} --num-pos {args.num_pos} or --test-batch {args.test_batch}"
        raise UserError(f"the GPU's memory is too small for {sizes} at {args.img_h}x{args.img_w}") from error
    except OSError as error:
        raise UserError(f"{error.filename or run.events}: {error.strerror or error}") from error
    finally:
        if first:
            run.release()


def mean_of(results: list[dict[str, float]]) -> str:
    """Mean and standard deviation of each metric, in per cent."""
    words = []
    for key, name in (("rank1", "rank-1"), ("mAP", "mAP"), ("mINP", "mINP")):
        values = [100 * result[key] for result in results]
        words.append(f"{name} {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}")
    return "  ".join(words)
