"""tools.check: a complete dataset passes, every problem is listed, and what no split takes is named."""

import dataclasses
import re

import numpy as np
import pytest
from conftest import run_script, tiny_flags
from layouts import llcm, regdb, small_sysu, write
from PIL import Image

from data_manager import DATASETS
from tools.check import check


def run_check(name, root):
    return run_script("tools.check", "--dataset", name, "--data-path", root, cwd=root)


def picture(path):
    Image.new("RGB", (4, 8)).save(path)


def row(lines, *names):
    """What the table has after split, modality and camera; columns are at least two spaces apart."""
    table = [re.split(" {2,}", line) for line in lines]
    return next(cells[3:] for cells in table if tuple(cells[:3]) == names)


def test_check_counts_a_partial_sysu(tmp_path):
    root = small_sysu(tmp_path, images=2)
    for file in root.glob("cam*/*/*"):
        picture(file)
    result = run_check("sysu", root)
    assert result.returncode == 1, result.stderr
    lines = result.stdout.splitlines()
    assert row(lines, "train", "visible", "1") == ["2", "-", "4", "-"]
    assert row(lines, "train+val", "visible", "all") == ["3", "395", "24", "22,258", "differs"]
    assert row(lines, "train+val", "infrared", "all") == ["3", "395", "12", "11,909", "differs"]
    assert row(lines, "test", "visible", "5") == ["1", "-", "2", "1,918", "differs"]
    assert row(lines, "test", "infrared", "all") == ["2", "-", "8", "3,803", "differs"]
    assert lines[-1] == "not complete: 12 counts differ, 0 problems"
    assert "train.py works with it" in lines[-2]
    assert len({line.find("published") for line in lines if "published" in line}) == 1


def test_check_passes_what_matches_and_lists_every_problem(tmp_path, monkeypatch):
    root = small_sysu(tmp_path, images=2)
    for file in root.glob("cam*/*/*"):
        picture(file)
    published = {
        (("train", "val"), "visible", "all"): (3, 24),
        (("test",), "infrared", "3"): (None, 4),
        (("test",), "both", "all"): (2, None),
    }
    monkeypatch.setitem(DATASETS, "sysu", dataclasses.replace(DATASETS["sysu"], published=published))
    (root / "cam4/0099").mkdir()
    picture(root / "cam4/0099/0001.jpg")
    (root / "cam4/0098").mkdir()
    lines, complete = check("sysu", root)
    assert complete
    assert lines[-1] == "complete"
    assert [line for line in lines if "note" in line and line.endswith("in no split: id 99")]

    whole = (root / "cam1/0002/0001.jpg").read_bytes()
    (root / "cam1/0002/0001.jpg").write_bytes(whole[: len(whole) - 300])
    lines, complete = check("sysu", root)
    assert not complete
    assert lines[-1] == "not complete: 0 counts differ, 1 problems"
    (root / "cam2/0003/0002.jpg").write_bytes(b"")
    (root / "cam3/0007/0009.jpg").symlink_to(root / "gone.jpg")
    (root / "cam6/0007/0010.png").mkdir()
    write(root / "exp/test_id.txt", "2,40,41,3")
    lines, complete = check("sysu", root)
    problems = [line for line in lines if line.startswith("problem: ")]
    assert not complete
    for word in ("cam1/0002/0001.jpg", "cam2/0003/0002.jpg", "cam3/0007/0009.jpg", "cam6/0007/0010.png"):
        assert sum(word in problem for problem in problems) == 1
    assert [problem for problem in problems if "no images" in problem and problem.endswith("id 41")]
    assert [problem for problem in problems if "also in train_id.txt" in problem and problem.endswith("id 3")]
    assert len(problems) == 6

    (root / "exp/test_id.txt").unlink()
    lines, complete = check("sysu", root)
    assert not complete
    assert row(lines, "test", "infrared", "3") == ["0", "-", "0", "4", "differs"]
    assert [line for line in lines if "test_id.txt: missing" in line]


