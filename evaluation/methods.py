"""What a command compares: checkpoints and files of features, each evaluated in the same loop.

find_methods reads what --resume and --features name and refuses what does not fit; Method.evaluate then does
the long work. Only checkpoints load the network's code, so that files of features are judged at once.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import data_manager
from eval_metrics import Metrics, summarize
from evaluation import intervals
from evaluation.features import FeatureFile, every_image, read_features
from evaluation.flags import protocols_of, settings_of
from evaluation.intervals import Jackknife
from evaluation.protocols import Evaluation, Protocol
from evaluation.scoring import Features, Score, rerankings_of, score
from utils import Parser, UserError

Row = tuple[Protocol, bool, str | None]  # protocol, with mirror images, re-ranking
SEED = "{seed}"


@dataclass
class Scores:
    """A row of a table: the scores of every seed and trial of a method."""

    seeds: list[list[Score]]  # of each seed (one, unless {seed} is in a name) its trials

    @property
    def mean(self) -> Metrics:
        """The mean over seeds and trials."""
        return summarize([each.metrics for trials in self.seeds for each in trials])[0]

    @property
    def by_trial(self) -> list[Metrics]:
        """Of each trial the mean over seeds."""
        return [summarize([each.metrics for each in trial])[0] for trial in zip(*self.seeds, strict=True)]

    @property
    def over_trials(self) -> Metrics:
        """The deviation over trials, of the mean over seeds: how much the drawn galleries matter."""
        return summarize(self.by_trial)[1]

    @property
    def over_seeds(self) -> Metrics:
        """The deviation over seeds, of the mean over trials: how much the training's chance matters."""
        return summarize([summarize([each.metrics for each in trials])[0] for trials in self.seeds])[1]

    @property
    def jackknife(self) -> Jackknife | None:
        """Of the mean over seeds and trials; None: it is unknown which persons the trials share."""
        if any(each.jackknife is None for trials in self.seeds for each in trials):
            return None
        return intervals.mean([each.jackknife for trials in self.seeds for each in trials])


@dataclass
class Method:
    """Checkpoints or features under one name; after evaluate(), what they score."""

    name: str  # as typed
    args: argparse.Namespace
    sources: list  # of each seed: its models, see models.Model, or its FeatureFiles
    evaluation: Evaluation
    results: dict[Row, Scores] = field(default_factory=dict)
    features: Features | None = None  # of the first seed, and of the trial `trial` unless it serves all
    trial: int = 0
    network: torch.nn.Module | None = None  # that made them
    images: object = None  # embedding.TestImages: size and pixel range of the network's input

    @property
    def facts(self) -> list[dict]:
        """What each checkpoint or file says of itself: path, trials and more."""
        return [each.facts() for source in self.sources for each in source]

    @property
    def trials(self) -> list[int]:
        """That are evaluated, in the order of the scores."""
        return [trial for each in self.sources[0] for trial in each.trials]

    def evaluate(self, device: torch.device, flip: bool = False, runtime: str = "torch") -> None:
        """Embed or read features and score every row of the table, the plain ones first.

        Args:
            device: where features are compared.
            flip: rows with the mean feature of an image and its mirror, too.
            runtime: of checkpoints' networks, see runtimes.for_evaluation.
        """
        flips = (False, True) if flip else (False,)
        rows = [(mirror, rerank) for mirror in flips for rerank in rerankings_of(self.args.rerank)]
        for source in self.sources:
            found: dict[Row, list[Score]] = {}
            for trial, network, variants in self._features(source, device, flip, runtime):
                if self.features is None:  # of several, the first is shown
                    self.features, self.network, self.trial = variants[0], network, self.trials[0]
                for mirror, rerank in rows:
                    for protocol, scores in score(
                        self.evaluation, variants[int(mirror)], rerank, trial
                    ).items():
                        found.setdefault((protocol, mirror, rerank), []).extend(scores)
            for row in ((protocol, *row) for protocol in self.evaluation.protocols for row in rows):
                self.results.setdefault(row, Scores([])).seeds.append(found[row])

    def _features(self, source: list, device: torch.device, flip: bool, runtime: str) -> Iterator[tuple]:
        """Yield (trial or None for all, network or None, [features, and with flip the mirrored ones])."""
        if isinstance(source[0], FeatureFile):
            for file in source:
                yield file.trials[0] if len(source) > 1 else None, None, [file.features.to(device)]
            return
        from evaluation.embedding import TestImages
        from evaluation.models import embed_models

        args = self.args
        if self.images is None:
            self.images = TestImages(self.evaluation, args.img_h, args.img_w)
        yield from embed_models(args, source, self.images, device, flip, runtime)


