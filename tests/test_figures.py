"""results/: rankings and similarities against naive loops, and what the figures and the sheets show."""

import argparse
import base64
import io
import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from augmentation import normalize
from data_manager import Samples
from engine.events import Board, augmentation_grid
from eval_metrics import QueryValues, Trial, eval_features, evaluate_queries, ignored_pairs
from evaluation import rankings
from evaluation.cameras import CameraScore, camera_pairs, cameras_of
from evaluation.features import FeatureFile
from evaluation.methods import Method
from evaluation.protocols import Evaluation, Protocol
from evaluation.rankings import choose_queries, rank_queries
from evaluation.scoring import Features
from evaluation.similarity import (
    Similarities,
    bins,
    equal_error_rate,
    overlap,
    sample_similarities,
)
from model import GeM
from reporting import figures, sprites
from reporting.comparing import Listed, confused, most_confused, outcomes
from reporting.evaluated import Evaluated
from reporting.learning import history_file, read_history
from reporting.views import CELLS, embed, similarity_maps
from synthetic import people, scenes
from utils import UserError, log


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


# ---- what the network is given, where it looks


def test_the_grid_undoes_the_normalisation():
    rng = np.random.default_rng(0)
    pixels = {m: rng.integers(0, 256, (3, 8, 4, 3), dtype=np.uint8) for m in ("visible", "aux", "infrared")}
    grid = augmentation_grid({m: normalize(torch.from_numpy(own)) for m, own in pixels.items()}, columns=2)
    assert (grid.dtype, tuple(grid.shape)) == (torch.uint8, (3, 3 * 10, 2 * 6))
    for row, own in enumerate(pixels.values()):  # in this order
        for column in range(2):
            top, left = 10 * row + 1, 6 * column + 1
            cell = grid[:, top : top + 8, left : left + 4].permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(cell, own[column])
    assert grid[:, 0].min() == 255  # a white line


class Writer:
    """Notes what a SummaryWriter is asked for."""

    def __init__(self):
        self.added = {}

    def __getattr__(self, method):
        def add(name, value, epoch):
            self.added[name] = (method, value, epoch)

        return add

    def flush(self):
        pass


def test_what_tensorboard_gets(sysu):
    board = Board(None, 0)
    board.writer = writer = Writer()
    board.add_batch({m: torch.zeros(2, 3, 8, 4) for m in ("visible", "aux", "infrared")})
    ((method, grid, epoch),) = writer.added.values()
    assert (method, tuple(grid.shape), epoch) == ("add_image", (3, 30, 12), 0)

    evaluation = Evaluation.draw(sysu, [Protocol("sysu", "all")], range(10))
    images = evaluation.images()
    pids = np.unique(images["visible"].pids)
    onehot = {m: torch.eye(len(pids))[np.searchsorted(pids, own.pids)] for m, own in images.items()}
    features = Features.of_images(images, onehot)
    board.writer = writer = Writer()
    board.add_evaluation({"epoch": 3, "evaluation": {"metrics": {"mAP": 0}}}, features, evaluation)
    assert len(writer.added) == 3 * 4 + 1
    for name, (method, value, epoch) in writer.added.items():
        assert epoch == 3
        if name.startswith("similarity"):
            assert method == "add_histogram"
            assert set(value.tolist()) == {1.0 if "within" in name else 0.0}
        else:
            assert (method, value) == ("add_scalar", 0)


def test_a_missing_tensorboard_is_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(log, "handlers", [])  # where a command has run before, caplog listens here too
    board = Board(tmp_path / "events", 0)
    board.add_epoch(record_of(1, {"total": 1.0}) | {"seconds": {"waiting": 0.0, "steps": 1.0}})
    board.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "tensorboard" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_map_says_what_the_similarities_lose_with_a_place():
    """Of a network that sees two pixels alone: each window that covers one of them loses its part."""
    pixels = {(31, 13): 0, (2, 1): 1}  # in the cells (7, 3) and (0, 0)
    image, average = torch.full((32, 16, 3), 50, dtype=torch.uint8), torch.zeros(32, 16, 3, dtype=torch.uint8)

    def see(images):
        return torch.stack([images[:, y, x, 0].float() for y, x in pixels], 1)

    found = similarity_maps(see, image, average, torch.tensor([[1.0, 0.0], [0.5, -1.0]]))
    expected = torch.zeros(2, *CELLS)
    for (row, column), weights in (((7, 3), (50, 25)), ((0, 0), (0, -50))):
        for y, x in np.ndindex(CELLS):  # how many of a cell's four windows cover the other cell
            both = max(0, 2 - abs(y - row)) * max(0, 2 - abs(x - column))
            expected[:, y, x] += torch.tensor(weights) * both / 4
    torch.testing.assert_close(found, expected)


