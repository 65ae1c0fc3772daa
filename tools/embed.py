"""Embed images of one's own: float16 features in shards, paths and what is known of each image beside them.

    python -m tools.embed --resume RUN_best.t --images DIR --modality infrared --output FOLDER
    torchrun --nproc_per_node 4 -m tools.embed --resume RUN_best.t --images TABLE.csv …

Interrupted or run again, it embeds what is new or has changed, by size and time, and drops what is no longer
asked for. Files that cannot be read are listed and left out, and the exit status is then 1.
retrieval/shards.py says what the folder holds.
"""

if __name__ == "__main__":  # before torch is imported, which takes long from a slow disk
    from utils import before_torch

    before_torch()

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from devices import Processes, select_device
from evaluation.flags import RUNTIMES
from evaluation.runtimes import for_evaluation
from retrieval.embeddings import Found, embed_files, find_images, open_embedder, settle_precision
from retrieval.shards import (
    CODES,
    COLUMNS,
    NAME,
    Manifest,
    read_manifest,
    shards_of,
    stored_column,
    write_manifest,
    write_shard,
)
from utils import Parser, UserError, at_least, device_flags, log, log_to_terminal, run_script

SHARD_ROWS = 16384  # of 2,048 dimensions: 67 MB, which a process holds until they are written
SHARD_SECONDS = 60  # a shard is written after that time however few its rows: what an interruption costs
MAY_DIFFER = ("checkpoint", "complete")  # of the manifests of two runs into one folder


def get_args_parser() -> Parser:
    """The command line; what is not given comes from the checkpoint."""
    parser = Parser(
        prog="python -m tools.embed",
        description="Embed images of one's own.",
        parents=[device_flags()],
    )
    parser.set_defaults(amp=None)
    parser.add_argument(
        "--resume", required=True, metavar="FILE", help="a checkpoint: ours, the released code's or AGW's"
    )
    parser.add_argument(
        "--images", required=True, metavar="DIR|LIST.txt|TABLE.csv",
        help="a folder with its subfolders, a file with a path a line, or a table with a column path, whose "
        "other columns are kept; relative paths count from the file's folder",
    )  # fmt: skip
    parser.add_argument(
        "--modality", required=True, choices=("visible", "infrared"), help="of all the images"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="of the embeddings")
    parser.add_argument(
        "--runtime",
        choices=RUNTIMES,
        default="torch",
        help="what computes the features, on the CPU (default: torch)",
    )
    parser.add_argument(
        "--img-h", type=at_least(8), metavar="PIXELS", help="image height (default: the checkpoint's)"
    )
    parser.add_argument(
        "--img-w", type=at_least(8), metavar="PIXELS", help="image width (default: the checkpoint's)"
    )
    return parser


def stat_of(path: str) -> tuple[int, int] | None:
    """A file's size in bytes and modification time in nanoseconds; None: no such file."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    return None


def sized(size: int, mtime_ns: int) -> dict[str, str]:
    """What stat_of gives, as a shard's table has it."""
    return {"size": str(size), "mtime_ns": str(mtime_ns)}


