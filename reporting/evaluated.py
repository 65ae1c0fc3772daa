"""A checkpoint that was evaluated, and what its features tell beyond the means."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from augmentation import normalize
from data_manager import Samples
from eval_metrics import QueryValues, ignored_pairs
from evaluation.methods import Method
from evaluation.protocols import OWN_GALLERY, Evaluation, Protocol
from evaluation.rankings import Ranked, rank_queries
from evaluation.scoring import reranking_of
from evaluation.similarity import Similarities, sample_similarities
from images import PixelRange, read_image
from reporting.figures import overlay
from reporting.learning import History
from reporting.views import embed, similarity_maps
from utils import UserError

AVERAGED = 64  # images of a modality that make the average image
Picture = tuple[np.ndarray, str, str]  # an image, its kind and its caption, as figures.images has them


@dataclass
class Evaluated:
    """An evaluated method as the report shows it; its features and network are those of method.trial."""

    label: str
    method: Method
    history: History | None

    @property
    def evaluation(self) -> Evaluation:
        """Who was searched where."""
        return self.method.evaluation

    @property
    def trial(self) -> int:
        """That the features are of."""
        return self.method.trial

    @property
    def shared(self) -> bool:
        """Whether the features serve every trial, as they do but for RegDB."""
        return len(self.method.sources[0]) == 1

    @property
    def pictured(self) -> bool:
        """Whether the images of the features are known; a file of features may name none."""
        return self.method.evaluation.protocols[0].galleries != OWN_GALLERY

    @property
    def size(self) -> tuple[int, int, PixelRange | None]:
        """Height, width and pixel range that images are read with."""
        args, images = self.method.args, self.method.images
        return args.img_h, args.img_w, images and images.pixel_range

    def values(self, protocol: Protocol, rerank: str | None = None) -> QueryValues:
        """What each query of `trial` got when the method was evaluated."""
        scores = self.method.results[protocol, False, rerank].seeds[0]
        return next(score.values for score in scores if score.trial == self.trial)

    def ranked(self, protocol: Protocol, rerank: str | None = None) -> Ranked:
        """The rankings of `trial`."""
        features = self.method.features
        trial = features.trial(*self.evaluation.samples[protocol, self.trial])
        return rank_queries(trial, protocol.rule, reranking_of(protocol, rerank), features.distance)

    def images(self) -> dict[str, Samples]:
        """Every image that the features are of, each once, by modality."""
        return self.evaluation.images(None if self.shared else self.trial)

    def similarities(self) -> dict[str, Similarities]:
        """Those of similarity.sample_similarities over all images, as cosines."""
        images = self.images()
        return sample_similarities(
            {m: F.normalize(self.method.features.of(samples)) for m, samples in images.items()},
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
                parts.append(self.method.features.of(some).float().cpu().numpy())
                owners += [pid] * len(rows)
                modalities += [modality] * len(rows)
        points, method = embed(np.concatenate(parts))
        return points, np.array(owners), modalities, method

    @torch.no_grad()
    def maps(self, protocol: Protocol, queries: Sequence[int], ranked: Ranked) -> list[list[Picture]] | None:
        """A row for each of queries: it and the image ranked first, then its first match, each with its map.

        Where no match is listed, it is the one with the nearest feature. Maps show where the pair's
        similarity comes from, see views.similarity_maps. None: no network.
        """
        network, args = self.method.network, self.method.args
        if network is None:
            return None
        device = next(network.parameters()).device

        def embed_as(modality: str, images: torch.Tensor) -> torch.Tensor:
            parts = images.split(args.test_batch)
            return torch.cat([F.normalize(network(**{modality: normalize(part)})).float() for part in parts])

        def look(paths: Sequence[str]) -> torch.Tensor:
            return torch.from_numpy(np.stack([read_image(path, *self.size) for path in paths])).to(device)

        query, gallery = self.evaluation.samples[protocol, self.trial]
        averages = {
            samples.modality: look(spread(np.array(samples.paths), AVERAGED)).float().mean(0).byte()
            for samples in (query, gallery)
        }

        def maps(modality: str, image: torch.Tensor, compared: torch.Tensor) -> torch.Tensor:
            embed_images = partial(embed_as, modality)
            found = similarity_maps(embed_images, image, averages[modality], compared)
            return F.interpolate(found[:, None], image.shape[:2], mode="bilinear")[:, 0]

        rows = []
        for q in queries:
            places = ranked.places[q][~ranked.ignored[q]]
            right = places[gallery.pids[places] == query.pids[q]]
            match = right[0] if len(right) else self._nearest_match(protocol, q)
            shown = list(dict.fromkeys([places[0], match]))
            own, others = look([query.paths[q]]), look([gallery.paths[g] for g in shown])
            feature, features = embed_as(query.modality, own), embed_as(gallery.modality, others)
            row, of_queries = [], maps(query.modality, own[0], features)
            for g, of_query, image, other in zip(shown, of_queries, others, features, strict=True):
                (of_other,) = maps(gallery.modality, image, feature)
                strongest = max(heat.abs().max() for heat in (of_query, of_other)).clamp(min=1e-12)
                kinds = "query", "right" if gallery.pids[g] == query.pids[q] else "wrong"
                captions = (
                    f"pid {query.pids[q]}, cam {query.camids[q]}",
                    f"pid {gallery.pids[g]}, {float(feature[0] @ other):.2f}",
                )
                pair = zip((own[0], image), (of_query, of_other), kinds, captions, strict=True)
                for picture, heat, kind, caption in pair:
                    pixels = picture.cpu().numpy()
                    row.append((pixels, kind, caption))
                    row.append((overlay(pixels, (heat / strongest).numpy()), "", "where"))
            rows.append(row)
        return rows

    def _nearest_match(self, protocol: Protocol, q: int) -> int:
        """The counted match whose feature is most like the q-th query's."""
        query, gallery = self.evaluation.samples[protocol, self.trial]
        ids = query.pids[[q]], gallery.pids, query.camids[[q]], gallery.camids
        matches = np.flatnonzero((gallery.pids == ids[0]) & ~ignored_pairs(protocol.rule, *ids)[0])
        features = self.method.features
        similarities = features.of(gallery)[matches] @ features.of(query)[q]
        return int(matches[similarities.argmax().item()])

    def ranking(self, protocol: Protocol, queries: Sequence[int], ranked: Ranked) -> list[list[Picture]]:
        """A row for each of queries: the query, then the images ranked first for it."""
        query, gallery = self.evaluation.samples[protocol, self.trial]
        height, width, pixel_range = self.size
        enlarged = max(1, round(192 / height))  # the network's images may be small ones
        size = enlarged * height, enlarged * width, pixel_range
        rows = []
        for q in queries:
            caption = f"pid {query.pids[q]}, cam {query.camids[q]}"
            row = [(read_image(query.paths[q], *size), "query", caption)]
            shown = zip(ranked.places[q], ranked.distances[q], ranked.ignored[q], strict=True)
            for g, distance in ((g, distance) for g, distance, ignored in shown if not ignored):
                kind = "right" if gallery.pids[g] == query.pids[q] else "wrong"
                image = read_image(gallery.paths[g], *size)
                row.append((image, kind, f"{distance:.3f}, cam {gallery.camids[g]}"))
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
