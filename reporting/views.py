"""Where the network looks, and how its features lie in the plane."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.manifold import TSNE

from model import TwoStreamResNet


@torch.no_grad()
def position_powers(
    network: TwoStreamResNet, images: torch.Tensor, modality: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """What pooling takes the mean of, x^p at each position of the last feature map, and the features.

    Args:
        network: in evaluation mode.
        images: (n, 3, H, W) normalised, on the network's device.
        modality: "visible" or "infrared".

    Returns:
        (n, K, h, w) and (n, D), float32; the features have unit norm.
    """
    kept = []
    hook = network.layer4.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    try:
        features = F.normalize(network(**{modality: images}))
    finally:
        hook.remove()
    return kept[0].float().clamp(min=1e-6) ** network.pool.p, features


@torch.no_grad()
def similarity_map(
    network: TwoStreamResNet, powers: torch.Tensor, mean: torch.Tensor, other: torch.Tensor
) -> torch.Tensor:
    """Where an image's similarity to another one comes from: (h, w) float32; positive: that place adds to it.

    What the similarity loses when a position of the last feature map becomes what the average image has.
    Padding and strides make every image's activations larger at the same side; the average image, which has
    that side too, takes it away. The pooling is a mean of powers, so that all positions need one product.

    Args:
        network: in evaluation mode.
        powers: (K, h, w) of the image, see position_powers.
        mean: (K, h, w), the mean of those of many images of its modality.
        other: (D,) unit feature of the image that it is compared with.
    """
    whole = powers.mean((1, 2))
    without = whole + ((mean - powers) / powers[0].numel()).flatten(1).T  # (h w, K)
    pooled = torch.cat([whole[None], without]).clamp(min=0) ** (1 / network.pool.p)
    similarities = F.normalize(network.neck(pooled)) @ other.float()
    return (similarities[0] - similarities[1:]).view(powers.shape[1:])


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
