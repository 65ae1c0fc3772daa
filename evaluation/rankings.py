"""Each query's own ranking and average precision: what the mean hides."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RULES = {  # why a protocol ignores a gallery image, in short and in full (docs/method.md, section 8)
    "sysu": (
        "same room",
        "the same room: cameras 2 and 3 stand in one, so camera 3 does not search camera 2",
    ),
    "llcm": ("same camera", "the same camera: an image of the query's own id in its own camera is no match"),
    "regdb": ("", ""),
}
BLOCK = 2**22  # distances sorted at a time: 32 MB for each temporary
SHOWN = 10  # images ranked first, and at most so many ignored ones among them


class Ranked(NamedTuple):
    """The rankings of Q queries; a query without a match has NaN and 0."""

    ap: np.ndarray  # (Q,) float64 average precision
    first: np.ndarray  # (Q,) int64 the first match's place, from 1, counted as CMC counts
    places: list[np.ndarray]  # Q, each (n,) int64 gallery images, nearest first, ignored ones among them
    ignored: list[np.ndarray]  # Q, each (n,) bool


def ignored_pairs(
    protocol: str, q_pids: np.ndarray, g_pids: np.ndarray, q_camids: np.ndarray, g_camids: np.ndarray
) -> np.ndarray:
    """Which pairs (Q, G) the protocol ignores: docs/method.md, section 8; RULES has the words for it."""
    if protocol == "sysu":
        return (q_camids == 3)[:, None] & (g_camids == 2)[None]
    if protocol == "llcm":
        return (q_pids[:, None] == g_pids) & (q_camids[:, None] == g_camids)
    return np.zeros((len(q_pids), len(g_pids)), dtype=bool)


def rank_queries(
    distmat: np.ndarray,
    q_pids: np.ndarray,
    g_pids: np.ndarray,
    q_camids: np.ndarray,
    g_camids: np.ndarray,
    protocol: str,
) -> Ranked:
    """Rank the gallery for each query, by distmat (Q, G); ties rank in gallery order.

    The means over the queries with a match are eval_metrics' mAP and, of first <= k, its CMC.
    """
    ap, first = np.full(len(distmat), np.nan), np.zeros(len(distmat), dtype=np.int64)
    places, ignored = [], []
    lines = max(1, BLOCK // max(1, distmat.shape[1]))  # queries
    for start in range(0, len(distmat), lines):
        rows = slice(start, start + lines)
        order = np.argsort(distmat[rows], axis=1, kind="stable")
        mask = ignored_pairs(protocol, q_pids[rows], g_pids, q_camids[rows], g_camids)
        mask = np.take_along_axis(mask, order, axis=1)
        right = (g_pids[order] == q_pids[rows, None]) & ~mask
        position = np.cumsum(~mask, axis=1)
        total = right.sum(axis=1)
        precision = np.where(right, np.cumsum(right, axis=1) / np.maximum(position, 1), 0).sum(axis=1)
        matched = total > 0
        ap[rows][matched] = precision[matched] / total[matched]
        for k in range(len(order)):
            if matched[k]:
                before = slice(0, int(right[k].argmax()))
                passed = g_pids[order[k, before]][~mask[k, before]]
                first[start + k] = 1 + (len(passed) if protocol == "regdb" else len(set(passed.tolist())))
            shown = position[k] <= SHOWN
            shown &= ~mask[k] | ((np.cumsum(mask[k]) <= SHOWN) & (position[k] < SHOWN))
            places.append(order[k, shown])
            ignored.append(mask[k, shown])
    return Ranked(ap, first, places, ignored)


def camera_pairs(
    distmat: np.ndarray,
    q_pids: np.ndarray,
    g_pids: np.ndarray,
    q_camids: np.ndarray,
    g_camids: np.ndarray,
    protocol: str,
) -> dict[tuple[int, int], tuple[float, float]]:
    """{(query camera, gallery camera): (rank-1, mAP)} of the one camera's queries in the other's gallery.

    NaN where no query has a match, as in a pair of cameras that the protocol ignores.
    """
    result = {}
    for q_camid in np.unique(q_camids).tolist():
        for g_camid in np.unique(g_camids).tolist():
            rows, columns = q_camids == q_camid, g_camids == g_camid
            part = rank_queries(
                distmat[np.ix_(rows, columns)],
                q_pids[rows],
                g_pids[columns],
                q_camids[rows],
                g_camids[columns],
                protocol,
            )
            matched = part.first > 0
            result[q_camid, g_camid] = (np.nan, np.nan)
            if matched.any():
                rank1 = (part.first[matched] == 1).mean()
                result[q_camid, g_camid] = float(rank1), float(part.ap[matched].mean())
    return result


def choose_queries(
    wanted: Sequence[str], ranked: Ranked, q_pids: np.ndarray, count: int = 8, seed: int = 0
) -> np.ndarray:
    """Indices of at most count queries that have a match: worst, best or random ones, or those of pids.

    wanted: one of these words, or pids as text; the queries of several pids are taken in turns. Raises
    ValueError naming what is neither, or a pid without such queries.
    """
    matched = np.flatnonzero(ranked.first > 0)
    by_ap = matched[np.argsort(ranked.ap[matched], kind="stable")]
    words = {
        "worst": by_ap,
        "best": by_ap[::-1],
        "random": np.random.default_rng(seed).permutation(matched),
    }
    if len(wanted) == 1 and wanted[0] in words:
        return words[wanted[0]][:count]
    groups = []
    for word in wanted:
        if not word.isdecimal():
            raise ValueError(f"{word} is neither worst, best or random nor a pid")
        groups.append(matched[q_pids[matched] == int(word)])
        if not len(groups[-1]):
            raise ValueError(f"no query of pid {word} has a match in the gallery")
    turns = [group[k] for k in range(count) for group in groups if k < len(group)]
    return np.array(turns[:count], dtype=np.int64)
