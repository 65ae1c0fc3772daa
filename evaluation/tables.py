"""Tables of results, ready to paste, and what they are based on: numbers of images and identities."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_manager import BOTH_WAYS, DATASETS
from eval_metrics import Metrics, matched
from evaluation.cameras import CameraScores, cameras_of
from evaluation.intervals import MARKED, PRINTED, Jackknife
from evaluation.methods import Method, Row, difference
from evaluation.protocols import OWN_GALLERY, Evaluation, Protocol
from evaluation.scoring import rerank_title

STYLES = ("text", "markdown", "latex")
COLUMNS = ("rank-1", "rank-5", "rank-10", "rank-20", "mAP", "mINP")


def per_cent(metrics: object) -> list[str]:
    """What stands in COLUMNS, for metrics with .cmc (at least 20,), .mAP and .mINP in [0, 1]."""
    values = (*(metrics.cmc[k - 1] for k in (1, 5, 10, 20)), metrics.mAP, metrics.mINP)
    return [f"{100 * value:.2f}" for value in values]


def results_table(
    heading: Sequence[str],
    rows: Sequence[tuple[str, object]],
    style: str = "text",
    more: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """The lines of heading and an aligned table of rows, (title, metrics) each, in one of STYLES.

    LaTeX has the heading as comments, since a caption is the paper's own affair. more: further columns.
    """
    more = more or {}
    cells = [["protocol", *COLUMNS, *more]]
    for k, (title, metrics) in enumerate(rows):
        cells.append([title, *per_cent(metrics), *(column[k] for column in more.values())])
    return aligned(heading, cells, style)


def aligned(heading: Sequence[str], cells: Sequence[Sequence[str]], style: str = "text") -> str:
    """The lines of heading and a table of cells, whose first line names the columns, in one of STYLES."""
    if style == "latex":
        special = str.maketrans({c: "\\" + c for c in "%_&#$"} | {"±": r"$\pm$", "−": "$-$"})
        cells = [[cell.translate(special) for cell in line] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells]
    if style == "markdown":
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        body = ["| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:])]
        return "\n\n".join([*heading, "\n".join(body)])
    if style == "latex":
        body = [" & ".join(line) + r" \\" for line in lines]
        begin = [*(f"% {line}" for line in heading), r"\begin{tabular}{l" + "r" * (len(widths) - 1) + "}"]
        return "\n".join([*begin, r"\hline", body[0], r"\hline", *body[1:], r"\hline", r"\end{tabular}"])
    return "\n".join([*heading, *("  ".join(line).rstrip() for line in lines)])


def camera_scores(methods: Sequence[Method]) -> dict[str, CameraScores]:
    """Rank-1 and mAP by pair of cameras of every plain row, by its title; see cameras.cameras_of."""
    plain = ((title, row[0], method) for title, row, method in rows_of(methods) if row[1:] == (False, None))
    return {title: cameras_of(method, protocol) for title, protocol, method in plain}


def camera_table(found: Mapping[str, CameraScores], methods: Sequence[Method], style: str = "text") -> str:
    """The table of camera_scores."""
    columns = ["protocol", "query camera", "gallery camera", "rank-1", "mAP", "queries", "gallery images"]
    title = f"{DATASETS[methods[0].args.dataset].title}, per cent, by pair of cameras"
    # Of several seeds, or models of RegDB's trials, the features of the first alone are kept.
    if any(len(method.sources) > 1 or len(method.sources[0]) > 1 for method in methods):
        title += ", of the first file"
    return aligned([title], [columns, *camera_cells(found)], style)


def camera_cells(found: Mapping[str, CameraScores]) -> list[list[str]]:
    """Title, query and gallery camera, rank-1 and mAP in per cent, queries and gallery images."""
    return [
        [
            title,
            *map(str, cameras),
            *("not compared" if np.isnan(rate) else f"{100 * rate:.2f}" for rate in score[:2]),
            *(f"{count:,.6g}" for count in score[2:]),
        ]
        for title, pairs in found.items()
        for cameras, score in pairs.items()
    ]


def title_of(row: Row) -> str:
    """The protocol of a row, with mirror images and re-ranking."""
    protocol, flip, rerank = row
    return protocol.row + (", flip" if flip else "") + rerank_title(rerank)


def rows_of(methods: Sequence[Method]) -> list[tuple[str, Row, Method]]:
    """(title, row, method) of every line of the table: rows of several methods follow each other."""
    rows = dict.fromkeys(row for method in methods for row in method.results)
    names = [f"{letter(k)}: " if len(methods) > 1 else "" for k in range(len(methods))]
    return [
        (name + title_of(row), row, method)
        for row in rows
        for name, method in zip(names, methods, strict=True)
        if row in method.results
    ]


def letter(k: int) -> str:
    """The name of the k-th of several methods: A to Z, then numbers."""
    return chr(ord("A") + k) if k < 26 else str(k + 1)


def table(lines: Sequence[str], methods: Sequence[Method], style: str = "text") -> str:
    """The table of evaluated methods; lines: see heading.

    RegDB has its trials and their deviation. Several methods have the paired differences to the first.
    """
    rows, differences = [], []
    for title, row, method in rows_of(methods):
        scores = method.results[row]
        trials, count = method.trials, len(scores.seeds[0])
        if row[0].dataset == "regdb" and count > 1 and len(methods) == len(scores.seeds) == 1:
            pairs = zip(trials, scores.seeds[0], strict=True)
            rows += [(f"{title}, trial {trial}", each.metrics) for trial, each in pairs]
            rows += [(f"{title}, mean of {count}", scores.mean)]
            rows += [(f"{title}, standard deviation", scores.over_trials)]
        else:
            rows.append((title, scores.mean))
        if len(methods) > 1:
            differences.append(difference_cells(row, method, methods[0]))
    names = [f"{word} of {measure} to A" for measure in ("rank-1", "mAP") for word in ("difference", "p")]
    columns = zip(*differences, strict=True)
    return results_table(lines, rows, style, dict(zip(names, columns, strict=True)) if differences else None)


def difference_cells(row: Row, method: Method, first: Method) -> list[str]:
    """Of rank-1 and mAP: the difference to the first method with its interval, and the p-value."""
    if method is first:
        return [""] * 4
    found = difference(row, method, first)
    if found is None:
        return ["not paired", ""] * 2
    cells = []
    for measure in ("rank-1", "mAP"):
        interval = found.interval(measure)
        half = "" if np.isnan(interval.half) else f" ± {100 * interval.half:.2f}"
        p = "" if np.isnan(interval.p) else f"{interval.p:.3f}" if interval.p >= 0.001 else "< 0.001"
        cells += [f"{100 * interval.value:+.2f}{half}", p]
    return cells


def in_words(jackknife: Jackknife) -> str:
    """`rank-1 74.8 ± 4.1, mAP 72.0 ± 3.6 (95 %, 96 persons)`; with few persons the count says so."""
    parts, count = [], len(jackknife.persons)
    for measure in ("rank-1", "mAP"):
        interval = jackknife.interval(measure)
        half = f" ± {100 * interval.half:.1f}" if count >= PRINTED else ""
        parts.append(f"{measure} {100 * interval.value:.1f}{half}")
    few = ", few persons" if PRINTED <= count < MARKED else ""
    persons = f"{count} person{'s' if count > 1 else ''}"
    sure = f"95 %, {persons}{few}" if count >= PRINTED else f"{persons}: too few for an interval"
    return f"{', '.join(parts)} ({sure})"


def how_sure(methods: Sequence[Method]) -> list[str]:
    """The intervals of every row, and what they do not cover: drawn galleries, and the chance of training."""
    lines = []
    for title, row, method in rows_of(methods):
        scores = method.results[row]
        if (jackknife := scores.jackknife) is None:
            lines.append(f"{title}: no interval: the files do not say which persons RegDB's splits share")
        else:
            lines.append(f"{title}: {in_words(jackknife)}")
            if near := jackknife.near_everyone():
                person, change = near
                lines.append(
                    f"{title}: gallery person {person} is near everybody: without, mAP {100 * change:+.1f}"
                )
        count, seeds = len(scores.seeds[0]), len(scores.seeds)
        if row[0].dataset != "regdb" and count > 1:
            words = _deviation(scores.over_trials)
            lines.append(f"{title}: variation of the gallery, deviation over {count} trials: {words}")
        if seeds > 1:
            words = _deviation(scores.over_seeds)
            lines.append(f"{title}: variation of training, deviation over {seeds} seeds: {words}")
    return lines


def _deviation(metrics: Metrics) -> str:
    return f"rank-1 {100 * metrics.cmc[0]:.2f}, mAP {100 * metrics.mAP:.2f}"


def heading(methods: Sequence[Method]) -> list[str]:
    """What a table's numbers are: dataset, trials; methods, their selection; images, queries; warnings."""
    first = methods[0]
    facts = DATASETS[first.args.dataset]
    each = [counts_of(method.evaluation) for method in methods]
    counts = [pair for own in each for pair in own.items()]
    lines = [f"{facts.title}, per cent, {_scope(first)}"]
    for k, method in enumerate(methods):
        lines.append((f"{letter(k)}: " if len(methods) > 1 else "") + _origin(method))
        if _scope(method) != _scope(first):
            lines[-1] += f"; {_scope(method)}"
    for protocol in dict.fromkeys(protocol for (protocol, _), _ in counts):
        words = _distinct((str(found) for (own, _), found in counts if own == protocol), "; or ")
        lines.append(f"{protocol.row}: {words}")
    if any(rerank == "aim" for method in methods for _, _, rerank in method.results):
        lines.append("aim re-ranking: one query at a time it is the same")
    return lines + [f"warning: {warning}" for warning in every_warning(each)] + how_sure(methods)


