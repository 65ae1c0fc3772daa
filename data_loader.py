"""Batches: choose the images of each step, move them to the training device and augment them there.

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

from augmentation import PAD, Draws, augment, draw_augmentation, normalize, pinned
from images import PixelRange, decode
from utils import MODALITIES, UserError

READ_AHEAD = 2  # batches that are read before they are needed

_PURPOSES = ("identities", "images", "augmentation", "memory")

Item = TypeVar("Item")


def generator(seed: int, epoch: int, purpose: str) -> np.random.Generator:
    """A random generator. The same arguments give the same draws, in every process.

    Args:
        seed: the run's.
        epoch: counted from 0.
        purpose: one of _PURPOSES, so that one kind of draw does not depend on how many another one makes.
    """
    return np.random.default_rng([seed, epoch, _PURPOSES.index(purpose)])


class IdentitySampler:
    """Choose the images of each step of an epoch (docs/method.md, section 2); len() is the number of steps.

    Every process draws the whole batch and takes its share, so that the number of processes changes no draw:
    the attribute `whole` is the number of rows of the batch, `mine` the rows that are this process's.

    Args:
        labels: {"visible": (N,), "infrared": (M,)} int64, 0..C-1; -1: an image that is not trained on.
        batch_size: identities per step and process.
        num_pos: images per identity and modality.
        seed: of the draws.
        rank, world_size: this process and the number of processes that share the batch.

    Raises:
        UserError: all processes together need more identities than exist.
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
        self.labels, self.batch_size, self.num_pos = labels, batch_size, num_pos
        self.seed, self.rank, self.world_size = seed, rank, world_size
        rows = batch_size * num_pos
        self.whole, self.mine = rows * world_size, slice(rank * rows, (rank + 1) * rows)
        self.classes = 1 + int(labels["visible"].max())
        if batch_size * world_size > self.classes:
            processes = f" in each of {world_size} processes" if world_size > 1 else ""
            raise UserError(
                f"--batch-size {batch_size}{processes}: there are only {self.classes} training identities"
            )
        # Sort the rows by label: rows[first[y] : first[y] + counts[y]] have label y.
        self._rows, self._first, self._counts = {}, {}, {}
        for modality, array in labels.items():
            rows = np.flatnonzero(array >= 0)
            self._rows[modality] = rows[array[rows].argsort(kind="stable")]
            self._counts[modality] = np.bincount(array[rows])
            self._first[modality] = self._counts[modality].cumsum() - self._counts[modality]
        most = max(map(len, self._rows.values()))
        self._steps = most // self.whole + 1

    def __len__(self) -> int:
        return self._steps

    def epoch(self, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (labels, rows of visible images, rows of infrared images), each (n,), for every step.

        The k-th visible and the k-th infrared image have the k-th label. The result depends only on seed and
        epoch: it is this process's rows of the whole batch.
        """
        identities, images = generator(self.seed, epoch, "identities"), generator(self.seed, epoch, "images")
        for _ in range(self._steps):
            drawn = identities.choice(self.classes, self.whole // self.num_pos, replace=False)
            labels = drawn.repeat(self.num_pos)
            visible, infrared = (self._draw(images, modality, labels) for modality in ("visible", "infrared"))
            yield labels[self.mine], visible[self.mine], infrared[self.mine]

    def _draw(self, rng: np.random.Generator, modality: str, labels: np.ndarray) -> np.ndarray:
        """Draw for each label the row of one of its images."""
        nth = rng.integers(self._counts[modality][labels])
        return self._rows[modality][self._first[modality][labels] + nth]


def read_ahead(items: Iterator[Item], device: torch.device) -> Iterator[Item]:
    """Yield the items of a generator, which a thread runs up to READ_AHEAD items ahead.

    The thread ends after the last item or when this generator is closed; its exceptions are raised here.
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
        # Ctrl-C while the thread is starting leaves a thread that the pool does not wait for. It may be in
        # the generator, which cannot be closed then, and ends with the thread.
        with contextlib.suppress(ValueError):
            items.close()


class TrainLoader:
    """The batches of training and of the memory's reset, on the training device.

    Args:
        images: {"visible": (N, H, W, 3) uint8, "infrared": (M, H, W, 3) uint8}.
        sampler: the images of each step, all labels, and the seed, which is that of all other draws too.
        recipe: the augmentation, "sysu" or "regdb".
        device: where batches are augmented and used.
        cache: where the images are kept: "device"; "host", this process's memory; "disk", memory-mapped, so
            that several processes share them; "auto": the device if it is a GPU and they fit in a third of
            its free memory, else the disk. The attribute cache holds the choice.
        pad: border of the random crop, in pixels.
        modalities: to yield; the other two modalities are the same with and without "aux".

    Raises:
        UserError: --cache device without enough memory.
    """

    def __init__(
        self,
        images: dict[str, np.ndarray],
        sampler: IdentitySampler,
        recipe: str,
        device: torch.device,
        cache: str = "auto",
        pad: int = PAD,
        modalities: Sequence[str] = MODALITIES,
    ):
        self.sampler, self.recipe, self.device = sampler, recipe, device
        self.labels, self.seed = sampler.labels, sampler.seed
        self.height, self.width = images["visible"].shape[1:3]
        self.pad, self.modalities = pad, modalities
        self.wait_seconds = 0.0  # time that the last epoch waited for input
        self.cache = choose_cache(cache, sum(array.nbytes for array in images.values()), device)
        if self.cache == "device":
            self.images = {modality: copy_to_device(array, device) for modality, array in images.items()}
        elif self.cache == "host":
            self.images = {modality: np.array(array) for modality, array in images.items()}
        else:
            self.images = images

    def epoch(self, epoch: int) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Yield ({"visible", "infrared", "aux": (n, 3, H, W) float32}, labels (n,) int64) for every step.

        The aux images are the same visible images, augmented separately. The result depends on seed and
        epoch only: it is the same with every cache and, up to rounding, on every device.
        """
        self.wait_seconds = 0.0
        start = time.perf_counter()
        with contextlib.closing(read_ahead(self._steps(epoch), self.device)) as steps:
            for labels, visible, infrared, draws in steps:
                self.wait_seconds += time.perf_counter() - start
                visible, infrared = self._place("visible", visible), self._place("infrared", infrared)
                pixels = {"visible": visible, "infrared": infrared, "aux": visible}
                images = {modality: augment(pixels[modality], draws[modality]) for modality in draws}
                yield images, labels.to(self.device, non_blocking=True)
                start = time.perf_counter()

    def memory_batches(
        self, modality: str, batch_size: int, epoch: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (images (n, 3, H, W) float32, labels (n,) int64): all images of a modality, not augmented.

        Each process gets every world_size-th image.

        Args:
            modality: "visible", "infrared" or "aux".
            batch_size: images per batch.
            epoch: for which the channels of aux images are drawn, counted from 0.
        """
        stored = "infrared" if modality == "infrared" else "visible"
        labels = self.labels[stored]
        rows = np.flatnonzero(labels >= 0)[self.sampler.rank :: self.sampler.world_size]
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

    def _steps(
        self, epoch: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Draws]]]:
        """Yield (labels, visible, infrared, {modality: draws}) for every step; pixels as _read has them."""
        rng = generator(self.seed, epoch, "augmentation")
        whole, mine, size = self.sampler.whole, self.sampler.mine, (self.height, self.width)
        for labels, visible, infrared in self.sampler.epoch(epoch):
            # Draw for aux even if it is not used, so that --no-aux changes no other modality.
            draws = {
                modality: draw_augmentation(rng, whole, *size, modality, self.recipe, self.pad).rows(mine)
                for modality in MODALITIES
            }
            pixels = self._read("visible", visible), self._read("infrared", infrared)
            used = {modality: draws[modality] for modality in MODALITIES if modality in self.modalities}
            yield pinned(labels, self.device), *pixels, used

    def _read(self, modality: str, rows: np.ndarray) -> torch.Tensor:
        """The pixels of rows (n,) on the host; or the rows themselves if the device holds the pixels."""
        if self.cache == "device":
            return pinned(rows, self.device)
        images = self.images[modality]
        shape = (len(rows), *images.shape[1:])
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        np.take(images, rows, axis=0, out=pixels.numpy(), mode="clip")  # mode "raise" would need another copy
        return pixels

    def _place(self, modality: str, read: torch.Tensor) -> torch.Tensor:
        """Turn what _read returned into pixels (n, H, W, 3) uint8 on the device."""
        read = read.to(self.device, non_blocking=True)
        return self.images[modality].index_select(0, read) if self.cache == "device" else read


