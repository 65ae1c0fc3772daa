"""What test.py and tools.report share: their flags, the checkpoints that they evaluate, and the features."""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

import data_manager
from checkpoints import FACTS, image_size, load_checkpoint, saved_settings
from data_manager import DATASETS, Samples
from devices import Processes
from evaluation.protocols import Evaluation, Features, Protocol, mode_name
from evaluation.runtimes import for_evaluation
from model import build_model
from precision import settle
from reranking import RERANKING
from utils import Parser, UserError, data_flags, device_flags, log

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
        recorded = {key: self.checkpoint[key] for key in FACTS if key in self.checkpoint}
        return {"path": str(self.path), "trials": self.trials, "args": self.settings} | recorded


def evaluation_flags() -> Parser:
    """Flags of the commands that evaluate checkpoints; what is not typed comes from those or the dataset."""
    parser = Parser(add_help=False, parents=[data_flags(), device_flags()])
    add = parser.add_argument_group("what is evaluated").add_argument
    add("--dataset", choices=DATASETS, help="(the checkpoint's, or sysu)")
    add(
        "--mode", type=mode_name, nargs="+", metavar="MODE",
        help="sysu: all, indoor (all); others: visible-to-infrared, infrared-to-visible (both), or -thermal",
    )  # fmt: skip
    add("--shot", type=int, nargs="+", choices=(1, 10), default=[1], help="gallery images of sysu (1)")
    add(
        "--galleries", choices=("seeded", "published"), default="seeded",
        help="sysu: drawn by random.Random(trial), or the dataset authors' exp/rand_perm_cam.mat (seeded)",
    )  # fmt: skip
    add("--trial", metavar="N", help="one trial, or all (all; for a model of one RegDB trial: that trial)")
    add("--allow-short", action="store_true", help="accept galleries with fewer images than --shot")
    add(
        "--ignore-same-camera", action="store_true",
        help="own images: ignore gallery images of the query's identity and camera, and let CMC count "
        "identities, as LLCM does",
    )  # fmt: skip
    add("--rerank", nargs="+", choices=RERANKING, default=[], help="add rows with re-ranked galleries")
    add(
        "--model-path", default="save_model", metavar="DIR",
        help="second folder to look for checkpoints in (save_model)",
    )  # fmt: skip
    return parser


def parse_and_find(
    parser: Parser, command: Sequence[str], resume: str, dataset: str | None = None
) -> tuple[argparse.Namespace, list[Model]]:
    """The settings to evaluate a checkpoint with: the dataset's, replaced by its own, replaced by typed ones.

    Args:
        parser: with evaluation_flags.
        command: the words of the command line.
        resume: the checkpoint.
        dataset: on which those before it were evaluated; None for the first.

    Returns:
        The settings, and the checkpoints, each read from disk once: one, or one for each trial of RegDB.

    Raises:
        UserError: a wrong flag, or a checkpoint that is missing, broken, does not fit, or of another dataset.
    """
    typed = parser.parse_args(command)
    models = find_models(typed, resume, dataset)
    saved = {key: value for key, value in models[0].settings.items() if value is not None}
    facts = DATASETS[typed.dataset]  # filled in by find_models
    modes = ["all"] if typed.dataset == "sysu" else list(facts.modes)
    parser.set_defaults(dataset=typed.dataset, trial=typed.trial or "all", mode=modes)
    first = models[0]
    height, width = image_size(first.checkpoint, first.path, typed.img_h, typed.img_w, typed.dataset)
    parser.set_defaults(img_h=height, img_w=width)
    parser.set_defaults(**{key: saved[key] for key in ("amp",) if key in saved})
    args = parser.parse_args(command)
    if args.ignore_same_camera and args.dataset != "folder":
        raise UserError(f"--ignore-same-camera is for own images; {facts.title} has its own rule")
    return args, models


