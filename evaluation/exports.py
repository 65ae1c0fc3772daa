"""Results for other programs: JSON, a NumPy archive, and what SYSU-MM01's MATLAB evaluation reads.

features: {modality: (N, D) tensor}; rows: {modality: {image path: its row of the features}}; samples: who is
in the images, as data_manager.Samples has it: paths, pids, camids and modality.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import scipy.io

from eval_metrics import Metrics, summarize
from evaluation.protocols import Evaluation
from evaluation.tables import counts_of, warnings
from utils import versions, whole_file


def save_features(
    path: str | os.PathLike, features: Mapping, rows: Mapping[str, Mapping[str, int]], samples: Iterable
) -> None:
    """Write <modality>_features (N, D), _paths, _pids and _camids (N,) to one .npz."""
    pids = {modality: np.zeros(len(own), np.int64) for modality, own in rows.items()}
    camids = {modality: np.zeros(len(own), np.int64) for modality, own in rows.items()}
    for part in samples:
        places = [rows[part.modality][image] for image in part.paths]
        pids[part.modality][places], camids[part.modality][places] = part.pids, part.camids
    arrays = {}
    for modality, own in rows.items():
        arrays |= {
            f"{modality}_features": features[modality].cpu().numpy(),
            f"{modality}_paths": np.array(list(own)),
            f"{modality}_pids": pids[modality],
            f"{modality}_camids": camids[modality],
        }
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def mat_file(folder: str | os.PathLike, camid: int) -> Path:
    """Where save_mat writes the features of a camera."""
    return Path(folder, f"feature_cam{camid}.mat")


def save_mat(
    folder: str | os.PathLike,
    features: Mapping,
    rows: Mapping[str, Mapping[str, int]],
    samples: Iterable,
) -> None:
    """Write the cell `feature` (1, largest pid) of each camera: row i of feature{pid} is its i-th image's.

    samples: every image of the test ids, those of a pid and camera in file-name order. A pid without images
    in the camera has a (0, D) matrix. Source: the evaluation that the authors of SYSU-MM01 publish.
    """
    for part in samples:
        numbers = features[part.modality].cpu().numpy().astype(np.float64)
        places = np.array([rows[part.modality][image] for image in part.paths])
        for camid in np.unique(part.camids).tolist():
            cells = np.empty((1, int(part.pids.max())), object)
            for k in range(cells.size):
                cells[0, k] = numbers[places[(part.camids == camid) & (part.pids == k + 1)]]
            with whole_file(mat_file(folder, camid)) as temporary, open(temporary, "wb") as file:
                scipy.io.savemat(file, {"feature": cells})


def save_json(
    path: str | os.PathLike,
    settings: Mapping,
    device: object,
    checkpoints: Sequence[Mapping],
    evaluation: Evaluation,
    results: Mapping,
) -> None:
    """Write settings, versions, warnings and, for each row of the table, counts and metrics in [0, 1].

    checkpoints: see tables.heading; results: see tables.Results. Counts and metrics are of every trial.
    """
    trials = [trial for checkpoint in checkpoints for trial in checkpoint["trials"]]
    rows, counts = [], counts_of(evaluation)
    for (protocol, flip, rerank), metrics in results.items():
        mean, deviation = summarize(metrics)
        rows.append(
            asdict(protocol)
            | {"flip": flip, "rerank": rerank}
            | {"counts": {trial: asdict(counts[protocol, trial]) for trial in trials}}
            | {"trials": dict(zip(trials, map(_numbers, metrics), strict=True))}
            | {"mean": _numbers(mean), "std": _numbers(deviation)}
        )
    report = {"checkpoints": checkpoints, "settings": settings, "versions": versions()}
    report |= {"device": str(device), "warnings": warnings(counts), "results": rows}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1, default=_plain), encoding="utf-8")


def _numbers(metrics: Metrics) -> dict[str, object]:
    return {"cmc": metrics.cmc.tolist(), "mAP": metrics.mAP, "mINP": metrics.mINP}


def _plain(value: object) -> object:
    """A NumPy value of the released code's checkpoints as JSON has it; what JSON cannot hold as text."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)
