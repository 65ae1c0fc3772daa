"""Features of any network, as an evaluation uses them: a file is checked and told of, never guessed at."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import data_manager
from data_manager import CAPTURED, DATASETS, Samples
from evaluation.checks import check, own_shot, refuse_equal, refuse_wrong_cameras
from evaluation.files import read_arrays
from evaluation.flags import chosen_trials, protocols_of
from evaluation.protocols import OWN_GALLERY, Evaluation, Protocol, refuse_without_match
from evaluation.scoring import Features
from utils import UserError, log


@dataclass
class FeatureFile:
    """A file of features, checked; the trials that it is evaluated on."""

    path: str
    features: Features
    trials: list[int]
    told: str  # shape, type and what was done to them

    def facts(self) -> dict[str, object]:
        """Path, trials and what was found."""
        return {"path": self.path, "trials": self.trials, "features": self.told}


def read_features(
    args: argparse.Namespace, name: str, evaluation: Evaluation | None = None, more: bool = False
) -> tuple[list[FeatureFile], Evaluation]:
    """Read a file of features, or with {trial} in its name one for each trial.

    Args:
        args: see flags.settings_of.
        name: of the file or folder.
        evaluation: of another seed of the method, which must be the same; None: draw it.
        more: see methods.find_methods.

    Raises:
        UserError: a file that is missing, not readable as one of the formats above, or does not fit.
    """
    trials = chosen_trials(args)
    if "{trial}" in name:
        paths = {name.replace("{trial}", str(trial)): [trial] for trial in trials}
        paths = {path: own for path, own in paths.items() if Path(path).exists()}
        if not paths:
            raise UserError(f"--features {name}: no file of any trial")
    else:
        paths = {name: trials}
    contents = {path: read_arrays(args, path) for path in paths}
    if any("query" in content for content in contents.values()):
        pairs = {path: _pair(args, path, content) for path, content in contents.items()}
        protocol = next(iter(pairs.values()))[0]
        if "{trial}" not in name:
            paths = {name: trials[:1]}
        drawn = {(protocol, own[0]): pairs[path][1] for path, own in paths.items()}
        files = [FeatureFile(path, pairs[path][2], own, pairs[path][3]) for path, own in paths.items()]
        return files, Evaluation(drawn)
    root = data_manager.dataset_root(args.dataset, args.data_path)
    if evaluation is None:
        used = [trial for own in paths.values() for trial in own]
        every = every_image(args, more)
        evaluation = Evaluation.draw(root, protocols_of(args), used, args.allow_short, every, copies=False)
    files = []
    for path, own in paths.items():
        images = evaluation.images(own[0] if len(paths) > 1 else None)
        files.append(FeatureFile(path, *_match(args, path, contents[path], images, root, own)))
    return files, evaluation


def every_image(args: argparse.Namespace, wanted: bool) -> list[Samples]:
    """Where wanted, all test images of SYSU-MM01, as --save-mat writes them."""
    if not wanted or args.dataset != "sysu":
        return []
    root = data_manager.dataset_root("sysu", args.data_path)
    return list(data_manager.read_split("sysu", root, "test").values())


def _match(
    args: argparse.Namespace,
    name: str,
    content: dict,
    images: Mapping[str, Samples],
    root: Path,
    trials: Sequence[int],
) -> tuple[Features, list[int], str]:
    """Find the features of images by their paths below the dataset's folder."""
    if "images" not in content:
        raise UserError(f"{name}: holds one query and gallery, other files of --features are by path")
    paths, array, pids = content["images"]
    if len(paths) != len(array):
        raise UserError(f"{args.images or name}: {len(paths):,} paths for features {array.shape}")
    below = os.path.join(root, "")
    known = {
        path.removeprefix(below).replace(os.sep, "/"): (path, pid, modality)
        for modality, samples in images.items()
        for path, pid in zip(samples.paths, samples.pids.tolist(), strict=True)
    }
    depths = sorted({key.count("/") + 1 for key in known}, reverse=True)
    rows: dict[str, dict[str, int]] = {modality: {} for modality in CAPTURED}
    twice, others, wrong = [], [], []
    labelled = pids is not None and (args.dataset != "regdb" or len(trials) == 1)  # RegDB's differ by trial
    for row, written in enumerate(paths):
        parts = written.replace("\\", "/").split("/")
        keys = ("/".join(parts[-depth:]) for depth in depths)
        path, pid, modality = known.get(next((key for key in keys if key in known), ""), (None, None, None))
        if path is None:
            others.append(row)
        elif path in rows[modality]:
            twice.append(written)
        else:
            rows[modality][path] = row
            if labelled and pids[row] != pid:
                wrong.append(f"{written} (id {pids[row]}, in the dataset {pid})")
    found = sum(map(len, rows.values()))
    lacking = [key for key, (path, _, modality) in known.items() if path not in rows[modality]]
    title = DATASETS[args.dataset].title
    for what, some in (
        ("images are there twice", twice),
        (f"images of {title} are missing", lacking),
        ("images have another id than the dataset's", wrong),
    ):
        if some:
            raise UserError(f"{name}: {len(some):,} of {len(known):,} {what}, for instance {some[0]}")
    if others:
        foreign = set(pids[others].tolist()) - {pid for _, pid, _ in known.values()} if labelled else ()
        lacks = f", of {len(foreign):,} ids that it lacks (such as {min(foreign)})" if foreign else ""
        log.warning(
            "%s: %s of its %s images are not used by these protocols of %s%s, for instance %s",
            name, f"{len(others):,}", f"{len(paths):,}", title, lacks, paths[others[0]],
        )  # fmt: skip
    tensor, told = check(array, name, paths, args.distance)
    for modality, own in rows.items():
        refuse_equal(tensor, list(own.values()), f"{name}: {modality}")
    told = f"{found:,} features by path, {told}"
    return Features(rows, dict.fromkeys(CAPTURED, tensor), args.distance), list(trials), told


