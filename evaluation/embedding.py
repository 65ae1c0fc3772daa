"""The images of an evaluation as features: each is decoded once and embedded once."""

import contextlib
import math

import numpy as np
import torch
from tqdm import tqdm

from data_loader import evaluation_batches
from devices import Processes
from evaluation.protocols import Evaluation
from evaluation.scoring import Features
from images import PixelRange, UnreadableImages, decode
from model import TwoStreamResNet, extract_features


class TestImages:
    """Every image of an evaluation, at the size of the network's input.

    Args:
        evaluation: whose images.
        height, width: in pixels.
        pixel_range: of images of more than eight bits, see images.read_image.
    """

    __test__ = False  # no class of tests

    def __init__(
        self, evaluation: Evaluation, height: int, width: int, pixel_range: PixelRange | None = None
    ):
        self.evaluation, self.height, self.width, self.pixel_range = evaluation, height, width, pixel_range
        self.rows = {
            modality: {path: row for row, path in enumerate(samples.paths)}
            for modality, samples in evaluation.images().items()
        }
        self.pixels: dict[str, np.ndarray] = {}  # {modality: (n, H, W, 3) uint8}, filled by `load`

    def load(self, workers: int, processes: Processes) -> None:
        """Decode this process's share of the images (uint8) once, for all calls of `embed`.

        Raises UserError with every image that cannot be read.
        """
        for modality, rows in self.rows.items():
            paths = list(rows)[processes.rank :: processes.world_size]
            pixels = np.empty((len(paths), self.height, self.width, 3), np.uint8)
            start = 0
            for batch in decode(paths, self.height, self.width, workers, pixel_range=self.pixel_range):
                pixels[start : start + len(batch)] = batch
                start += len(batch)
            self.pixels[modality] = pixels

    def first_batch(self, batch_size: int, device: torch.device, workers: int) -> dict[str, torch.Tensor]:
        """The first images of both modalities, together a batch: {modality: (n, 3, H, W) float32}.

        {} where one of them cannot be read: `embed` names all of those.
        """
        batch = {}
        for modality, rows in self.rows.items():
            paths = list(rows)[: max(batch_size // 2, 1)]
            images = evaluation_batches(
                paths, self.height, self.width, batch_size, device, workers, self.pixel_range
            )
            with contextlib.closing(images):
                try:
                    batch[modality] = next(images)
                except UnreadableImages:
                    return {}
        return batch

    def embed(
        self,
        model: TwoStreamResNet,
        device: torch.device,
        dtype: torch.dtype | None,
        batch_size: int,
        workers: int,
        processes: Processes,
        trial: int | None = None,
        flip: bool = False,
    ) -> list[Features]:
        """Embed every image once. Each process embeds its share and gets all features.

        Args:
            model: in evaluation mode, on device.
            device: of the model and the features.
            dtype: autocast's, None for float32.
            batch_size: images per batch.
            workers: threads that decode images.
            processes: the processes that share the work.
            trial: embed only this trial's images, the other rows are zeros; None: all.
            flip: see model.extract_features.

        Returns:
            The features, float32 on device; with flip, those of images and their mirrors after them.
        """
        tensors, wanted_images = {}, self.evaluation.images(trial)
        for modality, rows in self.rows.items():
            wanted = sorted(rows[path] for path in wanted_images[modality].paths)
            mine = [row for row in wanted if row % processes.world_size == processes.rank]
            shape = (1 + flip, len(rows), model.dim)
            tensors[modality] = torch.zeros(shape, device=device)
            if mine:
                paths = list(rows)
                source = [paths[row] for row in mine]
                if modality in self.pixels:  # decoded already, every world_size-th image in this process
                    pixels, places = self.pixels[modality], [row // processes.world_size for row in mine]
                    source = pixels if len(places) == len(pixels) else pixels[places]
                batches = evaluation_batches(
                    source, self.height, self.width, batch_size, device, workers, self.pixel_range
                )
                shown = tqdm(batches, modality, math.ceil(len(mine) / batch_size), leave=False, disable=None)
                share = extract_features(model, shown, modality, dtype, flip)
                tensors[modality][:, torch.tensor(mine, device=device)] = share
            processes.all_reduce(tensors[modality])
        return [
            Features(self.rows, {modality: unit[k] for modality, unit in tensors.items()})
            for k in range(1 + flip)
        ]
