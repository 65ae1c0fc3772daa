"""Rows in one byte a dimension, and how far a product with one can be from the product with the row itself.

A row x becomes R(x - m) = s c + r: m is the shard's mean, R a rotation that spreads every value over all
dimensions, s the row's scale, c whole numbers in [-127, 127], r what rounding left. For a query q with the
rotated and rounded form u (Rq = u + t), and since R keeps products,

    x·q = m·q + R(x - m)·Rq = m·q + s c·u + s c·t + r·Rq,
    |x·q - (m·q + s c·u)| <= max |s c| |t| + max |r| |q|        (Cauchy-Schwarz).

Both maxima are measured when a shard is written: the bound holds for all data, near or far from any model.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch

FEW = 4  # queries for which the product that is bound by memory is the faster one
LARGEST = 2048  # dimensions that a rotation may have
CHUNK = 512  # rows that are coded at once
TURNED = 2.0**-14  # of a row's length: what a rotation in float32 is wrong by; its worst is 0.7 of that
ROUNDING = 2.0**-12  # of 2,048 products added in float32, 2^-13, and of what else is rounded to float32
BFLOAT16 = 2.0**-8  # of a result in bfloat16


def has_codes(dim: int) -> bool:
    """Whether rows of that many dimensions are coded: the rotation needs a power of two."""
    return 16 <= dim <= LARGEST and dim & (dim - 1) == 0


def rotate(rows: torch.Tensor) -> torch.Tensor:
    """Rows (n, D) turned by an orthogonal matrix: random signs, then Hadamard's matrix, in two steps."""
    count, dim = rows.shape
    signs = np.random.RandomState(0).randint(0, 2, dim) * 2 - 1  # shards on disk rely on these signs
    high = 1 << (dim.bit_length() // 2)
    low = dim // high
    turned = (rows * torch.from_numpy(signs).to(rows)).reshape(count * high, low) @ _hadamard(low).to(rows)
    return (_hadamard(high).to(rows) @ turned.view(count, high, low)).view(count, dim)


@functools.lru_cache
def _hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def encode(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Code features (n, D): (c (n, D) int8, facts (n + D + 2,) float32).

    facts: each row's scale s, the mean m, max |r| and max |s c|, as Codes has them.
    """
    count, dim = features.shape
    mean = torch.from_numpy(features.mean(0, dtype=np.float64)).float()
    codes, scales = torch.empty(count, dim, dtype=torch.int8), torch.empty(count)
    residual = length = 0.0
    for start in range(0, count, CHUNK):
        part = slice(start, start + CHUNK)
        turned = rotate(torch.from_numpy(features[part]).float() - mean)
        scales[part] = turned.abs().amax(1) / 127
        scale = scales[part, None].clamp(min=torch.finfo(torch.float32).tiny)
        rounded = (turned / scale).round_().clamp_(-127, 127)
        codes[part] = rounded
        coded = rounded.mul_(scale)
        residual = max(
            residual, float((turned - coded).norm(dim=1).max()) + TURNED * float(turned.norm(dim=1).max())
        )
        length = max(length, float(coded.norm(dim=1).max()))
    facts = torch.cat([scales, mean, torch.tensor([residual, length]) * (1 + 2 * ROUNDING)])
    return codes.numpy(), facts.numpy()


@dataclass(frozen=True, eq=False)
class Codes:
    """The coded rows of a shard."""

    codes: np.ndarray  # (n, D) int8, memory-mapped
    scales: np.ndarray  # (n,) float32
    mean: np.ndarray  # (D,) float32
    residual: float  # max |r|
    length: float  # max |s c|


class CodedQueries:
    """Queries (Q, D) for products with coded rows.

    offset(codes), scale, bound(codes), each (Q,) float64: a similarity is offset + scale * product, and at
    most bound from the true one.
    """

    def __init__(self, queries: np.ndarray):
        self.queries = queries.astype(np.float64)
        turned = rotate(torch.from_numpy(queries)).double().numpy()
        self.norm = np.linalg.norm(self.queries, axis=1)
        if len(queries) <= FEW:
            self._rounded = torch.from_numpy(turned).bfloat16()
            self.scale = np.ones(len(queries))
            rounded, self._output = self._rounded.double().numpy(), BFLOAT16
        else:
            levels = int8_levels()
            self.scale = np.maximum(np.abs(turned).max(1) / levels, np.finfo(np.float32).tiny)
            rounded = np.rint(turned / self.scale[:, None])
            self._packed = _pack(torch.from_numpy(rounded.astype(np.int8)))
            rounded, self._output = rounded * self.scale[:, None], 0.0
        self._lost = np.linalg.norm(turned - rounded, axis=1) + TURNED * self.norm  # |t|
        self._length = np.linalg.norm(rounded, axis=1)  # |u|

    def offset(self, codes: Codes) -> np.ndarray:
        """m·q."""
        return self.queries @ codes.mean.astype(np.float64)

    def bound(self, codes: Codes) -> np.ndarray:
        """How far a similarity can be from the true one: the module's inequality, and rounding."""
        rounding = (ROUNDING + self._output) * codes.length * self._length + ROUNDING**2 * self.norm
        return codes.length * self._lost + codes.residual * self.norm + rounding

    def products(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """(n, Q) float32: s c·u in units of scale, of codes (n, D) int8 and scales (n,) float32."""
        if len(self.queries) <= FEW:
            found = torch._weight_int8pack_mm(self._rounded, codes, scales.new_ones(len(codes)).bfloat16())
            return found.T.float().mul(scales[:, None]).contiguous()
        return _multiply(codes, self._packed).mul_(scales[:, None])


def _pack(queries: torch.Tensor) -> tuple:
    ones = torch.ones(len(queries)), torch.zeros(len(queries), dtype=torch.int64)
    return torch.ops.onednn.qlinear_prepack(queries, None), *ones


def _multiply(codes: torch.Tensor, packed: tuple) -> torch.Tensor:
    """(n, Q) float32: the products of whole numbers, as they are below 2^24.

    The kernel wants its rows in 0..255: with the sign bit turned they are c + 128. It is torch.compile's for
    quantised networks, two to three times as fast as float32; torch._int_mm is a plain loop without AVX-512.
    """
    shifted = codes.view(torch.uint8).bitwise_xor(128)
    weights, scales, zeros = packed
    return torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, 128, weights, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


@functools.lru_cache
def int8_levels() -> int:
    """How far the whole numbers of queries may go, 127 or 63, for the product to be right; 0: it is not.

    Without VNNI two products are added in 16 bits, which saturate: 2 * 255 * 63 fits, 2 * 255 * 127 does not.
    """
    rng = np.random.RandomState(0)
    signs = torch.from_numpy(rng.choice(np.array([-1, 1], np.int8), (64, 256)))
    signs[:2] = torch.tensor([[1], [-1]])  # all products at their largest
    try:
        for levels in (127, 63):
            for count in (FEW + 1, 64):
                wanted = (127 * signs.double()) @ (levels * signs[:count].double()).T
                if not torch.equal(_multiply(127 * signs, _pack(levels * signs[:count])).double(), wanted):
                    break
            else:
                return levels
    except (AttributeError, RuntimeError):
        pass  # a torch without oneDNN, or with another kernel of that name
    return 0


@functools.lru_cache
def few_products() -> bool:
    """Whether the product for FEW queries is there and keeps its bound."""
    rng = np.random.RandomState(0)
    rows, queries = torch.from_numpy(rng.randint(-127, 128, (64, 256)).astype(np.int8)), torch.ones(1, 256)
    rows[:2] = torch.tensor([[127], [-127]])
    try:
        found = torch._weight_int8pack_mm(queries.bfloat16(), rows, torch.ones(64).bfloat16())
    except (AttributeError, RuntimeError):
        return False
    wanted = queries.double() @ rows.double().T
    return bool(((found.double() - wanted).abs() <= (BFLOAT16 + ROUNDING) * 127 * 256).all())


def coded_queries(queries: np.ndarray) -> CodedQueries | None:
    """CodedQueries of queries (Q, D); None where this machine's products are not to be relied on."""
    if not has_codes(queries.shape[1]) or not (few_products() if len(queries) <= FEW else int8_levels()):
        return None
    return CodedQueries(queries)
