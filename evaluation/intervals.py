"""How sure a number is: what it would be without each person, and the 95 % interval that follows.

Persons are the sample, not images: the queries of one person succeed or fail together, and a gallery person
who is near everyone spoils every query at once. So one person at a time is taken out of queries and gallery
(the jackknife). Nothing is ranked again: AP without person j is the mean over the M matches of
k / (place_k - n_jk), where n_jk is the number of j's images before the k-th match. Re-ranked distances
stay as they are, although re-ranking without the person could change them.

Sources: docs/how-sure.md; B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import stdtr, stdtrit

from eval_metrics import QueryValues, Ranking, Trial, evaluate_queries

MEASURES = ("mAP", "rank-1")  # the columns of a Jackknife
MARKED, PRINTED = 30, 10  # persons: with fewer, an interval is marked, or is none
CELLS = 2**20  # (query, person, match) counted at a time: 8 MB for each temporary


class Interval(NamedTuple):
    """A 95 % interval: value ± half, by persons; half and p are NaN with fewer than PRINTED."""

    value: float
    half: float
    persons: int
    p: float  # two-sided, that the true value is 0: for differences


@dataclass(frozen=True)
class Jackknife:
    """mAP and rank-1, in [0, 1], of one trial or the mean of several, and the same without each person."""

    persons: tuple[Hashable, ...]  # I, those with a counted query, sorted
    whole: np.ndarray  # (2,) as MEASURES
    deleted: np.ndarray  # (I, 2) without the person's queries and gallery images
    unasked: np.ndarray  # (I, 2) without the person's queries

    def __sub__(self, other: "Jackknife") -> "Jackknife":
        """The paired difference; ValueError unless both have the same persons."""
        if self.persons != other.persons:
            raise ValueError(f"{len(self.persons)} persons, and {len(other.persons)} that are not the same")
        mine, theirs = ((each.whole, each.deleted, each.unasked) for each in (self, other))
        return Jackknife(self.persons, *(one - two for one, two in zip(mine, theirs, strict=True)))

    def renamed(self, names: Mapping[Hashable, Hashable]) -> "Jackknife":
        """The same with other names of the persons, such as hold over several trials."""
        persons = [names[person] for person in self.persons]
        order = sorted(range(len(persons)), key=persons.__getitem__)
        ordered = tuple(persons[k] for k in order)
        return Jackknife(ordered, self.whole, self.deleted[order], self.unasked[order])

    def interval(self, measure: str, gallery: bool = True) -> Interval:
        """The interval of one of MEASURES; gallery: persons are taken out of the gallery too."""
        column, count = MEASURES.index(measure), len(self.persons)
        value = float(self.whole[column])
        if count < PRINTED:
            return Interval(value, np.nan, count, np.nan)
        deleted = (self.deleted if gallery else self.unasked)[:, column]
        error = np.sqrt((count - 1) / count * np.square(deleted - deleted.mean()).sum())
        t = abs(value) / error if error else (0.0 if value == 0 else np.inf)
        p = 2 * stdtr(count - 1, -t)
        return Interval(value, float(stdtrit(count - 1, 0.975) * error), count, float(p))

    def near_everyone(self) -> tuple[Hashable, float] | None:
        """The gallery person whose absence changes mAP most, and by how much; None where nobody stands out.

        Somebody does where the interval is more than 1.2 times the one with the gallery kept; with fewer than
        MARKED persons that is chance.
        """
        if len(self.persons) < MARKED:
            return None
        if not self.interval("mAP").half > 1.2 * self.interval("mAP", gallery=False).half:
            return None
        change = (self.deleted - self.unasked)[:, 0]
        place = int(np.abs(change).argmax())
        return self.persons[place], float(change[place])


def mean(parts: Sequence[Jackknife]) -> Jackknife:
    """The mean of several: trials of one method, or seeds of it. A part without a person stays whole."""
    persons = tuple(sorted(set().union(*(part.persons for part in parts))))
    place = {person: k for k, person in enumerate(persons)}
    whole = np.mean([part.whole for part in parts], axis=0)
    without = np.tile(whole, (2, len(persons), 1))
    for part in parts:
        rows = [place[person] for person in part.persons]
        without[:, rows] += (np.stack([part.deleted, part.unasked]) - part.whole) / len(parts)
    return Jackknife(persons, whole, *without)


def evaluate_with_jackknife(
    trial: Trial, protocol: str, rerank: object = None, distance: str = "cosine"
) -> tuple[QueryValues, Jackknife]:
    """Evaluate each query, and the means without each person, in one pass; see evaluate_queries."""
    q_pids, g_pids = (np.asarray(torch.as_tensor(pids).cpu()) for pids in (trial.q_pids, trial.g_pids))
    changes = _Changes(q_pids, g_pids)
    values = evaluate_queries(trial, protocol, rerank, distance, changes.add)
    return values, changes.jackknife(values, q_pids)


class _Changes:
    """Sums, over the queries of the others, what AP and rank-1 gain without each person's gallery images."""

    def __init__(self, q_pids: np.ndarray, g_pids: np.ndarray):
        self.persons = np.unique(q_pids)
        self.q_persons = np.searchsorted(self.persons, q_pids)
        place = np.searchsorted(self.persons, g_pids).clip(max=len(self.persons) - 1)
        # Who is in the gallery alone is not taken out: one more column counts them all.
        self.g_persons = np.where(self.persons[place] == g_pids, place, len(self.persons))
        self.sums = np.zeros((len(self.persons), 2))

    def add(self, ranking: Ranking) -> None:
        """Add a block of queries."""
        device, num_matches = ranking.matches.device, ranking.matches.shape[1]
        columns = len(self.persons) + 1
        g_persons = torch.from_numpy(self.g_persons * (num_matches + 1)).to(device)
        q_persons = torch.from_numpy(self.q_persons).to(device)[ranking.rows]
        lines = max(1, CELLS // (columns * (num_matches + 1)))
        for part in torch.arange(len(ranking.rows), device=device).split(lines):
            matches, places = ranking.matches[part], ranking.places[part]
            before = _matches_before(ranking.distances[part], matches)
            before += g_persons
            before += torch.arange(len(part), device=device)[:, None] * (columns * (num_matches + 1))
            found = before.flatten().bincount(minlength=len(part) * columns * (num_matches + 1))
            found = found.view(len(part), columns, num_matches + 1)[:, :-1]
            own = q_persons[part, None]
            ap, running = 0.0, 0
            for k in range(num_matches):
                running = running + found[:, :, k]  # images of each person before the k-th match
                ap = ap + (k + 1) / (places[:, k, None] - running)
                if k == 0:
                    alone = running
            total = places.isfinite().sum(1, keepdim=True)
            whole = ((torch.arange(num_matches, device=device) + 1) / places).sum(1, keepdim=True)
            gain = ((ap - whole) / total).scatter_(1, own, 0)
            wrong = alone.scatter(1, own, 0)  # images of other persons before the first match
            others = places[:, :1] - 1
            right = ((wrong == others) & (others > 0)).double()
            self.sums += torch.stack([gain.sum(0), right.sum(0)], 1).cpu().numpy()

    def jackknife(self, values: QueryValues, q_pids: np.ndarray) -> Jackknife:
        """The means without each person that has a counted query."""
        counted = values.counted
        each = np.stack([values.ap, values.first == 1], axis=1)[counted]
        persons = self.q_persons[counted]
        number = np.bincount(persons, minlength=len(self.persons))
        own = np.stack([np.bincount(persons, column, len(self.persons)) for column in each.T], axis=1)
        asked = number > 0
        left = (len(each) - number[asked])[:, None].astype(float)
        left[left == 0] = np.nan  # a single person
        others = each.sum(0) - own[asked]
        return Jackknife(
            tuple(self.persons[asked].tolist()),
            each.mean(0),
            (others + self.sums[asked]) / left,
            others / left,
        )


def _matches_before(distances: torch.Tensor, matches: torch.Tensor) -> torch.Tensor:
    """Return (q, G) int64: how many of the matches (q, M) are nearer than each image."""
    if matches.shape[1] > 8:
        return torch.searchsorted(matches.nan_to_num(torch.inf), distances)
    before = torch.zeros_like(distances)
    nearer = torch.empty_like(distances)
    for match in matches.split(1, dim=1):
        before += torch.lt(match, distances, out=nearer)
    return before.long()
