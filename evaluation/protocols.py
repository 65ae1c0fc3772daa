"""What is evaluated: protocols, and who is searched where in each of their trials. No pixels, no features."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

import data_manager
from data_manager import CAPTURED, DATASETS, Samples
from eval_metrics import matched
from readers.lists import list_folders_once
from utils import UserError

OWN_GALLERY = "the file's"  # galleries of a file of features that holds its query and gallery


@dataclass(frozen=True)
class Protocol:
    """How a row of a results table is measured."""

    dataset: str
    mode: str
    shot: int = 1
    galleries: str = "seeded"
    split: str = "test"
    ignore_same_camera: bool = False  # own images: as LLCM does

    @property
    def rule(self) -> str:
        """The protocol in eval_metrics. Own images use RegDB's, or LLCM's with ignore_same_camera."""
        if self.dataset != "folder":
            return self.dataset
        return "llcm" if self.ignore_same_camera else "regdb"

    @property
    def title(self) -> str:
        """The protocol in words, for example `SYSU-MM01, all, single-shot, seeded galleries`."""
        return f"{DATASETS[self.dataset].title}, {self.row}"

    @property
    def row(self) -> str:
        """The title without the dataset."""
        words = [self.mode.replace("-", " ")]
        if self.dataset == "sysu":
            other = f"up to {self.shot} images of an id and camera"  # in a file's gallery
            words += [
                {1: "single-shot", 10: "multi-shot"}.get(self.shot, other),
                f"{self.galleries} galler{'y' if self.galleries == OWN_GALLERY else 'ies'}",
            ]
        elif self.galleries == OWN_GALLERY:
            words.append("the file's gallery")
        if self.ignore_same_camera:
            words.append("same camera ignored")
        if self.split != "test":
            words.append(f"{self.split} ids")
        return ", ".join(words)


def mode_name(text: str) -> str:
    """An argparse type: the name of a mode; RegDB calls its infrared images thermal."""
    return text.replace("thermal", "infrared")


@dataclass
class Evaluation:
    """Queries and galleries of several protocols and trials, and all images that they need."""

    samples: dict[tuple[Protocol, int], tuple[Samples, Samples]]  # query, gallery of a protocol and trial
    short: str = ""  # what Evaluation.draw's allow_short allowed, for the reader of the results
    more: list[Samples] = field(default_factory=list)  # further images to embed

    @classmethod
    @list_folders_once()
    def draw(
        cls,
        root: str | os.PathLike,
        protocols: Sequence[Protocol],
        trials: Sequence[int],
        allow_short: bool = False,
        more: Sequence[Samples] = (),
        copies: bool = True,
    ) -> "Evaluation":
        """Find the queries and draw the galleries of every protocol and trial.

        Args:
            root: the dataset's folder.
            protocols: to evaluate.
            trials: of every protocol, as the dataset numbers them.
            allow_short: see data_manager.gallery_samples.
            more: further images to embed.
            copies: see data_manager.refuse_shared.

        Raises:
            UserError: the dataset does not exist or lacks images of a protocol, its training and test split
                share images, or no query has a match.
        """
        drawn = {}
        queries: dict[tuple[str, int | None], Samples] = {}  # RegDB's differ between trials
        for protocol in protocols:
            choice = {"mode": protocol.mode, "split": protocol.split}
            for trial in trials:
                key = protocol.mode, trial if protocol.dataset == "regdb" else None
                if key not in queries:
                    data_manager.refuse_shared(protocol.dataset, root, key[1], protocol.split, copies)
                    queries[key] = data_manager.query_samples(protocol.dataset, root, trial=trial, **choice)
                gallery = data_manager.gallery_samples(
                    protocol.dataset, root, trial=trial, shot=protocol.shot, galleries=protocol.galleries,
                    allow_short=allow_short, **choice,
                )  # fmt: skip
                drawn[protocol, trial] = queries[key], gallery
                refuse_without_match(protocol, queries[key], gallery, str(root))
        return cls(drawn, short_cells(drawn) if allow_short else "", list(more))

    @property
    def protocols(self) -> list[Protocol]:
        """Each protocol once."""
        return list(dict.fromkeys(protocol for protocol, _ in self.samples))

    def images(self, trial: int | None = None) -> dict[str, Samples]:
        """Every image, or every one of a trial, each once: {"visible": Samples, "infrared": ...}."""
        parts = [
            part for (_, number), pair in self.samples.items() if trial in (None, number) for part in pair
        ]
        known: dict[str, dict] = {modality: {} for modality in CAPTURED}
        for samples in {id(part): part for part in parts + self.more}.values():
            known[samples.modality] |= zip(
                samples.paths, zip(samples.pids, samples.camids, strict=True), strict=True
            )
        merged = {}
        for modality, found in known.items():
            ids = np.array(list(found.values()), dtype=np.int64).reshape(-1, 2)
            merged[modality] = Samples(list(found), ids[:, 0], ids[:, 1], modality)
        return merged


def short_cells(drawn: dict[tuple[Protocol, int], tuple[Samples, Samples]]) -> str:
    """Report how many (id, camera) of the galleries have fewer images than the protocol needs."""
    short = set()
    for (protocol, _), (_, gallery) in drawn.items():
        cells, counts = np.unique([gallery.pids, gallery.camids], axis=1, return_counts=True)
        short |= {(protocol.shot, *cell) for cell in cells.T[counts < protocol.shot].tolist()}
    return f"{len(short)} (id, camera) of the galleries have too few images" if short else ""


def refuse_without_match(protocol: Protocol, query: Samples, gallery: Samples, where: str) -> None:
    """Raise UserError if no query has a match, or --ignore-same-camera meets an image without a camid."""
    for samples in (query, gallery) if protocol.ignore_same_camera else ():
        if not samples.camids.all():
            path = samples.paths[int(np.argmin(samples.camids))]
            raise UserError(f"--ignore-same-camera: {path} has no camid")
    if not matched(protocol.rule, query.pids, gallery.pids, query.camids, gallery.camids).any():
        rule = "no id is in both queries and gallery"
        if np.isin(query.pids, gallery.pids).any():
            rule = {
                "sysu": "every match is from camera 2, which queries of camera 3 ignore",
                "llcm": "every match is from the query's own camera, which is ignored",
            }[protocol.rule]
        raise UserError(f"{where}: {protocol.title}: no query has a match: {rule}")
