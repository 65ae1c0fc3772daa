"""Re-ranking with sparse matrices: k-reciprocal encoding, affinity inference and graph propagation.

Each function takes query and gallery features and returns new distances. Re-ranked results are not comparable
with plain ones: the result of a query depends on the other images, and in the functions of RERANKING also on
the other queries. Those of ONE_AT_A_TIME re-rank each query with the gallery alone, as a search would.
"""

from __future__ import annotations  # those of scipy.sparse are not needed to evaluate plain rankings

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy  # its parts are imported when they are first used: scipy.sparse takes 0.2 s
import torch

from devices import Array, unit_features

PAIRS = 2**19  # pairs of sparse entries compared at a time: 25 MB of temporaries
SYMMETRIC = 192  # images in a block of the (N, N) distances
BLOCK = 1024  # images whose similarities are computed at a time


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
    num_query = len(query_features)
    squared, halves = _distances(  # of features rounded as in the released code
        torch.cat([unit_features(query_features).half(), unit_features(gallery_features).half()])
    )
    nearest = _nearest_in_half_precision(halves.square_(), _sizes(k1, k2, len(squared)))
    del halves
    largest = squared.amax(1)
    jaccard = _jaccard(squared, largest, nearest, num_query, k1, k2).to(squared.device)
    distmat = squared[:num_query, num_query:] / _divisor(largest[:num_query, None]) * lambda_value
    distmat.add_(jaccard, alpha=1 - lambda_value)
    return distmat if isinstance(query_features, torch.Tensor) else distmat.numpy()


@torch.no_grad()
def k_reciprocal_one_at_a_time(
    query_features: Array,
    gallery_features: Array,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
) -> Array:
    """Re-rank as k_reciprocal does with each query alone: its arguments, and its values bit for bit.

    The gallery's distances are computed and ranked once. A query joins the neighbours of the images that it
    is near to; where it is the farthest image, a row gets another divisor. Rows with a tie are sorted anew,
    since the order of the released code's sort depends on every value.
    """
    query, gallery = unit_features(query_features).half(), unit_features(gallery_features).half()
    num = 1 + len(gallery)
    sizes = _sizes(k1, k2, num)
    squared, halves = _distances(gallery)
    squares, farthest = halves.square_(), squared.amax(1)
    most = squares.amax(1, keepdim=True)
    values, ranking = _least(squares, min(max(sizes) + 1, len(gallery)))
    ranking = torch.cat([ranking.new_zeros(len(ranking), 1), ranking + 1], 1)  # the query is image 0
    everything = torch.nn.functional.pad(squared, (1, 0, 1, 0))  # (1 + G, 1 + G)
    del squared, halves
    distmat = torch.empty(len(query), len(gallery), device=query.device)
    for rows in torch.arange(len(query)).split(SYMMETRIC):
        products, rounded = _distances_between(query[rows], gallery)
        rounded = torch.nn.functional.pad(rounded.square_(), (1, 0))  # (n, 1 + G)
        of_query = _nearest_in_half_precision(rounded, sizes)
        for k, row in enumerate(rows.tolist()):
            here = rounded[k, 1:, None]
            scale = _divisor(torch.maximum(here, most))
            ordered, places = (torch.cat([here, values], 1) / scale).float().sort(dim=1)
            nearest = ranking.gather(1, places)[:, : max(sizes)].cpu().numpy()
            if len(tied := _tied(ordered, sizes)):
                whole = torch.cat([here[tied], squares[tied]], 1) / scale[tied]
                nearest[tied.cpu().numpy()] = _sort(whole, max(sizes))
            nearest = np.concatenate([of_query[k : k + 1], nearest])
            everything[0, 1:] = everything[1:, 0] = products[k]
            largest = torch.maximum(everything[:, 0], torch.cat([products[k].amax()[None], farthest]))
            jaccard = _jaccard(everything, largest, nearest, 1, k1, k2)[0].to(distmat.device)
            distmat[row] = products[k] / _divisor(largest[0]) * lambda_value
            distmat[row].add_(jaccard, alpha=1 - lambda_value)
    return distmat if isinstance(query_features, torch.Tensor) else distmat.numpy()


