"""A checkpoint that was evaluated, and what its features tell beyond the means."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from augmentation import normalize
from data_manager import Samples
from eval_metrics import Metrics
from evaluation.protocols import Evaluation, Features, Protocol, reranking_of
from evaluation.rankings import Ranked, camera_pairs, rank_queries
from evaluation.similarity import Similarities, images_of, sample_similarities
from images import read_image
from model import TwoStreamResNet
from reporting.figures import overlay
from reporting.learning import History
from reporting.views import activation_maps, embed
from utils import UserError

Picture = tuple[np.ndarray, str, str]  # an image, its kind and its caption, as figures.images has them


@dataclass
class Evaluated:
    """A checkpoint and its evaluation; features and model are those of `trial`.

    shared: whether they serve every trial, as they do but for RegDB. results: the metrics of each trial.
    """

    label: str
    path: Path
    checkpoint: dict  # what it says of itself, without the weights
    saved: dict[str, object]
    history: History | None
    evaluation: Evaluation
    model: TwoStreamResNet
    features: Features
    trial: int
    shared: bool
    results: dict[tuple[Protocol, str | None], list[Metrics]]

    @property
    def dataset(self) -> str:
        """What it was evaluated on."""
        return next(iter(self.results))[0].dataset

    def features_of(self, samples: Samples) -> torch.Tensor:
        """(N, D) features of samples' images."""
        rows = self.evaluation.rows[samples.modality]
        return self.features[samples.modality][[rows[path] for path in samples.paths]]

    def distmat(self, protocol: Protocol, trial: int, rerank: str | None = None) -> np.ndarray:
        """(Q, G) distances, smaller is nearer: 1 - cosine similarity, or those of re-ranking."""
        query, gallery = map(self.features_of, self.evaluation.samples[protocol, trial])
        distances = reranking_of(protocol, rerank) or (lambda one, other: 1 - one @ other.T)
        return distances(query, gallery).cpu().numpy()

    def ids(self, protocol: Protocol, trial: int) -> tuple:
        """What rank_queries takes behind the distances: pids, camids and whose rules count."""
        query, gallery = self.evaluation.samples[protocol, trial]
        return query.pids, gallery.pids, query.camids, gallery.camids, protocol.rule

    def ranked(self, protocol: Protocol, rerank: str | None = None) -> tuple[Ranked, np.ndarray]:
        """The rankings of `trial`, and their distances (Q, G)."""
        distmat = self.distmat(protocol, self.trial, rerank)
        return rank_queries(distmat, *self.ids(protocol, self.trial)), distmat

    def cameras(self, protocol: Protocol) -> dict[tuple[int, int], tuple[float, float]]:
        """(rank-1, mAP) by (query camera, gallery camera), mean over the trials that the features serve."""
        trials = [t for p, t in self.evaluation.samples if p == protocol and (self.shared or t == self.trial)]
        found = [camera_pairs(self.distmat(protocol, t), *self.ids(protocol, t)) for t in trials]
        return {pair: tuple(np.mean([each[pair] for each in found], axis=0).tolist()) for pair in found[0]}

    def images(self) -> dict[str, Samples]:
        """Every image that the features are of, each once, by modality."""
        return images_of(self.evaluation, None if self.shared else self.trial)

    def similarities(self) -> dict[str, Similarities]:
        """Those of similarity.sample_similarities over all images."""
        images = self.images()
        return sample_similarities(
            {modality: self.features_of(samples) for modality, samples in images.items()},
            {modality: samples.pids for modality, samples in images.items()},
        )

    def embedding(
        self, identities: int = 20, count: int = 8
    ) -> tuple[np.ndarray, np.ndarray, list[str], str]:
        """What figures.embedding takes, of at most `count` images of each modality of some identities."""
        images = self.images()
        pids = spread(np.intersect1d(*(samples.pids for samples in images.values())), identities)
        parts, owners, modalities = [], [], []
        for modality, samples in images.items():
            for pid in pids.tolist():
                rows = spread(np.flatnonzero(samples.pids == pid), count)
                some = Samples(
                    [samples.paths[k] for k in rows], samples.pids[rows], samples.camids[rows], modality
                )
                parts.append(self.features_of(some).float().cpu().numpy())
                owners += [pid] * len(rows)
                modalities += [modality] * len(rows)
        points, method = embed(np.concatenate(parts))
        return points, np.array(owners), modalities, method

    def activations(self, identities: int = 4, count: int = 2) -> list[list[Picture]]:
        """A row for each identity: visible, then infrared images, each beside its activation map."""
        images = self.images()
        size = self.evaluation.height, self.evaluation.width, self.evaluation.pixel_range
        device = next(self.model.parameters()).device
        rows = []
        for pid in spread(
            np.intersect1d(*(samples.pids for samples in images.values())), identities
        ).tolist():
            row = []
            for modality, samples in images.items():
                for k in spread(np.flatnonzero(samples.pids == pid), count).tolist():
                    image = read_image(samples.paths[k], *size).copy()  # torch wants it writable
                    batch = normalize(torch.from_numpy(image[None]).to(device))
                    heat = overlay(image, activation_maps(self.model, batch, modality)[0])
                    row += [(image, "", f"pid {pid}, cam {samples.camids[k]}"), (heat, "", modality)]
            rows.append(row)
        return rows

    def ranking(
        self, protocol: Protocol, queries: Sequence[int], ranked: Ranked, distmat: np.ndarray
    ) -> list[list[Picture]]:
        """A row for each of queries: the query, then the images ranked first for it."""
        query, gallery = self.evaluation.samples[protocol, self.trial]
        enlarged = max(1, round(192 / self.evaluation.height))  # the network's images may be small ones
        size = (
            enlarged * self.evaluation.height,
            enlarged * self.evaluation.width,
            self.evaluation.pixel_range,
        )
        rows = []
        for q in queries:
            caption = f"pid {query.pids[q]}, cam {query.camids[q]}"
            row = [(read_image(query.paths[q], *size), "query", caption)]
            for g in ranked.places[q][~ranked.ignored[q]].tolist():
                kind = "right" if gallery.pids[g] == query.pids[q] else "wrong"
                image = read_image(gallery.paths[g], *size)
                row.append((image, kind, f"{distmat[q, g]:.3f}, cam {gallery.camids[g]}"))
            rows.append(row)
        return rows


def spread(values: np.ndarray, count: int) -> np.ndarray:
    """At most count of values, evenly taken."""
    return values[np.unique(np.linspace(0, len(values) - 1, min(count, len(values))).astype(int))]


def labels(paths: list[Path]) -> list[str]:
    """A name for each checkpoint: what distinguishes its file's name, or its folder's, from the others'.

    UserError if two of paths are the same.
    """
    parts = [path.absolute().with_suffix("").parts for path in paths]
    depths = range(1, min(map(len, parts)) + 1)
    depth = next((k for k in depths if len({those[-k] for those in parts}) == len(paths)), None)
    if depth is None:
        raise UserError("--resume: the same checkpoint twice")
    words = [those[-depth].split("_") for those in parts]
    for end in (0, -1):
        while len(words) > 1 and min(map(len, words)) > 1 and len({those[end] for those in words}) == 1:
            for those in words:
                del those[end]
    names = ["_".join(those) for those in words]
    short = [name if len(name) <= 34 else f"{name[:24]}…{name[-9:]}" for name in names]
    return short if len(set(short)) == len(names) else names
