"""The memory bank: class proxies that the contrastive loss compares features with (Cheng et al., AAAI 2023).

The bank is not part of the model or of a checkpoint: it is rebuilt from features at the start of every epoch.
Only `reset` and `update` change it. No method waits for the GPU.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from utils import MODALITIES


class ClusterMemory:
    """One table of class proxies (C, D) float32, and a copy from the start of the epoch.

    The attribute `proxies` is up to date: `update` changes it. The attribute `centers` is historical: only
    `reset` changes it.

    Args:
        num_classes: C.
        dim: D.
        temperature: divides the logits.
        momentum: weight of the old proxy in an update.
        hard: update with the least similar feature of a class, not with the mean.
        device: of the tables.
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
        """Start an epoch: set both tables to centers (C, D), without normalising them."""
        if centers.shape != self.proxies.shape:
            raise ValueError(f"centers are {tuple(centers.shape)}, the memory {tuple(self.proxies.shape)}")
        self.centers = centers.detach().to(self.proxies).clone()
        self.proxies = self.centers.clone()

    def logits(self, features: torch.Tensor, historical: bool = False) -> torch.Tensor:
        """Similarity of features (n, D) to every class, divided by the temperature: (n, C) float32."""
        table = self.centers if historical else self.proxies
        with torch.autocast(table.device.type, enabled=False):
            return features.float() @ table.T / self.temperature

    @torch.no_grad()
    def update(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Move the proxy of each identity in the batch towards its features: docs/method.md, section 5.

        For each identity y, proxies[y] = normalise(m proxies[y] + (1 - m) q), where q is the mean of y's
        features, or (hard) the feature of y that is least similar to proxies[y].

        Args:
            features: (n, D), unit norm.
            labels: (n,) int64, 0..C-1.
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
        # All rows of an identity write to the same proxy. So that the order of writes does not matter, they
        # all write the values of the identity's first row.
        first = same.int().argmax(1)
        self.proxies.index_copy_(0, labels, moved.index_select(0, first))


class MemoryBank:
    """The four tables of the method: `shared` (modality-agnostic, hard) and one for each modality (mean).

    Args:
        num_classes, dim, temperature, device: see ClusterMemory.
        shared_momentum: weight of the old proxy in `shared`.
        momentum: weight of the old proxy in the other tables.
        shared_hard: False updates `shared` with means too.
    """

    modalities = MODALITIES  # of which `reset` wants the class means

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
        """Start an epoch from the mean feature of every class in each modality, {modality: (C, D)}.

        A modality's table becomes its L2-normalised means. `shared` becomes the mean of these tables and is
        not normalised again (a quirk of the released code, kept for parity). The table of a modality that is
        missing (aux with --no-aux) does not change.
        """
        centers = {modality: F.normalize(means.float()) for modality, means in class_means.items()}
        for modality, table in centers.items():
            getattr(self, modality).reset(table)
        self.shared.reset(sum(centers.values()) / len(centers))

    def update(self, features: Mapping[str, torch.Tensor], labels: torch.Tensor) -> None:
        """Update the tables with a step's unit features {modality: (n, D)}, all with the same labels (n,)."""
        modalities = [modality for modality in MODALITIES if modality in features]
        for modality in modalities:
            getattr(self, modality).update(features[modality], labels)
        all_features = torch.cat([features[modality] for modality in modalities])
        self.shared.update(all_features, labels.repeat(len(modalities)))


class NoMemory:
    """In the place of MemoryBank for losses without a memory: there is nothing to reset or to update."""

    modalities = ()

    def reset(self, class_means: Mapping[str, torch.Tensor]) -> None:
        """See MemoryBank.reset."""

    def update(self, features: Mapping[str, torch.Tensor], labels: torch.Tensor) -> None:
        """See MemoryBank.update."""