@torch.no_grad()
def affinity_inference(query_features: Array, gallery_features: Array, k1: int = 4, k2: int = 1) -> Array:
    """Re-rank by affinities to the gallery (AIM): add the cosine similarity of affinities to the plain one.

    An image's affinities are its similarities to the gallery images, with all but the k1 largest set to 0. A
    gallery image gets the mean affinities of its k2 nearest gallery images, including itself. Queries do not
    affect each other.

    Args:
        query_features, gallery_features: (Q, D) and (G, D), unit norm.
        k1, k2: neighbourhood sizes, at most G. The authors choose k1 near the number of gallery images per
            identity: 4 and 1 on SYSU-MM01 (all), 2 and 2 (indoor), 20 and 6 (multi-shot), 8 and 2 on RegDB.

    Returns:
        distmat (Q, G) float32, smaller is nearer: NumPy for NumPy features, else a tensor on their device.

    Source: Fang, Yang, Fu, Visible-Infrared Person Re-Identification via Semantic Alignment and Affinity
    Inference, ICCV 2023, with the details of the authors' implementation.
    """
    query, gallery = unit_features(query_features), unit_features(gallery_features)
    q_values, q_nearest = _most_similar(query, gallery, k1)
    g_values, g_nearest = _most_similar(gallery, gallery, k1)
    q_affinities = _sparse(q_nearest, q_values, len(gallery))
    g_affinities = _sparse(g_nearest, g_values, len(gallery))
    mean = _indicator(g_nearest[:, :k2], len(gallery)) / g_nearest[:, :k2].shape[1]
    distmat = query @ gallery.T
    distmat += _products(_normalized(q_affinities), _normalized(mean @ g_affinities)).to(distmat.device)
    return distmat.neg_() if isinstance(query_features, torch.Tensor) else distmat.neg_().numpy()


@torch.no_grad()
def graph_propagation(query_features: Array, gallery_features: Array, k1: int = 26, k2: int = 7) -> Array:
    """Re-rank by propagation in the graph of nearest images (GNN re-ranking).

    Each query and gallery image starts as a vector (N,) with 1 at its k1 nearest images, including itself.
    Twice, the matrix of these vectors is added to its transpose; then each vector becomes the sum of the
    vectors of its k2 nearest images, weighted by squared similarity, and is normalised. The new similarity is
    the cosine of two vectors.

    Args:
        query_features, gallery_features: (Q, D) and (G, D), unit norm.
        k1, k2: neighbourhood sizes, at most N; the defaults are the authors' for Market-1501.

    Returns:
        distmat (Q, G) float32, smaller is nearer: NumPy for NumPy features, else a tensor on their device.

    Source: Zhang et al., Understanding Image Retrieval Re-Ranking: A Graph Neural Network Perspective,
    arXiv 2012.07620, with the details of the authors' implementation.
    """
    query, gallery = unit_features(query_features), unit_features(gallery_features)
    features = torch.cat([query, gallery])
    vectors = _propagated(*_most_similar(features, features, k1), k2)
    distmat = _products(vectors[: len(query)], vectors[len(query) :]).neg_().to(features.device)
    return distmat if isinstance(query_features, torch.Tensor) else distmat.numpy()


