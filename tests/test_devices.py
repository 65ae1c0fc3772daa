"""devices.py: devices, seeds, and two processes over gloo."""

import logging
import os
import random
import socket

import numpy as np
import pytest
import torch

from devices import Processes, seed_globally, select_device
from utils import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(("gpu", "reason"), [(-1, "--gpu -1"), (0, "torch sees no GPU here")])
def test_the_cpu_is_taken_with_a_line_that_says_why(gpu, reason, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4 if gpu < 0 else 0)
    monkeypatch.setattr(logging.getLogger("mce"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("mce"), "handlers", [])  # a former test's
    with caplog.at_level(logging.INFO, "mce"):
        assert select_device(gpu) == CPU
    assert [record.getMessage() for record in caplog.records] == [f"running on the CPU ({reason})"]


def test_gpus_go_by_their_index(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert select_device(1) == torch.device("cuda", 1)
    assert select_device(None) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert select_device(None) == torch.device("cuda", 1)
    assert chosen == [1, 0, 1]
    with pytest.raises(UserError, match=r"^--gpu 2: this machine's GPUs are 0 to 1$"):
        select_device(2)


def test_alone_every_collective_is_the_identity(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    processes, tensor = Processes(), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert (processes.rank, processes.world_size) == (0, 1)
    assert processes.join(-1) == CPU
    assert not torch.distributed.is_initialized()
    assert processes.all_reduce(tensor) is tensor
    assert processes.all_gather(tensor) is tensor
    assert processes.mean(tensor) is tensor
    assert processes.of_others(tensor).shape == (0, 2)
    processes.barrier()
    processes.stop()
    assert tensor.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def collect(rank, rendezvous, folder):
    """One of two processes, as torchrun would have started it, which writes down what it got."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=rendezvous)
    torch.set_num_threads(1)
    processes = Processes()
    processes.start(CPU)
    processes.start(CPU)  # as the second of several runs does
    tensor = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]) * 10**rank
    gathered = processes.all_gather(tensor.T)  # not contiguous
    labels = processes.all_gather(torch.tensor([rank, 7]))
    total = processes.all_reduce(tensor.clone())
    mean = processes.mean(tensor.clone())
    others = processes.of_others(tensor)
    rows = torch.tensor([[1.0], [2.0]]) * 10**rank
    rows.requires_grad_()
    (processes.all_gather(rows).square() * (rank + 1)).sum().backward()  # a loss in each process
    processes.barrier()
    processes.stop()
    assert not torch.distributed.is_initialized()
    torch.save([gathered, labels, total, mean, others, rows.grad], f"{folder}/{rank}.pt")


def test_two_processes_gather_in_the_order_of_ranks_sum_and_share(tmp_path, free_port):
    torch.multiprocessing.spawn(collect, (free_port, str(tmp_path)), nprocs=2)
    one = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    for rank in (0, 1):
        gathered, labels, total, mean, others, gradient = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(gathered, torch.cat([one.T, 10 * one.T]))
        assert labels.tolist() == [0, 7, 1, 7]
        assert torch.equal(total, 11 * one)
        assert torch.equal(mean, 5.5 * one)
        assert torch.equal(others, 10 ** (1 - rank) * one)
        assert gradient.tolist() == [[6 * 10**rank], [12 * 10**rank]]  # both losses', 2x and 4x


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_seeds_repeat_every_draw():
    seed_globally(3)
    first = draws()
    assert draws() != first
    seed_globally(3)
    assert draws() == first
    seed_globally(4)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_deterministic_algorithms_only_when_asked_for(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")  # and gone again after the test, whatever is set in it
    try:
        seed_globally(0)
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.benchmark
        seed_globally(0, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False


def test_an_attempt_does_not_see_the_names_of_the_former_one(monkeypatch):
    """torchrun --max-restarts keeps its store; gloo writes the addresses of its processes there."""
    kept, seen = torch.distributed.HashStore(), []

    def init_process_group(backend, store, **_):
        seen.append(store.check(["address of process 0"]))
        store.set("address of process 0", "here")

    monkeypatch.setattr(torch.distributed, "rendezvous", lambda _: iter([(kept, 0, 2)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        Processes().start(CPU)
    assert seen == [False, False]
    assert kept.num_keys() == 2
