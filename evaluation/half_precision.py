"""Distances in half precision, and who is nearest by them, as the released code's re-ranking has both.

Its results depend on every digit: many distances are equal in half precision, and NumPy's unstable sort
decides between them. So distances are exact until they are rounded, and its sort is followed step by step.
"""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from devices import Array, unit_features

TILE = 1024  # images on each side of a product of features
ROWS = 96  # images whose neighbours are found at a time
SHORT = 4096  # images whose order is found as quickly by a whole sort


def as_released(features: Array) -> torch.Tensor:
    """Return unit features (N, D) rounded to half precision as in the released code."""
    return unit_features(features).half()


def distances_between(features: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (N, M) float32 squared Euclidean distances of (N, D) and (M, D), and their roots in float16.

    Both are computed in float64 and rounded once. Rounding to float32 first would sometimes give another
    float16 value, and so other neighbours. In float64 the products of unit float16 features are exact, in
    whatever order they are summed: all are multiples of 2^-48.
    """
    squared = torch.empty(len(features), len(others), device=features.device)
    halves = torch.empty_like(squared, dtype=torch.float16)
    columns = _with_lengths(others)
    for here in slices(len(features), TILE):
        rows = _turned(_with_lengths(features[here]))
        for there in slices(len(others), TILE):
            squared[here, there], halves[here, there] = _rounded(rows @ columns[there].T)
    return squared, halves


def distances(
    features: torch.Tensor, squared: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distances of (N, D) to each other in float16 (N, N), and the largest squared ones (N,).

    squared: (N, N) float32, where the squared distances go if they are wanted. See distances_between.
    """
    num = len(features)
    halves = features.new_empty(num, num)
    largest = torch.zeros(num, device=features.device)
    for wide in slices(num, 4 * TILE):  # float64 for all images at once would be as large as halves
        columns = _with_lengths(features[wide])
        for here in slices(wide.stop, TILE):
            rows = _turned(_with_lengths(features[here]))
            for there in slices(wide.stop, TILE, max(here.start, wide.start)):  # the rest is symmetrical
                single, rounded = _rounded(rows @ columns[there.start - wide.start :][:TILE].T)
                halves[here, there], halves[there, here] = rounded, rounded.T
                if squared is not None:
                    squared[here, there], squared[there, here] = single, single.T
                largest[here] = torch.maximum(largest[here], single.amax(1))
                largest[there] = torch.maximum(largest[there], single.amax(0))
    return halves, largest


def squared_lengths(features: torch.Tensor) -> torch.Tensor:
    """Return the exact squared lengths (N,) float64 of (N, D)."""
    parts = (part.double() for part in features.split(TILE))
    return torch.cat([torch.linalg.vecdot(part, part) for part in parts])


def _with_lengths(features: torch.Tensor) -> torch.Tensor:
    """Return (N, D + 2) float64: features b (N, D), 1, |b|^2."""
    wide = torch.nn.functional.pad(features, (0, 2), value=1.0).double()
    wide[:, -1] = squared_lengths(features)
    return wide


def _turned(wide: torch.Tensor) -> torch.Tensor:
    """Return (N, D + 2): -2 a, |a|^2, 1, whose products with `b, 1, |b|^2` are squared distances."""
    rows = wide * -2
    rows[:, -2], rows[:, -1] = wide[:, -1], 1
    return rows


def _rounded(squared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (N, M) float64 values in float32, and their roots in float16, each rounded once.

    A float32 root is at most one unit of its last place off. So it gives the right float16 value unless it is
    next to the middle of two: there the root is computed in float64. (Below 2^-14 float16 has fewer digits,
    but the roots of multiples of 2^-48 stay clear of the middles.)
    """
    single = squared.float()
    roots = single.sqrt()
    halves = roots.half()
    lost = roots.view(torch.int32) & 0x1FFF  # the 13 bits that float16 lacks; the middle is 0x1000
    doubtful = lost.sub_(0x1000).abs_() <= 4
    places = doubtful.flatten().nonzero()[:, 0]
    exact = squared.flatten()[places].sqrt_().cpu().numpy().astype(np.float16)  # torch would round twice
    halves.view(-1)[places] = torch.from_numpy(exact).to(halves.device)
    return single, halves


def slices(num: int, size: int, first: int = 0) -> Iterator[slice]:
    """Yield the slices of the images from first to num, size at a time."""
    return (slice(start, min(start + size, num)) for start in range(first, num, size))


# --- neighbours


def divisor(largest: torch.Tensor) -> torch.Tensor:
    """Return the largest distances of rows as what to divide these by: not 0 where all images are equal."""
    return largest.clamp(min=torch.finfo(largest.dtype).tiny)


def sizes_of(k1: int, k2: int, num: int) -> list[int]:
    """Return how many of num images are in the three neighbourhoods: averaged, close, all."""
    return [min(k, num) for k in (k2, round(k1 / 2) + 1, k1 + 1)]


def nearest_in_half_precision(squares: torch.Tensor, sizes: list[int]) -> np.ndarray:
    """Return (n, max(sizes)) int64: the images nearest to each one, as the released code orders them.

    The released code ranks distances in half precision, where many are equal, with NumPy's unstable sort. Its
    results depend on which images are among the nearest, so this does the same. Only the sets of neighbours
    matter: topk finds them unless a tie crosses one of the sizes; only the rows with such a tie are sorted.

    Args:
        squares: (n, N) float16 squared distances.
        sizes: of the neighbourhoods that are needed.
    """
    rounded = squares / divisor(squares.amax(1, keepdim=True))
    values, nearest = least(rounded, min(max(sizes) + 1, rounded.shape[1]))
    nearest = nearest[:, : max(sizes)].cpu().numpy()
    tied = with_ties(values, sizes)
    nearest[tied.cpu().numpy()] = sort_rows(rounded[tied], max(sizes))
    return nearest


def least(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k least values of each row, in order, and their indices: (n, k) each."""
    parts = [part.float().topk(k, dim=1, largest=False) for part in rows.split(ROWS)]
    return torch.cat([part.values for part in parts]).to(rows.dtype), torch.cat(
        [part.indices for part in parts]
    )


def with_ties(ordered: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Return the rows in whose ascending values (n, k) a tie crosses one of sizes."""
    borders = torch.tensor([k for k in sizes if k < ordered.shape[1]], device=ordered.device).long()
    return (ordered[:, borders - 1] == ordered[:, borders]).any(1).nonzero()[:, 0]


def sort_rows(rows: torch.Tensor, size: int) -> np.ndarray:
    """Return the first `size` indices (n, size) of each float16 row as NumPy's unstable sort orders them."""
    # NumPy sorts the bits of float16 values, as unsigned integers, in the same order, but faster.
    bits, threads = rows.cpu().numpy().view(np.uint16), torch.get_num_threads()

    def first(part: np.ndarray) -> np.ndarray:
        if part.shape[1] <= SHORT or not _follows_numpy():
            return np.argsort(part, axis=1)[:, :size]
        return np.array([_first_of_argsort(row, size) for row in part]).reshape(len(part), size)

    if bits.size < 2**19:  # threads would take longer to start
        return first(bits)
    with ThreadPoolExecutor(threads) as pool:
        return np.concatenate(list(pool.map(first, np.array_split(bits, 4 * threads))))


@functools.lru_cache
def _follows_numpy() -> bool:
    """Whether this version's sort is the one that _first_of_argsort follows."""
    row = np.random.RandomState(0).randint(0, 500, 3 * SHORT).astype(np.uint16)
    return np.array_equal(_first_of_argsort(row, 21), np.argsort(row)[:21])


def _first_of_argsort(row: np.ndarray, size: int) -> np.ndarray:
    """Return np.argsort(row)[:size] for (N,) uint16 values, and leave the others unsorted.

    NumPy's sort of them is a quicksort: it parts a row at a pivot, then both parts in the same way. Here only
    the lower part is parted again, until it is short.
    """
    order = np.arange(len(row), dtype=np.int32)
    while len(row) > max(SHORT, 2 * size):
        lower = _lower_part(row.copy(), order.copy())
        if len(lower[0]) < size:
            break
        row, order = lower
    return order[np.argsort(row)[:size]]


def _lower_part(row: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values below the pivot and their order as a step of NumPy's quicksort leaves them.

    Both arguments are overwritten. The pivot is the median of the first, the middle and the last value, which
    change places first. Then the first value from the left that is not below the pivot changes places with
    the first from the right that is not above it, the second with the second and so on, until they meet.
    """
    last, middle = len(row) - 1, (len(row) - 1) // 2

    def swap(one: int, other: int) -> None:
        for array in (row, order):
            array[one], array[other] = array[other], array[one]

    for one, other in ((0, middle), (middle, last), (0, middle)):
        if row[other] < row[one]:
            swap(one, other)
    swap(middle, last - 1)  # where the pivot waits
    pivot, inner = row[last - 1], row[1 : last - 1]
    # They meet where as many to the left are not below as to the right are not above. An equal value counts
    # on both sides, so there the number to the left and that of equal ones among them add up to `low`.
    low, (equal,) = np.count_nonzero(inner <= pivot), (inner == pivot).nonzero()
    before = (equal + np.arange(len(equal))).searchsorted(low)
    border = 1 + min([low - before, *equal[before : before + 1]])
    right = 1 + (row[1:border] >= pivot).nonzero()[0]
    left = border + (row[border : last - 1] <= pivot).nonzero()[0][::-1][: len(right)]
    for array in (row, order):
        array[right] = array[left]
    return row[:border], order[:border]
