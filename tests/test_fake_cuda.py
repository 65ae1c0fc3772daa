"""Training on a GPU that is not there: torch's fake tensors have a device and a shape, and no values.

So an operation on tensors of two devices fails, and so does whatever needs a value on the host and would wait
for the GPU. Left out are the backward pass, which needs a real one, and pinned memory. tests/test_cuda.py is
for machines with a GPU.
"""

import pytest
import torch
from conftest import tiny_flags
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

import training as training_module
from devices import Processes
from memory import MemoryBank
from model import TwoStreamResNet
from train import rebuild_memory, train_one_epoch
from training import build_training, open_run

GPU = torch.device("cuda", 0)


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

    def __init__(self, model):
        self.model = model

    def scale(self, total):
        assert total.device == GPU
        return self

    def backward(self):
        for weight in self.model.parameters():
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None

    def step(self, optimizer):
        optimizer.step()

    def update(self):
        pass


@pytest.fixture(scope="module")
def training(sysu):
    """What train.py trains with on a GPU, its tensors fake."""

    def build_model(*args):
        with GPU:
            return TwoStreamResNet(*args)

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
        patch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        patch.setattr(training_module, "TwoStreamResNet", build_model)
        patch.setattr(TwoStreamResNet, "to", lambda self, *_, **__: self)  # fake weights do not move
        args, _, _ = open_run([*tiny_flags(sysu), "--gpu", "0", "--cache", "device", "--proxies", "both"])
        training = build_training(args, None, Processes())
        assert training.device == GPU
        training.scaler = Scaler(training.model)
        yield training


def three_batches(training, taken):
    """An epoch's batches, with waiting copies refused from one to the next; counts in taken."""
    batches = training.loader.epoch(0)
    with RefuseWaitingCopies():
        for _ in range(3):
            batch = next(batches)
            yield batch
            taken.append(len(batch[1]))
    batches.close()


def take_three_steps(training):
    taken = []
    try:
        train_one_epoch(training, three_batches(training, taken), 0)
    except DataDependentOutputException:  # the look at the losses after the last step, which waits
        if len(taken) < 3:
            raise
    assert len(taken) == 3


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_memory_and_steps_stay_on_the_gpu_and_wait_for_nothing(training):
    with RefuseWaitingCopies():
        rebuild_memory(training, 0)
    take_three_steps(training)
    tables = [getattr(training.bank, name).proxies for name in ("shared", "visible", "infrared", "aux")]
    moments = [state["exp_avg"] for state in training.optimizer.state.values()]
    assert len(moments) == sum(weight.requires_grad for weight in training.model.parameters())
    for tensor in [*tables, *moments, *training.model.state_dict().values()]:
        assert tensor.device == GPU


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
