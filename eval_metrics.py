"""CMC, mAP and mINP under the three protocols, and the loop over trials.

A query has few matches, so nothing is ranked that need not be: the place of a match in the ranking is the
number of gallery images nearer than it, and the number of identities before the first match is the number of
identities whose nearest image is nearer. Both are counted block by block from (rows, G) distances, whether
these are cut from a distance matrix or computed from features, so that no (Q, G) matrix need ever exist.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from reranking import Array, as_features, as_tensor, k_reciprocal

PROTOCOLS = ("sysu", "regdb", "llcm")
BLOCK = 2**25  # distances in one matrix product: 128 MB, enough rows to keep the product efficient
MATCHES = 2**22  # matches looked up at a time: 150 MB of temporaries at most
CACHED = 2**20  # distances counted at a time on the CPU: 4 MB, what its outer cache holds with room to spare
FEW_MATCHES = 64  # up to here, two comparison passes for each match cost less than sorting


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
    """Evaluate as SYSU-MM01 does: camera-3 queries ignore camera 2; CMC counts identities.

    All of camera 2 is ignored, whatever the identity (the same room as camera 3), as in the released code.

    Args:
        distmat: (Q, G) distances, smaller is nearer, ties rank in gallery order; any real dtype, any device.
        q_pids, q_camids: (Q,) integers.
        g_pids, g_camids: (G,) integers.
        max_rank: length of the curve; beyond the last gallery identity the curve's last value is held.

    Returns:
        (cmc, mAP, mINP), see Metrics. A query with no match left is left out of every average.

    Raises:
        ValueError: a NaN in distmat, shapes that disagree, or no query with a match.

    Source: docs/method.md section 8; the released code's eval_metrics.py.
    """
    return _evaluate_distmat(distmat, q_pids, g_pids, q_camids, g_camids, "sysu", max_rank)


def eval_regdb(distmat: Array, q_pids: Array, g_pids: Array, max_rank: int = 20) -> Metrics:
    """Evaluate as RegDB does: the whole gallery, no camera rule; CMC counts images. See eval_sysu."""
    return _evaluate_distmat(distmat, q_pids, g_pids, None, None, "regdb", max_rank)


def eval_llcm(
    distmat: Array, q_pids: Array, g_pids: Array, q_camids: Array, g_camids: Array, max_rank: int = 20
) -> Metrics:
    """Evaluate as LLCM does: the same pid in the same camera is ignored; CMC counts identities."""
    return _evaluate_distmat(distmat, q_pids, g_pids, q_camids, g_camids, "llcm", max_rank)


def evaluate(
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
        q_pids, g_pids, q_camids, g_camids, max_rank: as eval_sysu has them; regdb reads no camids.
        protocol: "sysu", "regdb" or "llcm".

    Returns and raises what eval_sysu does; ValueError also for an unknown protocol.
    """
    query_features, gallery_features = as_features(query_features), as_features(gallery_features)
    size, device = (len(query_features), len(gallery_features)), gallery_features.device
    ids = _ids(protocol, size, device, q_pids, g_pids, q_camids, g_camids)
    return _evaluate(_feature_distances(query_features, gallery_features), ids, protocol, max_rank)


def evaluate_trials(
    trials: Iterable[Trial], protocol: str, rerank: str | None = None, max_rank: int = 20
) -> list[Metrics]:
    """Evaluate each trial in turn; rerank is None or "k-reciprocal" (ValueError otherwise). See evaluate."""
    if rerank not in (None, "k-reciprocal"):
        raise ValueError(f"rerank must be None or 'k-reciprocal', not {rerank!r}")
    results = []
    for trial in trials:
        if rerank is None:
            results.append(evaluate(*trial, protocol, max_rank))
        else:
            distmat = k_reciprocal(trial.query_features, trial.gallery_features)
            results.append(_evaluate_distmat(distmat, *trial[2:], protocol, max_rank))
    return results


def summarize(results: Sequence[Metrics]) -> tuple[Metrics, Metrics]:
    """Return the mean and the standard deviation (of the population: divided by n) over trials."""
    cmc, mAP, mINP = (np.array(values, dtype=np.float64) for values in zip(*results, strict=True))
    return (
        Metrics(cmc.mean(0), float(mAP.mean()), float(mINP.mean())),
        Metrics(cmc.std(0), float(mAP.std()), float(mINP.std())),
    )


