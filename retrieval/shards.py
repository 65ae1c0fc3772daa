"""A folder of embeddings: float16 rows in .npy files, a table beside each, and what made them.

    manifest.json         the checkpoint's fingerprint, dimension, modality, image size, precision
    000-000000.npy        (n, D) float16, unit norm, for numpy.load(…, mmap_mode="r")
    000-000000.codes      the same rows in one byte a dimension, for search; may be missing
    000-000000.csv        row, path, size, mtime_ns and what else is known of an image; UTF-8. A user's
                          column of one of these names has an underscore before it

A row of the .npy that no line of the .csv names is one whose image has changed or vanished. A shard is there
when its .csv is: it is written after the others, and each of them whole.
"""

import csv
import functools
import json
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch

from retrieval.codes import Codes, encode, has_codes
from utils import UserError, whole_file

MANIFEST = "manifest.json"
NAME = "[0-9][0-9][0-9]*-[0-9][0-9][0-9][0-9][0-9][0-9]"  # PROCESS-NUMBER, a pattern of a shard's name
COLUMNS = ("row", "path", "size", "mtime_ns")  # of every shard's table, before what else is known
CODES = ".codes"  # the suffix of a shard's coded rows
KEPT = 128  # shards that stay open for single rows: three files each


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

    @property
    def coded(self) -> Path:
        """The file of the coded rows."""
        return self.table.with_suffix(CODES)

    def lines(self) -> Iterator[list[str]]:
        """The table's columns, then its lines; UserError, naming it, where they are none of a shard's."""
        with open(self.table, encoding="utf-8", errors="surrogateescape", newline="") as stream:
            try:
                lines = filter(None, csv.reader(stream, strict=True))
                header = next(lines)
                row, width = header.index("row"), len(header)
                yield header
                for line in lines:
                    if len(line) != width or not line[row].isdecimal():
                        raise ValueError
                    yield line
            except (StopIteration, ValueError, csv.Error) as error:
                raise UserError(f"{self.table}: not a table of embeddings") from error

    def records(self) -> Iterator[dict[str, str]]:
        """The lines of the table, {column: text}; UserError as lines."""
        lines = self.lines()
        header = next(lines)
        return (dict(zip(header, line, strict=True)) for line in lines)

    def rows(self) -> np.ndarray:
        """(n,) int64: those of the array that the table names, in its order; UserError if not ascending."""
        lines = self.lines()
        row = next(lines).index("row")
        rows = np.fromiter(map(int, map(itemgetter(row), lines)), np.int64)
        if (np.diff(rows) <= 0).any():  # tools.embed once let a column `row` of the user's replace its own
            raise UserError(f"{self.table}: its column row is not the array's rows: embed into a new folder")
        return rows

    def codes(self, shape: tuple[int, int]) -> Codes | None:
        """The coded rows; None if there are none, UserError, naming the file, if they are others."""
        try:
            with open(self.coded, "rb") as stream:
                codes = np.load(self.coded, mmap_mode="c", allow_pickle=False)
                stream.seek(codes.offset + codes.nbytes)
                facts = np.load(stream, allow_pickle=False)
            scales, mean, (residual, length) = np.split(facts, np.cumsum(shape))
            if (codes.shape, codes.dtype, facts.dtype) != (shape, np.int8, np.float32):
                raise ValueError
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, AttributeError) as error:
            raise UserError(f"{self.coded}: not the codes of {self.array}: remove it") from error
        return Codes(codes, scales, mean, float(residual), float(length))

    def write_codes(self, features: np.ndarray) -> None:
        """Write the coded rows of features (n, D), where such rows can be coded."""
        if has_codes(features.shape[1]):
            with whole_file(self.coded) as temporary, open(temporary, "wb") as stream:
                for array in encode(features):
                    np.save(stream, array)

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
            for file in (self.array, self.coded):
                file.unlink(missing_ok=True)
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
    shard.write_codes(features)
    shard.replace([{"row": row} | record for row, record in enumerate(records)])


