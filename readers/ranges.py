"""The pixel range of a dataset: the values that become grey 0 and 255 in images of more than eight bits.

`examine` looks at the images of a dataset before anything is made of them. train.py and pre_process_sysu.py
go through find_pixel_range, which raises what examine finds wrong; who only wants to know (tools.check) calls
examine itself.
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from images import FULL_RANGE, MIN_LEVELS, PixelRange
from readers.formats import EIGHT_BITS, open_image
from utils import UserError, log

EIGHT_BIT_SUFFIXES = (  # formats without more than eight bits
    ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tga",
)  # fmt: skip
ALIKE = 0.8  # a size that so many images of a modality have is the rule, and another one is told of


@dataclass
class Examined:
    """What examine found.

    pixel_range: the values that become 0 and 255; None: no image has more than eight bits, or see problems.
    problems: what training refuses, a line each; the first is what it would say.
    notes: what is told before training: the range, and files that disagree with the others of their modality.
    lines: of the log, for what is as it should be.
    """

    pixel_range: PixelRange | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Facts:
    """Of one image: its kind, size, and, if it has more than eight bits, the range of its values."""

    path: str
    kind: str
    size: tuple[int, int] | None  # height, width; None: not opened
    deep: bool
    low: float = np.nan  # without isolated extremes; NaN: no value is a number
    high: float = np.nan
    unknown: float = 0.0  # share of NaN and infinity

    @property
    def varied(self) -> bool:
        return self.low < self.high


def examine(paths: dict[str, Sequence[str]], workers: int, given: PixelRange | None = None) -> Examined:
    """Look at a dataset's images of more than eight bits, and find or check the pixel range.

    The found range goes from the lowest to the highest value of all images. Dead and hot pixels, fills
    (value_range) and images with a single value do not count. If it is within 0..65535 and longer than half
    of it, it is (0, 65535): such files keep their high byte.

    Args:
        paths: {modality: the images}. Formats of eight bits are not opened; what cannot be read is left out,
            because decoding names it.
        workers: threads.
        given: the user's choice, --pixel-range.

    Returns:
        The range, or the problems: given is no range, is not needed, or does not hold all values that count;
        no image has two values; or a modality's images would keep fewer than MIN_LEVELS grey levels.
    """
    found = Examined()
    flag = "" if given is None else f"--pixel-range {given[0]:g} {given[1]:g}"
    if given is not None and not given[0] < given[1]:
        found.problems.append(f"{flag}: LOW must be less than HIGH")
        return found
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        facts = {
            modality: [image for image in pool.map(_facts, part) if image] for modality, part in paths.items()
        }
    for modality, images in facts.items():
        found.notes += _disagreements(modality, images)
    deep = {modality: [image for image in images if image.deep] for modality, images in facts.items()}
    every = [image for images in deep.values() for image in images]
    if not every:
        if given is not None:
            found.problems.append(f"{flag}: no training image has more than eight bits")
        return found
    varied = [image for image in every if image.varied]
    if not varied:
        empty = [image for image in every if np.isnan(image.low)]
        flat = [image for image in every if image.low == image.high]
        words = _groups({"no number, only NaN or infinity": empty, "a single value": flat})
        found.problems.append(f"no image of more than eight bits can be used: {words}")
        return found
    lowest, highest = min(varied, key=lambda image: image.low), max(varied, key=lambda image: image.high)
    low, high = lowest.low, highest.high
    if given is not None:
        cut = [image for image in varied if image.low < given[0] or image.high > given[1]]
        if cut:
            found.problems.append(
                f"{flag}: {len(cut)} of {len(every)} images have values outside it, as {cut[0].path}, "
                f"{_span(cut[0].low, cut[0].high)}; all images need {_span(low, high)}"
            )
            return found
        low, high = given
    elif low >= FULL_RANGE[0] and high <= FULL_RANGE[1] and high - low > FULL_RANGE[1] / 2:
        low, high = FULL_RANGE
    for modality, images in deep.items():
        if not (seen := [image for image in images if image.varied]):
            continue
        levels = float(np.median([image.high - image.low for image in seen])) * 256 / (high - low)
        span = _span(min(image.low for image in seen), max(image.high for image in seen))
        if levels < MIN_LEVELS:
            why = flag or (
                f"the pixel range found, {_span(low, high)} (from {lowest.path} to {highest.path}), is too "
                "wide: mend or remove those files, or choose --pixel-range"
            )
            found.problems.append(
                f"{why}: nearly nothing would be left of the {modality} images' values, which are {span}: "
                f"{levels:.1f} of 256 grey levels in the median image"
            )
            return found
        found.lines.append(
            f"{modality}: {len(images)} of {len(paths[modality])} training images have more than eight bits, "
            f"values {span}: grey 0 to 255 is {_span(low, high)}, of which the median image keeps "
            f"{min(levels, 256):.0f} levels"
        )
    found.pixel_range = low, high
    return found


def find_pixel_range(
    paths: dict[str, Sequence[str]], workers: int, given: PixelRange | None = None
) -> PixelRange | None:
    """The range that examine finds, logged with all that is to be told; UserError: its first problem."""
    found = examine(paths, workers, given)
    for note in found.notes:
        log.warning("%s", note)
    if found.problems:
        raise UserError(found.problems[0])
    for line in found.lines:
        log.info("%s", line)
    return found.pixel_range


def _facts(path: str) -> _Facts | None:
    if path.lower().endswith(EIGHT_BIT_SUFFIXES):
        return _Facts(path, EIGHT_BITS, None, False)
    try:
        with open_image(path) as opened:
            size = opened.height, opened.width
            if not opened.deep:
                return _Facts(path, opened.kind, size, False)
            counts = np.asarray(opened.load()).ravel()
    except Exception:  # decoding will report it
        return None
    known = counts[np.isfinite(counts)]
    # "stable" is a radix sort for 16 bits, and fast.
    low, high = value_range(np.sort(known, kind="stable")) if known.size else (np.nan, np.nan)
    return _Facts(path, opened.kind, size, True, low, high, 1 - known.size / counts.size)


def value_range(values: np.ndarray) -> PixelRange:
    """The lowest and the highest of an image's values (sorted, 1-d), without those that mean nothing.

    Left out, at either end, are up to a hundredth of the pixels, if a gap wider than all other values keeps
    them apart; any number of pixels with one single value, if a gap keeps them apart that is wider than an
    eighth of the other values and than four times any other gap (a border, or a fill where there is no data);
    and then a thousandth of the pixels, which may be dead or hot.
    """
    values = values.astype(np.float64)
    part = len(values) // 100
    spread = values[-1 - part] - values[part]
    if spread > 0:
        below = np.flatnonzero(np.diff(values[: part + 1]) > spread)
        above = np.flatnonzero(np.diff(values[len(values) - part - 1 :]) > spread)
        start = below[-1] + 1 if below.size else 0
        stop = len(values) - part + above[0] if above.size else len(values)
        values = values[start:stop]
    steps = np.flatnonzero(np.diff(values)) + 1  # where another value begins
    if len(steps) > 2:
        gaps = values[steps] - values[steps - 1]
        wide = max((values[steps[-1] - 1] - values[steps[0]]) / 8, 4 * gaps[1:-1].max())
        values = values[steps[0] * (gaps[0] > wide) : steps[-1] if gaps[-1] > wide else len(values)]
    few = len(values) // 1000
    return float(values[few]), float(values[-1 - few])


def _disagreements(modality: str, images: Sequence[_Facts]) -> list[str]:
    """A line for each way in which images of a modality differ: kind, size, values, no data."""
    lines = []
    kinds = _by([(image.kind, image) for image in images])
    if len(kinds) > 1:
        lines.append(f"{modality}: files of different kinds: {_groups(kinds)}")
    sizes = _by([("{}x{} pixels".format(*image.size), image) for image in images if image.size])
    if len(sizes) > 1 and max(map(len, sizes.values())) >= ALIKE * len(images):  # crops differ all the time
        lines.append(f"{modality}: files of different sizes: {_groups(sizes)}")
    varied = [image for image in images if image.varied]
    if varied:
        low, high = (np.median([getattr(image, end) for image in varied]) for end in ("low", "high"))
        far = [image for image in varied if image.low < 2 * low - high or image.high > 2 * high - low]
        if far:
            lines.append(
                f"{modality}: {len(far)} of {len(images)} images have values far from the others', as "
                f"{far[0].path}, {_span(far[0].low, far[0].high)} (the median image: {_span(low, high)}): "
                "is it another unit or scale?"
            )
    partly = [image for image in images if image.unknown]
    if partly:
        worst = max(partly, key=lambda image: image.unknown)
        lines.append(
            f"{modality}: {len(partly)} of {len(images)} images have pixels without data (NaN or infinity), "
            f"which become grey 0; the most, {worst.unknown:.1%}, has {worst.path}"
        )
    return lines


def _by(pairs: Sequence[tuple[str, _Facts]]) -> dict[str, list[_Facts]]:
    """Group images by a word, the most frequent first."""
    counts = Counter(word for word, _ in pairs)
    return {word: [image for other, image in pairs if other == word] for word, _ in counts.most_common()}


def _groups(groups: dict[str, list[_Facts]], most: int = 5) -> str:
    words = [f"{len(images)} {word} ({images[0].path})" for word, images in groups.items() if images]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _span(low: float, high: float) -> str:
    return f"{low:,g} to {high:,g}"
