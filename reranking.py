"""Re-ranking with sparse matrices: k-reciprocal encoding, affinity inference and graph propagation.

Each function takes query and gallery features and returns new distances. Re-ranked results are not comparable
with plain ones: the result of a query depends on the other images, and in the functions of RERANKING also on
the other queries. Those of ONE_AT_A_TIME re-rank each query with the gallery alone, as a search would.
"""

from __future__ import annotations  # those of scipy.sparse are not needed to evaluate plain rankings

import numpy as np
import scipy  # its parts are imported when they are first used: scipy.sparse takes 0.2 s
import torch

from devices import Array, unit_features
from evaluation.k_reciprocal import indicator, k_reciprocal, sparse
from evaluation.one_at_a_time import k_reciprocal_one_at_a_time

BLOCK = 1024  # images whose similarities are computed at a time


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
    q_affinities = sparse(q_nearest, q_values, len(gallery))
    g_affinities = sparse(g_nearest, g_values, len(gallery))
    mean = indicator(g_nearest[:, :k2], len(gallery)) / g_nearest[:, :k2].shape[1]
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
        row.copy_(torch.from_numpy((vectors @ vectors[0].toarray()[0])[1:]))
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
    weights = sparse(nearest[:, :k2], similarities[:, :k2] ** 2, len(nearest))
    vectors = indicator(nearest, len(nearest))
    for _ in range(2):
        vectors = _normalized(weights @ (vectors + vectors.T))
    return vectors
