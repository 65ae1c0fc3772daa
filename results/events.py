"""What TensorBoard shows of a run besides its curves: a batch as the network gets it, and similarities."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from augmentation import MEAN, STD
from evaluation import Evaluation, Features
from results.similarity import equal_error_rate, images_of, overlap, sample_similarities

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

ROWS = ("visible", "aux", "infrared")  # from top to bottom


def augmentation_grid(images: Mapping[str, torch.Tensor], columns: int = 8) -> torch.Tensor:
    """A picture (3, h, w) uint8 of a training batch: a row each of visible, aux and infrared images.

    images: {modality: (n, 3, H, W)} as the network is given them, normalised; the k-th visible and the k-th
    aux image are of one file, augmented apart. columns: at most so many images of each modality are drawn.
    """
    mean, std = (torch.from_numpy(values).view(3, 1, 1) for values in (MEAN, STD))
    rows = []
    for modality in ROWS:
        some = images[modality][:columns].float().cpu() * std + mean
        some = F.pad(some.clamp(0, 1), (1, 1, 1, 1), value=1.0)  # a white line between images
        rows.append(torch.cat(list(some), dim=2))
    return (255 * torch.cat(rows, dim=1)).round().to(torch.uint8)


def add_batch(writer: "SummaryWriter", images: Mapping[str, torch.Tensor], epoch: int) -> None:
    """Show a training batch, see augmentation_grid."""
    writer.add_image("augmented: visible, aux, infrared", augmentation_grid(images), epoch)


def add_similarities(writer: "SummaryWriter", features: Features, evaluation: Evaluation, epoch: int) -> None:
    """Add histograms of similarity within and between identities, by modalities; their overlap and error.

    features: those of every image of evaluation. Pairs are sampled: it takes a fraction of a second.
    """
    pids = {modality: samples.pids for modality, samples in images_of(evaluation).items()}
    for name, pair in sample_similarities(features, pids).items():
        writer.add_histogram(f"similarity, {name}/within identities", pair.within, epoch)
        writer.add_histogram(f"similarity, {name}/between identities", pair.between, epoch)
        writer.add_scalar(f"overlap/{name}", overlap(pair), epoch)
        writer.add_scalar(f"equal-error rate/{name}", equal_error_rate(pair), epoch)
