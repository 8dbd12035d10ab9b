"""What is wanted of the stores of a dataset, each one's part in it, and what follows from both."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from actstore.store.format.spec import PROVENANCE_ARRAYS
from actstore.store.read.store import Store, open_store
from actstore.stream import plan as plans
from actstore.stream.columns import Column, columns_of, normalising_factor, tensors_of
from actstore.stream.counts import count_rows
from actstore.stream.filter import RowFilter, Split, max_norms
from actstore.stream.filtered import filtered_orders
from actstore.stream.order import Geometry, StreamOrder
from actstore.stream.plan import Fit, Needs, Plan
from actstore.stream.residency import Share

BATCH_SIZE = 4096
SHUFFLE_CHUNKS = 64
Exhausted = Literal["stop", "repeat"]
Opened: TypeAlias = str | os.PathLike[str] | Store


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The arguments of a dataset that decide what it yields; see `ActivationDataset`."""

    sites: tuple[str, ...]
    batch_size: int
    seed: int
    steps: int | None
    max_rows: int | None
    shuffle: bool
    drop_last: bool
    with_rows: bool
    stack: bool
    dtype: torch.dtype | None
    normalize: bool
    drop_positions: tuple[int, ...]
    drop_tokens: tuple[int, ...]
    max_norm: float | Mapping[str, float] | None
    drop_nonfinite: bool
    held_out: float
    split: Split
    streams: int
    shuffle_chunks: int | None
    exhausted: Exhausted

    def __post_init__(self) -> None:
        """Check what no store is needed for."""
        if self.exhausted not in ("stop", "repeat"):
            raise ValueError(f"exhausted is {self.exhausted!r}, expected 'stop' or 'repeat'")

    def filter(self, store: Store) -> RowFilter:
        """The rows that are wanted of a store."""
        sums = store.index.stats
        dirty = [s for s in self.sites if s in sums and sums[s].nonfinite] if self.drop_nonfinite else []
        return RowFilter(
            drop_positions=self.drop_positions,
            drop_tokens=self.drop_tokens,
            max_norm=max_norms(self.max_norm, self.sites, tuple(dirty)),
            held_out=self.held_out,
            split=self.split,
        )

    def plan(self, store: Store) -> Plan:
        """The plan for a store that is read alone."""
        mixed = self.shuffle_chunks
        if mixed is None:
            mixed = max(1, round(SHUFFLE_CHUNKS / max(self.streams, 1))) * self.streams
        return Plan(
            store=store.fingerprint,
            sites=self.sites,
            seed=self.seed,
            batch_size=self.batch_size,
            streams=self.streams,
            shuffle_chunks=mixed,
            shuffle=self.shuffle,
            drop_last=self.drop_last,
            where=self.filter(store),
        )


