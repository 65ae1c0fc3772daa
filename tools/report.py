"""See a trained network: one HTML page of results, rankings and curves, and its figures as files:

    python -m tools.report --resume save_model/RUN_best.t --output report
    python -m tools.report --resume save_model/A_best.t save_model/B_best.t --output report
    python -m tools.report --resume save_model/RUN_best.t --output DIR --figures cmc ranking --queries worst

DIR/index.html opens from the disk and needs no network; each figure lies beside it as PNG and PDF.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import torch

import data_manager
from checkpoints import load_checkpoint
from data_manager import DATASETS
from devices import Processes, autocast_dtype, select_device
from evaluation import Evaluation, Protocol, mode_name, saved_settings
from model import build_model
from reranking import RERANKING
from results.evaluated import Evaluated, labels
from results.learning import log_file, read_log
from results.report import FIGURES, MISSING, Findings, write_figures, write_page
from runs import environment
from utils import Parser, UserError, data_flags, device_flags, log, log_to_terminal, run_script


def get_args_parser() -> Parser:
    """The command line; what is not given comes from each checkpoint or the dataset."""
    parser = Parser(
        description="Make a page of what checkpoints do, and figures. Defaults stand in brackets; those of "
        "--dataset, --img-h, --img-w and --amp are what the checkpoints were trained with.",
        parents=[data_flags(), device_flags()],
    )
    parser.set_defaults(amp=None)
    what = parser.add_argument_group("what is shown")
    what.add_argument(
        "--resume", required=True, nargs="+", metavar="FILE",
        help="checkpoints to compare; rankings, embedding and activations are of the first",
    )  # fmt: skip
    what.add_argument("--dataset", choices=DATASETS, help="(the first checkpoint's, or sysu)")
    what.add_argument(
        "--mode", type=mode_name, nargs="+", metavar="MODE", help="as test.py has it (all; both ways)"
    )
    what.add_argument("--shot", type=int, nargs="+", choices=(1, 10), default=[1], help="gallery of sysu (1)")
    what.add_argument(
        "--galleries", choices=("seeded", "published"), default="seeded", help="sysu's (seeded)"
    )
    what.add_argument(
        "--trial", default="all", metavar="N", help="one trial, or all; rankings: the first (all)"
    )
    what.add_argument("--allow-short", action="store_true", help="take galleries with too few images")
    what.add_argument(
        "--ignore-same-camera", action="store_true", help="own images: by LLCM's rules, as test.py has it"
    )
    what.add_argument("--rerank", nargs="+", choices=RERANKING, default=[], help="show re-ranked results too")
    what.add_argument("--log-path", metavar="DIR", help="folder of the runs' logs (where they were written)")
    outputs = parser.add_argument_group("outputs")
    outputs.add_argument("--output", required=True, metavar="DIR", help="for index.html and the figures")
    outputs.add_argument(
        "--figures", nargs="+", choices=FIGURES, metavar="NAME",
        help=f"only these figures, and no page: {', '.join(FIGURES)}",
    )  # fmt: skip
    outputs.add_argument(
        "--queries", nargs="+", default=["random"], metavar="WHICH",
        help="of the ranking figure: worst, best, random, or pids (random)",
    )  # fmt: skip
    return parser


def siblings(path: Path) -> dict[int, Path]:
    """The checkpoints {trial: file} that are there of path's run: RegDB has a model for each trial, and path
    names any of them, or has {trial} in its name, as test.py has it. None for a name without a trial."""
    pattern = re.sub(r"_trial_\d+(?=_)", "_trial_{trial}", path.name)
    files = {t: path.with_name(pattern.replace("{trial}", str(t))) for t in DATASETS["regdb"].trials}
    return {t: file for t, file in files.items() if "{trial}" in pattern and file.is_file()}


def trial_files(path: Path, dataset: str, wanted: str, saved: dict[str, object]) -> dict[int, Path]:
    """The checkpoint of each trial that is asked for, {trial: file}; UserError if there is none.

    A model of one RegDB trial is tested on that one alone: the others' test images were trained on.
    """
    facts = DATASETS[dataset]
    if wanted != "all" and wanted not in map(str, facts.trials):
        first, last = facts.trials[0], facts.trials[-1]
        raise UserError(
            f"--trial {wanted}: {facts.title} has the trials {first} to {last}; choose one, or all"
        )
    trials = list(facts.trials) if wanted == "all" else [int(wanted)]
    if dataset != "regdb" or saved.get("dataset", "regdb") != "regdb":
        return dict.fromkeys(trials, path)
    if not saved and wanted == "all":
        raise UserError(f"--resume {path} does not record its trial: set --trial N")
    files = siblings(path)
    if not files:  # its name tells no trial
        files = {int(saved.get("trial", wanted)): path}
        trials = list(files) if wanted == "all" else trials
    if missing := [str(t) for t in trials if t not in files]:
        log.warning("%s: missing, and so left out of every mean: trial %s", path, ", ".join(missing))
    if not (files := {t: files[t] for t in trials if t in files}):
        raise UserError(f"--resume {path}: no checkpoint of trial {wanted}")
    return files


def evaluate_checkpoint(
    args: argparse.Namespace, path: Path, label: str, device: torch.device, expected: str | None
) -> Evaluated:
    """Evaluate a checkpoint, or RegDB's of each trial, as test.py does, and keep what the report shows.

    expected: the dataset that those before it were evaluated on; None for the first.
    """
    read = next(iter(siblings(path).values()), path) if "{trial}" in path.name else path
    loaded = {read: load_checkpoint(read)}
    saved = saved_settings(loaded[read], read)
    dataset = args.dataset or saved.get("dataset", "sysu")
    if expected not in (None, dataset):
        titles = DATASETS[dataset].title, DATASETS[expected].title
        raise UserError(
            f"--resume {path}: trained on {titles[0]}, the first on {titles[1]}: which --dataset?"
        )
    facts, root = DATASETS[dataset], data_manager.dataset_root(dataset, args.data_path)
    files = trial_files(path, dataset, args.trial, saved)
    modes = args.mode or (["all"] if dataset == "sysu" else list(facts.modes))
    shots = dict.fromkeys(args.shot)
    if args.ignore_same_camera and dataset != "folder":
        raise UserError(f"--ignore-same-camera is for own images; {facts.title} has its own rule")
    protocols = [
        Protocol(dataset, mode, shot, args.galleries, ignore_same_camera=args.ignore_same_camera)
        for mode in dict.fromkeys(modes) for shot in shots
    ]  # fmt: skip
    height, width = (
        args.img_h or saved.get("img_h", facts.height),
        args.img_w or saved.get("img_w", facts.width),
    )
    evaluation = Evaluation(root, protocols, list(files), height, width, allow_short=args.allow_short)
    dtype = autocast_dtype(args.amp or saved.get("amp", "auto"), device)
    shared = len(set(files.values())) == 1
    results, kept = {}, None
    for trial in [None] if shared else files:
        key = next(iter(files)) if trial is None else trial
        file = files[key]
        checkpoint = loaded.pop(file, None) or load_checkpoint(file)
        own = saved_settings(checkpoint, file)
        if own.get("dataset") == dataset == "regdb" and own["trial"] != str(key):
            raise UserError(f"{file} was trained on trial {own['trial']}, not on trial {key}")
        evaluation.pixel_range = own.get("pixel_range")
        model = build_model(checkpoint, file).to(device, memory_format=torch.channels_last)
        features = evaluation.features(
            model, device, dtype, args.test_batch, args.workers, Processes(), trial
        )
        if kept is None:
            told = {key: checkpoint[key] for key in ("epoch", "selection") if key in checkpoint}
            kept = {"path": file, "checkpoint": told, "saved": own, "model": model, "features": features}
        for rerank in dict.fromkeys((None, *args.rerank)):
            for protocol, metrics in evaluation.score(features, rerank, trial).items():
                results.setdefault((protocol, rerank), []).extend(metrics)
    logged = log_file(kept["path"], kept["saved"], args.log_path)
    return Evaluated(
        **kept, label=label, log=read_log(logged) if logged else None, evaluation=evaluation,
        trial=next(iter(files)), shared=shared, results=results,
    )  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Evaluate, then write the page, or the figures that were asked for."""
    log_to_terminal(stream=sys.stderr)
    Processes().refuse_several()
    folder, paths = Path(args.output), list(map(Path, args.resume))
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        reason = "cannot be written" if nearest.is_dir() else "is a file, and not a folder"
        raise UserError(f"--output {folder}: {nearest} {reason}")
    names, device = labels(paths), select_device(args.gpu)
    try:
        everyone: list[Evaluated] = []
        for path, name in zip(paths, names, strict=True):
            expected = everyone[0].dataset if everyone else None
            everyone.append(evaluate_checkpoint(args, path, name, device, expected))
        findings = Findings(everyone, args.queries)
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is too small for --test-batch {args.test_batch}") from error
    if args.figures:
        drawn = write_figures(findings, dict.fromkeys(args.figures), folder)
        for name in args.figures:
            if name not in drawn:
                raise UserError(f"--figures {name}: {MISSING[name]}")
        log.info("wrote %s as PNG and PDF in %s", ", ".join(drawn), folder)
    else:
        write_page(findings, folder, [tuple(line.split(": ", 1)) for line in environment()], args.workers)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args)
