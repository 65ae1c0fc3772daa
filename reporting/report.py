"""The report: one HTML page of everything that an evaluation tells, which needs no network and no server."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from data_manager import DATASETS
from evaluation.cameras import CameraScores, cameras_of
from evaluation.rankings import RULES, Ranked, choose_queries
from evaluation.similarity import Similarities, bins
from evaluation.tables import COLUMNS, camera_cells, counts_of, per_cent, warnings
from images import decode
from reporting import figures, rows, sprites
from reporting.comparing import Listed, most_confused
from reporting.evaluated import Evaluated
from utils import UserError, log, whole_file

FIGURES = {  # in the page's order: what each shows, as a screen reader says it
    "cmc": "CMC curves, one line for each checkpoint, with the spread over trials",
    "ranking": "queries, each with the ten gallery images that are ranked first for it",
    "histogram": "similarity of pairs of images within and between identities, by modality",
    "embedding": "features of some identities in the plane",
    "cameras": "rank-1 and mAP by pair of query and gallery camera",
    "maps": "queries and gallery images, each beside a map of where their similarity comes from",
    "curves": "learning curves of the runs",
}

MISSING = {  # why there may be nothing to draw
    "ranking": "the file of features names no images",
    "maps": "features come without the network that made them",
    "histogram": "no pairs of images of one identity and of two to compare",
    "curves": "no history (RUN.jsonl) of these runs of two epochs or more where they were trained or beside "
    "them: set --log-path",
}
MAPPED = 5  # queries with maps


class Panels(NamedTuple):
    """A figure that falls into panels: a file has all of them side by side, the page lets them wrap."""

    draw: Callable[[Mapping], Figure]
    titled: Mapping[str, object]  # what draw takes, by the panel's title


class Findings:
    """What the figures and the page are made of, each part computed once, when it is first asked for.

    everyone: the checkpoints; rankings as a figure, embedding and maps are of the first of them, and of its
    first protocol. queries: which the ranking figure shows, see rankings.choose_queries; UserError for
    those that are not there.
    """

    def __init__(self, everyone: Sequence[Evaluated], queries: Sequence[str]):
        self.everyone, self.first = everyone, everyone[0]
        self.lists = [
            Listed(protocol, each, rerank)
            for protocol in dict.fromkeys(p for each in everyone for p in each.evaluation.protocols)
            for each in everyone
            for row, _, rerank in each.method.results
            if row == protocol
        ]
        self.protocol = self.lists[0].protocol
        self._ranked: dict[int, Ranked] = {}
        # The figure's list is the first method's last: re-ranked where that was asked for.
        rerank = [None, *self.first.method.args.rerank][-1]
        own = (k for k, listed in enumerate(self.lists) if listed.each is self.first)
        self.pictured = next(
            k for k in own if (self.lists[k].protocol, self.lists[k].rerank) == (self.protocol, rerank)
        )
        listed = self.lists[self.pictured]
        try:
            self.chosen = choose_queries(queries, listed.values, listed.samples[0].pids).tolist()
        except ValueError as error:
            raise UserError(f"--queries: {error}") from error

    def ranked(self, k: int) -> Ranked:
        """The rankings of the k-th of lists."""
        if k not in self._ranked:
            protocol, each, rerank = self.lists[k]
            self._ranked[k] = each.ranked(protocol, rerank)
        return self._ranked[k]

    @cached_property
    def similarities(self) -> dict[str, dict[str, Similarities]]:
        """Those of every checkpoint, by its label."""
        return {each.label: each.similarities() for each in self.everyone}

    @cached_property
    def by_camera(self) -> dict[str, CameraScores]:
        """Of every checkpoint with the first's protocol, by its label; without re-ranking."""
        those = (each for each in self.everyone if self.protocol in each.evaluation.protocols)
        return {each.label: cameras_of(each.method, self.protocol) for each in those}

    @cached_property
    def confused(self) -> tuple[list[str], list]:
        """Labels of the lists that search as the first does, and the identities that they confuse most."""
        same = [k for k, listed in enumerate(self.lists) if listed.searches_as(self.lists[0])]
        lists = [self.lists[k] for k in same]
        return [each.label for each in lists], most_confused(lists, [self.ranked(k) for k in same])

    def cmc(self) -> Panels:
        """CMC curves, of every checkpoint and protocol."""
        curves: dict[str, dict] = {}
        for listed in self.lists:
            scores = listed.each.method.results[listed.protocol, False, listed.rerank]
            lines = curves.setdefault(listed.protocol.title, {})
            lines[listed.label] = scores.mean.cmc, scores.over_trials.cmc
        return Panels(figures.cmc, curves)

    def ranking(self) -> Figure | None:
        """The chosen queries, re-ranked where that was asked for; None where the images are not known."""
        if not self.first.pictured:
            return None
        own = self.first.ranking(self.protocol, self.chosen, self.ranked(self.pictured))
        return figures.images(own, ["query", *map(str, range(1, max(map(len, own))))])

    def histogram(self) -> Panels | None:
        """Similarities of every checkpoint that has some, by kind of pair; None if none has."""
        kinds: dict[str, dict[str, Similarities]] = {}
        for label, pairs in self.similarities.items():
            for kind, pair in pairs.items():
                kinds.setdefault(kind, {})[label] = pair
        edges = {label: bins(pairs.values()) for label, pairs in self.similarities.items() if pairs}
        return Panels(partial(figures.histogram, edges=edges), kinds) if kinds else None

    def embedding(self) -> Figure:
        """Features of twenty identities."""
        return figures.embedding(*self.first.embedding())

    def cameras(self) -> Panels:
        """Heat maps of the first checkpoint's by_camera."""
        scores = self.by_camera[self.first.label]
        return Panels(figures.cameras, {"rank-1": scores, "mAP": scores})

    def maps(self) -> Figure | None:
        """Where the similarities of the first chosen queries come from; None without a network."""
        rows = self.first.maps(self.protocol, self.chosen[:MAPPED], self.ranked(self.pictured))
        heading = ["query", "", "1st", "", "query", "", "match", ""]
        return figures.images(rows, heading) if rows else None

    def curves(self) -> Panels | None:
        """Learning curves of the runs whose history was found, by quantity; None if none is a curve."""
        found: dict[str, dict[str, dict[int, float]]] = {}
        for own in self.everyone:
            for name, curve in own.history.curves.items() if own.history else ():
                found.setdefault(name, {})[own.label] = curve
        found = {name: lines for name, lines in found.items() if max(map(len, lines.values())) > 1}
        return Panels(figures.curves, found) if found else None


