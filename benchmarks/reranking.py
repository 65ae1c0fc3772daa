"""Re-ranking with sparse products against loops over dense matrices. Run: python -m benchmarks.reranking"""

import functools
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.timing import compare, row, run_alone, run_on_gpu
from reranking import RERANKING, k_reciprocal
from tests.oracles import k_reciprocal_loop

DIM = 2048
SYSU, REGDB = (3803, 301), (2060, 2060)  # query and gallery images
SIZES = (SYSU, (5955, 5954), (11129, 11129))  # 4,104 images, and as many as SYSU-MM01 trains on


def run(device: str = "cpu", quick: bool = False, sizes: Sequence[tuple[int, int]] = SIZES) -> list[dict]:
    """Return one row per task.

    sizes: (queries, gallery images) at which time and memory of every method are measured.
    """
    compared, sizes = ([(400, 100)], [(150, 50)]) if quick else ([SYSU, REGDB], sizes)
    rows = [] if device == "cuda" else [_compare(*size) for size in compared]  # the loops run on the CPU
    return rows + [_measure(name, *size, device) for size in sizes for name in RERANKING]


def _compare(num_query: int, num_gallery: int) -> dict:
    features = draw(num_query, num_gallery)
    results = {}

    def baseline():
        results["baseline"] = k_reciprocal_loop(*features)

    def ours():
        results["ours"] = k_reciprocal(*features)

    seconds = compare(baseline, ours, repeats=1)
    difference = np.abs(results["baseline"] - results["ours"])
    assert difference.max() < 5e-3, "re-ranking disagrees with the loop, which rounds to half precision"
    memory = [run_alone(prepare, loop, num_query, num_gallery)[1] / 1e6 for loop in (None, "k-reciprocal")]
    work = f"k-reciprocal re-ranking, {num_query:,} + {num_gallery:,}, D = {DIM:,}"
    note = f"{memory[1]:,.0f} MB beyond the features, the loops {memory[0]:,.0f} MB"
    met = seconds[0] >= 20 * seconds[1] and memory[1] < memory[0] / 2
    return row(work, seconds, ">= 20 x, half the memory", note, met)


def _measure(name: str, num_query: int, num_gallery: int, device: str) -> dict:
    measure = run_on_gpu if device == "cuda" else run_alone
    seconds, memory = measure(prepare, name, num_query, num_gallery, device)
    work = f"{name} re-ranking of {num_query + num_gallery:,} images ({num_query:,} + {num_gallery:,})"
    bound, met = ("<= 1.5 GB", memory <= 1.5e9) if name == "k-reciprocal" else (None, None)
    return row(work, (None, seconds), bound, f"{memory / 1e6:,.0f} MB beyond the features", met)


def prepare(name: str | None, num_query: int, num_gallery: int, device: str = "cpu"):
    """Return the call to measure.

    Args:
        name: of the method; None: the loops.
        num_query, num_gallery: numbers of images.
        device: where the features are.
    """
    features = draw(num_query, num_gallery)
    if name is None:
        return functools.partial(k_reciprocal_loop, *features)
    return functools.partial(RERANKING[name], *(torch.from_numpy(array).to(device) for array in features))


def draw(num_query: int, num_gallery: int) -> tuple[np.ndarray, np.ndarray]:
    """Float32 unit features of 100 identities, spread so that neighbourhoods mix identities."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((100, DIM), dtype=np.float32)
    pids = np.r_[np.arange(num_query) % 100, np.arange(num_gallery) % 100]
    features = centers[pids] + 2 * rng.standard_normal((len(pids), DIM), dtype=np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features[:num_query], features[num_query:]


if __name__ == "__main__":
    for line in run():
        print(line)
