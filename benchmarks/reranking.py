"""Re-ranking with sparse products against loops over dense matrices. Run: python -m benchmarks.reranking"""

import functools
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.timing import compare, row, run_alone, run_on_gpu
from reranking import ONE_AT_A_TIME, RERANKING, k_reciprocal
from tests.oracles import k_reciprocal_loop

DIM = 2048
SYSU, REGDB = (3803, 301), (2060, 2060)  # query and gallery images
GALLERIES = (301, 2060, 3010)  # of SYSU-MM01, single-shot and multi-shot, and RegDB
SIZES = (SYSU, (5955, 5954), (11129, 11129))  # 4,104 images, and as many as SYSU-MM01 trains on


def run(device: str = "cpu", quick: bool = False, sizes: Sequence[tuple[int, int]] = SIZES) -> list[dict]:
    """Return one row per task.

    sizes: (queries, gallery images) at which time and memory of every method are measured.
    """
    compared, sizes = ([(400, 100)], [(150, 50)]) if quick else ([SYSU, REGDB], sizes)
    rows = [] if device == "cuda" else [_compare(*size) for size in compared]  # the loops run on the CPU
    galleries = () if device == "cuda" else (50,) if quick else GALLERIES
    rows += [_alone(name, num_gallery) for num_gallery in galleries for name in ONE_AT_A_TIME]
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


def _alone(name: str, num_gallery: int) -> dict:
    """A query's share of many that are re-ranked one at a time, against a call of its own."""
    query, gallery = draw(41, num_gallery)

    def several(first: int, last: int) -> np.ndarray:
        return ONE_AT_A_TIME[name](query[first:last], gallery)

    whole_s, set_up_s = compare(functools.partial(several, 0, 41), functools.partial(several, 40, 41), 3)
    call_s, _ = compare(lambda: RERANKING[name](query[:1], gallery), lambda: None, 3)
    work = f"{name} re-ranking, one query at a time, a query among {num_gallery:,} images"
    note = f"a call of its own; {set_up_s:.2f} s for the gallery, once"
    return row(work, (call_s, (whole_s - set_up_s) / 40), None, note)


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