def find_models(args: argparse.Namespace, resume: str, dataset: str | None = None) -> list[Model]:
    """Read a checkpoint, or for RegDB one for each requested trial; see parse_and_find.

    The names of RegDB's checkpoints differ only in _trial_<t>_, and resume may have {trial} there. Fills in
    args.dataset and args.trial if they were not typed.
    """
    path = locate(args, resume)
    model = None if "{trial}" in resume else read_model(path)
    settings = model.settings if model else {"dataset": "regdb"}
    args.dataset = args.dataset or settings.get("dataset", "sysu")
    if dataset not in (None, args.dataset):
        titles = DATASETS[args.dataset].title, DATASETS[dataset].title
        raise UserError(
            f"--resume {path}: trained on {titles[0]}, the first on {titles[1]}: which --dataset?"
        )
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
    """Read a model for each requested trial; warn of missing ones, UserError if all are missing.

    pattern: the path, with {trial} in it. known: a model that is loaded already.
    """
    models, missing = [], []
    for trial in chosen_trials(args):
        path = locate(args, pattern.replace("{trial}", str(trial)))
        if path.is_file():
            models.append(known if known and known.path == path else read_model(path))
            models[-1].trials = [trial]
        else:
            missing.append(str(trial))
    if not models:
        raise UserError(f"--resume {pattern}: no checkpoint of trial {', '.join(missing)}")
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


def locate(args: argparse.Namespace, path: str) -> Path:
    """The path if it exists, else the same name in --model-path if that exists."""
    elsewhere = Path(args.model_path) / path
    return elsewhere if not Path(path).exists() and elsewhere.exists() else Path(path)


def read_model(path: Path) -> Model:
    """Read a checkpoint, without the optimiser's state."""
    checkpoint = load_checkpoint(path)
    checkpoint.pop("optimizer", None)  # twice as large as the network, and RegDB has ten of them
    return Model(path, checkpoint, saved_settings(checkpoint, path), [])


def build_evaluation(
    args: argparse.Namespace, models: Sequence[Model], more: Sequence[Samples] = ()
) -> Evaluation:
    """The evaluation of all protocols of args and all trials of models; more: further images to embed.

    Raises UserError: see Evaluation; or a trial of RegDB tests a model on images that it was trained on.
    """
    root = data_manager.dataset_root(args.dataset, args.data_path)
    protocols = [
        Protocol(args.dataset, mode, shot, args.galleries, ignore_same_camera=args.ignore_same_camera)
        for mode in dict.fromkeys(args.mode) for shot in dict.fromkeys(args.shot)
    ]  # fmt: skip
    trials = [trial for model in models for trial in model.trials]
    evaluation = Evaluation(root, protocols, trials, args.img_h, args.img_w, args.allow_short, more)
    for model in models if args.dataset == "regdb" else ():
        refuse_trained_on(model, root)
    return evaluation


def refuse_trained_on(model: Model, root: Path) -> None:
    """Raise UserError if a RegDB trial tests a model on images that it was trained on.

    The released code's checkpoints record no trial: their names do.
    """
    own_trial = model.settings.get("trial") if model.settings.get("dataset") == "regdb" else None
    if "dataset" not in model.settings and (in_name := TRIAL_IN_NAME.search(model.path.name)):
        own_trial = in_name[0].removeprefix("_trial_")
    if not own_trial:
        return
    own_trial, modes = int(own_trial), DATASETS["regdb"].modes
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
                f"{trial}'s test images: choose --trial {own_trial}"
            )


def embed_models(
    args: argparse.Namespace,
    models: Sequence[Model],
    evaluation: Evaluation,
    device: torch.device,
    flip: bool = False,
    runtime: str = "torch",
) -> Iterator[tuple[Model, int | None, nn.Module, Features]]:
    """Yield each model, its trial (None: all of them), its network, and the features of all images.

    flip: the features are (2, N, D), see model.extract_features. runtime: see runtimes.for_evaluation.
    """
    dtype, processes = None, Processes()
    for model in models:
        trial = model.trials[0] if len(models) > 1 else None
        pixel_range = model.settings.get("pixel_range")
        if evaluation.pixel_range != pixel_range:
            evaluation.pixel_range = pixel_range
            evaluation.pixels.clear()
        if len(models) > 1 and not evaluation.pixels:  # RegDB's trials share most images
            evaluation.load(args.workers, processes)
        size = args.img_h, args.img_w
        network = for_evaluation(build_model(model.checkpoint, model.path), device, runtime, size, args.amp)
        if runtime == "torch" and model is models[0]:  # the others have the same layers and sizes
            batch = partial(evaluation.first_batch, args.test_batch, device, args.workers)
            dtype = settle(args.amp, network, batch, processes)
        features = evaluation.features(
            network, device, dtype, args.test_batch, args.workers, processes, trial, flip
        )
        yield model, trial, network, features
    evaluation.pixels.clear()  # a report keeps the evaluation, and all of RegDB is a gigabyte
