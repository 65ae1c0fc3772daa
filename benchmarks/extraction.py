"""Rebuilding the memory and embedding for evaluation, with input, against the bare forward pass.

    python -m benchmarks.extraction

The bare forward pass runs equally often on one batch that is already on the device, with the same network,
precision and batch size. A loop over single images checks the features.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms import functional as transforms

from benchmarks.preprocessing import draw_jpegs
from benchmarks.timing import compare, row, wait_for
from benchmarks.workload import draw_sysu, training_of
from data_loader import evaluation_batches
from engine.training import Training
from images import read_image
from model import extract_features
from train import rebuild_memory
from utils import MODALITIES


def run(device: str = "cpu", quick: bool = False) -> list[dict]:
    """Return two rows: the memory's rebuilding, and decoding and embedding images from files."""
    arch, height, width, batch = ("resnet18", 64, 32, 8) if quick else ("resnet50", 384, 128, 64)
    batches, repeats = (2, 1) if quick else (64, 3) if device == "cuda" else (1, 3)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name, "sysu")
        draw_sysu(root, 8, dict.fromkeys(("visible", "infrared"), batch * batches), height, width, noise=True)
        sizes = ("--arch", arch, "--img-h", height, "--img-w", width, "--test-batch", batch)
        training = training_of(root, device, *sizes)
        training.model.eval()
        check_rebuilding(training)
        paths = draw_jpegs(root, batch)
        check_embedding(training, paths)

        def bare(times: int) -> None:
            extract_features(training.model, [images] * times, "visible", training.dtype)
            wait_for(device)

        def rebuild() -> None:
            rebuild_memory(training, 0)
            wait_for(device)

        def embed() -> None:
            embed_files(training, paths * batches)
            wait_for(device)

        images, _ = next(iter(training.loader.memory_batches("visible", batch, 0)))
        size = f"{height}x{width}, {arch}, batches of {batch}"
        return [
            _row(f"rebuilding the memory, {size}", 3 * batch * batches, *compare(
                lambda: bare(3 * batches), rebuild, repeats)),
            _row(f"decoding and embedding JPEGs, {size}", batch * batches, *compare(
                lambda: bare(batches), embed, repeats)),
        ]  # fmt: skip


def _row(work: str, count: int, bare_s: float, ours_s: float) -> dict:
    note = f"{count / ours_s:.1f} images/s, the bare forward pass {count / bare_s:.1f}"
    return row(work, (bare_s, ours_s), 0.9, note)


def embed_files(training: Training, paths: list[str]) -> torch.Tensor:
    """The features of image files, as evaluation.py makes them."""
    args, loader = training.args, training.loader
    batches = evaluation_batches(
        paths, loader.height, loader.width, args.test_batch, training.device, args.workers
    )
    return extract_features(training.model, batches, "visible", training.dtype)


@torch.no_grad()
def embed_one(training: Training, pixels, modality: str) -> torch.Tensor:
    """The feature (D,) of one image (H, W, 3) uint8, in float32."""
    image = transforms.normalize(
        transforms.to_tensor(pixels.copy()), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    stem = "infrared" if modality == "infrared" else "visible"
    return F.normalize(training.model(**{stem: image[None].to(training.device)}))[0]


def check_rebuilding(training: Training) -> None:
    """The tables are normalised class means of features embedded one by one (of two classes, to be brief)."""
    rebuild_memory(training, 0)
    for modality in ("visible", "infrared"):
        labels, images = training.loader.labels[modality], training.loader.images[modality]
        for label in (0, 5):
            rows = (labels == label).nonzero()[0]
            pixels = torch.as_tensor(images[rows]).cpu().numpy()
            mean = torch.stack([embed_one(training, one, modality) for one in pixels]).mean(0)
            center = getattr(training.bank, modality).centers[label]
            assert F.cosine_similarity(center, mean, dim=0) > 0.999, (
                f"the memory disagrees: {modality}, {label}"
            )
    mean = sum(getattr(training.bank, modality).centers for modality in MODALITIES) / 3
    torch.testing.assert_close(training.bank.shared.centers, mean)


def check_embedding(training: Training, paths: list[str]) -> None:
    """Features of the first few files equal those of images embedded one by one."""
    features = embed_files(training, paths[:4])
    for path, feature in zip(paths, features, strict=False):
        pixels = read_image(path, training.loader.height, training.loader.width)
        assert F.cosine_similarity(feature, embed_one(training, pixels, "visible"), dim=0) > 0.999, path


if __name__ == "__main__":
    for line in run():
        print(line)
