"""What `append` is given, as rows: tensors of any device and arrays, checked, and converted a block at a time.

torch is never imported here: an object can't be a tensor if nobody has imported it.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.store.format.bfloat16 import NATIVE as BFLOAT16
from actstore.store.format.spec import BITS, FLOATS, StoreSpec

NO_PROVENANCE = -1
"""Stored for `token_id`, `sequence` or `position` where none was given."""
_INT32 = np.iinfo(np.int32)


def site_rows(sites: Mapping[str, Any], spec: StoreSpec) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Every site as rows [n, d], and the leading dimensions that all of them have; `ValueError` if they differ."""
    if set(sites) != set(spec.sites):
        raise ValueError(f"sites are {sorted(sites)}, the store has {sorted(spec.sites)}; append all of them")
    rows: dict[str, Any] = {}
    leading: dict[str, tuple[int, ...]] = {}
    for name, site in spec.sites.items():
        x = _plain(f"site {name}", sites[name])
        if not dtype_name(x).startswith(("float", "bfloat16")):
            raise ValueError(f"site {name} is {dtype_name(x)}, expected floating-point numbers such as bfloat16")
        if tuple(x.shape[-1:]) != (site.d,):
            raise ValueError(f"site {name} has shape {list(x.shape)}, expected [n, {site.d}] or [..., {site.d}]")
        rows[name], leading[name] = x.reshape(-1, site.d), tuple(x.shape[:-1])
    if len(set(leading.values())) > 1:
        raise ValueError(f"leading dimensions by site are {leading}, expected the same: row i of all is one token")
    return rows, next(iter(leading.values()))


def provenance_column(name: str, values: Any, leading: tuple[int, ...]) -> NDArray[np.int32]:
    """A provenance column as int32 [n], from [n] or the leading dimensions of the rows; `ValueError` for others."""
    n = math.prod(leading)
    if values is None:
        return np.broadcast_to(np.int32(NO_PROVENANCE), n)
    column = _plain(name, values)
    column = column.cpu().numpy() if _is_tensor(column) else column
    if column.shape not in ((n,), leading):
        raise ValueError(f"{name} has shape {list(column.shape)}, expected [{n}], one whole number a row")
    if n and column.dtype.kind not in "iu":
        raise ValueError(f"{name} is {column.dtype}, expected whole numbers such as int32")
    if n and not _INT32.min <= int(column.min()) <= int(column.max()) <= _INT32.max:
        raise ValueError(f"{name} has values from {column.min()} to {column.max()}, expected ones that fit int32")
    return column.astype(np.int32).ravel()


def converted(x: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Rows as a bucket holds them: bfloat16 bits, rounded to nearest even, or float32."""
    if _is_tensor(x):
        torch = sys.modules["torch"]  # converted where the tensor is, so that fewer bytes travel
        if dtype == BITS:
            return x.to(torch.bfloat16).cpu().view(torch.int16).numpy().view(BITS)
        return x.to(torch.float32).cpu().numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(BFLOAT16, copy=False).view(BITS) if dtype == BITS else x.astype(FLOATS, copy=False)


def dtype_name(x: Any) -> str:
    """Name of the data type of a tensor or an array, such as bfloat16."""
    return str(x.dtype).removeprefix("torch.") if _is_tensor(x) else x.dtype.name


def _plain(what: str, x: Any) -> Any:
    """A tensor without its history, or an array."""
    if isinstance(x, np.ma.MaskedArray):
        raise ValueError(f"{what} is a masked array, whose mask can't be stored; append the rows without masked values")
    return x.detach() if _is_tensor(x) else np.asarray(x)


def _is_tensor(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)
