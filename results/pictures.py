"""What the network is given, where it looks, and how its features lie in the plane."""

from collections.abc import Mapping

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

from augmentation import MEAN, STD
from model import TwoStreamResNet

GRID_ORDER = ("visible", "aux", "infrared")


def augmentation_grid(images: Mapping[str, torch.Tensor], columns: int = 8) -> torch.Tensor:
    """A picture (3, h, w) uint8 of a training batch: a row each of visible, aux and infrared images.

    images: {modality: (n, 3, H, W)} as the network is given them, normalised; the k-th visible and the k-th
    aux image are of one file, augmented apart. columns: at most so many images of each modality are drawn.
    """
    mean, std = (torch.from_numpy(values).view(3, 1, 1) for values in (MEAN, STD))
    rows = []
    for modality in GRID_ORDER:
        some = images[modality][:columns].float().cpu() * std + mean
        some = F.pad(some.clamp(0, 1), (1, 1, 1, 1), value=1.0)  # a white line between images
        rows.append(torch.cat(list(some), dim=2))
    return (255 * torch.cat(rows, dim=1)).round().to(torch.uint8)


@torch.no_grad()
def activation_maps(model: TwoStreamResNet, images: torch.Tensor, modality: str) -> np.ndarray:
    """Where the network is active: (n, H, W) float32, in [0, 1] for each image.

    The sum of squares over the channels of the last feature map, enlarged to the image's size.

    Args:
        model: in evaluation mode.
        images: (n, 3, H, W) normalised, on the model's device.
        modality: "visible" or "infrared".

    Source: Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017 (section 3.1).
    """
    kept = []
    hook = model.layer4.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    try:
        model(**{modality: images})
    finally:
        hook.remove()
    maps = kept[0].float().square().sum(1, keepdim=True)
    maps = F.interpolate(maps, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return ((maps - low) / (high - low).clamp(min=1e-12)).cpu().numpy()


def overlay(image: np.ndarray, activation: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) uint8 in grey with an activation map (H, W) in [0, 1] over it."""
    grey = image.mean(axis=2, keepdims=True)
    heat = 255 * matplotlib.colormaps["inferno"](activation)[..., :3]
    weight = 0.25 + 0.5 * activation[..., None]
    return ((1 - weight) * grey + weight * heat).round().astype(np.uint8)


def embed(features: np.ndarray, seed: int = 0) -> tuple[np.ndarray, str]:
    """Place features (n, D) in the plane: (n, 2) and the method's name.

    t-SNE; where scikit-learn is missing, or for fewer than ten features, the first two principal components.
    """
    try:
        from sklearn.manifold import TSNE  # an optional dependency
    except ImportError:
        TSNE = None
    if TSNE is not None and len(features) >= 10:
        perplexity = min(30, (len(features) - 1) / 3)
        # Of hundreds of images the exact gradient takes a second; Barnes and Hut's is for many thousands.
        tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed, method="exact")
        return tsne.fit_transform(features), "t-SNE"
    centred = features - features.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    points = centred @ axes[:2].T
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1]))), "PCA"
