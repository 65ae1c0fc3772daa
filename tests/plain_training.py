"""Training steps as docs/method.md has them, for tests to compare train.py's with, on one process or several.

The loss, the memory's update and Adam are plain_mce's; the network is train.py's, which has its own tests.
"""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from itertools import islice

import plain_mce
import torch
from conftest import tiny_flags

from augmentation import normalize
from data_loader import generator
from devices import Processes
from engine.settings import open_run, typed_settings
from engine.training import Training, build_training
from train import train_one_epoch
from utils import MODALITIES

TABLES = ("shared", *MODALITIES)


def start_training(root, *flags) -> Training:
    """What train.py trains with on a tiny dataset at root."""
    args, _, _ = open_run(typed_settings([*tiny_flags(root), *map(str, flags)]))
    return build_training(args, None, Processes())


def take_steps(training: Training, steps: int) -> torch.Tensor:
    """Take the first steps of epoch 0; their losses."""
    return train_one_epoch(training, islice(training.loader.epoch(0), steps), 0)


def recorded(training: Training, batches: Iterable, states: list) -> Iterator:
    """Yield batches to train_one_epoch and append the state before each of them, and after the last."""
    for batch in batches:
        states.append(state(training))
        yield batch
    states.append(state(training))


class PlainTraining:
    """A run's state, copied from a Training, and its step."""

    def __init__(self, training: Training):
        self.model = deepcopy(training.model).train()
        self.proxies, self.centers = (
            {name: getattr(getattr(training.bank, name), kind).clone() for name in TABLES}
            for kind in ("proxies", "centers")
        )
        self.align_with = training.args.proxies
        self.moments, self.steps = {}, 0

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a state: two equal trainings in float32 part after some steps."""
        self.model.load_state_dict({name: state[name] for name in self.model.state_dict()})
        self.proxies = {name: state[f"{name}.proxies"] for name in TABLES}

    def step(self, images: dict[str, torch.Tensor], labels: torch.Tensor, rate: float) -> torch.Tensor:
        """Take a step with a batch; return its losses, the total first."""
        outputs = self.model(torch.cat([images["visible"], images["aux"]]), images["infrared"])
        rows = dict(zip(("visible", "aux", "infrared"), plain_mce.unit(outputs).chunk(3), strict=True))
        total, terms = plain_mce.loss(rows, labels, self.centers, self.proxies, self.align_with)
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        gradients = torch.autograd.grad(total, list(trained.values()))
        features = {modality: rows[modality].detach() for modality in MODALITIES}
        self.proxies = plain_mce.update(self.proxies, features, labels)

        self.steps += 1
        weights = {name: weight.detach() for name, weight in trained.items()}
        plain_mce.adam(weights, dict(zip(trained, gradients, strict=True)), self.moments, self.steps, rate)
        self.model.load_state_dict(weights, strict=False)
        return torch.stack([total, *(terms[name] for name in plain_mce.WEIGHTS)]).detach()

    def state(self) -> dict[str, torch.Tensor]:
        """The weights, statistics and tables, as they are now."""
        tables = {f"{name}.proxies": table for name, table in self.proxies.items()}
        tables |= {f"{name}.centers": table for name, table in self.centers.items()}
        return deepcopy(dict(self.model.state_dict())) | tables


@torch.no_grad()
def plain_tables(training: Training, model: torch.nn.Module, epoch: int) -> dict[str, torch.Tensor]:
    """{name: (C, D)} the tables that an epoch begins with, for a network as it is given."""
    model, loader, features, labels = deepcopy(model).eval(), training.loader, {}, {}
    for modality in MODALITIES:
        stored = "infrared" if modality == "infrared" else "visible"
        images = normalize(torch.from_numpy(loader.images[stored].copy()))
        if modality == "aux":
            channels = generator(training.args.seed, epoch, "memory").integers(3, size=len(images))
            images = torch.stack([image[[k, k, k]] for image, k in zip(images, channels, strict=True)])
        features[modality] = plain_mce.unit(model(**{stored: images}))
        labels[modality] = torch.from_numpy(loader.labels[stored])
    return plain_mce.reset(features, labels, loader.sampler.classes)


def tables(training: Training) -> dict[str, torch.Tensor]:
    """The memory's eight tables, by name, as they are now."""
    bank, kinds = training.bank, ("proxies", "centers")
    return {f"{name}.{kind}": getattr(getattr(bank, name), kind).clone() for name in TABLES for kind in kinds}


def state(training: Training) -> dict[str, torch.Tensor]:
    """The network's weights and statistics, and the memory's tables, as they are now."""
    return deepcopy(dict(training.model.state_dict())) | tables(training)


def assert_step(before: dict, after: dict, expected: dict, tolerance: float = 0.1) -> None:
    """Every tensor of a state moved as expected, up to a share of how far it was to move.

    The defects of tests/defects.py are at least several times the tolerance. Rounding is up to a tenth of it:
    Adam turns a gradient of nearly nothing into a step of the full rate.
    """
    assert before.keys() == after.keys() == expected.keys()
    for name, value in expected.items():
        far = (value.double() - before[name].double()).norm()
        assert (after[name].double() - value.double()).norm() <= tolerance * far + 1e-6, name
