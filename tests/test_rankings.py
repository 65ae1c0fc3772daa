"""Rankings, methods side by side and similarities against naive loops."""

import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_manager import Samples
from eval_metrics import QueryValues, Trial, eval_features, evaluate_queries, ignored_pairs
from evaluation import rankings
from evaluation.cameras import camera_pairs, cameras_of
from evaluation.features import FeatureFile
from evaluation.methods import Method
from evaluation.protocols import Evaluation, Protocol
from evaluation.rankings import choose_queries, rank_queries
from evaluation.scoring import Features
from evaluation.similarity import (
    Similarities,
    equal_error_rate,
    overlap,
    sample_similarities,
)
from reporting.comparing import Listed, confused, most_confused, outcomes
from reporting.evaluated import Evaluated


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random_trial(rng, queries=40, images=60):
    """Features of few directions, so with ties; some queries have no match, some only ignored ones."""
    angles = rng.integers(0, 25, queries), rng.integers(0, 25, images)
    features = (np.stack([np.cos(angle / 8), np.sin(angle / 8)], 1) for angle in angles)
    ids = rng.integers(0, 9, queries), rng.integers(1, 9, images)
    return Trial(*features, *ids, rng.choice([3, 6], queries), rng.choice([1, 2, 3, 6], images))


def in_order(q_camid, g_camids):
    """A query whose gallery images, all of its pid, lie ever farther away."""
    angles = np.arange(len(g_camids)) / 20
    gallery = np.stack([np.cos(angles), np.sin(angles)], 1)
    same = np.zeros(len(g_camids), int)
    return Trial(np.array([[1.0, 0.0]]), gallery, np.array([0]), same, np.array([q_camid]), g_camids)


# ---- each query's own ranking


@pytest.mark.parametrize("protocol", ["sysu", "regdb", "llcm"])
def test_a_list_begins_with_a_match_where_the_values_say_so(protocol, rng):
    for _ in range(5):
        trial = random_trial(rng)
        ranked, values = rank_queries(trial, protocol), evaluate_queries(trial, protocol)
        assert 0 < values.counted.sum() < len(values.counted)
        for q in np.flatnonzero(values.counted):
            first = ranked.places[q][~ranked.ignored[q]][0]
            assert (trial.q_pids[q] == trial.g_pids[first]) == (values.first[q] == 1)


def listed(distances, ignored):
    """(places, whether ignored) of a query, sorted as a whole, as METHOD would be written first."""
    kept, left_out, found = 0, 0, []
    for place in np.argsort(distances, kind="stable"):
        if kept == rankings.SHOWN:
            break
        kept, left_out = kept + (not ignored[place]), left_out + ignored[place]
        if not ignored[place] or left_out <= rankings.SHOWN:
            found.append((place, ignored[place]))
    return found


@pytest.mark.parametrize("rerank", [None, lambda query, gallery: np.round(3 * query @ gallery.T)])
@pytest.mark.parametrize("protocol", ["sysu", "regdb", "llcm"])
def test_the_list_is_the_beginning_of_the_sorted_gallery(protocol, rerank, rng, monkeypatch):
    trial = random_trial(rng)
    query, gallery = (torch.from_numpy(features).float() for features in trial[:2])
    distmat = (rerank(query, gallery) if rerank else -(query @ gallery.T)).numpy()
    mask = ignored_pairs(protocol, *trial[2:])
    for block in (2**22, 7 * 60):
        monkeypatch.setattr(rankings, "BLOCK", block)
        ranked = rank_queries(trial, protocol, rerank and (lambda *_: torch.from_numpy(distmat)))
        for k, distances in enumerate(distmat):
            expected = listed(distances, mask[k])
            assert list(zip(ranked.places[k], ranked.ignored[k], strict=True)) == expected
            shown = distances[ranked.places[k]] + (0 if rerank else 1)
            np.testing.assert_allclose(ranked.distances[k], shown, atol=1e-6)


def test_the_list_has_ten_images_that_count_and_the_ignored_ones_among_them():
    g_camids = np.array([2, 2, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1])
    ranked = rank_queries(in_order(3, g_camids), "sysu")
    assert ranked.places[0].tolist() == list(range(13))  # image 13 is ignored, but behind the tenth
    assert np.flatnonzero(ranked.ignored[0]).tolist() == [0, 1, 3]
    ranked = rank_queries(in_order(6, g_camids), "sysu")
    assert ranked.places[0].tolist() == list(range(10))


def test_of_many_ignored_images_ten_are_listed():
    ranked = rank_queries(in_order(3, np.array([2] * 15 + [1])), "sysu")
    assert ranked.places[0].tolist() == [*range(10), 15]


