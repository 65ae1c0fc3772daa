"""CMC, mAP and mINP under the three protocols, and the loop over trials (docs/method.md, section 8).

A query has few matches, so its gallery is not sorted: the number of nearer images is the rank of a match.
Images that the protocol ignores get distance infinity. Only the galleries of queries with ties are sorted.
Distances come in blocks of queries, cut from a distance matrix or computed from features, so no (Q, G) matrix
is needed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from devices import Array, as_features, as_tensor
from reranking import RERANKING
from reranking import k_reciprocal as k_reciprocal  # other projects import it from here

PROTOCOLS = ("sysu", "regdb", "llcm")
PRODUCT = 2**25  # distances in one matrix product: 128 MB, enough rows to keep the product efficient
CACHED = 2**20  # distances counted at a time on a CPU: 4 MB, which fit in its cache
FEW_MATCHES = 64  # up to this number, two comparisons per match are faster than sorting


class Metrics(NamedTuple):
    """cmc: float64 NumPy array (max_rank,) in [0, 1]; mAP and mINP: floats in [0, 1]."""

    cmc: np.ndarray
    mAP: float
    mINP: float


class Trial(NamedTuple):
    """One trial: unit features (Q, D) and (G, D), integer pids and camids (Q,) and (G,)."""

    query_features: Array
    gallery_features: Array
    q_pids: Array
    g_pids: Array
    q_camids: Array | None
    g_camids: Array | None


def eval_sysu(
    distmat: Array, q_pids: Array, g_pids: Array, q_camids: Array, g_camids: Array, max_rank: int = 20
) -> Metrics:
    """Evaluate as SYSU-MM01 does: queries of camera 3 ignore camera 2; CMC counts identities.

    All of camera 2 (same room as camera 3) is ignored, whatever the identity, as in the released code.

    Args:
        distmat: (Q, G) distances, smaller is nearer; ties rank in gallery order; any real dtype and device.
        q_pids, q_camids: (Q,) integers.
        g_pids, g_camids: (G,) integers.
        max_rank: length of the curve, which is constant after the last gallery identity.

    Returns:
        (cmc, mAP, mINP), see Metrics. Queries without a match are left out of all averages.

    Raises:
        ValueError: NaN in distmat, mismatched shapes, or no query with a match.

    Source: docs/method.md section 8; the released code's eval_metrics.py.
    """
    return _evaluate_distmat(distmat, q_pids, g_pids, q_camids, g_camids, "sysu", max_rank)


def eval_regdb(distmat: Array, q_pids: Array, g_pids: Array, max_rank: int = 20) -> Metrics:
    """Evaluate as RegDB does: the complete gallery, no camera rule; CMC counts images. See eval_sysu."""
    return _evaluate_distmat(distmat, q_pids, g_pids, None, None, "regdb", max_rank)


def eval_llcm(
    distmat: Array, q_pids: Array, g_pids: Array, q_camids: Array, g_camids: Array, max_rank: int = 20
) -> Metrics:
    """Evaluate as LLCM does: ignore the same pid in the same camera; CMC counts identities. See eval_sysu."""
    return _evaluate_distmat(distmat, q_pids, g_pids, q_camids, g_camids, "llcm", max_rank)


def eval_features(
    query_features: Array,
    gallery_features: Array,
    q_pids: Array,
    g_pids: Array,
    q_camids: Array | None,
    g_camids: Array | None,
    protocol: str,
    max_rank: int = 20,
) -> Metrics:
    """Evaluate unit features by cosine similarity, in float32 on their own device, without a (Q, G) matrix.

    Args:
        query_features, gallery_features: (Q, D) and (G, D), unit norm.
        q_pids, g_pids, q_camids, g_camids, max_rank: as in eval_sysu; regdb reads no camids.
        protocol: "sysu", "regdb" or "llcm".

    Returns and raises what eval_sysu does; ValueError also for an unknown protocol.
    """
    query, gallery = as_features(query_features), as_features(gallery_features)
    shape = len(query), len(gallery)
    ids = _ids(protocol, shape, gallery.device, q_pids, g_pids, q_camids, g_camids)
    return _evaluate(partial(_feature_blocks, query, gallery), ids, protocol, max_rank)


def evaluate_trials(
    trials: Iterable[Trial],
    protocol: str,
    rerank: str | Callable[[Array, Array], Array] | None = None,
    max_rank: int = 20,
) -> list[Metrics]:
    """Evaluate each trial; see eval_features.

    Args:
        trials: features, pids and camids.
        protocol: "sysu", "regdb" or "llcm".
        rerank: a function that computes a distmat (Q, G) from query and gallery features, or its name in
            reranking.RERANKING; None: no re-ranking.
        max_rank: length of the CMC curve.

    Raises:
        ValueError: an unknown name of a re-ranking; see also eval_features.
    """
    if isinstance(rerank, str):
        if rerank not in RERANKING:
            raise ValueError(f"rerank must be None or one of {', '.join(RERANKING)}, not {rerank!r}")
        rerank = RERANKING[rerank]
    results = []
    for trial in trials:
        if rerank is None:
            results.append(eval_features(*trial, protocol, max_rank))
        else:
            distmat = rerank(trial.query_features, trial.gallery_features)
            results.append(_evaluate_distmat(distmat, *trial[2:], protocol, max_rank))
    return results


def summarize(results: Sequence[Metrics]) -> tuple[Metrics, Metrics]:
    """Return mean and (population) standard deviation over trials."""
    cmc, mAP, mINP = (np.array(values, dtype=np.float64) for values in zip(*results, strict=True))
    return (
        Metrics(cmc.mean(0), float(mAP.mean()), float(mINP.mean())),
        Metrics(cmc.std(0), float(mAP.std()), float(mINP.std())),
    )


@torch.no_grad()
def matched(
    protocol: str, q_pids: Array, g_pids: Array, q_camids: Array | None, g_camids: Array | None
) -> torch.Tensor:
    """Return (Q,) bool: which queries have a match, that is a gallery image of their pid that is not ignored.

    Only these count in the averages. Arguments as in eval_features; the result is on the device of q_pids.
    """
    shape, device = (len(q_pids), len(g_pids)), as_tensor(q_pids).device
    ids = _ids(protocol, shape, device, q_pids, g_pids, q_camids, g_camids)
    has_match = torch.isin(ids.q_pids, ids.g_pids)
    for camid in ids.q_camids.unique().tolist() if protocol == "llcm" else [3]:
        queries, ignored = ids.q_camids == camid, camid if protocol == "llcm" else 2
        has_match[queries] = torch.isin(ids.q_pids[queries], ids.g_pids[ids.g_camids != ignored])
    return has_match


# ---- the protocols' rules


class _Ids(NamedTuple):
    """int64 tensors (Q,) and (G,) on the device of the distances."""

    q_pids: torch.Tensor
    g_pids: torch.Tensor
    q_camids: torch.Tensor
    g_camids: torch.Tensor


def _ids(protocol, shape, device, q_pids, g_pids, q_camids, g_camids) -> _Ids:
    """Check protocol and lengths and move the ids to the device; regdb has no camera rule: camids are 0."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, not {protocol!r}")
    if protocol == "regdb":
        q_camids, g_camids = (np.zeros(number, np.int64) for number in shape)
    ids = _Ids(*(as_tensor(values).to(device).long() for values in (q_pids, g_pids, q_camids, g_camids)))
    for name, values in ids._asdict().items():
        expected = shape[0] if name.startswith("q") else shape[1]
        if values.shape != (expected,):
            raise ValueError(f"{name} must have shape ({expected},), not {tuple(values.shape)}")
    return ids


