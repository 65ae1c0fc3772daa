"""Checkpoints to evaluate: which files, with which settings, on which trials, and their features."""

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
from data_manager import DATASETS
from devices import Processes
from evaluation.embedding import TestImages
from evaluation.flags import chosen_trials, settings_of
from evaluation.runtimes import for_evaluation
from evaluation.scoring import Features
from model import build_model
from precision import settle
from utils import Parser, UserError, log

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


def find_checkpoints(
    parser: Parser, words: list[str], resume: str, dataset: str | None = None
) -> tuple[argparse.Namespace, list[Model]]:
    """The settings to evaluate a checkpoint with, and the checkpoints, each read from disk once.

    Args:
        parser: with evaluation_flags.
        words: the command line.
        resume: the checkpoint.
        dataset: on which those before it were evaluated; None for the first.

    Returns:
        The settings, see flags.settings_of, and one checkpoint, or one for each trial of RegDB.

    Raises:
        UserError: a wrong flag, or a checkpoint that is missing, broken, does not fit, or of another dataset.
    """
    typed = parser.parse_args(words)
    models = find_models(typed, resume, dataset)  # fills in dataset and trial
    first = models[0]
    height, width = image_size(first.checkpoint, first.path, typed.img_h, typed.img_w, typed.dataset)
    saved = {"img_h": height, "img_w": width, "amp": first.settings.get("amp")}
    return settings_of(parser, words, typed.dataset, typed.trial, saved), models


def find_models(args: argparse.Namespace, resume: str, dataset: str | None = None) -> list[Model]:
    """Read a checkpoint, or for RegDB one for each requested trial; see find_checkpoints.

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


def locate(args: argparse.Namespace, path: str) -> Path:
    """The path if it exists, else the same name in --model-path if that exists."""
    elsewhere = Path(args.model_path) / path
    return elsewhere if not Path(path).exists() and elsewhere.exists() else Path(path)


def read_model(path: Path) -> Model:
    """Read a checkpoint, without the optimiser's state."""
    checkpoint = load_checkpoint(path)
    checkpoint.pop("optimizer", None)  # twice as large as the network, and RegDB has ten of them
    return Model(path, checkpoint, saved_settings(checkpoint, path), [])


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
    images: TestImages,
    device: torch.device,
    flip: bool = False,
    runtime: str = "torch",
) -> Iterator[tuple[int | None, nn.Module, list[Features]]]:
    """Yield for each model: its trial (None: all of them), its network, and the features of all images.

    flip: features with mirror images follow the plain ones, see embedding.TestImages.embed. runtime: see
    runtimes.for_evaluation.
    """
    dtype, processes = None, Processes()
    for model in models:
        trial = model.trials[0] if len(models) > 1 else None
        pixel_range = model.settings.get("pixel_range")
        if images.pixel_range != pixel_range:
            images.pixel_range = pixel_range
            images.pixels.clear()
        if len(models) > 1 and not images.pixels:  # RegDB's trials share most images
            images.load(args.workers, processes)
        size = args.img_h, args.img_w
        network = for_evaluation(build_model(model.checkpoint, model.path), device, runtime, size, args.amp)
        if runtime == "torch" and model is models[0]:  # the others have the same layers and sizes
            batch = partial(images.first_batch, args.test_batch, device, args.workers)
            dtype = settle(args.amp, network, batch, processes)
        features = images.embed(network, device, dtype, args.test_batch, args.workers, processes, trial, flip)
        yield trial, network, features
    images.pixels.clear()  # a report keeps the images, and all of RegDB is a gigabyte
