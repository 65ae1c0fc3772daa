"""The loss of MCE: six terms over a memory bank, and the one place where they are summed; two baselines.

Each term of MCE is a function of unit features; docs/method.md, section 6, has the definitions.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from devices import Processes
from utils import MODALITIES

WEIGHTS = {"shared": 1.0, "visible": 1.0, "infrared": 1.0, "aux": 0.4, "align": 1.2, "center": 1.0}
BASELINE_WEIGHTS = {"identity": 1.0, "triplet": 1.0}
LOSSES = ("mce", "hard-triplet", "weighted-triplet")
PROXIES = ("historical", "updated", "both")
MARGIN = 0.3


def align_loss(features: Mapping[str, torch.Tensor], bank, historical: bool = True) -> torch.Tensor:
    """KL(teacher || student) over class similarities, summed over classes, mean over the 3n rows.

    The k-th visible and the k-th infrared image of a batch show the same identity, so each is asked to see
    a modality's proxies as the other one does; an aux image sees the infrared proxies. The teacher has no
    gradient.

    features: {modality: (n, D)}, with aux or without; bank: a memory bank; historical: compare with centers
    instead of proxies.
    """
    seen_as = {  # student's modality and table: the teacher's
        "visible": ("infrared", "visible"),
        "infrared": ("visible", "infrared"),
        "aux": ("aux", "infrared"),
    }
    student, teacher = [], []  # (n, C) for each modality
    for modality in features:
        other, table = seen_as[modality]
        student.append(getattr(bank, modality).logits(features[modality], historical))
        teacher.append(getattr(bank, table).logits(features[other].detach(), historical))
    student, teacher = torch.cat(student), torch.cat(teacher)
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")


def distances_between(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Euclidean distances (m, k) of rows (m, D) to columns (k, D), squares at least 1e-12."""
    with torch.autocast(rows.device.type, enabled=False):
        products = rows @ columns.T
    squared = rows.square().sum(1, keepdim=True) + columns.square().sum(1) - 2 * products
    return squared.clamp(min=1e-12).sqrt()


