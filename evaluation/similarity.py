"""How alike images of one identity and of two are, within and across modalities: the modality gap."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch

PAIRS = {  # name -> the modalities of a pair's two images
    "visible-visible": ("visible", "visible"),
    "infrared-infrared": ("infrared", "infrared"),
    "visible-infrared": ("visible", "infrared"),
}
BINS = 80  # of a histogram, from the smallest to the largest similarity
BLOCK = 4096  # pairs multiplied at a time


class Similarities(NamedTuple):
    """Cosine similarities, float32, of sampled pairs of images: of one identity, and of two."""

    within: np.ndarray
    between: np.ndarray


def sample_similarities(
    features: Mapping[str, torch.Tensor], pids: Mapping[str, np.ndarray], pairs: int = 20000, seed: int = 0
) -> dict[str, Similarities]:
    """Sample pairs of images and compare them: {name in PAIRS: Similarities}, at most `pairs` of each kind.

    The first image of a pair is drawn uniformly, the second uniformly among those of its identity (itself
    excepted) or among those of the others. Kinds of pair that there is none of are left out of the dict.

    Args:
        features: {"visible": (N, D), "infrared": (M, D)}, unit norm, on any device.
        pids: {modality: (N,) integers}.
    """
    rng = np.random.default_rng(seed)
    result = {}
    for name, (one, other) in PAIRS.items():
        drawn = [_draw(rng, pids[one], pids[other], pairs, one == other, same) for same in (True, False)]
        if all(len(first) for first, _ in drawn):
            result[name] = Similarities(*(_compare(features[one], features[other], *each) for each in drawn))
    return result


def _draw(rng, pids, others, pairs, same_set, same_pid) -> tuple[np.ndarray, np.ndarray]:
    """Indices (n,) of the first and the second images of at most `pairs` pairs."""
    first = rng.integers(len(pids), size=pairs if len(pids) and len(others) else 0)
    if not same_pid:
        second = rng.integers(max(1, len(others)), size=len(first))
        kept = pids[first] != others[second]
        return first[kept], second[kept]
    order = np.argsort(others, kind="stable")
    start = np.searchsorted(others[order], pids[first])
    count = np.searchsorted(others[order], pids[first], side="right") - start
    choices = count - same_set  # in one set, an image is no partner of itself
    first, start, count, choices = (values[choices > 0] for values in (first, start, count, choices))
    step = rng.integers(choices) if len(choices) else choices
    if same_set:
        own = np.argsort(order)[first] - start
        step = (own + 1 + step) % count
    return first, order[start + step]


def _compare(ones: torch.Tensor, others: torch.Tensor, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine similarities (n,) float32 of the rows first of ones with the rows second of others."""
    parts = []
    for start in range(0, len(first), BLOCK):
        rows, columns = (
            torch.from_numpy(values[start : start + BLOCK]).to(ones.device) for values in (first, second)
        )
        parts.append((ones[rows].float() * others[columns].float()).sum(1))
    return torch.cat(parts).cpu().numpy()


def bins(pairs: Iterable[Similarities]) -> np.ndarray:
    """(BINS + 1,) edges that hold all of pairs: an untrained network's similarities differ by thousandths."""
    parts = [values for pair in pairs for values in pair]
    low, high = min(float(part.min()) for part in parts), max(float(part.max()) for part in parts)
    margin = max(1e-6, (high - low) * 1e-6)  # the largest has a bin too, as floats round
    return np.linspace(low - margin, high + margin, BINS + 1)


def shares(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The share of values in each bin."""
    return np.histogram(values, edges)[0] / len(values)


def overlap(pair: Similarities) -> float:
    """The area that the two histograms over bins share, in [0, 1]: 0 is apart, 1 alike."""
    within, between = (shares(values, bins([pair])) for values in pair)
    return float(np.minimum(within, between).sum())


def equal_error_rate(pair: Similarities) -> float:
    """The share of errors, in [0, 1], at the threshold where as large a share of pairs of one identity lies
    below it as of two lies at or above it."""
    thresholds = np.unique(np.concatenate(pair))
    missed, taken = (np.searchsorted(np.sort(values), thresholds) / len(values) for values in pair)
    taken = 1 - taken
    best = np.abs(missed - taken).argmin()
    return float((missed[best] + taken[best]) / 2)
