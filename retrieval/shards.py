"""A folder of embeddings: float16 rows in .npy files, a table beside each, and what made them.

    manifest.json         the checkpoint's fingerprint, dimension, modality, image size, precision
    000-000000.npy        (n, D) float16, unit norm, for numpy.load(…, mmap_mode="r")
    000-000000.csv        row, path, size, mtime_ns and what else is known of an image; UTF-8. A user's
                          column of one of these names has an underscore before it

A row of the .npy that no line of the .csv names is one whose image has changed or vanished. A shard is there
when its .csv is: it is written after the .npy, and each of them whole.
"""

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from utils import UserError, whole_file

MANIFEST = "manifest.json"
NAME = "[0-9][0-9][0-9]*-[0-9][0-9][0-9][0-9][0-9][0-9]"  # PROCESS-NUMBER, a pattern of a shard's name
COLUMNS = ("row", "path", "size", "mtime_ns")  # of every shard's table, before what else is known


def stored_column(name: str) -> str:
    """The name in a shard's table of a column that a user calls so: never one of COLUMNS."""
    return f"_{name}" if name.lstrip("_") in COLUMNS else name


def known_columns(record: dict[str, str]) -> dict[str, str]:
    """What a user's table knew of an image, of a shard's {column: text}, under the user's names."""
    return {
        key.removeprefix("_") if key.lstrip("_") in COLUMNS else key: text
        for key, text in record.items()
        if key not in COLUMNS
    }


@dataclass(frozen=True)
class Manifest:
    """What made a folder's embeddings: the same for all of its rows."""

    fingerprint: str  # of the network's weights
    dim: int
    modality: str
    height: int  # pixels
    width: int  # pixels
    precision: str  # of the network: float32, bfloat16 or float16
    images: str  # where they were found: the folder holds those and no others
    checkpoint: str = ""  # its file, for people
    complete: bool = False  # whether the last run of tools.embed ended


def write_manifest(folder: str | os.PathLike, manifest: Manifest) -> None:
    """Write manifest.json; UserError where it cannot be written."""
    with whole_file(Path(folder, MANIFEST)) as temporary:
        temporary.write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """The manifest of a folder; UserError, naming the file, if it is none of tools.embed's."""
    file = Path(folder, MANIFEST)
    try:
        manifest = Manifest(**json.loads(file.read_text(encoding="utf-8")))
        if all(type(value) is kind for value, kind in zip(asdict(manifest).values(), _kinds(), strict=True)):
            return manifest
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder}: no embeddings there (tools.embed writes them): no {MANIFEST}") from error
    except (OSError, ValueError, TypeError):
        pass
    raise UserError(f"{file}: not a manifest of embeddings")


def _kinds() -> Iterator[type]:
    return (field.type for field in Manifest.__dataclass_fields__.values())


@dataclass(frozen=True, eq=False)
class Shard:
    """One pair of files: the table's, and that of the rows."""

    table: Path

    @property
    def array(self) -> Path:
        """The file of the rows."""
        return self.table.with_suffix(".npy")

    def records(self) -> Iterator[dict[str, str]]:
        """The lines of the table, {column: text}; UserError, naming it, where they are none of a shard's."""
        with open(self.table, encoding="utf-8", errors="surrogateescape", newline="") as stream:
            try:
                for record in csv.DictReader(stream, strict=True):
                    if not record["row"].isdecimal() or None in record.values() or None in record:
                        raise ValueError
                    yield record
            except (ValueError, KeyError, csv.Error) as error:
                raise UserError(f"{self.table}: not a table of embeddings") from error

    def rows(self) -> np.ndarray:
        """(n,) int64: those of the array that the table names, in its order; UserError if not ascending."""
        rows = np.fromiter((int(record["row"]) for record in self.records()), np.int64)
        if (np.diff(rows) <= 0).any():  # tools.embed once let a column `row` of the user's replace its own
            raise UserError(f"{self.table}: its column row is not the array's rows: embed into a new folder")
        return rows

    def features(self, dim: int) -> np.ndarray:
        """(N, dim) float16, memory-mapped; UserError, naming the file, if it holds something else."""
        try:  # copy on write: torch wants arrays that it could write to
            array = np.load(self.array, mmap_mode="c", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.array}: missing, or not a NumPy array") from error
        if array.dtype != np.float16 or array.ndim != 2 or array.shape[1] != dim:
            raise UserError(f"{self.array}: {array.dtype} {array.shape} is not float16 (N, {dim})")
        return array

    def replace(self, records: Sequence[dict[str, object]]) -> None:
        """Write the table anew, or remove the shard if there are no records."""
        if not records:
            self.table.unlink()
            self.array.unlink(missing_ok=True)
            return
        columns = dict.fromkeys(COLUMNS) | dict.fromkeys(key for record in records for key in record)
        with (
            whole_file(self.table) as temporary,
            open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as stream,
        ):
            lines = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
            lines.writeheader()
            lines.writerows(records)


