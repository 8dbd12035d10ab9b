"""Fetch, decode and gather in threads: the order is known, so nothing is guessed.

Workers load chunks strictly in the order of first use, each into a buffer of a fixed pool; fetching and decoding run
outside the GIL. One assembler gathers rows into batches and puts them in a short queue. A buffer is free again the
moment the last slot that needs its chunk is done. With room for K chunks a stream the pipeline can't deadlock, because
loads never overtake the consumer's order; every further buffer is read-ahead.
"""

import heapq
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ActstoreError, StreamError
from actstore.store import codec
from actstore.store.manifest import ArrayIndex
from actstore.store.reader import Store
from actstore.stream.gather import gather
from actstore.stream.order import Piece, Slot, StreamOrder

POLL_S = 0.1
Batch = dict[str, NDArray[np.generic]]
RAW = {
    "bfloat16": np.dtype(np.uint16),
    "int16": np.dtype(np.uint16),
    "float32": np.dtype(np.float32),
    "int32": np.dtype(np.int32),
}
"""What is delivered for each stored type: bf16 as its bits, codes of `fixed` as their values in bf16 bits."""


@dataclass
class Meter:
    """Seconds and bytes by stage, summed over threads."""

    fetch_s: float = 0.0
    decode_s: float = 0.0
    gather_s: float = 0.0
    wait_s: float = 0.0
    """The consumer waiting for a batch."""
    stored_bytes: int = 0
    delivered_bytes: int = 0
    chunks: int = 0
    batches: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)


