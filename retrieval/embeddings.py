"""Images of one's own to features: the network as a function, and file after file for millions of images."""

import contextlib
import csv
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from PIL import Image
from torch import nn

from augmentation import normalize, pinned
from checkpoints import fingerprint, image_size, load_checkpoint, saved_settings
from data_loader import read_ahead
from devices import Processes
from images import PixelRange, read_image, readable_batches, to_pixels
from model import TwoStreamResNet, build_model, extract_features, folded
from precision import settle
from readers.lists import JUNK, Finder, is_image, other_form, refuse_separator, warn_once
from retrieval.shards import COLUMNS, known_columns
from utils import UserError

BATCH = 64  # images that an Embedder embeds at a time


class Embedder(nn.Module):
    """Image files or PIL images to features; `.to("cuda")` moves it as it does any network.

    network: in evaluation mode. height, width, pixel_range: how its training images were read
    (images.read_image). fingerprint: of its weights. amp: as `--amp`; a call compares reduced precision with
    float32, once on each device (precision.settle).
    """

    def __init__(
        self,
        network: TwoStreamResNet,
        height: int,
        width: int,
        pixel_range: PixelRange | None = None,
        fingerprint: str = "",
        amp: str = "auto",
    ):
        super().__init__()
        self.network, self.height, self.width = network, height, width
        self.pixel_range, self.fingerprint, self.amp = pixel_range, fingerprint, amp
        self.settled: dict[torch.device, torch.dtype | None] = {}  # the precision on each

    def forward(self, images: Sequence[str | os.PathLike | Image.Image], modality: str) -> torch.Tensor:
        """Unit features (N, D) float32, on the network's device, of N image files or PIL images.

        modality: "visible" or "infrared", that of all the images. The features are those of test.py.
        UnreadableImages names the first file that cannot be read.
        """
        if modality not in ("visible", "infrared"):
            raise ValueError(f"modality is visible or infrared, not {modality!r}")
        if isinstance(images, str | os.PathLike | Image.Image) or not len(images):
            raise ValueError("images is a list of at least one image file or PIL image")
        device = self.device

        def batches() -> Iterator[torch.Tensor]:
            for start in range(0, len(images), BATCH):
                pixels = np.stack([self.pixels(image) for image in images[start : start + BATCH]])
                yield normalize(torch.from_numpy(pixels).to(device))

        if device not in self.settled:
            alone = Processes()  # whatever processes the caller has: each embeds images of its own
            alone.rank, alone.world_size = 0, 1
            self.settled[device] = settle(self.amp, self.network, lambda: {modality: next(batches())}, alone)
        return extract_features(self.network, batches(), modality, self.settled[device])

    @property
    def device(self) -> torch.device:
        """Where the network is; the CPU for one in another runtime."""
        return next((weight.device for weight in self.network.parameters()), torch.device("cpu"))

    def pixels(self, image: str | os.PathLike | Image.Image) -> np.ndarray:
        """An image file or a PIL image as the network wants it: (height, width, 3) uint8 RGB."""
        size = self.height, self.width, self.pixel_range
        return to_pixels(image.copy(), *size) if isinstance(image, Image.Image) else read_image(image, *size)


def open_embedder(
    path: str | os.PathLike, height: int | None = None, width: int | None = None
) -> tuple[Embedder, dict[str, object]]:
    """The Embedder of a checkpoint, on the CPU, and the settings that it was trained with.

    height, width: of the images; None: see checkpoints.image_size. UserError naming path: no network that
    model.from_checkpoint reads.
    """
    checkpoint = load_checkpoint(path)
    saved = saved_settings(checkpoint, path)
    size = image_size(checkpoint, path, height, width, saved.get("dataset", "sysu"))
    network = folded(build_model(checkpoint, path))
    pixel_range, amp = saved.get("pixel_range"), saved.get("amp", "auto")
    return Embedder(network, *size, pixel_range, fingerprint(checkpoint), amp), saved


@dataclass(frozen=True, eq=False)
class Found:
    """N image files, and the values (N tuples) of the columns that a table has of each."""

    paths: list[str]
    columns: tuple[str, ...] = ()
    values: list[tuple[str, ...]] | None = None


