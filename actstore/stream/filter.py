"""Row filters: which rows of a finished store are read, decided after it was written.

A filter is a pure function of a row's provenance (position, token id, sequence) and, for `max_norm`, of its values;
the held-out split is one of the sequence alone, so that no text is on both sides. Batches stay full and the order
exact because the rows that pass are counted first, chunk by chunk (`counts.py`).
"""

import math
import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numba
import numpy as np
from numpy.typing import NDArray

from actstore import keyed
from actstore.errors import StreamError
from actstore.store.format import codec
from actstore.store.format.bits import wide
from actstore.store.format.fixed import Calibration
from actstore.store.format.spec import BITS
from actstore.store.read.store import Store
from actstore.stream.columns import Column
from actstore.stream.order import Piece

Split = Literal["train", "held_out"]
_HELD_OUT_KEY = keyed.key(0, "held-out")
_DOMAIN = 1 << 62


@dataclass(frozen=True, kw_only=True)
class RowFilter:
    """What a row must be to be read."""

    drop_positions: tuple[int, ...] = ()
    """Positions in the sequence that are left out."""
    drop_tokens: tuple[int, ...] = ()
    """Token ids that are left out."""
    max_norm: tuple[tuple[str, float], ...] = ()
    """(site, greatest L2 norm), in units of the stored values; rows above it, or with NaN, are left out."""
    held_out: float = 0.0
    """Share of sequences that training does not see, 0 to below 1."""
    split: Split = "train"
    """Which side of the held-out split is read."""

    def __post_init__(self) -> None:
        """Check the figures."""
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}, expected a share from 0 to below 1")
        if self.split not in ("train", "held_out"):
            raise ValueError(f"split is {self.split!r}, expected 'train' or 'held_out'")
        if self.split == "held_out" and not self.held_out:
            raise ValueError("split='held_out' needs a share: held_out=0.01, the same as in training")
        for name in ("drop_positions", "drop_tokens"):
            if min(getattr(self, name), default=0) < 0:
                raise ValueError(f"{name} holds {min(getattr(self, name))}, expected numbers from 0 on")
        for site, norm in self.max_norm:
            if not norm > 0:
                raise ValueError(f"max_norm of {site} is {norm}, expected a number above 0")

    def __bool__(self) -> bool:
        """Whether any row could be left out."""
        return bool(self.drop_positions or self.drop_tokens or self.max_norm or self.held_out)

    @property
    def columns(self) -> tuple[str, ...]:
        """The arrays that decide."""
        named = {"position": self.drop_positions, "token_id": self.drop_tokens, "sequence": self.held_out}
        return (*(n for n, used in named.items() if used), *(site for site, _ in self.max_norm))


def held_out(sequence: NDArray[np.integer], row: NDArray[np.integer], share: float) -> NDArray[np.bool_]:
    """Which rows [n] are held out, by a keyed hash of their sequence; by stored row number where they have none.

    The same for every seed, plan and process.
    """
    unknown = sequence < 0
    index = np.where(unknown, row, sequence).astype(np.int64)
    place = keyed.permute(index, _DOMAIN, _HELD_OUT_KEY)
    if unknown.any():
        place[unknown] = keyed.permute(index[unknown], _DOMAIN, _HELD_OUT_KEY ^ 1)
    return place < int(share * _DOMAIN)


@numba.njit(nogil=True, cache=True)
def _squared_norms(bits: NDArray[Any], out: NDArray[np.float64]) -> None:
    for i in range(bits.shape[0]):
        total = 0.0
        for k in range(bits.shape[1]):
            x = wide(bits[i, k])
            total += x * x
        out[i] = total


@numba.njit(nogil=True, cache=True)
def _squared_norms_fixed(
    codes: NDArray[np.int16], scale: NDArray[np.float32], offset: NDArray[np.float32], out: NDArray[np.float64]
) -> None:
    for i in range(codes.shape[0]):
        total = 0.0
        for k in range(codes.shape[1]):
            value = np.float64(codes[i, k]) * np.float64(scale[k]) + np.float64(offset[k])
            x = np.float64(np.float32(value))
            total += x * x
        out[i] = total


def norms(rows: NDArray[Any], calibration: Calibration | None) -> NDArray[np.float64]:
    """L2 norm [n] of rows [n, d]: bf16 bits (uint16), float32, or codes of a `fixed` site (int16)."""
    out = np.empty(len(rows))
    if calibration is not None:
        _squared_norms_fixed(rows, calibration.scale, calibration.offset, out)
    else:
        _squared_norms(rows if rows.dtype == np.uint16 else rows.view(np.uint32), out)
    return np.sqrt(out)


