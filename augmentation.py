"""Augment batches of uint8 images on their device; the draws differ between the images of a batch.

docs/method.md, section 3 (Cheng et al., AAAI 2023). Random numbers are always drawn on the CPU, so that a CPU
and a GPU augment alike.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)  # ImageNet's, of pixels in [0, 1]
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)
ERASE_FILL = np.array([0.4914, 0.4822, 0.4465], dtype=np.float32)  # of normalised pixels
GREY = (0.2989, 0.5870, 0.1140)  # of normalised pixels
PAD = 10  # pixels on each side, of images of the paper's size
ERASE_PROBABILITY = 0.5
ERASE_AREA = (0.02, 0.4)  # of the image
ERASE_ASPECT = (0.3, 1 / 0.3)  # height / width
ERASE_TRIES = 100


@dataclass(frozen=True, eq=False)
class Draws:
    """The random choices of an augmentation of n images (docs/method.md, section 3)."""

    pad: int  # pixels on each side
    pad_value: int
    top: np.ndarray  # (n,) row at which the crop starts in the padded image, 0..2 pad
    left: np.ndarray  # (n,) column, likewise
    flip: np.ndarray  # (n,) bool, of the crop
    erase: np.ndarray  # (n, 4) top, bottom, left, right; bottom and right are exclusive; all 0: nothing
    channel: np.ndarray  # (n,) the channel that replaces all channels; -1: none
    grey: np.ndarray  # (n,) bool: make the image grey

    def rows(self, chosen: slice) -> "Draws":
        """The choices for some of the images."""
        return Draws(*(value if isinstance(value, int) else value[chosen] for value in vars(self).values()))


def draw_augmentation(
    rng: np.random.Generator, n: int, height: int, width: int, modality: str, recipe: str, pad: int = PAD
) -> Draws:
    """Draw the augmentation of n images of one modality.

    RegDB's recipe flips some images before padding and others after cropping. The distribution is the same:
    flipping first turns the crop's column c into 2 pad - c, and both are uniform. So here the flip always
    follows the crop.

    Args:
        rng: source of the draws.
        n: number of images.
        height, width: of the images, in pixels.
        modality: "visible", "infrared" or "aux".
        recipe: "sysu" or "regdb", a column of docs/method.md, section 3.
        pad: border around the image before cropping, in pixels on each side.
    """
    channel = np.full(n, -1)
    grey = np.zeros(n, dtype=bool)
    if modality == "aux":
        channel = rng.integers(3, size=n)
    elif modality == "infrared" and recipe == "sysu":
        k = rng.integers(4, size=n)
        channel = np.where(k < 3, k, -1)
        grey = (k == 3) & (rng.random(n) < 0.5)
    return Draws(
        pad=pad,
        pad_value=127 if recipe == "regdb" and modality != "aux" else 0,
        top=rng.integers(2 * pad + 1, size=n),
        left=rng.integers(2 * pad + 1, size=n),
        flip=rng.random(n) < 0.5,
        erase=_draw_rectangles(rng, n, height, width),
        channel=channel,
        grey=grey,
    )


def _draw_rectangles(rng: np.random.Generator, n: int, height: int, width: int) -> np.ndarray:
    """(n, 4) top, bottom, left, right; all 0: nothing is erased, or no rectangle has fitted."""
    area = rng.uniform(*ERASE_AREA, size=(n, ERASE_TRIES)) * (height * width)
    aspect = rng.uniform(*ERASE_ASPECT, size=(n, ERASE_TRIES))
    heights = np.sqrt(area * aspect).round().astype(np.int64)
    widths = np.sqrt(area / aspect).round().astype(np.int64)
    fits = (heights < height) & (widths < width)
    first = np.arange(n), fits.argmax(axis=1)
    heights, widths = heights[first], widths[first]
    erased = (rng.random(n) < ERASE_PROBABILITY) & fits[first]
    top = rng.integers(np.maximum(height - heights, 0) + 1)
    left = rng.integers(np.maximum(width - widths, 0) + 1)
    return np.stack([top, top + heights, left, left + widths], axis=1) * erased[:, None]


def pinned(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor on the host; for a GPU, in pinned memory, which can be copied without waiting."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return pinned(array, device).to(device, non_blocking=True)


def _constants(channel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 3) the source of each channel, and (n, 3, 3) its scale, bias and erase fill.

    Normalising is pixel * scale + bias. It happens before the channel exchange, so the constants are the
    source channel's.
    """
    source = np.where(channel[:, None] < 0, np.arange(3), channel[:, None])
    scale = 1 / (255 * STD)
    return source, np.stack([scale, -MEAN / STD, ERASE_FILL])[:, source].transpose(1, 0, 2)


