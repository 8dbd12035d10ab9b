"""The bfloat16 data type for zarr-python, registered through its `zarr.data_type` entry point.

zarr-extensions registers `bfloat16` (data-types/bfloat16), and TensorStore and zarrs read it; zarr-python 3.1.6 does
not. With actstore installed plain `zarr.open` reads and writes it, as `ml_dtypes.bfloat16`. Fill values are JSON
numbers, "NaN", "Infinity", "-Infinity", or the bit pattern as a hexadecimal string ("0x7fc0").

zarr-python 3.1.6, the last for Python 3.11, collects `zarr.data_type` entry points but never loads them (3.4 does):
there, `import actstore.store` comes first. Importing this module registers the type everywhere.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast

import ml_dtypes
import numpy as np
from zarr.core.dtype.common import DataTypeValidationError, HasEndianness, HasItemSize
from zarr.dtype import ZDType, data_type_registry

NATIVE = np.dtype(ml_dtypes.bfloat16)
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, kw_only=True)
class BFloat16(ZDType[Any, Any], HasEndianness, HasItemSize):
    """zarr's view of `ml_dtypes.bfloat16`."""

    dtype_cls: ClassVar[type[Any]] = type(NATIVE)
    _zarr_v3_name: ClassVar[str] = "bfloat16"

    @property
    def item_size(self) -> int:
        """Bytes per element."""
        return 2

    @classmethod
    def _check_native_dtype(cls, dtype: np.dtype[Any]) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return dtype == NATIVE

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype[Any]) -> Self:
        """The zarr type of a numpy dtype."""
        if not cls._check_native_dtype(dtype):
            raise DataTypeValidationError(f"found {dtype}, expected bfloat16")
        return cls()

    def to_native_dtype(self) -> np.dtype[Any]:
        """The numpy dtype."""
        return NATIVE

    @classmethod
    def _from_json_v2(cls, data: Any) -> Self:
        raise DataTypeValidationError(f"bfloat16 exists in zarr format 3 only, found {data!r}")

    @classmethod
    def _from_json_v3(cls, data: Any) -> Self:
        if data != cls._zarr_v3_name:
            raise DataTypeValidationError(f"found {data!r}, expected {cls._zarr_v3_name!r}")
        return cls()

    def to_json(self, zarr_format: Literal[2, 3]) -> Any:
        """The `data_type` field of array metadata."""
        if zarr_format == 2:
            raise ValueError("bfloat16 exists in zarr format 3 only")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, (int, float, np.floating, np.integer, ml_dtypes.bfloat16))

    def cast_scalar(self, data: object) -> Any:
        """Round a number to bfloat16."""
        if not self._check_scalar(data):
            raise TypeError(f"found {data!r}, expected a number")
        return NATIVE.type(data)

    def default_scalar(self) -> Any:
        """Zero."""
        return NATIVE.type(0)

    def from_json_scalar(self, data: Any, *, zarr_format: Literal[2, 3]) -> Any:  # noqa: ARG002  zarr's signature
        """Parse a fill value."""
        if isinstance(data, str):
            if data in _SPECIAL:
                return NATIVE.type(_SPECIAL[data])
            if data.startswith("0x") and len(data) == 6:
                return np.array([int(data, 16)], np.uint16).view(NATIVE)[0]
        elif isinstance(data, (int, float)) and not isinstance(data, bool):
            return NATIVE.type(data)
        raise TypeError(f"found fill value {data!r}, expected a number, NaN, Infinity, -Infinity or 0x and 4 digits")

    def to_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> Any:  # noqa: ARG002  zarr's signature
        """Write a fill value."""
        value = float(cast("Any", data))
        if math.isnan(value):
            bits = int(np.asarray(data, NATIVE).view(np.uint16))
            return "NaN" if bits == 0x7FC0 else f"0x{bits:04x}"
        return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


data_type_registry.register("bfloat16", BFloat16)
