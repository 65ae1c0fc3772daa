"""Pictures of results: queries with the gallery images that the network ranks first."""

import os
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from images import read_image
from utils import whole_file

RIGHT, WRONG, NEUTRAL = "#2e9e4f", "#d2372c", "#5b6470"


def ranked_results(
    queries: Sequence[tuple[str, int]],
    ranked: Sequence[Sequence[tuple[str, int]]],
    path: str | os.PathLike,
    height: int = 144,
    width: int = 60,
) -> None:
    """Write a picture: a row for each query, on its left, and the images ranked first for it, nearest first.

    queries: (image, pid) each; ranked: for each query its (image, pid) in ranking order; a right one has a
    green frame, a wrong one a red one. height, width: of each image, pixels. Raises UserError for an image
    that cannot be read or a path that cannot be written.
    """
    frame, gap, head = 4, 6, 30
    cell_h, cell_w = height + 2 * frame + gap, width + 2 * frame + gap
    columns = max((len(row) for row in ranked), default=0)
    left = cell_w + 3 * gap  # the query stands a little apart
    canvas = Image.new("RGB", (left + columns * cell_w + gap, head + len(queries) * cell_h + gap), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(15)
    draw.text((gap + cell_w / 2, head / 2), "query", "black", font, anchor="mm")
    for k in range(columns):
        draw.text((left + k * cell_w + cell_w / 2, head / 2), str(k + 1), "black", font, anchor="mm")

    def put(image_path: str, x: int, y: int, color: str) -> None:
        draw.rectangle((x, y, x + width + 2 * frame - 1, y + height + 2 * frame - 1), color)
        canvas.paste(Image.fromarray(read_image(image_path, height, width)), (x + frame, y + frame))

    for row, ((query, pid), found) in enumerate(zip(queries, ranked, strict=True)):
        y = head + row * cell_h
        put(query, gap, y, NEUTRAL)
        for k, (image, other) in enumerate(found):
            put(image, left + k * cell_w, y, RIGHT if other == pid else WRONG)
    with whole_file(path) as temporary:
        canvas.save(temporary, "PNG", optimize=True)
