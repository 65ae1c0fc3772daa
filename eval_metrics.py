"""CMC, mAP and mINP under the three protocols, and their mean over trials (docs/method.md, section 8).

A query has few matches, so its gallery is not sorted: the number of nearer images is the rank of a match.
Images that the protocol ignores get distance infinity. Only the galleries of queries with ties are sorted.
Distances come in blocks of queries, cut from a distance matrix or computed from features, so no (Q, G) matrix
is needed.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from devices import Array, as_features, as_ids, as_tensor, unit_features
from evaluation.counting import Gallery, count, rank_matches
from reranking import k_reciprocal as k_reciprocal  # other projects import it from here

PROTOCOLS = ("sysu", "regdb", "llcm")
PRODUCT = 2**25  # distances in one matrix product: 128 MB, enough rows to keep the product efficient
CACHED = 2**20  # distances counted at a time on a CPU: 4 MB, which fit in its cache


class Metrics(NamedTuple):
    """cmc: float64 NumPy array (max_rank,) in [0, 1]; mAP and mINP: floats in [0, 1]."""

    cmc: np.ndarray
    mAP: float
    mINP: float


class QueryValues(NamedTuple):
    """What each of Q queries gets. One without a match has NaN, NaN and 0, and counts in no average."""

    ap: np.ndarray  # (Q,) float64, average precision
    inp: np.ndarray  # (Q,) float64, inverse negative penalty
    first: np.ndarray  # (Q,) int64, the first match's place, from 1, counted as CMC counts

    @property
    def counted(self) -> np.ndarray:
        """(Q,) bool: which queries have a match."""
        return self.first > 0

    def metrics(self, max_rank: int = 20) -> Metrics:
        """Average over the counted queries; max_rank: the length of the CMC curve."""
        if max_rank < 1:
            raise ValueError(f"max_rank must be at least 1, not {max_rank}")
        first = self.first[self.counted]
        at_rank = np.bincount(first.clip(max=max_rank + 1), minlength=max_rank + 2)
        cmc = at_rank[1 : max_rank + 1].cumsum() / len(first)
        return Metrics(cmc, *(float(values[self.counted].mean()) for values in (self.ap, self.inp)))


class Ranking(NamedTuple):
    """What the values of q counted queries follow from; evaluate_queries shows it block by block."""

    rows: torch.Tensor  # (q,) int64, which of the Q queries
    distances: torch.Tensor  # (q, G), infinite where ignored; rows with ties hold places instead
    matches: torch.Tensor  # (q, M) in ascending order, distances of counted matches, then NaN
    places: torch.Tensor  # (q, M) float64, their places among the images that count, from 1, then infinity


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
    return evaluate_distmat(distmat, q_pids, g_pids, q_camids, g_camids, "sysu").metrics(max_rank)


def eval_regdb(distmat: Array, q_pids: Array, g_pids: Array, max_rank: int = 20) -> Metrics:
    """Evaluate as RegDB does: the complete gallery, no camera rule; CMC counts images. See eval_sysu."""
    return evaluate_distmat(distmat, q_pids, g_pids, None, None, "regdb").metrics(max_rank)


def eval_llcm(
    distmat: Array, q_pids: Array, g_pids: Array, q_camids: Array, g_camids: Array, max_rank: int = 20
) -> Metrics:
    """Evaluate as LLCM does: ignore the same pid in the same camera; CMC counts identities. See eval_sysu."""
    return evaluate_distmat(distmat, q_pids, g_pids, q_camids, g_camids, "llcm").metrics(max_rank)


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

    Returns and raises what eval_sysu does; ValueError also for an unknown protocol, and for features that are
    not unit.
    """
    trial = Trial(query_features, gallery_features, q_pids, g_pids, q_camids, g_camids)
    return evaluate_queries(trial, protocol).metrics(max_rank)


def evaluate_queries(
    trial: Trial,
    protocol: str,
    rerank: Callable[[Array, Array], Array] | None = None,
    distance: str = "cosine",
    show: Callable[[Ranking], None] | None = None,
) -> QueryValues:
    """Evaluate each query of a trial; the one place where AP, the places and what is ignored are computed.

    Args:
        trial: features, pids and camids, as eval_features takes them.
        protocol: "sysu", "regdb" or "llcm".
        rerank: computes a distmat (Q, G) from query and gallery features; None: no re-ranking.
        distance: "cosine", of unit features, or "euclidean", of any; without re-ranking.
        show: is called with each block of counted queries.

    Raises:
        ValueError: see eval_features.
    """
    if rerank is not None:
        distmat = rerank(trial.query_features, trial.gallery_features)
        return evaluate_distmat(distmat, *trial[2:], protocol, show)
    shape = len(trial.query_features), len(trial.gallery_features)
    ids = _ids(protocol, shape, as_tensor(trial.gallery_features).device, *trial[2:])
    return _evaluate(partial(distance_blocks, trial, distance), ids, protocol, show)


