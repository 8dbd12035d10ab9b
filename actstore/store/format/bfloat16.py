"""The bfloat16 data type for zarr-python, registered through its `zarr.data_type` entry point.

zarr-extensions registers `bfloat16` (data-types/bfloat16), and TensorStore and zarrs read it; zarr-python 3.1.6 does
not. With actstore installed plain `zarr.open` reads and writes it, as `ml_dtypes.bfloat16`. Fill values are JSON
numbers, "NaN", "Infinity", "-Infinity", or the bit pattern as a hexadecimal string ("0x7fc0").

zarr-python 3.1.6, the last for Python 3.11, collects `zarr.data_type` entry points but never loads them (3.4 does):
there, `import actstore.store` comes first. Importing this module registers the type everywhere.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import ml_dtypes
import numpy as np
from zarr.dtype import Float16, data_type_registry

NATIVE = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BFloat16(Float16):
    """zarr's view of `ml_dtypes.bfloat16`: a float of 2 bytes, like float16."""

    dtype_cls: ClassVar[Any] = type(NATIVE)
    _zarr_v3_name: ClassVar[Any] = "bfloat16"
    _zarr_v2_names: ClassVar[Any] = ()

    def to_native_dtype(self) -> Any:
        """The numpy dtype."""
        return NATIVE

    def to_json(self, zarr_format: Literal[2, 3]) -> Any:
        """The `data_type` field of array metadata."""
        if zarr_format == 2:
            raise ValueError("bfloat16 exists in zarr format 3 only")
        return self._zarr_v3_name

    def _check_scalar(self, data: object) -> Any:
        return isinstance(data, (int, float, np.number, NATIVE.type))  # ml_dtypes 0.6.0 crashes on other text

    def from_json_scalar(self, data: Any, *, zarr_format: Literal[2, 3]) -> Any:
        """Parse a fill value."""
        if isinstance(data, str) and data.startswith("0x") and len(data) == 6:
            return np.array([int(data, 16)], np.uint16).view(NATIVE)[0]
        return super().from_json_scalar(data, zarr_format=zarr_format)

    def to_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> Any:
        """Write a fill value."""
        bits = int(np.asarray(data, NATIVE).view(np.uint16))
        value = float(np.asarray(data, NATIVE))
        other_nan = math.isnan(value) and bits != 0x7FC0
        return f"0x{bits:04x}" if other_nan else super().to_json_scalar(value, zarr_format=zarr_format)


data_type_registry.register("bfloat16", BFloat16)
