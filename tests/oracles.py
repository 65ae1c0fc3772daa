"""What the project computes, as one would first write it: plain loops from docs/method.md and papers.

Tests compare with them, and benchmarks measure against them. Evaluation sorts the gallery query by query and
computes precision at every position of the ranking; re-ranking keeps dense (N, N) matrices.
"""

import numpy as np
from scipy.spatial.distance import cdist


def ignored_images(protocol, q_pid, q_camid, g_pids, g_camids) -> np.ndarray:
    """Return (G,) bool: the gallery images that one query ignores (docs/method.md, section 8)."""
    if protocol == "sysu":
        return (q_camid == 3) & (g_camids == 2)
    if protocol == "llcm":
        return (g_pids == q_pid) & (g_camids == q_camid)
    return np.zeros(len(g_pids), dtype=bool)


def evaluate_loop(distmat, q_pids, g_pids, q_camids, g_camids, protocol, max_rank=20):
    """Return (cmc, mAP, mINP) of (Q, G) distances; see eval_metrics.eval_sysu."""
    cmcs, precisions, inverses = [], [], []
    for query in range(len(q_pids)):
        order = np.argsort(distmat[query], kind="stable")
        ignored = ignored_images(protocol, q_pids[query], q_camids[query], g_pids, g_camids)
        ranked = g_pids[order[~ignored[order]]]
        matches = (ranked == q_pids[query]).astype(int)
        if not matches.any():
            continue
        running = matches.cumsum()
        precision = [hits / rank for rank, hits in enumerate(running, start=1)]
        precisions.append((np.array(precision) * matches).sum() / matches.sum())
        last = np.nonzero(matches)[0][-1]
        inverses.append(running[last] / (last + 1))

        if protocol != "regdb":  # one entry for each identity, where it first appears
            _, appearance = np.unique(ranked, return_index=True)
            matches = (ranked[np.sort(appearance)] == q_pids[query]).astype(int)
        cmc = np.minimum(matches.cumsum(), 1)[:max_rank]
        cmcs.append(np.concatenate([cmc, np.full(max_rank - len(cmc), cmc[-1])]))
    return np.mean(cmcs, axis=0), np.mean(precisions), np.mean(inverses)


def k_reciprocal_loop(query_features, gallery_features, k1=20, k2=6, lambda_value=0.3, dtype=np.float16):
    """Return the re-ranked (Q, G) distances, ranked in half precision, the rest in dtype."""
    features = np.concatenate([query_features, gallery_features]).astype(np.float16)
    num_query, num = len(query_features), len(features)
    exact = cdist(features, features)

    def by_row(precision):
        squared = np.power(exact.astype(precision), 2)
        largest = np.max(squared, axis=0)
        return np.transpose(squared / np.where(largest > 0, largest, 1))

    distances = by_row(dtype)
    ranking = np.argsort(distances if dtype is np.float16 else by_row(np.float16), axis=1)

    def reciprocal(image, k):
        forward = ranking[image, : k + 1]
        backward = ranking[forward, : k + 1]
        return forward[np.nonzero(backward == image)[0]]

    vectors = np.zeros((num, num), dtype=dtype)
    for image in range(num):
        neighbours = reciprocal(image, k1)
        expanded = neighbours
        for neighbour in neighbours:
            close = reciprocal(neighbour, int(np.around(k1 / 2)))
            if len(np.intersect1d(close, neighbours)) > 2 / 3 * len(close):
                expanded = np.append(expanded, close)
        expanded = np.unique(expanded)
        weights = np.exp(-distances[image, expanded])
        vectors[image, expanded] = weights / weights.sum()

    averaged = np.zeros_like(vectors)
    for image in range(num):
        averaged[image] = vectors[ranking[image, :k2]].mean(axis=0) if k2 > 1 else vectors[image]
    holders = [np.nonzero(averaged[:, image])[0] for image in range(num)]

    jaccard = np.zeros((num_query, num), dtype=dtype)
    for query in range(num_query):
        overlap = np.zeros(num, dtype=dtype)
        for image in np.nonzero(averaged[query])[0]:
            having = holders[image]
            overlap[having] += np.minimum(averaged[query, image], averaged[having, image])
        jaccard[query] = 1 - overlap / (2 - overlap)
    final = jaccard * (1 - lambda_value) + distances[:num_query] * lambda_value
    return final[:, num_query:]


def affinity_inference_loop(query_features, gallery_features, k1, k2):
    """Return the (Q, G) distances of affinity inference (Fang et al., ICCV 2023)."""

    def affinities(feature):
        similarities = gallery_features @ feature
        nearest = sorted(range(len(similarities)), key=lambda image: -similarities[image])
        kept = [similarities[image] if image in nearest[:k1] else 0.0 for image in range(len(similarities))]
        return np.array(kept), nearest

    expanded = []
    for feature in gallery_features:
        _, nearest = affinities(feature)
        expanded.append(np.mean([affinities(gallery_features[image])[0] for image in nearest[:k2]], axis=0))
    distmat = np.zeros((len(query_features), len(gallery_features)))
    for query, feature in enumerate(query_features):
        own, _ = affinities(feature)
        for image, other in enumerate(expanded):
            cosine = own @ other / (np.linalg.norm(own) * np.linalg.norm(other))
            distmat[query, image] = -cosine - feature @ gallery_features[image]
    return distmat


def graph_propagation_loop(query_features, gallery_features, k1, k2):
    """Return the (Q, G) distances of GNN re-ranking (Zhang et al., arXiv 2012.07620)."""
    features = np.concatenate([query_features, gallery_features])
    num, num_query = len(features), len(query_features)
    similarities = features @ features.T
    nearest = [sorted(range(num), key=lambda j: -similarities[image, j]) for image in range(num)]
    vectors = np.zeros((num, num))
    for image in range(num):
        vectors[image, nearest[image][:k1]] = 1
    for _ in range(2):
        symmetric = vectors + vectors.T
        for image in range(num):
            own = sum(similarities[image, other] ** 2 * symmetric[other] for other in nearest[image][:k2])
            vectors[image] = own / np.linalg.norm(own)
    return -vectors[:num_query] @ vectors[num_query:].T
