"""Decode image files into uint8 arrays."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils import UserError, log

DECODE_PIECE = 8  # images that a thread decodes per task
FULL_RANGE = (0.0, 65535.0)  # as a pixel range: the high byte of 16 bits
MIN_LEVELS = 8  # of 256 grey levels; an image that keeps fewer is refused as nearly empty
EIGHT_BITS = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".bmp",
    ".gif",
    ".webp",
    ".tga",
)  # formats without more than eight bits

PixelRange = tuple[float, float]  # the values that become 0 and 255


class UnreadableImages(UserError):
    """Images that cannot be read; failures holds "path (reason)" for each."""

    def __init__(self, failures: list[str]):
        super().__init__(
            f"cannot read {len(failures)} image{'s'[: len(failures) > 1]}: {', '.join(failures)}"
        )
        self.failures = failures


def to_pixels(
    image: Image.Image, height: int, width: int, pixel_range: PixelRange | None = None
) -> np.ndarray:
    """Convert an open image as read_image does; may rotate it in place.

    Args:
        image: an image that Pillow has opened.
        height, width: to resize to, in pixels.
        pixel_range: see read_image.

    Returns:
        (height, width, 3) uint8 RGB.

    Raises:
        OSError: the reason why the image cannot be used.
    """
    # Pillow reads only the upper 8 of 16 bits per colour channel. `tile` says so until the image is loaded.
    upper_bits = not _is_deep(image) and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    ImageOps.exif_transpose(image, in_place=True)
    if _is_deep(image):
        image = Image.fromarray(_eight_bits(np.asarray(image, dtype=np.float64), pixel_range))
    if "transparency" in image.info:  # palettes warn unless converted in two steps
        image = image.convert("RGBA")
    image = image.convert("RGB")
    if upper_bits and 0 < np.ptp(np.asarray(image)) < MIN_LEVELS:
        raise OSError(
            "it has 16 bits per channel, and Pillow reads only the upper 8; save it as a grey image"
        )
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))


def read_image(
    path: str | os.PathLike, height: int, width: int, pixel_range: PixelRange | None = None
) -> np.ndarray:
    """Read an image file, resized once with Lanczos.

    The EXIF orientation is applied and an alpha channel is dropped.

    Args:
        path: of the file.
        height, width: to resize to, in pixels.
        pixel_range: the values that become 0 and 255 in grey images of more than eight bits (16, 32, floating
            point), the same for a complete dataset, see find_pixel_range; None: they keep their high byte.

    Returns:
        (height, width, 3) uint8 RGB.

    Raises:
        UnreadableImages: no such file, not an image, truncated, more pixels than Pillow considers safe (a
            decompression bomb), or values that do not fit pixel_range.
    """
    try:
        if not os.path.isfile(path):  # opening a named pipe would block
            raise OSError("not a file" if os.path.exists(path) else "no such file")
        with Image.open(path) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise OSError(f"{image.width}x{image.height} pixels: a decompression bomb")
            return to_pixels(image, height, width, pixel_range)
    except UnidentifiedImageError as error:
        raise UnreadableImages([f"{path} (not an image)"]) from error
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImages([f"{path} ({reason})"]) from error


def _is_deep(image: Image.Image) -> bool:
    """Whether Pillow opened the image with more than eight bits; its own conversion would clip at 255."""
    return image.mode == "F" or image.mode.startswith("I")


def _eight_bits(values: np.ndarray, pixel_range: PixelRange | None) -> np.ndarray:
    """Values (H, W) float64 as uint8: 256 levels of equal width. OSError if nearly nothing would be left.

    An image with little contrast keeps few levels: stretching it would make images incomparable.
    """
    low, high = pixel_range or FULL_RANGE
    least, most = values.min(), values.max()
    if not np.isfinite(values).all():
        raise OSError("its values are not all finite")
    if least > high or most < low:
        raise OSError(f"its values, {least:g} to {most:g}, are outside the pixel range {low:g} to {high:g}")
    if pixel_range is None and 0 < (most - least) * 256 / (high - low) < MIN_LEVELS:
        raise OSError(
            f"its values, {least:g} to {most:g}, need a pixel range, but the training images had none"
        )
    return ((values - low) * 256 / (high - low)).clip(0, 255).astype(np.uint8)


def find_pixel_range(
    paths: Sequence[str], workers: int, given: PixelRange | None = None
) -> PixelRange | None:
    """The values that become 0 and 255 in a dataset's images of more than eight bits.

    Args:
        paths: the training images. Formats of eight bits are not opened.
        workers: threads.
        given: the user's choice, which is checked against the images' values and returned.

    Returns:
        (low, high), or None if no image has more than eight bits. low is the lowest and high the highest
        value of all images. A thousandth of each image's pixels is left out at either end, since they may be
        dead or hot, and so are images with a single value. If low and high are within 0..65535 and more than
        half of it apart, (0, 65535): such files keep their high byte.

    Raises:
        UserError: every image of more than eight bits has a single value; or given is not a range, is not
            needed, would leave fewer than MIN_LEVELS grey levels or would cut off nearly all values.
    """

    def ends(path: str) -> PixelRange | None:
        if path.lower().endswith(EIGHT_BITS):
            return None
        try:
            with Image.open(path) as image:
                if not _is_deep(image):
                    return None
                values = np.sort(np.asarray(image, dtype=np.float64), axis=None)
        except Exception:  # decoding will report it
            return None
        few = len(values) // 1000
        return float(values[few]), float(values[-1 - few])

    flag = "" if given is None else f"--pixel-range {given[0]:g} {given[1]:g}"
    if given is not None and not given[0] < given[1]:
        raise UserError(f"{flag}: LOW must be less than HIGH")
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        deep = [pair for pair in pool.map(ends, paths) if pair is not None]
    if not deep:
        if given is not None:
            raise UserError(f"{flag}: no training image has more than eight bits")
        return None
    varied = [pair for pair in deep if pair[0] < pair[1]]
    if not varied:
        raise UserError(
            f"all {len(deep)} images of more than eight bits have a single value each: {paths[0]} …"
        )
    low, high = min(pair[0] for pair in varied), max(pair[1] for pair in varied)
    found = f"{low:,g} to {high:,g}"
    if given is not None:
        kept = min(high, given[1]) - max(low, given[0])
        if kept * 256 < MIN_LEVELS * max(high - low, given[1] - given[0]):
            raise UserError(f"{flag}: nearly nothing would be left of the images' values, which are {found}")
        low, high = given
    elif low >= FULL_RANGE[0] and high <= FULL_RANGE[1] and high - low > FULL_RANGE[1] / 2:
        low, high = FULL_RANGE
    log.info(
        "%d of %d training images have more than eight bits, values %s: grey 0 to 255 is %s to %s",
        len(deep), len(paths), found, f"{low:,g}", f"{high:,g}",
    )  # fmt: skip
    return low, high


def decode(
    paths: Sequence[str],
    height: int,
    width: int,
    workers: int,
    batch_size: int = 64,
    pixel_range: PixelRange | None = None,
) -> Iterator[np.ndarray]:
    """Decode images in order and ahead of their use. In threads: Pillow releases the interpreter's lock.

    Args:
        paths: of the images.
        height, width: to resize to, in pixels.
        workers: threads.
        batch_size: images per array; the last array may have fewer.
        pixel_range: see read_image.

    Yields:
        (n, height, width, 3) uint8.

    Raises:
        UnreadableImages: with every image that cannot be read. After the first one nothing is yielded, and
            the other images are read only to find all of them.
    """

    def fill(paths: Sequence[str], rows: np.ndarray) -> list[str]:
        failures = []
        for path, row in zip(paths, rows, strict=True):
            try:
                row[...] = read_image(path, height, width, pixel_range)
            except UnreadableImages as error:
                failures += error.failures
        return failures

    def submit(start: int) -> tuple[np.ndarray, list]:
        batch = paths[start : start + batch_size]
        pixels = np.empty((len(batch), height, width, 3), dtype=np.uint8)
        pieces = [slice(at, at + DECODE_PIECE) for at in range(0, len(batch), DECODE_PIECE)]
        return pixels, [pool.submit(fill, batch[piece], pixels[piece]) for piece in pieces]

    starts = iter(range(0, len(paths), batch_size))
    ahead = 2 + DECODE_PIECE * workers // batch_size
    failures = []
    pool = ThreadPoolExecutor(max(workers, 1))
    try:
        pending = deque(submit(start) for start in islice(starts, ahead))
        while pending:
            pixels, pieces = pending.popleft()
            for piece in pieces:
                failures += piece.result()
            pending.extend(submit(start) for start in islice(starts, 1))
            if not failures:
                yield pixels
        if failures:
            raise UnreadableImages(failures)
    finally:
        pool.shutdown(cancel_futures=True)
