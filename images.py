"""Decode image files into uint8 arrays."""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from PIL import Image, ImageOps

from readers.formats import EXIF_ORIENTATION, is_deep, open_image
from utils import UserError

DECODE_PIECE = 8  # images that a thread decodes per task
FULL_RANGE = (0.0, 65535.0)  # as a pixel range: the high byte of 16 bits
MIN_LEVELS = 8  # of 256 grey levels; an image that keeps fewer is refused as nearly empty

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
        image: an image that Pillow has opened, whose values are believed; read_image looks closer at a file.
        height, width: to resize to, in pixels.
        pixel_range: see read_image.

    Returns:
        (height, width, 3) uint8 RGB.

    Raises:
        OSError: the reason why the image cannot be used.
    """
    if is_deep(image):
        turn = image.getexif().get(EXIF_ORIENTATION, 1)
        image = _upright(Image.fromarray(_eight_bits(np.asarray(image), pixel_range)), turn)
    ImageOps.exif_transpose(image, in_place=True)
    if "transparency" in image.info:  # palettes warn unless converted in two steps
        image = image.convert("RGBA")
    image = image.convert("RGB")
    # Pillow rounds to eight bits between its two passes, so that their order matters. Up to Pillow 12 the
    # horizontal one came first, as for all published results; 13 chooses by the sizes. So one axis at a time.
    image = image.resize((width, image.height), Image.Resampling.LANCZOS)
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
            point), the same for a complete dataset, see readers.ranges; None: they keep their high byte. NaN
            (no data) becomes 0.

    Returns:
        (height, width, 3) uint8 RGB.

    Raises:
        UnreadableImages: no such file, not an image, truncated, of a kind that is not read rightly, more
            pixels than Pillow considers safe (a decompression bomb), or values of which more than half are
            outside pixel_range.
    """
    try:
        with open_image(path) as opened:
            image = opened.load()
            if opened.deep:
                image = Image.fromarray(_eight_bits(image, pixel_range))
            elif opened.high_byte:
                _refuse_poor(image)
            return to_pixels(_upright(image, opened.orientation), height, width)
    except Exception as error:  # a broken file makes Pillow and tifffile raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImages([f"{path} ({reason})"]) from error


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """Tell an image made from an array how to_pixels is to turn it."""
    if orientation != 1:
        image.getexif()[EXIF_ORIENTATION] = orientation
    return image


def _refuse_poor(image: Image.Image) -> None:
    """OSError if the high bytes of 16-bit colour say little, or are grey, whose range would be missed."""
    pixels = np.asarray(image.convert("RGB"))
    if (pixels == pixels[..., :1]).all():
        raise OSError("it holds grey in colour channels of more than eight bits: save it as a grey image")
    if np.ptp(pixels) < MIN_LEVELS:
        raise OSError("only the upper 8 bits of its colours are used, and they hold nearly nothing")


def _eight_bits(counts: np.ndarray, pixel_range: PixelRange | None) -> np.ndarray:
    """Counts (H, W) as uint8: 256 levels of equal width. OSError if nearly nothing would be left.

    An image with little contrast keeps few levels: stretching it would make images incomparable.
    """
    low, high = pixel_range or FULL_RANGE
    values = np.asarray(counts, dtype=np.float64)
    valid = np.isfinite(values)
    known = values if valid.all() else values[valid]
    if not known.size:
        raise OSError("it holds no number, only NaN or infinity")
    least, most = known.min(), known.max()
    outside = np.mean((known < low) | (known > high))
    if outside > 0.5:
        share = "" if outside == 1 else f"{outside:.0%} of "
        raise OSError(
            f"{share}its values, {least:g} to {most:g}, are outside the pixel range {low:g} to {high:g}"
        )
    if pixel_range is None and 0 < (most - least) * 256 / (high - low) < MIN_LEVELS:
        raise OSError(
            f"its values, {least:g} to {most:g}, need a pixel range, but the training images had none"
        )
    return (np.where(valid, values - low, 0) * 256 / (high - low)).clip(0, 255).astype(np.uint8)


def readable_batches(
    paths: Sequence[str], read: Callable[[str], np.ndarray], batch_size: int, workers: int
) -> Iterator[tuple[list[np.ndarray], list[int], list[str]]]:
    """Read images in order and ahead of their use. In threads: Pillow releases the interpreter's lock.

    Args:
        paths: of the images.
        read: a path to pixels; raises UnreadableImages.
        batch_size: images at a time; the last time may have fewer.
        workers: threads.

    Yields:
        (what read gives, n times, the n rows of paths, failures). What cannot be read is in no batch:
        failures says "path (reason)" of it.
    """

    def read_piece(piece: Sequence[str]) -> list[np.ndarray | UnreadableImages]:
        images = []
        for path in piece:
            try:
                images.append(read(path))
            except UnreadableImages as error:
                images.append(error)
        return images

    pieces = (paths[start : start + DECODE_PIECE] for start in range(0, len(paths), DECODE_PIECE))
    pool = ThreadPoolExecutor(max(workers, 1))
    try:
        ahead = 1 + 2 * workers + batch_size // 4
        pending = deque(pool.submit(read_piece, piece) for piece in islice(pieces, ahead))
        pixels, rows, failures, row = [], [], [], 0
        while pending:
            for image in pending.popleft().result():
                if isinstance(image, UnreadableImages):
                    failures += image.failures
                else:
                    pixels.append(image)
                    rows.append(row)
                row += 1
            pending.extend(pool.submit(read_piece, piece) for piece in islice(pieces, 1))
            while len(rows) >= batch_size or (rows and not pending):
                yield pixels[:batch_size], rows[:batch_size], failures
                del pixels[:batch_size], rows[:batch_size]
                failures = []
        if failures:
            yield [], [], failures
    finally:
        pool.shutdown(cancel_futures=True)


def decode(
    paths: Sequence[str],
    height: int,
    width: int,
    workers: int,
    batch_size: int = 64,
    pixel_range: PixelRange | None = None,
) -> Iterator[np.ndarray]:
    """Decode images in order and ahead of their use.

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

    def read(path: str) -> np.ndarray:
        return read_image(path, height, width, pixel_range)

    failures = []
    with contextlib.closing(readable_batches(paths, read, batch_size, workers)) as batches:
        for pixels, _, failed in batches:
            failures += failed
            if not failures:
                yield np.stack(pixels)
    if failures:
        raise UnreadableImages(failures)
