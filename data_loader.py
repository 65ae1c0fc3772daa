"""Batches: which images make a step, and their way to the training device, augmented.

docs/method.md, sections 2, 3 and 5 (Cheng et al., AAAI 2023).
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from augmentation import PAD, augment, draw_augmentation, normalize, pinned
from images import PixelRange, decode
from utils import MODALITIES, UserError

READ_AHEAD = 2  # batches

_PURPOSES = ("identities", "images", "augmentation", "memory")

Item = TypeVar("Item")


def generator(seed: int, epoch: int, purpose: str, process: int = 0) -> np.random.Generator:
    """The generator of one purpose in one epoch and process: the same give the same draws."""
    return np.random.default_rng([seed, epoch, _PURPOSES.index(purpose), process])


class IdentityBatches:
    """Which images make up each step of an epoch (docs/method.md, section 2); len() is the number of steps.

    Args:
        labels: {"visible": (N,), "infrared": (M,)} int64, 0..C-1; -1: an image that is left out.
        batch_size: identities of a step, in each process.
        num_pos: images of each identity and modality.
        seed: of the draws.
        rank, world_size: this process and the number of processes; in one step no two share an identity.

    Raises:
        UserError: the processes together ask for more identities than there are.
    """

    def __init__(
        self,
        labels: dict[str, np.ndarray],
        batch_size: int,
        num_pos: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.batch_size, self.num_pos = batch_size, num_pos
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.classes = 1 + int(labels["visible"].max())
        if batch_size * world_size > self.classes:
            processes = f" in each of {world_size} processes" if world_size > 1 else ""
            raise UserError(
                f"--batch-size {batch_size}{processes}: there are only {self.classes} training identities"
            )
        # Rows sorted by label: those of label y are rows[first[y] : first[y] + counts[y]].
        self._rows, self._first, self._counts = {}, {}, {}
        for modality, own in labels.items():
            rows = np.flatnonzero(own >= 0)
            self._rows[modality] = rows[own[rows].argsort(kind="stable")]
            self._counts[modality] = np.bincount(own[rows])
            self._first[modality] = self._counts[modality].cumsum() - self._counts[modality]
        most = max(map(len, self._rows.values()))
        self._steps = most // (batch_size * num_pos * world_size) + 1

    def __len__(self) -> int:
        return self._steps

    def epoch(self, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (labels, rows of visible images, rows of infrared images), each (n,), for every step.

        The k-th visible and the k-th infrared image have the k-th label. A function of seed, epoch and
        process alone.
        """
        identities = generator(self.seed, epoch, "identities")  # common to all processes
        images = generator(self.seed, epoch, "images", self.rank)
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for _ in range(self._steps):
            drawn = identities.choice(self.classes, self.batch_size * self.world_size, replace=False)
            labels = drawn[mine].repeat(self.num_pos)
            yield labels, self._draw(images, "visible", labels), self._draw(images, "infrared", labels)

    def _draw(self, rng: np.random.Generator, modality: str, labels: np.ndarray) -> np.ndarray:
        """For each label a row of one of its images."""
        nth = rng.integers(self._counts[modality][labels])
        return self._rows[modality][self._first[modality][labels] + nth]


def read_ahead(items: Iterator[Item], device: torch.device) -> Iterator[Item]:
    """Yield the items of a generator, made READ_AHEAD ahead of the consumer by a thread.

    The thread ends with the items or when the consumer closes; what it raises is raised here.
    """
    end = object()

    def start() -> None:
        if device.type == "cuda":  # else pinning memory would create a context on GPU 0
            torch.cuda.set_device(device)

    pool = ThreadPoolExecutor(1, "read-ahead", start)
    try:
        pending = deque(pool.submit(next, items, end) for _ in range(READ_AHEAD))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
        items.close()


