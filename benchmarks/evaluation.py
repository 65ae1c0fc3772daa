"""Evaluation by counting against a loop that sorts for each query."""

import functools

import numpy as np
import torch

import eval_metrics
from benchmarks.timing import compare, row, run_alone, run_on_gpu
from evaluation.intervals import evaluate_with_jackknife
from tests.oracles import evaluate_loop

DIM = 2048


def run(device: str = "cpu", quick: bool = False) -> list[dict]:
    """Return one row per task."""
    rows = [_sysu(device), _regdb(device), _ten_trials(device, num_trials=2 if quick else 10)]
    rows += [
        _intervals(device, "SYSU-MM01, 3,803 x 301", draw_sysu(np.random.default_rng(3), device), "sysu")
    ]
    rows += [_intervals(device, "RegDB, 2,060 x 2,060", draw_regdb(device), "regdb")]
    sizes = (10**4,) if quick else (10**4, 3 * 10**4, 10**5)
    return rows + [_scale(device, size) for size in sizes] + [_scale(device, sizes[-1], intervals=True)]


def _sysu(device: str) -> dict:
    rng = np.random.default_rng(0)
    trial = draw_sysu(rng, "cpu")
    distmat = (-trial.query_features @ trial.gallery_features.T).numpy()
    return _compared(
        "evaluation, SYSU-MM01, 3,803 x 301",
        lambda: evaluate_loop(distmat, *trial[2:], "sysu"),
        functools.partial(eval_metrics.eval_sysu, torch.from_numpy(distmat).to(device), *trial[2:]),
        repeats=3,
    )


def _regdb(device: str) -> dict:
    distmat = np.random.default_rng(1).random((2060, 2060), dtype=np.float32)
    pids = np.repeat(np.arange(206), 10)
    return _compared(
        "evaluation, RegDB, 2,060 x 2,060",
        lambda: evaluate_loop(distmat, pids, pids, pids, pids, "regdb"),
        functools.partial(eval_metrics.eval_regdb, torch.from_numpy(distmat).to(device), pids, pids),
        repeats=3,
    )


def _ten_trials(device: str, num_trials: int) -> dict:
    rng = np.random.default_rng(2)
    first = draw_sysu(rng, device)
    galleries = [unit_features(301, device, seed) for seed in range(num_trials)]
    trials = [first._replace(gallery_features=gallery) for gallery in galleries]

    def baseline():
        results = []
        for trial in trials:
            distmat = 1 - trial.query_features.cpu().numpy() @ trial.gallery_features.cpu().numpy().T
            results.append(evaluate_loop(distmat, *trial[2:], "sysu"))
        return [np.mean(values, axis=0) for values in zip(*results, strict=True)]

    def ours():
        results = [eval_metrics.evaluate_queries(trial, "sysu").metrics() for trial in trials]
        return eval_metrics.summarize(results)[0]

    work = f"evaluation, {num_trials} trials of SYSU-MM01 from features, D = {DIM:,}"
    return _compared(work, baseline, ours, repeats=1, bound="< 1 s", tolerance=1e-4)


def _compared(work, baseline, ours, repeats, bound=">= 60 x", tolerance=1e-9) -> dict:
    """Measure a row, after checking that both give the same (cmc, mAP, mINP)."""
    for expected, result in zip(baseline(), ours(), strict=True):
        np.testing.assert_allclose(result, expected, atol=tolerance)
    seconds = compare(baseline, ours, repeats)
    return row(work, seconds, bound, "a loop over queries, each ranking sorted")


def _intervals(device: str, size: str, trial: eval_metrics.Trial, protocol: str) -> dict:
    """A trial with the jackknife over persons against its evaluation alone."""
    alone = functools.partial(eval_metrics.evaluate_queries, trial, protocol)
    both = functools.partial(evaluate_with_jackknife, trial, protocol)
    for expected, result in zip(alone(), both()[0], strict=True):
        np.testing.assert_array_equal(result, expected)
    seconds = compare(alone, both, repeats=5)
    work = f"evaluation with intervals, {size}, D = {DIM:,}"
    note, met = f"{seconds[1] / seconds[0]:.2f} of the evaluation alone", seconds[1] <= 2 * seconds[0]
    return row(work, seconds, "<= 2 of the evaluation", note, met)


def _scale(device: str, num_gallery: int, intervals: bool = False) -> dict:
    measure = run_on_gpu if device == "cuda" else run_alone
    seconds, extra = measure(prepare_scale, device, num_gallery, intervals)
    title, limit = ("evaluation with intervals", 2) if intervals else ("evaluation", 1)
    work = f"{title} from features, 10,000 x {num_gallery:,}, D = {DIM:,}"
    bound, note = f"<= {limit} GB beyond the features", f"{extra / 1e6:,.0f} MB beyond the features"
    return row(work, (None, seconds), bound, note, met=extra <= limit * 1e9)


def prepare_scale(device: str, num_gallery: int, intervals: bool):
    """Return the call that evaluates 10,000 queries of LLCM's kind: 9 images an identity in the gallery."""
    num_pids = num_gallery // 9
    q_pids, g_pids = np.arange(10**4) % num_pids, np.arange(num_gallery) % num_pids
    q_camids, g_camids = np.arange(10**4) % 9, np.arange(num_gallery) // num_pids
    features = unit_features(10**4, device, 0), unit_features(num_gallery, device, 1)
    unit_features(64, device, 2) @ unit_features(64, device, 3).T  # starts threads and loads libraries
    trial = eval_metrics.Trial(*features, q_pids, g_pids, q_camids, g_camids)
    if intervals:
        return functools.partial(evaluate_with_jackknife, trial, "llcm")
    return functools.partial(eval_metrics.eval_features, *trial, protocol="llcm")


def draw_sysu(rng: np.random.Generator, device: str) -> eval_metrics.Trial:
    """Random features in the sizes of SYSU-MM01's single-shot all-search: 96 ids, 3,803 x 301 images."""
    cells = [(pid, camid) for pid in range(96) for camid in (1, 2, 4, 5)]
    kept = np.sort(rng.permutation(len(cells))[:301])
    g_pids, g_camids = np.array(cells)[kept].T
    q_pids, q_camids = rng.integers(0, 96, 3803), rng.choice([3, 6], 3803)
    features = unit_features(3803, device, 0), unit_features(301, device, 1)
    return eval_metrics.Trial(*features, q_pids, g_pids, q_camids, g_camids)


def draw_regdb(device: str) -> eval_metrics.Trial:
    """Random features in the sizes of RegDB's split: 206 ids, ten images each of both kinds."""
    pids = np.repeat(np.arange(206), 10)
    features = unit_features(2060, device, 0), unit_features(2060, device, 1)
    return eval_metrics.Trial(*features, pids, pids, None, None)


def unit_features(num: int, device: str, seed: int) -> torch.Tensor:
    """(num, DIM) float32 unit rows, made in place, so that no other memory is used."""
    generator = torch.Generator(device).manual_seed(seed)
    features = torch.randn(num, DIM, generator=generator, device=device)
    return features.div_(torch.linalg.vector_norm(features, dim=1, keepdim=True))
