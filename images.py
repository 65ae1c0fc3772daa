"""Image files to uint8 arrays, and the arrays of training images on disk."""

import contextlib
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils import UserError, log, whole_file

DECODE_PIECE = 8  # images a thread decodes in one go
FULL_RANGE = (0.0, 65535.0)  # as a pixel range: the high byte of 16 bits
MIN_LEVELS = 8  # grey levels, of 256: with fewer, nearly everything is lost
EIGHT_BITS = (".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tga")  # their formats have no more

PixelRange = tuple[float, float]  # the values that become 0 and 255


class UnreadableImages(UserError):
    """Images that cannot be read; failures holds a "path (reason)" for each of them."""

    def __init__(self, failures: list[str]):
        super().__init__(
            f"cannot read {len(failures)} image{'s'[: len(failures) > 1]}: {', '.join(failures)}"
        )
        self.failures = failures


def to_pixels(
    image: Image.Image, height: int, width: int, pixel_range: PixelRange | None = None
) -> np.ndarray:
    """An open image, which it may turn upright in place, as read_image gives it; OSError as its reasons."""
    # Of colours with 16 bits a channel Pillow reads the upper 8; what tells is gone once it is loaded.
    upper_bits = not _is_deep(image) and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    ImageOps.exif_transpose(image, in_place=True)
    if _is_deep(image):
        image = Image.fromarray(_eight_bits(np.asarray(image, dtype=np.float64), pixel_range))
    if "transparency" in image.info:  # palettes warn unless converted in two steps
        image = image.convert("RGBA")
    image = image.convert("RGB")
    if upper_bits and 0 < np.ptp(np.asarray(image)) < MIN_LEVELS:
        raise OSError("16 bits a channel, of which Pillow reads the upper 8 alone; save it as a grey image")
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))


def read_image(
    path: str | os.PathLike, height: int, width: int, pixel_range: PixelRange | None = None
) -> np.ndarray:
    """Read an image file as (height, width, 3) uint8 RGB, resized once with Lanczos.

    Upright by its EXIF; an alpha channel is dropped. Grey images of more than eight bits (16, 32, floating
    point) come to eight by pixel_range, one for a whole dataset (find_pixel_range), before they are resized;
    without one, by their high byte.
    UnreadableImages: no such file, not a file, not an image, truncated, with more pixels than Pillow
    considers safe (a decompression bomb), or with more than eight bits that do not fit pixel_range.
    """
    try:
        if not os.path.isfile(path):  # opening a named pipe would wait for ever
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
    """Whether Pillow gives an image with more than eight bits: clipped at 255, if it converts it."""
    return image.mode == "F" or image.mode.startswith("I")


def _eight_bits(values: np.ndarray, pixel_range: PixelRange | None) -> np.ndarray:
    """Values (H, W) float64 as uint8: 256 levels of equal width. OSError where nearly nothing would be left.

    An image of little contrast may keep few levels: a range of its own would make it another image.
    """
    low, high = pixel_range or FULL_RANGE
    least, most = values.min(), values.max()
    if not np.isfinite(values).all():
        raise OSError("its values are not all finite")
    if least > high or most < low:
        raise OSError(f"its values, {least:g} to {most:g}, are outside the pixel range {low:g} to {high:g}")
    if pixel_range is None and 0 < (most - least) * 256 / (high - low) < MIN_LEVELS:
        raise OSError(f"its values, {least:g} to {most:g}, need a pixel range; the training images had none")
    return ((values - low) * 256 / (high - low)).clip(0, 255).astype(np.uint8)


