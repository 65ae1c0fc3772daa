"""Evaluation for train.py and test.py: embed each image once, then score every protocol."""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import data_manager
from data_loader import evaluation_batches
from data_manager import DATASETS, Samples
from devices import Array, Processes
from eval_metrics import Metrics, Trial, evaluate_trials, matched
from images import PixelRange, UnreadableImages, decode
from model import TwoStreamResNet, extract_features
from reranking import RERANKING, affinity_inference
from utils import UserError

Features = dict[str, torch.Tensor]  # {modality: (number of its images, D)}, unit norm


@dataclass(frozen=True)
class Protocol:
    """How a row of a results table is measured."""

    dataset: str
    mode: str
    shot: int = 1
    galleries: str = "seeded"
    split: str = "test"
    ignore_same_camera: bool = False  # own images: as LLCM does

    @property
    def rule(self) -> str:
        """The protocol in eval_metrics. Own images use RegDB's, or LLCM's with ignore_same_camera."""
        if self.dataset != "folder":
            return self.dataset
        return "llcm" if self.ignore_same_camera else "regdb"

    @property
    def title(self) -> str:
        """The protocol in words, for example `SYSU-MM01, all, single-shot, seeded galleries`."""
        return f"{DATASETS[self.dataset].title}, {self.row}"

    @property
    def row(self) -> str:
        """The title without the dataset."""
        words = [self.mode.replace("-", " ")]
        if self.dataset == "sysu":
            words += [{1: "single-shot", 10: "multi-shot"}[self.shot], f"{self.galleries} galleries"]
        if self.ignore_same_camera:
            words.append("same camera ignored")
        if self.split != "test":
            words.append(f"{self.split} ids")
        return ", ".join(words)


def mode_name(text: str) -> str:
    """An argparse type: the name of a mode; RegDB calls its infrared images thermal."""
    return text.replace("thermal", "infrared")


