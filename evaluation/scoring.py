"""Features of images, found by path, and what every query of every protocol and trial gets with them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch

from data_manager import Samples
from devices import Array
from eval_metrics import Metrics, QueryValues, Trial, evaluate_queries
from evaluation.intervals import Jackknife, evaluate_with_jackknife
from evaluation.protocols import OWN_GALLERY, Evaluation, Protocol
from reranking import ONE_AT_A_TIME, RERANKING, affinity_inference
from utils import UserError

ALONE = ", one query at a time"  # ends the names of re-rankings in reranking.ONE_AT_A_TIME


@dataclass(frozen=True)
class Features:
    """Features of images of both modalities; distance: "cosine", then they are unit, or "euclidean"."""

    rows: Mapping[str, Mapping[str, int]]  # {modality: {image path: its row}}
    tensors: Mapping[str, torch.Tensor]  # {modality: (N, D)}
    distance: str = "cosine"

    @classmethod
    def of_images(
        cls, images: Mapping[str, Samples], tensors: Mapping[str, torch.Tensor], distance: str = "cosine"
    ) -> "Features":
        """Features in the order of images, see Evaluation.images."""
        rows = {m: {path: row for row, path in enumerate(samples.paths)} for m, samples in images.items()}
        return cls(rows, tensors, distance)

    def of(self, samples: Samples) -> torch.Tensor:
        """(n, D) features of samples' images, in their order."""
        rows, tensor = self.rows[samples.modality], self.tensors[samples.modality]
        wanted = [rows[path] for path in samples.paths]
        return (
            tensor if wanted == list(range(len(tensor))) else tensor[wanted]
        )  # a file's gallery may be large

    def to(self, device: torch.device) -> "Features":
        """The same on another device."""
        tensors = {modality: tensor.to(device) for modality, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)

    def trial(self, query: Samples, gallery: Samples) -> Trial:
        """What eval_metrics evaluates."""
        ids = query.pids, gallery.pids, query.camids, gallery.camids
        return Trial(self.of(query), self.of(gallery), *ids)


@dataclass(frozen=True)
class Score:
    """A protocol's trial, evaluated: values of its queries, in the order of Evaluation.samples[0]."""

    trial: int
    values: QueryValues  # ap, inp, first (place), counted: (Q,)
    jackknife: Jackknife | None  # mAP and rank-1 without each person; None: not asked for
    metrics: Metrics  # the means of values


def score(
    evaluation: Evaluation,
    features: Features,
    rerank: str | None = None,
    trial: int | None = None,
    intervals: bool = True,
) -> dict[Protocol, list[Score]]:
    """Evaluate every protocol, and every trial of it or a single one.

    Args:
        evaluation: who is searched where.
        features: of all its images.
        rerank: see rerankings_of; None: no re-ranking.
        trial: only this one; None: all.
        intervals: compute the jackknife too, which takes about as long again.

    Raises:
        UserError: features that cannot be evaluated.
    """
    evaluate = evaluate_with_jackknife if intervals else lambda *of: (evaluate_queries(*of), None)
    results: dict[Protocol, list[Score]] = {}
    number_of_trials = len({number for _, number in evaluation.samples})
    for (protocol, number), pair in evaluation.samples.items():
        if trial not in (None, number):
            continue
        function = reranking_of(protocol, rerank)
        try:
            values, jackknife = evaluate(features.trial(*pair), protocol.rule, function, features.distance)
        except ValueError as error:
            raise UserError(f"{protocol.title}: {error}") from error
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
                raise
            what = f"{rerank} re-ranking" if rerank else "evaluation"
            sizes = "{:,} queries and {:,} gallery images".format(*map(len, pair))
            raise UserError(f"{protocol.title}: not enough memory for {what} of {sizes}") from error
        if intervals and protocol.dataset == "regdb" and number_of_trials > 1:
            own = protocol.galleries == OWN_GALLERY  # then no paths say who it is
            jackknife = None if own else jackknife.renamed(_persons_of_regdb(*pair))
        results.setdefault(protocol, []).append(Score(number, values, jackknife, values.metrics()))
    return results


def _persons_of_regdb(query: Samples, gallery: Samples) -> dict[int, str]:
    """{pid: the first of the person's paths}: RegDB's ten splits share persons, but number them anew."""
    names: dict[int, str] = {}
    for samples in (query, gallery):
        for pid, path in zip(samples.pids.tolist(), samples.paths, strict=True):
            names[pid] = min(path, names.get(pid, path))
    return names


def rerankings_of(asked: Sequence[str]) -> list[str | None]:
    """The re-rankings of a table's rows: None, then each that was asked for, followed by its partner.

    The partner re-ranks one query at a time, as a search would. "aim" has none, since it does so itself.
    """
    rows = ((name, name + ALONE) if name in ONE_AT_A_TIME else (name,) for name in asked)
    return list(dict.fromkeys((None, *chain.from_iterable(rows))))


def rerank_title(name: str | None) -> str:
    """What a row's title says of its re-ranking: `, gnn re-ranking, one query at a time`."""
    return ", {} re-ranking{}{}".format(*name.partition(",")) if name else ""


def reranking_of(protocol: Protocol, name: str | None) -> Callable[[Array, Array], Array] | None:
    """The re-ranking function for a protocol; affinity inference uses its paper's neighbourhood sizes."""
    if name != "aim":
        return (RERANKING | {key + ALONE: one for key, one in ONE_AT_A_TIME.items()})[name] if name else None
    k1, k2 = 8, 2  # RegDB's; also for LLCM, which is not in the paper
    if protocol.dataset == "sysu":
        k1, k2 = (20, 6) if protocol.shot == 10 else {"all": (4, 1), "indoor": (2, 2)}[protocol.mode]
    return partial(affinity_inference, k1=k1, k2=k2)
