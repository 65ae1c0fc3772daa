"""The report: one HTML page of everything that an evaluation tells, which needs no network and no server."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from data_manager import DATASETS
from evaluation.protocols import Protocol
from evaluation.rankings import RULES, choose_queries
from evaluation.scoring import rerank_title
from evaluation.similarity import Similarities, equal_error_rate, overlap
from evaluation.tables import COLUMNS, counts_of, per_cent, warnings
from images import decode
from reporting import figures, sprites
from reporting.evaluated import Evaluated
from utils import UserError, log, whole_file

FIGURES = {  # in the page's order: what each shows, as a screen reader says it
    "cmc": "CMC curves, one line for each checkpoint, with the spread over trials",
    "ranking": "queries, each with the ten gallery images that are ranked first for it",
    "histogram": "similarity of pairs of images within and between identities, by modality",
    "embedding": "features of some identities in the plane",
    "cameras": "rank-1 and mAP by pair of query and gallery camera",
    "activation": "images in both modalities, each beside a map of where the network is active",
    "curves": "learning curves of the runs",
}

MISSING = {  # why there may be nothing to draw
    "ranking": "the file of features names no images",
    "activation": "features come without the network that made them",
    "histogram": "no pairs of images of one identity and of two to compare",
    "curves": "no history (RUN.jsonl) of these runs where they were trained or beside them: set --log-path",
}


class Findings:
    """What the figures and the page are made of, each part computed once, when it is first asked for.

    everyone: the checkpoints; rankings, embedding, cameras and activations are of the first of them, and of
    its first protocol. queries: which the ranking figure shows, see rankings.choose_queries; UserError for
    those that are not there.
    """

    def __init__(self, everyone: Sequence[Evaluated], queries: Sequence[str]):
        self.everyone, self.first = everyone, everyone[0]
        self.protocols = self.first.evaluation.protocols
        self.reranks = list(dict.fromkeys(rerank for _, _, rerank in self.first.method.results))
        self.protocol = self.protocols[0]
        self.ranked = self.first.ranked(self.protocol, [None, *self.first.method.args.rerank][-1])
        query, _ = self.first.evaluation.samples[self.protocol, self.first.trial]
        try:
            self.chosen = choose_queries(queries, self.ranked, query.pids).tolist()
        except ValueError as error:
            raise UserError(f"--queries: {error}") from error

    @cached_property
    def similarities(self) -> dict[str, dict[str, Similarities]]:
        """Those of every checkpoint, by its label."""
        return {each.label: each.similarities() for each in self.everyone}

    @cached_property
    def by_camera(self) -> dict[tuple[int, int], tuple[float, float]]:
        """Rank-1 and mAP by camera pair."""
        return self.first.cameras(self.protocol)

    def label(self, each: Evaluated, rerank: str | None) -> str:
        """How a line of a figure or a list of rankings is named."""
        return each.label + rerank_title(rerank)

    def cmc(self) -> Figure:
        """CMC curves, of every checkpoint and protocol."""
        curves = {}
        for protocol in self.protocols:
            lines = curves[protocol.title] = {}
            for each in self.everyone:
                for rerank in self.reranks:
                    scores = each.method.results[protocol, False, rerank]
                    lines[self.label(each, rerank)] = scores.mean.cmc, scores.over_trials.cmc
        return figures.cmc(curves)

    def ranking(self) -> Figure | None:
        """The chosen queries, re-ranked where that was asked for; None where the images are not known."""
        if not self.first.pictured:
            return None
        rows = self.first.ranking(self.protocol, self.chosen, self.ranked)
        return figures.images(rows, ["query", *map(str, range(1, max(map(len, rows))))])

    def histogram(self) -> Figure | None:
        """Similarities of every checkpoint that has some; None if none has."""
        pairs = {label: own for label, own in self.similarities.items() if own}
        return figures.histogram(pairs) if pairs else None

    def embedding(self) -> Figure:
        """Features of twenty identities."""
        return figures.embedding(*self.first.embedding())

    def cameras(self) -> Figure:
        """Heat maps of by_camera."""
        return figures.cameras(self.by_camera)

    def activation(self) -> Figure | None:
        """Activation maps of four identities; None without a network."""
        rows = self.first.activations()
        return figures.images(rows) if rows else None

    def curves(self) -> Figure | None:
        """Learning curves of the runs whose history was found; None if none was."""
        runs = {own.label: own.history.curves for own in self.everyone if own.history and own.history.curves}
        return figures.curves(runs) if runs else None

    def draw(self, name: str) -> Figure | None:
        """The figure of that name in FIGURES."""
        return getattr(self, name)()


def write_figures(findings: Findings, names: Iterable[str], folder: Path) -> dict[str, Figure]:
    """Write each figure as PNG and PDF; {name: figure} of those that could be drawn."""
    drawn = {name: figure for name in names if (figure := findings.draw(name)) is not None}
    for name, figure in drawn.items():
        figures.save(figure, folder, name)
    return drawn


def write_page(findings: Findings, folder: Path, facts: Sequence[tuple[str, str]], workers: int) -> Path:
    """Write every figure and folder/index.html, which holds them and the browser of rankings; its path.

    facts: (name, text) of what made the report.
    """
    templates = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(templates), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}  # a tenth of the page is numbers
    drawn = write_figures(findings, FIGURES, folder)
    context = {
        "title": DATASETS[findings.protocol.dataset].title,
        "findings": findings,
        # The page lists rankings itself: their figure is for elsewhere.
        "figures": {name: Markup(figures.svg(drawn[name])) for name in drawn if name != "ranking"},
        "alternatives": FIGURES,
        "missing": MISSING,
        "columns": COLUMNS,
        "results": result_rows(findings),
        "similarities": [
            row for label, pairs in findings.similarities.items() for row in pair_rows(label, pairs)
        ],
        "cameras": camera_rows(findings.by_camera),
        "settings": setting_rows(findings.everyone),
        "facts": facts,
        "made_with": [(own.label, own.history.facts) for own in findings.everyone if own.history],
        "selections": [(each.label, selection(each)) for each in findings.everyone],
        "notes": list(
            filter(None, [findings.first.evaluation.short, *warnings(counts_of(findings.first.evaluation))])
        ),
        "data": browser(findings, workers),
        "style": Markup((templates / "report.css").read_text(encoding="utf-8")),
        "script": Markup((templates / "report.js").read_text(encoding="utf-8")),
    }
    path = folder / "index.html"
    page = environment.get_template("report.html").render(context)
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    log.info("wrote %s, %.1f MB", path, len(page.encode()) / 1e6)
    return path


def selection(each: Evaluated) -> str:
    """Where a checkpoint is, which epoch it is of, and how that was chosen."""
    file = each.method.facts[0]
    if "features" in file:
        return f"{file['path']}: {file['features']}"
    saved = file["args"]
    epochs = f" of {saved['epochs']}" if "epochs" in saved else ""
    chosen = file.get("selection", "how it was chosen is unknown")
    return f"{file['path']}, epoch {file.get('epoch', 'unknown')}{epochs}; {chosen}"


def result_rows(findings: Findings) -> list[dict]:
    """The metrics table: per cent as test.py prints them, their deviation, and what they stand on."""
    rows = []
    counts_of_all = [counts_of(each.evaluation) for each in findings.everyone]
    for protocol in findings.protocols:
        for each, found in zip(findings.everyone, counts_of_all, strict=True):
            counts = [own for (p, _), own in found.items() if p == protocol]
            for rerank in findings.reranks:
                scores = each.method.results[protocol, False, rerank]
                mean, deviation = scores.mean, scores.over_trials
                rows.append(
                    {
                        "label": each.label,
                        "protocol": protocol.row + rerank_title(rerank),
                        "cells": list(zip(per_cent(mean), per_cent(deviation), strict=True)),
                        "counts": {  # over the trials; most are the same in all
                            name: spell({getattr(own, name) for own in counts})
                            for name in ("counted", "queries", "gallery", "identities")
                        },
                        "trials": len(scores.by_trial),
                    }
                )
    return rows


def spell(numbers: set[int]) -> str:
    """One number, or the range of several."""
    return "–".join(f"{number:,}" for number in sorted({min(numbers), max(numbers)}))


def pair_rows(label: str, pairs: dict[str, Similarities]) -> list[tuple]:
    """Lines of the table of similarities: label, kind, pairs, means, overlap and equal-error rate."""
    return [
        (
            label,
            kind.replace("-", "–"),
            f"{len(pair.within):,} / {len(pair.between):,}",
            f"{pair.within.mean():.3f}",
            f"{pair.between.mean():.3f}",
            f"{100 * overlap(pair):.1f}",
            f"{100 * equal_error_rate(pair):.1f}",
        )
        for kind, pair in pairs.items()
    ]


def camera_rows(pairs: dict[tuple[int, int], tuple[float, float]]) -> list[tuple]:
    """Lines of the table by camera pair: query camera, gallery camera, rank-1, mAP in per cent."""
    return [
        (*cameras, *("not compared" if np.isnan(score) else f"{100 * score:.2f}" for score in scores))
        for cameras, scores in pairs.items()
    ]


def setting_rows(everyone: Sequence[Evaluated]) -> list[tuple[str, list[str], bool]]:
    """(flag, each checkpoint's value, whether they differ), the flags in alphabetical order."""
    saved = [each.method.facts[0].get("args", {}) for each in everyone]
    rows = []
    for key in sorted({key for own in saved for key in own}):
        values = [own.get(key, "unknown") for own in saved]
        texts = [" ".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for v in values]
        rows.append(("--" + key.replace("_", "-"), texts, len(set(texts)) > 1))
    return rows


def browser(findings: Findings, workers: int) -> dict:
    """What report.js shows: thumbnails in sheets, and the rankings of every checkpoint and protocol."""
    images: dict[str, tuple] = {}  # path -> pid, camid, modality
    for each in findings.everyone:
        for protocol in findings.protocols:
            for samples in each.evaluation.samples[protocol, each.trial]:
                ids = zip(samples.pids.tolist(), samples.camids.tolist(), strict=True)
                images |= {
                    path: (*own, samples.modality) for path, own in zip(samples.paths, ids, strict=True)
                }
    number = {path: k for k, path in enumerate(images)}
    *size, pixel_range = findings.first.size
    height, width = sprites.thumbnail_size(len(images), *size)
    batches = decode(list(images), height, width, workers, pixel_range=pixel_range)
    if not findings.first.pictured:
        batches = (np.full((1, height, width, 3), 224, np.uint8) for _ in images)
    pids, camids, modalities = zip(*images.values(), strict=True)
    return {
        "pids": pids,
        "camids": camids,
        "infrared": [int(modality == "infrared") for modality in modalities],
        "thumbnail": [height, width],
        "sheet": [sprites.COLUMNS, sprites.ROWS],
        "sheets": sprites.sheets(batches),
        "lists": [
            {"title": f"{findings.label(each, rerank)}; {protocol.row}", "rule": RULES[protocol.rule]}
            | ranking_lines(each, protocol, rerank, number)
            for protocol in findings.protocols
            for each in findings.everyone
            for rerank in findings.reranks
        ],
    }


def ranking_lines(each: Evaluated, protocol: Protocol, rerank: str | None, number: dict[str, int]) -> dict:
    """The rankings of a trial for report.js: queries, and what is ranked first for each of them.

    kinds: for each query a letter for each image: r(ight), w(rong) or i(gnored).
    """
    ranked = each.ranked(protocol, rerank)
    query, gallery = each.evaluation.samples[protocol, each.trial]
    g_numbers = np.array([number[path] for path in gallery.paths])
    kinds, distances = [], []
    for q, (places, ignored) in enumerate(zip(ranked.places, ranked.ignored, strict=True)):
        right = gallery.pids[places] == query.pids[q]
        kinds.append("".join(np.where(ignored, "i", np.where(right, "r", "w")).tolist()))
        distances.append([round(value, 3) for value in ranked.distances[q].tolist()])
    return {
        "trial": each.trial,
        "queries": [number[path] for path in query.paths],
        "ap": [None if np.isnan(value) else round(value, 4) for value in ranked.ap.tolist()],
        "first": ranked.first.tolist(),
        "images": [g_numbers[places].tolist() for places in ranked.places],
        "kinds": kinds,
        "distances": distances,
    }
