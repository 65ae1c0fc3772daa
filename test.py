"""Evaluate checkpoints: tables, JSON, features, a picture of ranked results:

    python test.py --mode all --resume save_model/RUN_best.t --gpu 0 --dataset sysu
    python test.py --mode all indoor --shot 1 10 --resume save_model/RUN_best.t
    python test.py --dataset regdb --resume 'save_model/RUN_trial_{trial}_best.t'

The table goes to standard output, everything else to standard error.
"""

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import data_manager
from checkpoints import load_checkpoint
from data_manager import DATASETS, Samples
from devices import Processes, autocast_dtype, select_device
from eval_metrics import Metrics, summarize, top_k
from evaluation import Evaluation, Features, Protocol
from model import from_checkpoint
from results.exports import mat_file, save_features, save_mat
from results.figures import ranked_results
from results.tables import STYLES, results_table
from runs import versions
from training import saved_settings
from utils import Parser, UserError, data_flags, device_flags, log, log_to_terminal, run_script, whole_file

TRIAL_IN_NAME = re.compile(r"_trial_\d+(?=_)")
FACTS = ("epoch", "selection", "protocol", "best", "data", "args")  # what a checkpoint says of itself


def get_args_parser() -> Parser:
    """The command line; what is not given comes from the checkpoint or the dataset."""
    parser = Parser(
        description="Evaluate a checkpoint. Defaults stand in brackets; those of --dataset, --img-h, --img-w "
        "and --amp are what the checkpoint was trained with.",
        parents=[data_flags(), device_flags()],
    )
    parser.set_defaults(amp=None)
    what = parser.add_argument_group("what is evaluated")
    what.add_argument(
        "--resume", required=True, metavar="FILE",
        help="a checkpoint, ours or the released code's; RegDB: one trial's, or {trial} in its name",
    )  # fmt: skip
    what.add_argument(
        "--model-path", default="save_model", metavar="DIR", help="searched for FILE too (save_model)"
    )
    what.add_argument("--dataset", choices=DATASETS, help="(the checkpoint's, or sysu)")
    what.add_argument(
        "--mode", nargs="+", metavar="MODE",
        help="sysu: all, indoor (all); regdb and llcm: visible-to-infrared, infrared-to-visible (both)",
    )  # fmt: skip
    what.add_argument("--shot", type=int, nargs="+", choices=(1, 10), default=[1], help="gallery of sysu (1)")
    what.add_argument(
        "--galleries", choices=("seeded", "published"), default="seeded",
        help="sysu: drawn by random.Random(trial), or the dataset authors' exp/rand_perm_cam.mat (seeded)",
    )  # fmt: skip
    what.add_argument("--trial", default="all", metavar="N", help="one trial, or all ten (all)")
    what.add_argument(
        "--allow-short", action="store_true", help="take galleries with fewer images than --shot"
    )
    what.add_argument(
        "--ignore-same-camera", action="store_true",
        help="own images: a gallery image of the query's identity and camera does not count, and CMC counts "
        "identities: LLCM's rules",
    )  # fmt: skip
    what.add_argument("--rerank", choices=("k-reciprocal",), help="add rows with the galleries re-ranked")
    outputs = parser.add_argument_group("outputs")
    outputs.add_argument("--format", choices=STYLES, default="text", help="of the table (text)")
    outputs.add_argument("--json", metavar="FILE", help="settings, metrics of every trial and their mean")
    outputs.add_argument("--save-features", metavar="FILE.npz", help="features, paths, pids and camids")
    outputs.add_argument(
        "--save-mat", metavar="DIR", help="features for the SYSU-MM01 authors' MATLAB evaluation"
    )
    outputs.add_argument("--figure", metavar="FILE.png", help="queries with the ten images ranked first")
    return parser