@contextlib.contextmanager
def opened(folder: Path, manifest: Manifest) -> Iterator[None]:
    """Keep other runs out of folder while this one writes; UserError if its embeddings are others."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder}: another tools.embed is writing there") from None
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    with lock:
        if shards_of(folder):
            former = vars(read_manifest(folder))
            for key, value in vars(manifest).items():
                if key not in MAY_DIFFER and former[key] != value:
                    raise UserError(
                        f"{folder} was made with {key} {former[key]}, this run has {value}: "
                        "give --output another folder"
                    )
        write_manifest(folder, manifest)
        yield


def tidy(folder: Path, found: Found, dim: int) -> int:
    """Leave only rows of found's images as they are now, with what is now known; return how many rows went.

    Clears away also what an interrupted run left half-written; codes rows (n, dim) that are not coded yet.
    """
    tables = {shard.table for shard in shards_of(folder)}
    for file in (f for name in (f".{NAME}.*.part", f"{NAME}.npy", NAME + CODES) for f in folder.glob(name)):
        if file.with_suffix(".csv") not in tables:
            file.unlink()
    place = {path: k for k, path in enumerate(found.paths)}
    dropped = 0
    for shard in shards_of(folder):
        records, kept = list(shard.records()), []
        for record in records:
            k, status = place.get(record["path"]), stat_of(record["path"])
            if k is None or status is None or not sized(*status).items() <= record.items():
                continue
            del place[record["path"]]  # a second row of it is dropped
            kept.append(known_of(found, k) | {key: record[key] for key in COLUMNS})
        dropped += len(records) - len(kept)
        if kept != records:
            shard.replace(kept)
        if kept and not shard.coded.exists():  # written before there were codes
            shard.write_codes(shard.features(dim))
    return dropped


def known_of(found: Found, k: int) -> dict[str, str]:
    """{column of a shard's table: text} of the k-th image."""
    return dict(zip(map(stored_column, found.columns), found.values[k], strict=True)) if found.columns else {}


def next_number(folder: Path, rank: int) -> int:
    """The number of a process's next shard: shards are called RANK-NUMBER."""
    numbers = [shard.table.stem.split("-") for shard in shards_of(folder)]
    return 1 + max((int(number) for owner, number in numbers if int(owner) == rank), default=-1)


def embed_into(
    folder: Path, rank: int, found: Found, todo: Sequence[int], batches: Iterator[tuple], bar: tqdm
) -> int:
    """Write one process's shards: the images todo (indices) of found, in batches as embed_files gives them.

    Returns how many images could not be read.
    """
    statuses = [stat_of(found.paths[k]) for k in todo]  # before they are read: what changes later is noticed
    number, failed, parts, records = next_number(folder, rank), 0, [], []
    start = time.monotonic()
    for features, rows, failures in batches:
        parts.append(features.half())
        for row in rows:
            k = todo[row]
            path = found.paths[k]
            records.append(known_of(found, k) | {"path": path} | sized(*statuses[row]))
        for failure in failures:
            log.warning("cannot read %s", failure)
        failed += len(failures)
        bar.update(len(rows) + len(failures))
        if len(records) >= SHARD_ROWS or time.monotonic() - start > SHARD_SECONDS:
            write_shard(folder, f"{rank:03d}-{number:06d}", torch.cat(parts).numpy(), records)
            number, parts, records, start = number + 1, [], [], time.monotonic()
    if records:
        write_shard(folder, f"{rank:03d}-{number:06d}", torch.cat(parts).numpy(), records)
    return failed


def main(args: argparse.Namespace) -> int:
    """Embed; return 1 if an image could not be read."""
    processes = Processes()
    log_to_terminal(quiet=processes.rank > 0, stream=sys.stderr)
    found = find_images(args.images, "--images", args.modality)
    embedder, saved = open_embedder(args.resume, args.img_h, args.img_w)
    device = select_device(args.gpu)  # with torchrun each process has its own GPU, or all share that of --gpu
    amp, size = args.amp or saved.get("amp", "auto"), (embedder.height, embedder.width)
    if args.runtime != "torch":
        embedder.network = for_evaluation(embedder.network, device, args.runtime, size, args.amp or "auto")
        dtype = embedder.network.dtype
    embedder.to(device, memory_format=torch.channels_last)
    processes.start(torch.device("cpu"))  # all that they exchange is little
    if args.runtime == "torch":
        dtype = settle_precision(
            embedder, amp, found.paths, args.modality, args.test_batch, args.workers, processes
        )
    manifest = Manifest(
        fingerprint=embedder.fingerprint,
        dim=embedder.network.dim,
        modality=args.modality,
        height=embedder.height,
        width=embedder.width,
        precision=str(dtype or torch.float32).removeprefix("torch."),
        images=os.path.abspath(args.images),
        checkpoint=Path(args.resume).name,
    )
    folder = Path(args.output)
    first = processes.rank == 0
    with opened(folder, manifest) if first else contextlib.nullcontext():
        dropped = tidy(folder, found, manifest.dim) if first else 0
        processes.barrier()
        done = {record["path"] for shard in shards_of(folder) for record in shard.records()}
        todo = [k for k, path in enumerate(found.paths) if path not in done]
        processes.barrier()  # nobody writes until everybody has seen what is there
        mine = todo[processes.rank :: processes.world_size]
        batches = embed_files(
            embedder, [found.paths[k] for k in mine], args.modality, args.test_batch, args.workers, dtype
        )
        try:
            with (
                tqdm(total=len(mine), unit="image", disable=None if first else True) as bar,
                contextlib.closing(batches),
            ):
                failed = embed_into(folder, processes.rank, found, mine, batches, bar)
        except torch.OutOfMemoryError as error:
            raise UserError(f"the GPU's memory is too small for --test-batch {args.test_batch}") from error
        processes.barrier()  # with more patience than a GPU's collectives have
        failed = int(processes.all_reduce(torch.tensor(failed)))
        if first:
            write_manifest(folder, dataclasses.replace(manifest, complete=True))
            kept = len(found.paths) - len(todo)
            log.info(
                "%s: %d embedded, %d as they were, %d dropped, %d unreadable",
                folder, len(todo) - failed, kept, dropped, failed,
            )  # fmt: skip
    processes.stop()
    return int(failed > 0)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args)