def _scope(method: Method) -> str:
    """Over what the numbers are averaged."""
    facts, trials = DATASETS[method.args.dataset], method.trials
    scope = "one split" if len(facts.trials) == 1 else f"trial {trials[0]} alone"
    if method.evaluation.protocols[0].galleries == OWN_GALLERY and len(trials) == 1:
        scope = "the query and gallery of the file"
    if len(trials) > 1:
        scope = f"mean over {len(trials)} trials"
        if len(trials) < len(facts.trials):
            numbers = ", ".join(map(str, trials))
            scope = f"mean over {len(trials)} of the {len(facts.trials)} trials ({numbers})"
        if facts is DATASETS["regdb"]:
            several = len(method.sources[0]) > 1
            scope += ", each with its own model" if several else ", one model for all of them"
    scope += f" and {len(method.sources)} seeds" if len(method.sources) > 1 else ""
    return scope + (f"; {method.evaluation.short}" if method.evaluation.short else "")


def _origin(method: Method) -> str:
    """Which files a method is, and what they say of themselves."""
    files = method.facts
    others = len(files) - 1
    name = files[0]["path"] + (f" and {others} sibling{'s' if others > 1 else ''}" if others else "")
    if "features" in files[0]:
        return f"{name}: {_distinct(file['features'] for file in files)}"
    titles = {name: dataset.title for name, dataset in DATASETS.items()}
    settings = [file.get("args", {}) for file in files]
    trained_on = _distinct(titles.get(own.get("dataset"), "an unknown dataset") for own in settings)
    epochs = ", ".join(str(file.get("epoch", "unknown")) for file in files)
    of = _distinct(f" of {own['epochs']}" for own in settings if "epochs" in own)
    unknown = "how it was chosen is unknown"
    chosen = _distinct(str(file.get("selection", unknown)) for file in files)
    return f"{name}: trained on {trained_on}, epoch {epochs}{of}; {chosen}"


