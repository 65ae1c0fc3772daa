"""readers/ranges.py: the pixel range found or typed, what is told before training, and what is refused."""

import logging

import numpy as np
import pytest
import tifffile
from conftest import draw_images, ramp, read_slowly, save_values
from PIL import Image

import images
from images import UnreadableImages, read_image
from readers.ranges import examine, find_pixel_range, value_range
from utils import UserError


def found(paths, given=None):
    return find_pixel_range({"infrared": list(map(str, paths))}, 1, given)


def notes(*paths):
    examined = examine({"infrared": list(map(str, paths))}, 1)
    assert examined.problems == []
    return examined.notes


def save_floats(path, values):
    tifffile.imwrite(path, values)
    return str(path)


# --- one range for all images

DEEP = {
    "51,241 to 52,181": ("png", np.uint16, 51241, 52181),
    "centi-kelvin": ("tif", np.uint16, 29000, 31500),
    "centi-kelvin in 32 bits": ("tif", np.int32, 29000, 31500),
    "above 2^31": ("tif", np.uint32, 2**31 + 1000, 2**31 + 3500),
    "float": ("tif", np.float32, 0.0, 1.0),
    "double": ("tif", np.float64, -40.0, 60.0),
    "half": ("tif", np.float16, 290.0, 315.0),
    "kelvin": ("pfm", np.float32, 290.0, 315.0),
    "fourteen bits": ("jp2", np.uint16, 100, 16000),
}


@pytest.mark.parametrize("case", DEEP)
def test_one_range_brings_all_images_to_eight_bits(tmp_path, case, caplog):
    suffix, dtype, low, high = DEEP[case]
    middle = (low + high) / 2
    values = [ramp(low, middle, dtype), ramp(middle, high, dtype)]  # a cold and a warm one
    write = tifffile.imwrite if suffix == "tif" else save_values
    paths = [str(tmp_path / f"{k}.{suffix}") for k in range(2)]
    for path, part in zip(paths, values, strict=True):
        write(path, part)
    eight_bits = draw_images(tmp_path / "visible", 2)
    with caplog.at_level(logging.INFO, logger="mce"):
        pixel_range = find_pixel_range({"visible": eight_bits, "infrared": paths}, 2)
    assert pixel_range == pytest.approx((low, high), rel=1e-6)
    (line,) = caplog.messages
    assert line.startswith("infrared: 2 of 2 training images have more than eight bits, values ")
    assert line.endswith("of which the median image keeps 128 levels")
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
    assert found([path]) == images.FULL_RANGE
    for pixel_range in (None, images.FULL_RANGE):
        np.testing.assert_array_equal(read_image(path, 256, 256, pixel_range)[..., 0], every >> 8)
    assert found([save_values(tmp_path / "b.png", ramp(300, 40000, np.uint16))]) == images.FULL_RANGE


def test_eight_bits_in_sixteen_bit_files_stay_as_they_are(tmp_path):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    path = save_values(tmp_path / "a.png", values)
    np.testing.assert_array_equal(read_image(path, 16, 16, found([path]))[..., 0], values)


def test_eight_bit_datasets_have_no_range_and_formats_of_eight_bits_are_not_opened(tmp_path, monkeypatch):
    Image.new("L", (8, 20), 7).save(tmp_path / "a.jpg")
    Image.new("L", (8, 20), 7).save(tmp_path / "b.png")
    assert found([tmp_path / "a.jpg", tmp_path / "b.png"]) is None
    monkeypatch.setattr(Image, "open", lambda path: pytest.fail("opened"))
    assert found([tmp_path / "a.jpg"]) is None


# --- what does not count


def thermal(seed=0, shape=(120, 50)):
    """Values as of a person in a room, in centi-kelvin: 29,000 to 31,500, and their noise."""
    rng = np.random.default_rng(seed)
    values = ramp(29050, 29450, np.float64, shape)
    values[30:90, 15:35] = rng.normal(30800, 200, (60, 20))
    return (values + rng.normal(0, 20, shape)).clip(29000, 31500).astype(np.uint16)


