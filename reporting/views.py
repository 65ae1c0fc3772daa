"""Where the similarity of two images comes from, and how features lie in the plane."""

from collections.abc import Callable

import numpy as np
import torch
from sklearn.manifold import TSNE

CELLS = 8, 4  # rows and columns of a map


@torch.no_grad()
def similarity_maps(
    embed_images: Callable[[torch.Tensor], torch.Tensor],
    image: torch.Tensor,
    average: torch.Tensor,
    others: torch.Tensor,
) -> torch.Tensor:
    """Where an image's similarities to others come from: (k, *CELLS) float32; positive: that place adds.

    A window of 2 x 2 cells moves over the image, and what it covers becomes what the average image has there.
    A cell's value is the mean of what the similarity loses over the windows that cover the cell.

    Args:
        embed_images: gives the unit features (n, D) of images (n, H, W, 3).
        image: (H, W, 3) uint8; H >= 8, W >= 4.
        average: (H, W, 3) uint8, of many images of its modality.
        others: (k, D) unit features of the images that it is compared with.

    Source: M. Zeiler, R. Fergus, Visualizing and Understanding Convolutional Networks, 2014, section 4.2.
    """
    edges = [np.linspace(0, image.shape[k], CELLS[k] + 1).round().astype(int) for k in (0, 1)]
    windows = []  # also beyond the edges, so that every cell is in four of them
    for corner in np.ndindex(CELLS[0] + 1, CELLS[1] + 1):
        windows.append(tuple(slice(max(0, c - 1), min(c + 1, n)) for c, n in zip(corner, CELLS, strict=True)))
    images = image.repeat(1 + len(windows), 1, 1, 1)
    for covered, window in zip(images[1:], windows, strict=True):
        place = tuple(slice(edges[k][window[k].start], edges[k][window[k].stop]) for k in (0, 1))
        covered[place] = average[place]
    similarities = (embed_images(images) @ others.T).T.cpu()  # (k, 1 + windows)
    lost = similarities[:, :1] - similarities[:, 1:]
    maps = torch.zeros(len(others), *CELLS)
    for k, window in enumerate(windows):
        maps[(slice(None), *window)] += lost[:, k, None, None] / 4
    return maps


def embed(features: np.ndarray, seed: int = 0) -> tuple[np.ndarray, str]:
    """Place features (n, D) in the plane: (n, 2) and the method's name.

    t-SNE; for fewer than ten features, the first two principal components.
    """
    if len(features) >= 10:
        perplexity = min(30, (len(features) - 1) / 3)
        # Of hundreds of images the exact gradient takes a second; Barnes and Hut's is for many thousands.
        tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed, method="exact")
        return tsne.fit_transform(features), "t-SNE"
    centred = features - features.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    points = centred @ axes[:2].T
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1]))), "PCA"
