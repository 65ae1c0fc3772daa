"""Two processes over gloo train as one: both end up alike, and as one process with all of the batch would.

What that means: a process draws its own identities, its batch norms see its own images, and its loss is the
mean over them. Gradients are averaged over processes; one memory, the same everywhere, learns from all
features; the running statistics kept are the first process's. So the one process that this compares with
passes each half of the batch through a network of its own.
"""

import os
import socket

import pytest
import torch
from conftest import tiny_flags

from data_loader import IdentityBatches, TrainLoader
from devices import Processes
from runs import Run
from tests.plain_training import PlainTraining, assert_state, plain_means, start_training, tables
from train import fit, rebuild_memory
from training import build_training, open_run

FLAGS = ["--epochs", "1", "--num-pos", "4", "--select", "last"]  # two steps of 2 x 4 x 4 x 3 images


def state(training):
    return {key: value.clone() for key, value in training.model.state_dict().items()} | tables(training.bank)


def train_one_of_two(rank, port, root, folder):
    """One of two processes, as torchrun would have started it: an epoch, then the next one's memory."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    args, _, _ = open_run([*tiny_flags(root), *FLAGS])
    training = build_training(args, None, Processes())
    states = [state(training)]
    fit(training, Run("two", "sysu", f"{folder}/save_model", f"{folder}/log"))
    states.append(state(training))
    rebuild_memory(training, 1)
    states.append(state(training))
    training.processes.stop()
    torch.save(states, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(sysu, tmp_path_factory):
    """Of each process its state at the beginning, after the epoch and after the next reset."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    torch.multiprocessing.spawn(train_one_of_two, (port, str(sysu), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_both_processes_have_the_same_network_and_memory(ranks):
    for first, second in zip(*ranks, strict=True):
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_two_processes_do_what_one_does_with_the_gathered_batch(ranks, sysu):
    training = start_training(sysu, *FLAGS)  # one process, with the same seed
    begin, after_epoch, after_reset = ranks[0]
    assert all(torch.equal(value, begin[name]) for name, value in training.model.state_dict().items())
    rebuild_memory(training, 0)
    memory, plain = tables(training.bank), PlainTraining(training, replicas=2)

    args, whole = training.args, training.loader
    loaders = []
    for rank in (0, 1):
        batches = IdentityBatches(whole.labels, args.batch_size, args.num_pos, args.seed, rank, 2)
        own = whole.images, whole.labels, batches, whole.recipe, training.device, args.seed
        loaders.append(TrainLoader(*own, pad=args.pad))
    steps = list(zip(*(loader.epoch(0) for loader in loaders), strict=True))
    assert len(steps) == 2
    for step in steps:
        plain.step(step, 0.1 * args.lr)  # the first of ten epochs of warm-up

    expected = dict(plain.models[0].state_dict()) | tables(plain.bank)
    assert_state(after_epoch, expected, begin | memory)
    model = training.model
    model.load_state_dict({name: after_epoch[name] for name in model.state_dict()})
    means = plain_means(training, model, 1)
    expected = {modality: own / own.norm(dim=1, keepdim=True) for modality, own in means.items()}
    expected["shared"] = sum(expected.values()) / 3
    for name in memory:
        torch.testing.assert_close(
            after_reset[name], expected[name.split(".")[0]], rtol=1e-4, atol=1e-5, msg=name
        )
