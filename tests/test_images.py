"""images.py: every kind of image read right or named, in order and ahead of its use."""

import os
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_images, read_slowly
from PIL import Image

import images
from images import UnreadableImages, decode, read_image
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


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_tiff_that_lies_on_its_side_is_turned_whole(tmp_path, mode, orientation):
    """Pillow 11 to 13 cut the rows of an uncompressed one at wrong places, if it is opened by its name."""
    stored = Image.radial_gradient("L").crop((0, 0, 40, 24)).convert(mode)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    for name in ("a.tif", "a.png"):
        stored.save(tmp_path / name, exif=exif)
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.tif", 32, 16), read_image(tmp_path / "a.png", 32, 16)
    )


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
    monkeypatch.setattr(
        images, "read_image", lambda *args: read.append(args) or time.sleep(0.01) or slow(*args)
    )
    before = threading.active_count()
    batches = decode(paths, 20, 8, workers=2, batch_size=8)
    next(batches)
    batches.close()
    assert threading.active_count() == before
    assert len(read) <= 8 * 6


def test_rows_are_resized_before_columns_whatever_the_version_of_pillow(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (397, 131, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")

    def resized(width, height, order):
        """Passes in float, rounded and clipped to eight bits after each, as Pillow's are."""
        channels = [Image.fromarray(noise[..., k].astype(np.float32)) for k in range(3)]
        for axis in order:
            size = [(width, c.height) if axis == "rows" else (c.width, height) for c in channels]
            channels = [c.resize(s, Image.Resampling.LANCZOS) for c, s in zip(channels, size, strict=True)]
            channels = [Image.fromarray(np.asarray(c).round().clip(0, 255)) for c in channels]
        return np.stack([np.asarray(c) for c in channels], axis=-1)

    found = read_image(tmp_path / "noise.png", 384, 128).astype(float)
    assert np.abs(found - resized(128, 384, ("rows", "columns"))).max() <= 1  # Pillow's are of fixed point
    assert np.abs(found - resized(128, 384, ("columns", "rows"))).max() > 10
