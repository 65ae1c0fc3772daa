"""readers/arrays.py: the arrays of training images on disk, whole, fresh and checked."""

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_images, ramp, read_slowly, save_values

from images import UnreadableImages, decode, read_image
from readers import arrays as storage_arrays
from readers.arrays import ArrayFiles, TrainingImages, write_array
from utils import UserError

LABELS = {"visible": np.array([0, 0, 1, 2, 2]), "infrared": np.array([2, 1, 0])}
PIDS = [4, 7, 30]


def test_write_array_writes_what_decode_yields(tmp_path):
    paths = draw_images(tmp_path / "images", 70)
    seen = []
    write_array(paths, tmp_path / "a.npy", 20, 8, 2, seen.append)
    expected = np.concatenate(list(decode(paths, 20, 8, 2)))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), expected)
    assert sum(seen) == 70


def test_arrays_keep_the_range_that_they_were_decoded_by(tmp_path):
    (tmp_path / "data").mkdir()
    values = [ramp(29000 + 100 * k, 31000 + 100 * k, np.uint16) for k in range(4)]
    deep = [save_values(tmp_path / f"data/{k}.png", part) for k, part in enumerate(values)]
    paths = {"visible": draw_images(tmp_path / "data/visible", 4), "infrared": deep}
    labels = {modality: np.array([0, 0, 1, 1]) for modality in paths}
    files, source = ArrayFiles(tmp_path / "arrays", 20, 8), (TrainingImages(paths, labels, [3, 4]), 2)
    arrays = files.load_or_write(*source)
    assert arrays.pixel_range == (29000, 31300)
    expected = [read_image(path, 20, 8, arrays.pixel_range) for path in deep]
    np.testing.assert_array_equal(arrays.images["infrared"], np.stack(expected))
    assert files.load_or_write(*source, pixel_range=[29000.0, 31300.0]).pixel_range == (29000, 31300)
    another = r"rgb_resized_img\.npy: made with another .*--pixel-range 27315 33315"
    with pytest.raises(UserError, match=another):
        files.load(paths, (27315, 33315))
    again = files.load_or_write(*source, pixel_range=(27315, 33315))
    assert again.pixel_range == (27315, 33315)
    assert (again.images["infrared"] != arrays.images["infrared"]).any()
    assert np.ptp(again.images["infrared"]) < np.ptp(np.stack(expected))
    for _ in range(2):  # a range that was given for one run is not another run's
        assert files.load_or_write(*source).pixel_range == (29000, 31300)


@pytest.fixture
def paths(tmp_path):
    return {
        modality: draw_images(tmp_path / "data" / modality, len(part), seed=len(part))
        for modality, part in LABELS.items()
    }


@pytest.fixture
def folder(tmp_path, paths):
    ArrayFiles(tmp_path / "arrays", 20, 8).write(TrainingImages(paths, LABELS, PIDS), 2)
    return tmp_path / "arrays"


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def test_training_arrays_come_back(folder, paths):
    arrays = ArrayFiles(folder, 20, 8).load(paths)
    for modality, part in paths.items():
        np.testing.assert_array_equal(
            arrays.images[modality], np.stack([read_slowly(p, 20, 8) for p in part])
        )
        np.testing.assert_array_equal(arrays.labels[modality], LABELS[modality])
        assert arrays.labels[modality].dtype == np.int64
        assert isinstance(arrays.images[modality], np.memmap)
    assert arrays.pids == PIDS
    assert arrays.fingerprint == storage_arrays.fingerprint(paths)


def test_training_arrays_have_the_names_of_this_family_of_code(folder):
    names = {f"train_{word}_resized_{kind}.npy" for word in ("rgb", "ir") for kind in ("img", "label")}
    assert set(contents(folder)) == names | {"train_resized.json"}


def test_fingerprint_moves_with_the_dataset(tmp_path, paths):
    before = storage_arrays.fingerprint(paths)
    shutil.move(tmp_path / "data", tmp_path / "moved")
    moved = {
        modality: [path.replace("/data/", "/moved/") for path in part] for modality, part in paths.items()
    }
    assert storage_arrays.fingerprint(moved) == before


def change_pixels(folder, paths):
    draw_images(Path(paths["visible"][0]).parent, 2, seed=99)


def touch_image(folder, paths):
    os.utime(paths["infrared"][1], (1, 1))


def add_image(folder, paths):
    paths["infrared"].append(shutil.copy(paths["infrared"][0], Path(paths["infrared"][0]).with_name("x.png")))


def reorder(folder, paths):
    paths["visible"].reverse()


def without_manifest(folder, paths):
    (folder / "train_resized.json").unlink()
    for modality in paths:
        for path in paths[modality]:
            os.utime(path, (4e9, 4e9))


@pytest.mark.parametrize("change", [change_pixels, touch_image, add_image, reorder, without_manifest])
def test_arrays_that_do_not_match_their_images_are_refused(folder, paths, change):
    change(folder, paths)
    with pytest.raises(UserError, match=r"_resized_img\.npy: .*pre_process_sysu.py --data-path"):
        ArrayFiles(folder, 20, 8).load(paths)
    if change is not without_manifest:  # with no images to compare with, there is nothing to refuse
        ArrayFiles(folder, 20, 8).load()


def save(name, array):
    return lambda folder: np.save(folder / name, array)


def resave(name, change):
    return lambda folder: np.save(folder / name, change(np.load(folder / name)))


