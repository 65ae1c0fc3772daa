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


class ArrayFiles:
    """The files of training arrays: images and labels of both modalities, and what they were made from.

    Args:
        folder: of the files.
        height, width: of the images, in pixels.
        prefix: of the files' names. The released code has the same names.
    """

    def __init__(self, folder: str | os.PathLike, height: int, width: int, prefix: str = "train"):
        self.folder, self.height, self.width = folder, height, width
        self.manifest = Path(folder, f"{prefix}_resized.json")
        self.files = {  # modality: images, labels
            modality: tuple(Path(folder, f"{prefix}_{word}_resized_{kind}.npy") for kind in ("img", "label"))
            for modality, word in (("visible", "rgb"), ("infrared", "ir"))
        }

    def write(self, source: TrainingImages, workers: int, pixel_range: PixelRange | None = None) -> None:
        """Decode the training images into the files, and write the manifest.

        Shows a bar on a terminal. Existing files stay until the last image is written. The manifest, which
        records the images that the arrays were made from, is replaced last.

        Args:
            source: the images.
            workers: threads that decode.
            pixel_range: of images of more than eight bits, kept in the manifest; None: find_pixel_range.

        Raises:
            UserError: too little disk space (checked before decoding); see also find_pixel_range.
            UnreadableImages: with every image that cannot be read.
        """
        given, paths = pixel_range is not None, source.paths
        pixel_range = find_pixel_range(paths, workers, pixel_range)
        self._say_what_is_replaced()
        manifest = {
            "height": self.height,
            "width": self.width,
            "images": {modality: len(paths[modality]) for modality in self.files},
            "pids": [int(pid) for pid in source.pids],
            "fingerprint": fingerprint(paths),  # before decoding: it differs if an image changes meanwhile
            "pixel_range": pixel_range,
            "pixel_range_given": given,
        }
        number, failures = sum(map(len, paths.values())), []
        with contextlib.ExitStack() as stack:  # renames the files in reverse order, so the manifest last
            temporary = stack.enter_context(whole_file(self.manifest))
            temporary.write_text(json.dumps(manifest), encoding="utf-8")
            need = number * (self.height * self.width * 3 + 8) + 4096
            if need > (free := shutil.disk_usage(self.folder).free):
                sizes = f"{need / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free"
                raise UserError(f"{self.folder}: the arrays need {sizes}")
            bar = stack.enter_context(tqdm(total=number, desc="decoding", unit="image", disable=None))
            for modality, (image_file, label_file) in self.files.items():
                with open(stack.enter_context(whole_file(label_file)), "wb") as stream:
                    np.save(stream, np.asarray(source.labels[modality], dtype=np.int64))
                temporary = stack.enter_context(whole_file(image_file))
                size = self.height, self.width
                try:
                    write_array(paths[modality], temporary, *size, workers, bar.update, pixel_range)
                except UnreadableImages as error:
                    failures += error.failures
            if failures:
                raise UnreadableImages(failures)

    def _say_what_is_replaced(self) -> None:
        """Warn of arrays of another image size, which another run may still want."""
        for file, _ in self.files.values():
            with contextlib.suppress(UserError):
                shape, size = _load(file).shape, (self.height, self.width)
                if len(shape) == 4 and shape[1:3] != size:
                    log.warning("%s: its %d images of %dx%d are replaced by %dx%d", file, *shape[:3], *size)

    def load(
        self,
        paths: dict[str, Sequence[str]] | None = None,
        pixel_range: PixelRange | None = None,
        data_path: str | os.PathLike | None = None,
    ) -> TrainingArrays:
        """Open the arrays, memory-mapped, which write or other code has written.

        Arrays without a manifest are accepted with a warning.

        Args:
            paths: {modality: paths} of the current images, to compare with; None: do not compare.
            pixel_range: that the images must have been decoded with; None: any.
            data_path: the dataset's folder, for messages, if it is not that of the arrays.

        Raises:
            UserError: a file is missing or unreadable, has another dtype, shape or image size, or was made
                from other images or with another pixel range; or labels are missing in a modality. Names the
                file, and the command that makes it.
        """
        try:
            return self._load_all(paths, pixel_range)
        except UserError as error:
            folder = data_path or self.folder
            remake = f"run python pre_process_sysu.py --data-path {folder}"
            if Path(folder) != Path(self.folder):
                remake += f" --output {self.folder}"
            remake += f" --img-h {self.height} --img-w {self.width}"
            if pixel_range is not None:
                remake += f" --pixel-range {pixel_range[0]:g} {pixel_range[1]:g}"
            raise UserError(f"{error}; {remake}") from error

    def _load_all(
        self, paths: dict[str, Sequence[str]] | None, pixel_range: PixelRange | None
    ) -> TrainingArrays:
        manifest, images, labels = self._read_manifest(), {}, {}
        for modality in self.files:
            own = None if paths is None else paths[modality]
            images[modality], labels[modality] = self._load_modality(modality, manifest, own)

        (first, first_labels), classes = self.files["visible"], 1 + max(int(a.max()) for a in labels.values())
        for modality, (_, label_file) in self.files.items():
            if not np.array_equal(np.unique(labels[modality]), np.arange(classes)):
                raise UserError(f"{label_file}: some labels of 0..{classes - 1} are missing")
        if manifest is None:
            log.warning("%s: no %s: using the arrays unchecked", self.folder, self.manifest.name)
        elif len(manifest["pids"]) != classes:
            raise UserError(f"{first_labels}: does not belong to {self.manifest}")
        elif paths is not None and manifest["fingerprint"] != fingerprint(paths):
            raise UserError(
                f"{first}: the images have changed since it was written, or were copied without their times "
                "(cp -a keeps them)"
            )
        elif pixel_range is not None and manifest.get("pixel_range") != list(pixel_range):
            raise UserError(f"{first}: made with another pixel range")
        made_by = pixel_range if manifest is None else manifest.get("pixel_range")
        return TrainingArrays(
            images=images,
            labels={modality: array.astype(np.int64) for modality, array in labels.items()},
            pids=manifest and manifest["pids"],
            fingerprint=manifest and manifest["fingerprint"],
            pixel_range=None if made_by is None else tuple(made_by),
            range_was_given=bool(manifest and manifest.get("pixel_range_given")),
        )

    def _load_modality(
        self, modality: str, manifest: dict | None, paths: Sequence[str] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The images of a modality and their labels, each checked by itself."""
        image_file, label_file = self.files[modality]
        images, labels = _load(image_file), np.array(_load(label_file))
        shape, number = images.shape, len(images)
        if images.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not number:
            raise UserError(f"{image_file}: {images.dtype} {shape} is not uint8 (N, height, width, 3)")
        if shape[1:3] != (self.height, self.width):
            made, wanted = f"{shape[1]}x{shape[2]}", f"--img-h {self.height} --img-w {self.width}"
            raise UserError(f"{image_file}: its images are {made}, not {wanted}")
        if labels.dtype.kind not in "iu" or labels.shape != (number,):
            raise UserError(f"{label_file}: {labels.dtype} {labels.shape} is not ({number},) integers")
        if manifest is not None and manifest["images"].get(modality) != number:
            raise UserError(f"{image_file}: does not belong to {self.manifest}")
        if paths is not None and number != len(paths):
            raise UserError(f"{image_file}: holds {number} images, the dataset has {len(paths)}")
        unknown = paths is not None and manifest is None
        if unknown and image_file.stat().st_mtime < max(os.stat(path).st_mtime for path in paths):
            raise UserError(f"{image_file}: older than the images")
        return images, labels

    def _read_manifest(self) -> dict | None:
        """The content of the manifest; None if the file does not exist."""
        facts = {"height": int, "width": int, "images": dict, "pids": list, "fingerprint": str}
        try:
            manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
            low, high = manifest.get("pixel_range") or FULL_RANGE
            if low < high and all(isinstance(manifest[key], kind) for key, kind in facts.items()):
                return manifest
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            pass
        raise UserError(f"{self.manifest}: not a manifest of training arrays")

    def load_or_write(
        self, source: TrainingImages, workers: int, pixel_range: PixelRange | None = None
    ) -> TrainingArrays:
        """Open the arrays; write them first if they are missing or out of date. For the rest see write."""
        if self.manifest.exists():
            with contextlib.suppress(UserError):
                arrays = self.load(source.paths, pixel_range)
                same = all(np.array_equal(arrays.labels[key], part) for key, part in source.labels.items())
                if same and (pixel_range is not None or not arrays.range_was_given):  # by an earlier run
                    return arrays
        number = sum(map(len, source.paths.values()))
        log.info("decoding %d training images into %s (once)", number, self.folder)
        self.write(source, workers, pixel_range)
        return self.load(source.paths)


def _load(file: Path) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing") from error
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: not a readable NumPy array") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{file}: not a single NumPy array")
    return array
