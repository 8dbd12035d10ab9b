"""What is loaded of a store, and in which form it is delivered: type, factor, place."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actstore.errors import StreamError
from actstore.store.format.fixed import Calibration
from actstore.store.read.index import ArrayIndex
from actstore.store.read.store import Store
from actstore.stream.maps import mappable

Batch = dict[str, NDArray[Any]]
STACK = "activations"
"""The tensor of a batch in which sites are stacked [B, sites, d]."""
RAW = {
    "bfloat16": np.dtype(np.uint16),
    "int16": np.dtype(np.uint16),
    "float32": np.dtype(np.float32),
    "int32": np.dtype(np.int32),
}
"""What is delivered for each stored type unless another is asked for: bf16 as its bits, codes of `fixed` as their
values in bf16 bits."""
HOST_TYPES = {torch.bfloat16: np.dtype(np.uint16), torch.float16: np.dtype(np.float16), torch.float32: np.dtype("f4")}
"""How batches of a dtype lie in numpy's memory."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One array that is loaded."""

    name: str
    store: Store
    """That holds it."""
    mapped: bool
    """Whether its shards are mapped."""
    index: ArrayIndex
    calibration: Calibration | None
    deliver: bool
    """False for a column that only the filter looks at."""
    dtype: torch.dtype
    """Of the batches."""
    factor: float = 1.0
    """What values are multiplied by."""
    target: str = ""
    """The tensor of a batch that it is delivered in: its own, or the one that sites are stacked in."""
    place: int = 0
    """Among the sites of a stack."""

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of one row."""
        return self.index.array.shape[1:]

    @cached_property
    def chunk_bytes(self) -> int:
        """Of a decoded chunk."""
        return self.index.array.chunk_bytes

    @property
    def in_place(self) -> bool:
        """Whether its chunks are used where they lie, stored as they are in a map."""
        return self.mapped and self.index.array.codec == "none"

    @property
    def start(self) -> int:
        """Where its elements begin in a row of the batch."""
        return self.place * int(np.prod(self.shape))

    @cached_property
    def raw(self) -> bool:
        """Whether rows are delivered as they are stored (`fixed`: as bf16)."""
        return self.factor == 1.0 and self.dtype == natural_dtype(self.index)

    @property
    def row_bytes(self) -> int:
        """Bytes of a delivered row."""
        return int(np.prod(self.shape)) * self.host_type.itemsize

    @cached_property
    def host_type(self) -> np.dtype[Any]:
        """Type of a batch in numpy's memory."""
        return host_type(self.dtype)


def host_type(dtype: torch.dtype) -> np.dtype[Any]:
    """How a tensor of a batch lies in numpy's memory."""
    return HOST_TYPES.get(dtype, np.dtype(np.int32))


def natural_dtype(index: ArrayIndex) -> torch.dtype:
    """How an array is delivered unless another type is asked for: `fixed` sites as bf16."""
    return {"float32": torch.float32, "int32": torch.int32}.get(index.array.dtype.name, torch.bfloat16)


def columns_of(
    store: Store,
    names: Iterable[str],
    filtered: Iterable[str],
    *,
    dtype: torch.dtype | None,
    factors: Mapping[str, float],
    stack: Iterable[str] = (),
) -> dict[str, Column]:
    """The arrays `names`, which are delivered, and `filtered`, which a filter looks at.

    Sites come in `dtype`, if given, multiplied by their factor; those of `stack` in one tensor, in this order.
    """
    delivered = tuple(names)
    stacked = tuple(stack)
    found: dict[str, Column] = {}
    for name in dict.fromkeys((*delivered, *filtered)):
        index, site = store.index.arrays[name], name in store.sites
        found[name] = Column(
            name=name,
            store=store.owner(name),
            mapped=mappable(store.owner(name)),
            index=index,
            calibration=store.calibration(name) if name in store.index.calibration else None,
            deliver=name in delivered,
            dtype=(dtype if site else None) or natural_dtype(index),
            factor=factors.get(name, 1.0),
            target=STACK if name in stacked else name,
            place=stacked.index(name) if name in stacked else 0,
        )
    return found


def tensors_of(columns: Mapping[str, Column]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape of a row and type of every tensor of a batch."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for c in columns.values():
        if c.deliver:
            stacked = sum(other.target == c.target for other in columns.values() if other.deliver)
            found[c.target] = ((stacked, *c.shape) if c.target == STACK else c.shape), c.dtype
    return found


def normalising_factor(mean_sq_norm: float, site: str) -> float:
    """What brings the mean squared norm of a site to 1; StreamError if its statistics allow none."""
    if not (mean_sq_norm > 0 and np.isfinite(mean_sq_norm)):
        raise StreamError(
            f"the mean squared norm of {site} is {mean_sq_norm}, expected a positive number; look for NaN or "
            "infinite activations with: actstore info"
        )
    return 1.0 / float(np.sqrt(mean_sq_norm))


def parse_device(device: str | torch.device | None) -> torch.device | None:
    """The device of an argument; ValueError for one that is not there or not served."""
    if device is None:
        return None
    found = torch.device(device)
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}, expected 'cuda', 'cuda:N', 'cpu' or None")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but this PyTorch ({torch.__version__}) sees no CUDA device")
    return found


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The type of an argument; ValueError for one that batches can't have."""
    if dtype is None:
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in HOST_TYPES:
        names = ", ".join(str(t).removeprefix("torch.") for t in HOST_TYPES)
        raise ValueError(f"dtype is {dtype!r}, expected one of {names}")
    return found