def find_checkpoints(args: argparse.Namespace) -> dict[int | None, Path]:
    """The checkpoint of each trial that is asked for; {None: path} where one serves all trials.

    Fills in --dataset, if it was not typed, from the checkpoint. Only RegDB has a model for each trial:
    their names differ in _trial_<t>_ alone, and those that are missing are left out with a warning. Raises
    UserError if none is there, or --trial or an output does not fit the dataset.
    """

    def locate(path: Path) -> Path:
        elsewhere = Path(args.model_path) / path
        return elsewhere if not path.exists() and elsewhere.exists() else path

    named = Path(args.resume)
    if "{trial}" in args.resume:
        pattern, saved = args.resume, {}
        args.dataset = args.dataset or "regdb"
    else:
        pattern = str(named.with_name(TRIAL_IN_NAME.sub("_trial_{trial}", named.name)))
        saved = saved_settings(load_checkpoint(locate(named)), named)
        args.dataset = args.dataset or saved.get("dataset", "sysu")
    facts = DATASETS[args.dataset]
    if args.trial != "all" and args.trial not in map(str, facts.trials):
        first, last = facts.trials[0], facts.trials[-1]
        raise UserError(f"--trial {args.trial}: those of {facts.title} are {first} to {last}, or all")
    if args.save_mat and args.dataset != "sysu":
        raise UserError(f"--save-mat is for SYSU-MM01's MATLAB evaluation, not for {facts.title}")

    if args.dataset != "regdb":
        if "{trial}" in args.resume:
            raise UserError(f"--resume {named}: {facts.title} has no model for each trial, only RegDB has")
        paths = {None: locate(named)}
    elif "{trial}" in pattern:
        wanted = facts.trials if args.trial == "all" else [int(args.trial)]
        paths = {t: locate(Path(pattern.replace("{trial}", str(t)))) for t in wanted}
        missing = [str(path) for path in paths.values() if not path.is_file()]
        if len(missing) == len(paths):
            others = ", nor of any other trial" if len(missing) > 1 else ""
            raise UserError(f"--resume {named}: no checkpoint at {missing[0]}{others}")
        if missing:
            log.warning("missing, and so left out of every mean: %s", ", ".join(missing))
        paths = {trial: path for trial, path in paths.items() if path.is_file()}
    else:
        trial = saved.get("trial") if args.trial == "all" and saved.get("dataset") == "regdb" else args.trial
        if trial == "all":
            raise UserError(f"--resume {named}: of which trial of RegDB? Say so with --trial N")
        paths = {int(trial): locate(named)}

    if len(paths) > 1 and (args.save_features or args.figure):
        flag = "--save-features" if args.save_features else "--figure"
        raise UserError(f"{flag}: RegDB has a model for each trial; say which with --trial N")
    return paths


def describe(path: Path, trial: int | None) -> dict[str, object]:
    """What a checkpoint says of itself, for the heading and --json; UserError if it is of another trial."""
    checkpoint = load_checkpoint(path)
    saved = saved_settings(checkpoint, path)
    if trial is not None and saved.get("dataset") == "regdb" and str(saved.get("trial")) != str(trial):
        raise UserError(
            f"{path} was trained on trial {saved.get('trial')}, whose test images are not trial {trial}'s"
        )
    return {"trial": trial, "path": str(path)} | {k: checkpoint[k] for k in FACTS if k in checkpoint}


def fill_in(args: argparse.Namespace, saved: dict[str, object]) -> None:
    """Take what was not typed from the settings that the checkpoint was trained with, or the dataset."""
    facts = DATASETS[args.dataset]
    args.img_h = args.img_h or saved.get("img_h", facts.height)
    args.img_w = args.img_w or saved.get("img_w", facts.width)
    args.amp = args.amp or saved.get("amp", "auto")
    args.mode = args.mode or (["all"] if args.dataset == "sysu" else list(facts.modes))


def refuse_unwritable(path: str | Path) -> None:
    """UserError, before the long work, for a file that could not be written after it."""
    if Path(path).is_dir():
        raise UserError(f"cannot write {path}: it is a folder")

    class Tried(Exception):
        """Makes whole_file leave nothing."""

    with contextlib.suppress(Tried), whole_file(path):
        raise Tried


