"""images.py: every kind of image read right or named; the arrays on disk, whole, fresh and checked."""

import logging
import os
import shutil
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_images, read_slowly
from PIL import Image

import images
from images import UnreadableImages, decode, find_pixel_range, read_image
from readers import arrays as storage_arrays
from readers.arrays import (
    array_files,
    open_training_arrays,
    training_arrays,
    write_array,
    write_training_arrays,
)
from utils import UserError

COLOUR = (200, 40, 90)
EXIF_ORIENTATION = 0x0112


# --- reading


@pytest.mark.parametrize("size", [(24, 60), (12, 30), (1, 1)])
def test_read_image_resizes_once_with_lanczos(tmp_path, size):
    (path,) = draw_images(tmp_path, 1, size)
    pixels = read_image(path, 30, 12)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, read_slowly(path, 30, 12))


def flat(mode, colour):
    return Image.new(mode, (8, 20), colour)


def sixteen_bit(path):
    Image.fromarray(np.full((20, 8), 0xC8FF, dtype=np.uint16)).save(path)


def palette(path):
    image = flat("RGB", COLOUR).quantize(4)
    image.save(path, transparency=bytes([0, 255, 255, 255]))


READABLE = {
    "rgb.png": (lambda path: flat("RGB", COLOUR).save(path), COLOUR),
    "alpha.png": (lambda path: flat("RGBA", (*COLOUR, 10)).save(path), COLOUR),
    "palette.png": (palette, COLOUR),
    "grey.png": (lambda path: flat("L", 77).save(path), (77,) * 3),
    "grey alpha.png": (lambda path: flat("LA", (77, 3)).save(path), (77,) * 3),
    "bilevel.png": (lambda path: flat("1", 1).save(path), (255,) * 3),
    "16 bit.png": (sixteen_bit, (0xC8,) * 3),
    "16 bit.tif": (sixteen_bit, (0xC8,) * 3),
    "cmyk.tif": (lambda path: flat("CMYK", (55, 215, 165, 0)).save(path), COLOUR),
    "人 ü.bmp": (lambda path: flat("RGB", COLOUR).save(path), COLOUR),
    "a name with spaces.gif": (lambda path: flat("L", 77).save(path), (77,) * 3),
}


@pytest.mark.parametrize("name", READABLE)
def test_read_image_reads_every_kind_of_image(tmp_path, name):
    make, colour = READABLE[name]
    make(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = read_image(tmp_path / name, 10, 4)
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.uint8(colour), (10, 4, 3)))


def test_read_image_turns_images_upright(tmp_path):
    upright = Image.new("RGB", (16, 32), (255, 255, 255))
    upright.paste((0, 0, 0), (0, 0, 16, 16))  # the upper half is black
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # stored lying on its left side
    upright.rotate(90, expand=True).save(tmp_path / "a.jpg", exif=exif)
    pixels = read_image(tmp_path / "a.jpg", 32, 16)
    assert pixels[:12].max() < 40
    assert pixels[20:].min() > 215


# --- more than eight bits


def save_values(path, values):
    Image.fromarray(values).save(path)
    return str(path)


def ramp(low, high, dtype, shape=(20, 8)):
    """An image with all of low..high, as far as it has pixels."""
    return np.linspace(low, high, shape[0] * shape[1]).astype(dtype).reshape(shape)


DEEP = {
    "51,241 to 52,181": ("png", np.uint16, 51241, 52181),
    "centi-kelvin": ("tif", np.uint16, 29000, 31500),
    "centi-kelvin in 32 bits": ("tif", np.int32, 29000, 31500),
    "float": ("tif", np.float32, 0.0, 1.0),
    "kelvin": ("pfm", np.float32, 290.0, 315.0),
    "fourteen bits": ("jp2", np.uint16, 100, 16000),
}


@pytest.mark.parametrize("case", DEEP)
def test_one_range_brings_all_images_to_eight_bits(tmp_path, case, caplog):
    suffix, dtype, low, high = DEEP[case]
    values = [
        ramp(low, (low + high) / 2, dtype),
        ramp((low + high) / 2, high, dtype),
    ]  # a cold and a warm one
    paths = [save_values(tmp_path / f"{k}.{suffix}", part) for k, part in enumerate(values)]
    eight_bits = draw_images(tmp_path / "visible", 2)
    with caplog.at_level(logging.INFO, logger="mce"):
        pixel_range = find_pixel_range([*eight_bits, *paths], 2)
    assert pixel_range == pytest.approx((low, high), rel=1e-6)
    assert "2 of 4 training images have more than eight bits" in caplog.text
    for path, part in zip(paths, values, strict=True):
        expected = np.floor((part.astype(float) - low) / (high - low) * 256).clip(0, 255)
        pixels = read_image(path, 20, 8, pixel_range)
        assert (pixels == pixels[..., :1]).all()
        assert np.abs(pixels[..., 0] - expected).max() <= (1 if suffix == "pfm" else 0)  # 315 is no float32
    cold, warm = (read_image(path, 20, 8, pixel_range).mean() for path in paths)
    assert warm - cold == pytest.approx(128, abs=3)  # the difference in temperature is kept
    for path in eight_bits:
        np.testing.assert_array_equal(read_image(path, 20, 8, pixel_range), read_slowly(path, 20, 8))


