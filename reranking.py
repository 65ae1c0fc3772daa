"""Re-ranking with sparse matrices: k-reciprocal encoding, affinity inference and graph propagation.

Each takes query and gallery features and returns distances that rank anew. Re-ranked results do not compare
with plain ones: what one query gets depends on the other images.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import scipy.sparse
import torch

from devices import Array, as_features

PAIRS = 2**19  # pairs of sparse entries compared at a time: 25 MB of temporaries
SYMMETRIC = 192  # images in a block of the (N, N) distances
BLOCK = 1024  # images whose similarities are calculated at a time


@torch.no_grad()
def k_reciprocal(
    query_features: Array,
    gallery_features: Array,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
) -> Array:
    """Re-rank by k-reciprocal encoding: (1 - lambda) x Jaccard distance + lambda x original distance.

    An image's k-reciprocal neighbours, expanded by those of its neighbours that mostly agree, become a sparse
    vector of weights exp(-distance); the vectors of its k2 nearest images are averaged; the Jaccard distance
    compares vectors. The original distance is squared Euclidean, each row divided by its largest entry.
    Neighbours are ranked in half precision, as the released code does, whose results depend on it.

    Args:
        query_features, gallery_features: (Q, D) and (G, D), unit norm (half precision holds no large
            distances); products run on their device, in float64.
        k1, k2: neighbourhood sizes, cut to the number of images where that is smaller.
        lambda_value: weight of the original distance, in [0, 1].

    Returns:
        distmat (Q, G) float32, smaller is nearer: NumPy for NumPy features, else a tensor on their device.

    Source: Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017.
    """
    num_query, num = len(query_features), len(query_features) + len(gallery_features)
    distances, halves = _distances(  # of features rounded as the released code does
        torch.cat([as_features(query_features).half(), as_features(gallery_features).half()])
    )
    close_k = round(k1 / 2) + 1
    nearest = _nearest_in_half_precision(halves, [min(k, num) for k in (k2, close_k, k1 + 1)])
    del halves
    distances.div_(distances.amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny))

    # Sets of images are the rows of sparse 0/1 matrices (N, N): a product counts common members.
    neighbours = _reciprocal(nearest[:, : k1 + 1])
    close = _reciprocal(nearest[:, :close_k])
    common = neighbours @ close.T  # [i, j]: how many of j's close images are neighbours of i
    agreeing = neighbours.multiply(common).tocsr()
    agreeing.data = (agreeing.data > 2 / 3 * np.diff(close.indptr)[agreeing.indices]).astype(np.float32)
    agreeing.eliminate_zeros()
    expanded = (neighbours + agreeing @ close).tocoo()

    weights = distances[expanded.row, expanded.col].neg_().exp_().cpu().numpy()
    vectors = scipy.sparse.csr_matrix((weights, (expanded.row, expanded.col)), shape=(num, num))
    total = vectors.sum(1).A1  # 0 where equal images crowd each other out
    vectors = scipy.sparse.diags(1 / np.where(total > 0, total, 1)) @ vectors
    vectors = _indicator(nearest[:, :k2], num) @ vectors / min(k2, num)

    distmat = distances[:num_query, num_query:] * lambda_value
    del distances  # (N, N)
    overlap = torch.from_numpy(_minimum_sums(vectors[:num_query], vectors[num_query:].tocsc()))
    jaccard = overlap.div_(2 - overlap).neg_().add_(1)
    distmat.add_(jaccard.to(distmat.device), alpha=1 - lambda_value)
    return distmat if isinstance(query_features, torch.Tensor) else distmat.numpy()


@torch.no_grad()
def affinity_inference(query_features: Array, gallery_features: Array, k1: int = 4, k2: int = 1) -> Array:
    """Re-rank by affinities to the gallery (AIM): the cosine similarity of affinities is added to the plain.

    An image's affinities are its similarities to the gallery images, all but the k1 largest set to 0. A
    gallery image takes the mean of the affinities of its k2 nearest gallery images, itself among them. No
    query knows of another.

    Args:
        query_features, gallery_features: (Q, D) and (G, D), unit norm.
        k1, k2: neighbourhood sizes, cut to G where that is smaller. The authors take about the number of an
            identity's images in the gallery for k1: on SYSU-MM01 4 and 1 (all), 2 and 2 (indoor), 20 and 6
            (multi-shot), on RegDB 8 and 2.

    Returns:
        distmat (Q, G) float32, smaller is nearer: NumPy for NumPy features, else a tensor on their device.

    Source: Fang, Yang, Fu, Visible-Infrared Person Re-Identification via Semantic Alignment and Affinity
    Inference, ICCV 2023, with the details of the authors' implementation.
    """
    query, gallery = as_features(query_features), as_features(gallery_features)
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

    Every image of queries and gallery begins as the vector (N,) with 1 at its k1 nearest images, itself
    among them. Twice, the matrix of these vectors is added to its transpose, and each vector becomes the sum
    of those of its image's k2 nearest, weighted by their similarities squared, and is normalised. The new
    similarity is the cosine of two vectors.

    Args:
        query_features, gallery_features: (Q, D) and (G, D), unit norm.
        k1, k2: neighbourhood sizes, cut to N where that is smaller; the defaults are Market-1501's.

    Returns:
        distmat (Q, G) float32, smaller is nearer: NumPy for NumPy features, else a tensor on their device.

    Source: Zhang et al., Understanding Image Retrieval Re-Ranking: A Graph Neural Network Perspective,
    arXiv 2012.07620, with the details of the authors' implementation.
    """
    query, gallery = as_features(query_features), as_features(gallery_features)
    features = torch.cat([query, gallery])
    values, nearest = _most_similar(features, features, k1)
    weights = _sparse(nearest[:, :k2], values[:, :k2] ** 2, len(features))
    vectors = _indicator(nearest, len(features))
    for _ in range(2):
        vectors = _normalized(weights @ (vectors + vectors.T))
    distmat = _products(vectors[: len(query)], vectors[len(query) :]).neg_().to(features.device)
    return distmat if isinstance(query_features, torch.Tensor) else distmat.numpy()


