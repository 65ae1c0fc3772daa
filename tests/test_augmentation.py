"""augmentation.py against a pixel loop written from the method's table, and the draws' frequencies."""

import numpy as np
import pytest
import torch
from PIL import Image

from augmentation import Draws, augment, draw_augmentation, normalize

# --- augmentation


def augment_slowly(image, draws, k, modality, recipe, pad):
    """One image by the table of docs/method.md, section 3, with loops and Pillow, in the table's order."""
    height, width, _ = image.shape
    picture = Image.fromarray(image)
    grey_pad = recipe == "regdb" and modality != "aux"
    padded = Image.new("RGB", (width + 2 * pad, height + 2 * pad), (127,) * 3 if grey_pad else (0,) * 3)
    top, left = int(draws.top[k]), int(draws.left[k])
    if grey_pad:  # flips first
        if draws.flip[k]:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            left = 2 * pad - left
        padded.paste(picture, (pad, pad))
        picture = padded.crop((left, top, left + width, top + height))
    else:
        padded.paste(picture, (pad, pad))
        picture = padded.crop((left, top, left + width, top + height))
        if draws.flip[k]:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    out = np.empty((3, height, width))
    for channel in range(3):
        mean, std = (0.485, 0.456, 0.406)[channel], (0.229, 0.224, 0.225)[channel]
        fill = (0.4914, 0.4822, 0.4465)[channel]
        pixels = np.array(picture)[..., channel] / 255
        for y in range(height):
            for x in range(width):
                inside = (
                    draws.erase[k][0] <= y < draws.erase[k][1] and draws.erase[k][2] <= x < draws.erase[k][3]
                )
                out[channel, y, x] = fill if inside else (pixels[y, x] - mean) / std
    if draws.channel[k] >= 0:
        out[:] = out[draws.channel[k]].copy()
    if draws.grey[k]:
        out[:] = 0.2989 * out[0] + 0.5870 * out[1] + 0.1140 * out[2]
    return torch.from_numpy(out).float()


@pytest.mark.parametrize("recipe", ["sysu", "regdb"])
@pytest.mark.parametrize("modality", ["visible", "aux", "infrared"])
@pytest.mark.parametrize(
    ("size", "pad"), [((24, 12), 10), ((7, 5), 10), ((1, 1), 10), ((24, 12), 3), ((7, 5), 0)]
)
def test_augmentation_equals_the_table(recipe, modality, size, pad):
    rng = np.random.default_rng(sum(size))
    n = 12
    images = rng.integers(0, 256, (n, *size, 3), dtype=np.uint8)
    chosen = {} if pad == 10 else {"pad": pad}  # 10 is the table's
    draws = draw_augmentation(rng, n, *size, modality, recipe, **chosen)
    result = augment(torch.from_numpy(images), draws)
    expected = torch.stack([augment_slowly(images[k], draws, k, modality, recipe, pad) for k in range(n)])
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result.contiguous(), expected, rtol=0, atol=2e-6)


def test_augmentation_without_chance_is_normalisation():
    images = torch.randint(0, 256, (3, 9, 4, 3), dtype=torch.uint8)
    centre, none = np.full(3, 10), np.zeros(3, dtype=bool)
    draws = Draws(10, 0, centre, centre, none, np.zeros((3, 4), dtype=int), np.full(3, -1), none)
    torch.testing.assert_close(augment(images, draws), normalize(images), rtol=0, atol=1e-6)


def test_augmentation_leaves_its_input_alone():
    images = torch.randint(0, 256, (4, 9, 4, 3), dtype=torch.uint8)
    before = images.clone()
    draws = draw_augmentation(np.random.default_rng(0), 4, 9, 4, "aux", "sysu")
    augment(images, draws)
    assert torch.equal(images, before)


@pytest.mark.parametrize("channel", [None, np.array([2, 0, 1, 1])])
def test_normalize_equals_the_table(channel):
    images = torch.randint(0, 256, (4, 9, 5, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((images.double() / 255 - mean) / std).float()
    if channel is not None:
        expected = torch.stack([expected[k, :, :, [c] * 3] for k, c in enumerate(channel)])
    result = normalize(images, channel)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result.permute(0, 2, 3, 1), expected, rtol=0, atol=2e-6)


N = 20000


@pytest.fixture(scope="module")
def many_draws():
    return {
        (modality, recipe): draw_augmentation(np.random.default_rng(5), N, 96, 32, modality, recipe)
        for modality in ("visible", "aux", "infrared")
        for recipe in ("sysu", "regdb")
    }


def test_draws_have_the_frequencies_of_the_table(many_draws):
    for (modality, recipe), draws in many_draws.items():
        assert draws.pad_value == (127 if recipe == "regdb" and modality != "aux" else 0)
        assert abs(draws.flip.mean() - 0.5) < 0.02
        for offsets in (draws.top, draws.left):
            np.testing.assert_allclose(np.bincount(offsets, minlength=21) / N, 1 / 21, atol=0.006)
        kept = (draws.channel < 0).mean()
        if modality == "aux":
            np.testing.assert_allclose(np.bincount(draws.channel) / N, 1 / 3, atol=0.02)
        elif (modality, recipe) == ("infrared", "sysu"):
            np.testing.assert_allclose(np.bincount(draws.channel + 1) / N, 1 / 4, atol=0.02)
            assert abs(draws.grey.mean() - 1 / 8) < 0.01
            assert (draws.channel[draws.grey] < 0).all()
        else:
            assert kept == 1
        if (modality, recipe) != ("infrared", "sysu"):
            assert not draws.grey.any()


def test_erased_rectangles(many_draws):
    top, bottom, left, right = many_draws["visible", "sysu"].erase.T
    erased = bottom > 0
    assert abs(erased.mean() - 0.5) < 0.02
    heights, widths = (bottom - top)[erased], (right - left)[erased]
    assert (heights < 96).all()
    assert (widths < 32).all()
    assert bottom.max() == 96  # strictly smaller than the image, but it may touch the border
    assert right.max() == 32
    assert top[erased].min() == left[erased].min() == 0
    area = heights * widths / (96 * 32)
    assert 0.015 < area.min() < 0.03
    assert 0.35 < area.max() < 0.42
    aspect = heights / widths
    assert 0.25 < aspect.min() < 0.35
    assert 3 < aspect.max() < 3.8
    rng = np.random.default_rng(0)  # rejection changes the distribution: compare with a loop
    accepted = []
    while len(accepted) < 4000:
        a, r = rng.uniform(0.02, 0.4) * 96 * 32, rng.uniform(0.3, 1 / 0.3)
        h, w = round((a * r) ** 0.5), round((a / r) ** 0.5)
        if h < 96 and w < 32:
            accepted.append(h * w / (96 * 32))
    assert abs(np.mean(accepted) - area.mean()) < 0.01


def test_each_image_has_its_own_draws():
    images = torch.randint(0, 256, (1, 24, 12, 3), dtype=torch.uint8).expand(32, -1, -1, -1).contiguous()
    result = augment(images, draw_augmentation(np.random.default_rng(0), 32, 24, 12, "visible", "sysu"))
    assert len({image.numpy().tobytes() for image in result}) >= 30  # chance may repeat one
