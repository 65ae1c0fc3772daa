"""The loss of MCE: six terms over a memory bank, and the one place where they are summed.

Each term is a function of unit features; docs/method.md, section 6, has the definitions.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from utils import MODALITIES

WEIGHTS = {"shared": 1.0, "visible": 1.0, "infrared": 1.0, "aux": 0.4, "align": 1.2, "center": 1.0}
PROXIES = ("historical", "updated", "both")


def align_loss(features: Mapping[str, torch.Tensor], bank, historical: bool = True) -> torch.Tensor:
    """KL(teacher || student) over class similarities, summed over classes, mean over the 3n rows.

    The k-th visible and the k-th infrared image of a batch show the same identity, so each is asked to see
    a modality's proxies as the other one does; an aux image sees the infrared proxies. The teacher has no
    gradient.

    features: {modality: (n, D)}; bank: a memory bank; historical: compare with centers instead of proxies.
    """
    visible, infrared, aux = (features[modality] for modality in MODALITIES)
    student = torch.cat(
        [
            bank.visible.logits(visible, historical),
            bank.infrared.logits(infrared, historical),
            bank.aux.logits(aux, historical),
        ]
    )  # (3n, C)
    with torch.no_grad():
        teacher = torch.cat(
            [
                bank.visible.logits(infrared, historical),
                bank.infrared.logits(torch.cat([visible, aux]), historical),
            ]
        )  # (3n, C)
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")


def center_triplet_loss(
    features: torch.Tensor, labels: torch.Tensor, centers: torch.Tensor, margin: float = 0.3
) -> torch.Tensor:
    """Mean of max(0, d+ - d- + margin): distance to one's own centre and to the nearest other of the batch.

    features: (m, D); labels: (m,) int64; centers: (C, D). A batch of one identity has no other: its loss is
    0. Squared distances are clamped at 1e-12 before the root.
    """
    columns = centers.index_select(0, labels)  # (m, D): row j is the centre of labels[j]
    with torch.autocast(features.device.type, enabled=False):
        products = features @ columns.T
    squared = features.square().sum(1, keepdim=True) + columns.square().sum(1) - 2 * products
    distances = squared.clamp(min=1e-12).sqrt()  # (m, m)
    same = labels[:, None] == labels[None, :]
    positive = distances.diagonal()
    negative = distances.masked_fill(same, torch.inf).amin(1)
    return F.relu(positive - negative + margin).mean()


def mce_loss(
    features: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    bank,
    weights: Mapping[str, float] = WEIGHTS,
    proxies: str = "historical",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of the six terms, and the terms themselves, unweighted.

    features: {"visible" | "infrared" | "aux": (n, D) unit norm}; labels: (n,) int64, the identities of the
    k-th images of all three; bank: a memory bank, as it was before this step's update; weights: {term:
    weight}; proxies: which table `align` compares with: "historical", "updated", or "both" (the mean of the
    two losses).
    Returns (total, {"shared", "visible", "infrared", "aux", "align", "center": scalar}).
    Raises ValueError for another value of proxies. Source: docs/method.md, section 6.
    """
    if proxies not in PROXIES:
        raise ValueError(f"proxies must be one of {', '.join(PROXIES)}, not {proxies!r}")
    everything = torch.cat([features[modality] for modality in MODALITIES]).float()  # (3n, D)
    all_labels = labels.repeat(3)
    terms = {"shared": F.cross_entropy(bank.shared.logits(everything), all_labels)}
    for modality in MODALITIES:
        terms[modality] = F.cross_entropy(getattr(bank, modality).logits(features[modality]), labels)
    tables = {"historical": (True,), "updated": (False,), "both": (True, False)}[proxies]
    terms["align"] = sum(align_loss(features, bank, historical) for historical in tables) / len(tables)
    terms["center"] = center_triplet_loss(everything, all_labels, bank.shared.centers)
    total = sum(weights[name] * term for name, term in terms.items())
    return total, terms
