"""Methods side by side: which queries the one has right and the other wrong, and who is taken for whom."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_manager import Samples
from eval_metrics import QueryValues
from evaluation.protocols import Protocol
from evaluation.rankings import Ranked
from evaluation.scoring import rerank_title
from reporting.evaluated import Evaluated

OUTCOMES = ("both", "first", "second", "neither")  # which of two rankings have a right image first


class Listed(NamedTuple):
    """A list of rankings: of one method, under one protocol, plain or re-ranked."""

    protocol: Protocol
    each: Evaluated
    rerank: str | None

    @property
    def label(self) -> str:
        """The method, and its re-ranking."""
        return self.each.label + rerank_title(self.rerank)

    @property
    def samples(self) -> tuple[Samples, Samples]:
        """Query and gallery of the trial that is shown."""
        return self.each.evaluation.samples[self.protocol, self.each.trial]

    @property
    def values(self) -> QueryValues:
        """What each of its queries got."""
        return self.each.values(self.protocol, self.rerank)

    def searches_as(self, other: "Listed") -> bool:
        """Whether the two are of the same queries and gallery, in one order, so that they can be paired."""
        return self.protocol == other.protocol and all(
            own is its
            or (
                own.paths == its.paths
                and np.array_equal(own.pids, its.pids)
                and np.array_equal(own.camids, its.camids)
            )
            for own, its in zip(self.samples, other.samples, strict=True)
        )


def outcomes(first: QueryValues, second: QueryValues) -> dict[str, int]:
    """Of the queries with a match, how many have a right image first in both, in the one, or in neither."""
    right, also = (values.first[first.counted] == 1 for values in (first, second))
    found = right & also, right & ~also, ~right & also, ~right & ~also
    return {name: int(part.sum()) for name, part in zip(OUTCOMES, found, strict=True)}


def confused(listed: Listed, ranked: Ranked) -> Counter[tuple[int, int]]:
    """{(pid of the query, pid of the image ranked first): queries}, where the two differ.

    Queries without a match are left out, as in every metric; ignored images are not ranked.
    """
    query, gallery = listed.samples
    found: Counter[tuple[int, int]] = Counter()
    for q in np.flatnonzero(listed.values.counted).tolist():
        g = ranked.places[q][~ranked.ignored[q]][0]
        if query.pids[q] != gallery.pids[g]:
            found[int(query.pids[q]), int(gallery.pids[g])] += 1
    return found


def most_confused(
    lists: Sequence[Listed], rankings: Sequence[Ranked], most: int = 10
) -> list[tuple[tuple[int, int], int, list[int]]]:
    """The pairs of identities that most queries confuse: (pids, queries of the first, each list's count).

    lists: of one search, see Listed.searches_as. Sorted by the sum over lists, then by pid.
    """
    found = [confused(*each) for each in zip(lists, rankings, strict=True)]
    total = sum(found, Counter())
    query, counted = lists[0].samples[0].pids, lists[0].values.counted
    pairs = sorted(total, key=lambda pair: (-total[pair], pair))[:most]
    return [
        (pair, int((query[counted] == pair[0]).sum()), [counts[pair] for counts in found]) for pair in pairs
    ]
