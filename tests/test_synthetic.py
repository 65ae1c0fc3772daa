"""synthetic: the three layouts, determinism, and infrared that is not a grey copy of the visible."""

import hashlib
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

import synthetic
from synthetic import __main__ as command
from synthetic import people, scenes
from utils import UserError, run_script

REPOSITORY = Path(__file__).resolve().parents[1]
TRAIN, TEST, IMAGES = 5, 3, 2
SMALL = {"height": 32, "width": 16}  # pixels


@pytest.fixture(scope="module", params=["sysu", "regdb", "llcm"])
def drawn(request, tmp_path_factory):
    """(plan, root) of a small drawn dataset of each layout."""
    plan = synthetic.PLANS[request.param](TRAIN, TEST, IMAGES, 7)
    root = tmp_path_factory.mktemp("synthetic") / request.param
    synthetic.draw_dataset(plan, root, seed=7, workers=0, **SMALL)
    return plan, root


def _files(root: Path) -> dict[str, str]:
    """Relative path -> digest of every file below root."""
    paths = (path for path in root.rglob("*") if path.is_file())
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    }


def _ids(path: Path) -> list[int]:
    (line,) = path.read_text().splitlines()
    return [int(word) for word in line.split(",")]


def _rows(path: Path) -> list[tuple[str, int]]:
    return [(name, int(label)) for name, label in (line.split() for line in path.read_text().splitlines())]


def test_images_are_whole_and_infrared_is_grey(drawn):
    plan, root = drawn
    assert sorted(_files(root)) == sorted(
        [
            *(photo.path for photo in plan.photos),
            *plan.texts,
            *["exp/rand_perm_cam.mat"] * (plan.dataset == "sysu"),
        ]
    )
    for photo in plan.photos:
        with Image.open(root / photo.path) as image:
            assert image.format == ("BMP" if plan.dataset == "regdb" else "JPEG")
            pixels = np.asarray(image).astype(int)
        assert pixels.shape == (32, 16, 3)
        assert (np.ptp(pixels, axis=2).max() == 0) == (photo.modality == "infrared")
    assert len(set(_files(root).values())) == len(_files(root))  # no two images alike


def test_every_identity_has_both_modalities_and_equal_counts(drawn):
    plan, _ = drawn
    seen = Counter((photo.pid, photo.modality, photo.camid) for photo in plan.photos)
    assert set(seen.values()) == {IMAGES}
    assert len({photo.pid for photo in plan.photos}) == TRAIN + TEST
    assert {pid for pid, modality, _ in seen if modality == "visible"} == {
        pid for pid, modality, _ in seen if modality == "infrared"
    }
    assert {(m, camid) for _, m, camid in seen} == {
        (m, camid) for m, cameras in synthetic.CAMERAS[plan.dataset].items() for camid in cameras
    }


def test_sysu_layout(tmp_path):
    plan = synthetic.plan_sysu(10, 2, 1, 0)
    synthetic.draw_dataset(plan, tmp_path / "sysu", workers=0, **SMALL)
    splits = [_ids(tmp_path / "sysu" / "exp" / f"{name}_id.txt") for name in ("train", "val", "test")]
    assert [len(split) for split in splits] == [8, 2, 2]
    folders = {int(path.name) for path in (tmp_path / "sysu").glob("cam[1-6]/*")}
    assert sorted(pid for split in splits for pid in split) == sorted(folders)  # disjoint, and all of them
    for folder in (tmp_path / "sysu").glob("cam[1-6]/*"):
        assert len(folder.name) == 4
        assert sorted(path.name for path in folder.iterdir()) == ["0001.jpg"]
    for pid in folders:  # a cam-3 query may not see cam 2, and still must find somebody
        assert sum((tmp_path / "sysu" / f"cam{camid}" / f"{pid:04d}").is_dir() for camid in (1, 4, 5)) >= 2


def test_sysu_permutations_have_the_published_form(tmp_path):
    synthetic.draw_dataset(synthetic.plan_sysu(8, 2, 4, 0), tmp_path / "sysu", height=16, width=8, workers=0)
    cells = scipy.io.loadmat(tmp_path / "sysu" / "exp" / "rand_perm_cam.mat")["rand_perm_cam"]
    assert cells.shape == (6, 1)
    empty = 0
    for camid in range(1, 7):
        column = cells[camid - 1, 0]
        assert column.shape == (cells[0, 0].shape[0], 1)
        for pid in range(1, len(column) + 1):
            orders = column[pid - 1, 0]
            images = len(list((tmp_path / "sysu" / f"cam{camid}" / f"{pid:04d}").glob("*.jpg")))
            assert orders.shape == (10, images)
            assert (np.sort(orders, axis=1) == np.arange(1, images + 1)).all()
            assert not images or len(np.unique(orders, axis=0)) > 1
            empty += not images
    assert empty  # ids that a camera never saw are part of the form


