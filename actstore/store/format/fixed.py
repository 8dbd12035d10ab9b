"""Encoding `fixed(eps)`: int16 codes whose rounding adds an FVU of eps.

Rounding to a step s adds s^2 / 12 of squared error per value, so with a step of `sqrt(12 * eps) * sigma` in every
dimension the added error is eps of the variance: of the whole, and of each dimension. `calibrate` takes sigma and
mean from a sample, once per site. Where a few giant rows make most of a dimension's variance, its step is wider than
what the other rows span, and rounding errs by less or more than s^2 / 12: so steps are scaled until the error that is
measured on rows of the sample is eps. Every value of the store is then

    value = float32(scale * code + offset)      in float64, which is exact up to the last rounding

with `offset = mean - 128 * scale`: codes lie around 128, so that their high byte is almost always zero and the entropy
coder drops it. A value beyond the codes is clipped; clipped values and their squared error are counted, and a bucket
whose clipping alone adds more than eps is refused (`write/bucket.py`). Against a mantissa rounded to 4 bits (bf16
planes, added FVU 2-5e-4, ratio 2.0) `fixed(1e-3)` reaches 3.0 at an error that one chooses. NaN and infinity have no
code.

The error is relative to the variance of the sample: rows far longer than any in the sample make it smaller than eps.
"""

import math
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from actstore.errors import IntegrityError
from actstore.store.format.bits import wide
from actstore.store.format.codec import CRC_BYTES, Crc, crc32c
from actstore.store.format.stats import Sums, as_bits, finite_mask, summarise

CENTRE = 128
"""Code of the mean."""
CALIBRATION_ROWS = 1 << 13
"""Rows that are enough to measure the error on: rounding errors, unlike variances, have no heavy tails."""
_ROUNDS = 3
_BLOCK = 256
_LEAST_SHARE = 2.0**-16
"""Least sigma of a dimension in units of the largest: constant dimensions need a step too."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """Steps and offsets of a `fixed` site."""

    scale: NDArray[np.float32]
    """Step per dimension [d], positive."""
    offset: NDArray[np.float32]
    """Value of code 0 per dimension [d]."""


def calibrate(sample: Sums, eps: float, rows: NDArray[Any]) -> Calibration:
    """Steps for an added FVU of eps from the statistics of a sample, and rows [n, d] of it to measure the error on.

    All must be finite; `rows` are bf16 bits (uint16) or float32.
    """
    s = summarise(sample)
    sigma = np.sqrt(s.variance)
    largest = float(sigma.max()) or float(np.abs(s.mean).max()) or 1.0
    steps = math.sqrt(12 * eps) * np.maximum(sigma, _LEAST_SHARE * largest)
    made, factor = _with_steps(steps, s.mean), 1.0
    # sums of squares don't resolve less variance than that
    resolved = s.variance.sum() > 1e-9 * float(np.square(s.mean).sum())
    for _ in range(_ROUNDS if resolved else 0):
        error = _error(rows, made)
        if error <= 0:
            break
        factor = min(max(factor * math.sqrt(eps * s.variance.sum() / error), 0.5), 2.0)
        made = _with_steps(factor * steps, s.mean)
    return made


def _with_steps(steps: NDArray[np.float64], mean: NDArray[np.float64]) -> Calibration:
    finest = np.maximum(np.abs(mean) * 2.0**-23, np.finfo(np.float32).tiny)  # what float32 offsets and values resolve
    scale = np.maximum(steps, finest).astype(np.float32)
    return Calibration(scale=scale, offset=(mean - CENTRE * scale.astype(np.float64)).astype(np.float32))


def _error(rows: NDArray[Any], calibration: Calibration) -> float:
    """Mean squared error of a row, summed over dimensions, that the codes add."""
    total = 0.0
    for start in range(0, len(rows), _BLOCK):
        bits = as_bits(rows[start : start + _BLOCK])
        codes, values = np.empty(bits.shape, np.int16), np.empty(bits.shape, np.float32)
        quantise(bits, calibration, codes, values)
        exact = bits.astype(np.uint32) << np.uint32(32 - 8 * bits.dtype.itemsize)
        total += float(((values.astype(np.float64) - exact.view(np.float32)) ** 2).sum())
    return total / len(rows)


def to_bytes(calibration: Calibration) -> bytes:
    """The calibration array's only chunk: scale, offset, crc32c."""
    plain = calibration.scale.astype("<f4").tobytes() + calibration.offset.astype("<f4").tobytes()
    return plain + crc32c(plain).to_bytes(CRC_BYTES, "little")


