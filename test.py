"""Evaluate checkpoints: tables, JSON, features:

    python test.py --mode all --resume save_model/RUN_best.t --gpu 0 --dataset sysu
    python test.py --mode all indoor --shot 1 10 --resume save_model/RUN_best.t --rerank k-reciprocal --flip
    python test.py --dataset regdb --resume 'save_model/RUN_trial_{trial}_best.t'

The table goes to standard output, everything else to standard error.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import data_manager
from checkpoints import load_checkpoint
from data_manager import DATASETS
from devices import Processes, autocast_dtype, select_device
from evaluation import Evaluation, Features, Protocol, mode_name, saved_settings
from model import build_model
from reranking import RERANKING
from results.exports import save_features, save_json, save_mat
from results.tables import STYLES, Results, heading, results_table, table_rows
from utils import (
    Parser,
    UserError,
    data_flags,
    device_flags,
    log,
    log_to_terminal,
    refuse_unwritable,
    run_script,
)

TRIAL_IN_NAME = re.compile(r"_trial_\d+(?=_)")


@dataclass
class Model:
    """A checkpoint to evaluate, read once, and the trials to evaluate it on."""

    path: Path
    checkpoint: dict
    settings: dict[str, object]  # that it was trained with; {} for the released code's
    trials: list[int]

    def facts(self) -> dict[str, object]:
        """Path, trials and what the checkpoint records about itself."""
        kept = ("epoch", "selection", "protocol", "best", "data")
        recorded = {key: self.checkpoint[key] for key in kept if key in self.checkpoint}
        return {"path": str(self.path), "trials": self.trials, "args": self.settings} | recorded


# --- settings: the dataset's, replaced by the checkpoint's, replaced by the command line's


def get_args_parser() -> Parser:
    """The command line; other settings come from the checkpoint or the dataset."""
    parser = Parser(
        prog="test.py",
        description="Evaluate a checkpoint. Defaults are in brackets; --dataset, --img-h, --img-w and --amp "
        "default to what the checkpoint was trained with.",
        parents=[data_flags(), device_flags()],
    )
    what = parser.add_argument_group("what is evaluated")
    what.add_argument(
        "--resume", required=True, metavar="FILE",
        help="a checkpoint, ours or the released code's; RegDB: of one trial, or with {trial} in its name",
    )  # fmt: skip
    what.add_argument(
        "--model-path",
        default="save_model",
        metavar="DIR",
        help="second folder to look for FILE in (save_model)",
    )
    what.add_argument("--dataset", choices=DATASETS, help="(the checkpoint's, or sysu)")
    what.add_argument(
        "--mode", type=mode_name, nargs="+", metavar="MODE",
        help="sysu: all, indoor (all); others: visible-to-infrared, infrared-to-visible (both), or -thermal",
    )  # fmt: skip
    what.add_argument(
        "--shot", type=int, nargs="+", choices=(1, 10), default=[1], help="gallery images of sysu (1)"
    )
    what.add_argument(
        "--galleries", choices=("seeded", "published"), default="seeded",
        help="sysu: drawn by random.Random(trial), or the dataset authors' exp/rand_perm_cam.mat (seeded)",
    )  # fmt: skip
    what.add_argument(
        "--trial", metavar="N", help="one trial, or all (all; for a model of one RegDB trial: that trial)"
    )
    what.add_argument(
        "--allow-short", action="store_true", help="accept galleries with fewer images than --shot"
    )
    what.add_argument(
        "--ignore-same-camera", action="store_true",
        help="own images: ignore gallery images of the query's identity and camera, and let CMC count "
        "identities, as LLCM does",
    )  # fmt: skip
    what.add_argument(
        "--rerank", nargs="+", choices=RERANKING, default=[], help="add rows with re-ranked galleries"
    )
    what.add_argument(
        "--flip", action="store_true", help="add rows with the mean feature of an image and its mirror"
    )
    outputs = parser.add_argument_group("outputs")
    outputs.add_argument("--format", choices=STYLES, default="text", help="format of the table (text)")
    outputs.add_argument("--json", metavar="FILE", help="settings, metrics of every trial and their mean")
    outputs.add_argument("--save-features", metavar="FILE.npz", help="features, paths, pids and camids")
    outputs.add_argument(
        "--save-mat", metavar="DIR", help="features for the SYSU-MM01 authors' MATLAB evaluation"
    )
    return parser


def parse_args(command: Sequence[str]) -> tuple[argparse.Namespace, list[Model]]:
    """The settings of a command line, and the checkpoints, each read from disk once.

    Raises UserError for a wrong flag, or a checkpoint that is missing, broken or does not fit.
    """
    parser = get_args_parser()
    typed = parser.parse_args(command)
    models = find_models(typed)
    saved = {key: value for key, value in models[0].settings.items() if value is not None}
    facts = DATASETS[typed.dataset]  # filled in by find_models
    modes = ["all"] if typed.dataset == "sysu" else list(facts.modes)
    parser.set_defaults(dataset=typed.dataset, trial=typed.trial or "all", mode=modes)
    parser.set_defaults(img_h=facts.height, img_w=facts.width)
    parser.set_defaults(**{key: saved[key] for key in ("img_h", "img_w", "amp") if key in saved})
    args = parser.parse_args(command)
    if args.save_mat and args.dataset != "sysu":
        raise UserError(f"--save-mat is for SYSU-MM01's MATLAB evaluation, not for {facts.title}")
    if args.ignore_same_camera and args.dataset != "folder":
        raise UserError(f"--ignore-same-camera is for own images; {facts.title} has its own rule")
    if len(models) > 1 and args.save_features:
        raise UserError("--save-features: RegDB has a model per trial: choose one with --trial N")
    return args, models


# --- which checkpoints, and on which trials each is evaluated


def find_models(args: argparse.Namespace) -> list[Model]:
    """Read the checkpoint of --resume, or for RegDB one for each requested trial.

    The names of RegDB's checkpoints differ only in _trial_<t>_. Fills in args.dataset and args.trial if they
    were not typed.
    """
    path = locate(args, Path(args.resume))
    model = None if "{trial}" in args.resume else read_model(path)
    settings = model.settings if model else {"dataset": "regdb"}
    args.dataset = args.dataset or settings.get("dataset", "sysu")
    if args.dataset != "regdb":
        if model is None:
            title = DATASETS[args.dataset].title
            raise UserError(f"--resume {path}: only RegDB has a model per trial, not {title}")
    elif settings.get("dataset") == "regdb":
        pattern = str(path.with_name(TRIAL_IN_NAME.sub("_trial_{trial}", path.name)))
        if "{trial}" in pattern:
            return models_of_trials(args, pattern, model)
        args.trial = args.trial or settings.get("trial")
    if args.dataset == "regdb" and args.trial is None and settings.get("dataset", "regdb") == "regdb":
        raise UserError(
            f"--resume {path} does not record its trial: set --trial N, or --trial all to test one model on "
            "all trials of RegDB"
        )
    model.trials = chosen_trials(args)
    return [model]


def models_of_trials(args: argparse.Namespace, pattern: str, known: Model | None) -> list[Model]:
    """Read a model for each requested trial; warn of missing ones.

    Args:
        args: the settings.
        pattern: the path, with {trial} in it.
        known: a model that is loaded already.

    Raises:
        UserError: all of them are missing.
    """
    models, missing = [], []
    for trial in chosen_trials(args):
        path = locate(args, Path(pattern.replace("{trial}", str(trial))))
        if path.is_file():
            models.append(known if known and known.path == path else read_model(path))
            models[-1].trials = [trial]
        else:
            missing.append(str(trial))
    if not models:
        raise UserError(f"--resume {args.resume}: no checkpoint at {pattern} for trial {', '.join(missing)}")
    if missing:
        log.warning("no checkpoint of trial %s, left out of all means: %s", ", ".join(missing), pattern)
    return models


def chosen_trials(args: argparse.Namespace) -> list[int]:
    """The trials of --trial: one, or all of the dataset."""
    facts = DATASETS[args.dataset]
    if args.trial in (None, "all"):
        return list(facts.trials)
    if args.trial not in map(str, facts.trials):
        first, last = facts.trials[0], facts.trials[-1]
        raise UserError(
            f"--trial {args.trial}: {facts.title} has the trials {first} to {last}; choose one, or all"
        )
    return [int(args.trial)]


def locate(args: argparse.Namespace, path: Path) -> Path:
    """The path if it exists, else the same name in --model-path if that exists."""
    elsewhere = Path(args.model_path) / path
    return elsewhere if not path.exists() and elsewhere.exists() else path


def read_model(path: Path) -> Model:
    """Read a checkpoint, without the optimiser's state."""
    checkpoint = load_checkpoint(path)
    checkpoint.pop("optimizer", None)  # twice as large as the network, and RegDB has ten of them
    return Model(path, checkpoint, saved_settings(checkpoint, path), [])