def _distinct(words: Iterable[str], separator: str = ", ") -> str:
    """The words, each once."""
    return separator.join(dict.fromkeys(words))


# --- what the metrics are based on


@dataclass(frozen=True)
class Counts:
    """How many images and identities the metrics of one protocol and trial are based on."""

    queries: int  # query images
    gallery: int  # gallery images
    identities: int  # in queries and gallery combined
    candidates: int  # identities in the gallery; with only one, every ranking is right
    counted: int  # queries with a match; the averages are over these

    def __str__(self) -> str:
        unmatched = self.queries - self.counted
        matches = f"{unmatched:,} of them without a match and left out" if unmatched else "all with a match"
        images = f"{self.gallery:,} gallery images, {self.identities:,} identities"
        return f"{self.queries:,} queries, {matches}, {images}"


COUNTED = {
    "queries": "queries",
    "gallery": "gallery images",
    "identities": "identities",
    "counted": "queries with a match",
}
# (dataset, mode, shot) -> published values of Counts; both modes of RegDB and LLCM have the same.
PUBLISHED = {
    ("sysu", "all", 1): {"queries": 3803, "gallery": 301, "identities": 96, "counted": 3803},
    ("sysu", "all", 10): {"queries": 3803, "gallery": 3010, "identities": 96, "counted": 3803},
    ("sysu", "indoor", 1): {"queries": 3803, "gallery": 112, "identities": 96, "counted": 2208},
    ("sysu", "indoor", 10): {"queries": 3803, "gallery": 1120, "identities": 96, "counted": 2208},
    **{
        (name, mode, 1): numbers
        for name, numbers in (
            ("regdb", {"queries": 2060, "gallery": 2060, "identities": 206, "counted": 2060}),
            ("llcm", {"identities": 1064 - 713}),
        )
        for mode in BOTH_WAYS
    },
}


