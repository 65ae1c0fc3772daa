"""One, two, three and four processes over gloo train as one: the same draws, losses, memory and weights.

Adam turns a gradient of nearly nothing into a step of the full rate, so rounding grows from step to step:
what is to agree after some steps is computed in float64, at a low rate.
"""

import contextlib
import io
import itertools
import os
import socket
from copy import deepcopy
from functools import partial
from operator import itemgetter

import pytest
import torch
import warm
from conftest import draw_sysu, random_checkpoint
from plain_training import tables

import test as evaluation
from devices import Processes
from engine.settings import parse_args
from engine.training import build_training
from loss import LOSSES
from model import NonLocal
from train import rebuild_memory, train_one_epoch

WHOLE = 12  # identities of a batch of all processes together
NUMBERS = (1, 2, 3, 4)  # of processes
FLAGS = [
    "--img-h", "16", "--img-w", "8", "--pad", "2", "--arch", "resnet18", "--weights", "none",
    "--num-pos", "2", "--gpu", "-1", "--amp", "off", "--workers", "1", "--select", "last", "--lr", "3.5e-5",
]  # fmt: skip


def build(root, processes, *flags):
    """What one of some processes trains with."""
    own = ["--data-path", root, "--batch-size", str(WHOLE // processes.world_size)]
    return build_training(parse_args([*FLAGS, *own, *flags]), None, processes)


def freeze(model):
    """Keep batch norms in evaluation mode."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm | NonLocal):
            module.eval()
            module.train = partial(lambda module, mode=True: module, module)


def in_double(batches):
    for images, labels in batches:
        several = isinstance(images, dict)
        yield {m: x.double() for m, x in images.items()} if several else images.double(), labels


def result_of(training, losses):
    state = {f"net.{name}": value for name, value in training.model.state_dict().items()}
    state |= {f"loss.{name}": value for name, value in training.loss.state_dict().items()}
    weights = [*training.model.named_parameters(), *training.loss.named_parameters()]
    gradients = {name: weight.grad for name, weight in weights if weight.requires_grad}
    memory = tables(training) if training.bank.modalities else {}
    return {"losses": losses, "state": state | memory, "gradients": gradients}


def first_step(training):
    """A step as it is."""
    rebuild_memory(training, 0)
    return result_of(training, train_one_epoch(training, itertools.islice(training.loader.epoch(0), 1), 0))


def some_steps(training, number=5):
    """A few steps, a reset of the memory and as many steps more, in float64."""
    loader, losses = training.loader, []
    batches, memory_batches = loader.epoch, loader.memory_batches
    loader.memory_batches = lambda *args: in_double(memory_batches(*args))
    for epoch in (0, 1):
        rebuild_memory(training, epoch)
        steps = itertools.islice(itertools.chain(batches(epoch), batches(epoch + 2)), number)
        losses.append(train_one_epoch(training, in_double(steps), epoch))
        assert len(losses[-1]) == number
    return result_of(training, torch.cat(losses))


def resumed(root, processes):
    """Two epochs of two steps, and the second again from what was saved after the first."""

    def epoch_of(training, epoch):
        rebuild_memory(training, epoch)
        return train_one_epoch(training, itertools.islice(training.loader.epoch(epoch), 2), epoch)

    training = build(root, processes)
    epoch_of(training, 0)
    saved = deepcopy(training.state())
    straight = result_of(training, epoch_of(training, 1))
    again = build_training(training.args, saved, processes)
    return straight, result_of(again, epoch_of(again, 1))


def table_of(root, folder, processes):
    """What test.py prints about the same untrained network, its images shared by the processes."""
    path = f"{folder}/network-{processes.world_size}.t"
    if processes.rank == 0:
        random_checkpoint(path, img_h=16, img_w=8)
    processes.barrier()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluation.main(
            ["--resume", path, "--data-path", root, "--gpu", "-1", "--mode", "all", "indoor", "--flip"]
        )
    return printed.getvalue().replace(path, "")


def work(number, ports, root, folder):
    """One of four processes: take part in runs of four, three and two; the last one runs alone meanwhile."""
    torch.set_num_threads(1)
    for count, port in ports.items():
        if number != 3 if count == 1 else number >= count:
            continue
        os.environ.update(RANK=str(number % count), WORLD_SIZE=str(count))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        processes = Processes()
        results = {"first step": first_step(build(root, processes))}
        if count == 3:
            results["undisturbed"], results["resumed"] = resumed(root, processes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            torch.set_default_dtype(torch.float64)
            training = build(root, processes)
            freeze(training.model)
            results["frozen statistics"] = some_steps(training, 5)
            results["statistics of all"] = some_steps(build(root, processes), 2)
            for loss in LOSSES[1:]:
                results[loss] = some_steps(build(root, processes, "--loss", loss), 1)
            torch.set_default_dtype(torch.float32)
        results["table"] = table_of(root, folder, processes)
        torch.save(results, f"{folder}/{count}-{number % count}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{(number of processes, rank): {what was trained: its result}}."""
    folder = tmp_path_factory.mktemp("processes")
    root = draw_sysu(folder / "sysu", WHOLE, size=(16, 8))
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in NUMBERS]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        ports = {count: probe.getsockname()[1] for count, probe in zip((4, 3, 2, 1), sockets, strict=True)}
    warm.warm_context("1")  # from whose process they start
    torch.multiprocessing.start_processes(
        work, (ports, str(root), str(folder)), nprocs=4, start_method="forkserver"
    )
    return {(n, rank): torch.load(folder / f"{n}-{rank}.pt") for n in NUMBERS for rank in range(n)}


def apart(one, other):
    """The largest difference of two results' tensors, as a share of the tensor's norm, and its name."""
    assert one.keys() == other.keys()
    differences = (
        ((other[name].double() - value.double()).norm() / value.double().norm().clamp(min=1), name)
        for name, value in one.items()
    )
    return max(differences, key=itemgetter(0))


@pytest.mark.parametrize("number", NUMBERS[1:])
def test_the_first_step_is_the_same_up_to_rounding(results, number):
    one, several = results[1, 0]["first step"], results[number, 0]["first step"]
    torch.testing.assert_close(several["losses"], one["losses"], rtol=1e-6, atol=1e-6)
    whole = torch.cat([gradient.flatten() for gradient in one["gradients"].values()]).norm()
    for name, gradient in one["gradients"].items():
        # What is added before a batch norm has a gradient of rounding alone.
        least = 1e-6 * whole
        assert (several["gradients"][name] - gradient).norm() <= 1e-3 * gradient.norm() + least, name


@pytest.mark.parametrize("kind", ["frozen statistics", "statistics of all", *LOSSES[1:]])
@pytest.mark.parametrize("number", NUMBERS[1:])
def test_some_steps_in_double_precision_are_the_same(results, number, kind):
    one, several = results[1, 0][kind], results[number, 0][kind]
    torch.testing.assert_close(several["losses"], one["losses"], rtol=1e-9, atol=1e-9)
    difference, name = apart(one["state"], several["state"])
    assert difference <= 1e-9, name


@pytest.mark.parametrize("number", NUMBERS[1:])
def test_every_process_has_the_same_network_memory_and_losses(results, number):
    for kind, first in results[number, 0].items():
        if kind == "table":
            continue
        for rank in range(1, number):
            for part, own in results[number, rank][kind].items():
                values = first[part]
                same = (
                    torch.equal(own, values)
                    if part == "losses"
                    else all(torch.equal(value, values[name]) for name, value in own.items())
                )
                assert same, (kind, rank, part)


@pytest.mark.parametrize("number", NUMBERS[1:])
def test_the_table_is_the_same_to_the_digit_and_printed_once(results, number):
    tables = [results[number, rank]["table"] for rank in range(number)]
    assert "all, single-shot" in tables[0]
    assert tables == [results[1, 0]["table"]] + (number - 1) * [""]


def test_three_processes_continue_bit_for_bit(results):
    """Of two processes that would be no test: the order in which two numbers are added does not matter."""
    straight, again = results[3, 0]["undisturbed"], results[3, 0]["resumed"]
    assert torch.equal(straight["losses"], again["losses"])
    for part in ("state", "gradients"):
        different = [
            name for name, value in straight[part].items() if not torch.equal(value, again[part][name])
        ]
        assert different == [], part


def test_the_steps_that_are_compared_move_the_weights(results):
    """And not by rounding only: what is compared above could be the untrained network."""
    before, after = results[1, 0]["first step"]["state"], results[1, 0]["frozen statistics"]["state"]
    for name in ("net.stems.infrared.0.weight", "net.layer3.1.expand.weight", "shared.proxies"):
        assert apart({name: before[name]}, {name: after[name]})[0] > 1e-6, name
