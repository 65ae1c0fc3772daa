"""How often 95 % intervals of mAP hold the true value, by what is taken for the sample: docs/how-sure.md.

    python -m tests.interval_coverage [--populations 1000]
    python -m tests.interval_coverage --pairs 0.1

Test sets of SYSU-MM01's and RegDB's sizes are drawn anew, persons included, so that the mean over all of
them is the true value. In the crowded ones everybody's queries share a direction, as images of another
modality do, and some persons of the gallery lie in it. With --pairs two methods of the same worth, each with
its own view of every person, are compared instead, at SYSU-MM01's size: how often does the interval of their
difference not hold 0, and how large a difference would be noticed?
"""

import argparse
from functools import partial

import numpy as np

from eval_metrics import QueryValues, Trial
from evaluation.intervals import MEASURES, Jackknife, evaluate_with_jackknife
from tests.test_intervals import coverage, population, unit

SIZES = {  # persons, queries and gallery images of each
    "96 persons, 3,840 queries, 288 gallery images": (96, 40, 3),
    "206 persons, 2,060 queries and gallery images": (206, 10, 10),
}
KINDS = {  # how far queries go in the direction, the share of gallery persons that do, how far at most
    "of middling likeness": (0.0, 0.0, 0.0),
    "a tenth of the gallery near everyone": (0.6, 0.1, 1.0),
    "a twentieth of it very near everyone": (1.0, 0.05, 3.0),
}


def crowded(rng: np.random.Generator, trial: Trial, asked: float, share: float, most: float) -> Trial:
    """trial, its queries and some of its gallery persons moved to a direction."""
    direction = unit(rng.standard_normal(trial.query_features.shape[1]))
    persons = 1 + trial.g_pids.max()
    near = np.where(rng.random(persons) < share, most * rng.random(persons), 0)[trial.g_pids, None]
    return trial._replace(
        query_features=unit(trial.query_features + asked * direction),
        gallery_features=unit(trial.gallery_features + near * direction),
    )


def estimates(values: QueryValues, own: Jackknife) -> list[tuple[float, float]]:
    """(mAP, half-width) of three estimators: queries, persons with the gallery kept, persons."""
    error = values.ap.std(ddof=1) / len(values.ap) ** 0.5
    each = [own.interval(MEASURES[0], gallery=gallery)[:2] for gallery in (False, True)]
    return [(own.whole[0], 1.96 * error), *each]


def one(rng: np.random.Generator, trial: Trial, how: tuple) -> list[tuple[float, float]]:
    """The estimates of a test set's mAP."""
    return estimates(*evaluate_with_jackknife(crowded(rng, trial, *how), "regdb"))


def pair(far: float, rng: np.random.Generator, trial: Trial, how: tuple) -> list[tuple[float, float]]:
    """The estimates of the difference of two methods' mAP, of which neither is better."""
    found = []
    for _ in range(2):
        view = far * rng.standard_normal((2, 1 + trial.q_pids.max(), trial.query_features.shape[1]))
        seen = trial._replace(
            query_features=unit(trial.query_features + view[0, trial.q_pids]),
            gallery_features=unit(trial.gallery_features + view[1, trial.g_pids]),
        )
        found.append(evaluate_with_jackknife(crowded(rng, seen, *how), "regdb"))
    (first, mine), (second, theirs) = found
    return estimates(first._replace(ap=first.ap - second.ap), mine - theirs)


def type_one_error(intervals: np.ndarray) -> float:
    """The share of intervals (n, 2) that do not hold 0."""
    value, half = intervals.T
    return (abs(value) > half).mean()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--populations", type=int, default=1000, help="test sets of each kind (1000)")
    far = "compare two methods of the same worth, whose views of a person are so far apart, for example 0.1"
    parser.add_argument("--pairs", type=float, metavar="VIEW", help=far)
    args, dim = parser.parse_args(), 24
    measure, share = (partial(pair, args.pairs), type_one_error) if args.pairs else (one, coverage)
    print("| test set | persons | per query | per person, gallery kept | **per person** |")
    print("|---|---|---:|---:|---:|")
    for size, shape in list(SIZES.items())[: 1 if args.pairs else None]:
        for kind, how in KINDS.items():
            rng = np.random.default_rng(0)
            found = [measure(rng, population(rng, *shape, dim), how) for _ in range(args.populations)]
            cells = (f"{100 * share(each):.0f} %, ± {100 * each[:, 1].mean():.1f}"
                     for each in np.moveaxis(np.array(found), 1, 0))  # fmt: skip
            print(f"| {size} | {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
