"""Statistics of stored values, per site: what normalisation and calibration need, without another pass.

Every bucket records float64 sums over the decoded values of its finite rows; a row with NaN or infinity is counted
and left out. `merge` adds the sums of many buckets without any rounding, however they are grouped, and `rounded` rounds
once at the end. So merged figures depend neither on the order of buckets nor on how many workers merged them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numba
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from actstore.errors import StoreError
from actstore.store.format.bits import wide
from actstore.store.format.sealed import HexFloat, Vectors

NAMED_ROWS = 8
"""Rows with NaN or infinity whose numbers are kept."""
MAX_PARTS = 64
"""Vectors of an expansion: float64 has 2,098 bits of exponent and 53 of significand, so 40 hold any sum."""
_LONG = 4
"""Vectors of an expansion before it is compressed."""
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Sums(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, eq=False):
    """Sums over the rows of one site.

    A sum is a vector [d] (a number, for `clipped_sq`). Where it must be exact, as in the parts of the manifest, it is
    an expansion in the sense of Shewchuk (Adaptive Precision Floating-Point Arithmetic, 1997, sec. 2.3): several
    vectors one after another, whose exact sum is meant.
    """

    rows: Count
    """All rows, also those that the sums leave out."""
    total: Vectors = msgspec.field(name="sum")
    """Per dimension sum of values of finite rows [d]."""
    squares: Vectors = msgspec.field(name="sum_sq")
    """Per dimension sum of squared values of finite rows [d]."""
    max_abs: HexFloat
    """Largest magnitude in finite rows."""
    saturated: Count
    """Values outside the encoding's range; always 0 for lossless encodings."""
    clipped_sq: Vectors
    """Sum of the squared errors of saturated values [1]."""
    nonfinite: Count
    """Rows that hold NaN or infinity."""
    nonfinite_rows: tuple[Count, ...]
    """Numbers of the first `NAMED_ROWS` of them."""

    @property
    def finite_rows(self) -> int:
        """Rows that the sums are over."""
        return self.rows - self.nonfinite

    def clipped_fvu(self) -> float:
        """FVU that clipping saturated values adds: their squared error over the variance of all values."""
        clipped = float(self.clipped_sq[0])
        spread = float((self.squares - self.total**2 / max(self.finite_rows, 1)).sum()) + clipped
        return clipped / spread if clipped else 0.0

    def remarks(self, what: str) -> list[str]:
        """What a user should know of these rows, a line each; `what` names them."""
        found: list[str] = []
        if self.saturated:
            found.append(
                f"{what}: {self.saturated} values were clipped, outside the range that the first bucket set; that adds "
                f"an FVU of {self.clipped_fvu():.2g}"
            )
        if self.nonfinite:
            more = ", ..." if self.nonfinite > len(self.nonfinite_rows) else ""
            rows = ", ".join(map(str, self.nonfinite_rows))
            found.append(f"{what}: {self.nonfinite} rows hold NaN or infinity: row {rows}{more}")
        return found