def _keys(protocol: str, ids: _Ids) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys (Q,) and (G,), float32: a query ignores the gallery images with an equal key."""
    if protocol != "llcm":
        return (ids.q_camids == 3).float(), torch.where(ids.g_camids == 2, 1.0, -1.0)
    pids, camids = (torch.cat(both).unique(return_inverse=True)[1] for both in (ids[:2], ids[2:]))
    keys = (pids * len(camids) + camids).unique(return_inverse=True)[1].float()
    return keys[: len(ids.q_pids)], keys[len(ids.q_pids) :]


def _set_ignored(block: torch.Tensor, q_keys: torch.Tensor, g_keys: torch.Tensor) -> None:
    """Set distances (q, G) to infinity where keys (q, 1) and (G,) are equal.

    On a CPU, comparing into floats and taking the maximum is three times faster than masked_fill.
    """
    equal = torch.eq(q_keys, g_keys, out=torch.empty_like(block))
    torch.maximum(block, equal.sub_(0.5).mul_(torch.inf), out=block)


# ---- blocks of distances

Blocks = Iterator[tuple[torch.Tensor, torch.Tensor]]  # queries (q,) and a copy of their distances (q, G)


def _height(num_gallery: int, device: torch.device) -> int:
    """Return the number of queries in a block: on a CPU its distances fit in the cache; a GPU needs many."""
    return max(1, (CACHED if device.type == "cpu" else PRODUCT) // max(num_gallery, 1))


def _feature_blocks(query: torch.Tensor, gallery: torch.Tensor, queries: torch.Tensor) -> Blocks:
    """Yield negative cosine similarities, which rank as distances do."""
    height = _height(len(gallery), gallery.device)
    many = max(1, max(64, PRODUCT // max(len(gallery), 1)) // height) * height
    for rows in queries.split(many):  # small products would be limited by reading the gallery
        with torch.autocast(query.device.type, enabled=False):
            product = query[rows].neg_() @ gallery.T
        yield from zip(rows.split(height), product.split(height), strict=True)


def _evaluate_distmat(distmat, q_pids, g_pids, q_camids, g_camids, protocol, max_rank) -> Metrics:
    distmat = as_tensor(distmat)
    if distmat.ndim != 2:
        raise ValueError(f"distmat must be (Q, G), not {tuple(distmat.shape)}")
    if distmat.numel() and torch.isnan(distmat.amin()):
        raise ValueError("distmat holds NaN")
    wide = distmat.dtype == torch.float64 or not distmat.is_floating_point()
    dtype = torch.float64 if wide else torch.float32
    ids = _ids(protocol, distmat.shape, distmat.device, q_pids, g_pids, q_camids, g_camids)

    def blocks(queries: torch.Tensor) -> Blocks:
        for rows in queries.split(_height(distmat.shape[1], distmat.device)):
            yield rows, distmat.index_select(0, rows).to(dtype)

    return _evaluate(blocks, ids, protocol, max_rank)


# ---- counting


@torch.no_grad()
def _evaluate(blocks: Callable[[torch.Tensor], Blocks], ids: _Ids, protocol: str, max_rank: int) -> Metrics:
    """Compute the metrics, averaged over the queries with a match; blocks(queries) yields their distances."""
    if max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, not {max_rank}")
    queries = matched(protocol, *ids).nonzero()[:, 0]
    if not len(queries):
        raise ValueError("no query has a match in the gallery, so there is nothing to average")
    gallery, (q_keys, g_keys) = _Gallery(ids.g_pids), _keys(protocol, ids)
    rankings = []
    for rows, block in blocks(queries):
        keys = q_keys[rows, None]
        if protocol != "regdb":
            _set_ignored(block, keys, g_keys)
        images, real = gallery.images(ids.q_pids[rows])
        counted = real & (g_keys[images] != keys)
        nearer = _count_nearer(block, images, counted, keys, g_keys)
        preceding = nearer.amin(1)
        if protocol != "regdb":  # CMC counts identities
            first = block.gather(1, images).masked_fill_(~counted, torch.inf).amin(1, keepdim=True)
            preceding = _count(torch.lt, gallery.nearest(block), first)[:, 0]
        rankings.append((preceding, *_precision(nearer)))
    preceding, precision, inverse = (torch.cat(values) for values in zip(*rankings, strict=True))
    at_rank = torch.bincount(preceding.long().clamp_(max=max_rank), minlength=max_rank + 1)
    return Metrics(
        at_rank[:max_rank].cumsum(0).cpu().numpy() / len(preceding),
        float(precision.mean()),
        float(inverse.mean()),
    )


class _Gallery:
    """Finds the images of each pid, and the distance of the nearest one."""

    def __init__(self, g_pids: torch.Tensor):
        self.order = g_pids.argsort(stable=True)  # groups the images by pid
        self.pids, self.counts = g_pids[self.order].unique_consecutive(return_counts=True)
        self.starts = self.counts.cumsum(0) - self.counts
        counts, by_count = self.counts.sort(descending=True)
        starts = self.starts[by_count]  # pids with many images first, so pids with a t-th image lead
        self.turns = [self.order[starts[counts > t] + t] for t in range(int(counts[0]))]

    def images(self, pids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gallery images (q, M) of pids (q,), and which entries are not padding."""
        index = torch.searchsorted(self.pids, pids)
        counts = self.counts[index, None]
        turns = torch.arange(int(counts.max()), device=pids.device)
        real = turns < counts
        return self.order[(self.starts[index, None] + turns).where(real, 0)], real

    def nearest(self, block: torch.Tensor) -> torch.Tensor:
        """Return (q, number of pids): the distance of each pid's nearest image, from distances (q, G)."""
        nearest = block.index_select(1, self.turns[0])
        for turn in self.turns[1:]:
            leading = nearest[:, : len(turn)]  # the pids that have an image in this turn
            torch.minimum(leading, block.index_select(1, turn), out=leading)
        return nearest


