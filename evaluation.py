"""Evaluation for train.py and test.py alike: each image embedded once, every protocol scored from that."""

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
from images import PixelRange, decode
from model import TwoStreamResNet, extract_features
from reranking import RERANKING, affinity_inference
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


def saved_settings(checkpoint: dict, path: str | os.PathLike) -> dict[str, object]:
    """What a checkpoint says that it was trained with, by train.py's flags; {} for the released code's.

    Raises UserError naming path for a setting that evaluation reads and that cannot be.
    """

    def number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    valid = {
        "dataset": lambda value: isinstance(value, str) and value in DATASETS,
        "img_h": lambda value: number(value) and value >= 8,
        "img_w": lambda value: number(value) and value >= 8,
        "amp": lambda value: value in ("auto", "bf16", "fp16", "off"),
        "trial": lambda value: value is None or (isinstance(value, str) and value.isdecimal()),
        "pixel_range": lambda value: value is None or (len(value) == 2 and all(map(number, value))),
    }
    settings = checkpoint.get("args")
    if not isinstance(settings, dict):
        return {}
    for key, holds in valid.items():
        try:
            good = key not in settings or holds(settings[key])
        except TypeError:  # no length, say
            good = False
        if not good:
            raise UserError(f"{path}: invalid settings: {key} {settings[key]!r}")
    return settings


def mode_name(text: str) -> str:
    """An argparse type: the name of a mode; RegDB calls its infrared images thermal."""
    return text.replace("thermal", "infrared")


@dataclass(frozen=True)
class Counts:
    """What the numbers of one protocol and trial are based on."""

    queries: int  # query images
    gallery: int  # gallery images
    identities: int  # in queries and gallery together
    candidates: int  # identities in the gallery: a ranking of one alone is always right
    counted: int  # queries with a match: the averages are over these

    def __str__(self) -> str:
        unmatched = self.queries - self.counted
        matches = f"{unmatched:,} of them without a match and left out" if unmatched else "all with a match"
        images = f"{self.gallery:,} gallery images, {self.identities:,} identities"
        return f"{self.queries:,} queries, {matches}, {images}"


COUNTED = {
    "queries": "queries",
    "gallery": "gallery images",
    "identities": "identities",
    "counted": "queries with a match",
}
# (dataset, mode, shot) -> what is published of Counts; RegDB's and LLCM's modes have the same numbers.
PUBLISHED = {
    ("sysu", "all", 1): {"queries": 3803, "gallery": 301, "identities": 96, "counted": 3803},
    ("sysu", "all", 10): {"queries": 3803, "gallery": 3010, "identities": 96, "counted": 3803},
    ("sysu", "indoor", 1): {"queries": 3803, "gallery": 112, "identities": 96, "counted": 2208},
    ("sysu", "indoor", 10): {"queries": 3803, "gallery": 1120, "identities": 96, "counted": 2208},
    **{
        (name, mode, 1): numbers
        for name, numbers in (
            ("regdb", {"queries": 2060, "gallery": 2060, "identities": 206, "counted": 2060}),
            ("llcm", {"identities": 1064 - 713}),
        )
        for mode in data_manager.BOTH_WAYS
    },
}


