"""See a trained network: one HTML page of results, rankings and curves, and its figures as files:

    python -m tools.report --resume save_model/RUN_best.t --output report
    python -m tools.report --resume save_model/A_best.t save_model/B_best.t --output report
    python -m tools.report --resume save_model/RUN_best.t --output DIR --figures cmc ranking --queries worst

DIR/index.html opens from the disk and needs no network; each figure lies beside it as PNG and PDF.
"""

import argparse
import re
import sys
from pathlib import Path

import torch

import data_manager
from checkpoints import load_checkpoint
from data_manager import DATASETS
from devices import Processes, autocast_dtype, select_device
from evaluation import Evaluation, Protocol
from flags import saved_settings
from model import build_model
from results.evaluated import Evaluated
from results.learning import log_file, read_log
from results.report import FIGURES, Findings, write_figures, write_page
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
    what.add_argument("--mode", nargs="+", metavar="MODE", help="as test.py has it (all; both ways)")
    what.add_argument("--shot", type=int, nargs="+", choices=(1, 10), default=[1], help="gallery of sysu (1)")
    what.add_argument(
        "--galleries", choices=("seeded", "published"), default="seeded", help="sysu's (seeded)"
    )
    what.add_argument(
        "--trial", default="all", metavar="N", help="one trial, or all; rankings: the first (all)"
    )
    what.add_argument("--allow-short", action="store_true", help="take galleries with too few images")
    what.add_argument(
        "--rerank", choices=("k-reciprocal",), help="show re-ranked results beside the plain ones"
    )
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


def trial_files(path: Path, dataset: str, trial: str) -> dict[int, Path]:
    """The checkpoint of each trial, {trial: file}. RegDB has one for each: path names any of them, or has
    {trial} in its name, and its siblings count too, as test.py has it."""
    facts = DATASETS[dataset]
    if trial != "all" and trial not in map(str, facts.trials):
        raise UserError(
            f"--trial {trial}: those of {facts.title} are {facts.trials[0]} to {facts.trials[-1]}, or all"
        )
    wanted = list(facts.trials) if trial == "all" else [int(trial)]
    if dataset != "regdb":
        return dict.fromkeys(wanted, path)
    pattern = re.sub(r"_trial_\d+(?=_)", "_trial_{trial}", path.name)
    files = {t: path.with_name(pattern.replace("{trial}", str(t))) for t in wanted}
    files = {t: file for t, file in files.items() if file.is_file()}
    if not files:
        raise UserError(f"--resume {path}: no checkpoint of the trials that --trial {trial} asks for")
    if "{trial}" not in pattern and len(files) > 1:
        raise UserError(f"--resume {path}: of which trial of RegDB? Say so with --trial N")
    return files


def labels(paths: list[Path]) -> list[str]:
    """A name for each checkpoint: of the parts of its path those in which the paths differ."""
    parts = [path.absolute().with_suffix("").parts for path in paths]
    names = [those[-1] for those in parts]
    if len(set(names)) == 1 and len(paths) > 1:
        depth = next((k for k in range(2, min(map(len, parts)) + 1) if len({p[-k] for p in parts}) > 1), 1)
        names = [those[-depth] for those in parts]
    if len(set(names)) < len(paths):
        raise UserError("--resume: the same checkpoint twice")
    return names


def evaluate(args: argparse.Namespace, path: Path, label: str, root: Path, device: torch.device) -> Evaluated:
    """Evaluate a checkpoint, or RegDB's of each trial, as test.py does, and keep what the report shows."""
    files = trial_files(path, args.dataset, args.trial)
    shared = len(set(files.values())) == 1 and args.dataset != "regdb"
    trial, file = next(iter(files.items()))
    checkpoint = load_checkpoint(file)
    saved = saved_settings(checkpoint, file)
    facts = DATASETS[args.dataset]
    modes = args.mode or (["all"] if args.dataset == "sysu" else list(facts.modes))
    protocols = [
        Protocol(args.dataset, mode, shot, args.galleries)
        for mode in dict.fromkeys(modes)
        for shot in dict.fromkeys(args.shot)
    ]
    height, width = (
        args.img_h or saved.get("img_h", facts.height),
        args.img_w or saved.get("img_w", facts.width),
    )
    evaluation = Evaluation(root, protocols, list(files), height, width, allow_short=args.allow_short)
    dtype = autocast_dtype(args.amp or saved.get("amp", "auto"), device)
    results, kept = {}, None
    for t in [None] if shared else files:
        loaded = checkpoint if t in (None, trial) else load_checkpoint(files[t])
        own = saved_settings(loaded, files.get(t, file))
        if t is not None and own.get("dataset") == "regdb" and str(own.get("trial")) != str(t):
            raise UserError(f"{files[t]} was trained on trial {own.get('trial')}, not on trial {t}")
        model = build_model(loaded, files.get(t, file)).to(device, memory_format=torch.channels_last)
        features = evaluation.features(model, device, dtype, args.test_batch, args.workers, Processes(), t)
        kept = kept or (model, features)
        for rerank in dict.fromkeys((None, args.rerank)):
            for protocol, metrics in evaluation.score(features, rerank, t).items():
                results.setdefault((protocol, rerank), []).extend(metrics)
    told = {key: value for key, value in checkpoint.items() if key in ("epoch", "selection", "data")}
    logged = log_file(file, saved, args.log_path)
    run_log = read_log(logged) if logged else None
    return Evaluated(label, file, told, saved, run_log, evaluation, *kept, trial, shared, results)


def main(args: argparse.Namespace) -> None:
    """Evaluate, then write the page, or the figures that were asked for."""
    log_to_terminal(stream=sys.stderr)
    folder, paths = Path(args.output), list(map(Path, args.resume))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: a file, and not a folder")
    if args.dataset is None:
        first = "regdb" if "{trial}" in paths[0].name else None
        args.dataset = first or saved_settings(load_checkpoint(paths[0]), paths[0]).get("dataset", "sysu")
    root = data_manager.dataset_root(args.dataset, args.data_path)
    device = select_device(args.gpu)
    try:
        named = zip(paths, labels(paths), strict=True)
        findings = Findings([evaluate(args, path, name, root, device) for path, name in named], args.queries)
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is too small for --test-batch {args.test_batch}") from error
    if args.figures:
        drawn = write_figures(findings, dict.fromkeys(args.figures), folder)
        if missing := [name for name in args.figures if name not in drawn]:
            raise UserError(
                f"--figures {missing[0]}: no log of these runs was found; --log-path names its folder"
            )
        log.info("wrote %s as PNG and PDF in %s", ", ".join(drawn), folder)
        return
    facts = [tuple(line.split(": ", 1)) for line in environment()]
    write_page(findings, folder, facts, args.workers)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args)