def center_triplet_loss(
    features: torch.Tensor,
    labels: torch.Tensor,
    centers: torch.Tensor,
    margin: float = MARGIN,
    others: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean of max(0, d+ - d- + margin): distance to one's own centre and to the nearest other of the batch.

    features: (m, D); labels: (m,) int64; centers: (C, D); others: (k,) int64, identities of the batch whose
    features other processes have. A batch of one identity has no other: its loss is 0. Squared distances are
    clamped at 1e-12 before the root.
    """
    identities = labels if others is None else torch.cat([labels, others])
    # column j is the centre of identities[j]
    distances = distances_between(features, centers.index_select(0, identities))  # (m, m + k)
    same = labels[:, None] == identities[None, :]
    positive = distances.diagonal()
    negative = distances.masked_fill(same, torch.inf).amin(1)
    return F.relu(positive - negative + margin).mean()


def mce_loss(
    features: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    bank,
    weights: Mapping[str, float] = WEIGHTS,
    proxies: str = "historical",
    margin: float = MARGIN,
    others: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of the six terms, and the terms themselves, unweighted.

    features: {"visible" | "infrared" | "aux": (n, D) unit norm}; without aux the `aux` term is 0, and
    `shared`, `align` and `center` are over the 2n other rows; labels: (n,) int64, the identities of the k-th
    images of each; bank: a memory bank, as it was before this step's update; weights: {term: weight};
    proxies: which table `align` compares with: "historical", "updated", or "both" (the mean of the two
    losses); margin, others: of `center`.
    Returns (total, {"shared", "visible", "infrared", "aux", "align", "center": scalar}).
    Raises ValueError for another value of proxies. Source: docs/method.md, section 6.
    """
    if proxies not in PROXIES:
        raise ValueError(f"proxies must be one of {', '.join(PROXIES)}, not {proxies!r}")
    features = {modality: features[modality] for modality in MODALITIES if modality in features}
    everything = torch.cat(list(features.values())).float()  # (3n, D)
    all_labels = labels.repeat(len(features))
    terms = {"shared": F.cross_entropy(bank.shared.logits(everything), all_labels)}
    for modality in MODALITIES:
        terms[modality] = (
            F.cross_entropy(getattr(bank, modality).logits(features[modality]), labels)
            if modality in features
            else everything.new_zeros(())
        )
    tables = {"historical": (True,), "updated": (False,), "both": (True, False)}[proxies]
    terms["align"] = sum(align_loss(features, bank, historical) for historical in tables) / len(tables)
    terms["center"] = center_triplet_loss(everything, all_labels, bank.shared.centers, margin, others)
    return weighted_sum(terms, weights), terms


def weighted_sum(terms: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    """The total that training minimises."""
    return sum(weights[name] * term for name, term in terms.items())


class MCE(nn.Module):
    """mce_loss with a run's settings, called as the baselines are; it has no weights of its own.

    With several processes each has a share of the batch: the mean of their losses is the whole batch's.
    """

    def __init__(self, bank, weights: Mapping[str, float], proxies: str, margin: float, processes: Processes):
        super().__init__()
        self.bank, self.weights, self.proxies, self.margin = bank, weights, proxies, margin
        self.processes = processes

    def forward(
        self,
        features: Mapping[str, torch.Tensor],
        labels: torch.Tensor,
        outputs: torch.Tensor,
        pooled: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(total, terms) of a step's unit features; outputs and pooled are the baselines'."""
        others = self.processes.of_others(labels)
        return mce_loss(features, labels, self.bank, self.weights, self.proxies, self.margin, others)


# Baselines: what the field trains with when it has no memory


def hard_triplet_loss(features: torch.Tensor, labels: torch.Tensor, margin: float = MARGIN) -> torch.Tensor:
    """Mean of max(0, d+ - d- + margin): to the farthest row of the same identity, the nearest of another.

    features: (m, D), not normalised; labels: (m,) int64. A row without such a row counts as 0.
    Source: Hermans, Beyer and Leibe, "In Defense of the Triplet Loss", 2017 (batch hard).
    """
    distances = distances_between(features, features)
    positives, negatives = pairs(labels)
    farthest = distances.masked_fill(~positives, -torch.inf).amax(1)
    nearest = distances.masked_fill(~negatives, torch.inf).amin(1)
    return F.relu(farthest - nearest + margin).mean()


def weighted_triplet_loss(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of log(1 + exp(d+ - d-)), each d a weighted mean of distances: the hardest weigh most.

    d+ is over the other rows of the same identity, weighted with softmax(d); d- over the rows of other
    identities, weighted with softmax(-d). No margin. features: (m, D), not normalised; labels: (m,) int64. A
    row without a row of either kind counts as 0.
    Source: Ye et al., "Deep Learning for Person Re-identification: A Survey and Outlook", TPAMI 2021 (AGW).
    """
    distances = distances_between(features, features)
    positives, negatives = pairs(labels)
    lowest = torch.finfo(distances.dtype).min  # -inf would make the softmax of an empty row not a number
    towards = distances.masked_fill(~positives, lowest).softmax(1)
    away = (-distances).masked_fill(~negatives, lowest).softmax(1)
    difference = (towards * distances).sum(1) - (away * distances).sum(1)
    complete = positives.any(1) & negatives.any(1)
    return (F.softplus(difference) * complete).mean()


def pairs(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks (m, m): other rows of the same identity, rows of other identities."""
    same = labels[:, None] == labels[None, :]
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


class Baseline(nn.Module):
    """Cross-entropy of a linear classifier plus a triplet loss: what AGW and CAJ train with.

    As in AGW the classifier, without bias, reads BNNeck's outputs, and the triplet loss the pooled features
    before BNNeck. Each is over all of a batch's images, of whatever modality. The classifier is trained with
    the network but no part of it: features are compared without it.

    triplet: "hard-triplet" or "weighted-triplet"; weights: of the terms `identity` and `triplet`; margin: of
    "hard-triplet"; processes: share the batch: the mean of their losses is the whole batch's.
    """

    def __init__(
        self,
        triplet: str,
        num_classes: int,
        dim: int,
        weights: Mapping[str, float],
        margin: float,
        processes: Processes,
    ):
        super().__init__()
        self.triplet, self.weights, self.margin, self.processes = triplet, weights, margin, processes
        self.classifier = nn.Linear(dim, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(
        self,
        features: Mapping[str, torch.Tensor],
        labels: torch.Tensor,
        outputs: torch.Tensor,
        pooled: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(total, {"identity", "triplet": scalar}).

        features: as MCE has them, unused; labels: (n,) int64; outputs, pooled: (3n, D) behind and before
        BNNeck, modality after modality.
        """
        all_labels = labels.repeat(len(outputs) // len(labels))
        terms = {"identity": F.cross_entropy(self.classifier(outputs.float()), all_labels)}
        # A triplet may have its images in several processes: each computes the term of the whole batch.
        everything, everyone = (self.processes.all_gather(rows) for rows in (pooled.float(), all_labels))
        if self.triplet == "hard-triplet":
            terms["triplet"] = hard_triplet_loss(everything, everyone, self.margin)
        else:
            terms["triplet"] = weighted_triplet_loss(everything, everyone)
        return weighted_sum(terms, self.weights), terms