def refuse_trained_on(model: Model, root: Path) -> None:
    """Raise UserError if a RegDB trial tests a model on images that it was trained on."""
    if model.settings.get("dataset") != "regdb" or not model.settings.get("trial"):
        return
    own_trial, modes = int(model.settings["trial"]), DATASETS["regdb"].modes
    trained = {
        path
        for samples in data_manager.train_samples("regdb", root, own_trial).values()
        for path in samples.paths
    }
    for trial in model.trials:
        queries = [data_manager.query_samples("regdb", root, mode, trial) for mode in modes]
        if any(trained.intersection(samples.paths) for samples in queries):
            raise UserError(
                f"{model.path} was trained on trial {own_trial}, whose training images are among trial "
                f"{trial}'s test images"
            )


# --- evaluation


def score_rows(
    args: argparse.Namespace, models: list[Model], evaluation: Evaluation, device: torch.device
) -> tuple[Results, Features]:
    """Evaluate all models.

    Args:
        args: the settings.
        models: one, or one per trial.
        evaluation: protocols, trials and images.
        device: where the models run.

    Returns:
        The metrics of every row of the table, plain ones first, and the features of the last model.
    """
    dtype, processes = autocast_dtype(args.amp, device), Processes()
    flips = (False, True) if args.flip else (False,)
    variants = [(flip, rerank) for flip in flips for rerank in dict.fromkeys((None, *args.rerank))]
    results: Results = {(protocol, *row): [] for protocol in evaluation.protocols for row in variants}
    for model in models:
        trial = model.trials[0] if len(models) > 1 else None
        pixel_range = model.settings.get("pixel_range")
        if evaluation.pixel_range != pixel_range:
            evaluation.pixel_range = pixel_range
            evaluation.pixels.clear()
        if len(models) > 1 and not evaluation.pixels:  # RegDB's trials share most images
            evaluation.load(args.workers, processes)
        network = build_model(model.checkpoint, model.path).to(device, memory_format=torch.channels_last)
        features = evaluation.features(
            network, device, dtype, args.test_batch, args.workers, processes, trial, args.flip
        )
        for flip, rerank in variants:
            chosen = {m: unit[int(flip)] if args.flip else unit for m, unit in features.items()}
            for protocol, metrics in evaluation.score(chosen, rerank, trial).items():
                results[protocol, flip, rerank] += metrics
    return results, {m: unit[0] if args.flip else unit for m, unit in features.items()}


