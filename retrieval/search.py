"""The nearest rows of a folder of embeddings, exactly.

A similarity is the product of two unit features: their cosine, 1 for the same. What is cheap is computed for
all rows, with a bound on its error; what the bound cannot leave out is computed better: one byte a dimension
(retrieval/codes.py) or float32, then float32, then float64, whose sums are free of rounding.
"""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from retrieval.codes import coded_queries
from retrieval.shards import Embeddings, OpenShard
from utils import UserError

PRODUCTS = 2**18  # of a block, in float32: one megabyte, which stays in a core's cache
SMALLEST, LARGEST = 256, 2048  # rows of a block that is compared in float32: 2,048 dimensions are 17 MB
PIECE = 512  # pairs that are compared at once
RUN = 64  # rows whose largest product is looked at first
DENSE = 1 / 64  # of a block's products; more are to be computed again: then all are, in float32
GRID = 2.0**28  # exact products: multiples of 1 / GRID times float16's multiples of 2^-24 fit in 53 bits

Allowed = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (queries, positions), broadcast -> bool
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]  # (n,) each: number of the query, position, similarity
NO_PAIRS = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)


def nearest(
    queries: torch.Tensor,
    gallery: Embeddings,
    top: int,
    allowed: Allowed | None = None,
    at_least: float = -math.inf,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(similarities (Q, k) float32, positions (Q, k) int64) of the k = min(top, N) nearest rows, in order.

    Exact: in the order of similarities in float64, the lowest position first among equal ones; the same
    whatever the shards, the threads and the other queries. Fewer are left than asked for: -inf and -1.

    queries: unit features (Q, D) float32, on the device that computes.
    allowed: which rows a query may find, from numbers of queries and positions, broadcast; None: all.
    at_least: the smallest similarity that counts.

    Each thread holds a shard and a block of it, however large the gallery. On a CPU a thread of torch's takes
    a shard at a time, alone: sharing each small product out among them would cost more than it takes, above
    all where cores are busy. Meanwhile torch.get_num_threads() is 1.
    """
    top = min(top, len(gallery))
    search = _Search(queries, gallery, top, allowed, at_least)
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads if queries.device.type == "cpu" else 1)
    torch.set_num_threads(1)
    try:
        shards = range(len(gallery.shards)) if len(queries) else ()
        query, position, _ = search.still_in(_joined([NO_PAIRS, *pool.map(search.shard, shards)]))
        order = np.lexsort((position, query))
        query, position = query[order], position[order]
        pieces = _pieces(len(query))
        exact = pool.map(
            search.exact, (query[piece] for piece in pieces), (position[piece] for piece in pieces)
        )
        similarity = np.concatenate([np.empty(0), *exact])
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    keep = similarity >= at_least
    found = ranked(query[keep], position[keep], similarity[keep], len(queries), top)
    similarities, positions = map(torch.from_numpy, found)
    return similarities.float().to(queries.device), positions.to(queries.device)


class _Search:
    """One call of nearest: the queries in every form, and what all threads know of the best."""

    def __init__(
        self, queries: torch.Tensor, gallery: Embeddings, top: int, allowed: Allowed | None, at_least: float
    ):
        self.queries, self.gallery, self.top = queries, gallery, top
        self.allowed, self.at_least = allowed, at_least
        self.rows = queries.cpu()  # where pairs are compared
        self.coded = coded_queries(self.rows.numpy()) if queries.device.type == "cpu" else None
        # A sum of D products in float32, in any order, is D 2^-24 |q||x| from the true one, and a little more
        # where rows are not quite of unit length; 2^-7 where float32 factors may be rounded to bfloat16.
        loose = 0.0 if torch.get_float32_matmul_precision() == "highest" else 2.0**-7
        norms = self.rows.double().norm(dim=1).numpy()
        self.error = (queries.shape[1] * 2.0**-24 + loose) * 1.05 * norms
        self.lock = threading.Lock()
        self.best = np.full((len(queries), top), -np.inf)  # lower bounds of similarities that were found
        self.floor = np.full(len(queries), float(at_least))  # what lies below is not among the best

    @torch.inference_mode()
    def shard(self, k: int) -> Pairs:
        """Those of a shard's rows that may be among the best; similarities are within self.error."""
        shard = self.gallery.opened(k)
        coded = self.coded if shard.codes else None
        if coded:
            offset, bound = coded.offset(shard.codes), coded.bound(shard.codes)
        large = max(SMALLEST, PRODUCTS // len(self.rows) // RUN * RUN)
        small = min(large, LARGEST)
        wide = self.queries.new_empty(min(small, len(shard)), self.queries.shape[1])  # kept: pages are dear
        found, fresh, start = [NO_PAIRS], [NO_PAIRS], 0
        while start < len(shard):
            part = range(start, min(start + large, len(shard)))
            pairs = self._by_codes(shard, part, offset, bound, self.floor) if coded else None
            if pairs is None:
                pieces = (part[first : first + small] for first in range(0, len(part), small))
                pairs = _joined([self._by_rows(shard, piece, wide) for piece in pieces])
            fresh.append(pairs)
            start = part.stop
            if sum(len(query) for query, *_ in fresh) >= self.best.size or start == len(shard):
                found.append(self._raise_floor(_joined(fresh)))
                fresh = [NO_PAIRS]
        return self.still_in(_joined(found))

    def _by_codes(
        self, shard: OpenShard, part: range, offset: np.ndarray, bound: np.ndarray, floor: np.ndarray
    ) -> Pairs | None:
        """As shard, of a part; None: so many pass the bound that to compare all rows is cheaper."""
        products = self.coded.products(*shard.coded(part))
        pairs = self._passing(products, floor - bound - offset)
        if pairs is None and self.top <= DENSE * len(part):  # let the part's own best raise the floor
            query, row = self._largest(products, shard.first + part.start)
            similarity = self._compared(shard, query, row + part.start)
            best, _ = ranked(query, row, similarity - self.error[query], len(self.rows), self.top)
            pairs = self._passing(products, np.maximum(floor, best[:, -1]) - bound - offset)
        if pairs is None:
            return None
        query, row = pairs
        rough = offset[query] + self.coded.scale[query] * products[row, query].double().numpy()
        position = row + (shard.first + part.start)
        if self.allowed:
            keep = self.allowed(query, position)
            query, row, position, rough = query[keep], row[keep], position[keep], rough[keep]
        similarity = self._compared(shard, query, row + part.start)
        if (np.abs(similarity - rough) > bound[query] + self.error[query]).any():
            raise UserError(f"{shard.shard.coded}: not the codes of its rows: remove it")
        return query, position, similarity

    def _passing(self, products: torch.Tensor, threshold: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        if not np.isfinite(threshold).all():
            return None
        return _reaching(products, threshold / self.coded.scale, DENSE)

    def _largest(self, products: torch.Tensor, first: int) -> tuple[np.ndarray, np.ndarray]:
        """(queries, rows) of the `top` largest of each query's products (n, Q), of rows that are allowed."""
        products = self._masked(products, first)
        values, rows = products.T.contiguous().topk(min(self.top, len(products)))
        query = torch.arange(len(values))[:, None].expand_as(rows)[values > -torch.inf]
        return query.numpy(), rows[values > -torch.inf].numpy()

    def _masked(self, products: torch.Tensor, first: int) -> torch.Tensor:
        """Products (n, Q) of the rows from position first, -inf for rows that are not allowed."""
        if self.allowed is None:
            return products
        positions = np.arange(first, first + len(products))[:, None]
        allowed = torch.from_numpy(self.allowed(np.arange(len(self.rows)), positions))
        return products.masked_fill(~allowed.to(products.device), -torch.inf)

    def _compared(self, shard: OpenShard, query: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Similarities (n,) in float32 of pairs of queries and the shard's rows."""
        similarity = np.empty(len(query), np.float32)
        for piece in _pieces(len(query)):
            rows = shard.half(row[piece]).float().numpy()
            np.einsum("nd,nd->n", rows, self.rows.numpy()[query[piece]], out=similarity[piece])
        return similarity

    def _by_rows(self, shard: OpenShard, part: range, wide: torch.Tensor) -> Pairs:
        """As shard, of a part, all rows of which are compared."""
        wide = wide[: len(part)]
        wide.copy_(shard.half(part))
        products = self._masked(wide @ self.queries.T, shard.first + part.start)
        threshold = self.floor - self.error
        if len(part) >= self.top and not np.isfinite(self.best[:, -1]).all():
            kth = products.T.contiguous().topk(self.top).values[:, -1].double().cpu().numpy()
            threshold = np.maximum(threshold, kth - 2 * self.error)
        query, row = _reaching(products, threshold)
        similarity = products.cpu().numpy()[row, query]
        return query, row + (shard.first + part.start), similarity

    def _raise_floor(self, pairs: Pairs) -> Pairs:
        """Tell all threads of pairs that none has heard of; return those that may be among the best."""
        query, _, similarity = pairs
        lower = similarity - self.error[query]
        with self.lock:
            new = lower > self.best[query, -1]
            if new.any():
                query = np.concatenate([np.arange(self.best.size) // self.top, query[new]])
                lower = np.concatenate([self.best.ravel(), lower[new]])
                self.best, _ = ranked(query, np.zeros(len(query), np.int64), lower, len(self.rows), self.top)
                self.floor = np.maximum(self.best[:, -1], self.at_least)
        return self.still_in(pairs)

    def still_in(self, pairs: Pairs) -> Pairs:
        """Those of pairs that may be among the best."""
        query, _, similarity = pairs
        keep = similarity + self.error[query] >= self.floor[query]
        return tuple(part[keep] for part in pairs)

    @torch.inference_mode()
    def exact(self, query: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Similarities (n,) float64 of pairs in the order of queries: the same bits however they are summed.

        A query is split into multiples of 2^-28 and, times 2^24, of 2^-28 again: what is left is below 2^-52.
        Float16's are multiples of 2^-24. So products are multiples of 2^-52, and their sums, at most
        |q||x| < 2, fit in 53 bits: no sum is rounded.
        """
        rows, similarity = self.gallery.take(position).double(), np.empty(len(query))
        numbers, starts = np.unique(query, return_index=True)
        for number, start, stop in zip(numbers, starts, [*starts[1:], len(query)], strict=True):
            row = self.rows[number].double()
            coarse = (row * GRID).round() / GRID
            fine = ((row - coarse) * 2.0**24 * GRID).round() / GRID
            sums = rows[start:stop] @ torch.stack([coarse, fine], 1)
            similarity[start:stop] = (sums[:, 0] + sums[:, 1] * 2.0**-24).numpy()
        return similarity


def ranked(
    query: np.ndarray, position: np.ndarray, similarity: np.ndarray, number: int, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """(similarities, positions) (number, top) of pairs (n,): the best of each query, lowest position first.

    Fewer than top: -inf and -1.
    """
    order = np.lexsort((position, -similarity, query))
    query, position, similarity = query[order], position[order], similarity[order]
    rank = np.arange(len(query)) - np.searchsorted(query, query)
    query, rank, keep = query[rank < top], rank[rank < top], rank < top
    similarities, positions = np.full((number, top), -np.inf), np.full((number, top), -1)
    similarities[query, rank], positions[query, rank] = similarity[keep], position[keep]
    return similarities, positions


def _reaching(
    products: torch.Tensor, threshold: np.ndarray, most: float = 1.0
) -> tuple[np.ndarray, np.ndarray] | None:
    """(queries, rows) of products (n, Q) that reach their query's threshold; None: more than most of them.

    The largest product of a few rows is looked at first: one pass at the speed of memory, where to list what
    passes would take several times as long.
    """
    number, run = len(products), math.gcd(len(products), RUN)
    with np.errstate(over="ignore"):  # rounded down, so that nothing is lost
        threshold = np.nextafter(threshold.astype(np.float32), np.float32(-np.inf))
    threshold = np.maximum(threshold, np.finfo(np.float32).min)  # -inf is what nobody may find
    threshold = torch.from_numpy(threshold).to(products.device)
    runs = products.view(number // run, run, -1)
    which, query = (runs.amax(1) >= threshold).nonzero(as_tuple=True)
    if len(which) > most * products.numel():
        return None
    hit, row = (runs[which, :, query] >= threshold[query, None]).nonzero(as_tuple=True)
    if len(hit) > most * products.numel():
        return None
    return query[hit].cpu().numpy(), (which[hit] * run + row).cpu().numpy()


def _joined(pairs: list[Pairs]) -> Pairs:
    return tuple(np.concatenate(parts) for parts in zip(*pairs, strict=True))


def _pieces(number: int) -> list[slice]:
    return [slice(start, start + PIECE) for start in range(0, number, PIECE)]
