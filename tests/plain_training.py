"""A training step and the memory's reset as docs/method.md has them, for tests to compare with.

Shared with train.py are the network, the six terms and the tables' logits, which have tests of their own; the
terms' sum, the order of things, the memory's update and Adam are written out here.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from conftest import tiny_flags
from test_memory import naive_update

from augmentation import normalize
from data_loader import generator
from devices import Processes
from loss import mce_loss
from training import Training, build_training, open_run
from utils import MODALITIES

WEIGHTS = {"shared": 1.0, "visible": 1.0, "infrared": 1.0, "aux": 0.4, "align": 1.2, "center": 1.0}
MOMENTUM = {"shared": 0.1, "visible": 0.25, "infrared": 0.25, "aux": 0.25}
WEIGHT_DECAY, BETAS, EPSILON = 5e-4, (0.9, 0.999), 1e-8  # the last two are Adam's usual ones


def start_training(root, *flags) -> Training:
    """What train.py trains with on a tiny dataset at root."""
    args, _, _ = open_run([*tiny_flags(root), *map(str, flags)])
    return build_training(args, None, Processes())


class PlainTraining:
    """A run's state, copied from a Training, and its step.

    Of several processes each has a replica of the network: its batch norms see only its own images, and its
    loss is the mean over them. Gradients are averaged over the replicas; all features update one memory.
    """

    def __init__(self, training: Training, replicas: int = 1):
        self.models = [deepcopy(training.model).train() for _ in range(replicas)]
        self.bank, self.proxies = deepcopy(training.bank), training.args.proxies
        self.weights = [dict(model.named_parameters()) for model in self.models]
        self.moments = {name: [torch.zeros_like(w)] * 2 for name, w in self.weights[0].items()}
        self.steps = 0

    def step(self, batches, rate):
        """Take a step with a batch (images, labels) for each replica; return their losses, (replicas, 7)."""
        losses, all_features, all_labels = [], [], []
        for model, (images, labels) in zip(self.models, batches, strict=True):
            outputs = model(torch.cat([images["visible"], images["aux"]]), images["infrared"])
            n = len(labels)
            rows = {"visible": outputs[:n], "aux": outputs[n : 2 * n], "infrared": outputs[2 * n :]}
            features = {modality: own / own.norm(dim=1, keepdim=True) for modality, own in rows.items()}
            _, terms = mce_loss(features, labels, self.bank, proxies=self.proxies)
            total = sum(weight * terms[name] for name, weight in WEIGHTS.items())
            model.zero_grad()
            total.backward()
            losses.append(torch.stack([total, *(terms[name] for name in WEIGHTS)]).detach())
            all_features.append({modality: own.detach() for modality, own in features.items()})
            all_labels.append(labels)
        self.update_memory(all_features, torch.cat(all_labels))
        self.adam(rate)
        return torch.stack(losses)

    def update_memory(self, features, labels):
        """Section 5's update, with the features of all replicas."""
        rows = {modality: torch.cat([own[modality] for own in features]) for modality in MODALITIES}
        rows["shared"] = torch.cat([rows[modality] for modality in MODALITIES])
        for name, momentum in MOMENTUM.items():
            table, own = getattr(self.bank, name), labels.repeat(len(rows[name]) // len(labels))
            table.proxies = naive_update(table.proxies, rows[name], own, momentum, hard=name == "shared")

    @torch.no_grad()
    def adam(self, rate):
        """Adam (Kingma and Ba, 2015), with weight decay added to the mean gradient of all replicas."""
        self.steps += 1
        for name, moments in self.moments.items():
            replicas = [weights[name] for weights in self.weights]
            if replicas[0].grad is None:  # the neck's bias
                continue
            gradient = torch.stack([w.grad for w in replicas]).mean(0) + WEIGHT_DECAY * replicas[0]
            for k, (beta, value) in enumerate(zip(BETAS, (gradient, gradient.square()), strict=True)):
                moments[k] = beta * moments[k] + (1 - beta) * value
            mean, square = (m / (1 - beta**self.steps) for m, beta in zip(moments, BETAS, strict=True))
            for w in replicas:
                w.sub_(rate * mean / (square.sqrt() + EPSILON))


@torch.no_grad()
def plain_means(training: Training, model: torch.nn.Module, epoch: int) -> dict[str, torch.Tensor]:
    """{modality: (C, D)} the mean feature of each class over the training set: the tables' beginning."""
    model = deepcopy(model).eval()
    loader, means = training.loader, {}
    for modality in MODALITIES:
        stored = "infrared" if modality == "infrared" else "visible"
        labels, pixels = (
            torch.from_numpy(loader.labels[stored]),
            torch.from_numpy(loader.images[stored].copy()),
        )
        images = normalize(pixels)
        if modality == "aux":
            channels = generator(training.args.seed, epoch, "memory").integers(3, size=len(images))
            images = torch.stack([image[[k, k, k]] for image, k in zip(images, channels, strict=True)])
        features = F.normalize(model(**{stored: images}))
        classes = range(loader.batches.classes)
        means[modality] = torch.stack([features[labels == y].mean(0) for y in classes])
    return means


def tables(bank) -> dict[str, torch.Tensor]:
    """The eight tables of a bank, by name, as they are now."""
    names, kinds = ("shared", *MODALITIES), ("proxies", "centers")
    return {f"{name}.{kind}": getattr(getattr(bank, name), kind).clone() for name in names for kind in kinds}


def assert_state(found: dict, expected: dict, begin: dict, tolerance: float = 0.03) -> None:
    """Every tensor moved as expected from where it began, up to a share of how far it was to move.

    Single weights may differ by more: Adam turns a gradient of nearly nothing into a step of the full rate.
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        moved = (value.double() - begin[name].double()).norm()
        assert (found[name].double() - value.double()).norm() <= tolerance * moved + 1e-6, name
