"""Thumbnails of many images in few sheets, small enough to stand in one page."""

import base64
import io
import math
from collections.abc import Iterable

import numpy as np
from PIL import Image

from utils import UserError

COLUMNS, ROWS = 8, 8  # thumbnails on a sheet: few, since a browser decodes a whole sheet to show one
BUDGET = 8_000_000  # bytes of all sheets; as text in a page they take a third more
QUALITIES = (80, 65, 50, 35, 20, 5)  # WebP's; the first whose sheets fit the budget is taken
PIXEL = 0.25  # bytes that a pixel takes at the best quality, about


def thumbnail_size(count: int, height: int, width: int, tallest: int = 128) -> tuple[int, int]:
    """Height and width, pixels, of each of count thumbnails of images of height x width: what the budget
    allows, at least 48 and at most `tallest` high."""
    fitting = math.sqrt(BUDGET / (PIXEL * max(1, count)) * height / width)
    tall = round(min(tallest, max(48, fitting)))
    return tall, max(8, round(tall * width / height))


def sheets(batches: Iterable[np.ndarray]) -> list[str]:
    """Sheets of COLUMNS x ROWS thumbnails as data URLs of WebP, all of one quality, within the budget.

    batches: thumbnails (n, h, w, 3) uint8, all of one size; number k stands on sheet k // (COLUMNS * ROWS),
    row by row. Raises UserError where even the worst quality is more than the budget.
    """
    pages, waiting = [], []
    for batch in batches:
        waiting += list(batch)
        while len(waiting) >= COLUMNS * ROWS:
            pages.append(_page(waiting[: COLUMNS * ROWS]))
            del waiting[: COLUMNS * ROWS]
    if waiting:
        pages.append(_page(waiting))
    for quality in QUALITIES:
        encoded, size = [], 0
        for page in pages:
            buffer = io.BytesIO()
            page.save(buffer, "WEBP", quality=quality, method=2)
            encoded.append(buffer.getvalue())
            size += len(encoded[-1])
            if size > BUDGET:
                break
        else:
            return ["data:image/webp;base64," + base64.b64encode(data).decode() for data in encoded]
    raise UserError(
        f"{len(pages) * COLUMNS * ROWS} thumbnails are too many for one page: fewer protocols, or --figures"
    )


def _page(thumbnails: list[np.ndarray]) -> Image.Image:
    """One sheet; black where no thumbnail is left."""
    height, width, _ = thumbnails[0].shape
    page = np.zeros((ROWS * height, COLUMNS * width, 3), np.uint8)
    for k, thumbnail in enumerate(thumbnails):
        y, x = k // COLUMNS * height, k % COLUMNS * width
        page[y : y + height, x : x + width] = thumbnail
    return Image.fromarray(page)
