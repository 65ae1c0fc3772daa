"""Embedding image files into shards, as tools.embed does, against the bare forward pass; and what runs it.

    python -m benchmarks.embedding

The bare forward pass runs equally often on one batch that is already on the device, with the same network,
precision and batch size. The written features are compared with images embedded one by one. On the CPU the
network as it trains is compared with the folded one, and with the runtimes that are installed.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from augmentation import normalize
from benchmarks.preprocessing import draw_jpegs
from benchmarks.timing import compare, row, wait_for
from evaluation.flags import RUNTIMES
from evaluation.runtimes import for_evaluation
from model import NonLocal, TwoStreamResNet, extract_features
from precision import autocast_dtype
from retrieval.embeddings import Embedder, Found, embed_files
from retrieval.shards import Shard, shards_of
from tools.embed import embed_into

WORKERS = min(8, os.cpu_count() or 1)


def runtime_rows(quick: bool, dtype: torch.dtype | None) -> Iterator[dict]:
    """A row for the folded network, in the precision of --amp auto and in float32, and for each runtime."""
    arch, height, width, batch = ("resnet18", 64, 32, 4) if quick else ("resnet50", 384, 128, 32)
    network = TwoStreamResNet(arch).eval()
    for module in network.modules():
        if isinstance(module, NonLocal):  # untrained, it would be the identity, and left out
            torch.nn.init.normal_(module.bn.weight, std=0.1)
    network.to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, height, width).to(memory_format=torch.channels_last)
    installed = [name for name in RUNTIMES[1:] if find_spec({"onnx": "onnxruntime"}.get(name, name))]
    precisions = dict.fromkeys((None, dtype))
    for name, precision in [
        *(("torch", dtype) for dtype in precisions),
        *((name, None) for name in installed),
    ]:
        other = for_evaluation(network, torch.device("cpu"), name, (height, width))

        def embed(network: torch.nn.Module, dtype: torch.dtype | None = precision) -> torch.Tensor:
            return extract_features(network, [images], "visible", dtype)

        difference = (embed(other) - embed(network)).abs().max().item()
        assert difference < (1e-4 if precision is None else 1e-2)
        seconds = compare(partial(embed, network), partial(embed, other), 1 if quick else 7)
        what, bound = ("folded", 1.15) if name == "torch" else (f"in {name}", 1.4)
        work = (
            f"{arch} at {height}x{width}, {batch} images, {precision or torch.float32}: trained, and {what}"
        )
        note = f"largest difference {difference:.1e}, {torch.get_num_threads()} threads"
        yield row(work, seconds, bound, note)


def run(device: str = "cpu", quick: bool = False) -> list[dict]:
    """Return the rows of the table."""
    arch, height, width, batch = ("resnet18", 64, 32, 8) if quick else ("resnet50", 384, 128, 64)
    batches, repeats = (2, 1) if quick else (64, 3) if device == "cuda" else (2, 3)
    embedder = Embedder(TwoStreamResNet(arch).eval(), height, width)
    embedder.to(device, memory_format=torch.channels_last)
    dtype = autocast_dtype("auto", torch.device(device))
    with tempfile.TemporaryDirectory() as name:
        folder, count = Path(name), batch * batches
        paths = draw_jpegs(folder, count)
        pixels = torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8)
        ready = normalize(pixels.to(device))

        def bare() -> None:
            extract_features(embedder.network, [ready] * batches, "visible", dtype)
            wait_for(device)

        def embed() -> Shard:
            parts = embed_files(embedder, paths, "visible", batch, WORKERS, dtype)
            with contextlib.closing(parts), tqdm(disable=True) as bar:
                assert embed_into(folder, 0, Found(paths), range(count), parts, bar) == 0
            return shards_of(folder)[-1]

        shard = embed()
        first, wanted = shard.features(embedder.network.dim)[:4], embedder(paths[:4], "visible")
        assert [record["path"] for record in shard.records()] == paths
        assert ((np.asarray(first, np.float32) * wanted.cpu().numpy()).sum(1) > 0.999).all()
        bare_s, ours_s = compare(bare, embed, repeats)
    work = f"embedding JPEGs into shards, {height}x{width}, {arch}, batches of {batch}"
    note = f"{count / ours_s:.1f} images/s, the bare forward pass {count / bare_s:.1f}"
    rows = [row(work, (bare_s, ours_s), 0.9, note)]
    return rows + list(runtime_rows(quick, dtype) if device == "cpu" else ())


if __name__ == "__main__":
    for line in run():
        print(line)