def write_figures(
    findings: Findings, names: Collection[str], folder: Path, demanded: bool = False
) -> dict[str, Panels | Figure]:
    """Write each figure as PNG and PDF; {name: what it is made of} of those that could be drawn.

    demanded: raise UserError, before anything is written, where one of them cannot.
    """
    drawn = {name: found for name in names if (found := getattr(findings, name)()) is not None}
    for name in names if demanded else ():
        if name not in drawn:
            raise UserError(f"--figures {name}: {MISSING[name]}")
    for name, found in drawn.items():
        figures.save(found.draw(found.titled) if isinstance(found, Panels) else found, folder, name)
    return drawn


def pictures(found: Panels | Figure) -> list[Markup]:
    """A figure for the page, each panel of it alone."""
    panels = [found]
    if isinstance(found, Panels):
        panels = [found.draw({title: part}) for title, part in found.titled.items()]
    return [Markup(figures.svg(panel)) for panel in panels]


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
    scores = findings.lists[0].each.method.results[findings.protocol, False, None].mean
    confused_by, confused = findings.confused
    evaluation = findings.first.evaluation
    context = {
        "title": DATASETS[findings.protocol.dataset].title,
        "findings": findings,
        # The page lists rankings itself: their figure is for elsewhere.
        "figures": {name: pictures(found) for name, found in drawn.items() if name != "ranking"},
        "alternatives": FIGURES,
        "missing": MISSING,
        "columns": COLUMNS,
        "tiles": dict(zip(COLUMNS, per_cent(scores), strict=True)),
        "results": rows.result_rows(findings.lists),
        "differences": ["Δ rank-1", "p", "Δ mAP", "p"] if len(findings.everyone) > 1 else [],
        "sure": rows.sure_rows(findings.everyone),
        "side_by_side": rows.side_by_side(findings.lists),
        "confused_by": confused_by,
        "confused": rows.confused_rows(confused),
        "similarities": rows.pair_rows(findings.similarities),
        "cameras": camera_cells(findings.by_camera),
        "settings": rows.setting_rows(findings.everyone),
        "facts": facts,
        "made_with": [(own.label, own.history.facts) for own in findings.everyone if own.history],
        "selections": [(each.label, rows.selection(each)) for each in findings.everyone],
        "notes": list(filter(None, [evaluation.short, *warnings(counts_of(evaluation))])),
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


def browser(findings: Findings, workers: int) -> dict:
    """What report.js shows: thumbnails in sheets, and the rankings of every checkpoint and protocol."""
    # (path, or of unknown images the method too) -> pid, camid, modality; those with pixels come first.
    images: dict[tuple[str, ...], tuple] = {}
    for protocol, each, _ in sorted(findings.lists, key=lambda listed: not listed.each.pictured):
        for samples in each.evaluation.samples[protocol, each.trial]:
            ids = zip(samples.pids.tolist(), samples.camids.tolist(), strict=True)
            images |= {
                key: (*own, samples.modality) for key, own in zip(keys(each, samples.paths), ids, strict=True)
            }
    number = {key: k for k, key in enumerate(images)}
    *size, pixel_range = findings.first.size
    height, width = sprites.thumbnail_size(len(images), *size)
    known = [key[0] for key in images if len(key) == 1]
    grey = (np.full((1, height, width, 3), 224, np.uint8) for _ in range(len(images) - len(known)))
    batches = chain(decode(known, height, width, workers, pixel_range=pixel_range) if known else (), grey)
    pids, camids, modalities = zip(*images.values(), strict=True)
    return {
        "pids": pids,
        "camids": camids,
        "infrared": [int(modality == "infrared") for modality in modalities],
        "thumbnail": [height, width],
        "sheet": [sprites.COLUMNS, sprites.ROWS],
        "sheets": sprites.sheets(batches),
        "lists": [ranking_lines(findings, k, number) for k in range(len(findings.lists))],
    }


def keys(each: Evaluated, paths: Sequence[str]) -> list[tuple[str, ...]]:
    """What an image is known by: its path, or in a file that names no images its place in that file."""
    return [(path,) if each.pictured else (path, each.label) for path in paths]


def ranking_lines(findings: Findings, k: int, number: dict[tuple[str, ...], int]) -> dict:
    """The rankings of a trial for report.js: queries, and what is ranked first for each of them.

    search: the first list with the same queries and gallery. kinds: for each query a letter for each image:
    r(ight), w(rong) or i(gnored).
    """
    listed, ranked = findings.lists[k], findings.ranked(k)
    (query, gallery), values = listed.samples, listed.values
    g_numbers = np.array([number[key] for key in keys(listed.each, gallery.paths)])
    kinds, distances = [], []
    for q, (places, ignored) in enumerate(zip(ranked.places, ranked.ignored, strict=True)):
        right = gallery.pids[places] == query.pids[q]
        kinds.append("".join(np.where(ignored, "i", np.where(right, "r", "w")).tolist()))
        distances.append([round(value, 3) for value in ranked.distances[q].tolist()])
    return {
        "title": f"{listed.label}; {listed.protocol.row}",
        "label": listed.label,
        "rule": RULES[listed.protocol.rule],
        "search": next(i for i, other in enumerate(findings.lists) if other.searches_as(listed)),
        "trial": listed.each.trial,
        "queries": [number[key] for key in keys(listed.each, query.paths)],
        "ap": [None if np.isnan(value) else round(value, 4) for value in values.ap.tolist()],
        "first": values.first.tolist(),
        "images": [g_numbers[places].tolist() for places in ranked.places],
        "kinds": kinds,
        "distances": distances,
    }