def shards_of(folder: str | os.PathLike) -> list[Shard]:
    """The shards of a folder, by name."""
    return [Shard(table) for table in sorted(Path(folder).glob(f"{NAME}.csv"))]


def write_shard(
    folder: str | os.PathLike, name: str, features: np.ndarray, records: Sequence[dict[str, object]]
) -> None:
    """Write features (n, D) float16 and their records, {column: value} with all of COLUMNS but row."""
    shard = Shard(Path(folder, f"{name}.csv"))
    with whole_file(shard.array) as temporary, open(temporary, "wb") as stream:
        np.save(stream, features)
    shard.replace([{"row": row} | record for row, record in enumerate(records)])


class Embeddings:
    """The rows of a folder's shards, one after the other: positions 0..N-1.

    Raises UserError, naming the file, if it is missing, not of tools.embed's, or holds no images.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder, self.manifest = Path(folder), read_manifest(folder)
        self.shards = shards_of(folder)
        self._rows: list[np.ndarray | None] = []  # of each shard; None: all, in order
        counts = []
        for shard in self.shards:
            rows, number = shard.rows(), len(shard.features(self.manifest.dim))
            if len(rows) and rows.max() >= number:
                raise UserError(f"{shard.table}: names row {rows.max()} of {shard.array}'s {number}")
            self._rows.append(None if np.array_equal(rows, np.arange(number)) else rows)
            counts.append(len(rows))
        self.starts = np.cumsum(
            [0, *counts]
        )  # the position of each shard's first row; the last: their number
        if not len(self):
            raise UserError(f"{folder}: embeddings of no images")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def blocks(self, size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (position of the first row, rows (n, D) float16), n <= size, through all shards.

        A shard's pages are given back when the next shard is opened.
        """
        for k in range(len(self.shards)):
            yield from self.shard_blocks(k, size)

    def shard_blocks(self, k: int, size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """As blocks, through the k-th shard."""
        array, rows, first = self.shards[k].features(self.manifest.dim), self._rows[k], int(self.starts[k])
        for start in range(0, len(array) if rows is None else len(rows), size):
            part = slice(start, start + size)
            yield first + start, torch.from_numpy(array[part if rows is None else rows[part]])

    def take(self, positions: np.ndarray) -> torch.Tensor:
        """The rows (n, D) float16 at positions (n,)."""
        taken = np.empty((len(positions), self.manifest.dim), np.float16)
        for k, where in self._by_shard(positions):
            rows = positions[where] - self.starts[k]
            rows = rows if self._rows[k] is None else self._rows[k][rows]
            taken[where] = self.shards[k].features(self.manifest.dim)[rows]
        return torch.from_numpy(taken)

    def records(self, positions: np.ndarray) -> list[dict]:
        """{"path", "known": {column: text}} of the images at positions (n,), each once."""
        found: list = [None] * len(positions)
        for k, where in self._by_shard(positions):
            places = dict(zip((positions[where] - self.starts[k]).tolist(), where.tolist(), strict=True))
            for line, record in enumerate(self.shards[k].records()):
                if line in places:
                    known = {key: text for key, text in known_columns(record).items() if text}
                    found[places[line]] = {"path": record["path"], "known": known}
        return found

    def _by_shard(self, positions: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        owners = np.searchsorted(self.starts, positions, side="right") - 1
        return ((int(k), np.flatnonzero(owners == k)) for k in np.unique(owners))

    def digest(self) -> str:
        """Twelve hexadecimal digits that change with the rows: a sha256 of the shards' names and tables."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(shard.table.name.encode())
            digest.update(hashlib.sha256(shard.table.read_bytes()).digest())
        return digest.hexdigest()[:12]