def test_files_that_use_all_sixteen_bits_keep_their_high_byte(tmp_path):
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    path = save_values(tmp_path / "a.png", every)
    assert find_pixel_range([path], 1) == images.FULL_RANGE
    for pixel_range in (None, images.FULL_RANGE):
        np.testing.assert_array_equal(read_image(path, 256, 256, pixel_range)[..., 0], every >> 8)
    half = save_values(tmp_path / "b.png", ramp(300, 40000, np.uint16))
    assert find_pixel_range([half], 1) == images.FULL_RANGE


def test_eight_bits_in_sixteen_bit_files_stay_as_they_are(tmp_path):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    path = save_values(tmp_path / "a.png", values)
    np.testing.assert_array_equal(read_image(path, 16, 16, find_pixel_range([path], 1))[..., 0], values)


def test_dead_and_hot_pixels_do_not_stretch_the_range(tmp_path):
    values = ramp(29000, 31500, np.uint16, (100, 40))
    values[0, 0], values[5, 5], values[9, 9] = 0, 65535, 65535
    path = save_values(tmp_path / "a.png", values)
    low, high = find_pixel_range([path], 1)
    assert 29000 <= low < 29010
    assert 31490 < high <= 31500


def test_black_frames_do_not_stretch_the_range_and_are_named(tmp_path):
    black = save_values(tmp_path / "black.png", np.zeros((20, 8), np.uint16))
    good = save_values(tmp_path / "good.png", ramp(29000, 31500, np.uint16))
    pixel_range = find_pixel_range([black, good], 1)
    assert pixel_range == (29000, 31500)
    with pytest.raises(UserError, match=r"black\.png .*0 to 0, are outside the pixel range 29000 to 31500"):
        read_image(black, 20, 8, pixel_range)


def test_eight_bit_datasets_have_no_range_and_formats_of_eight_bits_are_not_opened(tmp_path, monkeypatch):
    flat("L", 7).save(tmp_path / "a.jpg")
    flat("L", 7).save(tmp_path / "b.png")
    assert find_pixel_range([str(tmp_path / "a.jpg"), str(tmp_path / "b.png")], 1) is None
    monkeypatch.setattr(Image, "open", lambda path: pytest.fail("opened"))
    assert find_pixel_range([str(tmp_path / "a.jpg")], 1) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((29000, 31500), None),
        ((27315, 33315), None),
        ((0, 65535), None),
        ((0, 1e6), "nearly nothing"),
        ((0, float("inf")), "nearly nothing"),
        ((31490, 31500), "nearly nothing"),
        ((0, 1), "nearly nothing"),
        ((5, 5), "less than"),
        ((6, 5), "less than"),
        ((float("nan"), 5), "less than"),
    ],
)
def test_a_range_that_is_given_is_compared_with_the_images(tmp_path, given, words):
    path = save_values(tmp_path / "a.png", ramp(29000, 31500, np.uint16))
    if words is None:
        assert find_pixel_range([path], 1, given) == given
        return
    with pytest.raises(UserError, match=rf"^--pixel-range {given[0]:g} .*{words}"):
        find_pixel_range([path], 1, given)


def test_a_range_for_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="--pixel-range 0 9: no training image has more than eight bits"):
        find_pixel_range(draw_images(tmp_path, 1), 1, (0, 9))


def test_images_of_one_value_give_no_range(tmp_path):
    with pytest.raises(UserError, match="a single value"):
        find_pixel_range([save_values(tmp_path / "a.png", np.full((20, 8), 29000, np.uint16))], 1)


def sixteen_bit_colour(path):
    """A PNG of 16 bits a channel, which Pillow cannot write: values 51,241 to 52,181."""
    rows = b"".join(b"\0" + np.full((8, 3), 51241 + 47 * y, ">u2").tobytes() for y in range(20))
    header = struct.pack(">IIBBBBB", 8, 20, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(b)) + a + b + struct.pack(">I", zlib.crc32(a + b)) for a, b in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