class Evaluation:
    """Queries and galleries of several protocols and trials, and all images that they need.

    Args:
        root: the dataset's folder.
        protocols: to evaluate.
        trials: of every protocol, as the dataset numbers them.
        height, width: of the network's input, in pixels.
        allow_short: see data_manager.gallery_samples; the attribute short reports what it allowed.
        more: further images to embed.
        pixel_range: of images of more than eight bits, see images.read_image; may be set later.

    Raises:
        UserError: the dataset does not exist or lacks images of a protocol, its training and test split share
            images, or no query has a match.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        protocols: Sequence[Protocol],
        trials: Sequence[int],
        height: int,
        width: int,
        allow_short: bool = False,
        more: Sequence[Samples] = (),
        pixel_range: PixelRange | None = None,
    ):
        self.height, self.width, self.pixel_range = height, width, pixel_range
        self.protocols, self.more = list(protocols), list(more)
        self.pixels: dict[str, np.ndarray] = {}  # {modality: (n, H, W, 3) uint8}, filled by `load`
        self.samples: dict[tuple[Protocol, int], tuple[Samples, Samples]] = {}  # query, gallery
        queries: dict[tuple[str, int | None], Samples] = {}  # RegDB's differ between trials
        for protocol in protocols:
            choice = {"mode": protocol.mode, "split": protocol.split}
            for trial in trials:
                key = protocol.mode, trial if protocol.dataset == "regdb" else None
                if key not in queries:
                    data_manager.refuse_shared(protocol.dataset, root, key[1], protocol.split)
                    queries[key] = data_manager.query_samples(protocol.dataset, root, trial=trial, **choice)
                gallery = data_manager.gallery_samples(
                    protocol.dataset, root, trial=trial, shot=protocol.shot, galleries=protocol.galleries,
                    allow_short=allow_short, **choice,
                )  # fmt: skip
                self.samples[protocol, trial] = queries[key], gallery
                refuse_without_match(protocol, queries[key], gallery, root)
        self.short = self._short_cells() if allow_short else ""
        self.rows: dict[str, dict[str, int]] = {"visible": {}, "infrared": {}}  # path -> row of the features
        for samples in self.all_samples():
            rows = self.rows[samples.modality]
            for path in samples.paths:
                rows.setdefault(path, len(rows))

    def _short_cells(self) -> str:
        """Report how many (id, camera) of the galleries have fewer images than the protocol needs."""
        short = set()
        for (protocol, _), (_, gallery) in self.samples.items():
            cells, counts = np.unique([gallery.pids, gallery.camids], axis=1, return_counts=True)
            short |= {(protocol.shot, *cell) for cell in cells.T[counts < protocol.shot].tolist()}
        return f"{len(short)} (id, camera) of the galleries have too few images" if short else ""

    def all_samples(self, trial: int | None = None) -> list[Samples]:
        """The queries and galleries of every protocol and trial (or of one trial), and `more`."""
        pairs = [pair for (_, number), pair in self.samples.items() if trial in (None, number)]
        return [samples for pair in pairs for samples in pair] + self.more

    def features(
        self,
        model: TwoStreamResNet,
        device: torch.device,
        dtype: torch.dtype | None,
        batch_size: int,
        workers: int,
        processes: Processes,
        trial: int | None = None,
        flip: bool = False,
    ) -> Features:
        """Embed every image once. Each process embeds its share and gets all features.

        Args:
            model: in evaluation mode, on device.
            device: of the model and the features.
            dtype: autocast's, None for float32.
            batch_size: images per batch.
            workers: threads that decode images.
            processes: the processes that share the work.
            trial: embed only this trial's images, the other rows are zeros; None: all.
            flip: see model.extract_features.

        Returns:
            {modality: (N, D) float32}, with flip (2, N, D); self.rows says which row belongs to a path.
        """
        features = {}
        for modality, rows in self.rows.items():
            images = [samples for samples in self.all_samples(trial) if samples.modality == modality]
            wanted = sorted({rows[path] for samples in images for path in samples.paths})
            mine = [row for row in wanted if row % processes.world_size == processes.rank]
            shape = (2, len(rows), model.dim) if flip else (len(rows), model.dim)
            features[modality] = torch.zeros(shape, device=device)
            if mine:
                paths = list(rows)
                source = [paths[row] for row in mine]
                if modality in self.pixels:  # decoded already, every world_size-th image in this process
                    pixels, places = self.pixels[modality], [row // processes.world_size for row in mine]
                    source = pixels if len(places) == len(pixels) else pixels[places]
                batches = evaluation_batches(
                    source, self.height, self.width, batch_size, device, workers, self.pixel_range
                )
                shown = tqdm(batches, modality, math.ceil(len(mine) / batch_size), leave=False, disable=None)
                share = extract_features(model, shown, modality, dtype, flip)
                features[modality][..., torch.tensor(mine, device=device), :] = share
            processes.all_reduce(features[modality])
        return features

    def first_batch(self, batch_size: int, device: torch.device, workers: int) -> dict[str, torch.Tensor]:
        """The first images of both modalities, together a batch: {modality: (n, 3, H, W) float32}.

        {} where one of them cannot be read: `features` names all of those.
        """
        batch = {}
        for modality, rows in self.rows.items():
            paths = list(rows)[: max(batch_size // 2, 1)]
            images = evaluation_batches(
                paths, self.height, self.width, batch_size, device, workers, self.pixel_range
            )
            with contextlib.closing(images):
                try:
                    batch[modality] = next(images)
                except UnreadableImages:
                    return {}
        return batch

    def load(self, workers: int, processes: Processes) -> None:
        """Decode this process's share of the images (uint8) once, for all calls of `features`.

        Raises UserError with every image that cannot be read.
        """
        for modality, rows in self.rows.items():
            paths = list(rows)[processes.rank :: processes.world_size]
            pixels = np.empty((len(paths), self.height, self.width, 3), np.uint8)
            start = 0
            for batch in decode(paths, self.height, self.width, workers, pixel_range=self.pixel_range):
                pixels[start : start + len(batch)] = batch
                start += len(batch)
            self.pixels[modality] = pixels

    def score(
        self, features: Features, rerank: str | None = None, trial: int | None = None
    ) -> dict[Protocol, list[Metrics]]:
        """The metrics of every protocol, one per trial.

        Args:
            features: of all images, as `features` returns them without flip.
            rerank: a key of reranking.RERANKING; None: no re-ranking.
            trial: score only this trial; None: all.

        Raises:
            UserError: a feature is not finite.
        """
        results: dict[Protocol, list[Metrics]] = {}
        for (protocol, number), (query, gallery) in self.samples.items():
            if trial not in (None, number):
                continue
            unit = [
                features[samples.modality][[self.rows[samples.modality][path] for path in samples.paths]]
                for samples in (query, gallery)
            ]
            single = Trial(*unit, query.pids, gallery.pids, query.camids, gallery.camids)
            try:
                metrics = evaluate_trials([single], protocol.rule, reranking_of(protocol, rerank))
            except ValueError as error:
                raise UserError(f"{protocol.title}: {error}") from error
            results.setdefault(protocol, []).extend(metrics)
        return results


def refuse_without_match(
    protocol: Protocol, query: Samples, gallery: Samples, root: str | os.PathLike
) -> None:
    """Raise UserError if no query has a match, or --ignore-same-camera meets an image without a camid."""
    for samples in (query, gallery) if protocol.ignore_same_camera else ():
        if not samples.camids.all():
            path = samples.paths[int(np.argmin(samples.camids))]
            raise UserError(f"--ignore-same-camera: {path} has no camid")
    if not matched(protocol.rule, query.pids, gallery.pids, query.camids, gallery.camids).any():
        rule = "no id is in both queries and gallery"
        if np.isin(query.pids, gallery.pids).any():
            rule = {
                "sysu": "every match is from camera 2, which queries of camera 3 ignore",
                "llcm": "every match is from the query's own camera, which is ignored",
            }[protocol.rule]
        raise UserError(f"{root}: {protocol.title}: no query has a match: {rule}")


def reranking_of(protocol: Protocol, name: str | None) -> Callable[[Array, Array], Array] | None:
    """The re-ranking function for a protocol; affinity inference uses its paper's neighbourhood sizes."""
    if name != "aim":
        return RERANKING[name] if name else None
    k1, k2 = 8, 2  # RegDB's; also for LLCM, which is not in the paper
    if protocol.dataset == "sysu":
        k1, k2 = (20, 6) if protocol.shot == 10 else {"all": (4, 1), "indoor": (2, 2)}[protocol.mode]
    return partial(affinity_inference, k1=k1, k2=k2)