def kept(
    where: RowFilter,
    columns: Mapping[str, NDArray[Any]],
    first_row: int,
    calibrations: Mapping[str, Calibration],
) -> NDArray[np.bool_]:
    """Which rows [n] of a chunk pass; see `dropped` for the arguments."""
    return ~np.logical_or.reduce(list(dropped(where, columns, first_row, calibrations).values()))


def dropped(
    where: RowFilter,
    columns: Mapping[str, NDArray[Any]],
    first_row: int,
    calibrations: Mapping[str, Calibration],
) -> dict[str, NDArray[np.bool_]]:
    """Which rows [n] of a chunk each rule leaves out, by the rule's name.

    `columns` are the filter's, decoded [n, ...]; the chunk's rows are stored from row number `first_row` on.
    """
    found: dict[str, NDArray[np.bool_]] = {}
    if where.drop_positions:
        found["drop_positions"] = np.isin(columns["position"], where.drop_positions)
    if where.drop_tokens:
        found["drop_tokens"] = np.isin(columns["token_id"], where.drop_tokens)
    if where.held_out:
        n = len(columns["sequence"])
        out = held_out(columns["sequence"], first_row + np.arange(n), where.held_out)
        found["held_out"] = ~out if where.split == "held_out" else out
    for site, most in where.max_norm:
        found[f"max_norm of {site}"] = ~(norms(columns[site], calibrations.get(site)) <= most)
    return found


def kept_of_chunk(
    store: Store,
    where: RowFilter,
    columns: Mapping[str, Column],
    held: Mapping[str, NDArray[np.uint8]],
    piece: Piece,
) -> NDArray[np.int64]:
    """Rows of a chunk that pass, from the filter's columns as they were decoded; StreamError if they were more once."""
    spec, bucket = store.spec, int(store.index.buckets[piece.place])
    first, stop = spec.bucket_range(bucket)
    rows = min(spec.chunk_rows, stop - first - piece.chunk * spec.chunk_rows)
    decoded: dict[str, NDArray[Any]] = {}
    for name in where.columns:
        array = columns[name].index.array
        elements = codec.merge(held[name], array.codec, element_type(store, name))
        decoded[name] = elements.reshape(-1, *array.shape[1:])[:rows]
    calibrations = {n: c.calibration for n, c in columns.items() if c.calibration is not None}
    found = np.flatnonzero(kept(where, decoded, first + piece.chunk * spec.chunk_rows, calibrations))
    if len(found) < piece.start + piece.rows:
        raise StreamError(
            f"{store.url}: {len(found)} rows of chunk {piece.chunk} of bucket {bucket} pass the filter, "
            f"{piece.start + piece.rows} were counted; the store changed, open it again"
        )
    return found


def element_type(store: Store, name: str) -> np.dtype[Any]:
    """How the decoded elements of an array are looked at: bf16 as its bits."""
    dtype = store.index.arrays[name].array.dtype
    return BITS if dtype.name == "bfloat16" else dtype


def whole_numbers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Positions or token ids as an argument, each once, ascending; `ValueError` for text or fractions."""
    try:
        if isinstance(values, (str, bytes)):
            raise TypeError
        return tuple(sorted({operator.index(v) for v in values}))
    except TypeError as e:
        raise ValueError(f"{name} is {values!r}, expected whole numbers such as (0, 1)") from e


def max_norms(
    max_norm: float | Mapping[str, float] | None, sites: tuple[str, ...], to_clean: tuple[str, ...] = ()
) -> tuple[tuple[str, float], ...]:
    """`max_norm` as an argument, by site: one figure holds for every site that is read.

    Sites `to_clean` lose at least the rows that hold NaN or infinity: those without a finite norm.
    """
    given = dict.fromkeys(to_clean, sys.float_info.max)
    if max_norm is not None:
        given |= dict(max_norm) if isinstance(max_norm, Mapping) else dict.fromkeys(sites, float(max_norm))
    unknown = sorted(given.keys() - set(sites))
    if unknown:
        raise ValueError(f"max_norm names {', '.join(unknown)}, which is not read here; sites are {', '.join(sites)}")
    if any(math.isnan(v) for v in given.values()):
        raise ValueError(f"max_norm is {max_norm}, expected numbers above 0")
    return tuple(sorted((site, float(v)) for site, v in given.items()))
