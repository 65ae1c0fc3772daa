"""Re-ranking by k-reciprocal encoding, of all queries together.

What is needed of the distances: where a query meets the gallery, all of them in float32; of all images the
order of the nearest, in half precision, one modality at a time; and those of a few dozen pairs an image.
"""

from __future__ import annotations  # as in reranking.py

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

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
    nearest_in_half_precision,
    sizes_of,
    slices,
    squared_lengths,
)

PAIRS = 2**19  # pairs of sparse entries compared at a time: 25 MB of temporaries


@torch.no_grad()
def k_reciprocal(
    query_features: Array,
    gallery_features: Array,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
) -> Array:
    """Re-rank by k-reciprocal encoding: (1 - lambda) x Jaccard distance + lambda x original distance.

    An image's k-reciprocal neighbours, expanded by the neighbours of those that mostly agree, become a sparse
    vector of weights exp(-distance). The vectors of its k2 nearest images are averaged, and the Jaccard
    distance compares vectors. The original distance is squared Euclidean, each row divided by its maximum.
    Neighbours are ranked in half precision as in the released code, since its results depend on that.

    Args:
        query_features, gallery_features: (Q, D) and (G, D), unit norm (half precision cannot represent large
            distances); products are computed on their device, in float64.
        k1, k2: neighbourhood sizes, at most the number of images.
        lambda_value: weight of the original distance, in [0, 1].

    Returns:
        distmat (Q, G) float32, smaller is nearer: NumPy for NumPy features, else a tensor on their device.

    Source: Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017.
    """
    query, gallery = as_released(query_features), as_released(gallery_features)
    distmat, largest, nearest = _rank(query, gallery, sizes_of(k1, k2, len(query) + len(gallery)))
    vectors = _vectors(nearest, largest, partial(_distances_of_pairs, query, gallery, distmat), k1, k2)
    _mix(distmat, largest[: len(query)], vectors, lambda_value)
    return distmat if isinstance(query_features, torch.Tensor) else distmat.numpy()


# --- the parts of k_reciprocal