def bordered(values, fill, share, end="top"):
    rows = values.copy().ravel()
    rows[: round(share * rows.size)] = fill
    return rows.reshape(values.shape)


@pytest.mark.parametrize("share", [0.0005, 0.002, 0.008, 0.05, 0.4])
@pytest.mark.parametrize("fill", [0, 65535])
@pytest.mark.parametrize("filled", [4, 16])
def test_a_border_or_fill_does_not_stretch_the_range(tmp_path, share, fill, filled):
    values = [thermal(k) for k in range(16)]
    clean = found([save_values(tmp_path / f"{k}.png", part) for k, part in enumerate(values)])
    paths = [
        save_values(tmp_path / f"{k}.png", bordered(part, fill, share) if k < filled else part)
        for k, part in enumerate(values)
    ]
    low, high = found(paths)
    assert (low, high) == pytest.approx(clean, abs=(clean[1] - clean[0]) / 12)
    pixels = read_image(paths[0], 120, 50, (low, high))
    if share < 0.05:
        assert len(np.unique(pixels)) > 120  # 14 when the fill counted
    assert (pixels[0, 0] == (0 if fill == 0 else 255)).all()


def test_a_fill_at_both_ends_and_one_near_the_values(tmp_path):
    values = bordered(thermal(), 0, 0.1)
    values[-10:] = 65535
    low, high = value_range(np.sort(values, axis=None))
    assert 29000 <= low < 29100
    assert 30800 < high <= 31500
    celsius = np.random.default_rng(0).uniform(15, 40, 4000)
    celsius[:40] = 0  # the gap is smaller than the values' range
    low, high = value_range(np.sort(celsius))
    assert 15 <= low < 15.2
    assert 39.8 < high <= 40


def test_dead_and_hot_pixels_do_not_stretch_the_range(tmp_path):
    values = ramp(29000, 31500, np.uint16, (100, 40))
    values[0, 0], values[5, 5], values[9, 9] = 0, 65535, 65535
    values[20, :25] = np.linspace(40000, 60000, 25)  # a lamp: more than a thousandth, and no two alike
    low, high = found([save_values(tmp_path / "a.png", values)])
    assert 29000 <= low < 29010
    assert 31490 < high <= 31500


@pytest.mark.parametrize(
    "values",
    [
        [0, 1],
        [0, 100],
        [0, 100, 200],
        [0, 100, 200, 300],
        [0, 1000, 2000, 3000, 4000],
        range(256),
        np.arange(256) * 257,
        [0, 0, 0, 0, 500, 900, 1000],
    ],
)
def test_values_that_are_all_there_is_count(values):
    values = np.repeat(np.asarray(values), 20)
    assert value_range(values) == (values[0], values[-1])


def test_two_halves_far_apart_count():
    """A cold sky and a warm street are both what the image shows."""
    rng = np.random.default_rng(0)
    values = np.sort(np.concatenate([rng.normal(23000, 40, 3000), rng.normal(30000, 300, 3000)]))
    low, high = value_range(values)
    assert low < 23000
    assert high > 30000


def test_black_frames_do_not_stretch_the_range_and_are_named(tmp_path):
    black = save_values(tmp_path / "black.png", np.zeros((20, 8), np.uint16))
    good = save_values(tmp_path / "good.png", ramp(29000, 31500, np.uint16))
    pixel_range = found([black, good])
    assert pixel_range == (29000, 31500)
    with pytest.raises(UserError, match=r"black\.png .*0 to 0, are outside the pixel range 29000 to 31500"):
        read_image(black, 20, 8, pixel_range)


def test_nan_is_no_data(tmp_path):
    values = ramp(290, 310, np.float32)
    values[:3] = np.nan
    values[3, 0], values[3, 1] = np.inf, -np.inf
    path = save_floats(tmp_path / "a.tif", values)
    low, high = found([path])
    assert (low, high) == pytest.approx((values[np.isfinite(values)].min(), 310))
    pixels = read_image(path, 20, 8, (low, high))[..., 0]
    assert (pixels[~np.isfinite(values)] == 0).all()
    assert pixels[-1, -1] == 255
    assert notes(path, save_floats(tmp_path / "b.tif", ramp(290, 310, np.float32))) == [
        f"infrared: 1 of 2 images have pixels without data (NaN or infinity), which become grey 0; the most, "
        f"16.2%, has {path}"
    ]