class Recycler:
    """Arrays by purpose, lent again once nobody else refers to them: fresh memory costs a page fault every 4 KiB.

    A tensor or view made of an array refers to it, so what a consumer keeps is never touched.
    """

    def __init__(self) -> None:
        """Own nothing yet."""
        self._arrays: dict[str, list[NDArray[Any]]] = {}

    def empty(self, purpose: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of unspecified content."""
        owned = self._arrays.setdefault(purpose, [])
        for i in range(len(owned)):
            # one reference from the list, one from the call
            if sys.getrefcount(owned[i]) == 2 and owned[i].shape == shape:
                return owned[i]
        free = [a for a in owned if sys.getrefcount(a) > 3]
        self._arrays[purpose] = [*free, made := np.empty(shape, dtype)]
        return made


@dataclass(eq=False)
class _Resident:
    """A chunk in the pool: loading, then ready."""

    piece: Piece
    buffer: int = -1
    ready: bool = False


@dataclass(eq=False)
class _SlotTask:
    """One slot of one stream: what to load for it, what it uses, what it frees."""

    stream: int
    t: int
    slot: Slot
    first_row: int
    residents: tuple[_Resident, ...]
    """Chunk of each slice [K]."""
    loads: tuple[_Resident, ...]
    frees: tuple[_Resident, ...]
    order: StreamOrder

    def ready(self) -> bool:
        """Whether all its chunks are decoded."""
        return all(r.ready for r in self.residents)

    @cached_property
    def rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Buffer and row in its chunk of every row of the slot; only once all residents are ready."""
        slices, row = self.order.rows_of(self.t, self.slot, 0, self.slot.rows)
        return np.array([r.buffer for r in self.residents], np.int64)[slices], row


@dataclass(eq=False)
class _Draft:
    """A batch in the making."""

    batch: Batch
    filled: int = 0
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = field(
        default_factory=list[tuple[NDArray[np.int64], NDArray[np.int64]]]
    )
    """Buffers and rows to gather next."""
    spent: list[_SlotTask] = field(default_factory=list[_SlotTask])
    """Slots that these parts use up."""


def _slot_tasks(order: StreamOrder, stream: int, start: int) -> Iterator[_SlotTask]:
    """The slots of a stream from `start` on, with loads and frees."""
    resident: dict[int, _Resident] = {}
    upcoming = order.slot(start)
    for t in range(start, order.pieces):
        slot = upcoming
        new = [i for i in dict.fromkeys(slot.pieces) if i not in resident]
        resident.update({i: _Resident(order.piece(i)) for i in new})
        used = tuple(resident[i] for i in slot.pieces)
        loads = tuple(resident[i] for i in new)
        kept: set[int] = set()
        if t + 1 < order.pieces:
            upcoming = order.slot(t + 1)
            kept = set(upcoming.pieces)
        frees = tuple(resident.pop(i) for i in list(resident) if i not in kept)
        yield _SlotTask(stream, t, slot, order.first_row(t), used, loads, frees, order)


class Pipeline:
    """Batches of one rank for one epoch, from a given step on."""

    def __init__(
        self,
        store: Store,
        names: tuple[str, ...],
        orders: dict[int, StreamOrder],
        *,
        step: int,
        steps: int,
        rows_per_step: int,
        threads: int,
        buffers: int,
        prefetch: int,
        meter: Meter,
        recycler: "Recycler",
    ) -> None:
        """Start the threads.

        `names` are the arrays to deliver; `orders` this rank's streams; every stream gives `rows_per_step` rows a step
        (the last step what is left). `buffers` chunks fit the pool; `prefetch` batches wait in the queue; `recycler`
        lends memory across epochs.
        """
        self._store, self._names, self._orders = store, names, orders
        self._step, self._steps, self._rows = step, steps, rows_per_step
        self._meter = meter
        self._index: dict[str, ArrayIndex] = {n: store.index.arrays[n] for n in names}
        self._calibration = {n: store.calibration(n) for n in names if n in store.index.calibration}
        self._recycler = recycler
        self._pool = {
            n: recycler.empty(f"pool/{n}", (buffers, a.array.chunk_bytes), np.dtype(np.uint8))
            for n, a in self._index.items()
        }
        self._free = list(range(buffers))
        self._changed = threading.Condition()
        self._stop = False
        self._error: BaseException | None = None
        self._tasks = self._first_use_order()
        self._loads = self._load_order()
        self._planned: dict[int, list[_SlotTask]] = {s: [] for s in orders}
        self._out: queue.Queue[Batch | None] = queue.Queue(maxsize=prefetch)
        targets = [(f"actstore-load-{i}", self._load) for i in range(threads)] + [("actstore-gather", self._assemble)]
        self._threads = [
            threading.Thread(target=self._guard, args=(target,), name=name, daemon=True) for name, target in targets
        ]
        for thread in self._threads:
            thread.start()

    def _first_use_order(self) -> Iterator[_SlotTask]:
        """Slots of all streams in the order in which the assembler first touches them."""
        sources = {
            s: _slot_tasks(o, s, o.slot_at(self._step * self._rows))
            for s, o in self._orders.items()
            if self._step * self._rows < o.rows
        }
        heap: list[tuple[int, int, int]] = []
        heads: dict[int, _SlotTask] = {}

        def push(s: int) -> None:
            task = next(sources[s], None)
            if task is not None:
                heads[s] = task
                heapq.heappush(heap, (max(task.first_row // self._rows, self._step), s, task.t))

        for s in sources:
            push(s)
        while heap:
            _, s, _ = heapq.heappop(heap)
            yield heads[s]
            push(s)

    def _load_order(self) -> Iterator[_Resident]:
        """Loads in first-use order; tells the assembler about each slot before its first load."""
        for task in self._tasks:
            with self._changed:
                self._planned[task.stream].append(task)
                self._changed.notify_all()
            yield from task.loads

    def _guard(self, target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as e:  # noqa: BLE001  handed to the consumer, which raises it
            with self._changed:
                self._error = self._error or e
                self._stop = True
                self._changed.notify_all()

    def _load(self) -> None:
        while True:
            with self._changed:
                while not self._free and not self._stop:
                    self._changed.wait(POLL_S)
                if self._stop:
                    return
                resident = next(self._loads, None)
                if resident is None:
                    return
                resident.buffer = self._free.pop()
            for name in self._names:
                self._load_chunk(name, resident)
            with self._changed:
                resident.ready = True
                self._changed.notify_all()

    def _load_chunk(self, name: str, resident: _Resident) -> None:
        where, piece = self._index[name], resident.piece
        bucket = int(self._store.index.buckets[piece.place])
        at = where.locate(piece.place, bucket, piece.chunk)
        what = f"{self._store.url}/{at.key} chunk at byte {at.offset}"
        began = time.perf_counter()
        try:
            data = self._store.storage.get_range(at.key, at.offset, at.length)
        except OSError as e:
            raise StreamError(f"{what}: reading failed ({e})") from e
        fetched = time.perf_counter()
        codec.decode_into(data, where.array.codec, self._pool[name][resident.buffer], what, committed=at.crc32c)
        done = time.perf_counter()
        with self._meter.lock:
            self._meter.fetch_s += fetched - began
            self._meter.decode_s += done - fetched
            self._meter.stored_bytes += at.length
            self._meter.chunks += 1

    def _wait(self, condition: Callable[[], bool]) -> bool:
        """Wait until the condition holds; False if the pipeline stops."""
        with self._changed:
            while not condition():
                if self._stop:
                    return False
                self._changed.wait(POLL_S)
            return True

    def _assemble(self) -> None:
        for step in range(self._step, self._steps):
            shares = {s: self._share(order, step) for s, order in self._orders.items()}
            draft = _Draft(self._lend(sum(stop - start for start, stop in shares.values())))
            for s, (start, stop) in shares.items():
                if not self._collect(draft, s, start, stop):
                    return
            self._flush(draft)
            if not self._put(draft.batch):
                return
        self._put(None)

    def _share(self, order: StreamOrder, step: int) -> tuple[int, int]:
        """The rows of a stream that belong to a step."""
        return min(step * self._rows, order.rows), min((step + 1) * self._rows, order.rows)

    def _lend(self, rows: int) -> Batch:
        arrays = {n: a.array for n, a in self._index.items()}
        return {n: self._recycler.empty(n, (rows, *a.shape[1:]), RAW[a.dtype.name]) for n, a in arrays.items()}

    def _collect(self, draft: "_Draft", stream: int, start: int, stop: int) -> bool:
        """Add rows start to stop of a stream to the draft; False if stopped."""
        planned = self._planned[stream]
        while start < stop:
            if not planned or not planned[0].ready():
                # what is being waited for may need the buffers that the draft holds
                self._flush(draft)
                if not self._wait(lambda: bool(planned) and planned[0].ready()):
                    return False
            task = planned[0]
            end = min(stop, task.first_row + task.slot.rows)
            buffer, row = task.rows
            part = slice(start - task.first_row, end - task.first_row)
            draft.parts.append((buffer[part], row[part]))
            start = end
            if end == task.first_row + task.slot.rows:
                draft.spent.append(planned.pop(0))
        return True

    def _flush(self, draft: "_Draft") -> None:
        """Gather what the draft points to, and free the buffers of the slots it used up."""
        if draft.parts:
            began = time.perf_counter()
            buffer, row = (np.concatenate(columns) for columns in zip(*draft.parts, strict=True))
            for name, pool in self._pool.items():
                out = draft.batch[name][draft.filled : draft.filled + len(row)]
                gather(
                    pool,
                    buffer,
                    row,
                    out.reshape(len(row), -1),
                    planes=self._index[name].array.codec == "planes",
                    calibration=self._calibration.get(name),
                )
            with self._meter.lock:
                self._meter.gather_s += time.perf_counter() - began
                self._meter.delivered_bytes += sum(a.nbytes // len(a) for a in draft.batch.values()) * len(row)
            draft.filled += len(row)
            draft.parts.clear()
        if draft.spent:
            with self._changed:
                self._free.extend(r.buffer for task in draft.spent for r in task.frees)
                self._changed.notify_all()
            draft.spent.clear()

    def _put(self, batch: Batch | None) -> bool:
        while not self._stop:
            try:
                self._out.put(batch, timeout=POLL_S)
            except queue.Full:
                continue
            return True
        return False

    def next(self) -> Batch | None:
        """The next batch, None at the end; raises what a thread raised."""
        began = time.perf_counter()
        while True:
            try:
                batch = self._out.get(timeout=POLL_S)
                break
            except queue.Empty:
                if self._error is not None:
                    raise self._explained() from self._error
                if not any(t.is_alive() for t in self._threads):
                    raise StreamError("the loader's threads ended without a batch; please report this") from None
        with self._meter.lock:
            self._meter.wait_s += time.perf_counter() - began
            self._meter.batches += batch is not None
        return batch

    def _explained(self) -> BaseException:
        error = self._error
        assert error is not None
        return type(error)(*error.args) if isinstance(error, ActstoreError) else error

    def close(self) -> None:
        """Stop and join all threads."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