def see_patches(images):
    """Unit features of a network that looks at each patch of 8 x 8 pixels alone."""
    patches = F.avg_pool2d(torch.cat([images, 255 - images], -1).permute(0, 3, 1, 2) / 255, 8)
    return F.normalize(GeM()(patches))


@pytest.mark.parametrize("part", ["top", "bottom"])
def test_the_map_lies_on_the_garment_in_which_people_differ(part):
    """And not where the image is bright, nor elsewhere on a blank or a mirrored image."""
    who = replace(people.make_identity(9, 3), bag_style="none", opening=0.0, bottom_cut="wide")
    camera = scenes.make_camera(5, "visible", 1)
    cloths = [scenes.plain_cloth((v, v, v), 0.5, 0.5) for v in (0.15, 0.9)]
    drawn = torch.stack([
        torch.from_numpy(np.array(
            people.render(replace(who, **{part: cloth}), camera, np.random.default_rng(1), 160, 64)
        ))
        for cloth in cloths
    ])  # fmt: skip
    features, average = see_patches(drawn).detach(), drawn.float().mean(0).round().byte()
    differs = (drawn[0] != drawn[1]).any(2)
    cells = differs.reshape(CELLS[0], 20, CELLS[1], 16).permute(0, 2, 1, 3).flatten(2).float().mean(2)
    near = F.max_pool2d(cells[None], 3, 1, 1)[0] > 0  # a window there covers the garment
    assert not near.all()
    own, other = similarity_maps(see_patches, drawn[0], average, features)
    assert own[~near].abs().max() < 1e-6
    assert np.corrcoef(cells.flatten(), own.flatten())[0, 1] > 0.9
    assert own.sum() > 0 > other.sum()  # the garment tells who it is, and who not
    mirrored = similarity_maps(see_patches, drawn[0].flip(1), average.flip(1), features[:1])[0]
    torch.testing.assert_close(mirrored, own.flip(1), rtol=0, atol=1e-6)
    blank = torch.full_like(average, 128)
    assert similarity_maps(see_patches, blank, blank, features).abs().max() < 1e-6  # nothing of its own


def test_the_overlay_has_two_hues():
    image = np.full((2, 3, 3), 100, np.uint8)
    colours = figures.overlay(image, np.array([[1.0, 0, -1], [0, 0, 0]]))
    assert colours[0, 0, 0] > colours[0, 0, 2]  # orange
    assert colours[0, 2, 2] > colours[0, 2, 0]  # blue
    assert (colours[1] == 100).all()


def test_few_features_are_placed_by_principal_components(rng):
    features = rng.normal(size=(9, 8)) * [9, 3, 1, 1, 1, 1, 1, 1]
    points, method = embed(features)
    assert method == "PCA"
    centred = features - features.mean(0)
    variance = np.sort(np.linalg.eigvalsh(centred.T @ centred))[::-1]
    np.testing.assert_allclose(np.square(points).sum(0), variance[:2])


def test_tsne_keeps_groups_together(rng):
    groups = np.repeat(np.arange(3), 10)
    points, method = embed(np.eye(3)[groups] + rng.normal(size=(30, 3)) / 50)
    assert method == "t-SNE"
    nearest = np.linalg.norm(points[:, None] - points, axis=2)
    np.fill_diagonal(nearest, np.inf)
    assert (groups[nearest.argmin(1)] == groups).all()


# ---- figures


CAMERAS = {(3, 1): CameraScore(0.5, 0.25, 1234, 8), (3, 2): CameraScore(np.nan, np.nan, 0, 7)}


def every_figure(rng):
    pair = Similarities(rng.normal(0.6, 0.1, 300), rng.normal(0, 0.1, 300))
    curve = np.linspace(0.5, 1, 20), np.full(20, 0.02)
    image = rng.integers(0, 256, (20, 10, 3), dtype=np.uint8)
    kinds = ["query", "right", "wrong", "ignored", ""]
    return {
        "cmc": figures.cmc({"SYSU, all": {"A": curve, "B": curve}, "SYSU, indoor": {"A": curve}}),
        "histogram": figures.histogram(
            {"visible-infrared": {"A": pair}, "visible-visible": {"A": pair, "B": pair}},
            {"A": bins([pair]), "B": bins([pair])},
        ),
        "embedding": figures.embedding(
            rng.normal(size=(8, 2)), np.repeat([11, 22], 4), ["visible", "infrared"] * 4, "PCA"
        ),
        "cameras": figures.cameras({"rank-1": CAMERAS, "mAP": CAMERAS}),
        "images": figures.images([[(image, kind, f"is {kind}") for kind in kinds], [(image, "", "alone")]]),
        "curves": figures.curves(
            {"loss": {"A": {1: 2.0, 2: 1.0}, "B": {1: 3.0}}, "mAP": {"A": {2: 50.0, 4: 60.0}}}
        ),
    }


