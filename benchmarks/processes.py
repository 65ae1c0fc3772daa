"""The training step of two processes against one, with the same batch on the same cores.

    python -m benchmarks.processes

One process has all threads, each of two has half of them and half of the identities. A small network takes
the same first step from the same weights in both ways, and the losses are compared.
"""

import contextlib
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.timing import compare
from benchmarks.training_step import FULL, TINY
from benchmarks.workload import draw_sysu, training_of
from train import train_one_epoch
from utils import MODALITIES

NUMBERS = (1, 2)  # of processes
SMALL = FULL | {"batch-size": 4, "num-pos": 2}  # identities of the whole batch; feasible on two cores


def work(pipe: Connection, environment: dict[str, str], threads: int, root: Path, words: list) -> None:
    """Be one of some processes: whenever it is told to, take a number of steps and send their losses."""
    os.environ.update(environment)
    torch.set_num_threads(threads)
    training = training_of(root, "cpu", *words)
    generator = torch.Generator().manual_seed(0)
    shape = training.bank.shared.proxies.shape
    training.bank.reset({modality: torch.randn(shape, generator=generator) for modality in MODALITIES})
    while steps := pipe.recv():
        pipe.send(train_one_epoch(training, islice(training.loader.epoch(0), steps), 0))
    training.processes.stop()


def start(number: int, threads: int, root: Path, sizes: dict) -> Callable[[int], list[torch.Tensor]]:
    """Start processes that share a batch and some threads; the result lets them take steps, or end with 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    own = sizes | {"batch-size": sizes["batch-size"] // number, "amp": "off"}
    words = [word for name, value in own.items() for word in (f"--{name}", value)]
    context, pipes = multiprocessing.get_context("spawn"), []
    for rank in range(number):
        names = {"RANK": rank, "WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in names.items()}
        pipe, end = context.Pipe()
        arguments = end, environment, max(1, threads // number), root, words
        context.Process(target=work, args=arguments, daemon=True).start()
        end.close()
        pipes.append(pipe)

    def take(steps: int) -> list[torch.Tensor]:
        for pipe in pipes:
            pipe.send(steps)
        return [pipe.recv() for pipe in pipes if steps]

    return take


@contextlib.contextmanager
def both(sizes: dict, identities: int) -> Iterator[list[Callable[[int], list[torch.Tensor]]]]:
    """Start one process and two, on a dataset that is drawn for them; see start."""
    counts, threads = {"visible": 8 * identities, "infrared": 4 * identities}, torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "sysu")
        draw_sysu(root, identities, counts, sizes["img-h"], sizes["img-w"], noise=True)
        taking = [start(number, threads, root, sizes) for number in NUMBERS]
        yield taking
        for take in taking:
            take(0)


def run(device: str = "cpu", quick: bool = False) -> Iterator[dict]:
    """Yield a row, on the CPU only: a GPU has to be alone with its process."""
    if device != "cpu":
        return
    sizes, identities = (TINY, 8) if quick else (SMALL, 40)
    repeats, threads = 1 if quick else 3, torch.get_num_threads()
    # Of a small network: in an untrained ResNet-50 rounding grows so much that one process with one thread
    # and with two is as far from itself.
    with both(TINY, 8) as (one, two):
        torch.testing.assert_close(two(1), one(1) * 2, rtol=1e-4, atol=1e-4)
    with both(sizes, identities) as (one, two):
        one_s, two_s = compare(lambda: one(1), lambda: two(1), repeats)
    size = f"{sizes['img-h']}x{sizes['img-w']}, {sizes['arch']}"
    images = 3 * sizes["batch-size"] * sizes["num-pos"]
    yield {
        "work": f"training step of two processes against one, {images} images {size}",
        "baseline_s": one_s,
        "ours_s": two_s,
        "ratio": one_s / two_s,
        "bound": None,
        "note": f"float32, {threads} threads in one process, {max(1, threads // 2)} in each of two",
    }


if __name__ == "__main__":
    for row in run():
        print(row)
