"""Re-ranking by k-reciprocal encoding of each query with the gallery alone, as a search would.

The gallery is encoded once. A query changes the vectors of few images: of those whose neighbours it joins, of
those that it pushes out there, and of all that have one of these among their neighbours.
"""

from __future__ import annotations  # as in reranking.py

import numpy as np
import scipy  # its parts are imported when they are first used
import torch

from devices import Array
from evaluation.half_precision import (
    ROWS,
    as_released,
    distances,
    distances_between,
    divisor,
    sizes_of,
)
from evaluation.k_reciprocal import encoded, indicator, reciprocal


@torch.no_grad()
def k_reciprocal_one_at_a_time(
    query_features: Array,
    gallery_features: Array,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
) -> Array:
    """Re-rank as k_reciprocal does with each query alone: its arguments, and its values but for ties.

    Neighbours are ranked in single precision, the query before images at the same distance, then the lower
    position first. In half precision, where many distances are equal, the released code's order of them
    depends on every value: each query would have all rows sorted anew.
    """
    query, gallery = as_released(query_features), as_released(gallery_features)
    num = len(gallery)
    squared = torch.zeros(num + 1, num + 1, device=gallery.device)  # the query is the last image
    distances(gallery, squared[:num, :num])
    encoding = _Encoding(squared.cpu(), k1, k2)
    distmat = torch.empty(len(query), num)
    for rows, part in zip(distmat.split(ROWS), query.split(ROWS), strict=True):
        rows.copy_(distances_between(part, gallery)[0])
        for row, order in zip(rows, _nearest(rows, max(encoding.sizes)), strict=True):
            jaccard, largest = encoding.compared(row, order)
            row.div_(largest).mul_(lambda_value).add_(jaccard, alpha=1 - lambda_value)
    return distmat.to(query.device) if isinstance(query_features, torch.Tensor) else distmat.numpy()