def test_regdb_layout(tmp_path):
    root = tmp_path / "regdb"
    synthetic.draw_dataset(synthetic.plan_regdb(TRAIN, TEST, IMAGES, 0), root, workers=0, **SMALL)
    partitions = set()
    for trial in range(1, 11):
        owners = {}
        for split, count in (("train", TRAIN), ("test", TEST)):
            pids = []
            for modality, folder in (("visible", "Visible"), ("thermal", "Thermal")):
                rows = _rows(root / "idx" / f"{split}_{modality}_{trial}.txt")
                assert Counter(label for _, label in rows) == dict.fromkeys(range(count), IMAGES)
                assert all((root / name).is_file() and name.startswith(f"{folder}/") for name, _ in rows)
                pids.append({int(name.split("/")[1]): label for name, label in rows})
            assert pids[0] == pids[1]  # one label for both modalities of an identity
            assert [pids[0][pid] for pid in sorted(pids[0])] == list(range(count))
            owners[split] = set(pids[0])
        assert owners["train"] | owners["test"] == set(range(1, TRAIN + TEST + 1))
        assert not owners["train"] & owners["test"]
        partitions.add(frozenset(owners["test"]))
    assert len(partitions) > 5  # the ten splits are not one


def test_llcm_layout(tmp_path):
    root = tmp_path / "llcm"
    synthetic.draw_dataset(synthetic.plan_llcm(TRAIN, TEST, IMAGES, 0), root, workers=0, **SMALL)
    test_ids = _ids(root / "idx" / "test_id.txt")
    assert len(test_ids) == TEST
    for name in ("vis", "nir"):
        rows = _rows(root / "idx" / f"train_{name}.txt")
        assert {path for path, _ in rows} == {
            p.relative_to(root).as_posix() for p in (root / name).glob("*/*")
        }
        labels = {int(path.split("/")[1]): label for path, label in rows}
        assert [labels[pid] for pid in sorted(labels)] == list(range(TRAIN))
        assert not set(labels) & set(test_ids)
        folders = list((root / f"test_{name}").glob("cam*/*"))
        assert {int(folder.name) for folder in folders} == set(test_ids)
        for folder in folders:
            for path in folder.iterdir():
                pid, camera, *_, suffix = path.name.split("_")
                assert (pid, f"cam{int(camera[1:])}") == (folder.name, folder.parent.name)
                assert suffix == f"{name}.jpg"


