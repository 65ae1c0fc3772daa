"""What the network is given, where it looks, and what the figures, thumbnails and histories show."""

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
from evaluation.cameras import CameraScore
from evaluation.methods import Method
from evaluation.protocols import Evaluation, Protocol
from evaluation.rankings import Ranked
from evaluation.scoring import Features
from evaluation.similarity import (
    Similarities,
    bins,
)
from model import GeM
from reporting import figures, sprites
from reporting.evaluated import Evaluated
from reporting.learning import history_file, read_history
from reporting.views import CELLS, embed, similarity_maps
from synthetic import people, scenes
from utils import UserError, log


@pytest.fixture
def rng():
    return np.random.default_rng(0)


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


def test_a_match_that_is_not_listed_is_the_nearest_that_counts():
    query = Samples(["q0", "q1"], np.array([1, 2]), np.array([3, 3]), "infrared")
    gallery = Samples(list("abcde"), np.array([1, 2, 2, 2, 1]), np.array([1, 1, 2, 4, 1]), "visible")
    angles = {"infrared": [0.0, 1.0], "visible": [0.9, 2.0, 1.0, 1.3, 0.95]}  # c is the nearest, and ignored
    unit = {m: torch.tensor([[np.cos(a), np.sin(a)] for a in own]) for m, own in angles.items()}
    protocol = Protocol("sysu", "all")
    evaluation = Evaluation({(protocol, 0): (query, gallery)})
    features = Features.of_images({"infrared": query, "visible": gallery}, unit)
    each = Evaluated("a", Method("a", argparse.Namespace(), [], evaluation, features=features), None)
    assert [each._nearest_match(protocol, q) for q in (0, 1)] == [0, 3]


class Corners(torch.nn.Module):
    """A network that sees an infrared image's first quarter, and a visible one's last."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, visible=None, infrared=None):
        seen = infrared[:, :, :32, :16] if visible is None else visible[:, :, 32:, 16:]
        return self.weight * seen.mean((2, 3))


def test_the_maps_of_a_pair_lie_where_each_of_the_two_is_seen(rng, tmp_path):
    def samples(modality, pids, camid):
        paths = [str(tmp_path / f"{modality}{k}.png") for k in range(len(pids))]
        for path in paths:
            Image.fromarray(rng.integers(0, 256, (64, 32, 3), dtype=np.uint8)).save(path)
        return Samples(paths, np.array(pids), np.full(len(pids), camid), modality)

    protocol = Protocol("sysu", "all")
    pair = samples("infrared", [1, 2], 3), samples("visible", [1, 2, 2], 1)
    evaluation = Evaluation({(protocol, 0): pair})
    args = argparse.Namespace(dataset="sysu", img_h=64, img_w=32, test_batch=10)
    images = argparse.Namespace(height=64, width=32, pixel_range=None)
    method = Method("a", args, [], evaluation, network=Corners(), images=images)
    places = [np.array([1, 0]), np.array([2, 0, 1])]
    ranked = Ranked(places, [place < 0 for place in places], [])
    first, second = Evaluated("a", method, None).maps(protocol, [0, 1], ranked)
    assert [kind for _, kind, _ in first] == ["query", "", "wrong", "", "query", "", "right", ""]
    assert [kind for _, kind, _ in second] == ["query", "", "right", ""]
    for row in (first, second):
        for k in range(1, len(row), 4):  # what is two cells further away has no hue
            of_query, of_other = (np.ptp(row[place][0], axis=2) > 0 for place in (k, k + 2))
            assert of_query[:32, :16].mean() > 0.5 < of_other[32:, 16:].mean()
            assert not of_query[48:].any()
            assert not of_other[:16].any()

    heats, own = [], [pair[0].paths[1], pair[1].paths[2]]  # the second row, by hand
    network = {
        s.modality: lambda x, m=s.modality: F.normalize(method.network(**{m: normalize(x)})) for s in pair
    }
    for samples_of, path, other in zip(pair, own, own[::-1], strict=True):
        every = np.stack([np.asarray(Image.open(p)) for p in samples_of.paths])
        average, image = every.mean(0).astype(np.uint8), np.array(Image.open(path))
        other_modality = next(s.modality for s in pair if s is not samples_of)
        feature = network[other_modality](torch.from_numpy(np.array(Image.open(other)))[None])
        maps = similarity_maps(
            network[samples_of.modality], *map(torch.from_numpy, (image, average)), feature
        )
        heats.append(F.interpolate(maps[None], (64, 32), mode="bilinear")[0, 0].numpy())
    strongest = max(np.abs(heat).max() for heat in heats)
    for shown, heat, path in zip((second[1], second[3]), heats, own, strict=True):
        expected = figures.overlay(np.array(Image.open(path)), heat / strongest)
        assert np.abs(shown[0].astype(int) - expected).max() <= 1


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
