"""Row gather from decoded chunks, fused with the merge of byte planes.

One pass over the output: a row is put together from its planes while it is copied, so shuffling costs no pass of its
own. Codes of `fixed` become bf16 by a fused multiply-add in float32: the exact value rounded to float32, as the format
has it (there in float64, whose own rounding differs once in 2^29 values, by the last of float32's bits). numba kernels
without the GIL; on bf16 rows of 2304 0.74 of a plain copy on one core (`benchmarks/io.md`).
"""

import math
from typing import Any, Final

import numba
import numpy as np
from numpy.typing import NDArray

from actstore.store.format.bits import bf16_bits, fused, wide
from actstore.store.format.fixed import Calibration

_BLOCK: Final = 64
"""Rows converted at a time."""


@numba.njit(nogil=True, cache=True)
def _planes2(
    pool: NDArray[np.uint8], buffer: NDArray[np.int64], row: NDArray[np.int64], out: NDArray[np.uint16]
) -> None:
    d = out.shape[1]
    half = pool.shape[1] // 2
    for i in range(out.shape[0]):
        start = row[i] * d
        low = pool[buffer[i], start : start + d]
        high = pool[buffer[i], half + start : half + start + d]
        target = out[i]
        for k in range(d):
            target[k] = np.uint16(low[k]) | (np.uint16(high[k]) << np.uint16(8))


@numba.njit(nogil=True, cache=True)
def _planes4(
    pool: NDArray[np.uint8], buffer: NDArray[np.int64], row: NDArray[np.int64], out: NDArray[np.uint32]
) -> None:
    d = out.shape[1]
    quarter = pool.shape[1] // 4
    for i in range(out.shape[0]):
        start = row[i] * d
        b = pool[buffer[i]]
        p0 = b[start : start + d]
        p1 = b[quarter + start : quarter + start + d]
        p2 = b[2 * quarter + start : 2 * quarter + start + d]
        p3 = b[3 * quarter + start : 3 * quarter + start + d]
        target = out[i]
        for k in range(d):
            low = np.uint32(p0[k]) | (np.uint32(p1[k]) << np.uint32(8))
            target[k] = low | (np.uint32(p2[k]) << np.uint32(16)) | (np.uint32(p3[k]) << np.uint32(24))


@numba.njit(nogil=True, cache=True)
def _elements(
    pool: NDArray[np.uint64], buffer: NDArray[np.int64], row: NDArray[np.int64], out: NDArray[np.uint64]
) -> None:
    width = out.shape[1]
    for i in range(out.shape[0]):
        start = row[i] * width
        source = pool[buffer[i], start : start + width]
        target = out[i]
        for k in range(width):
            target[k] = source[k]


@numba.njit(nogil=True, cache=True)
def _fixed_planes(
    pool: NDArray[np.uint8],
    buffer: NDArray[np.int64],
    row: NDArray[np.int64],
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
    out: NDArray[np.uint16],
) -> None:
    d = out.shape[1]
    half = pool.shape[1] // 2
    for i in range(out.shape[0]):
        start = row[i] * d
        low = pool[buffer[i], start : start + d]
        high = pool[buffer[i], half + start : half + start + d]
        target = out[i]
        for k in range(d):
            code = np.int16(np.uint16(low[k]) | (np.uint16(high[k]) << np.uint16(8)))
            target[k] = bf16_bits(fused(np.float32(code), scale[k], offset[k]))  # pyright: ignore[reportCallIssue]  numba passes the context


@numba.njit(nogil=True, cache=True)
def _fixed_elements(
    pool: NDArray[np.int16],
    buffer: NDArray[np.int64],
    row: NDArray[np.int64],
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
    out: NDArray[np.uint16],
) -> None:
    d = out.shape[1]
    for i in range(out.shape[0]):
        codes = pool[buffer[i], row[i] * d : (row[i] + 1) * d]
        target = out[i]
        for k in range(d):
            target[k] = bf16_bits(fused(np.float32(codes[k]), scale[k], offset[k]))  # pyright: ignore[reportCallIssue]  numba passes the context


@numba.njit(nogil=True, cache=True)
def _widen(bits: NDArray[Any], factor: float, out: NDArray[Any]) -> None:
    for i in range(out.shape[0]):
        source, target = bits[i], out[i]
        for k in range(out.shape[1]):
            target[k] = np.float32(wide(source[k]) * factor)


