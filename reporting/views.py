"""Where the network looks, and how its features lie in the plane."""

import numpy as np
import torch
import torch.nn.functional as F

from model import TwoStreamResNet


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
    method = "PCA" if TSNE else "PCA (t-SNE needs scikit-learn)"
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1]))), method