def test_llcm_ignores_the_own_id_in_the_own_camera_only():
    pids, camids = np.array([1, 1, 2]), np.array([1, 2, 1])
    mask = ignored_pairs("llcm", np.array([1]), pids, np.array([1]), camids)
    assert mask.tolist() == [[True, False, False]]


def test_camera_pairs_are_the_metrics_of_their_part(rng):
    trial = random_trial(rng)
    found = camera_pairs(trial, "sysu")
    assert set(found) == {(q, g) for q in (3, 6) for g in (1, 2, 3, 6)}
    kept = trial.q_camids == 6, trial.g_camids == 1
    part = [values[rows] for values, rows in zip(trial, kept * 3, strict=True)]
    metrics = eval_features(*part, "sysu")
    counted = sum(pid in part[3] for pid in part[2])
    assert 0 < counted < len(part[2])
    assert found[6, 1] == pytest.approx((metrics.cmc[0], metrics.mAP, counted, len(part[3])))
    assert np.isnan(found[3, 2][:2]).all()  # never compared
    assert found[3, 2][2:] == (0, (trial.g_camids == 2).sum())


def method_of(rng, trials=(0, 1), files=1, dataset="sysu"):
    """A method of random features, evaluated: a query and a gallery of four identities in each trial."""
    query, gallery = (
        Samples([f"{m}{k}" for k in range(24)], np.arange(24) % 4, rng.choice(cameras, 24), m)
        for m, cameras in (("infrared", (3, 6)), ("visible", (1, 2)))
    )
    drawn = {}
    for trial in trials:
        rows = rng.permutation(24)[:12]
        part = Samples([gallery.paths[k] for k in rows], gallery.pids[rows], gallery.camids[rows], "visible")
        drawn[Protocol(dataset, "all"), trial] = query, part
    evaluation = Evaluation(drawn)
    features = Features.of_images(
        evaluation.images(),
        {
            m: F.normalize(torch.from_numpy(rng.normal(size=(len(s), 8))).float())
            for m, s in evaluation.images().items()
        },
    )
    own = [FeatureFile("x", features, [t] if files > 1 else list(trials), "random") for t in trials[:files]]
    method = Method("x", argparse.Namespace(dataset=dataset, rerank=[]), [own], evaluation)
    method.evaluate(torch.device("cpu"))
    return method


def test_camera_pairs_are_averaged_over_the_trials_that_the_features_serve(rng):
    (protocol,) = (method := method_of(rng)).evaluation.protocols
    each = [
        camera_pairs(method.features.trial(*method.evaluation.samples[protocol, t]), "sysu") for t in (0, 1)
    ]
    found = cameras_of(method, protocol)
    pair = next(p for p in found if all(own[p].queries for own in each) and each[0][p] != each[1][p])
    assert found[pair] == pytest.approx(np.mean([own[pair] for own in each], axis=0))
    own = method_of(rng, files=2, dataset="regdb")  # a model for each trial: the first one's features
    first = own.evaluation.samples[own.evaluation.protocols[0], 0]
    assert cameras_of(own, own.evaluation.protocols[0]) == camera_pairs(own.features.trial(*first), "regdb")


def test_queries_are_chosen(rng):
    trial = random_trial(rng)
    values, q_pids = evaluate_queries(trial, "sysu"), trial.q_pids
    worst, best = (choose_queries([word], values, q_pids, 5) for word in ("worst", "best"))
    assert values.ap[worst].tolist() == np.sort(values.ap[values.counted])[:5].tolist()
    assert values.ap[best].tolist() == np.sort(values.ap[values.counted])[::-1][:5].tolist()
    random = choose_queries(["random"], values, q_pids, 5)
    assert len(set(random.tolist())) == 5
    assert values.counted[random].all()
    both = choose_queries(["3", "5"], values, q_pids, 4)
    assert q_pids[both].tolist() == [3, 5, 3, 5]
    assert values.counted[both].all()
    for wrong, message in (("0", "no query of pid 0"), ("wurst", "wurst is neither")):
        with pytest.raises(ValueError, match=message):
            choose_queries([wrong], values, q_pids)


# ---- methods side by side


def test_two_methods_are_paired_query_by_query():
    first, second = (
        QueryValues(np.zeros(6), np.zeros(6), np.array(places))
        for places in ([1, 1, 2, 3, 1, 0], [1, 4, 1, 2, 2, 0])
    )
    assert outcomes(first, second) == {"both": 1, "first": 2, "second": 1, "neither": 1}


