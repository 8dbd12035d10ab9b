"""Row gather from decoded chunks, fused with the merge of byte planes.

One pass over the output: a row is put together from its planes while it is copied, so shuffling costs no pass of its
own. Codes of `fixed` become bf16 by a fused multiply-add in float32: the exact value rounded to float32, as the format
has it (there in float64, whose own rounding differs once in 2^29 values, by the last of float32's bits). numba kernels
without the GIL; on bf16 rows of 2304 0.74 of a plain copy on one core (`benchmarks/io.md`).
"""

from typing import Any, Final

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from actstore.store.format.bits import bf16_bits, fused, wide
from actstore.store.format.fixed import Calibration
from actstore.store.format.spec import ArraySpec

_BLOCK: Final = 64
"""Rows converted at a time."""
_Integers = NDArray[np.int64]


@intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    """The bytes at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint8)(address), generate


@numba.njit(nogil=True, inline="always")
def _bytes_at(address: int, n: int) -> NDArray[np.uint8]:
    return numba.carray(_pointer(address), (n,))  # pyright: ignore[reportCallIssue]  numba passes the context


@numba.njit(nogil=True, cache=True)
def _planes2(
    address: _Integers, buffer: _Integers, row: _Integers, rows: int, d: int, at: int, out: NDArray[np.uint16]
) -> None:
    for i in range(out.shape[0]):
        start = address[buffer[i]] + row[i] * d
        low, high, target = _bytes_at(start, d), _bytes_at(start + rows * d, d), out[i, at : at + d]
        for k in range(d):
            target[k] = np.uint16(low[k]) | (np.uint16(high[k]) << np.uint16(8))


@numba.njit(nogil=True, cache=True)
def _planes4(
    address: _Integers, buffer: _Integers, row: _Integers, rows: int, d: int, at: int, out: NDArray[np.uint32]
) -> None:
    plane = rows * d
    for i in range(out.shape[0]):
        start = address[buffer[i]] + row[i] * d
        p0, p1 = _bytes_at(start, d), _bytes_at(start + plane, d)
        p2, p3 = _bytes_at(start + 2 * plane, d), _bytes_at(start + 3 * plane, d)
        target = out[i, at : at + d]
        for k in range(d):
            low = np.uint32(p0[k]) | (np.uint32(p1[k]) << np.uint32(8))
            target[k] = low | (np.uint32(p2[k]) << np.uint32(16)) | (np.uint32(p3[k]) << np.uint32(24))


@numba.njit(nogil=True, cache=True)
def _elements(
    address: _Integers, buffer: _Integers, row: _Integers, width: int, at: int, out: NDArray[np.uint8]
) -> None:
    for i in range(out.shape[0]):
        source, target = _bytes_at(address[buffer[i]] + row[i] * width, width), out[i, at : at + width]
        for k in range(width):
            target[k] = source[k]


@numba.njit(nogil=True, cache=True)
def _fixed(
    codes: NDArray[np.int16], scale: NDArray[np.float32], offset: NDArray[np.float32], at: int, out: NDArray[np.uint16]
) -> None:
    for i in range(out.shape[0]):
        source, target = codes[i], out[i, at : at + codes.shape[1]]
        for k in range(codes.shape[1]):
            target[k] = bf16_bits(fused(np.float32(source[k]), scale[k], offset[k]))  # pyright: ignore[reportCallIssue]  numba passes the context


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
    address: NDArray[np.int64],
    buffer: NDArray[np.int64],
    row: NDArray[np.int64],
    out: NDArray[np.generic],
    array: ArraySpec,
    calibration: Calibration | None = None,
    at: int = 0,
) -> None:
    """Fill `out` [n, width], from column `at` on, with row `row[i]` of the decoded chunk at `address[buffer[i]]`.

    Elements come as they are stored; with the `calibration` of a `fixed` site they are codes, and `out` gets their
    values as bf16 bits (uint16).
    """
    if calibration is None:
        _stored(address, buffer, row, out, array, at)
        return
    d = array.shape[1]
    codes = np.empty((min(_BLOCK, len(row)), d), np.int16)
    for start in range(0, len(row), _BLOCK):
        here = slice(start, min(start + _BLOCK, len(row)))
        block = codes[: here.stop - start]
        _stored(address, buffer[here], row[here], block, array, 0)
        _fixed(block, calibration.scale, calibration.offset, at, out[here].view(np.uint16))


def _stored(
    address: NDArray[np.int64],
    buffer: NDArray[np.int64],
    row: NDArray[np.int64],
    out: NDArray[np.generic],
    array: ArraySpec,
    at: int,
) -> None:
    width = array.shape[1] if len(array.shape) > 1 else 1
    if array.codec != "planes":
        size = out.dtype.itemsize
        _elements(address, buffer, row, width * size, at * size, out.view(np.uint8))
    elif out.dtype.itemsize == 2:
        _planes2(address, buffer, row, array.chunk_rows, width, at, out.view(np.uint16))
    else:
        _planes4(address, buffer, row, array.chunk_rows, width, at, out.view(np.uint32))


def gather_as(
    address: NDArray[np.int64],
    buffer: NDArray[np.int64],
    row: NDArray[np.int64],
    out: NDArray[np.generic],
    array: ArraySpec,
    calibration: Calibration | None,
    factor: float,
    at: int = 0,
) -> None:
    """`gather` with a change of type: `out` [n, width] holds bf16 bits (uint16), float16 or float32.

    Stored values become float32(value * factor), computed in float64, then round to the type of `out`. Block by block,
    so that what is between lies in the cache.
    """
    itemsize, d = array.dtype.itemsize, array.shape[1]
    raw = np.empty((min(_BLOCK, len(row)), d), np.dtype(f"u{itemsize}"))
    middle = np.empty(raw.shape, np.float32)
    steps = () if calibration is None else (calibration.scale, calibration.offset)
    wide_steps = tuple(v.astype(np.float64) for v in steps)
    for start in range(0, len(row), _BLOCK):
        here = slice(start, min(start + _BLOCK, len(row)))
        block, target = raw[: here.stop - start], out[here, at : at + d]
        values: NDArray[Any] = target if out.dtype == np.float32 else middle[: len(block)]
        _stored(address, buffer[here], row[here], block, array, 0)
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
