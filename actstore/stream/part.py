"""One store of a dataset, or several joined ones: its part of the plan, and what follows from both."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actstore.store.read.store import Store
from actstore.stream import plan as plans
from actstore.stream.columns import Column, columns_of
from actstore.stream.counts import count_rows
from actstore.stream.filtered import filtered_orders
from actstore.stream.order import Geometry, StreamOrder
from actstore.stream.plan import Fit, Needs, Plan
from actstore.stream.residency import Share


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