class Evaluation:
    """Queries and galleries of several protocols and trials, and the images that any of them needs.

    Args:
        root: the dataset's folder.
        protocols, trials: what is evaluated; trials are numbers of the dataset's.
        height, width: of the images as the network takes them, pixels.
        allow_short: see data_manager.gallery_samples; what it allowed is reported in `short`.
        more: images to embed besides.
        pixel_range: of images of more than eight bits, see images.read_image; may be set later.

    Raises:
        UserError: a dataset that does not exist, does not hold what a protocol needs, tests on what was
            trained on, or has no query with a match.
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
        self.pixels: dict[str, np.ndarray] = {}  # {modality: (n, H, W, 3) uint8}, once `load` was called
        self.samples: dict[tuple[Protocol, int], tuple[Samples, Samples]] = {}  # query, gallery
        self.counts: dict[tuple[Protocol, int], Counts] = {}
        queries: dict[tuple[str, int | None], Samples] = {}  # only RegDB's differ between trials
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
                self.counts[protocol, trial] = count(protocol, queries[key], gallery, root)
        self.short = self._short_cells() if allow_short else ""
        self.rows: dict[str, dict[str, int]] = {"visible": {}, "infrared": {}}  # path -> row of the features
        for samples in self.all_samples():
            rows = self.rows[samples.modality]
            for path in samples.paths:
                rows.setdefault(path, len(rows))

    def _short_cells(self) -> str:
        """Say how many (id, camera) of the galleries have fewer images than the protocol takes."""
        short = set()
        for (protocol, _), (_, gallery) in self.samples.items():
            cells, counts = np.unique([gallery.pids, gallery.camids], axis=1, return_counts=True)
            short |= {(protocol.shot, *cell) for cell in cells.T[counts < protocol.shot].tolist()}
        return f"{len(short)} (id, camera) of the galleries have too few images" if short else ""

    def warnings(self) -> list[str]:
        """What a reader must know of the numbers: counts that are not the published ones, a lone identity."""
        lines = []
        for (protocol, _), counts in self.counts.items():
            published = PUBLISHED.get((protocol.dataset, protocol.mode, protocol.shot), {})
            found = {name: getattr(counts, name) for name in published}
            if found != published and protocol.split == "test" and not lines:
                differing = (name for name in published if found[name] != published[name])
                words = (f"{found[name]:,} {COUNTED[name]} ({published[name]:,})" for name in differing)
                lines.append(f"{protocol.title}: not the published counts (in brackets): {', '.join(words)}")
        if any(counts.candidates == 1 for counts in self.counts.values()):
            lines.append("a gallery of one identity: its numbers mean nothing, every ranking is right")
        return lines

    def all_samples(self, trial: int | None = None) -> list[Samples]:
        """The queries and galleries of every protocol and trial (or of one trial), and those of `more`."""
        chosen = [both for (_, number), both in self.samples.items() if trial in (None, number)]
        return [samples for both in chosen for samples in both] + self.more

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
        """Embed every image once, each process its share; of one trial only if it is given.

        Args:
            model: in evaluation mode, on device.
            dtype: autocast's, None for float32.
            batch_size: images that the network takes at a time.
            workers: threads that decode images.
            trial: whose images; the other rows are zeros.
            flip: see model.extract_features; the features are then (2, number of images, D).
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
                if modality in self.pixels:
                    kept, places = self.pixels[modality], [row // processes.world_size for row in mine]
                    source = kept if len(places) == len(kept) else kept[places]
                batches = evaluation_batches(
                    source, self.height, self.width, batch_size, device, workers, self.pixel_range
                )
                shown = tqdm(batches, modality, math.ceil(len(mine) / batch_size), leave=False, disable=None)
                own = extract_features(model, shown, modality, dtype, flip)
                features[modality][..., torch.tensor(mine, device=device), :] = own
            processes.all_reduce(features[modality])
        return features

    def load(self, workers: int, processes: Processes) -> None:
        """Decode this process's share of all images and keep it (uint8) for every call of `features`.

        UserError naming every image that cannot be read.
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
        """The metrics of every protocol, one for each trial (or of one trial only).

        rerank: None or one of reranking.RERANKING. Raises UserError for a feature that is not finite.
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
                found = evaluate_trials([single], protocol.rule, reranking_of(protocol, rerank))
            except ValueError as error:
                raise UserError(f"{protocol.title}: {error}") from error
            results.setdefault(protocol, []).extend(found)
        return results


def count(protocol: Protocol, query: Samples, gallery: Samples, root: str | os.PathLike) -> Counts:
    """Count what a protocol's numbers are based on; UserError where no query has a match, or no camid."""
    for samples in (query, gallery) if protocol.ignore_same_camera else ():
        if not samples.camids.all():
            path = samples.paths[int(np.argmin(samples.camids))]
            raise UserError(f"--ignore-same-camera: no camid of {path}")
    found = matched(protocol.rule, query.pids, gallery.pids, query.camids, gallery.camids)
    if not found.any():
        rule = "no id is in both queries and gallery"
        if np.isin(query.pids, gallery.pids).any():
            rule = {
                "sysu": "every match is of camera 2, which queries of camera 3 ignore",
                "llcm": "every match is of the query's own camera, which is ignored",
            }[protocol.rule]
        raise UserError(f"{root}: {protocol.title}: no query has a match: {rule}")
    identities, candidates = np.union1d(query.pids, gallery.pids), np.unique(gallery.pids)
    return Counts(len(query), len(gallery), len(identities), len(candidates), int(found.sum()))


def reranking_of(protocol: Protocol, name: str | None) -> Callable[[Array, Array], Array] | None:
    """The function that re-ranks under a protocol; affinity inference takes the paper's neighbourhoods."""
    if name != "aim":
        return RERANKING[name] if name else None
    k1, k2 = 8, 2  # RegDB's; LLCM, which the paper has no numbers for, has galleries of a like kind
    if protocol.dataset == "sysu":
        k1, k2 = (20, 6) if protocol.shot == 10 else {"all": (4, 1), "indoor": (2, 2)}[protocol.mode]
    return partial(affinity_inference, k1=k1, k2=k2)