def find_images(source: str | os.PathLike, flag: str, modality: str | None = None) -> Found:
    """The images of a folder and those below it, a list (.txt), a table (.csv with a column path) or a file.

    A table's rows of another modality than the given one are left out. Paths come absolute, each once;
    relative ones in a list or a table count from its folder. The files of a list need not exist, but one
    must. UserError, naming flag and source: no such file or folder, none of these kinds, no images.
    """
    source = Path(source)
    suffix = source.suffix.lower()
    if source.is_dir():
        finder = Finder(source)
        folders = finder.walk([os.path.abspath(source)])
        finder.report()
        found = Found([path for folder in folders for path in sorted(folder.images + folder.broken)])
    elif not source.is_file():
        raise UserError(f"{flag} {source}: no such file or folder")
    elif is_image(source.name):
        return Found([os.path.abspath(source)])
    elif suffix in (".csv", ".txt"):
        try:
            with open(source, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
                if suffix == ".csv":
                    found = _read_table(stream, source, flag, modality)
                else:
                    paths = (_absolute(source, line.rstrip("\r\n")) for line in stream if line.strip())
                    found = Found(list(dict.fromkeys(paths)))
        except (OSError, csv.Error) as error:
            raise UserError(f"{flag} {source}: cannot be read: {error}") from error
    else:
        raise UserError(f"{flag} {source}: no folder, list (.txt), table (.csv) or image by its name")
    if not found.paths:
        raise UserError(f"{flag} {source}: no images there")
    if not any(map(os.path.exists, found.paths)):
        raise UserError(
            f"{flag} {source}: none of its files exists; the first would be {found.paths[0]}"
            f"{other_form(found.paths[0])}"
        )
    return found


def _absolute(source: Path, path: str) -> str:
    return os.path.normpath(os.path.join(os.path.abspath(source.parent), path))


def _read_table(stream: TextIO, source: Path, flag: str, modality: str | None) -> Found:
    lines = csv.reader(stream, strict=True, skipinitialspace=True)
    header = [word.strip().lower() for word in next(lines, [])]
    refuse_separator(f"{flag} {source}", header)
    if "path" not in header or len(set(header)) < len(header):
        raise UserError(f"{flag} {source}: its first line names no column `path`, or a column twice")
    shard = tuple(header[: len(COLUMNS)]) == COLUMNS  # what tools.embed wrote: it knows what its source knew
    columns = known_columns(dict.fromkeys(header)) if shard else dict.fromkeys(header)
    columns.pop("path", None)
    known, junk = {}, 0
    for line in filter(None, lines):
        if len(line) != len(header):
            raise UserError(
                f"{flag} {source}, line {lines.line_num}: {len(line)} values, {len(header)} columns"
            )
        record = {key: sys.intern(word.strip()) for key, word in zip(header, line, strict=True)}
        path = _absolute(source, record["path"])
        values = known_columns(record) if shard else record
        if values.get("pid") == JUNK:
            junk += 1
        elif modality is None or values.get("modality", modality) == modality:
            known[path] = tuple(values[key] for key in columns)
    if junk:
        warn_once(f"{flag} {source}: {junk} images of pid {JUNK}, junk, are left out")
    return Found(list(known), tuple(columns), list(known.values()))


def settle_precision(
    embedder: Embedder,
    amp: str,
    paths: Sequence[str],
    modality: str,
    batch_size: int,
    workers: int,
    processes: Processes,
) -> torch.dtype | None:
    """The precision to embed in, None for float32; compared on the first batch, see precision.settle."""

    def batch() -> dict[str, torch.Tensor]:
        with contextlib.closing(readable_batches(paths, embedder.pixels, batch_size, workers)) as parts:
            pixels = next((pixels for pixels, rows, _ in parts if rows), None)
        return {modality: normalize(torch.from_numpy(np.stack(pixels)).to(embedder.device))} if pixels else {}

    return settle(amp, embedder.network, batch, processes)


def embed_files(
    embedder: Embedder,
    paths: Sequence[str],
    modality: str,
    batch_size: int,
    workers: int,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[torch.Tensor, list[int], list[str]]]:
    """Yield (unit features (n, D) float32 on the CPU, the n rows of paths, failures), in order, as they come.

    Images are read ahead of the network; dtype: autocast's, None for float32; failures as readable_batches.
    UserError: the network gives NaN or infinity.
    """
    network, device = embedder.network, embedder.device

    def batches() -> Iterator[tuple[torch.Tensor | None, list[int], list[str]]]:
        with contextlib.closing(readable_batches(paths, embedder.pixels, batch_size, workers)) as parts:
            for pixels, rows, failures in parts:
                yield pinned(np.stack(pixels), device) if rows else None, rows, failures

    def fetched(features: torch.Tensor, rows: list[int], failures: list[str]) -> tuple:
        features = features.cpu()
        if not features.isfinite().all():
            raise UserError(f"the network gives NaN or infinity for {paths[rows[0]]} or one soon after it")
        return features, rows, failures

    waiting = None  # a batch stays on a GPU until the next one is under way, so that the GPU never waits
    with contextlib.closing(read_ahead(batches(), device)) as items:
        for pixels, rows, failures in items:
            features = torch.empty(0, network.dim)
            if pixels is not None:
                images = normalize(pixels.to(device, non_blocking=True))
                features = extract_features(network, [images], modality, dtype)
            if waiting:
                yield fetched(*waiting)
            waiting = features, rows, failures
    if waiting:
        yield fetched(*waiting)
