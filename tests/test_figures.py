"""results/figures.py: right and wrong images are framed as such, and what cannot be drawn is told."""

import os

import numpy as np
import pytest
from PIL import Image

from results.figures import ranked_results
from utils import UserError

HEIGHT, WIDTH = 24, 10
GREEN, RED, GREY = (0x2E, 0x9E, 0x4F), (0xD2, 0x37, 0x2C), (0x5B, 0x64, 0x70)


@pytest.fixture
def image(tmp_path):
    """A function that makes a plain image file of a colour."""

    def make(name, color):
        Image.new("RGB", (30, 50), color).save(tmp_path / name)
        return str(tmp_path / name)

    return make


def framed(picture):
    """Rows of (frame colour, image colour, left, top), as a reader of the picture sees them."""
    found = {}
    for color in (GREEN, RED, GREY):
        mask = (picture == color).all(2)
        for top, left in np.argwhere(mask):
            if not mask[top - 1, left] and not mask[top, left - 1]:  # a frame's upper left corner
                inside = picture[top + 4 + HEIGHT // 2, left + 4 + WIDTH // 2]
                block = mask[top : top + HEIGHT + 8, left : left + WIDTH + 8]
                if block.sum() == (HEIGHT + 8) * (WIDTH + 8) - HEIGHT * WIDTH:  # 4 pixels all around
                    found[top, left] = color, tuple(inside.tolist())
    rows = sorted({top for top, _ in found})
    return [[found[key] for key in sorted(found) if key[0] == top] for top in rows]


def test_queries_stand_left_and_frames_tell_right_from_wrong(image, tmp_path):
    blue, white, black = (0, 0, 255), (250, 250, 250), (0, 0, 0)
    files = [image(f"{k}.png", color) for k, color in enumerate((blue, white, black))]
    queries = [(files[0], 7), (files[1], 8)]
    ranked = [[(files[1], 7), (files[2], 8), (files[0], np.int64(7))], [(files[2], 8)]]  # rows may be short
    ranked_results(queries, ranked, tmp_path / "figures" / "out.png", HEIGHT, WIDTH)
    with Image.open(tmp_path / "figures" / "out.png") as picture:
        assert picture.format == "PNG"
        rows = framed(np.asarray(picture.convert("RGB")))
    assert rows == [
        [(GREY, blue), (GREEN, white), (RED, black), (GREEN, blue)],
        [(GREY, white), (GREEN, black)],
    ]


def test_a_query_without_results_is_drawn_alone(image, tmp_path):
    ranked_results([(image("q.png", (1, 2, 3)), 7)], [[]], tmp_path / "out.png", HEIGHT, WIDTH)
    with Image.open(tmp_path / "out.png") as picture:
        assert framed(np.asarray(picture.convert("RGB"))) == [[(GREY, (1, 2, 3))]]


def test_an_unreadable_image_is_told_and_nothing_is_written(image, tmp_path):
    good, bad = image("good.png", "blue"), tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bad\.png"):
        ranked_results([(good, 7)], [[(str(bad), 7)]], tmp_path / "out.png")
    assert sorted(os.listdir(tmp_path)) == ["bad.png", "good.png"]


def test_a_path_that_cannot_be_written_is_told(image, tmp_path):
    good = image("good.png", "blue")
    with pytest.raises(UserError, match=r"cannot write .*good\.png/out\.png"):
        ranked_results([(good, 7)], [[(good, 7)]], f"{good}/out.png")