@torch.no_grad()
def graph_propagation_one_at_a_time(
    query_features: Array, gallery_features: Array, k1: int = 26, k2: int = 7
) -> Array:
    """Re-rank as graph_propagation does with each query alone: its arguments, and its values.

    The gallery's nearest images are found once. A query joins those of the images to which it is nearer than
    the last of them.
    """
    query, gallery = unit_features(query_features), unit_features(gallery_features)
    k = min(k1, 1 + len(gallery))
    values, nearest = map(torch.from_numpy, _most_similar(gallery, gallery, k))
    ranking = torch.cat([nearest.new_zeros(len(nearest), 1), nearest + 1], 1)  # the query is image 0
    distmat = query @ gallery.T
    for row, own in zip(distmat, torch.linalg.vecdot(query, query), strict=True):
        of_query = torch.cat([own[None], row]).cpu().topk(k)
        joined = torch.cat([row[:, None].cpu(), values], 1).topk(k, dim=1)
        similar = torch.cat([of_query.values[None], joined.values]).numpy()
        places = torch.cat([of_query.indices[None], ranking.gather(1, joined.indices)]).numpy()
        vectors = _propagated(similar, places, k2)
        row.copy_(_products(vectors[:1], vectors[1:])[0])
    return distmat.neg_() if isinstance(query_features, torch.Tensor) else distmat.neg_().numpy()


RERANKING = {"k-reciprocal": k_reciprocal, "aim": affinity_inference, "gnn": graph_propagation}
ONE_AT_A_TIME = {"k-reciprocal": k_reciprocal_one_at_a_time, "gnn": graph_propagation_one_at_a_time}


# --- neighbours and sparse matrices


