"""Evaluate checkpoints: tables, JSON, features:

    python test.py --mode all --resume save_model/RUN_best.t --gpu 0 --dataset sysu
    python test.py --mode all indoor --shot 1 10 --resume save_model/RUN_best.t --rerank k-reciprocal --flip
    python test.py --dataset regdb --resume 'save_model/RUN_trial_{trial}_best.t'

The table goes to standard output, everything else to standard error.
"""

if __name__ == "__main__":  # before torch is imported, which takes long from a slow disk
    from utils import refuse_missing_checkpoints

    refuse_missing_checkpoints()

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import data_manager
from devices import Processes, select_device
from evaluation.exports import save_features, save_json, save_mat
from evaluation.models import Model, build_evaluation, embed_models, evaluation_flags, parse_and_find
from evaluation.protocols import Evaluation, Features
from evaluation.runtimes import RUNTIMES
from evaluation.tables import STYLES, Results, heading, results_table, table_rows
from utils import Parser, UserError, log, log_to_terminal, refuse_unwritable, run_script


def get_args_parser() -> Parser:
    """The command line; other settings come from the checkpoint or the dataset."""
    parser = Parser(
        prog="test.py",
        description="Evaluate a checkpoint. Defaults are in brackets; --dataset, --img-h, --img-w and --amp "
        "default to what the checkpoint was trained with.",
        parents=[evaluation_flags()],
    )
    add = parser.add_argument
    add(
        "--resume", required=True, metavar="FILE",
        help="a checkpoint, ours or that of others; RegDB: of one trial, or with {trial} in its name",
    )  # fmt: skip
    add("--runtime", choices=RUNTIMES, default="torch", help="what computes the features, on the CPU (torch)")
    add("--flip", action="store_true", help="add rows with the mean feature of an image and its mirror")
    add = parser.add_argument_group("outputs").add_argument
    add("--format", choices=STYLES, default="text", help="format of the table (text)")
    add("--json", metavar="FILE", help="settings, metrics of every trial and their mean")
    add("--save-features", metavar="FILE.npz", help="features, paths, pids and camids")
    add("--save-mat", metavar="DIR", help="features for the SYSU-MM01 authors' MATLAB evaluation")
    return parser


def refuse_wrong_outputs(args: argparse.Namespace, models: Sequence[Model]) -> None:
    """Raise UserError, before long work, for an output that does not fit or cannot be written."""
    if args.save_mat and args.dataset != "sysu":
        title = data_manager.DATASETS[args.dataset].title
        raise UserError(f"--save-mat is for SYSU-MM01's MATLAB evaluation, not for {title}")
    if len(models) > 1 and args.save_features:
        raise UserError("--save-features: RegDB has a model per trial: choose one with --trial N")
    for path in filter(None, (args.json, args.save_features)):
        if Path(path).is_dir():
            raise UserError(f"cannot write {path}: it is a folder")
        refuse_unwritable(Path(path).parent)
    if args.save_mat:
        refuse_unwritable(args.save_mat)


def score_rows(
    args: argparse.Namespace, models: Sequence[Model], evaluation: Evaluation, device: torch.device
) -> tuple[Results, Features]:
    """The metrics of every row of the table, plain ones first, and the plain features of the last model."""
    flips = (False, True) if args.flip else (False,)
    variants = [(flip, rerank) for flip in flips for rerank in dict.fromkeys((None, *args.rerank))]
    results: Results = {(protocol, *row): [] for protocol in evaluation.protocols for row in variants}
    for _, trial, _, features in embed_models(args, models, evaluation, device, args.flip, args.runtime):
        for flip, rerank in variants:
            chosen = {m: unit[int(flip)] if args.flip else unit for m, unit in features.items()}
            for protocol, metrics in evaluation.score(chosen, rerank, trial).items():
                results[protocol, flip, rerank] += metrics
    return results, {m: unit[0] if args.flip else unit for m, unit in features.items()}


def main(command: Sequence[str]) -> None:
    """Evaluate, print the table and write the requested files."""
    log_to_terminal(stream=sys.stderr)
    Processes().refuse_several()
    parser = get_args_parser()
    args, models = parse_and_find(parser, command, parser.parse_args(command).resume)
    refuse_wrong_outputs(args, models)
    root = data_manager.dataset_root(args.dataset, args.data_path)
    every_image = data_manager.read_split("sysu", root, "test").values() if args.save_mat else ()
    evaluation = build_evaluation(args, models, every_image)

    device = select_device(args.gpu)
    try:
        results, features = score_rows(args, models, evaluation, device)
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is too small for --test-batch {args.test_batch}") from error
    checkpoints = [model.facts() for model in models]
    trials = [trial for model in models for trial in model.trials]
    print(results_table(heading(checkpoints, evaluation), table_rows(results, trials), args.format))
    if args.json:
        save_json(args.json, vars(args), device, checkpoints, evaluation, results)
    if args.save_features:
        save_features(args.save_features, features, evaluation.rows, evaluation.all_samples())
    if args.save_mat:
        save_mat(args.save_mat, features, evaluation.rows, evaluation.more)
    for path in filter(None, (args.json, args.save_features, args.save_mat)):
        log.info("wrote %s", path)


if __name__ == "__main__":
    run_script(main, lambda: sys.argv[1:])