@torch.no_grad()
def top_k(
    query_features: Array,
    gallery_features: Array,
    q_pids: Array,
    g_pids: Array,
    q_camids: Array | None,
    g_camids: Array | None,
    protocol: str,
    k: int,
) -> torch.Tensor:
    """Return (Q, k) int64 indices of each query's k nearest gallery images, nearest first.

    What the protocol ignores is left out; -1 where fewer than k images are left. Arguments as in evaluate;
    the result lies on the features' device.
    """
    query_features, gallery_features = as_features(query_features), as_features(gallery_features)
    size, device = (len(query_features), len(gallery_features)), gallery_features.device
    ids = _ids(protocol, size, device, q_pids, g_pids, q_camids, g_camids)
    distances = _feature_distances(query_features, gallery_features)
    result = torch.full((size[0], k), -1, dtype=torch.int64, device=device)
    for queries, columns in _comparisons(protocol, ids):
        lines = _lines(ids)
        for rows, block in zip(queries.split(lines), distances(queries, lines), strict=True):
            ignored = _ignored(protocol, ids, rows[:, None], columns)
            near = block[:, columns].masked_fill_(ignored, torch.inf)
            order = near.argsort(dim=1, stable=True)[:, :k]
            found = columns[order].masked_fill_(near.gather(1, order) == torch.inf, -1)
            result[rows, : found.shape[1]] = found
    return result


# ---- the core: counting


class _Ids(NamedTuple):
    """int64 tensors (Q,) and (G,) on the device of the distances."""

    q_pids: torch.Tensor
    g_pids: torch.Tensor
    q_camids: torch.Tensor
    g_camids: torch.Tensor


def _evaluate_distmat(distmat, q_pids, g_pids, q_camids, g_camids, protocol, max_rank) -> Metrics:
    distmat = as_tensor(distmat)
    if distmat.ndim != 2:
        raise ValueError(f"distmat must be (Q, G), not {tuple(distmat.shape)}")
    if distmat.numel() and torch.isnan(distmat.amin()):
        raise ValueError("distmat holds NaN")
    wide = distmat.dtype == torch.float64 or not distmat.is_floating_point()
    dtype = torch.float64 if wide else torch.float32
    ids = _ids(protocol, distmat.shape, distmat.device, q_pids, g_pids, q_camids, g_camids)

    width = distmat.shape[1]
    scratch = _Scratch()

    def distances(rows: torch.Tensor, lines: int) -> Iterator[torch.Tensor]:
        if len(rows) == len(distmat):  # rows are sorted, each once: these are all
            return (part.to(dtype) for part in distmat.split(lines))
        parts = ((part, scratch.empty("rows", distmat, (len(part), width))) for part in rows.split(lines))
        return (torch.index_select(distmat, 0, part, out=out).to(dtype) for part, out in parts)

    return _evaluate(distances, ids, protocol, max_rank)