def _most_similar(features: torch.Tensor, others: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k largest cosine similarities of each row to others (M, D): values and indices (N, k)."""
    k = min(k, len(others))
    with torch.autocast(features.device.type, enabled=False):
        largest = [(rows @ others.T).topk(k, dim=1) for rows in features.split(BLOCK)]
    values, indices = (torch.cat(blocks).cpu().numpy() for blocks in zip(*largest, strict=True))
    return values, indices


def _sparse(columns: np.ndarray, values: np.ndarray, width: int) -> scipy.sparse.csr_matrix:
    """Return a matrix (N, width) with values (N, k) at columns (N, k) of each row."""
    num, k = columns.shape
    return scipy.sparse.csr_matrix(
        (values.ravel(), columns.ravel(), np.arange(num + 1) * k), shape=(num, width)
    )


def _indicator(nearest: np.ndarray, width: int) -> scipy.sparse.csr_matrix:
    """Return (N, width) with a 1 for every j among nearest[i], for nearest (N, k) indices."""
    return _sparse(nearest, np.ones(nearest.shape, np.float32), width)


def _normalized(matrix: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """Return the rows of a sparse matrix, each with unit norm; empty ones stay empty."""
    norms = np.sqrt(matrix.multiply(matrix).sum(1)).A1
    return scipy.sparse.diags((1 / np.where(norms > 0, norms, 1)).astype(np.float32)) @ matrix


def _products(queries: scipy.sparse.csr_matrix, gallery: scipy.sparse.csr_matrix) -> torch.Tensor:
    """Return (Q, G) float32: the scalar products of the rows of two sparse matrices."""
    columns = gallery.T.tocsr()
    products = np.empty((queries.shape[0], gallery.shape[0]), np.float32)
    for start in range(0, len(products), BLOCK):
        products[start : start + BLOCK] = (queries[start : start + BLOCK] @ columns).toarray()
    return torch.from_numpy(products)


def _propagated(similarities: np.ndarray, nearest: np.ndarray, k2: int) -> scipy.sparse.csr_matrix:
    """Return graph_propagation's (N, N) vectors for each image's nearest, most similar first (N, k1)."""
    weights = _sparse(nearest[:, :k2], similarities[:, :k2] ** 2, len(nearest))
    vectors = _indicator(nearest, len(nearest))
    for _ in range(2):
        vectors = _normalized(weights @ (vectors + vectors.T))
    return vectors


# --- k-reciprocal encoding


def _distances(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (N, N) float32 squared Euclidean distances of (N, D), and their roots in float16."""
    squared = features.new_empty(len(features), len(features), dtype=torch.float32)
    halves = torch.empty_like(squared, dtype=torch.float16)
    for block in torch.arange(len(features)).split(SYMMETRIC):  # the other half follows by symmetry
        here, rest = slice(int(block[0]), int(block[-1]) + 1), slice(int(block[0]), None)
        single, rounded = _distances_between(features[rest], features[here])
        squared[rest, here], squared[here, rest] = single, single.T
        halves[rest, here], halves[here, rest] = rounded, rounded.T
    return squared.fill_diagonal_(0), halves.fill_diagonal_(0)


def _distances_between(features: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (N, M) float32 squared Euclidean distances of (N, D) and (M, D), and their roots in float16.

    Both are computed in float64 and rounded once. Rounding to float32 first would sometimes give another
    float16 value, and so other neighbours. In float64 the products of unit float16 features are exact, in
    whatever order they are summed: all are multiples of 2^-48.
    """
    features, others = features.double(), others.double()
    products = torch.addmm(torch.linalg.vecdot(others, others), features, others.T, alpha=-2)
    products.add_(torch.linalg.vecdot(features, features)[:, None]).clamp_(min=0)
    single = products.float()
    rounded = products.sqrt_().cpu().numpy().astype(np.float16)  # torch would round to float32 first
    return single, torch.from_numpy(rounded).to(features.device)


def _divisor(largest: torch.Tensor) -> torch.Tensor:
    """Return the largest distances of rows as what to divide these by: not 0 where all images are equal."""
    return largest.clamp(min=torch.finfo(largest.dtype).tiny)


def _sizes(k1: int, k2: int, num: int) -> list[int]:
    """Return how many of num images are in the three neighbourhoods: averaged, close, all."""
    return [min(k, num) for k in (k2, round(k1 / 2) + 1, k1 + 1)]


def _nearest_in_half_precision(squares: torch.Tensor, sizes: list[int]) -> np.ndarray:
    """Return (n, max(sizes)) int64: the images nearest to each one, as the released code orders them.

    The released code ranks distances in half precision, where many are equal, with NumPy's unstable sort. Its
    results depend on which images are among the nearest, so this does the same. Only the sets of neighbours
    matter: topk finds them unless a tie crosses one of the sizes; only the rows with such a tie are sorted.

    Args:
        squares: (n, N) float16 squared distances.
        sizes: of the neighbourhoods that are needed.
    """
    blocks = []
    for rows in squares.split(SYMMETRIC):
        rounded = rows / _divisor(rows.amax(1, keepdim=True))
        values, nearest = _least(rounded.float(), min(max(sizes) + 1, rows.shape[1]))
        nearest = nearest[:, : max(sizes)].cpu().numpy()
        tied = _tied(values, sizes)
        nearest[tied.cpu().numpy()] = _sort(rounded[tied], max(sizes))
        blocks.append(nearest)
    return np.concatenate(blocks)


def _least(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k least values of each row, in order, and their indices: (n, k) each."""
    parts = [part.float().topk(k, dim=1, largest=False) for part in rows.split(SYMMETRIC)]
    return torch.cat([part.values for part in parts]).to(rows.dtype), torch.cat(
        [part.indices for part in parts]
    )


def _tied(ordered: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Return the rows in whose ascending values (n, k) a tie crosses one of sizes."""
    borders = torch.tensor([k for k in sizes if k < ordered.shape[1]], device=ordered.device).long()
    return (ordered[:, borders - 1] == ordered[:, borders]).any(1).nonzero()[:, 0]


def _sort(rows: torch.Tensor, size: int) -> np.ndarray:
    """Return the first `size` indices (n, size) of each float16 row as NumPy's unstable sort orders them."""
    # NumPy sorts the bits of float16 values, as unsigned integers, in the same order, but faster.
    bits, threads = rows.cpu().numpy().view(np.uint16), torch.get_num_threads()
    if bits.size < PAIRS:
        return np.argsort(bits, axis=1)[:, :size]
    with ThreadPoolExecutor(threads) as pool:
        parts = np.array_split(bits, max(threads, SYMMETRIC // 16))
        return np.concatenate(list(pool.map(lambda part: np.argsort(part, axis=1)[:, :size], parts)))


def _jaccard(
    squared: torch.Tensor, largest: torch.Tensor, nearest: np.ndarray, num_query: int, k1: int, k2: int
) -> torch.Tensor:
    """Return the (Q, G) Jaccard distances of k_reciprocal's vectors, on the CPU.

    Args:
        squared, largest: (N, N) squared distances, queries first, and each row's maximum (N,).
        nearest: (N, max(_sizes)) each image's neighbours.
        num_query, k1, k2: Q, and the sizes of neighbourhoods.
    """
    num = len(nearest)
    # Sets of images are the rows of sparse 0/1 matrices (N, N): a product counts common members.
    neighbours = _reciprocal(nearest[:, : k1 + 1])
    close = _reciprocal(nearest[:, : round(k1 / 2) + 1])
    common = neighbours @ close.T  # [i, j]: how many of j's close images are neighbours of i
    agreeing = neighbours.multiply(common).tocsr()
    agreeing.data = (agreeing.data > 2 / 3 * np.diff(close.indptr)[agreeing.indices]).astype(np.float32)
    agreeing.eliminate_zeros()
    expanded = (neighbours + agreeing @ close).tocoo()

    weights = squared[expanded.row, expanded.col] / _divisor(largest)[expanded.row]
    weights = weights.neg_().exp_().cpu().numpy()
    vectors = scipy.sparse.csr_matrix((weights, (expanded.row, expanded.col)), shape=(num, num))
    total = vectors.sum(1).A1  # 0 for images that equal ones push out of all neighbourhoods
    vectors = scipy.sparse.diags(1 / np.where(total > 0, total, 1)) @ vectors
    if k2 > 1:  # with equal images, the nearest one may be another
        vectors = _indicator(np.sort(nearest[:, :k2]), num) @ vectors / min(k2, num)
    overlap = torch.from_numpy(_minimum_sums(vectors[:num_query], vectors[num_query:].tocsc()))
    return overlap.div_(2 - overlap).neg_().add_(1)


def _reciprocal(nearest: np.ndarray) -> scipy.sparse.csr_matrix:
    """Return (N, N) with a 1 where i and j are among each other's nearest (N, k)."""
    indicator = _indicator(np.sort(nearest), len(nearest))  # then results do not depend on topk's order
    return indicator.multiply(indicator.T).tocsr()


def _minimum_sums(queries: scipy.sparse.csr_matrix, gallery: scipy.sparse.csc_matrix) -> np.ndarray:
    """Return (Q, G) float32: the sum over columns of min(queries[q], gallery[g]), for (Q, N) and (G, N).

    Each entry of a query is compared with the few gallery entries in its column, PAIRS pairs at a time.
    """
    num_gallery = gallery.shape[0]
    sums = np.empty((queries.shape[0], num_gallery), dtype=np.float32)
    lengths = np.diff(gallery.indptr)[queries.indices]  # of the column of each query entry
    starts = gallery.indptr[queries.indices]
    meetings = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    first = 0
    while first < len(sums):
        budget = meetings[queries.indptr[first]] + PAIRS
        last = max(first + 1, np.searchsorted(meetings[queries.indptr], budget, side="right") - 1)
        entries = slice(queries.indptr[first], queries.indptr[last])
        count = lengths[entries]
        ours = np.repeat(np.arange(entries.start, entries.stop), count)
        theirs = np.arange(count.sum()) + np.repeat(starts[entries] - (count.cumsum() - count), count)
        line = np.repeat(np.arange(last - first), np.diff(queries.indptr[first : last + 1]))
        cell = (line * num_gallery)[ours - entries.start] + gallery.indices[theirs]
        smaller = np.minimum(queries.data[ours], gallery.data[theirs])
        sums[first:last] = np.bincount(cell, smaller, (last - first) * num_gallery).reshape(-1, num_gallery)
        first = last
    return sums