def test_images_without_two_values_are_named_for_what_they_are(tmp_path):
    good = save_values(tmp_path / "visible.png", np.full((20, 8), 7, np.uint8))
    empty = [save_floats(tmp_path / f"{k}.tif", np.full((20, 8), np.nan, np.float32)) for k in range(2)]
    flat = save_values(tmp_path / "flat.png", np.full((20, 8), 29000, np.uint16))
    with pytest.raises(UserError) as error:
        find_pixel_range({"visible": [good], "infrared": [*empty, flat]}, 1)
    assert str(error.value) == (
        "no image of more than eight bits can be used: "
        f"2 no number, only NaN or infinity ({empty[0]}), 1 a single value ({flat})"
    )
    with pytest.raises(UnreadableImages, match=r"0\.tif \(it holds no number, only NaN or infinity\)"):
        read_image(empty[0], 20, 8, (0, 1))


# --- a range that is typed


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((29000, 31500), None),
        ((27315, 33315), None),
        ((0, 65535), None),
        ((0, 1e6), "nearly nothing"),
        ((0, float("inf")), "nearly nothing"),
        ((31490, 31500), r"1 of 1 images have values outside it, as .*a\.png, 29,000 to 31,500"),
        ((29000, 31400), r"1 of 1 images have values outside it"),
        ((29100, 31500), r"1 of 1 images have values outside it"),
        ((0, 1), "outside it"),
        ((5, 5), "less than"),
        ((6, 5), "less than"),
        ((float("nan"), 5), "less than"),
    ],
)
def test_a_range_that_is_given_is_compared_with_the_images(tmp_path, given, words):
    path = save_values(tmp_path / "a.png", ramp(29000, 31500, np.uint16))
    if words is None:
        assert found([path], given) == given
        return
    with pytest.raises(UserError, match=rf"^--pixel-range {given[0]:g} .*{words}"):
        found([path], given)


def test_the_images_outside_a_given_range_are_counted(tmp_path):
    paths = [save_values(tmp_path / f"{k}.png", thermal(k)) for k in range(3)]
    paths += [save_values(tmp_path / f"warm {k}.png", thermal(k) + 300) for k in range(2)]
    high = value_range(np.sort(thermal(0), axis=None))[1] + 100
    with pytest.raises(UserError, match=r"2 of 5 images have values outside it, as .*warm 0\.png"):
        found(paths, (28000, high))


def test_a_fill_may_lie_outside_a_given_range(tmp_path):
    path = save_values(tmp_path / "a.png", bordered(thermal(), 0, 0.02))
    assert found([path], (28000, 32000)) == (28000, 32000)


def test_a_range_for_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="--pixel-range 0 9: no training image has more than eight bits"):
        found(draw_images(tmp_path, 1), (0, 9))


def test_a_found_range_must_leave_as_many_levels_as_a_given_one(tmp_path):
    paths = [save_values(tmp_path / f"{k}.png", ramp(29000, 29900, np.uint16)) for k in range(5)]
    odd = save_values(tmp_path / "odd.png", ramp(5, 60000, np.uint16))
    with pytest.raises(UserError) as error:
        found([*paths, odd])
    assert str(error.value) == (
        f"the pixel range found, 0 to 65,535 (from {odd} to {odd}), is too wide: mend or remove those files, "
        "or choose --pixel-range: nearly nothing would be left of the infrared images' values, which are "
        "5 to 60,000: 3.5 of 256 grey levels in the median image"
    )


