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
from plain_training import PlainTraining, assert_state, plain_tables, start_training, state, tables

from data_loader import IdentityBatches, TrainLoader
from runs import Run
from train import fit, rebuild_memory

FLAGS = ["--epochs", "1", "--num-pos", "4", "--select", "last"]  # two steps of 2 x 4 x 4 x 3 images


def train_one_of_two(rank, port, root, folder):
    """One of two processes, as torchrun would have started it: an epoch, then the next one's memory."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    training = start_training(root, *FLAGS)
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
    memory, plain = tables(training), PlainTraining(training, replicas=2)

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

    assert_state(after_epoch, plain.state(), begin | memory)
    model = training.model
    model.load_state_dict({name: after_epoch[name] for name in model.state_dict()})
    expected = plain_tables(training, model, 1)
    for name in memory:
        table = expected[name.split(".")[0]]
        torch.testing.assert_close(after_reset[name], table, rtol=1e-4, atol=1e-5, msg=name)
