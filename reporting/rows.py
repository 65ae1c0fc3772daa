"""The lines of the page's tables: lists of cells, each text or HTML."""

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from evaluation.intervals import MEASURES
from evaluation.scoring import rerank_title
from evaluation.similarity import Similarities, equal_error_rate, overlap
from evaluation.tables import COLUMNS, counts_of, difference_cells, how_sure, per_cent
from reporting.comparing import OUTCOMES, Listed, outcomes
from reporting.evaluated import Evaluated

Cells = list[str]
SCORE = Markup('<data value="{0}">{0}</data>')
SPREAD = Markup("{}<small> ±{}</small>")
# report.js opens the rankings that a number counts; without scripts it is a number.
COUNT = Markup('<button type="button" class="count" {}>{:,}</button>')


def selection(each: Evaluated) -> str:
    """Where a checkpoint is, which epoch it is of, and how that was chosen."""
    file = each.method.facts[0]
    if "features" in file:
        return f"{file['path']}: {file['features']}"
    saved = file["args"]
    epochs = f" of {saved['epochs']}" if "epochs" in saved else ""
    chosen = file.get("selection", "how it was chosen is unknown")
    return f"{file['path']}, epoch {file.get('epoch', 'unknown')}{epochs}; {chosen}"


def result_rows(lists: Sequence[Listed]) -> list[Cells]:
    """Label, protocol, per cent as test.py prints them with their intervals, and what they stand on.

    Of several methods also rank-1's and mAP's differences to the first, each followed by its p-value.
    """
    rows, counts = [], {}
    for protocol, each, rerank in lists:
        if each.label not in counts:
            counts[each.label] = counts_of(each.evaluation)
        found = [own for (p, _), own in counts[each.label].items() if p == protocol]
        counted, queries, gallery, identities = (  # over the trials; most are the same in all
            spell({getattr(own, name) for own in found})
            for name in ("counted", "queries", "gallery", "identities")
        )
        scores = each.method.results[protocol, False, rerank]
        trials = len(scores.by_trial)
        cells = [SCORE.format(mean) for mean in per_cent(scores.mean)]
        for measure in MEASURES if scores.jackknife else ():
            half, place = scores.jackknife.interval(measure).half, COLUMNS.index(measure)
            if not np.isnan(half):
                cells[place] = SPREAD.format(cells[place], f"{100 * half:.1f}")
        if len({each.label for _, each, _ in lists}) > 1:
            cells += difference_cells((protocol, False, rerank), each.method, lists[0].each.method)
        title = protocol.row + rerank_title(rerank)
        based_on = queries if counted == queries else f"{counted} of {queries}"
        rows.append([each.label, title, *cells, based_on, gallery, identities, str(trials)])
    return rows


def sure_rows(everyone: Sequence[Evaluated]) -> list[str]:
    """What test.py says of intervals, of the drawn gallery and of seeds, in lines that begin with a label."""
    return [f"{each.label}: {line}" for each in everyone for line in how_sure([each.method])]


def spell(numbers: set[int]) -> str:
    """One number, or the range of several."""
    return "–".join(f"{number:,}" for number in sorted({min(numbers), max(numbers)}))


def side_by_side(lists: Sequence[Listed]) -> list[Cells]:
    """Two labels, the protocol and the counts of OUTCOMES: each list beside the first one like it."""
    rows = []
    for k, second in enumerate(lists):
        same = [i for i, other in enumerate(lists) if other.protocol == second.protocol]
        one = next((i for i in same if lists[i].rerank == second.rerank), k)
        one = same[0] if one == k else one  # a re-ranked list of the first method: beside its plain one
        first = lists[one]
        if one == k:
            continue
        if first.searches_as(second):
            counts = outcomes(first.values, second.values)
            words = (f"data-list={one} data-other={k} data-outcome={name}" for name in OUTCOMES)
            cells = [
                COUNT.format(Markup(own), counts[name]) for own, name in zip(words, OUTCOMES, strict=True)
            ]
        else:
            cells = ["other images"] * len(OUTCOMES)
        rows.append([first.label, second.label, second.protocol.row, *cells])
    return rows


def confused_rows(pairs: Sequence[tuple[tuple[int, int], int, list[int]]]) -> list[Cells]:
    """Both pids, the queries of the first, and each list's number of them; see comparing.most_confused."""
    rows = []
    for (pid, other), queries, counts in pairs:
        words = (f"data-list={k} data-pid={pid} data-outcome=wrong" for k in range(len(counts)))
        cells = [COUNT.format(Markup(own), count) for own, count in zip(words, counts, strict=True)]
        rows.append([str(pid), str(other), f"{queries:,}", *cells])
    return rows


def pair_rows(similarities: Mapping[str, Mapping[str, Similarities]]) -> list[Cells]:
    """Label, kind, pairs, means, overlap and equal-error rate of every checkpoint's similarities."""
    return [
        [
            label,
            kind.replace("-", "–"),
            f"{len(pair.within):,} / {len(pair.between):,}",
            f"{pair.within.mean():.3f}",
            f"{pair.between.mean():.3f}",
            f"{100 * overlap(pair):.1f}",
            f"{100 * equal_error_rate(pair):.1f}",
        ]
        for label, pairs in similarities.items()
        for kind, pair in pairs.items()
    ]


def setting_rows(everyone: Sequence[Evaluated]) -> list[Cells]:
    """Flag, marked where the checkpoints differ, and each one's value; the flags in alphabetical order."""
    saved = [each.method.facts[0].get("args", {}) for each in everyone]
    rows = []
    for key in sorted({key for own in saved for key in own}):
        values = [own.get(key, "unknown") for own in saved]
        texts = [" ".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for v in values]
        mark = " ≠" if len(set(texts)) > 1 else ""
        rows.append(["--" + key.replace("_", "-") + mark, *texts])
    return rows
