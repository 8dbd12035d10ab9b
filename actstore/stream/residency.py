"""What a reading loads, uses and frees, slot by slot, and how many chunks must be in memory for it.

Slots are planned in the order in which batches first touch them, and chunks are loaded in that order. When a batch
waits for a slot, every chunk that was loaded before it belongs to the slot in use of some stream, and what earlier
slots alone needed is free again. So a reading never needs more buffers than `peak` of each of its streams together,
and with as many it can't come to a standstill.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.store.read.store import Store
from actstore.stream.columns import Column
from actstore.stream.filter import RowFilter
from actstore.stream.order import Piece, Slot, StreamOrder


@dataclass(frozen=True, kw_only=True)
class Share:
    """One store's share of every batch: on one rank, its streams, each of which gives `rows` rows to a batch."""

    store: Store
    columns: Mapping[str, Column]
    where: RowFilter
    streams: tuple[int, ...]
    """Of this rank."""
    order: Callable[[int, int], StreamOrder]
    """By lap and stream. A lap is one epoch of this store; a store that repeats has several in an epoch."""
    steps: int
    """Batches of a lap."""
    rows: int
    """Rows of a stream in a batch."""
    whole: bool
    """Whether the last batch of a lap takes all rows that are left."""
    buffers: int
    """Chunks that may be in memory."""
    keep: bool
    """Whether chunks that are needed at both ends of a lap stay in memory."""

    def span(self, step: int, stream: int) -> tuple[int, int]:
        """The rows of a stream that belong to a step, counted from the beginning of the step's lap."""
        lap, local = divmod(step, self.steps)
        stop = (local + 1) * self.rows
        return local * self.rows, self.order(lap, stream).rows if self.whole and local + 1 == self.steps else stop


@dataclass(eq=False, slots=True)
class Resident:
    """A chunk that is in memory, or will be."""

    share: int
    piece: Piece
    buffer: int = -1
    serial: int = -1
    """Place in the order of loads."""
    ready: bool = False
    failed: bool = False
    """Damaged or unreadable, and skipped."""
    data: list[Any] | None = None
    """Fetched and not yet decoded, by array."""
    tries: int = 0
    """Requests for it that are under way."""
    rereads: dict[int, int] = field(default_factory=dict[int, int])
    """Times that each array's chunk arrived damaged."""
    fetched: bool = False


@dataclass(eq=False, slots=True)
class SlotTask:
    """One slot of one stream: what to load for it, what it uses, what it frees."""

    share: int
    stream: int
    t: int
    slot: Slot
    order: StreamOrder
    step: int
    """The first batch that touches it."""
    start: int
    """First row, in the stream."""
    stop: int
    """Behind its last row that is needed."""
    residents: tuple[Resident, ...]
    """Chunk of each slice [K]."""
    loads: tuple[Resident, ...]
    frees: tuple[Resident, ...]
    pairs: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
    """Buffer (-1: skipped) and row in its chunk of every row of the slot, once all chunks are ready."""

    def ready(self) -> bool:
        """Whether all its chunks are decoded."""
        return all(r.ready for r in self.residents)


def peak(pieces: int, mix: int, *, keep: bool) -> int:
    """Chunks that a stream of so many pieces needs in memory at a time."""
    return min(2 * mix - 1 if keep else mix, pieces)


def slot_tasks(share: Share, number: int, stream: int, steps: range) -> Iterator[SlotTask]:
    """The slots of a stream that some steps need, with loads and frees; `number` is the share's."""
    step = steps.start
    while step < steps.stop:
        lap, local = divmod(step, share.steps)
        end = min(steps.stop - lap * share.steps, share.steps)
        order = share.order(lap, stream)
        rows = local * share.rows, share.span(lap * share.steps + end - 1, stream)[1]
        if rows[0] < rows[1]:
            yield from _lap_tasks(share, number, stream, order, first_step=step, rows=rows)
        step = lap * share.steps + end


def _lap_tasks(
    share: Share, number: int, stream: int, order: StreamOrder, *, first_step: int, rows: tuple[int, int]
) -> Iterator[SlotTask]:
    """Slots that hold rows from rows[0] to rows[1] of a stream.

    The first K - 1 slots also mix the last K - 1 pieces, since the interleaver is cyclic. With `keep` these stay in
    memory until the end of the lap instead of being read twice.
    """
    first, last = order.slot_at(rows[0]), order.slot_at(rows[1] - 1)
    wrapped = range(max(0, order.pieces - order.mix + 1), order.pieces) if share.keep else range(0)
    lap_step = first_step - rows[0] // share.rows
    resident: dict[int, Resident] = {}
    start, upcoming = order.first_row(first), order.slot(first)
    for t in range(first, last + 1):
        slot, stop = upcoming, min(order.first_row(t + 1), rows[1])
        new = [i for i in dict.fromkeys(slot.pieces) if i not in resident]
        resident.update({i: Resident(number, order.piece(i)) for i in new})
        used = tuple(resident[i] for i in slot.pieces)
        loads = tuple(resident[i] for i in new)
        needed: set[int] = set()
        if t < last:
            upcoming = order.slot(t + 1)
            needed = {*wrapped, *upcoming.pieces}
        frees = tuple(resident.pop(i) for i in list(resident) if i not in needed)
        step = max(lap_step + start // share.rows, first_step)
        yield SlotTask(number, stream, t, slot, order, step, start, stop, used, loads, frees)
        start = stop


def first_use_order(shares: tuple[Share, ...], steps: range) -> Iterator[SlotTask]:
    """Slots of all streams of all shares, in the order in which batches first touch them."""
    sources = [(i, s, slot_tasks(share, i, s, steps)) for i, share in enumerate(shares) for s in share.streams]
    heap: list[tuple[int, int, int, SlotTask]] = []
    for place, (_, _, tasks) in enumerate(sources):
        if (task := next(tasks, None)) is not None:
            heap.append((task.step, place, task.start, task))
    heapq.heapify(heap)
    while heap:
        _, place, _, task = heap[0]
        yield task
        if (following := next(sources[place][2], None)) is not None:
            heapq.heapreplace(heap, (following.step, place, following.start, following))
        else:
            heapq.heappop(heap)
