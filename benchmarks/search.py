"""Exact search of shards on disk against one float32 NumPy product in memory; and a FAISS index.

    python -m benchmarks.search

The rows are float16, in as many shards as tools.embed would write. For the product they are float32 and
already in memory, and only the product is timed. Both find the same ten nearest. The index needs FAISS.
"""

import functools
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import compare, run_alone
from retrieval.search import build_index, nearest, nearest_by_index, tune
from retrieval.shards import Embeddings, Manifest, write_manifest, write_shard
from tools.embed import SHARD_ROWS

DIM, TOP, QUERIES, IDENTITIES = 2048, 10, 64, 1000


def run(device: str = "cpu", quick: bool = False) -> list[dict]:
    """Return the rows of the table of benchmarks: exact search at two sizes, the index at the smaller one."""
    rows = []
    for count in (2000,) if quick else (100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            queries = torch.from_numpy(write(folder, count))
            rows.append(exact_row(folder, queries, count))
            if count <= 100_000 and importlib.util.find_spec("faiss"):
                rows.append(index_row(folder, queries, count))
    return rows


def blocks(count: int) -> Iterator[np.ndarray]:
    """Float16 unit rows of IDENTITIES people; each block has the first block's deviations, rotated."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((IDENTITIES, DIM), dtype=np.float32)
    deviations = rng.standard_normal((min(count, SHARD_ROWS), DIM), dtype=np.float32)
    for k, start in enumerate(range(0, count, SHARD_ROWS)):
        number = min(SHARD_ROWS, count - start)
        rows = centers[rng.integers(IDENTITIES, size=number)] + np.roll(deviations[:number], k, axis=1)
        yield (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def write(folder: Path, count: int) -> np.ndarray:
    """Write count rows as shards; return queries (QUERIES, DIM) float32: slightly changed rows."""
    write_manifest(folder, Manifest("", DIM, "visible", 384, 128, "float32", ""))
    for k, rows in enumerate(blocks(count)):
        records = [{"path": f"/{k}/{row}.jpg", "size": 0, "mtime_ns": 0} for row in range(len(rows))]
        write_shard(folder, f"000-{k:06d}", rows, records)
        if k == 0:
            first = rows[:QUERIES].astype(np.float32)
    queries = first + 0.02 * np.random.default_rng(1).standard_normal(first.shape, dtype=np.float32)
    return queries / np.linalg.norm(queries, axis=1, keepdims=True)


def exact_row(folder: Path, queries: torch.Tensor, count: int) -> dict:
    """Exact search against the product."""
    gallery = Embeddings(folder)
    rows = np.empty((count, DIM), np.float32)
    for first, block in gallery.blocks(4096):
        rows[first : first + len(block)] = block
    check(queries.numpy() @ rows.T, nearest(queries, gallery, TOP)[1].numpy())
    baseline, ours = (
        functools.partial(np.matmul, queries.numpy(), rows.T),
        functools.partial(search, folder, queries),
    )
    product_s, ours_s = compare(baseline, ours, 3 if count <= 100_000 else 1)
    del rows, baseline
    peak = run_alone(functools.partial, search, folder, queries)[1]
    return {
        "work": f"exact search, {QUERIES} queries, {count:,} rows, D = {DIM:,}",
        "baseline_s": product_s,
        "ours_s": ours_s,
        "ratio": product_s / ours_s,
        "bound": "< 10 s",
        "note": f"a product in memory; peak {peak / 1e6:.0f} MB for rows of {count * DIM * 2 / 1e6:,.0f} MB",
    }


def search(folder: Path, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Open a folder and search it."""
    return nearest(queries, Embeddings(folder), TOP)


def check(product: np.ndarray, found: np.ndarray) -> None:
    """The rows found (Q, TOP) have the largest products (Q, N), up to ties."""
    wanted = np.sort(np.partition(product, -TOP, axis=1)[:, -TOP:])
    np.testing.assert_allclose(np.sort(np.take_along_axis(product, found, axis=1)), wanted, atol=1e-5)


def index_row(folder: Path, queries: torch.Tensor, count: int) -> dict:
    """The index against exact search."""
    gallery = Embeddings(folder)
    start = time.perf_counter()
    index = build_index(gallery)
    built_s = time.perf_counter() - start
    recall = tune(index, gallery, TOP)
    exact = nearest(queries, gallery, TOP)[1]
    found = nearest_by_index(index, queries, gallery, TOP)[1]
    common = float((found[:, :, None] == exact[:, None]).any(1).float().mean())
    exact_s, ours_s = compare(
        lambda: nearest(queries, gallery, TOP), lambda: nearest_by_index(index, queries, gallery, TOP), 3
    )
    return {
        "work": f"search through an index, {QUERIES} queries, {count:,} rows, D = {DIM:,}",
        "baseline_s": exact_s,
        "ours_s": ours_s,
        "ratio": exact_s / ours_s,
        "bound": None,
        "note": f"recall@{TOP} {common:.3f}, of rows of the gallery {recall:.3f}; built in {built_s:.0f} s",
    }


if __name__ == "__main__":
    for row in run():
        print(row)