def _count_nearer(
    block: torch.Tensor, images: torch.Tensor, counted: torch.Tensor, keys: torch.Tensor, g_keys: torch.Tensor
) -> torch.Tensor:
    """Return (q, M): how many images are nearer than each match; infinity where a match is not counted.

    Rows of block with ties, or with more than FEW_MATCHES matches, are replaced by positions in the ranking,
    which are all different.

    Args:
        block: (q, G) distances, changed in place.
        images: (q, M) the columns of the matches.
        counted: (q, M) bool: neither padding nor ignored.
        keys, g_keys: (q, 1) and (G,), see _keys.
    """
    matches = block.gather(1, images).masked_fill_(~counted, torch.nan)
    few = matches.shape[1] <= FEW_MATCHES
    tied = (_count(torch.eq, block, matches) != counted).any(1) if few else counted.any(1)
    if tied.any():
        ranked = block[tied].argsort(dim=1, stable=True)
        ignored = (keys[tied] == g_keys).byte().gather(1, ranked)  # other images may be infinitely far too
        ranked = ranked.gather(1, ignored.argsort(dim=1, stable=True))
        positions = torch.arange(block.shape[1], device=block.device, dtype=block.dtype)
        block[tied] = block[tied].scatter_(1, ranked, positions.expand(len(ranked), -1))
        matches = block.gather(1, images)
    return (_count(torch.lt, block, matches) if few else matches).masked_fill(~counted, torch.inf)


def _count(compare: Callable[..., torch.Tensor], block: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return (q, M): for how many columns of block (q, G) compare(column, value) holds, for values (q, M).

    On a CPU, summing ones and zeros of the block's dtype is much faster than summing booleans. The sum is
    exact up to 2**24 gallery images.
    """
    out = torch.empty_like(block)
    return torch.stack([compare(block, column, out=out).sum(1) for column in values.split(1, dim=1)], dim=1)


def _precision(nearer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return average precision and inverse negative penalty, float64 (q,), from nearer (q, M)."""
    position = nearer.double().sort(dim=1).values + 1  # in the ranking, starting at 1
    total = position.isfinite().sum(1)
    number = torch.arange(1, position.shape[1] + 1, device=position.device)  # number of matches so far
    return (number / position).sum(1) / total, total / position.gather(1, total[:, None] - 1)[:, 0]
