"""Evaluation as train.py and test.py both do it: each image embedded once, every protocol scored from that.

It wires data_manager, images, data_loader, model and eval_metrics for the scripts.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import data_manager
from data_loader import evaluation_batches
from data_manager import DATASETS, Samples
from devices import Processes
from eval_metrics import Metrics, Trial, evaluate_trials
from images import PixelRange, decode
from model import TwoStreamResNet, extract_features
from utils import UserError

Features = dict[str, torch.Tensor]  # {modality: (number of its images, D)}, unit norm


@dataclass(frozen=True)
class Protocol:
    """What one line of a results table is measured on."""

    dataset: str
    mode: str
    shot: int = 1
    galleries: str = "seeded"
    split: str = "test"
    ignore_same_camera: bool = False  # own images: as LLCM does

    @property
    def rule(self) -> str:
        """Whose rules eval_metrics applies; own images have RegDB's, or LLCM's if cameras count."""
        if self.dataset != "folder":
            return self.dataset
        return "llcm" if self.ignore_same_camera else "regdb"

    @property
    def title(self) -> str:
        """The protocol spelled out, but for its trials: `SYSU-MM01, all, single-shot, seeded galleries`."""
        return f"{DATASETS[self.dataset].title}, {self.row}"

    @property
    def row(self) -> str:
        """The title without the dataset's."""
        words = [self.mode.replace("-", " ")]
        if self.dataset == "sysu":
            words += [{1: "single-shot", 10: "multi-shot"}[self.shot], f"{self.galleries} galleries"]
        if self.ignore_same_camera:
            words.append("same camera ignored")
        if self.split != "test":
            words.append(f"{self.split} ids")
        return ", ".join(words)