def all_test_images(root: Path) -> list[Samples]:
    """Every test image of SYSU-MM01 in each modality: what its MATLAB evaluation wants features of."""
    everything = data_manager.gallery_samples("sysu", root, mode="all", shot=10**9, allow_short=True)
    order = np.argsort(everything.paths)
    visible = Samples(
        [everything.paths[k] for k in order], everything.pids[order], everything.camids[order], "visible"
    )
    return [visible, data_manager.query_samples("sysu", root)]


def heading(
    args: argparse.Namespace, checkpoints: list[dict], trials: list[int], evaluation: Evaluation
) -> list[str]:
    """What the table's numbers are, in two lines: dataset and trials; checkpoints and their selection."""
    facts = DATASETS[args.dataset]
    some = "" if len(trials) == len(facts.trials) else f" of the {len(facts.trials)}"
    those = f"mean over {len(trials)}{some} trials" if len(trials) > 1 else f"trial {trials[0]} alone"
    if len(facts.trials) == 1:
        those = "one split"
    if some and len(trials) > 1:
        those += f" ({', '.join(map(str, trials))})"
    if len(checkpoints) > 1:
        those += ", each with its own model"
    if evaluation.short:
        those += f"; {evaluation.short}"

    def told(values: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    more = f" and {len(checkpoints) - 1} siblings" if len(checkpoints) > 1 else ""
    settings = [saved_settings(checkpoint, checkpoint["path"]) for checkpoint in checkpoints]
    trained_on = told(s.get("dataset", "an unknown dataset") for s in settings)
    trained_on = DATASETS[trained_on].title if trained_on in DATASETS else trained_on
    epochs = ", ".join(str(checkpoint.get("epoch", "unknown")) for checkpoint in checkpoints)
    of = told(f" of {s['epochs']}" if "epochs" in s else "" for s in settings)
    chosen = told(str(c.get("selection", "how it was chosen is unknown")) for c in checkpoints)
    return [
        f"{facts.title}, per cent, {those}",
        f"{checkpoints[0]['path']}{more}: trained on {trained_on}, epoch {epochs}{of}; {chosen}",
    ]


def table_rows(
    results: dict[tuple[Protocol, str | None], list[Metrics]], trials: list[int]
) -> list[tuple[str, Metrics]]:
    """(title, metrics) for each line of the table: RegDB has its trials and their deviation besides."""
    rows = []
    for (protocol, rerank), metrics in results.items():
        title = protocol.row + (f", {rerank} re-ranking" if rerank else "")
        mean, deviation = summarize(metrics)
        if protocol.dataset == "regdb" and len(trials) > 1:
            rows += [(f"{title}, trial {trial}", each) for trial, each in zip(trials, metrics, strict=True)]
            rows += [(f"{title}, mean of {len(trials)}", mean), (f"{title}, standard deviation", deviation)]
        else:
            rows.append((title, mean))
    return rows


def as_numbers(metrics: Metrics) -> dict[str, object]:
    """Metrics for JSON, in [0, 1]."""
    return {"cmc": np.asarray(metrics.cmc).tolist(), "mAP": float(metrics.mAP), "mINP": float(metrics.mINP)}


def plain(value: object) -> object:
    """A NumPy value of the released code's checkpoints as JSON has it; what JSON cannot hold as text."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)


def save_json(
    path: str,
    args: argparse.Namespace,
    checkpoints: list[dict],
    trials: list[int],
    results: dict[tuple[Protocol, str | None], list[Metrics]],
    device: torch.device,
) -> None:
    """Write settings, checkpoints, versions and the metrics, in [0, 1], of every trial and their mean."""
    report = {
        "checkpoints": checkpoints,
        "settings": vars(args),
        "versions": versions(),
        "device": str(device),
        "results": [
            asdict(protocol)
            | {"rerank": rerank, "trials": dict(zip(trials, map(as_numbers, metrics), strict=True))}
            | dict(zip(("mean", "std"), map(as_numbers, summarize(metrics)), strict=True))
            for (protocol, rerank), metrics in results.items()
        ],
    }
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1, default=plain), encoding="utf-8")


def save_figure(path: str, features: Features, evaluation: Evaluation, count: int = 8) -> None:
    """Draw the ten images ranked first for some queries, evenly taken, of the first protocol and trial."""
    (protocol, _), (query, gallery) = next(iter(evaluation.samples.items()))
    picked = np.unique(np.linspace(0, len(query) - 1, count).astype(int))
    rows = [evaluation.rows[query.modality][query.paths[k]] for k in picked]
    columns = [evaluation.rows[gallery.modality][p] for p in gallery.paths]
    order = top_k(
        features[query.modality][rows],
        features[gallery.modality][columns],
        query.pids[picked],
        gallery.pids,
        query.camids[picked],
        gallery.camids,
        protocol.rule,
        10,
    )
    ranked = [[(gallery.paths[g], gallery.pids[g]) for g in line if g >= 0] for line in order.tolist()]
    ranked_results([(query.paths[k], query.pids[k]) for k in picked], ranked, path, evaluation.pixel_range)


def main(args: argparse.Namespace) -> None:
    """Evaluate, print the table and write what was asked for."""
    log_to_terminal(stream=sys.stderr)
    root = None if args.dataset is None else data_manager.dataset_root(args.dataset, args.data_path)
    paths = find_checkpoints(args)
    root = root or data_manager.dataset_root(args.dataset, args.data_path)
    facts = DATASETS[args.dataset]
    if args.dataset == "regdb":
        trials = list(paths)
    else:
        trials = list(facts.trials) if args.trial == "all" else [int(args.trial)]
    checkpoints = [describe(path, trial) for trial, path in paths.items()]
    fill_in(args, saved_settings(checkpoints[0], checkpoints[0]["path"]))
    modes, shots = dict.fromkeys(args.mode), dict.fromkeys(args.shot)
    if args.ignore_same_camera and args.dataset != "folder":
        raise UserError(f"--ignore-same-camera: for own images; {facts.title} has a rule of its own")
    protocols = [
        Protocol(args.dataset, mode, shot, args.galleries, ignore_same_camera=args.ignore_same_camera)
        for mode in modes for shot in shots
    ]  # fmt: skip
    everything = all_test_images(root) if args.save_mat else []
    evaluation = Evaluation(
        root, protocols, trials, args.img_h, args.img_w, allow_short=args.allow_short,
        more=everything,
    )  # fmt: skip
    written = [path for path in (args.json, args.save_features, args.figure) if path]
    for path in [*written, *([mat_file(args.save_mat, 1)] if args.save_mat else [])]:
        refuse_unwritable(path)
    device, processes = select_device(args.gpu), Processes()
    dtype = autocast_dtype(args.amp, device)
    ranges = [saved_settings(checkpoint, checkpoint["path"]).get("pixel_range") for checkpoint in checkpoints]
    evaluation.pixel_range = ranges[0]
    if len(paths) > 1 and all(each == ranges[0] for each in ranges):
        # every trial has a model of its own, and mostly the same images
        evaluation.load(args.workers, processes)

    reranks = dict.fromkeys((None, args.rerank))
    results = {(protocol, rerank): [] for protocol in protocols for rerank in reranks}
    try:
        for (trial, path), pixel_range in zip(paths.items(), ranges, strict=True):
            evaluation.pixel_range = pixel_range
            model = from_checkpoint(path).to(device, memory_format=torch.channels_last)
            features = evaluation.features(
                model, device, dtype, args.test_batch, args.workers, processes, trial
            )
            for rerank in reranks:
                for protocol, metrics in evaluation.score(features, rerank, trial).items():
                    results[protocol, rerank] += metrics
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is too small for --test-batch {args.test_batch}") from error

    lines = heading(args, checkpoints, trials, evaluation)
    print(results_table(lines, table_rows(results, trials), args.format))
    if args.json:
        save_json(args.json, args, checkpoints, trials, results, device)
    if args.save_features:
        save_features(args.save_features, features, evaluation.rows, evaluation.all_samples())
    if args.save_mat:
        save_mat(args.save_mat, features, evaluation.rows, everything)
        written.append(args.save_mat)
    if args.figure:
        save_figure(args.figure, features, evaluation)
    for path in written:
        log.info("wrote %s", path)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args)