def digest(data: bytes) -> Crc:
    """What commit records name a calibration by: its crc32c."""
    return Crc.from_bytes(data[-CRC_BYTES:], "little")


def from_bytes(data: bytes, d: int, where: str) -> Calibration:
    """Parse and check `to_bytes`; `IntegrityError` names the object."""
    expected = 8 * d + CRC_BYTES
    if len(data) != expected:
        raise IntegrityError(f"{where}: has {len(data)} bytes, expected {expected}")
    if crc32c(data[:-CRC_BYTES]) != digest(data):
        raise IntegrityError(f"{where}: fails its crc32c; the calibration is damaged")
    scale, offset = np.frombuffer(data, "<f4", 2 * d).reshape(2, d)
    if not (np.isfinite(scale) & (scale > 0) & np.isfinite(offset)).all():
        raise IntegrityError(f"{where}: scales must be positive and finite, offsets finite")
    return Calibration(scale=scale, offset=offset)


@numba.njit(nogil=True, cache=True)
def _quantise(
    bits: NDArray[Any],
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
    codes: NDArray[np.int16],
    values: NDArray[np.float32],
) -> tuple[int, float]:
    n, d = bits.shape
    inverse = np.empty(d)
    for k in range(d):
        inverse[k] = 1.0 / np.float64(scale[k])
    saturated, clipped_sq = 0, 0.0
    for i in range(n):
        row, code_row, value_row = bits[i], codes[i], values[i]
        for k in range(d):
            code = np.rint((wide(row[k]) - np.float64(offset[k])) * inverse[k])
            kept = min(max(code, -32768.0), 32767.0)
            code_row[k] = np.int16(kept)
            value_row[k] = np.float32(kept * np.float64(scale[k]) + np.float64(offset[k]))
            if kept != code:
                saturated += 1
                clipped_sq += (wide(row[k]) - np.float64(value_row[k])) ** 2
    return saturated, clipped_sq


def quantise(
    bits: NDArray[Any], calibration: Calibration, codes: NDArray[np.int16], values: NDArray[np.float32]
) -> tuple[int, float]:
    """Codes and decoded values of finite rows [n, d] (bf16 or float32 bits).

    Returns how many values were clipped, and the sum of their squared errors.
    """
    return _quantise(bits, calibration.scale, calibration.offset, codes, values)


@numba.njit(nogil=True, cache=True)
def _dequantise(
    codes: NDArray[np.int16], scale: NDArray[np.float32], offset: NDArray[np.float32], values: NDArray[np.float32]
) -> None:
    for i in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            value = np.float64(codes[i, k]) * np.float64(scale[k]) + np.float64(offset[k])
            values[i, k] = np.float32(value)


def dequantise(codes: NDArray[np.int16], calibration: Calibration) -> NDArray[np.float32]:
    """Values [n, d] of codes [n, d]."""
    values = np.empty(codes.shape, np.float32)
    _dequantise(codes, calibration.scale, calibration.offset, values)
    return values


def first_not_finite(bits: NDArray[Any]) -> int | None:
    """Index of the first row [n, d] of bf16 or float32 bits that holds NaN or infinity."""
    bad = ~finite_mask(bits)
    return int(bad.argmax()) if bad.any() else None