def test_check_regdb_and_llcm(tmp_path):
    root = regdb(tmp_path / "regdb")
    for file in root.glob("*/*/*.bmp"):
        picture(file)
    with open(root / "idx/test_thermal_4.txt", "a") as file:
        file.write("Thermal/7/gone.bmp 3\nThermal/7\n")
    lines, complete = check("regdb", root)
    assert not complete
    assert row(lines, "test 10", "infrared", "2") == ["2", "206", "4", "2,060", "differs"]
    problems = [line for line in lines if line.startswith("problem: ")]
    assert ["line 5" in problems[0], "line 6" in problems[1], len(problems)] == [True, True, 2]

    root = llcm(tmp_path / "llcm")
    for file in [*root.glob("*/*/*.jpg"), *root.glob("*/*/*/*.png")]:
        picture(file)
    lines, complete = check("llcm", root)
    assert not complete
    assert row(lines, "test", "visible", "3") == ["2", "-", "10", "-"]
    assert row(lines, "train", "both", "all") == ["2", "713", "4", "30,921", "differs"]
    assert row(lines, "train+test", "both", "all") == ["4", "1,064", "54", "46,767", "differs"]
    assert not [line for line in lines if line.startswith("problem: ")]


def test_check_names_what_no_split_takes(tmp_path):
    root = small_sysu(tmp_path, images=2)
    for file in root.glob("cam*/*/*"):
        picture(file)
    clutter = ("cam1/0002/Thumbs.db", "cam1/0002/.hidden.jpg", ".git/x.jpg", "train_rgb_resized_img.npy")
    for name in (*clutter, "cam1/0002/0003.raw", "cam1/12/0001.jpg", "cam7/0002/0001.jpg", "cam8/0003/a.png"):
        write(root / name)
    notes = [line.partition(f"{root}: ")[2] for line in check("sysu", root)[0] if line.startswith("note: ")]
    assert notes[:-1] == [
        "not read, because SYSU-MM01 has no such camera: cam7, cam8",
        "images not taken, 1: cam1/12/0001.jpg",
        "files without an image's suffix not taken, 1: cam1/0002/0003.raw",
    ]


def test_check_knows_that_llcm_holds_its_test_images_twice(tmp_path):
    root = llcm(tmp_path)
    write(root / "vis/0009/0009_1.png")  # as test_vis/cam1/0009/0009_1.png
    write(root / "vis/0009/0009_9.png")
    notes = [line for line in check("llcm", root)[0] if "not taken" in line]
    assert [note.partition("not taken, ")[2] for note in notes] == ["1: vis/0009/0009_9.png"]


@pytest.mark.parametrize(
    ("value", "words"), [(np.nan, "NaN"), (None, "single value"), (0, "")], ids=["NaN", "flat", "fine"]
)
def test_check_refuses_the_pixels_that_train_refuses(tmp_path, train_here, value, words):
    """A folder of floating-point images: what check prints is what train.py says."""
    rng = np.random.default_rng(0)
    for pid in "abcd":
        for modality in ("visible", "infrared"):
            (tmp_path / f"data/{modality}/{pid}").mkdir(parents=True)
            values = rng.uniform(20, 40, (16, 8)).astype(np.float32)
            values = np.full_like(values, values[0, 0]) if value is None else values
            Image.fromarray(values).save(tmp_path / f"data/{modality}/{pid}/1.tif")
    root = tmp_path / "data"
    write(root / "test_identities.txt", "c\nd\n")
    if value is not None and np.isnan(value):
        values[:] = np.nan
        Image.fromarray(values).save(root / "infrared/a/1.tif")
    problems = [line for line in check("folder", root)[0] if line.startswith("problem: ")]
    status, _, errors = train_here("--dataset", "folder", "--check", *tiny_flags(root), "--batch-size", "2")
    assert (status, bool(problems)) == ((2, True) if words else (0, False)), errors
    if words:
        assert words in problems[0]
        assert problems[0].removeprefix("problem: ").split(" (")[0] in errors[-1]


def test_check_refuses_val_ids_that_are_trained_on(tmp_path):
    root = small_sysu(tmp_path)
    write(root / "exp/val_id.txt", "7,12")
    problems = [line for line in check("sysu", root)[0] if "also in" in line]
    assert len(problems) == 1
    assert "val_id.txt: also in train_id.txt" in problems[0]
    assert problems[0].endswith("id 12")


def test_check_tells_the_trials_whose_lists_overlap(tmp_path):
    root = regdb(tmp_path)
    write(root / "idx/test_visible_3.txt", (root / "idx/train_visible_3.txt").read_text(encoding="utf-8"))
    problems = [line for line in check("regdb", root)[0] if "also in" in line]
    assert len(problems) == 1
    assert "test_visible_3.txt: also in train_visible_3.txt" in problems[0]


def test_check_of_nothing_is_wrong_usage(tmp_path):
    for name, words in (("sysu", "not found"), ("sysuu", "sysuu")):
        result = run_check(name, tmp_path)
        assert result.returncode == 2
        assert result.stdout == ""
        assert words in result.stderr.splitlines()[-1]
