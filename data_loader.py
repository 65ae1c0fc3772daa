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

from augmentation import PAD, Draws, augment, crop, draw_augmentation, finish, normalize, pinned
from images import decode
from utils import MODALITIES, UserError

READ_AHEAD = 2  # batches

_PURPOSES = ("identities", "images", "augmentation", "memory")
_STORED = {"visible": "visible", "infrared": "infrared", "aux": "visible"}  # whose pixels a modality has

Item = TypeVar("Item")


def generator(seed: int, epoch: int, purpose: str, process: int = 0) -> np.random.Generator:
    """The generator of one purpose in one epoch and process: the same give the same draws."""
    return np.random.default_rng([seed, epoch, _PURPOSES.index(purpose), process])


class IdentityBatches:
    """Which images make up each step of an epoch (docs/method.md, section 2).

    labels: {"visible": (N,), "infrared": (M,)}, 0..C-1, or -1 of an image that is left out. A step of a
    process has batch_size identities, and num_pos images of each and of each modality. len() is the number of
    steps of an epoch.
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
        trained = {modality: np.flatnonzero(part >= 0) for modality, part in labels.items()}
        self._rows = {k: rows[labels[k][rows].argsort(kind="stable")] for k, rows in trained.items()}
        self._counts = {k: np.bincount(labels[k][rows]) for k, rows in trained.items()}
        self._first = {modality: counts.cumsum() - counts for modality, counts in self._counts.items()}
        most = max(map(len, trained.values()))
        self._steps = most // (batch_size * num_pos * world_size) + 1

    def __len__(self) -> int:
        return self._steps

    def epoch(self, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (labels, rows of visible images, rows of infrared images), each (n,), for every step.

        The k-th visible and the k-th infrared image have the k-th label. A function of seed, epoch and
        process alone; in one step no two processes have an identity in common.
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
    """Yield items, a generator's, that a thread of its own makes READ_AHEAD ahead of the consumer.

    The thread ends with the items or when the consumer closes; what it raises is raised here.
    """
    end = object()
    gpu = device.index
    if device.type == "cuda" and gpu is None:
        gpu = torch.cuda.current_device()

    def start() -> None:
        if gpu is not None:  # else pinning memory would put a context on GPU 0, asked for or not
            torch.cuda.set_device(gpu)

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
    """The batches of training and of the memory's reset, on the device.

    images: {"visible": (N, H, W, 3) uint8, "infrared": …}; labels: {modality: (N,)}.
    recipe: the augmentation, "sysu" or "regdb"; pad: its border, in pixels.
    cache says where the pixels live: "device"; "host", this process's memory; "disk", left memory-mapped, so
    that many processes share them; "auto": the device if it is a GPU and they fit in a third of its free
    memory, else the disk. What was chosen is in .cache. A batch is augmented on the device, in a few kernels;
    but from a CPU's "host" and "disk" image by image, as its caches like it, with the same result.
    UserError: --cache device without the memory for it.
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
    ):
        self.labels, self.batches, self.recipe, self.device, self.seed = labels, batches, recipe, device, seed
        self.height, self.width = images["visible"].shape[1:3]
        self.pad = pad
        self.wait_seconds = 0.0  # how long the consumer waited for input in the last epoch
        size = sum(part.nbytes for part in images.values())
        free = None
        if device.type == "cuda":  # torch's own reserve counts: a former run of --trial all may have left it
            reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free = torch.cuda.mem_get_info(device)[0] + reserve
        if cache == "auto":
            cache = "device" if free is not None and size <= free / 3 else "disk"
        if cache == "device" and free is not None and size > free:
            raise UserError(
                f"--cache device: the images need {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            )
        self.cache = cache
        self._on_host = device.type == "cpu" and cache != "device"  # then bytes move ahead of time
        if cache == "device":
            self.images = {modality: self._to_device(part) for modality, part in images.items()}
        elif cache == "host":
            self.images = {modality: np.array(part) for modality, part in images.items()}
        else:
            self.images = images

    def epoch(self, epoch: int) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Yield ({"visible", "infrared", "aux": (n, 3, H, W) float32}, labels (n,) int64) for every step.

        The aux images are the visible ones with an augmentation of their own. A function of seed, epoch and
        process alone: the same with every cache, and on every device up to rounding.
        """

        def steps():
            rng = generator(self.seed, epoch, "augmentation", self.batches.rank)
            for labels, visible, infrared in self.batches.epoch(epoch):
                draws = {
                    modality: draw_augmentation(
                        rng, len(labels), self.height, self.width, modality, self.recipe, self.pad
                    )
                    for modality in MODALITIES
                }
                pixels = self._prepare(visible, infrared, draws)
                yield pinned(labels, self.device), pixels, draws

        def batches():
            with contextlib.closing(read_ahead(steps(), self.device)) as items:
                for labels, pixels, draws in items:
                    yield self._augment(pixels, draws), labels.to(self.device, non_blocking=True)

        yield from self._timed(batches())

    def memory_batches(
        self, modality: str, batch_size: int, epoch: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (images (n, 3, H, W) float32, labels (n,) int64): all of a modality, unaugmented, in order.

        modality: "visible", "infrared" or "aux", whose channels are drawn for the epoch. Of several processes
        each takes every world_size-th image.
        """
        stored = _STORED[modality]
        labels = self.labels[stored]
        rows = np.flatnonzero(labels >= 0)[rank::world_size]
        channel = None
        if modality == "aux":
            channel = generator(self.seed, epoch, "memory").integers(3, size=len(labels))

        def parts():
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                yield part, self._read(stored, part), pinned(labels[part], self.device)

        with contextlib.closing(read_ahead(parts(), self.device)) as items:
            for part, pixels, part_labels in items:
                drawn = None if channel is None else channel[part]
                images = normalize(self._place(stored, pixels), drawn)
                yield images, part_labels.to(self.device, non_blocking=True)

    def _to_device(self, images: np.ndarray, chunk: int = 2048) -> torch.Tensor:
        stored = torch.empty(images.shape, dtype=torch.uint8, device=self.device)
        for start in range(0, len(images), chunk):
            stored[start : start + chunk] = torch.from_numpy(np.array(images[start : start + chunk]))
        return stored

    def _prepare(self, visible: np.ndarray, infrared: np.ndarray, draws: dict[str, Draws]) -> dict:
        """Ahead of time, on the host: what _augment needs of a step's rows (n,), by modality."""
        rows = {"visible": visible, "infrared": infrared}
        if self._on_host:
            stored = ((k, _STORED[k]) for k in MODALITIES)
            return {k: crop(self.images[name], rows[name], draws[k]) for k, name in stored}
        return {name: self._read(name, part) for name, part in rows.items()}

    def _augment(self, pixels: dict, draws: dict[str, Draws]) -> dict[str, torch.Tensor]:
        """The images {modality: (n, 3, H, W)} of a step, augmented, from what _prepare returned."""
        if self._on_host:
            return {modality: finish(pixels[modality], draws[modality]) for modality in MODALITIES}
        placed = {modality: self._place(modality, part) for modality, part in pixels.items()}
        return {k: augment(placed[_STORED[k]], draws[k]) for k in MODALITIES}

    def _read(self, modality: str, rows: np.ndarray) -> torch.Tensor:
        """Ahead of time, on the host: the pixels of rows, or just rows where the device has the pixels."""
        if self.cache == "device":
            return pinned(rows, self.device)
        images = self.images[modality]
        shape = (len(rows), *images.shape[1:])
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        np.take(images, rows, axis=0, out=pixels.numpy(), mode="clip")  # "raise" would copy once more
        return pixels

    def _place(self, modality: str, read: torch.Tensor) -> torch.Tensor:
        """What _read returned as pixels (n, H, W, 3) uint8 on the device."""
        read = read.to(self.device, non_blocking=True)
        return self.images[modality].index_select(0, read) if self.cache == "device" else read

    def _timed(self, items: Iterator[Item]) -> Iterator[Item]:
        self.wait_seconds = 0.0
        given = torch.cuda.Event() if self.device.type == "cuda" else None
        with contextlib.closing(items):
            while True:
                if given:
                    given.record()  # behind all the work that the GPU has been given
                start = time.perf_counter()
                item = next(items, None)
                if given is None or given.query():  # else the GPU is busy, and nothing waits
                    self.wait_seconds += time.perf_counter() - start
                if item is None:
                    return
                yield item


def evaluation_batches(
    source: Sequence[str] | np.ndarray,
    height: int,
    width: int,
    batch_size: int,
    device: torch.device,
    workers: int,
) -> Iterator[torch.Tensor]:
    """Yield images (n, 3, H, W) float32, normalised, on the device, in order, read ahead of the consumer.

    source: paths, which workers threads decode to height x width, or an array (N, H, W, 3) uint8.
    UnreadableImages: all of them.
    """

    def batches():
        if isinstance(source, np.ndarray):
            parts = (
                np.array(source[start : start + batch_size]) for start in range(0, len(source), batch_size)
            )
        else:
            parts = decode(source, height, width, workers, batch_size)
        with contextlib.closing(parts):
            for pixels in parts:
                yield pinned(pixels, device)

    with contextlib.closing(read_ahead(batches(), device)) as items:
        for pixels in items:
            yield normalize(pixels.to(device, non_blocking=True))