LOSING = {
    "narrow.png": (lambda path: save_values(path, ramp(51241, 52181, np.uint16)), None, "need a pixel range"),
    "float.tif": (lambda path: save_values(path, ramp(0, 1, np.float32)), None, "need a pixel range"),
    "nan.tif": (
        lambda path: save_values(path, np.full((20, 8), np.nan, np.float32)),
        (0, 1),
        "not all finite",
    ),
    "cold.tif": (lambda path: save_values(path, ramp(0, 9, np.uint16)), (10, 20), "outside the pixel range"),
    "warm.tif": (
        lambda path: save_values(path, ramp(21, 29, np.uint16)),
        (10, 20),
        "outside the pixel range",
    ),
    "colour.png": (sixteen_bit_colour, (51241, 52181), "upper 8"),
}


@pytest.mark.parametrize("name", LOSING)
def test_what_would_lose_nearly_everything_is_refused_by_name(tmp_path, name):
    make, pixel_range, reason = LOSING[name]
    make(tmp_path / name)
    with pytest.raises(UnreadableImages, match=rf"{name} \(.*{reason}"):
        read_image(tmp_path / name, 10, 4, pixel_range)


def test_arrays_keep_the_range_that_they_were_decoded_by(tmp_path):
    (tmp_path / "data").mkdir()
    values = [ramp(29000 + 100 * k, 31000 + 100 * k, np.uint16) for k in range(4)]
    deep = [save_values(tmp_path / f"data/{k}.png", part) for k, part in enumerate(values)]
    paths = {"visible": draw_images(tmp_path / "data/visible", 4), "infrared": deep}
    labels = {modality: np.array([0, 0, 1, 1]) for modality in paths}
    args = (tmp_path / "arrays", paths, labels, [3, 4], 20, 8, 2)
    arrays = training_arrays(*args)
    assert arrays.pixel_range == (29000, 31300)
    expected = [read_image(path, 20, 8, arrays.pixel_range) for path in deep]
    np.testing.assert_array_equal(arrays.images["infrared"], np.stack(expected))
    assert training_arrays(*args, pixel_range=[29000.0, 31300.0]).pixel_range == (29000, 31300)
    another = r"rgb_resized_img\.npy: made with another .*--pixel-range 27315 33315"
    with pytest.raises(UserError, match=another):
        open_training_arrays(tmp_path / "arrays", 20, 8, paths, pixel_range=(27315, 33315))
    again = training_arrays(*args, pixel_range=(27315, 33315))
    assert again.pixel_range == (27315, 33315)
    assert (again.images["infrared"] != arrays.images["infrared"]).any()
    assert np.ptp(again.images["infrared"]) < np.ptp(np.stack(expected))
    for _ in range(2):  # a range that was given for one run is not another run's
        assert training_arrays(*args).pixel_range == (29000, 31300)


def truncated(path):
    draw_images(path.parent, 1, (64, 64))
    path.write_bytes((path.parent / "0000.png").read_bytes()[:400])


UNREADABLE = {
    "truncated.png": (truncated, "truncated"),
    "empty.jpg": (lambda path: path.touch(), "not an image"),
    "text.jpg": (lambda path: path.write_text("hello"), "not an image"),
    "folder.jpg": (lambda path: path.mkdir(), "not a file"),
    "dangling.jpg": (lambda path: path.symlink_to("nowhere.jpg"), "no such file"),
    "pipe.jpg": (lambda path: os.mkfifo(path), "not a file"),
    "bomb.png": (lambda path: Image.new("1", (15000, 6000)).save(path), "decompression bomb"),
    "big bomb.png": (lambda path: Image.new("1", (15000, 12000)).save(path), "decompression bomb"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", UNREADABLE)
def test_read_image_names_what_it_cannot_read(tmp_path, name):
    make, reason = UNREADABLE[name]
    make(tmp_path / name)
    with pytest.raises(UserError, match=reason) as error:
        read_image(tmp_path / name, 10, 4)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("workers", "batch_size"), [(1, 1), (2, 7), (3, 16), (4, 100)])
def test_decode_keeps_order_and_batches(tmp_path, workers, batch_size):
    paths = draw_images(tmp_path, 23)
    batches = list(decode(paths, 20, 8, workers, batch_size))
    assert [len(batch) for batch in batches] == [
        len(paths[k : k + batch_size]) for k in range(0, 23, batch_size)
    ]
    expected = np.stack([read_slowly(path, 20, 8) for path in paths])
    np.testing.assert_array_equal(np.concatenate(batches), expected)


def test_decode_of_nothing_is_nothing():
    assert list(decode([], 20, 8, 2)) == []


def test_decode_lists_every_unreadable_image(tmp_path):
    paths = draw_images(tmp_path, 60)
    bad = [paths[k] for k in (3, 20, 59)]
    for path in bad:
        Path(path).write_bytes(b"")
    received = []
    with pytest.raises(UnreadableImages) as error:
        received.extend(decode(paths, 20, 8, 2, batch_size=4))
    assert len(received) == 0
    assert len(error.value.failures) == 3
    assert all(path in str(error.value) for path in bad)


def test_decode_stops_with_its_consumer_and_does_not_run_away(tmp_path, monkeypatch):
    paths = draw_images(tmp_path, 4) * 100
    read = []
    slow = images.read_image
    monkeypatch.setattr(images, "read_image", lambda *args: read.append(args) or slow(*args))
    before = threading.active_count()
    batches = decode(paths, 20, 8, workers=2, batch_size=8)
    next(batches)
    batches.close()
    assert threading.active_count() == before
    assert len(read) <= 8 * 6


def test_write_array_writes_what_decode_yields(tmp_path):
    paths = draw_images(tmp_path / "images", 70)
    seen = []
    write_array(paths, tmp_path / "a.npy", 20, 8, 2, seen.append)
    expected = np.concatenate(list(decode(paths, 20, 8, 2)))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), expected)
    assert sum(seen) == 70