@torch.no_grad()
def _evaluate(
    distances: Callable[[torch.Tensor, int], Iterator[torch.Tensor]],
    ids: _Ids,
    protocol: str,
    max_rank: int,
) -> Metrics:
    """Average over queries; distances(rows, lines) yields those of the queries rows in (lines, G) blocks."""
    if max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, not {max_rank}")
    by_identity = protocol != "regdb"
    lines = _lines(ids)
    scratch = _Scratch()
    rankings = []
    for queries, allowed in _comparisons(protocol, ids):
        gallery = _Gallery(ids.g_pids, allowed, in_turns=by_identity)
        identity, known = gallery.find(ids.q_pids[queries])
        queries, identity = queries[known], identity[known]
        height = max(lines, MATCHES // max(gallery.turns, 1))
        for rows, identities in zip(queries.split(height), identity.split(height), strict=True):
            places, real = gallery.images(identities)
            counted = real & ~_ignored(protocol, ids, rows[:, None], gallery.columns[places])
            kept = counted.any(1)
            rows, matches = rows[kept], _Matches(places, real, counted).of(kept)
            if not len(rows):
                continue
            parts = map(_Matches, *(values.split(lines) for values in matches))
            blocks = zip(distances(rows, lines), parts, strict=True)
            counts = [_count_block(gallery, block, part, scratch) for block, part in blocks]
            nearer, preceding = (torch.cat(values) for values in zip(*counts, strict=True))
            rankings.append((preceding, *_precision(nearer, matches)))
    if not rankings:
        raise ValueError("no query has a match in the gallery, so there is nothing to average")
    preceding, precision, inverse = (torch.cat(values) for values in zip(*rankings, strict=True))
    found = torch.bincount(preceding.clamp(max=max_rank), minlength=max_rank + 1)[:max_rank].cumsum(0)
    return Metrics(found.cpu().numpy() / len(preceding), float(precision.mean()), float(inverse.mean()))


class _Matches(NamedTuple):
    """The images of q queries' own pids in a gallery, (q, M) each; queries with fewer than M have padding."""

    places: torch.Tensor  # among the gallery's columns
    real: torch.Tensor  # bool: no padding
    counted: torch.Tensor  # bool: neither padding nor ignored

    def of(self, queries: torch.Tensor) -> "_Matches":
        """Those of some of the queries."""
        return _Matches(*(values[queries] for values in self))


class _Scratch:
    """Memory that one block after the other is counted in: new memory would cost more than counting."""

    def __init__(self):
        self.memory = {}

    def empty(self, name: str, like: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """Return a tensor of like's dtype, not initialised; what this name held before is lost."""
        size = shape[0] * shape[1]
        memory = self.memory.get((name, like.dtype))
        if memory is None or len(memory) < size:
            memory = self.memory[name, like.dtype] = like.new_empty(size)
        return memory[:size].view(shape)


def _count_block(
    gallery: "_Gallery", block: torch.Tensor, matches: _Matches, scratch: _Scratch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count what is nearer than the matches of q queries, whose distances are block (q, G).

    Returns the number of images nearer than each (q, M), and of what CMC counts before the first match (q,).
    """
    block = gallery.arrange(block, scratch)
    nearer, preceding, tied = _count_columns(gallery, block, matches, scratch)
    if tied.any():  # as ranks, in which gallery order has decided, no two distances are equal
        ranks = _ranks(block[tied], gallery.columns.argsort())
        nearer[tied], preceding[tied], _ = _count_columns(gallery, ranks, matches.of(tied), scratch)
    return nearer, preceding


def _count_columns(
    gallery: "_Gallery", block: torch.Tensor, matches: _Matches, scratch: _Scratch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count as _count_block does, taking no two distances for equal; tell which queries (q,) have a tie."""
    own = block.gather(1, matches.places).masked_fill_(~matches.real, torch.inf)
    nearer, tied = _count_nearer(block, own, matches.real, scratch)
    first = own.masked_fill(~matches.counted, torch.inf).amin(1, keepdim=True)
    nearest = gallery.nearest(block, scratch) if gallery.in_turns else block
    preceding = _count(torch.lt, nearest, first, scratch.empty("compared", nearest, nearest.shape)).long()
    ignored = (own < first).any(1)  # an image of the query's own pid is nearer than its first match
    return nearer, preceding - ignored.long(), tied


def _precision(nearer: torch.Tensor, matches: _Matches) -> tuple[torch.Tensor, torch.Tensor]:
    """Return average precision and inverse negative penalty, (q,) float64, of matches with nearer (q, M)."""
    real, counted = matches.real, matches.counted
    nearer, order = nearer.masked_fill(~real, torch.iinfo(nearer.dtype).max // 2).sort(dim=1)
    ignored, valid = (real & ~counted).gather(1, order), counted.gather(1, order)
    position = (nearer + 1 - ignored.cumsum(1)).double()  # in the ranking, from 1
    number = valid.cumsum(1).double()  # of matches up to here
    total = number[:, -1]
    precision = (number / position).masked_fill(~valid, 0).sum(1) / total
    return precision, total / position.masked_fill(~valid, 0).amax(1)


def _count_nearer(
    block: torch.Tensor, matches: torch.Tensor, real: torch.Tensor, scratch: _Scratch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count the columns of block (q, G) below each of matches (q, M); tell which queries have a tie there."""
    if matches.shape[1] > FEW_MATCHES:
        ordered = block.sort(dim=1).values
        nearer = torch.searchsorted(ordered, matches)
        equal = torch.searchsorted(ordered, matches, right=True) - nearer
    else:
        columns, out = matches.split(1, dim=1), scratch.empty("compared", block, block.shape)
        nearer = torch.stack([_count(torch.lt, block, column, out) for column in columns], 1)
        equal = torch.stack([_count(torch.eq, block, column, out) for column in columns], 1)
    return nearer.long(), (equal != real).any(1)


def _count(
    compare: Callable[..., torch.Tensor], block: torch.Tensor, column: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Return (q,): how many columns of block (q, G) compare with column (q, 1); overwrites out (q, G).

    Ones and zeros of the block's own dtype are compared and summed much faster on a CPU than booleans are;
    their sum is exact up to 2**24 gallery images.
    """
    return compare(block, column, out=out).sum(1)


def _ranks(block: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return each distance's place in its row of block (q, G); ties in the order (G,) given of columns."""
    ranked = order[block.index_select(1, order).argsort(dim=1, stable=True)]
    places = torch.arange(len(order), device=block.device, dtype=block.dtype)
    return torch.empty_like(block).scatter_(1, ranked, places.expand_as(block))


class _Gallery:
    """The gallery images that some queries are compared with, in the order that makes counting cheap.

    Columns come in turns: first one image of every identity, then a second image of those that have one, and
    so on, identities with more images first. So the k-th column of every turn is identity k's, and the
    nearest image of every identity is the minimum over turns, with no padding. Where CMC counts images that
    is not needed, and columns are the gallery as it is.
    """

    def __init__(self, g_pids: torch.Tensor, allowed: torch.Tensor, in_turns: bool):
        order = g_pids[allowed].argsort(stable=True)
        pids, identity, counts = torch.unique_consecutive(
            g_pids[allowed][order], return_inverse=True, return_counts=True
        )
        turn = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[identity]
        by_count = counts[identity].argsort(descending=True, stable=True)
        by_turn = by_count[turn[by_count].argsort(stable=True)]
        images = allowed[order[by_turn]]
        self.columns, self.places = (images, None) if in_turns else (allowed, images)
        self.in_turns = in_turns
        self.pids, self.counts = pids, counts
        self.index = counts.argsort(descending=True, stable=True).argsort()  # of each pid within a turn
        widths = torch.bincount(turn)
        self.starts = widths.cumsum(0) - widths
        self.widths = widths.tolist()
        self.turns = len(self.widths)

    def find(self, q_pids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which of self.pids each query is, and whether it is one at all."""
        if not len(self.pids):
            return torch.zeros_like(q_pids), torch.zeros_like(q_pids, dtype=torch.bool)
        identity = torch.searchsorted(self.pids, q_pids).clamp_(max=len(self.pids) - 1)
        return identity, self.pids[identity] == q_pids

    def images(self, identity: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return places (q, M) of the identities' images among columns, and which entries are no padding."""
        counts = self.counts[identity, None]
        turns = torch.arange(int(counts.max()) if len(identity) else 0, device=identity.device)
        real = turns < counts
        places = (self.starts[turns] + self.index[identity, None]).masked_fill_(~real, 0)
        return places if self.in_turns else self.places[places], real

    def arrange(self, block: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
        """Return the columns of block (q, all gallery images)."""
        if not self.in_turns:
            return block
        arranged = scratch.empty("arranged", block, (len(block), len(self.columns)))
        return torch.index_select(block, 1, self.columns, out=arranged)

    def nearest(self, block: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
        """Return (q, identities): the distance of the nearest image of each."""
        first, *others = block.split(self.widths, dim=1)
        result = scratch.empty("nearest", first, first.shape).copy_(first)
        for turn in others:
            part = result[:, : turn.shape[1]]
            torch.minimum(part, turn, out=part)
        return result


# ---- the protocols' rules


def _comparisons(protocol: str, ids: _Ids) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return groups of queries (indices) with the gallery images (indices) that they are compared with."""
    queries, images = (torch.arange(len(pids), device=pids.device) for pids in (ids.q_pids, ids.g_pids))
    if protocol != "sysu":
        return [(queries, images)]
    beside = ids.q_camids == 3  # in the same room as camera 2
    return [(queries[beside], images[ids.g_camids != 2]), (queries[~beside], images)]


def _ignored(protocol: str, ids: _Ids, queries: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Tell which pairs of a query and a gallery image of its group (indices, broadcast) are ignored yet."""
    if protocol != "llcm":
        return torch.zeros((), dtype=torch.bool, device=images.device)
    same_pid = ids.q_pids[queries] == ids.g_pids[images]
    return same_pid & (ids.q_camids[queries] == ids.g_camids[images])


def _ids(protocol, size, device, q_pids, g_pids, q_camids, g_camids) -> _Ids:
    """Check protocol and lengths, bring the ids to the device; regdb has no camids, so any will do."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, not {protocol!r}")
    if protocol == "regdb":
        q_camids, g_camids = q_pids, g_pids
    ids = _Ids(*(as_tensor(values).to(device).long() for values in (q_pids, g_pids, q_camids, g_camids)))
    for name, values in ids._asdict().items():
        expected = size[0] if name.startswith("q") else size[1]
        if values.shape != (expected,):
            raise ValueError(f"{name} must have shape ({expected},), not {tuple(values.shape)}")
    return ids


# ---- arrays and distances


def _lines(ids: _Ids) -> int:
    """Queries counted at a time: their distances stay in a CPU's cache; a GPU wants many."""
    return max(1, (CACHED if ids.g_pids.device.type == "cpu" else BLOCK) // max(len(ids.g_pids), 1))


def _feature_distances(
    query_features: torch.Tensor, gallery_features: torch.Tensor
) -> Callable[[torch.Tensor, int], Iterator[torch.Tensor]]:
    """Return distances(rows, lines), which yields (lines, G) blocks of negative cosine similarity.

    It ranks as distance does. Products are larger than blocks: one of few queries would only wait for the
    gallery's features to come from memory.
    """

    def distances(rows: torch.Tensor, lines: int) -> Iterator[torch.Tensor]:
        height = max(1, max(64, BLOCK // max(len(gallery_features), 1)) // lines) * lines
        for part in rows.split(height):
            with torch.autocast(query_features.device.type, enabled=False):
                products = query_features.index_select(0, part).neg_() @ gallery_features.T
            yield from products.split(lines)

    return distances