def augment(images: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Augment images (n, H, W, 3) uint8 into (n, 3, H, W) float32, channels_last, on the same device.

    Works on rows of bytes, (H, W * 3), in a few kernels for the whole batch: one gather pads, crops, flips
    and exchanges channels; one multiplication and addition then normalises and erases: for an erased pixel
    the scale is 0 and the bias is the fill. Source: docs/method.md, section 3.
    """
    n, height, width, _ = images.shape
    device = images.device
    source, constants = _constants(draws.channel)
    integers = np.column_stack([draws.top, draws.left, draws.flip, draws.erase, source])
    table = _upload(np.column_stack([integers, constants.reshape(n, 9)]).astype(np.float32), device)
    top, left, flip, erase_top, erase_bottom, erase_left, erase_right = table[:, :7].long().T[..., None]
    source = table[:, None, 7:10].long()
    scale, bias, fill = table[:, 10:].view(n, 3, 1, 3).unbind(1)  # each (n, 1, 3)
    image = torch.arange(n, device=device)[:, None]
    y = torch.arange(height, device=device)
    x = torch.arange(width, device=device)

    padded = F.pad(images, (0, 0, draws.pad, draws.pad, draws.pad, draws.pad), value=draws.pad_value)
    rows = image * (height + 2 * draws.pad) + top + y  # (n, H)
    pixels = padded.view(-1, (width + 2 * draws.pad) * 3).index_select(0, rows.view(-1)).view(n, height, -1)
    columns = left + torch.where(flip > 0, width - 1 - x, x)  # (n, W)
    columns = (columns[..., None] * 3 + source).view(n, 1, width * 3)
    pixels = pixels.gather(2, columns.expand(n, height, width * 3)).float()

    # Two rows of constants per image: for pixel rows that miss the erased rectangle, and for those in it.
    erased = ((x >= erase_left) & (x < erase_right))[..., None]  # (n, W, 1)
    scales = torch.stack([scale.expand(n, width, 3), torch.where(erased, 0, scale)], dim=1)
    biases = torch.stack([bias.expand(n, width, 3), torch.where(erased, fill, bias)], dim=1)
    which = (2 * image + ((y >= erase_top) & (y < erase_bottom))).view(-1)  # (n * H,)
    out = biases.view(2 * n, -1).index_select(0, which)
    out.addcmul_(pixels.view(n * height, -1), scales.view(2 * n, -1).index_select(0, which))
    return _mix_grey(out.view(n, height, width, 3), draws).permute(0, 3, 1, 2)


def _mix_grey(out: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Make the images of out (n, H, W, 3) grey for which this was drawn, in place."""
    if draws.grey.any():
        mixed = _upload(np.flatnonzero(draws.grey), out.device)
        red, green, blue = out.index_select(0, mixed).unbind(3)
        grey = GREY[0] * red + GREY[1] * green + GREY[2] * blue
        for channel in out.unbind(3):
            channel.index_copy_(0, mixed, grey)
    return out


def normalize(images: torch.Tensor, channel: np.ndarray | None = None) -> torch.Tensor:
    """Normalise images (n, H, W, 3) uint8 into (n, 3, H, W) float32, channels_last, on the same device.

    Args:
        images: uint8 RGB.
        channel: (n,) the channel that replaces all channels of an image (aux images); None: no exchange.
    """
    n, height, width, _ = images.shape
    source, constants = _constants(np.array([-1]) if channel is None else channel)
    table = _upload(constants.astype(np.float32), images.device)
    scale, bias = table[:, :2].unbind(1)  # each (1 or n, 3)
    if channel is not None:
        columns = torch.arange(0, 3 * width, 3, device=images.device)[:, None]
        columns = (columns + _upload(source, images.device)[:, None]).view(n, 1, -1)
        images = images.reshape(n, height, -1).gather(2, columns.expand(n, height, width * 3))
    pixels = images.reshape(n, height, width * 3).float()
    pixels = torch.addcmul(
        bias.repeat(1, width)[:, None], pixels, scale.repeat(1, width)[:, None], out=pixels
    )
    return pixels.view(n, height, width, 3).permute(0, 3, 1, 2)
