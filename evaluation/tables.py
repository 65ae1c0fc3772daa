"""Tables of results, ready to paste, and what they are based on: numbers of images and identities."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_manager import BOTH_WAYS, DATASETS
from eval_metrics import Metrics, matched, summarize
from evaluation.protocols import Evaluation, Protocol

Results = dict[tuple[Protocol, bool, str | None], list[Metrics]]  # (protocol, flip, re-ranking) -> of trials

STYLES = ("text", "markdown", "latex")
COLUMNS = ("rank-1", "rank-5", "rank-10", "rank-20", "mAP", "mINP")


def per_cent(metrics: object) -> list[str]:
    """What stands in COLUMNS, for metrics with .cmc (at least 20,), .mAP and .mINP in [0, 1]."""
    values = (*(metrics.cmc[k - 1] for k in (1, 5, 10, 20)), metrics.mAP, metrics.mINP)
    return [f"{100 * value:.2f}" for value in values]


def results_table(heading: Sequence[str], rows: Sequence[tuple[str, object]], style: str = "text") -> str:
    """The lines of heading and an aligned table of rows, (title, metrics) each, in one of STYLES.

    LaTeX has the heading as comments, since a caption is the paper's own affair.
    """
    cells = [["protocol", *COLUMNS], *([title, *per_cent(metrics)] for title, metrics in rows)]
    if style == "latex":
        special = str.maketrans({character: "\\" + character for character in "%_&#$"})
        cells = [[cell.translate(special) for cell in line] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells]
    if style == "markdown":
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        body = ["| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:])]
        return "\n\n".join([*heading, "\n".join(body)])
    if style == "latex":
        body = [" & ".join(line) + r" \\" for line in lines]
        begin = [*(f"% {line}" for line in heading), r"\begin{tabular}{l" + "r" * len(COLUMNS) + "}"]
        return "\n".join([*begin, r"\hline", body[0], r"\hline", *body[1:], r"\hline", r"\end{tabular}"])
    return "\n".join([*heading, *("  ".join(line) for line in lines)])


def table_rows(results: Results, trials: Sequence[int]) -> list[tuple[str, Metrics]]:
    """(title, metrics) for each line of the table; RegDB has its trials and their deviation besides."""
    rows = []
    for (protocol, flip, rerank), metrics in results.items():
        title = protocol.row + (", flip" if flip else "") + (f", {rerank} re-ranking" if rerank else "")
        mean, deviation = summarize(metrics)
        if protocol.dataset == "regdb" and len(trials) > 1:
            rows += [(f"{title}, trial {trial}", each) for trial, each in zip(trials, metrics, strict=True)]
            rows += [(f"{title}, mean of {len(trials)}", mean), (f"{title}, standard deviation", deviation)]
        else:
            rows.append((title, mean))
    return rows


def heading(checkpoints: Sequence[Mapping], evaluation: Evaluation) -> list[str]:
    """What a table's numbers are: dataset, trials; checkpoints, their selection; images, queries; warnings.

    checkpoints: of each its path, the trials that it is evaluated on, and what it says of itself: epoch,
    selection, args.
    """
    facts = DATASETS[evaluation.protocols[0].dataset]
    trials = [trial for checkpoint in checkpoints for trial in checkpoint["trials"]]
    scope = "one split" if len(facts.trials) == 1 else f"trial {trials[0]} alone"
    if len(trials) > 1:
        scope = f"mean over {len(trials)} trials"
        if len(trials) < len(facts.trials):
            numbers = ", ".join(map(str, trials))
            scope = f"mean over {len(trials)} of the {len(facts.trials)} trials ({numbers})"
        if facts is DATASETS["regdb"]:
            scope += ", each with its own model" if len(checkpoints) > 1 else ", one model for all of them"
    scope += f"; {evaluation.short}" if evaluation.short else ""

    titles = {name: dataset.title for name, dataset in DATASETS.items()}
    settings = [checkpoint.get("args", {}) for checkpoint in checkpoints]
    more = len(checkpoints) - 1
    siblings = f" and {more} sibling{'s' if more > 1 else ''}" if more else ""
    trained_on = _distinct(titles.get(own.get("dataset"), "an unknown dataset") for own in settings)
    epochs = ", ".join(str(checkpoint.get("epoch", "unknown")) for checkpoint in checkpoints)
    of = _distinct(f" of {own['epochs']}" for own in settings if "epochs" in own)
    unknown = "how it was chosen is unknown"
    chosen = _distinct(str(checkpoint.get("selection", unknown)) for checkpoint in checkpoints)
    lines = [
        f"{facts.title}, per cent, {scope}",
        f"{checkpoints[0]['path']}{siblings}: trained on {trained_on}, epoch {epochs}{of}; {chosen}",
    ]
    counts = counts_of(evaluation)
    for protocol in evaluation.protocols:
        words = _distinct((str(counts[protocol, trial]) for trial in trials), "; or ")
        lines.append(f"{protocol.row}: {words}")
    return lines + [f"warning: {warning}" for warning in warnings(counts)]


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


def warnings(counts_of_all: Mapping[tuple[Protocol, int], Counts]) -> list[str]:
    """Warnings for the reader of the results: unusual counts, or a gallery with a single identity."""
    lines = []
    for (protocol, _), counts in counts_of_all.items():
        published = PUBLISHED.get((protocol.dataset, protocol.mode, protocol.shot), {})
        actual = {name: getattr(counts, name) for name in published}
        if actual != published and protocol.split == "test" and not lines:
            differing = (name for name in published if actual[name] != published[name])
            words = (f"{actual[name]:,} {COUNTED[name]} ({published[name]:,})" for name in differing)
            lines.append(f"{protocol.title}: not the published counts (in brackets): {', '.join(words)}")
    if any(counts.candidates == 1 for counts in counts_of_all.values()):
        lines.append(
            "a gallery has one identity only: its metrics mean nothing, since every ranking is right"
        )
    return lines