class Part:
    """What a dataset knows of one store; all of it follows from the store and the plan."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        names: tuple[str, ...],
        *,
        dtype: torch.dtype | None,
        factors: Mapping[str, float],
        stack: bool,
        threads: int,
    ) -> None:
        """Deliver the arrays `names`; the sites come in `dtype`, multiplied by their factor."""
        self.store, self.plan, self._threads = store, plan, threads
        self.columns: dict[str, Column] = columns_of(
            store, names, plan.where.columns, dtype=dtype, factors=factors, stack=plan.sites if stack else ()
        )
        self._orders: dict[int, Mapping[int, StreamOrder]] = {}
        self.streams: tuple[int, ...] = ()
        """Of this rank, see `place`."""

    def place(self, rank: int, world: int) -> None:
        """Say which streams are this rank's."""
        mine = tuple(range(rank, self.plan.streams, world))
        if mine != self.streams:
            self.streams, self._orders = mine, {}

    @cached_property
    def geometry(self) -> Geometry:
        """The committed rows, as far as their order is concerned."""
        return plans.geometry_of(self.store)

    @cached_property
    def counts(self) -> NDArray[np.int64] | None:
        """Rows of every chunk that pass the filter; None without one."""
        return count_rows(self.store, self.plan.where, threads=self._threads) if self.plan.where else None

    @cached_property
    def rows(self) -> int:
        """Rows of an epoch over all ranks, before `drop_last`."""
        return self.geometry.rows if self.counts is None else int(self.counts.sum())

    @cached_property
    def steps(self) -> int:
        """Batches of an epoch of this store."""
        return plans.steps(self.plan, self.rows)

    def order(self, epoch: int, stream: int) -> StreamOrder:
        """The reading order of a stream of an epoch."""
        known = self._orders
        if epoch not in known:
            # a pipeline plans ahead into the next epoch; another thread may do the same at the same time
            self._orders = known = {e: o for e, o in known.items() if abs(e - epoch) == 1} | {
                epoch: self._orders_of(epoch)
            }
        return known[epoch][stream]

    def _orders_of(self, epoch: int) -> Mapping[int, StreamOrder]:
        p = self.plan
        keys: dict[str, Any] = {
            "seed": p.seed,
            "epoch": epoch,
            "streams": p.streams,
            "mix": p.mix,
            "shuffle": p.shuffle,
        }
        if self.counts is not None:
            return filtered_orders(self.geometry, self.counts, self.streams, **keys)
        return {s: StreamOrder(self.geometry, stream=s, **keys) for s in self.streams}

    @property
    def batch_rows(self) -> int:
        """Rows of this rank's largest batch."""
        whole = 0 if self.plan.drop_last else 1
        return (self.plan.batch_size // self.plan.streams + whole) * len(self.streams)

    def needs(self, epoch: int) -> Needs:
        """What this rank's pipeline takes of memory."""
        columns = self.columns.values()
        pieces = [self.order(epoch, s).pieces for s in self.streams]
        filtered = None if self.counts is None else int(np.count_nonzero(self.counts))
        least, kept = plans.chunks_needed(self.plan, pieces, filtered)
        return Needs(
            chunk=sum(c.chunk_bytes for c in columns if not c.in_place),
            read=sum(c.chunk_bytes for c in columns if not c.mapped),
            batch=sum(c.row_bytes for c in columns if c.deliver) * self.batch_rows,
            least=least,
            kept=kept,
            streams=len(self.streams),
            chunks=sum(pieces),
        )

    def share(self, fit: Fit, first_epoch: int) -> Share:
        """What a pipeline does for this part; its first lap is epoch `first_epoch` of this store."""
        return Share(
            store=self.store,
            columns=self.columns,
            where=self.plan.where,
            streams=self.streams,
            order=lambda lap, stream: self.order(first_epoch + lap, stream),
            steps=self.steps,
            rows=self.plan.batch_size // self.plan.streams,
            whole=not self.plan.drop_last,
            buffers=fit.buffers,
            keep=fit.keep,
        )


def opened(url: Any) -> tuple[list[Store], list[float]]:
    """The stores of an argument, and their weights."""
    pairs = [(url, 1.0)] if isinstance(url, (str, os.PathLike, Store)) else url
    pairs = list(pairs.items() if isinstance(pairs, Mapping) else pairs)
    if not pairs or any(isinstance(pair, str) or len(pair) != 2 for pair in pairs):
        raise ValueError(f"url is {url!r}, expected a store, {{url: weight}} or [(store, weight), ...]")
    return [u if isinstance(u, Store) else open_store(u) for u, _ in pairs], [float(w) for _, w in pairs]


def global_batch_size(batch_size: int | None, per_rank: int | None, world: int) -> int:
    """Rows of a batch over all ranks; ValueError if both sizes are given."""
    if batch_size is not None and per_rank is not None:
        raise ValueError("give batch_size, which is global, or per_rank_batch_size, not both")
    return per_rank * world if per_rank is not None else BATCH_SIZE if batch_size is None else batch_size


def parts_of(
    wanted: Wanted, stores: Sequence[Store], weights: Sequence[float], world: int, *, threads: int
) -> list[Part]:
    """What is wanted of each store; ValueError for what can't be carried out."""
    whole = [wanted.plan(store) for store in stores]
    for plan, store in zip(whole, stores, strict=True):
        plans.check(plan, store, world)
    sizes = [wanted.batch_size]
    if len(stores) > 1:
        sizes = plans.shares(weights, wanted.batch_size, wanted.streams)
    factors: dict[str, float] = {}
    if wanted.normalize:
        exact = [size / wanted.batch_size for size in sizes]
        norms = {site: mean_sq_norm(stores, exact, site) for site in wanted.sites}
        factors = {site: normalising_factor(norm, site) for site, norm in norms.items()}
    names = wanted.sites + (PROVENANCE_ARRAYS if wanted.with_rows else ())
    dtype, stack = wanted.dtype, wanted.stack
    parts = [
        Part(store, replace(p, batch_size=size), names, dtype=dtype, factors=factors, stack=stack, threads=threads)
        for store, p, size in zip(stores, whole, sizes, strict=True)
    ]
    _check_tensors(parts, wanted)
    return parts


def _check_tensors(parts: Sequence[Part], wanted: Wanted) -> None:
    """ValueError unless sites to be stacked have one width, and mixed stores deliver the same tensors."""
    widths = {site: parts[0].columns[site].shape for site in wanted.sites}
    if wanted.stack and len(set(widths.values())) > 1:
        said = ", ".join(f"{site} {shape[0]}" for site, shape in widths.items())
        raise ValueError(f"stack needs sites of one width; widths are {said}")
    for part in parts[1:]:
        for name, (shape, dtype) in tensors_of(parts[0].columns).items():
            there = tensors_of(part.columns)[name]
            if there != (shape, dtype):
                raise ValueError(
                    f"{name} is {list(shape)} {dtype} in {parts[0].store.url} and {list(there[0])} {there[1]} in "
                    f"{part.store.url}; mixed stores need equal widths, and dtype= makes types equal"
                )


def steps_of(parts: Sequence[Part], wanted: Wanted) -> int:
    """Batches of an epoch."""
    found = (min if wanted.exhausted == "stop" else max)(part.steps for part in parts)
    asked = [wanted.steps] if wanted.steps is not None else []
    if wanted.max_rows is not None:
        asked.append(min(wanted.max_rows // wanted.batch_size, found))
    if asked and not 1 <= min(asked) <= found:
        raise ValueError(
            f"steps or max_rows ask for {min(asked)} batches of {wanted.batch_size} rows, expected 1 to the {found} of "
            "an epoch"
        )
    return min(asked, default=found)


def plan_json(parts: Sequence[Part], wanted: Wanted, steps: int) -> dict[str, Any]:
    """The plan of a dataset as JSON values, flat, so that what differs can be named."""
    limit = {} if wanted.steps is None and wanted.max_rows is None else {"steps": steps}
    if len(parts) == 1:
        return parts[0].plan.to_json() | limit
    numbered = {f"{k} of store {i}": v for i, part in enumerate(parts) for k, v in part.plan.to_json().items()}
    return {"exhausted": wanted.exhausted, **limit, **numbered}


def mean_sq_norm(stores: Sequence[Store], weights: Sequence[float], site: str) -> float:
    """E||x||^2 of a site over stores that are mixed by weight."""
    return sum(w * store.stats(site).mean_sq_norm for store, w in zip(stores, weights, strict=True))
