"""Training on a GPU that is not there: torch's fake tensors have a device and a shape, and no values.

So an operation on tensors of two devices fails, and so does whatever needs a value on the host and would wait
for the GPU. Left out are the backward pass, which needs a real one, and pinned memory. tests/test_cuda.py is
for machines with a GPU.
"""

import contextlib

import pytest
import torch
from plain_training import start_training, tables
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from engine import training as training_module
from loss import Baseline
from memory import MemoryBank
from model import TwoStreamResNet
from train import rebuild_memory, train_one_epoch

GPU = torch.device("cuda", 0)


def indexed_without_a_driver():
    """Whether this torch slices a fake GPU's tensor; 2.6 asks the driver for the device first."""
    with FakeTensorMode():
        try:
            return torch.empty(2, device=GPU)[:1].shape == (1,)
        except RuntimeError:
            return False


pytestmark = pytest.mark.skipif(
    not indexed_without_a_driver(), reason="this torch needs a driver even for a GPU's fake tensors"
)


class CopyWaits(Exception):
    """A copy between host and device for which the host waits."""


class RefuseWaitingCopies(TorchDispatchMode):
    """Raises CopyWaits for a copy to the host, and for a copy to the device that is not non_blocking."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:
            source, target = args[0], result
        elif func is torch.ops.aten.copy_.default:
            target, source = args[:2]
        else:
            return result
        asynchronous = kwargs.get("non_blocking") or args[2:] == (True,)
        if source.device != target.device and (target.device.type == "cpu" or not asynchronous):
            raise CopyWaits(f"{source.device} to {target.device}")
        return result


class Scaler:
    """In the place of GradScaler: gives every weight a gradient, for backward needs a GPU."""

    def __init__(self, weights):
        self.weights = weights

    def scale(self, total):
        assert total.device == GPU
        return self

    def backward(self):
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)

    def step(self, optimizer):
        optimizer.step()

    def update(self):
        pass


def built_on_the_gpu(kind):
    """A class of modules whose fake weights are made on the GPU, for they cannot move."""

    def build(*args):
        with GPU:
            return kind(*args)

    return build


@contextlib.contextmanager
def fake_training(root, *flags):
    """What train.py trains with on a GPU, its tensors fake."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
        patch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        patch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)
        for kind in (TwoStreamResNet, Baseline):
            patch.setattr(training_module, kind.__name__, built_on_the_gpu(kind))
        training = start_training(root, "--gpu", "0", "--cache", "device", *flags)
        assert training.device == GPU
        [group] = training.optimizer.param_groups
        training.scaler = Scaler([weight for weight in group["params"] if weight.requires_grad])
        yield training


@pytest.fixture(scope="module")
def training(sysu):
    with fake_training(sysu, "--proxies", "both") as training:
        yield training


def three_batches(training, taken):
    """An epoch's batches, with waiting copies refused from one to the next; counts in taken."""
    with contextlib.closing(training.loader.epoch(0)) as batches, RefuseWaitingCopies():
        for _ in range(3):
            batch = next(batches)
            yield batch
            taken.append(len(batch[1]))


def take_three_steps(training):
    taken = []
    with contextlib.closing(three_batches(training, taken)) as batches:
        try:
            train_one_epoch(training, batches, 0)
        except DataDependentOutputException:  # the look at the losses after the last step, which waits
            if len(taken) < 3:
                raise
    assert len(taken) == 3


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_memory_and_steps_stay_on_the_gpu_and_wait_for_nothing(training):
    with RefuseWaitingCopies():
        rebuild_memory(training, 0)
    take_three_steps(training)
    moments = [state["exp_avg"] for state in training.optimizer.state.values()]
    assert len(moments) == len(training.scaler.weights)
    for tensor in [*tables(training).values(), *moments, *training.model.state_dict().values()]:
        assert tensor.device == GPU


@pytest.mark.parametrize(
    "flags", ["--loss hard-triplet", "--loss weighted-triplet", "--no-aux --update mean"]
)
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_the_steps_of_variants_wait_for_nothing(sysu, flags):
    with fake_training(sysu, *flags.split()) as training:
        take_three_steps(training)


VALUE, SHAPE, DEVICE = DataDependentOutputException, DynamicOutputShapeException, RuntimeError
DEFECTS = {  # what a step does, the error, a word of it
    "item": (lambda features, labels: features.sum().item(), VALUE, "scalar"),
    "tolist": (lambda features, labels: labels.tolist(), VALUE, "scalar"),
    "bool": (lambda features, labels: bool((labels == 0).any()), VALUE, "scalar"),
    "nonzero": (lambda features, labels: (labels == 0).nonzero(), SHAPE, "nonzero"),
    "a boolean mask": (lambda features, labels: features[labels == 0], SHAPE, "nonzero"),
    "unique": (lambda features, labels: labels.unique(), SHAPE, "unique"),
    "a copy to the host": (lambda features, labels: features.cpu(), CopyWaits, "cuda:0 to cpu"),
    "a copy to the GPU": (
        lambda features, labels: torch.ones(3).to(labels.device),
        CopyWaits,
        "cpu to cuda:0",
    ),
    "two devices": (lambda features, labels: features + torch.ones(len(labels), 1), DEVICE, "devices"),
    "a table on the host": (
        lambda features, labels: torch.ones(9, 4).index_select(0, labels),
        DEVICE,
        "devices",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_a_step_that_waits_or_mixes_devices_is_noticed(training, monkeypatch, defect):
    does, error, word = DEFECTS[defect]
    monkeypatch.setattr(MemoryBank, "update", lambda self, features, labels: does(features["aux"], labels))
    with pytest.raises(error, match=word):
        take_three_steps(training)
