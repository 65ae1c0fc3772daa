"""evaluation/intervals.py: against evaluation with the person removed, and against what intervals promise."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import stdtrit

from eval_metrics import Trial, evaluate_queries
from evaluation import intervals
from evaluation.intervals import MEASURES, Jackknife, evaluate_with_jackknife, mean

CAMERAS = {"sysu": ((3, 6), (1, 2, 4, 5)), "regdb": ((1,), (2,)), "llcm": ((1, 2, 4), range(1, 10))}


def unit(features):
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def draw(protocol, seed=0, queries=60, images=150, persons=14, ties=False):
    """Random persons; some have no match, some are in the gallery alone; ties: images occur several times."""
    rng = np.random.default_rng(seed)
    pids = rng.choice(1000, persons, replace=False)
    query, gallery = (unit(rng.standard_normal((number, 4))) for number in (queries, images))
    if ties:
        gallery[images // 3 :] = gallery[rng.integers(0, images // 3, images - images // 3)]
    q_cameras, g_cameras = CAMERAS[protocol]
    ids = rng.choice(pids[2:], queries), rng.choice(pids[:-2], images)
    return Trial(query, gallery, *ids, rng.choice(q_cameras, queries), rng.choice(g_cameras, images))


def kept(trial, queries, images):
    parts = zip(trial, (queries, images) * 3, strict=True)
    return Trial(*(None if values is None else values[part] for values, part in parts))


def scores_of(trial, protocol):
    metrics = evaluate_queries(trial, protocol).metrics()
    return metrics.mAP, metrics.cmc[0]


# ---- the closed form


@pytest.mark.parametrize("protocol", CAMERAS)
@pytest.mark.parametrize("images", [60, 150, 900])  # few matches, more than eight, more than are counted
@pytest.mark.parametrize("ties", [False, True])
def test_deletions_equal_evaluation_without_the_person(protocol, images, ties, monkeypatch):
    trial = draw(protocol, images, images=images, ties=ties)
    values, found = evaluate_with_jackknife(trial, protocol)
    np.testing.assert_array_equal(values.ap, evaluate_queries(trial, protocol).ap)
    assert found.persons == tuple(np.unique(trial.q_pids[values.counted]).tolist())
    everyone = np.ones(images, bool)
    for person, deleted, unasked in zip(found.persons, found.deleted, found.unasked, strict=True):
        queries, others = trial.q_pids != person, trial.g_pids != person
        np.testing.assert_allclose(deleted, scores_of(kept(trial, queries, others), protocol), atol=2e-15)
        np.testing.assert_allclose(unasked, scores_of(kept(trial, queries, everyone), protocol), atol=2e-15)
    np.testing.assert_allclose(found.whole, scores_of(trial, protocol), atol=2e-15)
    monkeypatch.setattr(intervals, "CELLS", 1)  # a query at a time
    np.testing.assert_allclose(evaluate_with_jackknife(trial, protocol)[1].deleted, found.deleted, atol=2e-15)


def test_the_interval_is_the_jackknife_s():
    _, found = evaluate_with_jackknife(draw("sysu"), "sysu")
    count = len(found.persons)
    for column, measure in enumerate(MEASURES):
        without = found.deleted[:, column]
        square = (count - 1) / count * sum((value - without.mean()) ** 2 for value in without)
        value, half, persons, _ = found.interval(measure)
        assert (value, persons) == (found.whole[column], count)
        assert half == pytest.approx(stdtrit(count - 1, 0.975) * square**0.5)


# ---- what must not change it


def test_every_query_seven_times_changes_nothing():
    trial = draw("llcm")
    rows, images = np.tile(np.arange(60), 7), np.arange(150)
    once, often = (evaluate_with_jackknife(part, "llcm")[1] for part in (trial, kept(trial, rows, images)))
    for measure in MEASURES:
        np.testing.assert_allclose(often.interval(measure), once.interval(measure), rtol=1e-9)


def test_the_order_of_queries_and_gallery_changes_nothing():
    trial, rng = draw("sysu"), np.random.default_rng(1)
    shuffled = kept(trial, rng.permutation(60), rng.permutation(150))
    one, other = (evaluate_with_jackknife(part, "sysu")[1] for part in (trial, shuffled))
    assert one.persons == other.persons
    np.testing.assert_allclose(one.deleted, other.deleted, atol=2e-15)


def test_a_method_against_itself_differs_by_nothing():
    _, found = evaluate_with_jackknife(draw("sysu", persons=40), "sysu")
    for measure in MEASURES:
        assert (found - found).interval(measure) == (0, 0, len(found.persons), 1)


def test_only_the_same_persons_are_compared():
    one, other = (evaluate_with_jackknife(draw("sysu", seed), "sysu")[1] for seed in (0, 1))
    with pytest.raises(ValueError, match="persons"):
        one - other


# ---- several trials


def test_trials_are_averaged_inside():
    """The deletions of a mean are the means of the deletions; ten times one trial is no surer than one."""
    first, *others = (
        evaluate_with_jackknife(draw("sysu", images=number), "sysu")[1] for number in (150, 300, 400)
    )
    assert all(other.persons == first.persons for other in others)
    together = mean([first, *others])
    np.testing.assert_allclose(together.deleted, np.mean([p.deleted for p in (first, *others)], axis=0))
    np.testing.assert_allclose(mean([first] * 10).interval("mAP"), first.interval("mAP"), rtol=1e-9)


def test_a_trial_without_a_person_stays_whole():
    names = [tuple(range(12)), tuple(range(6, 18))]
    rng = np.random.default_rng(0)
    parts = [Jackknife(own, rng.random(2), rng.random((12, 2)), rng.random((12, 2))) for own in names]
    together = mean(parts)
    assert together.persons == tuple(range(18))
    for person in together.persons:
        each = [
            part.deleted[part.persons.index(person)] if person in part.persons else part.whole
            for part in parts
        ]
        np.testing.assert_allclose(together.deleted[person], np.mean(each, axis=0))


def test_persons_get_the_names_that_trials_share():
    _, found = evaluate_with_jackknife(draw("sysu"), "sysu")
    names = {person: f"{-person + 1000:04d}" for person in found.persons}
    other = found.renamed(names)
    assert other.persons == tuple(sorted(names.values()))
    for person, deleted in zip(found.persons, found.deleted, strict=True):
        np.testing.assert_array_equal(other.deleted[other.persons.index(names[person])], deleted)


# ---- what it promises


def population(rng, persons=30, asked=15, shown=2, dim=6):
    """A test set of persons who are drawn anew: how alike their images are differs from person to person."""
    centers = unit(rng.standard_normal((persons, dim)))
    spread = rng.uniform(0.1, 0.5, (persons, 1, 1))
    query = unit(centers[:, None] + spread * rng.standard_normal((persons, asked, dim)))
    gallery = unit(centers[:, None] + spread * rng.standard_normal((persons, shown, dim)))
    ids = (np.repeat(np.arange(persons), number) for number in (asked, shown))
    return Trial(query.reshape(-1, dim), gallery.reshape(-1, dim), *ids, None, None)


@pytest.fixture(scope="module")
def drawn():
    """Of 1,000 populations: mAP's and rank-1's intervals, and those that take queries for the sample."""
    rng = np.random.default_rng(0)
    found, per_query = [], []
    for _ in range(1000):
        values, own = evaluate_with_jackknife(population(rng), "regdb")
        found.append([own.interval(measure)[:2] for measure in MEASURES])
        error = values.ap.std(ddof=1) / len(values.ap) ** 0.5
        per_query.append((own.whole[0], 1.96 * error))
    return np.array(found), np.array(per_query)


def coverage(intervals):
    """The share of intervals (n, 2) that hold the mean of all populations, which is the true value."""
    value, half = intervals.T
    return (abs(value - value.mean()) <= half).mean()


def test_95_of_100_intervals_hold_the_true_value(drawn):
    found, per_query = drawn
    for column, measure in enumerate(MEASURES):
        assert 0.92 <= coverage(found[:, column]) <= 0.98, measure
    assert coverage(per_query) < 0.75  # so this test would notice an estimator of that kind


def test_differences_of_equal_methods_are_found_in_one_of_twenty():
    """Two methods that differ by chance alone: each has persons that it is bad at, drawn anew."""
    rng = np.random.default_rng(1)
    p = []
    for _ in range(400):
        trial = population(rng)
        deleted = []
        for _ in range(2):
            bad = rng.uniform(0, 0.6, 30)[trial.q_pids, None]
            noise = bad * rng.standard_normal(trial.query_features.shape)
            method = trial._replace(query_features=unit(trial.query_features + noise))
            deleted.append(evaluate_with_jackknife(method, "regdb")[1])
        p.append((deleted[0] - deleted[1]).interval("mAP").p)
    assert 0.02 <= (np.array(p) < 0.05).mean() <= 0.09


def test_a_gallery_person_near_everybody_is_named():
    rng = np.random.default_rng(2)
    trial = population(rng, persons=40)
    _, calm = evaluate_with_jackknife(trial, "regdb")
    assert calm.near_everyone() is None
    gallery = trial.gallery_features.copy()
    gallery[trial.g_pids == 7] = unit(trial.query_features.mean(0)) + 1e-3 * rng.standard_normal((2, 6))
    query = unit(trial.query_features + unit(trial.query_features.mean(0)))
    crowded = trial._replace(query_features=query, gallery_features=unit(gallery))
    _, found = evaluate_with_jackknife(crowded, "regdb")
    person, change = found.near_everyone()
    assert person == 7
    others = trial.q_pids != 7
    without = scores_of(kept(crowded, others, trial.g_pids != 7), "regdb")[0]
    assert change == pytest.approx(without - scores_of(kept(crowded, others, trial.g_pids > -1), "regdb")[0])
    assert found.interval("mAP").half > 1.2 * found.interval("mAP", gallery=False).half
    few = Jackknife(*(part[:29] if len(part) == 40 else part for part in vars(found).values()))
    assert few.interval("mAP").half > 1.2 * few.interval("mAP", gallery=False).half
    assert few.near_everyone() is None  # of so few, chance


@pytest.mark.parametrize("persons", [1, 9])
def test_below_ten_persons_there_is_no_interval(persons):
    _, found = evaluate_with_jackknife(population(np.random.default_rng(3), persons=persons), "regdb")
    value, half, count, p = found.interval("mAP")
    assert (value, count) == (found.whole[0], persons)
    assert np.isnan([half, p]).all()
    assert found.near_everyone() is None


def test_the_p_value_is_that_of_the_interval():
    """At the value where the interval touches 0, p is 0.05."""
    _, found = evaluate_with_jackknife(population(np.random.default_rng(4)), "regdb")
    half = found.interval("mAP").half
    touching = replace(found, whole=np.array([half, -half / 2]))
    assert touching.interval("mAP").p == pytest.approx(0.05)