def test_each_figure_becomes_files_and_a_picture_in_the_page(rng, tmp_path):
    words = {
        "cmc": ["A: rank-1 50.00 %", "SYSU, indoor"], "histogram": ["visible–infrared", "within identities"],
        "embedding": ["infrared", "PCA of 8 images of 2 identities, each with its pid"],
        "cameras": ["50.0", "25.0", "none", "1,234 × 8", "rank-1 (%)", "mAP (%)"],
        "images": ["✓ is right", "✗ is wrong", "– is ignored", "alone"], "curves": ["loss", "mAP (%)", "B"],
    }  # fmt: skip
    for name, figure in every_figure(rng).items():
        paths = figures.save(figure, tmp_path / "new", name)
        assert [path.name for path in paths] == [f"{name}.png", f"{name}.pdf"]
        with Image.open(paths[0]) as picture:
            assert picture.format == "PNG"
        assert paths[1].read_bytes().startswith(b"%PDF")
        text = figures.svg(figure)
        assert text.startswith("<svg")
        assert "currentColor" in text
        assert figures.INK not in text
        assert not [word for word in words[name] if f"{word}<" not in text]


def test_the_same_data_gives_the_same_files(tmp_path):
    contents = []
    for folder in "ab":
        drawn = every_figure(np.random.default_rng(1))
        for name in ("cmc", "images"):
            figures.save(drawn[name], tmp_path / folder, name)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()})
    assert contents[0] == contents[1]


def test_right_and_wrong_differ_in_shape_as_in_colour(rng):
    image = np.full((20, 10, 3), 128, np.uint8)
    figure = figures.images([[(image, kind, "") for kind in ("right", "wrong", "ignored")]])
    (axis,) = figure.axes
    assert len({frame.get_linestyle() for frame in axis.patches}) == 3
    assert len({frame.get_edgecolor() for frame in axis.patches}) == 3
    assert len({text.get_text() for text in axis.texts}) == 3


def test_no_label_of_the_embedding_covers_another(rng):
    """Not even where identities lie on one another; and the labels stay in the figure."""
    middles = rng.normal(size=(20, 2)).repeat(2, axis=0)
    points = middles.repeat(4, axis=0) + rng.normal(size=(160, 2)) / 99
    figure = figures.embedding(points, np.arange(1000, 1040).repeat(4), ["visible", "infrared"] * 80, "PCA")
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    labels = [text for text in figure.axes[0].texts if text.get_text().isdecimal()]
    assert len(labels) == 40
    boxes = [Text.get_window_extent(text, renderer) for text in labels]  # without the line to the point
    assert not [1 for k, box in enumerate(boxes) for other in boxes[:k] if box.overlaps(other)]


def test_one_colour_is_for_identities_that_lie_far_apart():
    pairs = np.array([[0, 0], [9, 0], [0, 9], [0, 1], [9, 1], [0, 8]], float)
    colors = figures.far_apart(pairs, 3)
    assert set(colors) == {0, 1, 2}
    near = [k for k in range(6) for j in range(k) if np.linalg.norm(pairs[k] - pairs[j]) < 2]
    assert near == [3, 4, 5]
    assert all(colors[k] != colors[k - 3] for k in near)
    assert len(set(figures.far_apart(pairs[:3], 3))) == 3  # as many as there are, while there are enough


def test_the_histogram_of_an_untrained_network_is_not_a_line(rng):
    pairs = {
        "trained": Similarities(rng.normal(0.6, 0.1, 300), rng.normal(0, 0.1, 300)),
        "untrained": Similarities(1 - rng.random(300) / 1e4, 1 - rng.random(300) / 1e4),
    }
    edges = {label: bins([pair]) for label, pair in pairs.items()}
    figure = figures.histogram({"visible-infrared": pairs}, edges)
    for axis in figure.axes:
        low, high = axis.get_xlim()
        for steps in axis.patches:
            values, steps_at, _ = steps.get_data()
            seen = steps_at[:-1][values > 0]
            assert np.ptp(seen) > 0.3 * (high - low)


def test_one_value_is_a_level_and_no_dot():
    figure = figures.curves({"mAP": {"trained": {2: 20.0, 4: 40.0}, "untrained": {0: 10.0}}})
    curve, level = figure.axes[0].lines
    assert curve.get_xydata().tolist() == [[2, 20], [4, 40]]
    assert (level.get_ydata(), level.get_xdata(), level.get_marker()) == ([10.0, 10.0], [0, 1], "None")
    assert [text.get_text() for text in figure.legends[0].texts] == ["trained", "untrained"]


