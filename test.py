"""Evaluate checkpoints, or anyone's features: tables with 95 % intervals, JSON, features:

    python test.py --mode all --resume save_model/RUN_best.t --gpu 0 --dataset sysu
    python test.py --mode all indoor --shot 1 10 --resume save_model/RUN_best.t --rerank k-reciprocal --flip
    python test.py --dataset regdb --resume 'save_model/RUN_trial_{trial}_best.t'
    python test.py --dataset sysu --resume save_model/A_best.t save_model/B_best.t
    python test.py --dataset sysu --features FILE

The table goes to standard output, everything else to standard error.
"""

if __name__ == "__main__":  # before torch is imported, which takes long from a slow disk
    from utils import before_torch

    before_torch()

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import data_manager
from devices import Processes
from evaluation.exports import save_features, save_json, save_mat
from evaluation.flags import RUNTIMES, evaluation_flags
from evaluation.methods import Method, find_methods
from evaluation.protocols import OWN_GALLERY
from evaluation.tables import STYLES, camera_scores, camera_table, heading, table
from utils import Parser, UserError, log, log_to_terminal, refuse_unwritable, run_script


def get_args_parser() -> Parser:
    """The command line; other settings come from the checkpoint or the dataset."""
    words = "Evaluate checkpoints or features."
    parser = Parser(prog="test.py", description=words, parents=[evaluation_flags()])
    add = parser.add_argument
    add("--runtime", choices=RUNTIMES, default="torch", help="what computes the features, on the CPU")
    add("--flip", action="store_true", help="add rows with the mean feature of an image and its mirror")
    add("--cameras", action="store_true", help="print rank-1 and mAP by pair of cameras too, also in --json")
    add = parser.add_argument_group("outputs").add_argument
    add("--format", choices=STYLES, default="text", help="format of the table")
    add("--json", metavar="FILE", help="write settings, metrics of every trial, their mean and intervals")
    add("--save-features", metavar="FILE.npz", help="write features, paths, pids and camids")
    add("--save-mat", metavar="DIR", help="write features for the SYSU-MM01 authors' MATLAB evaluation")
    return parser


def refuse_wrong_outputs(args: argparse.Namespace, methods: Sequence[Method]) -> None:
    """Raise UserError, before long work, for an output that does not fit or cannot be written."""
    dataset = methods[0].args.dataset
    if args.save_mat and dataset != "sysu":
        title = data_manager.DATASETS[dataset].title
        raise UserError(f"--save-mat is for SYSU-MM01's MATLAB evaluation, not for {title}")
    if args.save_features or args.save_mat:
        flag = "--save-features" if args.save_features else "--save-mat"
        if len(methods) > 1 or len(methods[0].sources) > 1:
            raise UserError(f"{flag}: choose one of the methods and seeds")
        if len(methods[0].sources[0]) > 1:
            raise UserError(f"{flag}: RegDB has a model per trial: choose one with --trial N")
        if methods[0].evaluation.protocols[0].galleries == OWN_GALLERY:
            raise UserError(f"{flag}: {methods[0].name} does not say which images its features are of")
    for path in filter(None, (args.json, args.save_features)):
        if Path(path).is_dir():
            raise UserError(f"cannot write {path}: it is a folder")
        refuse_unwritable(Path(path).parent)
    if args.save_mat:
        refuse_unwritable(args.save_mat)


def main(words: Sequence[str]) -> None:
    """Evaluate, print the table and write the requested files."""
    processes = Processes()
    log_to_terminal(quiet=processes.rank > 0, stream=sys.stderr)
    args = get_args_parser().parse_args(words)
    if args.flip and args.features:
        raise UserError("--flip: files of features hold no mirror images")
    typed = {word.partition("=")[0].replace("_", "-") for word in words}
    if args.features and not args.resume and (idle := typed & {"--runtime", "--img-h", "--img-w", "--amp"}):
        raise UserError(f"{', '.join(sorted(idle))}: for networks, and --features has none")
    methods = find_methods(get_args_parser, words, more=bool(args.save_mat))
    refuse_wrong_outputs(args, methods)
    device = processes.join(args.gpu)
    try:
        for method in methods:
            method.evaluate(device, args.flip, args.runtime)
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is too small for --test-batch {args.test_batch}") from error
    processes.stop()
    if processes.rank > 0:  # it has embedded its share
        return
    first = methods[0]
    print(table(heading(methods), methods, args.format))
    cameras = camera_scores(methods) if args.cameras else {}
    if args.cameras:
        print("", camera_table(cameras, methods, args.format), sep="\n")
    if args.json:
        save_json(args.json, device, methods, cameras)
    if args.save_features:
        save_features(args.save_features, first.features, first.evaluation.images())
    if args.save_mat:
        save_mat(args.save_mat, first.features, first.evaluation.more)
    for path in filter(None, (args.json, args.save_features, args.save_mat)):
        log.info("wrote %s", path)


if __name__ == "__main__":
    run_script(main, lambda: sys.argv[1:])
