"""Statistics of stored values, per site: what normalisation and calibration need, without another pass.

Every bucket records float64 sums over its decoded values; `merge` adds them with `math.fsum`, which is correctly
rounded, so the merged figures do not depend on the order of buckets or on who wrote them.
"""

import base64
import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from actstore.errors import StoreError
from actstore.store.format.bits import wide


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over the rows of one site: what commit records hold."""

    rows: int
    total: NDArray[np.float64]
    """Per dimension sum of values [d]."""
    squares: NDArray[np.float64]
    """Per dimension sum of squared values [d]."""
    max_abs: float
    """Largest magnitude; NaN if any value is NaN."""
    saturated: int = 0
    """Values outside the encoding's range; always 0 for lossless encodings."""


@dataclass(frozen=True, kw_only=True)
class SiteStats:
    """Statistics of a site over committed rows."""

    rows: int
    mean: NDArray[np.float64]
    """Per dimension mean [d]."""
    variance: NDArray[np.float64]
    """Per dimension variance about the mean [d]."""
    mean_sq_norm: float
    """E||x||^2; Gemma Scope divides by its square root (arXiv 2408.05147, sec. 3.1)."""
    max_abs: float
    saturated: int


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


def sums(rows: NDArray[Any]) -> Sums:
    """Sums of rows [n, d], given as bfloat16 bits (uint16) or float32."""
    d = rows.shape[1]
    total, squares = np.zeros(d), np.zeros(d)
    bits = as_bits(rows)
    _accumulate(bits, total, squares)
    shift = 32 - 8 * bits.dtype.itemsize
    top = int(top_magnitude(bits.reshape(-1), bits.dtype.type(0x7FFFFFFF >> shift)))
    max_abs = float(np.array([top << shift], np.uint32).view(np.float32)[0])
    return Sums(rows=rows.shape[0], total=total, squares=squares, max_abs=max_abs)


def add(a: Sums, b: Sums) -> Sums:
    """The sums of two runs of rows of one bucket; in float64, so the order of runs is the order of rows."""
    return Sums(
        rows=a.rows + b.rows,
        total=a.total + b.total,
        squares=a.squares + b.squares,
        max_abs=float(np.maximum(a.max_abs, b.max_abs)),
        saturated=a.saturated + b.saturated,
    )


def _fsum(values: NDArray[np.float64]) -> float:
    """`math.fsum`; infinity or NaN where it has no answer: sums that no rows have, but a record can claim."""
    if np.isfinite(values).all():
        with contextlib.suppress(OverflowError):
            return math.fsum(values)
    with np.errstate(all="ignore"):
        return float(values.sum())


def merge(parts: Sequence[Sums]) -> Sums:
    """The sums of several buckets together; independent of their order."""

    def add(columns: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
        return np.array([_fsum(row) for row in np.stack(list(columns), axis=1)])

    tops = np.array([p.max_abs for p in parts])
    return Sums(
        rows=sum(p.rows for p in parts),
        total=add(p.total for p in parts),
        squares=add(p.squares for p in parts),
        max_abs=float(tops.max()),
        saturated=sum(p.saturated for p in parts),
    )


def summarise(s: Sums) -> SiteStats:
    """Mean, variance and norms from sums."""
    mean = s.total / s.rows
    with np.errstate(all="ignore"):
        variance = np.maximum(s.squares / s.rows - mean**2, 0.0)
    return SiteStats(
        rows=s.rows,
        mean=mean,
        variance=variance,
        mean_sq_norm=_fsum(s.squares) / s.rows if np.isfinite(s.squares).all() else math.nan,
        max_abs=s.max_abs,
        saturated=s.saturated,
    )


def _pack(vector: NDArray[np.float64]) -> str:
    return base64.b64encode(vector.astype("<f8").tobytes()).decode()


def to_json(s: Sums) -> dict[str, Any]:
    """JSON form: vectors as base64 of little-endian float64, the maximum as a C99 hexadecimal float."""
    return {
        "rows": s.rows,
        "sum": _pack(s.total),
        "sum_sq": _pack(s.squares),
        "max_abs": s.max_abs.hex(),
        "saturated": s.saturated,
    }


def from_json(data: Any, d: int, where: str) -> Sums:
    """Parse and check `to_json`'s form; `StoreError` names the field."""
    try:
        if set(data) != {"rows", "sum", "sum_sq", "max_abs", "saturated"}:
            raise ValueError(f"has fields {sorted(data)}")
        rows, saturated = data["rows"], data["saturated"]
        if type(rows) is not int or type(saturated) is not int or rows < 0 or saturated < 0:
            raise ValueError(f"rows is {rows!r}, saturated is {saturated!r}")
        total, squares = (np.frombuffer(base64.b64decode(data[k], validate=True), "<f8") for k in ("sum", "sum_sq"))
        if len(total) != d or len(squares) != d:
            raise ValueError(f"sum has {len(total)} and sum_sq {len(squares)} values, the site has {d}")
        return Sums(
            rows=rows, total=total, squares=squares, max_abs=float.fromhex(data["max_abs"]), saturated=saturated
        )
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as e:
        raise StoreError(f"{where}: statistics are malformed ({str(e)[:200]})") from e