RERANKING = {"k-reciprocal": k_reciprocal, "aim": affinity_inference, "gnn": graph_propagation}


# --- neighbours and sparse matrices


def _most_similar(features: torch.Tensor, others: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's k largest cosine similarities (N, k) float32 to others (M, D), and their rows."""
    k = min(k, len(others))
    with torch.autocast(features.device.type, enabled=False):
        found = [(rows @ others.T).topk(k, dim=1) for rows in features.split(BLOCK)]
    values, indices = (torch.cat(blocks).cpu().numpy() for blocks in zip(*found, strict=True))
    return values, indices


def _sparse(columns: np.ndarray, values: np.ndarray, width: int) -> scipy.sparse.csr_matrix:
    """Return (N, width) with values (N, k) at columns (N, k) of each row, 0 elsewhere."""
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


# --- k-reciprocal encoding


def _distances(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (N, N) Euclidean distances of (N, D): squared, float32, and as they are, float16; diagonals 0.

    Calculated in double precision and rounded once: by way of float32, a distance next to the middle of two
    halves would at times become the other one, and which images are neighbours depends on it.
    """
    features = features.double()
    norms = torch.linalg.vecdot(features, features)
    squared = features.new_empty(len(features), len(features), dtype=torch.float32)
    halves = torch.empty_like(squared, dtype=torch.float16)
    for block in torch.arange(len(features)).split(SYMMETRIC):  # each pair of blocks once
        here, rest = slice(int(block[0]), int(block[-1]) + 1), slice(int(block[0]), None)
        products = torch.addmm(norms[here], features[rest], features[here].T, alpha=-2)
        products.add_(norms[rest, None]).clamp_(min=0)
        single = products.float()
        squared[rest, here], squared[here, rest] = single, single.T
        rounded = products.sqrt_().cpu().numpy().astype(np.float16)  # torch would go by way of float32
        rounded = torch.from_numpy(rounded).to(features.device)
        halves[rest, here], halves[here, rest] = rounded, rounded.T
    return squared.fill_diagonal_(0), halves.fill_diagonal_(0)


def _nearest_in_half_precision(distances: torch.Tensor, sizes: list[int]) -> np.ndarray:
    """Return (N, max(sizes)) int64: the images nearest to each one, as the released code orders them.

    It ranks distances in half precision, where many tie, by NumPy's unstable sort; its results depend on
    which of them fall within the sizes, so that is kept. Only sets of neighbours matter: where no tie crosses
    the border of one of the sizes any way of selecting gives the same, and sorting is kept for the other
    rows. distances: (N, N) float16, overwritten.
    """
    most = min(max(sizes) + 1, len(distances))
    borders = torch.tensor([s for s in sizes if s < most], dtype=torch.int64, device=distances.device)
    threads = torch.get_num_threads()
    found = []
    with ThreadPoolExecutor(threads) as pool:
        for rows in distances.split(SYMMETRIC):
            rounded = rows.square_()
            rounded.div_(rounded.amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float16).tiny))
            values, nearest = rounded.float().topk(most, dim=1, largest=False)
            tied = (values[:, borders - 1] == values[:, borders]).any(1).nonzero()[:, 0]
            # NumPy sorts unsigned integers exactly as it sorts the halves whose bits they are, but faster.
            bits = np.array_split(rounded[tied].cpu().numpy().view(np.uint16), max(threads, SYMMETRIC // 16))
            nearest = nearest[:, : max(sizes)].cpu().numpy()
            ordered = pool.map(lambda rows: np.argsort(rows, axis=1)[:, : max(sizes)], bits)
            nearest[tied.cpu().numpy()] = np.concatenate(list(ordered))
            found.append(nearest)
    return np.concatenate(found)


def _reciprocal(nearest: np.ndarray) -> scipy.sparse.csr_matrix:
    """Return (N, N) with a 1 where i and j are among each other's nearest (N, k)."""
    indicator = _indicator(nearest, len(nearest))
    return indicator.multiply(indicator.T).tocsr()


def _minimum_sums(queries: scipy.sparse.csr_matrix, gallery: scipy.sparse.csc_matrix) -> np.ndarray:
    """Return (Q, G) float32: the sum over columns of min(queries[q], gallery[g]), for (Q, N) and (G, N).

    Each entry of a query meets the few gallery entries of its column: PAIRS such meetings at a time.
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
