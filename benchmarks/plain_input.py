"""The input of the plain training loop: the obvious implementation.

Identities and images are drawn in a loop, torchvision's transforms augment one image at a time, and the batch
is stacked. The same draws give the same images as augmentation.augment.
"""

import random

import numpy as np
import torch
from torchvision.transforms import functional as transforms

from augmentation import Draws, augment, draw_augmentation
from utils import MODALITIES


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
    images = {modality: torch.stack(batch[modality]).to(device) for modality in batch}
    return images, torch.tensor(labels, device=device)


def check(images: np.ndarray, device: str) -> None:
    """This augmentation and ours agree, given the same draws, on images (n, H, W, 3) uint8."""
    rng = np.random.default_rng(0)
    for modality in MODALITIES:
        draws = draw_augmentation(rng, len(images), *images.shape[1:3], modality, "sysu")
        theirs = torch.stack([augment_one(image, draw_of(draws, k)) for k, image in enumerate(images)])
        ours = augment(torch.from_numpy(images).to(device), draws).cpu()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def draw_of(draws: Draws, k: int) -> dict:
    """The draw of image k."""
    values = {name: value if np.ndim(value) == 0 else value[k] for name, value in vars(draws).items()}
    return {
        name: value.tolist() if isinstance(value, np.generic) else value for name, value in values.items()
    }