def _pair(
    args: argparse.Namespace, name: str, content: dict
) -> tuple[Protocol, tuple[Samples, Samples], Features, str]:
    """The protocol, query and gallery, and features of a file that holds one of each."""
    if "query" not in content:
        raise UserError(f"{name}: is by path, other files of --features hold one query and gallery")
    if len(args.mode) > 1 or len(args.shot) > 1:
        choice = "which --mode?" if len(args.shot) == 1 else "which --mode, and which --shot?"
        raise UserError(f"{name}: holds one query and gallery: {choice}")
    if args.dataset != "regdb" and args.trial != "all":
        raise UserError(f"--trial {args.trial}: {name} holds one query and gallery")
    if args.galleries != "seeded":
        raise UserError(f"--galleries {args.galleries}: {name} holds its own gallery")
    mode, facts = args.mode[0], DATASETS[args.dataset]
    if mode not in facts.modes:
        raise UserError(f"--mode {mode}: choose from {', '.join(facts.modes)}")
    protocol = Protocol(args.dataset, mode, args.shot[0], OWN_GALLERY, "test", args.ignore_same_camera)
    modalities = {"query": facts.query_modality[mode], "gallery": facts.gallery_modality(mode)}
    samples, tensors, told, rows = [], {}, [], {}
    for side, modality in modalities.items():
        part = content[side]
        camids = part["camids"]
        if camids is None and protocol.rule != "regdb":
            raise UserError(f"{name}: no {side}_cam, which the rules of {facts.title} need")
        camids = np.zeros(len(part["pids"]), np.int64) if camids is None else camids
        paths = [f"{name} {side} {k}" for k in range(len(part["pids"]))]
        tensors[modality], words = check(part["features"], f"{name}, {side}", paths, args.distance)
        refuse_equal(tensors[modality], range(len(paths)), f"{name}: {side}")
        rows[modality] = {path: k for k, path in enumerate(paths)}
        samples.append(Samples(paths, part["pids"], camids, modality))
        told.append(f"{len(paths):,} {side} features, {words}")
    query, gallery = samples
    if len(lengths := {tensor.shape[1] for tensor in tensors.values()}) > 1:
        raise UserError(f"{name}: query and gallery features of lengths {sorted(lengths)}")
    refuse_wrong_cameras(protocol, query.camids, gallery.camids, name)
    protocol = replace(protocol, shot=own_shot(protocol, gallery, name))
    refuse_without_match(protocol, query, gallery, name)
    _tell_foreign_ids(args, name, np.union1d(query.pids, gallery.pids))
    return protocol, (query, gallery), Features(rows, tensors, args.distance), "; ".join(told)


def _tell_foreign_ids(args: argparse.Namespace, name: str, pids: np.ndarray) -> None:
    """Warn of ids that are not among the dataset's test ids, where the dataset is there to tell."""
    try:
        root = data_manager.dataset_root(args.dataset, args.data_path)
        trial = chosen_trials(args)[0] if args.dataset == "regdb" else None
        query = data_manager.query_samples(args.dataset, root, mode=args.mode[0], trial=trial)
    except UserError:
        if args.data_path:  # it was typed
            raise
        return
    if len(foreign := np.setdiff1d(pids, query.pids)):
        log.warning(
            "%s: %d of its %d ids are not test ids of %s, for instance %d: numbered anew?",
            name, len(foreign), len(pids), DATASETS[args.dataset].title, foreign[0],
        )  # fmt: skip