class Evaluation:
    """Queries and galleries of several protocols and trials, and the images that any of them needs.

    trials: which of the dataset's. allow_short: see gallery_samples; what it let pass is told in `short`.
    more: images to embed besides. check_stop: called at every batch; what it raises ends the work.
    pixel_range: of images of more than eight bits, see images.read_image. Raises UserError for a dataset that
    is not there or does not hold what a protocol needs.
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
        check_stop: Callable[[], None] = lambda: None,
        pixel_range: PixelRange | None = None,
    ):
        self.height, self.width, self.check_stop = height, width, check_stop
        self.pixel_range = pixel_range  # as the training images were decoded; training learns it later
        self.pixels: dict[str, np.ndarray] = {}  # {modality: (n, H, W, 3) uint8}, once `load` was called
        self.samples: dict[tuple[Protocol, int], tuple[Samples, Samples]] = {}
        short = set()
        queries: dict[tuple[str, int | None], Samples] = {}  # only RegDB's differ between trials
        for protocol in protocols:
            choice = {"mode": protocol.mode, "split": protocol.split}
            for trial in trials:
                key = protocol.mode, trial if protocol.dataset == "regdb" else None
                if key not in queries:
                    queries[key] = data_manager.query_samples(protocol.dataset, root, trial=trial, **choice)
                gallery = data_manager.gallery_samples(
                    protocol.dataset,
                    root,
                    trial=trial,
                    shot=protocol.shot,
                    galleries=protocol.galleries,
                    allow_short=allow_short,
                    **choice,
                )
                self.samples[protocol, trial] = queries[key], gallery
                if protocol.ignore_same_camera:
                    for samples in self.samples[protocol, trial]:
                        if not samples.camids.all():
                            path = samples.paths[int(np.argmin(samples.camids))]
                            raise UserError(f"--ignore-same-camera: no camid of {path}")
                if allow_short:
                    cells = np.stack([gallery.pids, gallery.camids], axis=1)
                    keys, counts = np.unique(cells, axis=0, return_counts=True)
                    short |= {(protocol.shot, *key) for key in keys[counts < protocol.shot].tolist()}
        self.short = f"{len(short)} (id, camera) of the galleries have too few images" if short else ""
        self.more = list(more)
        self.rows: dict[str, dict[str, int]] = {"visible": {}, "infrared": {}}  # path -> row of the features
        for samples in self.all_samples():
            rows = self.rows[samples.modality]
            for path in samples.paths:
                rows.setdefault(path, len(rows))

    def all_samples(self, trial: int | None = None) -> Iterator[Samples]:
        """The queries and galleries of every protocol and trial (or of one trial), and those of `more`."""
        for (_, t), both in self.samples.items():
            if trial in (None, t):
                yield from both
        yield from self.more

    def features(
        self,
        model: TwoStreamResNet,
        device: torch.device,
        dtype: torch.dtype | None,
        batch_size: int,
        workers: int,
        processes: Processes,
        trial: int | None = None,
    ) -> Features:
        """Embed every image once, each process its share; of one trial only if it is given (zeros elsewhere).

        The model must be in evaluation mode, on device; dtype is autocast's, None for float32.
        """
        features = {}
        for modality, rows in self.rows.items():
            those = (samples for samples in self.all_samples(trial) if samples.modality == modality)
            wanted = sorted({rows[path] for samples in those for path in samples.paths})
            mine = [row for row in wanted if row % processes.world_size == processes.rank]
            all_features = torch.zeros(len(rows), model.dim, device=device)
            if mine:
                if modality in self.pixels:
                    kept, places = self.pixels[modality], [row // processes.world_size for row in mine]
                    source = kept if len(places) == len(kept) else kept[places]
                else:
                    paths = list(rows)
                    source = [paths[row] for row in mine]
                batches = evaluation_batches(
                    source, self.height, self.width, batch_size, device, workers, self.pixel_range
                )
                number = math.ceil(len(mine) / batch_size)
                shown = self._checked(tqdm(batches, modality, number, leave=False, disable=None))
                all_features[torch.tensor(mine, device=device)] = extract_features(
                    model, shown, modality, dtype
                )
            features[modality] = processes.all_reduce(all_features)
        return features

    def _checked(self, batches: Iterable) -> Iterator:
        for batch in batches:
            self.check_stop()
            yield batch

    def load(self, workers: int, processes: Processes) -> None:
        """Decode this process's share of all images and keep it (uint8) for every call of `features`.

        UserError naming every image that cannot be read.
        """
        for modality, rows in self.rows.items():
            paths = list(rows)[processes.rank :: processes.world_size]
            pixels = np.empty((len(paths), self.height, self.width, 3), np.uint8)
            start = 0
            batches = decode(paths, self.height, self.width, workers, pixel_range=self.pixel_range)
            for batch in self._checked(batches):
                pixels[start : start + len(batch)] = batch
                start += len(batch)
            self.pixels[modality] = pixels

    def score(
        self, features: Features, rerank: str | None = None, trial: int | None = None
    ) -> dict[Protocol, list[Metrics]]:
        """The metrics of every protocol, one for each trial (or of one trial only).

        UserError: no query has a match in a gallery, or a feature is not finite.
        """
        trials: dict[Protocol, list[Trial]] = {}
        taken: dict[tuple[str, ...], torch.Tensor] = {}  # trials with the same queries share one tensor

        def rows_of(samples: Samples) -> torch.Tensor:
            key = tuple(samples.paths)
            if key not in taken:
                rows = [self.rows[samples.modality][path] for path in samples.paths]
                taken[key] = features[samples.modality][rows]
            return taken[key]

        for (protocol, t), (query, gallery) in self.samples.items():
            if trial in (None, t):
                trials.setdefault(protocol, []).append(
                    Trial(
                        rows_of(query),
                        rows_of(gallery),
                        query.pids,
                        gallery.pids,
                        query.camids,
                        gallery.camids,
                    )
                )
        results = {}
        for protocol, those in trials.items():
            try:
                results[protocol] = evaluate_trials(those, protocol.rule, rerank)
            except ValueError as error:
                raise UserError(f"{protocol.title}: {error}") from error
        return results
