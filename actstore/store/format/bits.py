"""Bit patterns and numbers inside numba kernels, where a view costs a pass over memory."""

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic


@intrinsic
def _float_of_bits(_context: Any, bits: Any) -> Any:
    """The float32 that bf16 bits (uint16) or float32 bits (uint32) stand for."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = arguments[0]
        if bits == types.uint16:
            word32 = context.get_value_type(types.uint32)
            word = builder.shl(builder.zext(word, word32), word32(16))
        return builder.bitcast(word, context.get_value_type(types.float32))

    return types.float32(bits), generate


@intrinsic
def _bits_of_float(_context: Any, value: Any) -> Any:
    """The bits (uint32) of a float32."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(value), generate


@intrinsic
def fused(_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c of float32, rounded once (IEEE 754 fusedMultiplyAdd)."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(a, b, c), generate


@numba.njit(nogil=True, inline="always")
def wide(bits: Any) -> np.float64:
    """float64 of bf16 bits (uint16) or of float32 bits (uint32)."""
    return np.float64(_float_of_bits(bits))  # pyright: ignore[reportCallIssue]  numba passes the context


@numba.njit(nogil=True, inline="always")
def bf16_bits(value: np.float32) -> np.uint16:
    """bf16 bits of a finite float32, rounded to nearest even."""
    bits = _bits_of_float(value)  # pyright: ignore[reportCallIssue]  numba passes the context
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