def find_pixel_range(
    paths: Sequence[str], workers: int, given: PixelRange | None = None
) -> PixelRange | None:
    """The values that become 0 and 255 in a dataset's images of more than eight bits.

    Args:
        paths: the training images. Formats of eight bits are not opened.
        workers: threads.
        given: the user's choice, which is compared with the images' values and returned.

    Returns:
        (low, high), or None if no image has more than eight bits. low is the lowest and high the highest
        value of all images, each without the thousandth of its pixels at either end, which may be dead or
        hot, and without images of one value. If they are more than half of 0..65535 apart, and within it,
        (0, 65535): such files keep their high byte.

    Raises:
        UserError: no image of more than eight bits has two values; or given is no range, is given for
            nothing, or would leave fewer than MIN_LEVELS grey levels or cut off nearly all values.
    """

    def ends(path: str) -> PixelRange | None:
        if path.lower().endswith(EIGHT_BITS):
            return None
        try:
            with Image.open(path) as image:
                if not _is_deep(image):
                    return None
                values = np.sort(np.asarray(image, dtype=np.float64), axis=None)
        except Exception:  # decoding will name it
            return None
        few = len(values) // 1000
        return float(values[few]), float(values[-1 - few])

    flag = "" if given is None else f"--pixel-range {given[0]:g} {given[1]:g}"
    if given is not None and not given[0] < given[1]:
        raise UserError(f"{flag}: the first must be less than the second")
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        deep = [pair for pair in pool.map(ends, paths) if pair is not None]
    if not deep:
        if given is not None:
            raise UserError(f"{flag}: no training image has more than eight bits")
        return None
    varied = [pair for pair in deep if pair[0] < pair[1]]
    if not varied:
        raise UserError(
            f"{len(deep)} images have more than eight bits, and each only one value: {paths[0]} …"
        )
    low, high = min(pair[0] for pair in varied), max(pair[1] for pair in varied)
    found = f"{low:,g} to {high:,g}"
    if given is not None:
        kept = min(high, given[1]) - max(low, given[0])
        if kept * 256 < MIN_LEVELS * max(high - low, given[1] - given[0]):
            raise UserError(f"{flag}: nearly nothing would be left of the images' values, {found}")
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
    """Yield the images of paths in order as (n, height, width, 3) uint8, decoded ahead by workers threads.

    n is batch_size but for the last batch. Threads, not processes: Pillow decodes and resizes without the
    interpreter's lock. UnreadableImages names every unreadable image: after the first of them, the others
    are read for that purpose alone.
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


def write_array(
    paths: Sequence[str],
    file: str | os.PathLike,
    height: int,
    width: int,
    workers: int,
    progress: Callable[[int], object] | None = None,
    pixel_range: PixelRange | None = None,
) -> None:
    """Decode paths into the .npy file (N, height, width, 3) uint8; progress is told how many, as they come.

    Written piece by piece and not through a memory map, whose pages would count as this process's memory.
    file is written in place: hand over the temporary name of utils.whole_file. UnreadableImages: all of them.
    """
    batches = decode(paths, height, width, workers, pixel_range=pixel_range)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), height, width, 3)}
    with open(file, "wb") as stream, contextlib.closing(batches):
        np.lib.format.write_array_header_1_0(stream, header)
        for pixels in batches:
            stream.write(pixels)
            if progress:
                progress(len(pixels))


# --- training arrays on disk


@dataclass(frozen=True, eq=False)
class TrainingArrays:
    """The training images of both modalities, {"visible": …, "infrared": …}, and who is in them."""

    images: dict[str, np.ndarray]  # (N, H, W, 3) uint8, memory-mapped
    labels: dict[str, np.ndarray]  # (N,) int64, 0..C-1
    pids: list[int] | None  # of label 0..C-1; None: not recorded
    fingerprint: str | None  # of the image files; None: not recorded
    pixel_range: PixelRange | None  # by which they were decoded; None: no image has more than eight bits


def array_files(folder: str | os.PathLike, prefix: str = "train") -> dict[str, tuple[Path, Path]]:
    """{modality: (images, labels)}: the files of training arrays, by the names this family of code shares."""
    return {
        modality: (
            Path(folder, f"{prefix}_{word}_resized_img.npy"),
            Path(folder, f"{prefix}_{word}_resized_label.npy"),
        )
        for modality, word in (("visible", "rgb"), ("infrared", "ir"))
    }


def _manifest_file(folder: str | os.PathLike, prefix: str) -> Path:
    return Path(folder, f"{prefix}_resized.json")


def fingerprint(paths: dict[str, Sequence[str]]) -> str:
    """A sha256 over the relative path, size and modification time of every image of {modality: paths}."""
    root = os.path.commonpath([os.path.dirname(path) for part in paths.values() for path in part])
    digest = hashlib.sha256()
    for modality in sorted(paths):
        for path in paths[modality]:
            try:
                status = os.stat(path)
                facts = (status.st_size, status.st_mtime_ns)
            except OSError:  # decoding will name it
                facts = None
            digest.update(
                repr((modality, os.path.relpath(path, root), facts)).encode("utf-8", "surrogateescape")
            )
    return digest.hexdigest()


def write_training_arrays(
    folder: str | os.PathLike,
    paths: dict[str, Sequence[str]],
    labels: dict[str, np.ndarray],
    pids: Sequence[int],
    height: int,
    width: int,
    workers: int,
    prefix: str = "train",
    progress: Callable[[int], object] | None = None,
    pixel_range: PixelRange | None = None,
) -> None:
    """Decode {modality: paths} with {modality: labels (N,)} into the files of array_files and a manifest.

    pids: those of label 0..C-1. pixel_range: see find_pixel_range, which finds one where it is None; the
    manifest keeps it. The former files stay until the last image is written; the manifest, which
    tells arrays from the images that they were made from, changes last.
    UserError: too little disk space, found out before anything is decoded; as find_pixel_range.
    UnreadableImages: all of them.
    """
    pixel_range = find_pixel_range([path for part in paths.values() for path in part], workers, pixel_range)
    files = array_files(folder, prefix)
    manifest = {
        "height": height,
        "width": width,
        "images": {modality: len(paths[modality]) for modality in files},
        "pids": [int(pid) for pid in pids],
        "fingerprint": fingerprint(paths),  # before decoding: an image that changes meanwhile makes it stale
        "pixel_range": pixel_range,
    }
    failures = []
    with contextlib.ExitStack() as stack:  # leaves in reverse order
        temporary = stack.enter_context(whole_file(_manifest_file(folder, prefix)))
        temporary.write_text(json.dumps(manifest), encoding="utf-8")
        need = sum(map(len, paths.values())) * (height * width * 3 + 8) + 4096
        free = shutil.disk_usage(folder).free
        if need > free:
            raise UserError(f"{folder}: the arrays need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
        for modality, (image_file, label_file) in files.items():
            with open(stack.enter_context(whole_file(label_file)), "wb") as stream:
                np.save(stream, np.asarray(labels[modality], dtype=np.int64))
            temporary = stack.enter_context(whole_file(image_file))
            try:
                write_array(paths[modality], temporary, height, width, workers, progress, pixel_range)
            except UnreadableImages as error:
                failures += error.failures
        if failures:
            raise UnreadableImages(failures)


def _load(file: Path, remake: str) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing; {remake}") from error
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: not a NumPy array that can be read; {remake}") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{file}: not one NumPy array; {remake}")
    return array


def _read_manifest(file: Path, remake: str) -> dict | None:
    """What a manifest says; None where there is none."""
    facts = {"height": int, "width": int, "images": dict, "pids": list, "fingerprint": str}
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        low, high = manifest.get("pixel_range") or FULL_RANGE
        if low < high and all(isinstance(manifest[key], kind) for key, kind in facts.items()):
            return manifest
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        pass
    raise UserError(f"{file}: not a manifest of training arrays; {remake}")


def open_training_arrays(
    folder: str | os.PathLike,
    height: int,
    width: int,
    paths: dict[str, Sequence[str]] | None = None,
    prefix: str = "train",
    data_path: str | os.PathLike | None = None,
    pixel_range: PixelRange | None = None,
) -> TrainingArrays:
    """Open the arrays of write_training_arrays, memory-mapped, or other code's under the same names.

    paths, {modality: paths}, are the images as they are now. Arrays without a manifest are taken with a
    warning. data_path: the dataset's folder, for messages, where that is another one. pixel_range: the one
    that they must have been decoded by; None: whichever the manifest says.
    UserError, naming the file: missing, unreadable, another dtype, shape or size, labels of another number,
    with holes or in one modality only, or arrays that were not made from the images as they are now, or not
    by pixel_range.
    """
    output = "" if data_path is None or Path(data_path) == Path(folder) else f" --output {folder}"
    remake = (
        f"run python pre_process_sysu.py --data-path {data_path or folder}{output} "
        f"--img-h {height} --img-w {width}"
    )
    if pixel_range is not None:
        remake += f" --pixel-range {pixel_range[0]:g} {pixel_range[1]:g}"
    files = array_files(folder, prefix)
    manifest_file = _manifest_file(folder, prefix)
    manifest = _read_manifest(manifest_file, remake)
    images, labels = {}, {}
    for modality, (image_file, label_file) in files.items():
        images[modality] = _load(image_file, remake)
        labels[modality] = np.array(_load(label_file, remake))
        _check_images(images[modality], image_file, height, width, remake)
        _check_labels(labels[modality], label_file, len(images[modality]), remake)
        if manifest is not None and manifest["images"].get(modality) != len(images[modality]):
            raise UserError(f"{image_file}: does not belong to {manifest_file}; {remake}")
        if paths is not None:
            _check_sources(image_file, len(images[modality]), paths[modality], manifest is None, remake)

    classes = 1 + max(int(part.max()) for part in labels.values())
    for modality, (_, label_file) in files.items():
        if not np.array_equal(np.unique(labels[modality]), np.arange(classes)):
            raise UserError(f"{label_file}: labels with holes: not every one of 0..{classes - 1}; {remake}")
    if manifest is None:
        log.warning("%s: no %s: taking the arrays as they are", folder, manifest_file.name)
    elif len(manifest["pids"]) != classes:
        raise UserError(f"{files['visible'][1]}: does not belong to {manifest_file}; {remake}")
    elif paths is not None and manifest["fingerprint"] != fingerprint(paths):
        raise UserError(
            f"{files['visible'][0]}: the images have changed since it was made, or were copied without "
            f"their times (cp -a keeps them); {remake}"
        )
    elif pixel_range is not None and manifest.get("pixel_range") != list(pixel_range):
        raise UserError(f"{files['visible'][0]}: made by another pixel range; {remake}")
    made_by = pixel_range if manifest is None else manifest.get("pixel_range")
    return TrainingArrays(
        images=images,
        labels={modality: part.astype(np.int64) for modality, part in labels.items()},
        pids=manifest and manifest["pids"],
        fingerprint=manifest and manifest["fingerprint"],
        pixel_range=None if made_by is None else tuple(made_by),
    )


def _check_images(images: np.ndarray, file: Path, height: int, width: int, remake: str) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise UserError(f"{file}: {images.dtype} {images.shape} is not uint8 (N, height, width, 3); {remake}")
    if images.shape[1:3] != (height, width):
        made = f"{images.shape[1]}x{images.shape[2]}"
        raise UserError(f"{file}: its images are {made}, not --img-h {height} --img-w {width}; {remake}")


def _check_labels(labels: np.ndarray, file: Path, number: int, remake: str) -> None:
    if labels.dtype.kind not in "iu" or labels.shape != (number,):
        raise UserError(f"{file}: {labels.dtype} {labels.shape} is not ({number},) integers; {remake}")


def _check_sources(file: Path, number: int, paths: Sequence[str], by_time: bool, remake: str) -> None:
    """Compare an array with the images as they are now; by_time where no manifest tells more."""
    if number != len(paths):
        raise UserError(f"{file}: holds {number} images, the dataset has {len(paths)}; {remake}")
    if by_time and file.stat().st_mtime < max(os.stat(path).st_mtime for path in paths):
        raise UserError(f"{file}: older than the images; {remake}")


def training_arrays(
    folder: str | os.PathLike,
    paths: dict[str, Sequence[str]],
    labels: dict[str, np.ndarray],
    pids: Sequence[int],
    height: int,
    width: int,
    workers: int,
    prefix: str = "train",
    progress: Callable[[int], object] | None = None,
    pixel_range: PixelRange | None = None,
) -> TrainingArrays:
    """Open the arrays of these images in folder, after making them where they are missing or out of date.

    Arguments and errors as write_training_arrays.
    """
    if _manifest_file(folder, prefix).exists():
        with contextlib.suppress(UserError):
            arrays = open_training_arrays(folder, height, width, paths, prefix, pixel_range=pixel_range)
            if all(np.array_equal(arrays.labels[modality], labels[modality]) for modality in labels):
                return arrays
    total = sum(map(len, paths.values()))
    log.info("decoding %d training images once, into %s", total, folder)
    write_training_arrays(folder, paths, labels, pids, height, width, workers, prefix, progress, pixel_range)
    return open_training_arrays(folder, height, width, paths, prefix)
