"""Each query's own ranking: what the mean hides. The values of a query are those of its Score."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from devices import Array, as_ids, as_tensor
from eval_metrics import QueryValues, Trial, distance_blocks, ignored_pairs

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
    """The rankings of Q queries."""

    places: list[np.ndarray]  # Q, each (n,) int64 gallery images, nearest first, ignored ones among them
    ignored: list[np.ndarray]  # Q, each (n,) bool
    distances: list[np.ndarray]  # Q, each (n,): 1 - cosine, Euclidean, or re-ranked


def rank_queries(
    trial: Trial,
    protocol: str,
    rerank: Callable[[Array, Array], Array] | None = None,
    distance: str = "cosine",
) -> Ranked:
    """Rank the gallery for each query; ties rank in gallery order. Arguments: see evaluate_queries.

    Listed are the SHOWN images that count and are ranked first, and at most SHOWN ignored ones among them.
    """
    if rerank is None:
        blocks = distance_blocks(trial, distance)
    else:
        distmat = as_tensor(rerank(trial.query_features, trial.gallery_features))
        rerank = lambda *features: distmat  # noqa: E731  computed once
        rows = torch.arange(len(distmat)).split(max(1, BLOCK // max(1, distmat.shape[1])))
        blocks = ((part, distmat[part.to(distmat.device)]) for part in rows)
    ids = [as_ids(values, "ids").numpy(force=True) if values is not None else None for values in trial[2:]]
    q_pids, g_pids, q_camids, g_camids = ids
    places, ignored, distances = [], [], []
    for rows, block in blocks:
        rows, block = rows.numpy(force=True), block.float()
        of_rows = None if q_camids is None else q_camids[rows]
        mask = ignored_pairs(protocol, q_pids[rows], g_pids, of_rows, g_camids)
        masked = torch.from_numpy(mask).to(block.device)
        counting = _nearest(block.masked_fill(masked, torch.inf), SHOWN)
        ignoring = _nearest(block.masked_fill(~masked, torch.inf), SHOWN)
        block = block.numpy(force=True)
        for k in range(len(rows)):
            kept = counting[k][~mask[k, counting[k]]]
            left_out = ignoring[k][mask[k, ignoring[k]]]
            found = np.sort(np.concatenate([kept, left_out]))
            found = found[np.argsort(block[k, found], kind="stable")]
            if len(kept) == SHOWN:
                found = found[: int(np.flatnonzero(found == kept[-1])[0]) + 1]
            places.append(found)
            ignored.append(mask[k, found])
            distances.append(block[k, found] if rerank else _shown_distances(trial, distance, rows[k], found))
    return Ranked(places, ignored, distances)


def _nearest(block: torch.Tensor, count: int) -> np.ndarray:
    """(q, n) the columns of the smallest values of block (q, G), n at most count; ties in column order."""
    count = min(count, block.shape[1])
    values, columns = block.topk(min(count + 1, block.shape[1]), dim=1, largest=False)
    columns = columns[:, :count].sort(dim=1).values
    columns = columns.gather(1, block.gather(1, columns).argsort(dim=1, stable=True))
    tied = (values[:, -1] == values[:, count - 1]) & (values.shape[1] > count)
    if tied.any():
        columns[tied] = block[tied].argsort(dim=1, stable=True)[:, :count]
    return columns.numpy(force=True)


def _shown_distances(trial: Trial, distance: str, row: int, places: np.ndarray) -> np.ndarray:
    """(n,) distances of a query to gallery images."""
    query = as_tensor(trial.query_features)[int(row)].float()
    gallery = as_tensor(trial.gallery_features)
    gallery = gallery[torch.from_numpy(places).to(gallery.device)].float()
    found = 1 - gallery @ query if distance == "cosine" else (gallery - query).norm(dim=1)
    return found.numpy(force=True)


def choose_queries(
    wanted: Sequence[str], values: QueryValues, q_pids: np.ndarray, count: int = 8, seed: int = 0
) -> np.ndarray:
    """Indices of at most count queries that have a match: worst, best or random ones, or those of pids.

    wanted: one of these words, or pids as text; the queries of several pids are taken in turns. Raises
    ValueError naming what is neither, or a pid without such queries.
    """
    matched = np.flatnonzero(values.counted)
    by_ap = matched[np.argsort(values.ap[matched], kind="stable")]
    random = np.random.default_rng(seed).permutation(matched)
    words = {"worst": by_ap, "best": by_ap[::-1], "random": random}
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
