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
from plain_training import PlainTraining, assert_step, plain_tables, recorded, start_training, state, tables

from data_loader import IdentityBatches, TrainLoader
from engine.files import Run
from engine.training import Progress, build_evaluation
from train import fit, rebuild_memory

FLAGS = ["--epochs", "1", "--num-pos", "4", "--select", "last"]  # two steps of 2 x 4 x 4 x 3 images


def train_one_of_two(rank, port, root, folder):
    """One of two processes, as torchrun would have started it: an epoch, then the next one's memory."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    training, states = start_training(root, *FLAGS), []
    epoch = training.loader.epoch

    def recorded_epoch(number):
        states.clear()  # of a batch that was only looked at
        return recorded(training, epoch(number), states)

    training.loader.epoch = recorded_epoch
    run = Run("two", "sysu", f"{folder}/save_model", f"{folder}/log")
    fit(training, build_evaluation(training), Progress(), run)
    states.append(state(training))
    rebuild_memory(training, 1)
    states.append(state(training))
    training.processes.stop()
    torch.save(states, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(sysu, tmp_path_factory):
    """Of each process its states before, between and after the two steps, after the epoch and the reset."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    torch.multiprocessing.spawn(train_one_of_two, (port, str(sysu), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_both_processes_have_the_same_network_and_memory(ranks):
    statistics = {name for name in ranks[0][0] if "running" in name}
    for k, (first, second) in enumerate(zip(*ranks, strict=True)):
        different = {name for name, value in first.items() if not torch.equal(value, second[name])}
        assert different <= (statistics if 0 < k < 3 else set())  # their own, until the epoch has ended
    assert all(torch.equal(ranks[0][3][name], ranks[0][2][name]) for name in statistics)  # the first one's


def test_two_processes_do_what_one_does_with_the_gathered_batch(ranks, sysu):
    training = start_training(sysu, *FLAGS)  # one process, with the same seed
    rebuild_memory(training, 0)
    for name, value in state(training).items():
        torch.testing.assert_close(ranks[0][0][name], value, rtol=1e-4, atol=1e-5, msg=name)

    args, whole, plain = training.args, training.loader, PlainTraining(training, replicas=2)
    loaders = []
    for rank in (0, 1):
        batches = IdentityBatches(whole.labels, args.batch_size, args.num_pos, args.seed, rank, 2)
        own = whole.images, whole.labels, batches, whole.recipe, training.device, args.seed
        loaders.append(TrainLoader(*own, pad=args.pad))
    steps = list(zip(*(loader.epoch(0) for loader in loaders), strict=True))
    assert len(steps) == 2
    for k, batches in enumerate(steps):
        plain.load([states[k] for states in ranks])
        plain.step(batches, 0.1 * args.lr)  # the first of ten epochs of warm-up
        for rank, states in enumerate(ranks):
            expected = plain.state(rank) | {name: states[k][name] for name in states[k] if "centers" in name}
            assert_step(states[k], states[k + 1], expected)

    model, after_epoch, after_reset = training.model, ranks[0][3], ranks[0][4]
    model.load_state_dict({name: after_epoch[name] for name in model.state_dict()})
    expected = plain_tables(training, model, 1)
    for name in tables(training):
        table = expected[name.split(".")[0]]
        torch.testing.assert_close(after_reset[name], table, rtol=1e-4, atol=1e-5, msg=name)
