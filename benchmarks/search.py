"""Exact search of shards on disk, against a scan of them in float32 and a NumPy product in memory.

The rows are float16, in as many shards as tools.embed would write. The scan is what this project did before
rows had codes: every block to float32, one product, the largest. For the product in memory the rows are
float32 already. All find the same ten nearest. Queries are changed rows; hard ones are random directions: no
row is much nearer to them than others.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import alternate, row, run_alone
from retrieval.search import nearest
from retrieval.shards import Embeddings, Manifest, write_manifest, write_shard
from tools.embed import SHARD_ROWS

DIM, TOP, IDENTITIES = 2048, 10, 1000
QUERIES = {1: (4.0, 5), 64: (2.5, 3), 1024: (2.0, 1)}  # target, rounds
BLOCK = 4096  # rows of the scan


def run(device: str = "cpu", quick: bool = False) -> Iterator[dict]:
    """Yield the rows of the table of benchmarks, at two sizes."""
    for count in (2000,) if quick else (100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as name:
            queries = write(Path(name), count)
            start = time.perf_counter()
            gallery = Embeddings(name)
            opened_s = time.perf_counter() - start
            for number, (target, rounds) in QUERIES.items():
                work = f"{number:,} quer{'ies' if number > 1 else 'y'}"
                yield compared(gallery, work, queries[:number], scan, "a scan in float32", target, rounds)
            directions = torch.randn(64, DIM, generator=torch.Generator().manual_seed(0))
            hard = torch.nn.functional.normalize(directions)
            yield compared(gallery, "64 hard queries", hard, scan, "a scan in float32", 1.0, 3)
            wide = np.concatenate([block.numpy().astype(np.float32) for _, block in gallery.blocks(BLOCK)])
            product = functools.partial(product_in_memory, wide)
            last = compared(gallery, "64 queries", queries[:64], product, "a product in memory", 2.0, 3)
            del wide, product
            peak = run_alone(functools.partial, search, Path(name), queries[:64])[1]
            last["note"] += f"; peak {peak / 1e6:.0f} MB with opening, which took {opened_s:.2f} s"
            yield last


def blocks(count: int) -> Iterator[np.ndarray]:
    """Float16 unit rows of IDENTITIES people; each block has the first block's deviations, rotated."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((IDENTITIES, DIM), dtype=np.float32)
    deviations = rng.standard_normal((min(count, SHARD_ROWS), DIM), dtype=np.float32)
    for k, start in enumerate(range(0, count, SHARD_ROWS)):
        number = min(SHARD_ROWS, count - start)
        rows = centers[rng.integers(IDENTITIES, size=number)] + np.roll(deviations[:number], k, axis=1)
        yield (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def write(folder: Path, count: int) -> torch.Tensor:
    """Write count rows as shards; return queries (1024, DIM) float32: changed rows of the first shard."""
    write_manifest(folder, Manifest("", DIM, "visible", 384, 128, "float32", ""))
    for k, rows in enumerate(blocks(count)):
        records = [{"path": f"/{k}/{row}.jpg", "size": 0, "mtime_ns": 0} for row in range(len(rows))]
        write_shard(folder, f"000-{k:06d}", rows, records)
        if k == 0:
            first = rows[np.arange(max(QUERIES)) % len(rows)].astype(np.float32)
    queries = first + 0.02 * np.random.default_rng(1).standard_normal(first.shape, dtype=np.float32)
    return torch.nn.functional.normalize(torch.from_numpy(queries))


def scan(queries: torch.Tensor, gallery: Embeddings) -> tuple[torch.Tensor, torch.Tensor]:
    """Every block in float32, each thread a shard: what tools.search did before rows had codes."""

    def shard(k: int) -> tuple[torch.Tensor, torch.Tensor]:
        opened, best = gallery.opened(k), torch.empty(len(queries), 0)
        positions = best.long()
        wide = torch.empty(BLOCK, DIM)
        for start in range(0, len(opened), BLOCK):
            block = opened.half(range(start, min(start + BLOCK, len(opened))))
            wide[: len(block)] = block
            products, rows = (queries @ wide[: len(block)].T).topk(min(TOP, len(block)))
            best, positions = merged(best, positions, products, rows + (opened.first + start))
        return best, positions

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return functools.reduce(lambda a, b: merged(*a, *b), pool.map(shard, range(len(gallery.shards))))
    finally:
        torch.set_num_threads(threads)


def merged(best: torch.Tensor, positions: torch.Tensor, others: torch.Tensor, rows: torch.Tensor) -> tuple:
    """The largest of two lists of each query."""
    best = torch.cat([best, others], 1)
    best, order = best.topk(min(TOP, best.shape[1]))
    return best, torch.cat([positions, rows], 1).gather(1, order)


def product_in_memory(
    rows: np.ndarray, queries: torch.Tensor, _: Embeddings
) -> tuple[torch.Tensor, torch.Tensor]:
    """One product and its largest values, as one would write it in NumPy."""
    products = queries.numpy() @ rows.T
    found = np.argpartition(products, -TOP, axis=1)[:, -TOP:]
    values = np.take_along_axis(products, found, 1)
    order = np.argsort(-values, axis=1)
    return tuple(torch.from_numpy(np.take_along_axis(array, order, 1)) for array in (values, found))


def search(folder: Path, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Open a folder and search it."""
    return nearest(queries, Embeddings(folder), TOP)


def compared(
    gallery: Embeddings,
    work: str,
    queries: torch.Tensor,
    baseline: Callable,
    name: str,
    target: float,
    rounds: int,
) -> dict:
    """One row: search against baseline, in alternating rounds, after both have found the same."""
    calls = functools.partial(baseline, queries, gallery), functools.partial(nearest, queries, gallery, TOP)
    (values, positions), (similarities, found) = (call() for call in calls)
    torch.testing.assert_close(similarities, values, atol=2e-6, rtol=0)
    common = float((found[:, :, None] == positions[:, None]).any(1).float().mean())
    assert common > 0.999, f"{work}: only {common:.4f} of the rows found are those of {name}"
    seconds = alternate(*calls, rounds)
    note = f"{name}; {min(seconds[0]) / min(seconds[1]):.2f} x by the least of {rounds} rounds"
    work = f"exact search, {work}, {len(gallery):,} rows, D = {DIM:,}"
    return row(work, tuple(map(statistics.median, seconds)), target, note)