def test_identities_are_confused_where_another_is_ranked_first(rng):
    method = method_of(rng, trials=(0,))
    listed = Listed(method.evaluation.protocols[0], Evaluated("x", method, None), None)
    ranked = listed.each.ranked(listed.protocol)
    query, gallery = listed.samples
    expected: dict = {}
    distances = 1 - (method.features.of(query) @ method.features.of(gallery).T).numpy()
    for q in np.flatnonzero(listed.values.counted):
        near = distances[q] + np.where((query.camids[q] == 3) & (gallery.camids == 2), 9, 0)
        pair = int(query.pids[q]), int(gallery.pids[near.argmin()])
        expected[pair] = expected.get(pair, 0) + (pair[0] != pair[1])
    expected = {pair: number for pair, number in expected.items() if number}
    assert len(expected) > 2
    assert confused(listed, ranked) == expected
    assert sum(expected.values()) == (listed.values.first > 1).sum()
    rows = most_confused([listed, listed], [ranked, ranked], most=2)
    assert [counts for _, _, counts in rows] == [[n, n] for n in sorted(expected.values())[::-1][:2]]
    pair, queries, _ = rows[0]
    assert queries == (query.pids[listed.values.counted] == pair[0]).sum()


def test_only_what_searches_the_same_is_paired(rng):
    one, other = method_of(rng, trials=(0,)), method_of(rng, trials=(0,))
    protocol = one.evaluation.protocols[0]
    first, second = (Listed(protocol, Evaluated("x", method, None), None) for method in (one, other))
    assert first.searches_as(first)
    assert not first.searches_as(second)  # another gallery
    same = Method("y", one.args, one.sources, Evaluation(dict(one.evaluation.samples)))
    assert first.searches_as(Listed(protocol, Evaluated("y", same, None), None))
    query, gallery = first.samples
    renamed = Samples(query.paths, query.pids + 1, query.camids, query.modality)  # as files without paths may
    same.evaluation.samples[protocol, 0] = renamed, gallery
    assert not first.searches_as(Listed(protocol, Evaluated("y", same, None), None))


# ---- similarities


def test_sampled_pairs_are_what_they_are_called():
    """Features that are one-hot in the identity: 1 within, 0 between, and never an image with itself."""
    pids = {"visible": np.array([5, 7, 5, 9, 7]), "infrared": np.array([7, 5, 7, 11])}
    codes = {5: 0, 7: 1, 9: 2, 11: 3}
    features = {m: torch.eye(4)[[codes[pid] for pid in own.tolist()]] for m, own in pids.items()}
    found = sample_similarities(features, pids, pairs=500)
    assert list(found) == ["visible-visible", "infrared-infrared", "visible-infrared"]
    for pair in found.values():
        assert set(pair.within.tolist()) == {1.0}
        assert set(pair.between.tolist()) == {0.0}
        assert 100 < len(pair.between) <= 500
    marked = {m: torch.eye(len(own)) for m, own in pids.items()}  # one-hot in the image itself
    found = sample_similarities(marked | {"infrared": torch.eye(5)[:4]}, pids, pairs=500)
    assert found["visible-visible"].within.max() == 0
    assert found["infrared-infrared"].within.max() == 0


def test_kinds_that_there_are_no_pairs_of_are_left_out():
    features = {"visible": torch.eye(2), "infrared": torch.eye(2)}
    found = sample_similarities(features, {"visible": np.array([1, 2]), "infrared": np.array([1, 2])})
    assert list(found) == ["visible-infrared"]  # no identity has two images of one modality
    empty = features | {"visible": torch.empty(0, 2)}
    assert sample_similarities(empty, {"visible": np.array([], int), "infrared": np.array([1, 1])}) == {}


def test_overlap_and_equal_error_rate():
    apart = Similarities(np.array([0.8, 0.9]), np.array([-0.1, 0.1]))
    assert (overlap(apart), equal_error_rate(apart)) == (0, 0)
    alike = Similarities(np.linspace(-0.9, 0.9, 999), np.linspace(-0.9, 0.9, 999))
    assert overlap(alike) == pytest.approx(1)
    assert equal_error_rate(alike) == pytest.approx(0.5, abs=0.01)
    narrow = Similarities(np.array([0.9998, 0.9999]), np.array([0.9993, 0.9995]))
    assert (overlap(narrow), equal_error_rate(narrow)) == (0, 0)  # as before training
    assert overlap(Similarities(np.ones(3), np.ones(2))) == 1
    quarter = Similarities(np.array([0.1, 0.6, 0.7, 0.8]), np.array([0.0, 0.2, 0.3, 0.65]))
    assert equal_error_rate(quarter) == 0.25  # at 0.6: 0.1 lies below, 0.65 above