def choose_cache(cache: str, size: int, device: torch.device) -> str:
    """Decide where the training images are kept.

    Args:
        cache: "auto", "device", "host" or "disk", see TrainLoader.
        size: of the images, in bytes.
        device: the training device.

    Raises:
        UserError: --cache device without enough memory.
    """
    if device.type != "cuda":
        return "disk" if cache == "auto" else cache
    # Memory that torch keeps but does not use is free: an earlier run of --trial all may have left it.
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + reserve
    if cache == "auto":
        return "device" if size <= free / 3 else "disk"
    if cache == "device" and size > free:
        raise UserError(
            f"--cache device: the images need {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free"
        )
    return cache


def copy_to_device(images: np.ndarray, device: torch.device, chunk: int = 2048) -> torch.Tensor:
    """Copy images (N, H, W, 3) uint8 to the device in chunks, as they may be memory-mapped from disk."""
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
    """Yield normalised images (n, 3, H, W) float32 on the device, in order, read ahead of their use.

    Args:
        source: paths of images, or an array (N, H, W, 3) uint8.
        height, width: to decode to, in pixels.
        batch_size: images per batch.
        device: where the batches go.
        workers: threads that decode.
        pixel_range: for images of more than eight bits, see images.read_image.

    Raises:
        UnreadableImages: with every image that cannot be read.
    """

    def batches():
        if isinstance(source, np.ndarray):
            arrays = (
                np.array(source[start : start + batch_size]) for start in range(0, len(source), batch_size)
            )
        else:
            arrays = decode(source, height, width, workers, batch_size, pixel_range)
        with contextlib.closing(arrays):
            for pixels in arrays:
                yield pinned(pixels, device)

    with contextlib.closing(read_ahead(batches(), device)) as items:
        for pixels in items:
            yield normalize(pixels.to(device, non_blocking=True))
