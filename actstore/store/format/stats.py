"""Statistics of stored values, per site: what normalisation and calibration need, without another pass.

Every bucket records float64 sums over the decoded values of its finite rows; a row with NaN or infinity is counted
and left out. `Exact` adds the sums of many buckets without any rounding, however they are grouped, and rounds once at
the end. So merged figures depend neither on the order of buckets nor on how many workers merged them.
"""

import base64
import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import numba
import numpy as np
from numpy.typing import NDArray

from actstore.errors import StoreError
from actstore.store.format.bits import wide

NAMED_ROWS = 8
"""Rows with NaN or infinity whose numbers are kept."""


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over the rows of one site: what commit records hold."""

    rows: int
    """All rows, also those that the sums leave out."""
    total: NDArray[np.float64]
    """Per dimension sum of values of finite rows [d]."""
    squares: NDArray[np.float64]
    """Per dimension sum of squared values of finite rows [d]."""
    max_abs: float
    """Largest magnitude in finite rows."""
    saturated: int = 0
    """Values outside the encoding's range; always 0 for lossless encodings."""
    clipped_sq: float = 0.0
    """Sum of the squared errors of saturated values."""
    nonfinite: int = 0
    """Rows that hold NaN or infinity."""
    nonfinite_rows: tuple[int, ...] = ()
    """Numbers of the first `NAMED_ROWS` of them."""

    @property
    def finite_rows(self) -> int:
        """Rows that the sums are over."""
        return self.rows - self.nonfinite

    def clipped_fvu(self) -> float:
        """FVU that clipping saturated values adds: their squared error over the variance of all values."""
        spread = float((self.squares - self.total**2 / max(self.finite_rows, 1)).sum()) + self.clipped_sq
        return self.clipped_sq / spread if self.clipped_sq else 0.0

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
def _accumulate(bits: NDArray[Any], total: NDArray[np.float64], squares: NDArray[np.float64]) -> None:
    """Add rows given as bits; eight rows at a time, for few passes over the sums."""
    n, d = bits.shape
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
    bits, d = as_bits(rows), rows.shape[1]
    total, squares = np.zeros(d), np.zeros(d)
    _accumulate(bits, total, squares)
    bad = np.empty(0, np.int64)
    if not (np.isfinite(total).all() and np.isfinite(squares).all()):  # the squares of any float32 fit float64
        finite = finite_mask(bits)
        bits, bad = bits[finite], np.flatnonzero(~finite)
        total, squares = np.zeros(d), np.zeros(d)
        _accumulate(bits, total, squares)
    shift = 32 - 8 * bits.dtype.itemsize
    top = int(top_magnitude(bits.reshape(-1), bits.dtype.type(0x7FFFFFFF >> shift)))
    return Sums(
        rows=rows.shape[0],
        total=total,
        squares=squares,
        max_abs=float(np.array([top << shift], np.uint32).view(np.float32)[0]),
        nonfinite=len(bad),
        nonfinite_rows=tuple(bad[:NAMED_ROWS].tolist()),
    )


def add(a: Sums, b: Sums) -> Sums:
    """The sums of two runs of rows, the second numbered on from the first; in float64, in the order of rows."""
    return Sums(
        rows=a.rows + b.rows,
        total=a.total + b.total,
        squares=a.squares + b.squares,
        max_abs=max(a.max_abs, b.max_abs),
        saturated=a.saturated + b.saturated,
        clipped_sq=a.clipped_sq + b.clipped_sq,
        nonfinite=a.nonfinite + b.nonfinite,
        nonfinite_rows=(*a.nonfinite_rows, *(a.rows + r for r in b.nonfinite_rows))[:NAMED_ROWS],
    )


@dataclass
class Exact:
    """Sums of one site over several buckets, without rounding.

    Each of `total` and `squares` is a list of float64 vectors [d] whose exact sum is the sum of all that was added:
    expansions in the sense of Shewchuk (Adaptive Precision Floating-Point Arithmetic, 1997, sec. 2.3).
    """

    total: list[NDArray[np.float64]] = field(default_factory=list[NDArray[np.float64]])
    squares: list[NDArray[np.float64]] = field(default_factory=list[NDArray[np.float64]])
    clipped_sq: list[NDArray[np.float64]] = field(default_factory=list[NDArray[np.float64]])
    rows: int = 0
    saturated: int = 0
    nonfinite: int = 0
    max_abs: float = 0.0
    nonfinite_rows: tuple[int, ...] = ()

    def add(self, bucket: Sums) -> None:
        """Add a bucket, whose named rows have their numbers in the store."""
        self._count(bucket)
        grow(self.total, bucket.total)
        grow(self.squares, bucket.squares)
        grow(self.clipped_sq, np.array([bucket.clipped_sq]))

    def merge(self, other: "Exact") -> None:
        """Add what another one holds."""
        self._count(other)
        for mine, theirs in (
            (self.total, other.total),
            (self.squares, other.squares),
            (self.clipped_sq, other.clipped_sq),
        ):
            for vector in theirs:
                grow(mine, vector)

    def _count(self, other: "Sums | Exact") -> None:
        self.rows += other.rows
        self.saturated += other.saturated
        self.nonfinite += other.nonfinite
        self.max_abs = max(self.max_abs, other.max_abs)
        self.nonfinite_rows = tuple(sorted({*self.nonfinite_rows, *other.nonfinite_rows})[:NAMED_ROWS])

    def rounded(self) -> Sums:
        """The sums, each rounded once."""
        return Sums(
            rows=self.rows,
            total=_round(self.total),
            squares=_round(self.squares),
            max_abs=self.max_abs,
            saturated=self.saturated,
            clipped_sq=float(_round(self.clipped_sq)[0]),
            nonfinite=self.nonfinite,
            nonfinite_rows=self.nonfinite_rows,
        )