def counts_of(evaluation: Evaluation) -> dict[tuple[Protocol, int], Counts]:
    """The counts of every protocol and trial."""
    found = {}
    for (protocol, trial), (query, gallery) in evaluation.samples.items():
        has_match = matched(protocol.rule, query.pids, gallery.pids, query.camids, gallery.camids)
        identities, candidates = np.union1d(query.pids, gallery.pids), np.unique(gallery.pids)
        numbers = len(query), len(gallery), len(identities), len(candidates), int(has_match.sum())
        found[protocol, trial] = Counts(*numbers)
    return found


def every_warning(counts: Iterable[Mapping[tuple[Protocol, int], Counts]]) -> list[str]:
    """The warnings of several methods, each once; counts: see counts_of."""
    return list(dict.fromkeys(words for own in counts for words in warnings(own)))


def warnings(counts_of_all: Mapping[tuple[Protocol, int], Counts]) -> list[str]:
    """Warnings for the reader of the results: unusual counts, or a gallery with a single identity."""
    lines: dict[str, str] = {}  # by protocol: of each the first trial that differs
    for (protocol, _), counts in counts_of_all.items():
        published = PUBLISHED.get((protocol.dataset, protocol.mode, protocol.shot), {})
        actual = {name: getattr(counts, name) for name in published}
        if actual != published and protocol.split == "test" and protocol.title not in lines:
            differing = (name for name in published if actual[name] != published[name])
            words = (f"{actual[name]:,} {COUNTED[name]} ({published[name]:,})" for name in differing)
            lines[protocol.title] = f"not the published counts (in parentheses): {', '.join(words)}"
    found = [f"{title}: {words}" for title, words in lines.items()]
    if any(counts.candidates == 1 for counts in counts_of_all.values()):
        found.append(
            "a gallery has one identity only: its metrics mean nothing, since every ranking is right"
        )
    return found