class _Encoding:
    """The gallery's vectors, and what a query makes of them.

    Args:
        squared: (G + 1, G + 1) float32 squared distances of the gallery, and room for a query's.
        k1, k2: sizes of neighbourhoods.
    """

    def __init__(self, squared: torch.Tensor, k1: int, k2: int):
        self.squared, self.num = squared, len(squared) - 1
        self.sizes = sizes_of(k1, k2, self.num + 1)
        self.farthest = squared[:-1].amax(1)
        nearest = _nearest(squared[:-1, :-1], max(self.sizes))
        self.values = squared[:-1].gather(1, torch.from_numpy(nearest)).T.contiguous()
        averaged, close, every = self.sizes
        self.close, self.every = (_Neighbours(nearest[:, :size], size) for size in (close, every))
        # With equal images, the nearest one may be another; with k2 of 1 a vector stays as it is.
        self.averaged = nearest[:, :averaged] if k2 > 1 else np.arange(self.num)[:, None]
        if averaged > self.averaged.shape[1]:  # fewer images than that: the query is among them
            self.averaged = np.pad(self.averaged, ((0, 0), (0, 1)), constant_values=self.num)
        images, largest = np.arange(self.num), divisor(self.farthest)
        self.plain = encoded(
            images, self.every.among, self.close.among, lambda i, j: squared[i, j] / largest[i]
        )
        self.plain.resize(self.num, self.num + 1)
        self.columns = self.plain.tocsc()

    def compared(self, query: torch.Tensor, order: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a query's Jaccard distances (G,), and what its squared distances are divided by.

        Args:
            query: its squared distances (G,).
            order: the gallery images nearest to it, the nearest first.
        """
        self.squared[-1, :-1] = self.squared[:-1, -1] = query
        largest = divisor(torch.cat([torch.maximum(self.farthest, query), query.amax()[None]]))
        place = (self.values < query).sum(0).numpy()  # of the query in each image's list
        every, changed = self.every.joined(place, order)
        close, elsewhere = self.close.joined(place, order)
        beyond = (query > self.farthest).numpy().nonzero()[0]  # they get another divisor
        other = np.unique(np.concatenate([changed, every[elsewhere].indices, beyond]))
        vectors = encoded(other, every, close, lambda i, j: self.squared[i, j] / largest[i])
        rows = np.arange(self.num + 1)  # of an image in both together
        rows[other] = self.num + np.arange(len(other))

        averaged = self.averaged
        if (k2 := averaged.shape[1]) > 1:
            averaged = averaged.copy()
            averaged[place < k2, -1] = self.num
        mine = rows[np.concatenate([[self.num], order[: k2 - 1]])]
        parts = self.plain[mine[mine < self.num]], vectors[mine[mine >= self.num] - self.num]
        own = sum(np.asarray(part.sum(0)).ravel() for part in parts) / np.float32(k2)
        seen = own.nonzero()[0]
        both = scipy.sparse.vstack([self.columns[:, seen], vectors.tocsc()[:, seen]]).tocsr()
        means = indicator(rows[averaged], both.shape[0]) @ both
        smaller = np.minimum(means.data / k2, own[seen][means.indices])
        image = np.repeat(np.arange(self.num), np.diff(means.indptr))
        overlap = torch.from_numpy(np.bincount(image, smaller, self.num)).float()
        return 1 - overlap / (2 - overlap), largest[-1]


class _Neighbours:
    """Which of the gallery's images are among each other's nearest, and what a query changes.

    Args:
        nearest: (G, min(size, G)) each image's nearest, the nearest first.
        size: how many are neighbours, of the gallery and a query.
    """

    def __init__(self, nearest: np.ndarray, size: int):
        self.nearest, self.size, self.num = nearest, size, len(nearest)
        self.among = reciprocal(nearest)
        self.among.sort_indices()
        self.row = np.repeat(np.arange(self.num), np.diff(self.among.indptr))
        self.pairs = self.row * self.num + self.among.indices  # in ascending order

    def joined(self, place: np.ndarray, order: np.ndarray) -> tuple[scipy.sparse.csr_matrix, np.ndarray]:
        """Return (G + 1, G + 1) with a 1 for each pair, and the images whose rows are others than before.

        Args:
            place: (G,) how many images are nearer to each image than the query.
            order: the images nearest to the query, the nearest first.
        """
        stays, joined = np.ones(len(self.pairs), bool), place < self.size
        if self.size <= self.num:  # whom the query joins, loses the last image
            images = joined.nonzero()[0]
            last = self.nearest[images, -1]
            gone = np.concatenate([images * self.num + last, last * self.num + images])
            stays &= ~np.isin(self.pairs, gone)
        order = order[: self.size - 1]
        mutual = np.sort(order[joined[order]])
        changed = np.concatenate([self.row[~stays], mutual, [self.num]])
        count = np.bincount(self.row[stays], minlength=self.num + 1)
        columns = np.insert(self.among.indices[stays], count.cumsum()[mutual], self.num)
        count[mutual] += 1
        count[-1] = len(mutual) + 1
        columns = np.concatenate([columns, mutual, [self.num]])
        borders = np.concatenate([[0], count.cumsum()])
        shape = self.num + 1, self.num + 1
        return scipy.sparse.csr_matrix((np.ones(len(columns), np.float32), columns, borders), shape), changed


def _nearest(squared: torch.Tensor, size: int) -> np.ndarray:
    """Return (n, min(size, G)) int64: the nearest images of each row (n, G), the first of equal ones."""
    size = min(size, squared.shape[1])
    columns, blocks = np.arange(squared.shape[1], dtype=np.uint64), []
    for rows in squared.split(ROWS):
        # The bits of distances, which are not negative, have the distances' order; below them is the column.
        keys = rows.cpu().contiguous().numpy().view(np.uint32).astype(np.uint64) << np.uint64(32) | columns
        least = np.partition(keys, size - 1, axis=1)[:, :size]
        least.sort(axis=1)
        blocks.append((least & np.uint64(2**32 - 1)).astype(np.int64))
    return np.concatenate(blocks)
