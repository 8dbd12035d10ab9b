"""What to load, use and free, slot by slot: the whole future of a rank's epoch, made as it is needed."""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.stream.order import Piece, Slot, StreamOrder


@dataclass(eq=False)
class Resident:
    """A chunk in the pool: to be loaded, then ready."""

    piece: Piece
    buffer: int = -1
    serial: int = -1
    """Place in the order of loads."""
    ready: bool = False
    failed: bool = False
    """Damaged or unreadable, and skipped."""
    kept: NDArray[np.int64] | None = None
    """Rows that pass the filter; None without one."""
    data: list[Any] | None = None
    """Fetched and not yet decoded, by array."""
    tries: int = 0
    """Requests for it that are under way."""
    fetched: bool = False


@dataclass(eq=False)
class SlotTask:
    """One slot of one stream: what to load for it, what it uses, what it frees."""

    stream: int
    t: int
    slot: Slot
    first_row: int
    residents: tuple[Resident, ...]
    """Chunk of each slice [K]."""
    loads: tuple[Resident, ...]
    frees: tuple[Resident, ...]
    order: StreamOrder

    def ready(self) -> bool:
        """Whether all its chunks are decoded."""
        return all(r.ready for r in self.residents)

    @cached_property
    def rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Buffer (-1: skipped) and row in its chunk of every row of the slot; only once all residents are ready."""
        slices, row = self.order.rows_of(self.t, self.slot, 0, self.slot.rows)
        buffers = np.array([-1 if r.failed else r.buffer for r in self.residents], np.int64)
        if any(r.kept is not None for r in self.residents):
            row = row.copy()
            for j, r in enumerate(self.residents):
                if r.kept is not None:
                    mine = slices == j
                    row[mine] = r.kept[row[mine]]
        return buffers[slices], row


@dataclass(eq=False)
class Draft:
    """A batch in the making."""

    batch: Any
    filled: int = 0
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = field(
        default_factory=list[tuple[NDArray[np.int64], NDArray[np.int64]]]
    )
    """Buffers and rows to gather next."""
    spent: list[SlotTask] = field(default_factory=list[SlotTask])
    """Slots that these parts use up."""


def slot_tasks(order: StreamOrder, stream: int, start: int, mix: int, *, keep: bool) -> Iterator[SlotTask]:
    """The slots of a stream from `start` on, with loads and frees.

    The first K - 1 slots also mix the last K - 1 pieces, since the interleaver is cyclic. With `keep` these stay in
    memory until the end of the epoch instead of being read twice.
    """
    resident: dict[int, Resident] = {}
    wrapped = set(range(max(0, order.pieces - mix + 1), order.pieces)) if keep else set[int]()
    upcoming = order.slot(start) if start < order.pieces else None
    for t in range(start, order.pieces):
        assert upcoming is not None
        slot = upcoming
        new = [i for i in dict.fromkeys(slot.pieces) if i not in resident]
        resident.update({i: Resident(order.piece(i)) for i in new})
        used = tuple(resident[i] for i in slot.pieces)
        loads = tuple(resident[i] for i in new)
        needed: set[int] = set()
        if t + 1 < order.pieces:
            upcoming = order.slot(t + 1)
            needed = wrapped | set(upcoming.pieces)
        frees = tuple(resident.pop(i) for i in list(resident) if i not in needed)
        yield SlotTask(stream, t, slot, order.first_row(t), used, loads, frees, order)


def first_use_order(
    orders: Mapping[int, StreamOrder], *, step: int, rows_per_step: int, mix: int, keep: bool
) -> Iterator[SlotTask]:
    """Slots of all streams from a step on, in the order in which batches first touch them."""
    sources = {
        s: slot_tasks(o, s, o.slot_at(step * rows_per_step), mix, keep=keep)
        for s, o in orders.items()
        if step * rows_per_step < o.rows
    }
    heap: list[tuple[int, int, int]] = []
    heads: dict[int, SlotTask] = {}

    def push(s: int) -> None:
        task = next(sources[s], None)
        if task is not None:
            heads[s] = task
            heapq.heappush(heap, (max(task.first_row // rows_per_step, step), s, task.t))

    for s in sources:
        push(s)
    while heap:
        _, s, _ = heapq.heappop(heap)
        yield heads[s]
        push(s)