def test_a_figure_that_cannot_be_written_is_told(rng, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/cameras\.png"):
        figures.save(figures.cameras({"mAP": CAMERAS}), tmp_path / "file", "cameras")
    assert os.listdir(tmp_path) == ["file"]


# ---- sheets of thumbnails


def opened(url):
    head, body = url.split(",")
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))).convert("RGB")).astype(int)


def test_each_thumbnail_stands_in_its_place():
    colors = np.random.default_rng(0).integers(0, 256, (70, 3))
    thumbnails = np.broadcast_to(colors[:, None, None], (70, 16, 8, 3)).astype(np.uint8)
    pages = list(map(opened, sprites.sheets([thumbnails[:5], thumbnails[5:]])))
    assert [page.shape for page in pages] == [(8 * 16, 8 * 8, 3)] * 2
    for k, color in enumerate(colors):
        row, column = divmod(k % 64, 8)
        middle = pages[k // 64][16 * row + 4 : 16 * row + 12, 8 * column + 2 : 8 * column + 6]
        assert np.abs(middle.mean((0, 1)) - color).max() < 30


def test_quality_gives_way_to_the_budget(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (64, 32, 16, 3), dtype=np.uint8)
    (free,) = sprites.sheets([noise])
    monkeypatch.setattr(sprites, "BUDGET", len(free) // 3)
    (tight,) = sprites.sheets([noise])
    assert len(tight) * 3 / 4 <= sprites.BUDGET
    monkeypatch.setattr(sprites, "BUDGET", 100)
    with pytest.raises(UserError, match="64 thumbnails are too many"):
        sprites.sheets([noise])


def test_many_thumbnails_are_smaller():
    assert sprites.thumbnail_size(100, 384, 128) == (128, 43)
    tall, wide = sprites.thumbnail_size(20000, 384, 128)
    assert 48 <= tall < 100
    assert wide == round(tall / 3)


# ---- histories


def record_of(epoch, loss=None, metrics=None, command="python train.py --lr 0.1"):
    record = {"epoch": epoch, "made_with": {"command": command, "device": "cpu"}}
    if loss:
        record |= {"loss": loss, "rate": 10.0**-epoch, "images_per_second": 50 * epoch}
    return record | ({"evaluation": {"metrics": metrics, "best": True}} if metrics else {})


def test_a_history_that_was_resumed_and_one_that_is_none(tmp_path):
    path = tmp_path / "r.jsonl"
    metrics = {"rank-1": 0.125, "rank-10": 0.6, "mAP": 0.1125, "mINP": 0.05}
    records = [
        record_of(0, metrics=metrics),  # as of --epochs 0
        record_of(1, {"total": 3.5, "shared": 2.5, "align": 1.0}),
        record_of(2, {"total": 2.5, "shared": 2.0, "align": 0.5}, metrics, "python train.py --resume auto"),
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    curves, facts = read_history(path)
    assert curves == {
        "loss": {1: 3.5, 2: 2.5}, "shared": {1: 2.5, 2: 2.0}, "align": {1: 1.0, 2: 0.5},
        "rate": {1: 0.1, 2: 0.01}, "images/s": {1: 50, 2: 100},
        "rank-1": {0: 12.5, 2: 12.5}, "mAP": {0: 11.25, 2: 11.25}, "mINP": {0: 5.0, 2: 5.0},
    }  # fmt: skip
    assert facts == [
        ("command", "python train.py --lr 0.1"),
        ("device", "cpu"),
        ("command", "python train.py --resume auto"),
    ]
    for rubbish in (b"\xff\xfe no history", b"[1]\n", b'{"epoch": 1}\n'):
        path.write_bytes(rubbish)
        with pytest.raises(UserError, match=r"r\.jsonl is no history of a run"):
            read_history(path)


def test_where_a_history_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint, saved = (
        tmp_path / "moved" / "save_model" / "run_best.t",
        {"dataset": "llcm", "log_path": "log"},
    )
    assert history_file(checkpoint, saved) is None
    place = tmp_path / "moved" / "log" / "llcm_log" / "run.jsonl"
    place.parent.mkdir(parents=True)
    place.write_text("")
    assert history_file(checkpoint, saved) == place
    assert history_file(checkpoint, saved, str(place.parents[1])) == place
    with pytest.raises(UserError, match="--log-path elsewhere: no history at"):
        history_file(checkpoint, saved, "elsewhere")