def grow(expansion: list[NDArray[np.float64]], x: NDArray[np.float64]) -> None:
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


_LONG = 4


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


def _round(expansion: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.array([math.fsum(values) for values in np.stack(expansion, axis=1)])


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


Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
MAX_PARTS = 64
"""Vectors of an expansion: float64 has 2,098 bits of exponent and 53 of significand, so 40 hold any sum."""

MAX_SUM = 2.0**400
"""No sum of squares of float32 values reaches it; below it, adding never overflows."""


class Wire(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """JSON form of `Sums` and `Exact`: vectors as base64 of little-endian float64, floats as C99 hexadecimal ones.

    An expansion's vectors follow each other in one string.
    """

    rows: Count
    sum: str
    sum_sq: str
    max_abs: str
    saturated: Count
    clipped_sq: str
    nonfinite: Count
    nonfinite_rows: list[Count]


def to_wire(s: "Sums | Exact") -> dict[str, Any]:
    """JSON form."""
    many = isinstance(s, Exact)
    return {
        "rows": s.rows,
        "sum": _pack(*s.total) if many else _pack(s.total),
        "sum_sq": _pack(*s.squares) if many else _pack(s.squares),
        "max_abs": s.max_abs.hex(),
        "saturated": s.saturated,
        "clipped_sq": _pack(*s.clipped_sq) if many else _pack(np.array([s.clipped_sq])),
        "nonfinite": s.nonfinite,
        "nonfinite_rows": s.nonfinite_rows,
    }


def _pack(*vectors: NDArray[np.float64]) -> str:
    return base64.b64encode(b"".join(v.astype("<f8").tobytes() for v in vectors)).decode()


def exact_from_wire(wire: Wire, d: int, where: str) -> Exact:
    """Check the JSON form of a site of width d; `StoreError` names the field."""
    try:
        if wire.nonfinite > wire.rows or len(wire.nonfinite_rows) != min(wire.nonfinite, NAMED_ROWS):
            raise ValueError(f"nonfinite is {wire.nonfinite} of {wire.rows} rows, named {wire.nonfinite_rows}")
        top = float.fromhex(wire.max_abs)
        if not 0 <= top < math.inf:
            raise ValueError(f"max_abs is {top}")
        return Exact(
            total=_unpack(wire.sum, d, "sum"),
            squares=_unpack(wire.sum_sq, d, "sum_sq"),
            clipped_sq=_unpack(wire.clipped_sq, 1, "clipped_sq"),
            rows=wire.rows,
            saturated=wire.saturated,
            nonfinite=wire.nonfinite,
            max_abs=top,
            nonfinite_rows=tuple(wire.nonfinite_rows),
        )
    except (ValueError, OverflowError) as e:
        raise StoreError(f"{where}: statistics are malformed ({str(e)[:200]})") from e


def sums_from_wire(wire: Wire, d: int, where: str) -> Sums:
    """The same for one bucket's sums, whose vectors are single."""
    found = exact_from_wire(wire, d, where)
    if (len(found.total), len(found.squares), len(found.clipped_sq)) != (1, 1, 1):
        raise StoreError(f"{where}: statistics are malformed (several vectors where one is expected)")
    return Sums(
        rows=found.rows,
        total=found.total[0],
        squares=found.squares[0],
        max_abs=found.max_abs,
        saturated=found.saturated,
        clipped_sq=float(found.clipped_sq[0][0]),
        nonfinite=found.nonfinite,
        nonfinite_rows=found.nonfinite_rows,
    )


def _unpack(text: str, d: int, name: str) -> list[NDArray[np.float64]]:
    values = np.frombuffer(base64.b64decode(text, validate=True), "<f8")
    if not len(values) or len(values) % d or len(values) > MAX_PARTS * d or not (np.abs(values) < MAX_SUM).all():
        raise ValueError(f"{name} has {len(values)} values for a width of {d}, all expected below {MAX_SUM}")
    return list(values.reshape(-1, d))
