"""See a trained network: one HTML page of results, rankings and curves, and its figures as files:

    python -m tools.report --resume save_model/RUN_best.t --output report
    python -m tools.report --resume save_model/A_best.t save_model/B_best.t --output report
    python -m tools.report --features FILE --dataset sysu --output report
    python -m tools.report --resume save_model/RUN_best.t --output DIR --figures cmc ranking --queries worst

DIR/index.html opens from the disk and needs no network; each figure lies beside it as PNG and PDF.
"""

if __name__ == "__main__":  # before torch is imported, which takes long from a slow disk
    from utils import before_torch

    before_torch()

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from devices import Processes
from engine.files import environment
from evaluation.flags import evaluation_flags
from evaluation.methods import find_methods
from reporting.evaluated import Evaluated, labels
from reporting.learning import history_file, read_history
from reporting.report import FIGURES, Findings, write_figures, write_page
from utils import Parser, UserError, log, log_to_terminal, run_script


def get_args_parser() -> Parser:
    """The command line; what is not given comes from each checkpoint or the dataset."""
    parser = Parser(
        prog="python -m tools.report",
        description="Make a page of what checkpoints or features do, and figures; rankings, embedding and "
        "maps are of the first.",
        parents=[evaluation_flags()],
    )
    parser.add_argument(
        "--log-path", metavar="DIR", help="the runs' logs and histories (default: where they were written)"
    )
    outputs = parser.add_argument_group("outputs")
    outputs.add_argument(
        "--output", required=True, metavar="DIR", help="folder to write the page and the figures to"
    )
    outputs.add_argument(
        "--figures", nargs="+", choices=FIGURES, metavar="NAME",
        help=f"write only these figures, and no page: {', '.join(FIGURES)}",
    )  # fmt: skip
    outputs.add_argument(
        "--queries", nargs="+", default=["random"], metavar="WHICH",
        help="queries that the ranking figure shows: worst, best, random, or pids (default: random)",
    )  # fmt: skip
    return parser


def main(command: Sequence[str]) -> None:
    """Evaluate, then write the page, or the figures that were asked for."""
    args = get_args_parser().parse_args(command)
    processes = Processes()
    log_to_terminal(quiet=processes.rank > 0, stream=sys.stderr)
    folder = Path(args.output)
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        reason = "cannot be written" if nearest.is_dir() else "is a file, and not a folder"
        raise UserError(f"--output {folder}: {nearest} {reason}")
    methods = find_methods(get_args_parser, command)
    names, device = labels([Path(method.name) for method in methods]), processes.join(args.gpu)
    try:
        everyone: list[Evaluated] = []
        for method, name in zip(methods, names, strict=True):
            method.evaluate(device)
            file = method.facts[0]
            found = "args" in file and history_file(Path(file["path"]), file["args"], args.log_path)
            everyone.append(Evaluated(name, method, read_history(found) if found else None))
        processes.stop()
        if processes.rank > 0:  # it has embedded its share
            return
        findings = Findings(everyone, args.queries)
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is too small for --test-batch {args.test_batch}") from error
    if args.figures:
        drawn = write_figures(findings, dict.fromkeys(args.figures), folder, demanded=True)
        log.info("wrote %s as PNG and PDF in %s", ", ".join(drawn), folder)
    else:
        write_page(findings, folder, list(environment().items()), args.workers)


if __name__ == "__main__":
    run_script(main, lambda: sys.argv[1:])