# --- training arrays

LABELS = {"visible": np.array([0, 0, 1, 2, 2]), "infrared": np.array([2, 1, 0])}
PIDS = [4, 7, 30]


@pytest.fixture
def paths(tmp_path):
    return {
        modality: draw_images(tmp_path / "data" / modality, len(part), seed=len(part))
        for modality, part in LABELS.items()
    }


@pytest.fixture
def folder(tmp_path, paths):
    write_training_arrays(tmp_path / "arrays", paths, LABELS, PIDS, 20, 8, 2)
    return tmp_path / "arrays"


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def test_training_arrays_come_back(folder, paths):
    arrays = open_training_arrays(folder, 20, 8, paths)
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
        open_training_arrays(folder, 20, 8, paths)
    if change is not without_manifest:  # with no images to compare with, there is nothing to refuse
        open_training_arrays(folder, 20, 8)


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
        open_training_arrays(folder, 20, 8)
    assert str(error.value).startswith(f"{folder / culprit}: ")
    assert "\n" not in str(error.value)


def test_arrays_of_another_size_are_refused(folder):
    with pytest.raises(UserError, match=r"20x8, not --img-h 40 --img-w 8.*--img-h 40 --img-w 8"):
        open_training_arrays(folder, 40, 8)


def test_arrays_of_other_code_are_taken_with_a_warning(folder, paths, caplog):
    (folder / "train_resized.json").unlink()
    with caplog.at_level(logging.WARNING, logger="mce"):
        arrays = open_training_arrays(folder, 20, 8, paths)
    assert arrays.pids is None
    assert arrays.fingerprint is None
    assert "train_resized.json" in caplog.text


def test_unreadable_images_of_both_modalities_leave_the_former_arrays(folder, paths):
    before = contents(folder)
    bad = [paths["visible"][1], paths["infrared"][2]]
    for path in bad:
        Path(path).write_bytes(b"")
    with pytest.raises(UnreadableImages) as error:
        write_training_arrays(folder, paths, LABELS, PIDS, 24, 8, 2)
    assert all(path in str(error.value) for path in bad)
    assert contents(folder) == before


def test_a_full_disk_is_refused_before_it_starts(tmp_path, paths, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    monkeypatch.setattr(storage_arrays, "decode", lambda *args: pytest.fail("began to decode"))
    with pytest.raises(UserError, match=r"arrays: the arrays need .* GB"):
        write_training_arrays(tmp_path / "arrays", paths, LABELS, PIDS, 20, 8, 2)
    assert contents(tmp_path / "arrays") == {}


def test_training_arrays_decodes_once(tmp_path, paths, monkeypatch):
    args = (tmp_path / "cache", paths, LABELS, PIDS, 20, 8, 2, "train_3")
    made = training_arrays(*args)
    calls = []
    write = storage_arrays.write_training_arrays
    monkeypatch.setattr(storage_arrays, "write_training_arrays", lambda *a: calls.append(a) or write(*a))
    again = training_arrays(*args)
    assert calls == []
    np.testing.assert_array_equal(made.images["visible"], again.images["visible"])
    touch_image(None, paths)
    training_arrays(*args)
    assert len(calls) == 1
    relabelled = {"visible": np.array([0, 1, 1, 2, 2]), "infrared": LABELS["infrared"]}
    arrays = training_arrays(tmp_path / "cache", paths, relabelled, *args[3:])
    assert len(calls) == 2
    np.testing.assert_array_equal(arrays.labels["visible"], relabelled["visible"])


def test_array_files_take_a_prefix():
    files = array_files("folder", "train_4")
    assert files["visible"] == (
        Path("folder/train_4_rgb_resized_img.npy"),
        Path("folder/train_4_rgb_resized_label.npy"),
    )
