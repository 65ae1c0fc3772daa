"""The memory bank: class proxies that the contrastive loss compares features with (Cheng et al., AAAI 2023).

The bank is derived state: rebuilt from features at the start of every epoch, changed by visible calls only,
never part of the model. It lives on the device that it is made on, and no method waits for that device.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from utils import MODALITIES


class ClusterMemory:
    """One table of class proxies (C, D), float32, with the copy that an epoch began with.

    proxies: up to date, changed by `update`. centers: historical, changed by `reset` alone.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        temperature: float = 0.05,
        momentum: float = 0.1,
        hard: bool = False,
        device: torch.device | str | None = None,
    ):
        self.temperature, self.momentum, self.hard = temperature, momentum, hard
        self.proxies = torch.zeros(num_classes, dim, device=device)
        self.centers = torch.zeros(num_classes, dim, device=device)

    @torch.no_grad()
    def reset(self, centers: torch.Tensor) -> None:
        """Begin an epoch: both tables become centers (C, D), as they are (not normalised here)."""
        if centers.shape != self.proxies.shape:
            raise ValueError(f"centers are {tuple(centers.shape)}, the memory {tuple(self.proxies.shape)}")
        self.centers = centers.detach().to(self.proxies).clone()
        self.proxies = self.centers.clone()

    def logits(self, features: torch.Tensor, historical: bool = False) -> torch.Tensor:
        """Similarity of features (n, D) to every class over the temperature: (n, C) float32."""
        table = self.centers if historical else self.proxies
        with torch.autocast(table.device.type, enabled=False):
            return features.float() @ table.T / self.temperature

    @torch.no_grad()
    def update(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Move the proxy of each identity in the batch towards its features: docs/method.md, section 5.

        features: (n, D) unit norm; labels: (n,) int64 in 0..C-1. For each identity y,
        proxies[y] = normalise(m proxies[y] + (1 - m) q), where q is the mean of y's features, or (hard) the
        feature of y that is the least similar to proxies[y].
        """
        features = features.detach().float()
        same = labels[:, None] == labels[None, :]  # (n, n)
        proxies = self.proxies.index_select(0, labels)  # (n, D)
        with torch.autocast(features.device.type, enabled=False):
            if self.hard:
                similarity = torch.linalg.vecdot(features, proxies)  # (n,)
                hardest = similarity.expand_as(same).masked_fill(~same, torch.inf).argmin(1)
                towards = features.index_select(0, hardest)
            else:
                towards = same.float() @ features / same.sum(1, keepdim=True)
        moved = F.normalize(towards.lerp_(proxies, self.momentum))
        # Rows of one identity all write the same class: give them the very same values, those of its first
        # row, so that the result does not depend on which write comes last.
        first = same.int().argmax(1)
        self.proxies.index_copy_(0, labels, moved.index_select(0, first))


class MemoryBank:
    """The four tables of the method: `shared` (modality-agnostic, hard) and one for each modality (mean).

    shared_hard: False updates `shared` with means too.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        temperature: float = 0.05,
        shared_momentum: float = 0.1,
        momentum: float = 0.25,
        shared_hard: bool = True,
        device: torch.device | str | None = None,
    ):
        def table(momentum: float, hard: bool) -> ClusterMemory:
            return ClusterMemory(num_classes, dim, temperature, momentum, hard, device)

        self.shared = table(shared_momentum, shared_hard)
        self.visible, self.infrared, self.aux = (table(momentum, hard=False) for _ in MODALITIES)

    @torch.no_grad()
    def reset(self, class_means: Mapping[str, torch.Tensor]) -> None:
        """Begin an epoch from the mean feature of every class in each modality, {modality: (C, D)}.

        Each modality's table is its means, L2-normalised; `shared` is the mean of those tables and is not
        normalised again (a quirk of the released code, kept for parity). A modality may be missing, as aux is
        in training without it: its table stays as it was.
        """
        centers = {modality: F.normalize(means.float()) for modality, means in class_means.items()}
        for modality, table in centers.items():
            getattr(self, modality).reset(table)
        self.shared.reset(sum(centers.values()) / len(centers))

    def update(self, features: Mapping[str, torch.Tensor], labels: torch.Tensor) -> None:
        """Update the tables with a step's unit features {modality: (n, D)}; labels (n,) serve each."""
        modalities = [modality for modality in MODALITIES if modality in features]
        for modality in modalities:
            getattr(self, modality).update(features[modality], labels)
        everything = torch.cat([features[modality] for modality in modalities])
        self.shared.update(everything, labels.repeat(len(modalities)))