def _rank(
    query: torch.Tensor, gallery: torch.Tensor, sizes: list[int]
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Return the squared distances (Q, G), each image's largest (N,), and its nearest (N, max(sizes)).

    Queries come first in the last two. One modality's distances among themselves are held at a time.
    """
    num = len(query) + len(gallery)
    distmat, between = distances_between(query, gallery)
    largest = torch.cat([distmat.amax(1), distmat.amax(0)])
    nearest = np.empty((num, max(sizes)), np.int64)
    for images, others, first in ((query, between, 0), (gallery, between.T, len(query))):
        within, farthest = distances(images)
        mine = slice(first, first + len(images))
        largest[mine] = torch.maximum(largest[mine], farthest)
        for rows in slices(len(images), ROWS):
            parts = (others[rows], within[rows]) if first else (within[rows], others[rows])
            roots = torch.cat(parts, 1)  # queries come first
            squares = roots.mul_(roots)  # square_ takes seven times longer
            nearest[mine][rows] = nearest_in_half_precision(squares, sizes)
        del within, parts  # before the next is made
    return distmat, largest, nearest


def _distances_of_pairs(
    query: torch.Tensor, gallery: torch.Tensor, distmat: torch.Tensor, ours: np.ndarray, theirs: np.ndarray
) -> torch.Tensor:
    """Return the float32 squared distances (P,) of pairs of images, numbered queries first.

    Args:
        query, gallery, distmat: (Q, D), (G, D) and the squared distances between them.
        ours, theirs: (P,) int32 images.
    """
    num = len(query) + len(gallery)
    lower, upper = np.minimum(ours, theirs).astype(np.int64), np.maximum(ours, theirs)
    pairs, places = np.unique(lower * num + upper, return_inverse=True)  # i and j as well as j and i
    first, last = np.divmod(pairs, num)
    found = distmat.new_empty(len(pairs))
    between = (first < len(query)) & (last >= len(query))
    found[between] = distmat[first[between], last[between] - len(query)]
    for images, start, chosen in (
        (query, 0, last < len(query)),
        (gallery, len(query), first >= len(query)),
    ):
        lengths, images = squared_lengths(images), images.float()
        for some in np.array_split(chosen.nonzero()[0], 1 + chosen.sum() // 1024):
            i, j = (torch.from_numpy(side[some] - start).to(images.device) for side in (first, last))
            products = (images[i] * images[j]).sum(1, dtype=torch.float64)  # exact, each also in float32
            found[some] = (lengths[i] + lengths[j] - 2 * products).float()
    return found[places]


def sparse(columns: np.ndarray, values: np.ndarray, width: int) -> scipy.sparse.csr_matrix:
    """Return a matrix (N, width) with values (N, k) at columns (N, k) of each row."""
    num, k = columns.shape
    return scipy.sparse.csr_matrix(
        (values.ravel(), columns.ravel(), np.arange(num + 1) * k), shape=(num, width)
    )


def indicator(nearest: np.ndarray, width: int) -> scipy.sparse.csr_matrix:
    """Return (N, width) with a 1 for every j among nearest[i], for nearest (N, k) indices."""
    return sparse(nearest, np.ones(nearest.shape, np.float32), width)


def _vectors(
    nearest: np.ndarray,
    largest: torch.Tensor,
    squared: Callable[[np.ndarray, np.ndarray], torch.Tensor],
    k1: int,
    k2: int,
) -> scipy.sparse.csr_matrix:
    """Return the vectors (N, N) of k_reciprocal, before they are compared.

    Args:
        nearest: (N, max(sizes)) each image's neighbours.
        largest: (N,) each image's largest squared distance.
        squared: gives the squared distances (P,) of images (P,) to images (P,).
        k1, k2: sizes of neighbourhoods.
    """
    num = len(nearest)
    neighbours, close = reciprocal(nearest[:, : k1 + 1]), reciprocal(nearest[:, : round(k1 / 2) + 1])
    vectors = encoded(np.arange(num), neighbours, close, lambda i, j: squared(i, j) / divisor(largest)[i])
    if k2 > 1:  # with equal images, the nearest one may be another
        vectors = indicator(np.sort(nearest[:, :k2]), num) @ vectors / min(k2, num)
    return vectors


def reciprocal(nearest: np.ndarray) -> scipy.sparse.csr_matrix:
    """Return (N, N) with a 1 where i and j are among each other's nearest (N, k)."""
    among = indicator(np.sort(nearest), len(nearest))  # then results do not depend on topk's order
    return among.multiply(among.T).tocsr()


def encoded(
    images: np.ndarray,
    neighbours: scipy.sparse.csr_matrix,
    close: scipy.sparse.csr_matrix,
    distances: Callable[[np.ndarray, np.ndarray], torch.Tensor],
) -> scipy.sparse.csr_matrix:
    """Return the vectors (n, N) of some images: exp(-distance) to their expanded neighbours, of sum 1.

    Args:
        images: (n,) which.
        neighbours, close: (N, N) with a 1 for each k-reciprocal neighbour, of k1 and of half of it.
        distances: gives the distances (P,) of images (P,) to images (P,).
    """
    # Sets of images are the rows of sparse 0/1 matrices: a product counts common members.
    neighbours = neighbours[images]
    common = neighbours @ close  # [i, j]: how many of j's close images are neighbours of i
    agreeing = neighbours.multiply(common).tocsr()
    agreeing.data = (agreeing.data > 2 / 3 * np.diff(close.indptr)[agreeing.indices]).astype(np.float32)
    agreeing.eliminate_zeros()
    expanded = (neighbours + agreeing @ close).tocoo()
    weights = distances(images[expanded.row], expanded.col).neg_().exp_().cpu().numpy()
    vectors = scipy.sparse.csr_matrix((weights, (expanded.row, expanded.col)), shape=expanded.shape)
    total = vectors.sum(1).A1  # 0 for images that equal ones push out of all neighbourhoods
    return scipy.sparse.diags(1 / np.where(total > 0, total, 1)) @ vectors


def _mix(
    distmat: torch.Tensor, largest: torch.Tensor, vectors: scipy.sparse.csr_matrix, lambda_value: float
) -> None:
    """Turn the squared distances (Q, G) into the re-ranked ones, in place.

    Args:
        distmat, largest: the squared distances, and the queries' largest (Q,).
        vectors: (Q + G, Q + G), queries first.
        lambda_value: weight of the original distance.
    """
    queries, gallery = vectors[: len(distmat)], vectors[len(distmat) :].tocsc()
    distmat.div_(divisor(largest[:, None])).mul_(lambda_value)

    def add(rows: slice) -> None:
        overlap = torch.from_numpy(_minimum_sums(queries[rows], gallery))
        jaccard = overlap.div_(2 - overlap).neg_().add_(1)
        distmat[rows].add_(jaccard.to(distmat.device), alpha=1 - lambda_value)

    lengths = np.diff(gallery.indptr)[queries.indices]  # of the column of each query entry
    work = np.r_[0, lengths.cumsum(dtype=np.int64)][queries.indptr] + np.arange(len(distmat) + 1) * (
        distmat.shape[1] // 4
    )
    borders = np.searchsorted(work, np.arange(PAIRS, work[-1], PAIRS))
    borders = np.unique([0, *borders, len(distmat)])
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(add, map(slice, borders[:-1], borders[1:])))


def _minimum_sums(queries: scipy.sparse.csr_matrix, gallery: scipy.sparse.csc_matrix) -> np.ndarray:
    """Return (n, G) float32: the sum over columns of min(queries[q], gallery[g]), for (n, N) and (G, N).

    Each entry of a query is compared with the gallery's entries in its column.
    """
    shape = queries.shape[0], gallery.shape[0]
    count = np.diff(gallery.indptr)[queries.indices]  # of the column of each query entry
    ours = np.repeat(np.arange(queries.nnz), count)
    theirs = np.arange(len(ours)) + (gallery.indptr[queries.indices] - (count.cumsum() - count))[ours]
    line = np.repeat(np.arange(shape[0]) * shape[1], np.diff(queries.indptr))
    smaller = np.minimum(queries.data[ours], gallery.data[theirs])
    sums = np.bincount(line[ours] + gallery.indices[theirs], smaller, shape[0] * shape[1])
    return sums.astype(np.float32).reshape(shape)
