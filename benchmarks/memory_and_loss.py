"""Four memories and six loss terms: forward, backward to the features, update.

The baseline is the obvious implementation: a call per term; softmax, then logarithm, then divergence; the
distances of the centre triplet masked row by row, as in common triplet losses; one update per identity.
"""

import copy
import functools

import torch
import torch.nn.functional as F

from benchmarks.timing import compare, row, wait_for
from loss import WEIGHTS, mce_loss
from memory import MemoryBank
from utils import MODALITIES

DIM, IDENTITIES, IMAGES = 2048, 8, 4
TEMPERATURE, MARGIN = 0.05, 0.3
MOMENTUM = {"shared": 0.1, "visible": 0.25, "infrared": 0.25, "aux": 0.25}


def baseline_loss(features, labels, proxies, centers) -> torch.Tensor:
    """The total loss of features {modality: (n, D)} with tables {name: (C, D)}."""
    stacked, all_labels = torch.cat([features[m] for m in MODALITIES]), labels.repeat(3)
    terms = {"shared": F.cross_entropy(stacked @ proxies["shared"].T / TEMPERATURE, all_labels)}
    for modality in MODALITIES:
        terms[modality] = F.cross_entropy(features[modality] @ proxies[modality].T / TEMPERATURE, labels)

    def probabilities(seen, table):
        return torch.softmax(features[seen] @ centers[table].T / TEMPERATURE, dim=1)

    divergences = []
    for seen, other, table in (
        ("visible", "infrared", "visible"),
        ("infrared", "visible", "infrared"),
        ("aux", "aux", "infrared"),
    ):
        student, teacher = probabilities(seen, seen), probabilities(other, table).detach()
        divergences.append((teacher * (teacher.log() - student.log())).sum(1))
    terms["align"] = torch.cat(divergences).mean()

    columns = centers["shared"][all_labels]
    squared = stacked.pow(2).sum(1, keepdim=True) + columns.pow(2).sum(1) - 2 * stacked @ columns.T
    distances = squared.clamp(min=1e-12).sqrt()
    same = all_labels[:, None] == all_labels[None, :]
    positive, negative = [], []
    for k in range(len(distances)):
        positive.append(distances[k][same[k]].max())
        negative.append(distances[k][~same[k]].min())
    positive, negative = torch.stack(positive), torch.stack(negative)
    terms["center"] = F.margin_ranking_loss(negative, positive, torch.ones_like(positive), margin=MARGIN)
    return sum(WEIGHTS[name] * term for name, term in terms.items())


@torch.no_grad()
def baseline_update(features, labels, proxies) -> None:
    """Update the tables {name: (C, D)} in place, identity by identity."""
    rows = {modality: (features[modality], labels) for modality in MODALITIES}
    rows["shared"] = torch.cat([features[m] for m in MODALITIES]), labels.repeat(3)
    for name, (unit, row_labels) in rows.items():
        for y in labels.unique().tolist():
            same, proxy = unit[row_labels == y], proxies[name][y]
            towards = same[(same @ proxy).argmin()] if name == "shared" else same.mean(0)
            moved = MOMENTUM[name] * proxy + (1 - MOMENTUM[name]) * towards
            proxies[name][y] = moved / moved.norm()


def draw(num_classes: int, device: str, dim: int = DIM) -> tuple[torch.Tensor, torch.Tensor, MemoryBank]:
    """Features (3n, D), rows visible, infrared, aux, not normalised; labels (n,); a bank after one update."""
    generator = torch.Generator(device).manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, device=device)
    bank = MemoryBank(num_classes, dim, device=device)
    means = normal(num_classes, dim)
    bank.reset({modality: means + normal(num_classes, dim) for modality in MODALITIES})
    labels = torch.randperm(num_classes, generator=generator, device=device)[:IDENTITIES].repeat_interleave(
        IMAGES
    )
    features = means[labels].repeat(3, 1) + 2 * normal(3 * len(labels), dim)
    bank.update(split(F.normalize(features)), labels)
    return features, labels, bank


def split(features: torch.Tensor) -> dict[str, torch.Tensor]:
    """(3n, D) -> {modality: (n, D)}."""
    return dict(zip(MODALITIES, features.chunk(3), strict=True))


def baseline_step(features, labels, proxies, centers) -> tuple[torch.Tensor, torch.Tensor]:
    """One step on tables {name: (C, D)}: the loss and its gradient (3n, D)."""
    leaf = features.detach().requires_grad_()
    unit = split(leaf / leaf.norm(dim=1, keepdim=True))
    loss = baseline_loss(unit, labels, proxies, centers)
    loss.backward()
    baseline_update(unit, labels, proxies)
    return loss.detach(), leaf.grad


def our_step(features, labels, bank) -> tuple[torch.Tensor, torch.Tensor]:
    """One step as train.py does it: the loss and its gradient (3n, D)."""
    leaf = features.detach().requires_grad_()
    unit = split(F.normalize(leaf))
    loss, _ = mce_loss(unit, labels, bank)
    loss.backward()
    bank.update(unit, labels)
    return loss.detach(), leaf.grad


def check(features, labels, bank) -> None:
    """Both give the same loss, gradient and tables in two successive steps."""
    bank, (proxies, centers) = copy.deepcopy(bank), tables_of(bank)
    for _ in range(2):
        expected = baseline_step(features, labels, proxies, centers)
        torch.testing.assert_close(our_step(features, labels, bank), expected, rtol=1e-4, atol=1e-5)
        for name, table in proxies.items():
            torch.testing.assert_close(getattr(bank, name).proxies, table, rtol=1e-4, atol=1e-6)


def tables_of(bank: MemoryBank) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Copies of a bank's proxies and centers, {name: (C, D)} each."""
    memories = {name: getattr(bank, name) for name in MOMENTUM}
    proxies = {name: memory.proxies.clone() for name, memory in memories.items()}
    return proxies, {name: memory.centers.clone() for name, memory in memories.items()}


def run(device: str = "cpu", quick: bool = False) -> list[dict]:
    """Return a row for SYSU-MM01's number of classes, and rows without a baseline for larger ones."""
    rows = [_row(395, device, 8.0, repeats=3 if quick else 30)]
    return rows if quick else rows + [_row(classes, device, None, repeats=2) for classes in (4000, 40000)]


def _row(classes: int, device: str, bound: float | None, repeats: int) -> dict:
    """Measure a step; without a bound, not against the baseline, which would take too long."""
    features, labels, bank = draw(classes, device)

    def ours():
        our_step(features, labels, bank)
        wait_for(device)

    if bound is None:
        seconds = None, compare(ours, ours, repeats)[1]
    else:
        check(features, labels, bank)
        proxies, centers = tables_of(bank)

        def baseline():
            baseline_step(features, labels, proxies, centers)
            wait_for(device)

        seconds = compare(baseline, ours, repeats)
    # (n, D) x (D, C) 12 times forward and 9 times backward; the triplet's (3n, D) x (D, 3n) twice
    operations = 2 * DIM * (21 * len(labels) * classes + 2 * (3 * len(labels)) ** 2)
    work = f"memories and losses, {classes:,} identities, 3 x {len(labels)} features, D = {DIM:,}"
    speed = f"{operations / 1e9:.2f} GFLOP of products, {operations / 1e9 / seconds[1]:.0f} GFLOP/s"
    return row(work, seconds, bound, f"{speed}; tables of {8 * classes * DIM * 4 / 1e6:,.0f} MB")