class TrainLoader:
    """The batches of training and of the memory's reset, on the training device.

    Args:
        images: {"visible": (N, H, W, 3) uint8, "infrared": (M, H, W, 3) uint8}.
        labels: {modality: (N,) int64}; -1: an image that is left out.
        batches: which images make up each step.
        recipe: the augmentation, "sysu" or "regdb".
        device: where batches are augmented and yielded.
        seed: of augmentation and of the memory's channels.
        cache: where the pixels live: "device"; "host", this process's memory; "disk", memory-mapped, so that
            several processes share them; "auto": the device if it is a GPU and they fit in a third of its
            free memory, else the disk. The choice is in .cache.
        pad: border of the random crop, in pixels.
        modalities: what is yielded; without "aux" the others are the same.

    Raises:
        UserError: --cache device without enough memory.
    """

    def __init__(
        self,
        images: dict[str, np.ndarray],
        labels: dict[str, np.ndarray],
        batches: IdentityBatches,
        recipe: str,
        device: torch.device,
        seed: int,
        cache: str = "auto",
        pad: int = PAD,
        modalities: Sequence[str] = MODALITIES,
    ):
        self.labels, self.batches, self.recipe, self.device, self.seed = labels, batches, recipe, device, seed
        self.height, self.width = images["visible"].shape[1:3]
        self.pad, self.modalities = pad, modalities
        self.wait_seconds = 0.0  # how long the last epoch's consumer waited for input
        self.cache = choose_cache(cache, sum(part.nbytes for part in images.values()), device)
        if self.cache == "device":
            self.images = {modality: copy_to_device(part, device) for modality, part in images.items()}
        elif self.cache == "host":
            self.images = {modality: np.array(part) for modality, part in images.items()}
        else:
            self.images = images

    def epoch(self, epoch: int) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Yield ({"visible", "infrared", "aux": (n, 3, H, W) float32}, labels (n,) int64) for every step.

        The aux images are the visible ones with an augmentation of their own. A function of seed, epoch and
        process alone: the same with every cache, and on every device up to rounding.
        """
        rng = generator(self.seed, epoch, "augmentation", self.batches.rank)
        size = self.height, self.width
        self.wait_seconds = 0.0
        start = time.perf_counter()
        with contextlib.closing(read_ahead(self._steps(epoch), self.device)) as steps:
            for labels, visible, infrared in steps:
                self.wait_seconds += time.perf_counter() - start
                visible, infrared = self._place("visible", visible), self._place("infrared", infrared)
                pixels = {"visible": visible, "infrared": infrared, "aux": visible}
                images = {}
                for modality in MODALITIES:
                    draws = draw_augmentation(rng, len(labels), *size, modality, self.recipe, self.pad)
                    if modality in self.modalities:
                        images[modality] = augment(pixels[modality], draws)
                yield images, labels.to(self.device, non_blocking=True)
                start = time.perf_counter()

    def memory_batches(
        self, modality: str, batch_size: int, epoch: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (images (n, 3, H, W) float32, labels (n,) int64): a modality's images in order, unaugmented.

        modality: "visible", "infrared" or "aux", whose channels are drawn for the epoch. Of several processes
        each takes every world_size-th image.
        """
        stored = "infrared" if modality == "infrared" else "visible"
        labels = self.labels[stored]
        rows = np.flatnonzero(labels >= 0)[self.batches.rank :: self.batches.world_size]
        channels = None
        if modality == "aux":
            channels = generator(self.seed, epoch, "memory").integers(3, size=len(labels))

        def read():
            for start in range(0, len(rows), batch_size):
                chosen = rows[start : start + batch_size]
                yield chosen, self._read(stored, chosen), pinned(labels[chosen], self.device)

        with contextlib.closing(read_ahead(read(), self.device)) as batches:
            for chosen, pixels, batch_labels in batches:
                channel = None if channels is None else channels[chosen]
                images = normalize(self._place(stored, pixels), channel)
                yield images, batch_labels.to(self.device, non_blocking=True)

    def _steps(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """On the host, ahead of time: (labels, what _read returns of the visible, of the infrared rows)."""
        for labels, visible, infrared in self.batches.epoch(epoch):
            pixels = self._read("visible", visible), self._read("infrared", infrared)
            yield pinned(labels, self.device), *pixels

    def _read(self, modality: str, rows: np.ndarray) -> torch.Tensor:
        """The pixels of rows (n,) on the host; the rows themselves where the device holds the pixels."""
        if self.cache == "device":
            return pinned(rows, self.device)
        images = self.images[modality]
        shape = (len(rows), *images.shape[1:])
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        np.take(images, rows, axis=0, out=pixels.numpy(), mode="clip")  # "raise" would copy once more
        return pixels

    def _place(self, modality: str, read: torch.Tensor) -> torch.Tensor:
        """The pixels (n, H, W, 3) uint8 on the device, of what _read returned."""
        read = read.to(self.device, non_blocking=True)
        return self.images[modality].index_select(0, read) if self.cache == "device" else read


def choose_cache(cache: str, size: int, device: torch.device) -> str:
    """Where size bytes of pixels live, see TrainLoader; UserError: --cache device without enough memory."""
    if device.type != "cuda":
        return "disk" if cache == "auto" else cache
    # What torch holds in reserve counts as free: an earlier run of --trial all may have left it.
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + reserve
    if cache == "auto":
        return "device" if size <= free / 3 else "disk"
    if cache == "device" and size > free:
        raise UserError(f"--cache device: the images need {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    return cache


def copy_to_device(images: np.ndarray, device: torch.device, chunk: int = 2048) -> torch.Tensor:
    """images (N, H, W, 3) on the device, copied chunk by chunk: they may be memory-mapped from disk."""
    stored = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), chunk):
        stored[start : start + chunk] = torch.from_numpy(np.array(images[start : start + chunk]))
    return stored


def evaluation_batches(
    source: Sequence[str] | np.ndarray,
    height: int,
    width: int,
    batch_size: int,
    device: torch.device,
    workers: int,
    pixel_range: PixelRange | None = None,
) -> Iterator[torch.Tensor]:
    """Yield images (n, 3, H, W) float32, normalised, on the device, in order, read ahead of the consumer.

    source: paths, which workers threads decode to height x width, those of more than eight bits
    by pixel_range (images.read_image), or an array (N, H, W, 3) uint8.
    UnreadableImages: all of them.
    """

    def batches():
        if isinstance(source, np.ndarray):
            parts = (
                np.array(source[start : start + batch_size]) for start in range(0, len(source), batch_size)
            )
        else:
            parts = decode(source, height, width, workers, batch_size, pixel_range)
        with contextlib.closing(parts):
            for pixels in parts:
                yield pinned(pixels, device)

    with contextlib.closing(read_ahead(batches(), device)) as items:
        for pixels in items:
            yield normalize(pixels.to(device, non_blocking=True))