def find_methods(make_parser: Callable[[], Parser], words: Sequence[str], more: bool = False) -> list[Method]:
    """Read what --resume and --features name, in the order of these two flags.

    Args:
        make_parser: gives a parser with evaluation_flags.
        words: the command line.
        more: take every test image, also those that no protocol uses.

    Raises:
        UserError: nothing to evaluate, or what cannot be.
    """
    typed = make_parser().parse_args(words)
    if typed.images and not any(name.endswith(".npy") for name in typed.features):
        raise UserError(f"--images {typed.images}: it says what the rows of a --features FILE.npy are")
    flags = [word.partition("=")[0] for word in words]
    order = sorted(
        ("resume", "features"), key=lambda name: flags.index(f"--{name}") if f"--{name}" in flags else -1
    )
    names = [(flag, name) for flag in order for name in getattr(typed, flag)]
    if not names:
        raise UserError("nothing to evaluate: set --resume or --features (--help lists the flags)")
    if len(set(names)) < len(names):
        flag, name = next(pair for pair in names if names.count(pair) > 1)
        raise UserError(f"--{flag} {name}: given twice")
    methods: list[Method] = []
    for flag, name in names:
        dataset = methods[0].args.dataset if methods else None
        find = _find_checkpoints if flag == "resume" else _find_files
        methods.append(find(make_parser, list(words), name, dataset, more))
    return methods


def _find_checkpoints(make_parser, words, name, dataset, more) -> Method:
    from evaluation.models import find_checkpoints, refuse_trained_on

    sources, args = [], None
    for path in seeds_of(name, "--resume", make_parser().parse_args(words).model_path):
        args, models = find_checkpoints(make_parser(), words, path, dataset)
        sources.append(models)
    trials = [trial for model in sources[0] for trial in model.trials]
    if any([trial for model in models for trial in model.trials] != trials for models in sources):
        raise UserError(f"--resume {name}: its seeds do not have the same trials")
    root = data_manager.dataset_root(args.dataset, args.data_path)
    evaluation = Evaluation.draw(root, protocols_of(args), trials, args.allow_short, every_image(args, more))
    for models in sources if args.dataset == "regdb" else ():
        for model in models:
            refuse_trained_on(model, root)
    return Method(name, args, sources, evaluation)


def _find_files(make_parser, words, name, dataset, more) -> Method:
    typed = make_parser().parse_args(words)
    args = settings_of(make_parser(), words, typed.dataset or dataset or "sysu", typed.trial, {})
    sources, evaluation = [], None
    for path in seeds_of(name, "--features", typed.model_path):
        files, evaluation = read_features(args, path, evaluation, more)
        sources.append(files)
    return Method(name, args, sources, evaluation)


def seeds_of(name: str, flag: str, elsewhere: str) -> list[str]:
    """The files that a name with {seed} stands for, in the order of the seeds; else the name itself.

    elsewhere: the second folder to look in.
    """
    if SEED not in name:
        return [name]
    for path in (Path(name), Path(elsewhere, name)):
        depth = next(k for k, part in enumerate(path.parts) if SEED in part)
        folder, pattern = Path(*path.parts[:depth]), re.escape(path.parts[depth])
        pattern = pattern.replace(re.escape(SEED), r"(\d+)", 1).replace(re.escape(SEED), r"\1")
        pattern = pattern.replace(re.escape("{trial}"), r"\d+")
        entries = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        seeds = {match[1] for entry in entries if (match := re.fullmatch(pattern, entry))}
        found = [str(path).replace(SEED, seed) for seed in sorted(seeds, key=int)]
        if found := [each for each in found if "{trial}" in each or Path(each).exists()]:
            return found
    raise UserError(f"{flag} {name}: no file with the number of a seed there")


def difference(row: Row, method: Method, first: Method) -> Jackknife | None:
    """The paired difference to the first method; None unless queries and galleries are the same."""
    trials = method.trials
    if row not in first.results or trials != first.trials:
        return None
    for trial in trials:
        both = [each.evaluation.samples[row[0], trial] for each in (method, first)]
        if both[0] is not both[1] and any(
            sorted(zip(one.pids.tolist(), one.camids.tolist(), strict=True))
            != sorted(zip(other.pids.tolist(), other.camids.tolist(), strict=True))
            for one, other in zip(*both, strict=True)
        ):
            return None
    both = method.results[row].jackknife, first.results[row].jackknife
    return None if None in both or both[0].persons != both[1].persons else both[0] - both[1]
