"""What TensorBoard shows of a run besides its curves: a batch as the network gets it, and similarities."""

import os
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from augmentation import MEAN, STD
from evaluation.protocols import Evaluation
from evaluation.scoring import Features
from evaluation.similarity import equal_error_rate, overlap, sample_similarities
from utils import log

ROWS = ("visible", "aux", "infrared")  # from top to bottom


def augmentation_grid(images: Mapping[str, torch.Tensor], columns: int = 8) -> torch.Tensor:
    """A picture (3, h, w) uint8 of a training batch: a row each of visible, aux and infrared images.

    images: {modality: (n, 3, H, W)} as the network is given them, normalised; the k-th visible and the k-th
    aux image are of one file, augmented apart. columns: at most so many images of each modality are drawn.
    """
    mean, std = (torch.from_numpy(values).view(3, 1, 1) for values in (MEAN, STD))
    rows = []
    for modality in filter(images.__contains__, ROWS):  # aux may be missing
        some = images[modality][:columns].float().cpu() * std + mean
        some = F.pad(some.clamp(0, 1), (1, 1, 1, 1), value=1.0)  # a white line between images
        rows.append(torch.cat(list(some), dim=2))
    return (255 * torch.cat(rows, dim=1)).round().to(torch.uint8)


class Board:
    """A run's TensorBoard events; where TensorBoard is missing, one warning, and nothing is written.

    folder: of the events, None to write none (all processes but the first); epoch: how many are trained, so
    that what a continued run repeats replaces what was there. (TensorBoard takes the first session start of a
    run, which purge_step writes, for its beginning: so a new run has one too.)
    """

    def __init__(self, folder: str | os.PathLike | None, epoch: int):
        self.writer = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(folder, purge_step=epoch + 1)
            except ImportError:
                log.warning("no TensorBoard curves: the package tensorboard is not installed")

    def add_epoch(self, record: Mapping) -> None:
        """Add the losses, the rate and the speed of an epoch's record, and write everything to disk."""
        seconds = record["seconds"]
        scalars = {f"loss/{name}": value for name, value in record["loss"].items()}
        scalars |= {"rate": record["rate"], "images per second": record["images_per_second"]}
        scalars |= {"share of waiting for input": seconds["waiting"] / seconds["steps"]}
        self._add_scalars(scalars, record["epoch"])

    def add_batch(self, images: Mapping[str, torch.Tensor]) -> None:
        """Show a training batch, see augmentation_grid."""
        if self.writer:
            self.writer.add_image(f"augmented: {', '.join(ROWS)}", augmentation_grid(images), 0)

    def add_evaluation(self, record: Mapping, features: Features, evaluation: Evaluation) -> None:
        """Add the metrics of an epoch's record, and how similar images are, and write everything to disk.

        Histograms of similarity within and between identities, by modalities; their overlap and error.
        features: those of every image of evaluation. Pairs are sampled: it takes a fraction of a second.
        """
        if not self.writer:
            return
        epoch, scalars = record["epoch"], dict(record["evaluation"]["metrics"])
        pids = {modality: samples.pids for modality, samples in evaluation.images().items()}
        for name, pair in sample_similarities(features.tensors, pids).items():
            self.writer.add_histogram(f"similarity, {name}/within identities", pair.within, epoch)
            self.writer.add_histogram(f"similarity, {name}/between identities", pair.between, epoch)
            scalars |= {f"overlap/{name}": overlap(pair), f"equal-error rate/{name}": equal_error_rate(pair)}
        self._add_scalars(scalars, epoch)

    def _add_scalars(self, scalars: Mapping[str, float], epoch: int) -> None:
        if self.writer:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, epoch)
            self.writer.flush()

    def close(self) -> None:
        """Write the last events and close the file."""
        if self.writer:
            self.writer.close()