@dataclass(frozen=True, kw_only=True)
class SiteStats:
    """Statistics of a site over committed rows."""

    rows: int
    """All rows; the figures below are over finite ones."""
    mean: NDArray[np.float64]
    """Per dimension mean [d]."""
    variance: NDArray[np.float64]
    """Per dimension variance about the mean [d]."""
    mean_sq_norm: float
    """E||x||^2; Gemma Scope divides by its square root (arXiv 2408.05147, sec. 3.1)."""
    max_abs: float
    saturated: int
    clipped_fvu: float
    """FVU that saturated values add."""
    nonfinite: int
    """Rows that hold NaN or infinity."""
    nonfinite_rows: tuple[int, ...]
    """Numbers of the first of them."""


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def _accumulate(bits: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums and sums of squares of rows given as bits; eight rows at a time, for few passes over the sums."""
    n, d = bits.shape
    total, squares = np.zeros(d), np.zeros(d)
    whole = n - n % 8
    for i in range(0, whole, 8):
        r0, r1, r2, r3 = bits[i], bits[i + 1], bits[i + 2], bits[i + 3]
        r4, r5, r6, r7 = bits[i + 4], bits[i + 5], bits[i + 6], bits[i + 7]
        for k in range(d):
            a, b = wide(r0[k]), wide(r1[k])
            c, e = wide(r2[k]), wide(r3[k])
            f, g = wide(r4[k]), wide(r5[k])
            h, j = wide(r6[k]), wide(r7[k])
            total[k] += ((a + b) + (c + e)) + ((f + g) + (h + j))
            squares[k] += ((a * a + b * b) + (c * c + e * e)) + ((f * f + g * g) + (h * h + j * j))
    for i in range(whole, n):
        for k in range(d):
            a = wide(bits[i, k])
            total[k] += a
            squares[k] += a * a
    return total, squares


@numba.njit(nogil=True, cache=True)
def top_magnitude(bits: NDArray[Any], magnitude: Any) -> Any:
    """Greatest of the bits without the sign: their order is the order of magnitudes, NaN last."""
    top = magnitude & ~magnitude
    for i in range(bits.shape[0]):
        top = max(top, bits[i] & magnitude)
    return top


def as_bits(rows: NDArray[Any]) -> NDArray[Any]:
    """Rows of bf16 bits (uint16) or float32 as the unsigned integers that `wide` takes."""
    return rows if rows.dtype == np.uint16 else rows.view(np.uint32)


def finite_mask(bits: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows [n, d] of bf16 or float32 bits hold neither NaN nor infinity."""
    exponent = bits.dtype.type(0x7F80 if bits.dtype == np.uint16 else 0x7F800000)
    return ((bits & exponent) != exponent).all(axis=1)


def sums(rows: NDArray[Any]) -> Sums:
    """Sums of rows [n, d], given as bfloat16 bits (uint16) or float32; rows are numbered from 0."""
    bits, bad = as_bits(rows), np.empty(0, np.int64)
    total, squares = _accumulate(bits)
    if not (np.isfinite(total).all() and np.isfinite(squares).all()):  # the squares of any float32 fit float64
        finite = finite_mask(bits)
        bits, bad = bits[finite], np.flatnonzero(~finite)
        total, squares = _accumulate(bits)
    shift = 32 - 8 * bits.dtype.itemsize
    top = int(top_magnitude(bits.reshape(-1), bits.dtype.type(0x7FFFFFFF >> shift)))
    return Sums(
        rows=rows.shape[0],
        total=total,
        squares=squares,
        max_abs=HexFloat(np.array([top << shift], np.uint32).view(np.float32)[0]),
        saturated=0,
        clipped_sq=np.zeros(1),
        nonfinite=len(bad),
        nonfinite_rows=tuple(bad[:NAMED_ROWS].tolist()),
    )


def none(d: int) -> Sums:
    """The sums of no rows of width d."""
    return sums(np.empty((0, d), np.float32))


def add(a: Sums, b: Sums) -> Sums:
    """The sums of two runs of rows, the second numbered on from the first; in float64, in the order of rows."""
    return _joined(a, replace(b, nonfinite_rows=tuple(a.rows + r for r in b.nonfinite_rows)), lambda x, y, _: x + y, 1)


def merge(a: Sums, b: Sums, d: int) -> Sums:
    """The exact sums of rows of width d, which have their numbers in the store."""
    return _joined(a, b, _plus, d)


def rounded(s: Sums, d: int) -> Sums:
    """Exact sums of rows of width d, each rounded once."""
    return replace(s, total=_round(s.total, d), squares=_round(s.squares, d), clipped_sq=_round(s.clipped_sq, 1))


def _joined(a: Sums, b: Sums, plus: Callable[[Vectors, Vectors, int], Vectors], d: int) -> Sums:
    return Sums(
        rows=a.rows + b.rows,
        total=plus(a.total, b.total, d),
        squares=plus(a.squares, b.squares, d),
        max_abs=max(a.max_abs, b.max_abs),
        saturated=a.saturated + b.saturated,
        clipped_sq=plus(a.clipped_sq, b.clipped_sq, 1),
        nonfinite=a.nonfinite + b.nonfinite,
        nonfinite_rows=tuple(sorted({*a.nonfinite_rows, *b.nonfinite_rows})[:NAMED_ROWS]),
    )


def _plus(a: Vectors, b: Vectors, d: int) -> Vectors:
    expansion = list(a.reshape(-1, d))
    for vector in b.reshape(-1, d):
        _grow(expansion, vector)
    return np.concatenate(expansion)


def _round(expansion: Vectors, d: int) -> Vectors:
    return np.array([math.fsum(values) for values in expansion.reshape(-1, d).T.tolist()])


def _grow(expansion: list[NDArray[np.float64]], x: NDArray[np.float64]) -> None:
    """Add a vector [d] to an expansion, in place, without rounding; finite values only."""
    for i, part in enumerate(expansion):
        high = part + x
        rest = high - part
        expansion[i] = (part - (high - rest)) + (x - rest)  # Knuth's TwoSum: part + x == high + this, exactly
        x = high
    expansion.append(x)
    expansion[:] = [part for part in expansion if part.any()] or [x]
    if len(expansion) > _LONG:
        _compress(expansion)


def _compress(expansion: list[NDArray[np.float64]]) -> None:
    """Move what an expansion holds into few vectors: sums upwards, until nothing moves."""
    while True:
        before = len(expansion)
        for i in range(before - 1, 0, -1):
            a, b = expansion[i], expansion[i - 1]
            high = a + b
            rest = high - a
            expansion[i], expansion[i - 1] = high, (a - (high - rest)) + (b - rest)
        expansion[:] = [part for part in expansion if part.any()] or expansion[-1:]
        if len(expansion) >= before:
            return


def summarise(s: Sums) -> SiteStats:
    """Mean, variance and norms from sums; NaN where no row is finite."""
    n = s.finite_rows
    with np.errstate(all="ignore"):
        mean = s.total / n if n else np.full_like(s.total, np.nan)
        variance = np.maximum(s.squares / max(n, 1) - mean**2, 0.0)
    return SiteStats(
        rows=s.rows,
        mean=mean,
        variance=variance,
        mean_sq_norm=math.fsum(s.squares) / n if n else math.nan,
        max_abs=s.max_abs,
        saturated=s.saturated,
        clipped_fvu=s.clipped_fvu(),
        nonfinite=s.nonfinite,
        nonfinite_rows=s.nonfinite_rows,
    )


def check(found: Sums, rows: int, d: int, where: str, *, parts: int = 1) -> None:
    """`StoreError` unless sums that were read can be of so many rows of width d, in at most `parts` vectors."""
    for name, size, width in (
        ("sum", found.total.size, d),
        ("sum_sq", found.squares.size, d),
        ("clipped_sq", found.clipped_sq.size, 1),
    ):
        if size % width or not width <= size <= parts * width:
            raise StoreError(
                f"{where}: {name} of the statistics has {size} values, expected {width} or up to {parts} times that"
            )
    if found.rows != rows:
        raise StoreError(f"{where}: statistics are of {found.rows} rows, expected {rows}")
    if found.nonfinite > rows or len(found.nonfinite_rows) != min(found.nonfinite, NAMED_ROWS):
        raise StoreError(
            f"{where}: statistics count {found.nonfinite} rows with NaN or infinity of {rows} rows, and name "
            f"{len(found.nonfinite_rows)} of them"
        )