def main(command: Sequence[str]) -> None:
    """Evaluate, print the table and write the requested files."""
    log_to_terminal(stream=sys.stderr)
    Processes().refuse_several()
    args, models = parse_args(command)
    root = data_manager.dataset_root(args.dataset, args.data_path)
    modes, shots = dict.fromkeys(args.mode), dict.fromkeys(args.shot)
    protocols = [
        Protocol(args.dataset, mode, shot, args.galleries, ignore_same_camera=args.ignore_same_camera)
        for mode in modes for shot in shots
    ]  # fmt: skip
    trials = [trial for model in models for trial in model.trials]
    every_image = data_manager.read_split("sysu", root, "test").values() if args.save_mat else ()
    evaluation = Evaluation(
        root, protocols, trials, args.img_h, args.img_w, args.allow_short, more=every_image
    )
    for model in models if args.dataset == "regdb" else ():
        refuse_trained_on(model, root)
    for path in filter(None, (args.json, args.save_features)):
        if Path(path).is_dir():
            raise UserError(f"cannot write {path}: it is a folder")
        refuse_unwritable(Path(path).parent)
    if args.save_mat:
        refuse_unwritable(args.save_mat)

    device = select_device(args.gpu)
    try:
        results, features = score_rows(args, models, evaluation, device)
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is too small for --test-batch {args.test_batch}") from error
    checkpoints = [model.facts() for model in models]
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
