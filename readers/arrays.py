"""The arrays of training images on disk: written once from image files, opened by every run."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from images import FULL_RANGE, PixelRange, UnreadableImages, decode
from readers.ranges import find_pixel_range
from utils import UserError, log, whole_file


def write_array(
    paths: Sequence[str],
    file: str | os.PathLike,
    height: int,
    width: int,
    workers: int,
    progress: Callable[[int], object] | None = None,
    pixel_range: PixelRange | None = None,
) -> None:
    """Decode images into an .npy file (N, height, width, 3) uint8.

    Written batch by batch and not through a memory map, whose pages would count as this process's memory.

    Args:
        paths: of the images.
        file: to write, in place: pass the temporary name of utils.whole_file.
        height, width: to resize to, in pixels.
        workers: threads that decode.
        progress: called with the number of images written since the last call.
        pixel_range: see images.read_image.

    Raises:
        UnreadableImages: with every image that cannot be read.
    """
    batches = decode(paths, height, width, workers, pixel_range=pixel_range)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), height, width, 3)}
    with open(file, "wb") as stream, contextlib.closing(batches):
        np.lib.format.write_array_header_1_0(stream, header)
        for pixels in batches:
            stream.write(pixels)
            if progress:
                progress(len(pixels))


@dataclass(frozen=True, eq=False)
class TrainingImages:
    """The image files that training arrays are made of."""

    paths: dict[str, Sequence[str]]  # {modality: N paths}
    labels: dict[str, np.ndarray]  # {modality: (N,)}, 0..C-1
    pids: Sequence[int]  # of labels 0..C-1


@dataclass(frozen=True, eq=False)
class TrainingArrays:
    """The training images of both modalities, {"visible": …, "infrared": …}, and their identities."""

    images: dict[str, np.ndarray]  # (N, H, W, 3) uint8, memory-mapped
    labels: dict[str, np.ndarray]  # (N,) int64, 0..C-1
    pids: list[int] | None  # of labels 0..C-1; None: not recorded
    fingerprint: str | None  # of the image files; None: not recorded
    pixel_range: PixelRange | None  # by which they were decoded; None: no image has more than eight bits
    range_was_given: bool = False  # and not found from the images


def array_files(folder: str | os.PathLike, prefix: str = "train") -> dict[str, tuple[Path, Path]]:
    """{modality: (images, labels)}: the files of training arrays. The released code uses the same names."""
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
    root = os.path.commonpath([os.path.dirname(path) for files in paths.values() for path in files])
    digest = hashlib.sha256()
    for modality in sorted(paths):
        for path in paths[modality]:
            try:
                status = os.stat(path)
                facts = (status.st_size, status.st_mtime_ns)
            except OSError:  # decoding will report it
                facts = None
            digest.update(
                repr((modality, os.path.relpath(path, root), facts)).encode("utf-8", "surrogateescape")
            )
    return digest.hexdigest()


def write_training_arrays(
    folder: str | os.PathLike,
    source: TrainingImages,
    height: int,
    width: int,
    workers: int,
    prefix: str = "train",
    pixel_range: PixelRange | None = None,
) -> None:
    """Decode the training images into the files of array_files, and write a manifest.

    Shows a bar on a terminal. Existing files stay until the last image is written. The manifest, which
    records the images that the arrays were made from, is replaced last.

    Args:
        folder: for the files.
        source: the images; the manifest records their pids.
        height, width: to resize to, in pixels.
        workers: threads that decode.
        prefix: of the files' names.
        pixel_range: of images of more than eight bits, recorded in the manifest; None: find_pixel_range.

    Raises:
        UserError: too little disk space (checked before decoding); see also find_pixel_range.
        UnreadableImages: with every image that cannot be read.
    """
    given = pixel_range is not None
    paths = source.paths
    pixel_range = find_pixel_range(paths, workers, pixel_range)
    files = array_files(folder, prefix)
    _say_what_is_replaced(files, height, width)
    manifest = {
        "height": height,
        "width": width,
        "images": {modality: len(paths[modality]) for modality in files},
        "pids": [int(pid) for pid in source.pids],
        "fingerprint": fingerprint(paths),  # before decoding: it will differ if an image changes meanwhile
        "pixel_range": pixel_range,
        "pixel_range_given": given,
    }
    failures = []
    with contextlib.ExitStack() as stack:  # renames the files in reverse order, so the manifest last
        temporary = stack.enter_context(whole_file(_manifest_file(folder, prefix)))
        temporary.write_text(json.dumps(manifest), encoding="utf-8")
        need = sum(map(len, paths.values())) * (height * width * 3 + 8) + 4096
        free = shutil.disk_usage(folder).free
        if need > free:
            raise UserError(
                f"{folder}: the arrays need {need / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free"
            )
        bar = stack.enter_context(
            tqdm(total=sum(map(len, paths.values())), desc="decoding", unit="image", disable=None)
        )
        for modality, (image_file, label_file) in files.items():
            with open(stack.enter_context(whole_file(label_file)), "wb") as stream:
                np.save(stream, np.asarray(source.labels[modality], dtype=np.int64))
            temporary = stack.enter_context(whole_file(image_file))
            try:
                write_array(paths[modality], temporary, height, width, workers, bar.update, pixel_range)
            except UnreadableImages as error:
                failures += error.failures
        if failures:
            raise UnreadableImages(failures)


def _say_what_is_replaced(files: dict[str, tuple[Path, Path]], height: int, width: int) -> None:
    """Warn of arrays of another image size, which another run may still want."""
    for file, _ in files.values():
        with contextlib.suppress(UserError):
            shape = _load(file, "").shape
            if len(shape) == 4 and shape[1:3] != (height, width):
                log.warning(
                    "%s: its %d images of %dx%d are replaced by %dx%d", file, *shape[:3], height, width
                )


def _load(file: Path, remake: str) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing; {remake}") from error
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: not a readable NumPy array; {remake}") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{file}: not a single NumPy array; {remake}")
    return array


def _read_manifest(file: Path, remake: str) -> dict | None:
    """The content of a manifest; None if the file does not exist."""
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
    """Open training arrays, memory-mapped, written by write_training_arrays or by other code.

    Arrays without a manifest are accepted with a warning.

    Args:
        folder: of the arrays.
        height, width: that the images must have, in pixels.
        paths: {modality: paths} of the current images, to compare with; None: do not compare.
        prefix: of the files' names.
        data_path: the dataset's folder, for messages, if it is not folder.
        pixel_range: that the images must have been decoded with; None: any.

    Raises:
        UserError: a file is missing or unreadable, has another dtype, shape or image size, or was made from
            other images or with another pixel range; or labels are missing in a modality. Names the file.
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

    classes = 1 + max(int(array.max()) for array in labels.values())
    for modality, (_, label_file) in files.items():
        if not np.array_equal(np.unique(labels[modality]), np.arange(classes)):
            raise UserError(f"{label_file}: some labels of 0..{classes - 1} are missing; {remake}")
    if manifest is None:
        log.warning("%s: no %s: using the arrays unchecked", folder, manifest_file.name)
    elif len(manifest["pids"]) != classes:
        raise UserError(f"{files['visible'][1]}: does not belong to {manifest_file}; {remake}")
    elif paths is not None and manifest["fingerprint"] != fingerprint(paths):
        raise UserError(
            f"{files['visible'][0]}: the images have changed since it was written, or were copied "
            f"without their times (cp -a keeps them); {remake}"
        )
    elif pixel_range is not None and manifest.get("pixel_range") != list(pixel_range):
        raise UserError(f"{files['visible'][0]}: made with another pixel range; {remake}")
    made_by = pixel_range if manifest is None else manifest.get("pixel_range")
    return TrainingArrays(
        images=images,
        labels={modality: array.astype(np.int64) for modality, array in labels.items()},
        pids=manifest and manifest["pids"],
        fingerprint=manifest and manifest["fingerprint"],
        pixel_range=None if made_by is None else tuple(made_by),
        range_was_given=bool(manifest and manifest.get("pixel_range_given")),
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
    """Compare an array with the current images; by_time: there is no manifest, so compare the times."""
    if number != len(paths):
        raise UserError(f"{file}: holds {number} images, the dataset has {len(paths)}; {remake}")
    if by_time and file.stat().st_mtime < max(os.stat(path).st_mtime for path in paths):
        raise UserError(f"{file}: older than the images; {remake}")


def training_arrays(
    folder: str | os.PathLike,
    source: TrainingImages,
    height: int,
    width: int,
    workers: int,
    prefix: str = "train",
    pixel_range: PixelRange | None = None,
) -> TrainingArrays:
    """Open the training arrays in folder; write them first if they are missing or out of date.

    Arguments and errors are those of write_training_arrays.
    """
    if _manifest_file(folder, prefix).exists():
        with contextlib.suppress(UserError):
            arrays = open_training_arrays(
                folder, height, width, source.paths, prefix, pixel_range=pixel_range
            )
            same = all(np.array_equal(arrays.labels[key], labels) for key, labels in source.labels.items())
            if same and (pixel_range is not None or not arrays.range_was_given):  # by an earlier run's flag
                return arrays
    log.info("decoding %d training images into %s (once)", sum(map(len, source.paths.values())), folder)
    write_training_arrays(folder, source, height, width, workers, prefix, pixel_range)
    return open_training_arrays(folder, height, width, source.paths, prefix)
