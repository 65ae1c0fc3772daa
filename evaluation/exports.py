"""Results for other programs: JSON, a NumPy archive, and what SYSU-MM01's MATLAB evaluation reads."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import scipy  # its parts are imported when they are first used: scipy.io takes 0.2 s

from data_manager import Samples
from eval_metrics import Metrics
from evaluation.cameras import CameraScores
from evaluation.files import mat_file
from evaluation.intervals import MEASURES, Jackknife
from evaluation.methods import Method, difference
from evaluation.scoring import Features
from evaluation.tables import counts_of, every_warning, rows_of
from utils import versions, whole_file


def save_features(path: str | os.PathLike, features: Features, images: Mapping[str, Samples]) -> None:
    """Write <modality>_features (N, D), _paths, _pids and _camids (N,) to one .npz.

    images: {modality: Samples}, see protocols.Evaluation.images.
    """
    arrays = {}
    for modality, samples in images.items():
        arrays |= {
            f"{modality}_features": features.of(samples).cpu().numpy(),
            f"{modality}_paths": np.array(samples.paths),
            f"{modality}_pids": samples.pids,
            f"{modality}_camids": samples.camids,
        }
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def save_mat(folder: str | os.PathLike, features: Features, samples: Iterable[Samples]) -> None:
    """Write the cell `feature` (1, largest pid) of each camera: row i of feature{pid} is its i-th image's.

    samples: every image of the test ids, those of a pid and camera in file-name order. A pid without images
    in the camera has a (0, D) matrix. Source: the evaluation that the authors of SYSU-MM01 publish.
    """
    for part in samples:
        numbers = features.of(part).cpu().numpy().astype(np.float64)
        for camid in np.unique(part.camids).tolist():
            cells = np.empty((1, int(part.pids.max())), object)
            for k in range(cells.size):
                cells[0, k] = numbers[(part.camids == camid) & (part.pids == k + 1)]
            with whole_file(mat_file(folder, camid)) as temporary, open(temporary, "wb") as file:
                scipy.io.savemat(file, {"feature": cells})


def save_json(
    path: str | os.PathLike,
    device: object,
    methods: Sequence[Method],
    cameras: Mapping[str, CameraScores] | None = None,
) -> None:
    """Write settings, versions, warnings and, for each row of the table, counts and metrics in [0, 1].

    intervals and difference (to the first method; null if not paired) are those of evaluation.intervals.
    cameras: tables.camera_scores; a row without them has null there, as a pair without a match has for its
    metrics. With several seeds the metrics of trials are of the mean over seeds.
    """
    rows = []
    for title, row, method in rows_of(methods):
        found, scores = counts_of(method.evaluation), method.results[row]
        protocol, flip, rerank = row
        paired = None if method is methods[0] else difference(row, method, methods[0])
        trials = dict(zip(method.trials, map(_numbers, scores.by_trial), strict=True))
        rows.append(
            asdict(protocol)
            | {"method": method.name, "flip": flip, "rerank": rerank}
            | {"counts": {trial: asdict(found[protocol, trial]) for trial in method.trials}}
            | {"trials": trials}
            | {"mean": _numbers(scores.mean)}
            | {"std": _numbers(scores.over_trials) if len(scores.seeds[0]) > 1 else None}
            | {"std_over_seeds": _numbers(scores.over_seeds) if len(scores.seeds) > 1 else None}
            | {"intervals": _intervals(scores.jackknife, test=False), "difference": _intervals(paired)}
            | {"cameras": _cameras((cameras or {}).get(title))}
        )
    report = {"checkpoints": [fact for method in methods for fact in method.facts]}
    report |= {"settings": vars(methods[0].args), "versions": versions()}
    warnings = every_warning(counts_of(method.evaluation) for method in methods)
    report |= {"device": str(device), "warnings": warnings, "results": rows}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1, default=_plain), encoding="utf-8")


def _intervals(jackknife: Jackknife | None, test: bool = True) -> dict[str, dict] | None:
    """95 % intervals of mAP and rank-1; half and p are null with too few persons. test: there is a p."""
    if jackknife is None:
        return None
    found = {measure: _nulled(jackknife.interval(measure)) for measure in MEASURES}
    return found if test else {measure: values | {"p": None} for measure, values in found.items()}


def _cameras(pairs: CameraScores | None) -> list[dict] | None:
    if pairs is None:
        return None
    return [
        {"query_camera": query, "gallery_camera": gallery} | _nulled(score)
        for (query, gallery), score in pairs.items()
    ]


def _nulled(values: NamedTuple) -> dict[str, float | None]:
    """A named tuple as JSON has it, where NaN is null."""
    return {key: None if np.isnan(value) else value for key, value in values._asdict().items()}


def _numbers(metrics: Metrics) -> dict[str, object]:
    return {"cmc": metrics.cmc.tolist(), "mAP": metrics.mAP, "mINP": metrics.mINP}


def _plain(value: object) -> object:
    """A NumPy value of the released code's checkpoints as JSON has it; what JSON cannot hold as text."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)