@numba.njit(nogil=True, cache=True)
def _scale(values: NDArray[Any], factor: float, out: NDArray[Any]) -> None:
    for i in range(out.shape[0]):
        source, target = values[i], out[i]
        for k in range(out.shape[1]):
            target[k] = np.float32(np.float64(source[k]) * factor)


@numba.njit(nogil=True, cache=True)
def _dequantise(
    codes: NDArray[Any], scale: NDArray[np.float64], offset: NDArray[np.float64], factor: float, out: NDArray[Any]
) -> None:
    for i in range(out.shape[0]):
        source, target = codes[i], out[i]
        for k in range(out.shape[1]):
            value = np.float32(np.float64(source[k]) * scale[k] + offset[k])
            target[k] = np.float32(np.float64(value) * factor)


@numba.njit(nogil=True, cache=True)
def _narrow(values: NDArray[Any], bits: NDArray[Any], out: NDArray[Any]) -> None:
    for i in range(out.shape[0]):
        source, word, target = values[i], bits[i], out[i]
        for k in range(out.shape[1]):
            rounded = bf16_bits(source[k])
            # rounding could carry a NaN into infinity or over the sign: it stays a quiet NaN
            is_nan = (word[k] & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            target[k] = np.uint16((word[k] >> np.uint32(16)) | np.uint32(64)) if is_nan else rounded


def gather(
    pool: NDArray[np.uint8],
    buffer: NDArray[np.int64],
    row: NDArray[np.int64],
    out: NDArray[np.generic],
    *,
    planes: bool,
    calibration: Calibration | None = None,
) -> None:
    """Fill `out` [n, d] (uint16 or 4-byte elements) with row `row[i]` of decoded chunk `buffer[i]` of the pool.

    `pool` is [chunks, bytes of a chunk]; `planes` says whether chunks hold byte planes or elements. With the
    `calibration` of a `fixed` site the elements are codes, and `out` gets their values as bf16 bits (uint16).
    """
    if calibration is not None:
        steps = calibration.scale, calibration.offset
        if planes:
            _fixed_planes(pool, buffer, row, *steps, out.view(np.uint16))
        else:
            _fixed_elements(pool.view(np.int16), buffer, row, *steps, out.view(np.uint16))
    elif not planes:
        # words as wide as the rows allow: byte by byte is four times slower
        word = np.dtype(f"u{math.gcd(8, out.shape[1] * out.dtype.itemsize)}")
        _elements(pool.view(word), buffer, row, out.view(word))
    elif out.dtype.itemsize == 2:
        _planes2(pool, buffer, row, out.view(np.uint16))
    else:
        _planes4(pool, buffer, row, out.view(np.uint32))


def gather_as(
    pool: NDArray[np.uint8],
    buffer: NDArray[np.int64],
    row: NDArray[np.int64],
    out: NDArray[np.generic],
    *,
    planes: bool,
    itemsize: int,
    factor: float,
    calibration: Calibration | None = None,
) -> None:
    """`gather` with a change of type: `out` [n, d] holds bf16 bits (uint16), float16 or float32.

    Stored elements of `itemsize` bytes become float32(value * factor), computed in float64, then round to the type of
    `out`. Block by block, so that what is between lies in the cache.
    """
    raw = np.empty((min(_BLOCK, len(row)), out.shape[1]), np.dtype(f"u{itemsize}"))
    middle = np.empty(raw.shape, np.float32)
    steps = () if calibration is None else (calibration.scale, calibration.offset)
    wide_steps = tuple(v.astype(np.float64) for v in steps)
    for start in range(0, len(row), _BLOCK):
        stop = min(start + _BLOCK, len(row))
        block, target = raw[: stop - start], out[start:stop]
        values: NDArray[Any] = target if out.dtype == np.float32 else middle[: stop - start]
        gather(pool, buffer[start:stop], row[start:stop], block, planes=planes)
        if wide_steps:
            _dequantise(block.view(np.int16), wide_steps[0], wide_steps[1], factor, values)
        elif itemsize == 2:
            _widen(block, factor, values)
        else:
            _scale(block.view(np.float32), factor, values)
        if out.dtype == np.uint16:
            _narrow(values, values.view(np.uint32), target)
        elif out.dtype == np.float16:
            with np.errstate(over="ignore"):
                np.copyto(target, values, casting="same_kind")