def evaluate_distmat(
    distmat: Array,
    q_pids: Array,
    g_pids: Array,
    q_camids: Array | None,
    g_camids: Array | None,
    protocol: str,
    show: Callable[[Ranking], None] | None = None,
) -> QueryValues:
    """Evaluate each query by distances (Q, G); see eval_sysu for them, evaluate_queries for the rest."""
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

    return _evaluate(blocks, ids, protocol, show)


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
    shape = len(q_pids), len(g_pids)
    device = q_pids.device if isinstance(q_pids, torch.Tensor) else None
    ids = _ids(protocol, shape, device, q_pids, g_pids, q_camids, g_camids)
    # A gallery holds a match if it has more images of the pid than images of the pid to ignore.
    pids, keys = (torch.cat(both).unique(return_inverse=True)[1] for both in (ids[:2], _keys(protocol, ids)))
    _, ignored = (pids * len(keys) + keys).unique(return_inverse=True)
    images, ignored = (
        values[shape[0] :].bincount(minlength=sum(shape))[values[: shape[0]]] for values in (pids, ignored)
    )
    return images > ignored


def ignored_pairs(
    protocol: str, q_pids: Array, g_pids: Array, q_camids: Array | None, g_camids: Array | None
) -> np.ndarray:
    """Return (Q, G) bool: which gallery images each query ignores."""
    ids = _ids(protocol, (len(q_pids), len(g_pids)), None, q_pids, g_pids, q_camids, g_camids)
    q_keys, g_keys = _keys(protocol, ids)
    return (q_keys[:, None] == g_keys).cpu().numpy()


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
    given = zip(_Ids._fields, (q_pids, g_pids, q_camids, g_camids), strict=True)
    ids = _Ids(*(as_ids(values, name).to(device) for name, values in given))
    for name, values in ids._asdict().items():
        expected = shape[0] if name.startswith("q") else shape[1]
        if values.shape != (expected,):
            raise ValueError(f"{name} must have shape ({expected},), not {tuple(values.shape)}")
        if protocol == "sysu" and name.endswith("camids") and ((values < 1) | (values > 6)).any():
            lowest, highest = values.aminmax()
            raise ValueError(
                f"{name}: the cameras of SYSU-MM01 are 1 to 6, and these are {lowest} to {highest}"
            )
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


def distance_blocks(trial: Trial, distance: str = "cosine", queries: torch.Tensor | None = None) -> Blocks:
    """Yield what ranks as distances do: negative cosines, or squared Euclidean distances less ||q||^2.

    Args and Raises: see evaluate_queries. queries: (q,) int64, which of them; None: all.
    """
    prepare = unit_features if distance == "cosine" else as_features
    query, gallery = prepare(trial.query_features), prepare(trial.gallery_features)
    if distance == "euclidean":  # ||g||^2 - 2 q.g, around the mean so that little cancels
        mean = gallery.mean(0)
        query, gallery = query - mean, gallery - mean
        squares = torch.linalg.vector_norm(gallery, dim=1).square()
    queries = torch.arange(len(query), device=query.device) if queries is None else queries
    height = _height(len(gallery), gallery.device)
    many = max(1, max(64, PRODUCT // max(len(gallery), 1)) // height) * height
    for rows in queries.split(many):  # small products would be limited by reading the gallery
        with torch.autocast(query.device.type, enabled=False):
            if distance == "euclidean":
                product = torch.addmm(squares, query[rows], gallery.T, alpha=-2)
            else:
                product = query[rows].neg_() @ gallery.T
        yield from zip(rows.split(height), product.split(height), strict=True)


# ---- counting


@torch.no_grad()
def _evaluate(
    blocks: Callable[[torch.Tensor], Blocks],
    ids: _Ids,
    protocol: str,
    show: Callable[[Ranking], None] | None,
) -> QueryValues:
    """Compute the values of the queries with a match; blocks(queries) yields their distances."""
    queries = matched(protocol, *ids).nonzero()[:, 0]
    if not len(queries):
        raise ValueError("no query has a match in the gallery, so there is nothing to average")
    gallery, (q_keys, g_keys) = Gallery(ids.g_pids), _keys(protocol, ids)
    parts = []
    for rows, block in blocks(queries):
        keys = q_keys[rows, None]
        if protocol != "regdb":
            _set_ignored(block, keys, g_keys)
        images, real = gallery.images(ids.q_pids[rows])
        counted = real & (g_keys[images] != keys)
        matches, places = rank_matches(block, images, counted, keys, g_keys)
        first = places[:, 0]
        if protocol != "regdb":  # CMC counts identities
            first = 1 + count(torch.lt, gallery.nearest(block), matches[:, :1])[:, 0]
        parts.append((*_precision(places), first.double()))
        if show is not None:
            show(Ranking(rows, block, matches, places))
    values = torch.full((3, len(ids.q_pids)), torch.nan, dtype=torch.float64)
    values[:, queries.cpu()] = torch.stack([torch.cat(part).cpu() for part in zip(*parts, strict=True)])
    ap, inp, first = values.numpy()
    return QueryValues(ap, inp, np.nan_to_num(first).astype(np.int64))


def _precision(places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return average precision and inverse negative penalty, float64 (q,), from Ranking.places."""
    total = places.isfinite().sum(1)
    number = torch.arange(1, places.shape[1] + 1, device=places.device)  # number of matches so far
    return (number / places).sum(1) / total, total / places.gather(1, total[:, None] - 1)[:, 0]
