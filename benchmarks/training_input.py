"""Training input on one device: three augmented images a triplet, from sampling to float tensors.

    python -m benchmarks.training_input

The baseline is what anyone first writes: identities and images picked in a loop, each image through
torchvision's transforms by itself, the batch stacked. Given the same draws both make the same images.
"""

import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms import functional as transforms

from augmentation import Draws, augment, crop, draw_augmentation, finish
from benchmarks.timing import compare, wait_for
from data_loader import IdentityBatches, TrainLoader
from utils import MODALITIES

HEIGHT, WIDTH = 384, 128


def augment_one(image: np.ndarray, draw: dict) -> torch.Tensor:
    """Augment one image (H, W, 3) uint8 with its draw, a row of Draws: (3, H, W) float32."""
    height, width, _ = image.shape
    picture = transforms.pad(transforms.to_pil_image(image), [10], fill=(draw["pad_value"],) * 3)
    picture = transforms.crop(picture, draw["top"], draw["left"], height, width)
    if draw["flip"]:
        picture = transforms.hflip(picture)
    pixels = transforms.normalize(transforms.to_tensor(picture), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    top, bottom, left, right = draw["erase"]
    for channel, fill in enumerate((0.4914, 0.4822, 0.4465)):
        pixels[channel, top:bottom, left:right] = fill
    if draw["channel"] >= 0:
        pixels[:] = pixels[draw["channel"]].clone()
    if draw["grey"]:
        pixels[:] = 0.2989 * pixels[0] + 0.5870 * pixels[1] + 0.1140 * pixels[2]
    return pixels


def draw_one(height: int, width: int, modality: str) -> dict:
    """Draw the augmentation of one image by SYSU-MM01's recipe."""
    k = random.randrange(4) if modality == "infrared" else random.randrange(3)
    erase = (0, 0, 0, 0)
    if random.random() < 0.5:
        for _ in range(100):
            area = random.uniform(0.02, 0.4) * height * width
            aspect = random.uniform(0.3, 1 / 0.3)
            tall, wide = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if tall < height and wide < width:
                top, left = random.randint(0, height - tall), random.randint(0, width - wide)
                erase = (top, top + tall, left, left + wide)
                break
    return {
        "pad_value": 0,
        "top": random.randint(0, 20),
        "left": random.randint(0, 20),
        "flip": random.random() < 0.5,
        "erase": erase,
        "channel": k if modality != "visible" and k < 3 else -1,
        "grey": k == 3 and random.random() < 0.5,
    }


def baseline_step(
    images: dict, rows_of: dict, batch_size: int, num_pos: int, device: str | torch.device
) -> tuple[dict, torch.Tensor]:
    """One step's images {modality: (n, 3, H, W)} and labels (n,)."""
    labels: list[int] = []
    batch: dict[str, list] = {modality: [] for modality in MODALITIES}
    for label in random.sample(sorted(rows_of["visible"]), batch_size):
        for _ in range(num_pos):
            labels.append(label)
            visible = images["visible"][random.choice(rows_of["visible"][label])]
            infrared = images["infrared"][random.choice(rows_of["infrared"][label])]
            for modality, image in zip(MODALITIES, (visible, infrared, visible), strict=True):
                draw = draw_one(*image.shape[:2], modality)
                batch[modality].append(augment_one(image, draw))
    images = {modality: torch.stack(part).to(device) for modality, part in batch.items()}
    return images, torch.tensor(labels, device=device)


def check(images: np.ndarray, device: str) -> None:
    """The baseline's augmentation and both of ours agree, given the same draws."""
    rng = np.random.default_rng(0)
    for modality in MODALITIES:
        draws = draw_augmentation(rng, len(images), *images.shape[1:3], modality, "sysu")
        theirs = torch.stack([augment_one(image, draw_of(draws, k)) for k, image in enumerate(images)])
        on_device = augment(torch.from_numpy(images).to(device), draws).cpu()
        on_host = finish(crop(images, np.arange(len(images)), draws), draws)
        for ours in (on_device, on_host):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def draw_of(draws: Draws, k: int) -> dict:
    """The draw of image k."""
    values = {name: value if np.ndim(value) == 0 else value[k] for name, value in vars(draws).items()}
    return {
        name: value.tolist() if isinstance(value, np.generic) else value for name, value in values.items()
    }


def run(device: str = "cpu", quick: bool = False) -> list[dict]:
    """Measure; the rows of the table of benchmarks."""
    classes, per_class = (8, 4) if quick else (40, 25)
    batch_size, num_pos, steps, repeats = (4, 2, 2, 3) if quick else (8, 4, 8, 7)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        images, labels, rows_of = {}, {}, {}
        for modality in ("visible", "infrared"):
            file = Path(folder, f"{modality}.npy")
            shape = (classes * per_class, HEIGHT, WIDTH, 3)
            np.save(file, rng.integers(0, 256, shape, dtype=np.uint8))
            images[modality] = np.load(file, mmap_mode="r")
            labels[modality] = np.arange(classes).repeat(per_class)
            rows_of[modality] = {k: np.flatnonzero(labels[modality] == k).tolist() for k in range(classes)}
        check(np.array(images["visible"][:16]), device)

        batches = IdentityBatches(labels, batch_size, num_pos, seed=0)
        loader = TrainLoader(images, labels, batches, "sysu", torch.device(device), seed=0)

        def baseline() -> None:
            for _ in range(steps):
                baseline_step(images, rows_of, batch_size, num_pos, device)
            wait_for(device)

        def ours() -> None:
            for _, _batch in zip(range(steps), loader.epoch(0), strict=False):
                pass
            wait_for(device)

        baseline_s, ours_s = compare(baseline, ours, repeats)
    count = steps * batch_size * num_pos * 3
    return [
        {
            "work": f"training input, {count} augmented {HEIGHT}x{WIDTH} images",
            "baseline_s": baseline_s,
            "ours_s": ours_s,
            "ratio": baseline_s / ours_s,
            "bound": 5.0,
            "note": f"{count / ours_s:.0f} images/s, baseline {count / baseline_s:.0f}; cache {loader.cache}",
        }
    ]


if __name__ == "__main__":
    for row in run():
        print(row)
