"""The nearest rows of a folder of embeddings: exactly, in blocks, or through a FAISS index.

A similarity is the product of two unit features: their cosine, 1 for the same.
"""

import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import torch

from retrieval.shards import Embeddings
from utils import UserError, log, whole_file

BLOCK = 4096  # rows: 2,048 dimensions of them in float32 are 34 MB
CANDIDATES = 20  # of the index for each result, at least FEWEST, compared exactly
FEWEST = 200
RECALL = 0.95  # the index looks through more and more of its lists until it has this
SMALLEST = 1000  # rows worth an index


def nearest(queries: torch.Tensor, gallery: Embeddings, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(similarities (Q, k) float32, positions (Q, k) int64) of the k = min(top, N) nearest rows, in order.

    queries: unit features (Q, D) float32, on the device that computes. Exact: every row is compared in
    float32. Each thread holds a shard, a block in float32 and Q x BLOCK products, however large the gallery.
    On a CPU a thread of torch's takes a shard at a time, alone: sharing each small product out among them
    would cost more than it takes, above all where cores are busy. Meanwhile torch.get_num_threads() is 1.
    """
    best = queries.new_empty(len(queries), 0)
    positions = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads if queries.device.type == "cpu" else 1)
    torch.set_num_threads(1)
    try:
        search = functools.partial(_nearest_in_shard, queries, gallery, top)
        for similarities, rows in pool.map(search, range(len(gallery.shards))):
            best, positions = _merge(best, positions, similarities, rows, top)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    return best, positions


@torch.inference_mode()
def _nearest_in_shard(queries: torch.Tensor, gallery: Embeddings, top: int, shard: int) -> tuple:
    best = queries.new_empty(len(queries), 0)
    positions = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    wide = queries.new_empty(BLOCK, queries.shape[1])  # kept: fresh pages for every block would cost
    products = queries.new_empty(len(queries), BLOCK)
    for first, block in gallery.shard_blocks(shard, BLOCK):
        wide[: len(block)] = block
        torch.mm(queries, wide.T, out=products)
        similarities, rows = products[:, : len(block)].topk(min(top, len(block)))
        best, positions = _merge(best, positions, similarities, rows + first, top)
    return best, positions


def _merge(best: torch.Tensor, positions: torch.Tensor, others: torch.Tensor, rows: torch.Tensor, top: int):
    best, order = torch.cat([best, others], 1).topk(min(top, best.shape[1] + others.shape[1]))
    return best, torch.cat([positions, rows], 1).gather(1, order)


def faiss_module() -> ModuleType:
    """FAISS; UserError, saying what to install, where it is not."""
    try:
        import faiss
    except ImportError as error:
        raise UserError("--index needs FAISS: pip install faiss-cpu") from error
    return faiss


def open_index(gallery: Embeddings, top: int) -> object:
    """The FAISS index of a folder, from its file index-<digest of the shards>.faiss, built if there is none.

    top: what its recall is measured at. UserError: no FAISS; an index older than its shards, or broken, both
    by name; too few rows.
    """
    faiss = faiss_module()
    path = gallery.folder / f"index-{gallery.digest()}.faiss"
    if path.exists():
        try:
            return faiss.read_index(os.fspath(path))
        except RuntimeError as error:
            raise UserError(f"{path}: not a whole index: remove it, and --index builds another") from error
    if others := sorted(gallery.folder.glob("index-*.faiss")):
        raise UserError(f"{others[0]} is older than its shards: remove it, and --index builds another")
    if len(gallery) < SMALLEST:
        raise UserError(f"--index: {gallery.folder} has {len(gallery)} rows, too few: search without it")
    index = build_index(gallery)
    recall = tune(index, gallery, top)
    log.info(
        "%s: recall@%d %.3f against exact search, with rows of the gallery as queries, %d of %d lists",
        path, top, recall, index.nprobe, index.nlist,
    )  # fmt: skip
    with whole_file(path) as temporary:
        faiss.write_index(index, os.fspath(temporary))
    return index


def build_index(gallery: Embeddings) -> object:
    """A FAISS index of all rows: four bits a dimension, in sqrt(N) inverted lists.

    A quarter of the shards' bytes, in memory: enough to propose candidates, which are then compared exactly.
    Product codes are smaller, but take minutes to learn from 2,048 dimensions where this takes seconds.
    """
    faiss = faiss_module()
    count, dim = len(gallery), gallery.manifest.dim
    lists = min(round(math.sqrt(count)), count // 40)
    index = faiss.index_factory(dim, f"IVF{lists},SQ4", faiss.METRIC_INNER_PRODUCT)
    sample = min(count, max(20000, 40 * lists))
    log.info("building an index of %d rows: %d lists, learnt from %d rows", count, lists, sample)
    index.train(gallery.take(np.linspace(0, count - 1, sample).astype(np.int64)).float().numpy())
    for _, block in gallery.blocks(BLOCK):
        index.add(block.float().numpy())
    return index


def tune(index: object, gallery: Embeddings, top: int, samples: int = 100) -> float:
    """Set how many lists the index looks through, so that its recall@top reaches RECALL; return the recall.

    Of the exact `top` nearest of some rows of the gallery, evenly taken, how many the index gives too.
    """
    queries = gallery.take(np.linspace(0, len(gallery) - 1, samples).astype(np.int64)).float()
    _, exact = nearest(queries, gallery, top)
    index.nprobe = 1
    while True:
        _, found = nearest_by_index(index, queries, gallery, top)
        recall = float((found[:, :, None] == exact[:, None]).any(1).float().mean())
        if recall >= RECALL or index.nprobe == index.nlist:
            return recall
        index.nprobe = min(2 * index.nprobe, index.nlist)


def nearest_by_index(
    index: object, queries: torch.Tensor, gallery: Embeddings, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As nearest, of the rows that the index proposes: their similarities are exact.

    queries: on the CPU. Fewer are found than asked for: similarity -inf and position -1.
    """
    top = min(top, len(gallery))
    _, candidates = index.search(queries.numpy(), max(FEWEST, CANDIDATES * top))
    candidates = torch.from_numpy(candidates)
    best = torch.full((len(queries), top), -torch.inf)
    positions = torch.full((len(queries), top), -1)
    for k, row in enumerate(candidates):
        row = row[row >= 0]
        similarities, order = (gallery.take(row.numpy()).float() @ queries[k]).topk(min(top, len(row)))
        best[k, : len(order)], positions[k, : len(order)] = similarities, row[order]
    return best, positions