def test_same_seed_same_bytes_whatever_the_workers(tmp_path):
    def draw(name: str, seed: int, workers: int) -> dict[str, str]:
        plan = synthetic.plan_sysu(3, 2, 1, seed)
        synthetic.draw_dataset(plan, tmp_path / name, seed, 64, 32, workers)
        return _files(tmp_path / name)

    one = draw("one", 7, workers=1)
    assert draw("two", 7, workers=2) == one
    assert not set(draw("other", 8, workers=1).values()) & set(one.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other", "two"]


def test_the_command(tmp_path):
    sizes = "--identities 3 --test-identities 2 --images 1 --seed 7 --workers 2 --img-h 64 --img-w 32"
    outputs = ["--data-path", tmp_path / "data", "--contact-sheet", tmp_path / "sheet.png"]
    words = [sys.executable, "-m", "synthetic", "--dataset", "sysu", *sizes.split(), *outputs]
    run = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "images of 3 training and 2 test identities" in run.stdout
    plan = synthetic.plan_sysu(3, 2, 1, 7)
    assert set(_files(tmp_path / "data")) == {s.path for s in plan.photos} | {
        *plan.texts,
        "exp/rand_perm_cam.mat",
    }
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 5 * 64  # a row for each identity
        assert sheet.width > 6 * 32  # a column for each camera


@pytest.mark.parametrize("changed", ["visible", "infrared", "thermal"])
def test_a_spectrum_sees_its_own_side_of_a_garment_only(changed):
    who = people.make_identity(0, 1)
    value = (0.9, 0.1, 0.1) if changed == "visible" else 1 - getattr(who.top.ink, changed)
    dressed = replace(who, top=replace(who.top, ink=replace(who.top.ink, **{changed: value})))
    cameras = {
        "visible": scenes.make_camera(0, "visible", 1),
        "infrared": scenes.make_camera(0, "infrared", 3),
        "thermal": scenes.make_camera(0, "infrared", 3, thermal=True),
    }
    for spectrum, camera in cameras.items():
        one, two = (people.render(x, camera, np.random.default_rng(0), 64, 32) for x in (who, dressed))
        assert (one.tobytes() != two.tobytes()) == (spectrum == changed)


def test_infrared_reflectance_does_not_follow_visible_brightness():
    people_ = [people.make_identity(3, pid) for pid in range(600)]
    cloths = [getattr(who, part) for who in people_ for part in ("top", "bottom", "inner", "shoes")]
    inks = [cloth.ink for cloth in cloths if cloth.pattern == "plain"]
    assert len(inks) > 1000
    visible = [np.mean(ink.visible) for ink in inks]
    for other in ([ink.infrared for ink in inks], [ink.thermal for ink in inks]):
        assert abs(np.corrcoef(visible, other)[0, 1]) < 0.1
        assert np.std(other) > 0.1


def test_the_lighter_ink_of_a_pattern_is_the_lighter_in_infrared():
    cloths = [getattr(people.make_identity(3, pid), part) for pid in range(200) for part in ("top", "bottom")]
    patterned = [cloth for cloth in cloths if cloth.pattern != "plain"]
    assert len(patterned) > 200
    steps = np.array(
        [
            [np.mean(c.accent.visible) - np.mean(c.ink.visible), c.accent.infrared - c.ink.infrared]
            for c in patterned
        ]
    )
    assert (steps[:, 0] * steps[:, 1] > 0).all()
    assert 0.3 < (steps[:, 0] > 0).mean() < 0.7


def test_identities_look_different_in_infrared():
    camera = scenes.make_camera(0, "infrared", 3)
    images = [
        np.asarray(people.render(people.make_identity(0, pid), camera, np.random.default_rng(0), 64, 32))
        for pid in range(1, 41)
    ]
    stack = np.stack(images)[..., 0].astype(float)
    distance = np.abs(stack[:, None] - stack[None]).mean((2, 3)) + 255 * np.eye(len(stack))
    assert distance.min() > 3  # grey levels, averaged over the whole image


@pytest.mark.parametrize("dataset", ["sysu", "regdb", "llcm"])
def test_the_smallest_dataset(dataset, tmp_path):
    plan = synthetic.PLANS[dataset](2, 2, 1, 0)
    synthetic.draw_dataset(plan, tmp_path / "tiny", height=16, width=8, workers=0)
    synthetic.contact_sheet(plan, tmp_path / "tiny", tmp_path / "sheet.png", identities=3)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height == 34 + 3 * (16 + 4)


def test_a_folder_with_something_in_it_is_refused_untouched(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
    arguments = ["--dataset", "sysu", "--data-path", str(tmp_path / "data")]
    with pytest.raises(SystemExit) as stop:
        run_script(command.main, lambda: command.get_args_parser().parse_args(arguments))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--data-path {tmp_path / 'data'}" in line
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "thesis.txt"]


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    def fail(photo, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic, "draw_photo", fail)
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=r"^--data-path .*data: cannot be written: No space left on device$"):
        synthetic.draw_dataset(synthetic.plan_sysu(2, 2, 1, 0), tmp_path / "data", workers=0)
    assert [path.name for path in tmp_path.rglob("*")] == ["data"]


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--identities", 1), ("--test-identities", 1), ("--images", 0), ("--seed", -1), ("--dataset", "market")],
)
def test_bad_values_name_the_flag(flag, value, tmp_path):
    arguments = ["--dataset", "sysu", "--data-path", str(tmp_path / "data"), flag, str(value)]
    with pytest.raises(UserError, match=f"^argument {flag}"):
        command.get_args_parser().parse_args(arguments)


def test_drawing_needs_no_torch():
    code = (
        "import sys, numpy; from synthetic import people, scenes;"
        "camera = scenes.make_camera(0, 'visible', 1);"
        "people.render(people.make_identity(0, 1), camera, numpy.random.default_rng(0), 16, 8);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_an_infrared_scene_is_lit_everywhere():
    camera = scenes.make_camera(0, "infrared", 3)
    for seed in range(60):
        canvas = scenes.Canvas(40, 20, camera)
        canvas.pixels[:] = 1
        image = np.asarray(scenes.develop(canvas, np.random.default_rng(seed)))
        assert image.min() > 0.2 * image.max()