class Embeddings:
    """The rows of a folder's shards, one after the other: positions 0..N-1.

    Raises UserError, naming the file, if it is missing, not of tools.embed's, or holds no images.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder, self.manifest = Path(folder), read_manifest(folder)
        self.shards = shards_of(folder)
        self._rows: list[np.ndarray | None] = []  # of each shard; None: all, in order
        self._kept = functools.lru_cache(KEPT)(self.opened)
        counts = []
        for shard in self.shards:
            rows, number = shard.rows(), len(shard.features(self.manifest.dim))
            if len(rows) and rows.max() >= number:
                raise UserError(f"{shard.table}: names row {rows.max()} of {shard.array}'s {number}")
            self._rows.append(None if np.array_equal(rows, np.arange(number)) else rows)
            counts.append(len(rows))
        self.starts = np.cumsum([0, *counts])  # the position of each shard's first row, then their number
        if not len(self):
            raise UserError(f"{folder}: embeddings of no images")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def opened(self, k: int) -> "OpenShard":
        """The k-th shard; its pages are given back when nobody holds it."""
        return OpenShard(self.shards[k], int(self.starts[k]), self._rows[k], self.manifest.dim)

    def blocks(self, size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (position of the first row, rows (n, D) float16), n <= size, through all shards.

        A shard's pages are given back when the next shard is opened.
        """
        for shard in map(self.opened, range(len(self.shards))):
            for start in range(0, len(shard), size):
                yield shard.first + start, shard.half(range(start, min(start + size, len(shard))))

    def take(self, positions: np.ndarray) -> torch.Tensor:
        """The rows (n, D) float16 at positions (n,)."""
        taken = torch.empty(len(positions), self.manifest.dim, dtype=torch.float16)
        for k, where in self._by_shard(positions):
            shard = self._kept(k)
            taken[where] = shard.half(positions[where] - shard.first)
            shard.release()
        return taken

    def columns(self, *names: str) -> Iterator[tuple[str, ...]]:
        """What the tables say of all N images in two columns or more; "" where they have no such column."""
        for shard in self.shards:
            lines = shard.lines()
            places = {name: place for place, name in enumerate(next(lines))}
            pick = itemgetter(*(places.get(name, -1) for name in names))
            yield from (pick([*line, ""]) for line in lines)

    def records(self, positions: np.ndarray) -> list[dict]:
        """{"path", "known": {column: text}} of the images at positions (n,), each once."""
        found: list = [None] * len(positions)
        for k, where in self._by_shard(positions):
            places = dict(zip((positions[where] - self.starts[k]).tolist(), where.tolist(), strict=True))
            lines = self.shards[k].lines()
            header = next(lines)
            for number, line in enumerate(lines):
                if number in places:
                    record = dict(zip(header, line, strict=True))
                    known = {key: text for key, text in known_columns(record).items() if text}
                    found[places[number]] = {"path": record["path"], "known": known}
        return found

    def _by_shard(self, positions: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        owners = np.searchsorted(self.starts, positions, side="right") - 1
        return ((int(k), np.flatnonzero(owners == k)) for k in np.unique(owners))


class OpenShard:
    """A shard's rows that its table names, memory-mapped: numbers 0..n-1, the first at position `first`."""

    def __init__(self, shard: Shard, first: int, rows: np.ndarray | None, dim: int):
        self.shard, self.first, self._rows = shard, first, rows
        self._features = shard.features(dim)

    def __len__(self) -> int:
        return len(self._features if self._rows is None else self._rows)

    @functools.cached_property
    def codes(self) -> Codes | None:
        """The coded rows of the file, also of those that the table does not name."""
        return self.shard.codes(self._features.shape)

    def half(self, numbers: range | np.ndarray) -> torch.Tensor:
        """Rows (n, D) float16."""
        return torch.from_numpy(self._features[self._where(numbers)])

    def coded(self, numbers: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (n, D) int8 and scales (n,) float32 of rows."""
        where = self._where(numbers)
        return torch.from_numpy(self.codes.codes[where]), torch.from_numpy(self.codes.scales[where])

    def release(self) -> None:
        """Give back the pages of rows that were read: for each row the system maps sixteen pages."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._features.base.madvise(mmap.MADV_DONTNEED)

    def _where(self, numbers: range | np.ndarray) -> slice | np.ndarray:
        where = slice(numbers.start, numbers.stop) if isinstance(numbers, range) else numbers
        return where if self._rows is None else self._rows[where]