def test_each_modality_has_its_line_and_its_levels(tmp_path, caplog):
    visible = save_values(tmp_path / "v.png", ramp(28000, 32000, np.uint16))
    infrared = save_values(tmp_path / "i.png", ramp(29000, 30000, np.uint16))
    with caplog.at_level(logging.INFO, logger="mce"):
        find_pixel_range({"visible": [visible], "infrared": [infrared]}, 1)
    assert [line.split(",")[0].split(":")[0] for line in caplog.messages] == ["visible", "infrared"]
    assert "keeps 256 levels" in caplog.messages[0]
    assert "keeps 64 levels" in caplog.messages[1]
    narrow = save_values(tmp_path / "i.png", ramp(29000, 29100, np.uint16))
    with pytest.raises(UserError, match=r"nearly nothing would be left of the infrared images.*6\.4 of 256"):
        find_pixel_range({"visible": [visible], "infrared": [narrow]}, 1)


# --- files that disagree


def test_files_that_agree_are_not_spoken_of(tmp_path):
    assert notes(*[save_values(tmp_path / f"{k}.png", thermal(k)) for k in range(4)]) == []
    crops = [save_values(tmp_path / f"crop {k}.png", thermal(k, (120 + k, 50))) for k in range(6)]
    assert notes(*crops) == []  # people are cut out in all sizes


def test_files_of_different_kinds_and_sizes_are_told_of(tmp_path):
    png = [save_values(tmp_path / f"{k}.png", thermal(k)) for k in range(5)]
    other = save_floats(tmp_path / "other.tif", thermal(7).astype(np.float32))
    assert notes(*png, other) == [
        f"infrared: files of different kinds: 5 uint16 ({png[0]}), 1 float32 ({other})"
    ]
    Image.new("L", (50, 120), 9).save(tmp_path / "eight.jpg")
    eight = tmp_path / "eight.jpg"
    assert notes(*png, eight) == [
        f"infrared: files of different kinds: 5 uint16 ({png[0]}), 1 8 bits ({eight})"
    ]
    large = save_values(tmp_path / "large.png", thermal(8, (240, 100)))
    assert notes(*png, large) == [
        f"infrared: files of different sizes: 5 120x50 pixels ({png[0]}), 1 240x100 pixels ({large})"
    ]


def test_another_unit_or_scale_is_told_of(tmp_path, caplog):
    kelvin = [save_floats(tmp_path / f"{k}.tif", thermal(k).astype(np.float32) / 100) for k in range(5)]
    celsius = save_floats(tmp_path / "celsius.tif", thermal(6).astype(np.float32) / 100 - 273.15)
    (line,) = notes(*kelvin, celsius)
    assert line.startswith(f"infrared: 1 of 6 images have values far from the others', as {celsius}, 17.0")
    assert line.endswith("is it another unit or scale?")
    with caplog.at_level(logging.WARNING, logger="mce"):
        found([*kelvin, celsius])
    assert caplog.messages == [line]


def test_what_cannot_be_read_is_left_to_decoding(tmp_path):
    good = save_values(tmp_path / "a.png", thermal())
    (tmp_path / "b.png").write_bytes(b"")
    assert notes(good, tmp_path / "b.png", tmp_path / "no such.png") == []


# --- one image against the range

LOSING = {
    "narrow.png": (lambda path: save_values(path, ramp(51241, 52181, np.uint16)), None, "need a pixel range"),
    "float.tif": (lambda path: save_values(path, ramp(0, 1, np.float32)), None, "need a pixel range"),
    "cold.tif": (lambda path: save_values(path, ramp(0, 9, np.uint16)), (10, 20), "0 to 9, are outside"),
    "warm.tif": (lambda path: save_values(path, ramp(21, 29, np.uint16)), (10, 20), "21 to 29, are outside"),
    "mostly.tif": (
        lambda path: save_values(path, ramp(0, 29, np.uint16)), (15, 29), "52% of its values, 0 to 29,",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSING)
def test_what_would_lose_nearly_everything_is_refused_by_name(tmp_path, name):
    make, pixel_range, reason = LOSING[name]
    make(tmp_path / name)
    with pytest.raises(UnreadableImages, match=rf"{name} \(.*{reason}"):
        read_image(tmp_path / name, 10, 4, pixel_range)