RGB, RGB_LABEL, IR_LABEL = (
    "train_rgb_resized_img.npy",
    "train_rgb_resized_label.npy",
    "train_ir_resized_label.npy",
)
BROKEN = {
    "missing": (lambda folder: (folder / RGB).unlink(), RGB),
    "float images": (resave(RGB, lambda x: x.astype(np.float32)), RGB),
    "planar images": (resave(RGB, lambda x: x.transpose(0, 3, 1, 2)), RGB),
    "truncated": (lambda folder: (folder / RGB).write_bytes((folder / RGB).read_bytes()[:-9]), RGB),
    "empty": (lambda folder: (folder / RGB).write_bytes(b""), RGB),
    "an archive": (lambda folder: np.savez(open(folder / RGB, "wb"), a=[1]), RGB),  # noqa: SIM115
    "a pickle": (save(IR_LABEL, np.array([{}, 1, 2], dtype=object)), IR_LABEL),
    "no images": (save(RGB, np.zeros((0, 20, 8, 3), np.uint8)), RGB),
    "too few labels": (save(IR_LABEL, np.array([0, 1])), IR_LABEL),
    "float labels": (save(IR_LABEL, np.array([0.0, 1.0, 2.0])), IR_LABEL),
    "negative labels": (save(IR_LABEL, np.array([-1, 1, 2])), IR_LABEL),
    "a hole": (save(RGB_LABEL, np.array([0, 0, 1, 3, 3])), RGB_LABEL),
    "one modality only": (save(IR_LABEL, np.array([1, 1, 0])), IR_LABEL),
    "fewer classes than pids": (
        lambda folder: (
            save(RGB_LABEL, np.array([0, 0, 1, 1, 1]))(folder),
            save(IR_LABEL, np.array([0, 0, 1]))(folder),
        ),
        RGB_LABEL,
    ),
    "other number": (
        lambda folder: (save(RGB, np.zeros((1, 20, 8, 3), np.uint8))(folder), save(RGB_LABEL, [0])(folder)),
        RGB,
    ),
    "broken manifest": (lambda folder: (folder / "train_resized.json").write_text("{"), "train_resized.json"),
    "empty manifest": (lambda folder: (folder / "train_resized.json").write_text("{}"), "train_resized.json"),
    "a pixel range that is none": (
        lambda folder: (folder / "train_resized.json").write_text(
            (folder / "train_resized.json")
            .read_text()
            .replace('"pixel_range": null', '"pixel_range": [5, 1]')
        ),
        "train_resized.json",
    ),
    "other manifest": (lambda folder: (folder / "train_resized.json").write_text("[]"), "train_resized.json"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_arrays_are_refused_by_name(folder, case):
    spoil, culprit = BROKEN[case]
    spoil(folder)
    with pytest.raises(UserError) as error:
        ArrayFiles(folder, 20, 8).load()
    assert str(error.value).startswith(f"{folder / culprit}: ")
    assert "\n" not in str(error.value)


def test_arrays_of_another_size_are_refused(folder):
    with pytest.raises(UserError, match=r"20x8, not --img-h 40 --img-w 8.*--img-h 40 --img-w 8"):
        ArrayFiles(folder, 40, 8).load()


def test_arrays_of_other_code_are_taken_with_a_warning(folder, paths, caplog):
    (folder / "train_resized.json").unlink()
    with caplog.at_level(logging.WARNING, logger="mce"):
        arrays = ArrayFiles(folder, 20, 8).load(paths)
    assert arrays.pids is None
    assert arrays.fingerprint is None
    assert "train_resized.json" in caplog.text


def test_unreadable_images_of_both_modalities_leave_the_former_arrays(folder, paths):
    before = contents(folder)
    bad = [paths["visible"][1], paths["infrared"][2]]
    for path in bad:
        Path(path).write_bytes(b"")
    with pytest.raises(UnreadableImages) as error:
        ArrayFiles(folder, 24, 8).write(TrainingImages(paths, LABELS, PIDS), 2)
    assert all(path in str(error.value) for path in bad)
    assert contents(folder) == before


def test_a_full_disk_is_refused_before_it_starts(tmp_path, paths, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    monkeypatch.setattr(storage_arrays, "decode", lambda *args: pytest.fail("began to decode"))
    with pytest.raises(UserError, match=r"arrays: the arrays need .* GB"):
        ArrayFiles(tmp_path / "arrays", 20, 8).write(TrainingImages(paths, LABELS, PIDS), 2)
    assert contents(tmp_path / "arrays") == {}


def test_training_arrays_decodes_once(tmp_path, paths, monkeypatch):
    files, source = ArrayFiles(tmp_path / "cache", 20, 8, "train_3"), TrainingImages(paths, LABELS, PIDS)
    made = files.load_or_write(source, 2)
    calls = []
    write = ArrayFiles.write
    monkeypatch.setattr(ArrayFiles, "write", lambda *a: calls.append(a) or write(*a))
    again = files.load_or_write(source, 2)
    assert calls == []
    np.testing.assert_array_equal(made.images["visible"], again.images["visible"])
    touch_image(None, paths)
    files.load_or_write(source, 2)
    assert len(calls) == 1
    relabelled = {"visible": np.array([0, 1, 1, 2, 2]), "infrared": LABELS["infrared"]}
    arrays = files.load_or_write(TrainingImages(paths, relabelled, PIDS), 2)
    assert len(calls) == 2
    np.testing.assert_array_equal(arrays.labels["visible"], relabelled["visible"])


def test_array_files_take_a_prefix():
    files = ArrayFiles("folder", 20, 8, "train_4")
    assert files.files["visible"] == (
        Path("folder/train_4_rgb_resized_img.npy"),
        Path("folder/train_4_rgb_resized_label.npy"),
    )
