"""Rank-1 and mAP by pair of query and gallery camera, and on how many images they stand."""

from typing import NamedTuple

import numpy as np

from eval_metrics import Trial, evaluate_queries, matched
from evaluation.methods import Method
from evaluation.protocols import Protocol


class CameraScore(NamedTuple):
    """The one camera's queries in the other camera's part of the gallery, alone."""

    rank_1: float  # in [0, 1]; NaN where no query has a match, as in a pair that the protocol ignores
    mAP: float
    queries: float  # with a match
    gallery: float  # images


CameraScores = dict[tuple[int, int], CameraScore]  # by (query camera, gallery camera)


def camera_pairs(trial: Trial, protocol: str, distance: str = "cosine") -> CameraScores:
    """Evaluate every pair of cameras of a trial; arguments as in eval_metrics.evaluate_queries."""
    result = {}
    for q_camid in np.unique(trial.q_camids).tolist():
        for g_camid in np.unique(trial.g_camids).tolist():
            rows, columns = trial.q_camids == q_camid, trial.g_camids == g_camid
            part = Trial(*(values[kept] for values, kept in zip(trial, (rows, columns) * 3, strict=True)))
            scores = np.nan, np.nan, 0
            if matched(protocol, *part[2:]).any():
                values = evaluate_queries(part, protocol, distance=distance)
                metrics = values.metrics(1)
                scores = float(metrics.cmc[0]), metrics.mAP, int(values.counted.sum())
            result[q_camid, g_camid] = CameraScore(*scores, int(columns.sum()))
    return result


def cameras_of(method: Method, protocol: Protocol) -> CameraScores:
    """The mean over the trials that the method's features serve: all, or one where each has its own model.

    Trials in which a pair has no match, or no image, count for that pair as nothing.
    """
    features, samples = method.features, method.evaluation.samples
    shared = len(method.sources[0]) == 1
    found: dict[tuple[int, int], list[CameraScore]] = {}
    for (own, number), pair in samples.items():
        if own == protocol and (shared or number == method.trial):
            scores = camera_pairs(features.trial(*pair), protocol.rule, features.distance)
            for cameras, score in scores.items():
                found.setdefault(cameras, []).append(score)
    mean = {}
    for cameras, scores in sorted(found.items()):
        kept = [score for score in scores if score.queries] or scores
        mean[cameras] = CameraScore(*np.mean(kept, axis=0).tolist())
    return mean
