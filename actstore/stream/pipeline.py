"""Batches from chunks: the order is known, so nothing is guessed.

A pipeline's whole state lies under one lock. Its workers take jobs from it, the most urgent kind first: gather rows of
a batch, decide what the next rows of a batch are (assemble), decode a chunk that was requested, plan further slots,
load a chunk. Where the storage answers slowly, fetchers request chunks ahead of the workers. All of it runs outside
the lock, and outside the GIL except for the bookkeeping, which is done once a chunk and once a batch.

Chunks are loaded in the order of first use (`residency.py`), and buffers are free again once the last slot that needs
them is gathered. So a pipeline can't come to a standstill; should one do so, it raises and says in which state it is.
"""

import heapq
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ActstoreError, IntegrityError, StreamError
from actstore.stream import filter as filters
from actstore.stream.hedge import Hedge
from actstore.stream.memory import Memory
from actstore.stream.meter import Meter
from actstore.stream.residency import Resident, Share, SlotTask, first_use_order
from actstore.stream.source import Source

log = logging.getLogger("actstore.stream")

PART = 512, 2048
"""Least and most rows that one thread gathers at a time."""
PLAN = 8
"""Slots that are planned at a time."""
POLL_S = 0.1
"""How often a fetcher that may ask twice looks for requests that are overdue."""
LOOK_S = 1.0
"""How often everybody who waits looks whether it is over, should nobody have called."""
ABANDON_S = 2.0
"""Seconds that closing waits for requests under way; they end by themselves at their time-out."""
REREADS = 2
"""Further reads of a chunk that arrived damaged from an object store, before it counts as damaged there."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a pipeline does: one rank's part of an epoch, from a given step on."""

    shares: tuple[Share, ...]
    steps: range
    batch_rows: int
    """Rows of the largest batch."""
    workers: int
    fetchers: int
    """0: the workers read."""
    prefetch: int
    """Batches that are ready, or being made behind the first one."""
    skip_chunks: int
    """Chunks that may be skipped when they can't be read."""


@dataclass(eq=False, slots=True)
class Draft:
    """A batch in the making."""

    batch: Any
    filled: int = 0
    gathering: int = 0
    """Jobs that fill it and are not done."""
    complete: bool = False
    """Whether all its rows are decided."""


@dataclass(eq=False, slots=True)
class Flush:
    """Rows that are gathered together, and the chunks that nobody needs any more when they are."""

    gathering: int
    frees: list[Resident]


@dataclass(eq=False)
class Cursor:
    """The place in the order up to which rows are decided: the assembler's own."""

    step: int
    draft: Draft | None = None
    spans: list[tuple[int, int, int, int]] = field(default_factory=list[tuple[int, int, int, int]])
    """Share, stream, first and last row of what the batch still needs, last one first."""


class Pipeline:
    """Batches of one rank for one epoch, from a given step on."""

    def __init__(
        self,
        source: Source,
        reading: Reading,
        memories: Sequence[Memory],
        meter: Meter,
        stopping: threading.Event,
    ) -> None:
        """Start the threads. Memories are those of the reading's shares; `stopping` is the source's."""
        self._source, self._r, self._memories, self._meter = source, reading, memories, meter
        self._stopping = stopping
        self._lock = threading.Lock()
        self._work, self._room, self._ready = (threading.Condition(self._lock) for _ in range(3))
        self._error: BaseException | None = None
        self._closed = False

        self._tasks: Iterator[SlotTask] | None = first_use_order(reading.shares, reading.steps)
        self._planning = self._assembling = False
        self._planned = {(i, s): deque[SlotTask]() for i, share in enumerate(reading.shares) for s in share.streams}
        self._loads: deque[Resident] = deque()
        self._lookahead = 2 * reading.workers + reading.fetchers
        self._free = [list(range(share.buffers)) for share in reading.shares]
        self._kept: list[NDArray[np.int32] | None] = [self._kept_rows(share) for share in reading.shares]
        self._undecoded = reading.fetchers + reading.workers
        """Further chunks that may be requested or wait for a worker."""
        self._decodes: list[tuple[int, Resident]] = []
        self._again: deque[Resident] = deque()
        """Arrived damaged, to be requested once more."""
        self._serial = self._skips = 0

        self._cursor = Cursor(reading.steps.start)
        self._jobs: deque[Callable[[], None]] = deque()
        self._flushes: deque[Flush] = deque()
        self._drafts: deque[Draft] = deque()
        self._out: deque[Draft] = deque()
        self._idle = self._busy = 0

        remote = any(source.remote(c) for share in reading.shares for c in share.columns.values())
        self._hedge = Hedge(enabled=remote and reading.fetchers > 1)
        loops = [(f"actstore-work-{i}", self._worker) for i in range(reading.workers)]
        loops += [(f"actstore-fetch-{i}", self._fetcher) for i in range(reading.fetchers)]
        self._threads = [threading.Thread(target=self._guard, args=(f,), name=n, daemon=True) for n, f in loops]
        for thread in self._threads:
            thread.start()
        # at the interpreter's end too: a thread that is still in native code then can abort the process
        self._end = weakref.finalize(self, _end, self._stopping, self._wake, self._threads, os.getpid())

    # the consumer

    def next(self) -> Any:
        """The next batch, None at the end; raises what a thread raised."""
        began = time.perf_counter()
        with self._lock:
            while not (self._out or self._error or self._closed or self._finished()):
                self._ready.wait(LOOK_S)
            if self._closed:
                raise StreamError(
                    "this loop was ended by close(), refresh(), load_state_dict() or another loop over the same "
                    "dataset; begin a new one"
                )
            if not self._out and self._error is not None:
                error = self._error
                raise (type(error)(*error.args) if isinstance(error, ActstoreError) else error) from error
            draft = self._out.popleft() if self._out else None
            self._call_worker()
            self._meter.wait_s += time.perf_counter() - began
            self._meter.batches += draft is not None
        return None if draft is None else self._memories[0].finish(draft.batch, draft.filled)

    @property
    def waiting(self) -> dict[str, int]:
        """Batches that are ready, chunks that wait for a worker, chunks being requested, free buffers."""
        with self._lock:
            return self._state()

    def count_retries(self) -> None:
        """Add to the meter the requests that were sent again since the last call."""
        with self._lock:
            self._meter.retries += self._source.take_retries()

    def close(self) -> None:
        """Stop all threads; a request under way is left to its time-out if it does not end soon."""
        if threading.current_thread() in self._threads:  # the collector found the loop's end here, with the lock held
            self._closed = True
            self._stopping.set()
            return
        with self._lock:
            closed, self._closed = self._closed, True
        if closed:
            return
        self._end()
        self.count_retries()
        # all memory at once, instead of with the next collection of reference cycles
        del self._memories
        self._tasks = None
        for held in (self._planned, self._jobs, self._loads, self._drafts, self._out, self._decodes, self._flushes):
            held.clear()
        self._again.clear()

    # threads

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as e:  # noqa: BLE001  handed to the consumer, which raises it
            with self._lock:
                self._error = self._error or e
            self._stopping.set()
            self._wake()

    def _wake(self) -> None:
        """Let everybody who waits see that it is over."""
        with self._lock:
            for condition in (self._room, self._work, self._ready):
                condition.notify_all()

    def _call_worker(self) -> None:
        """Have a worker look for a job; each calls the next one while there is more. Under the lock."""
        if self._idle and (
            self._jobs
            or self._decodes
            or self._can_plan()
            or (not self._r.fetchers and self._can_admit())
            or (not self._assembling and self._can_assemble())
        ):
            self._work.notify()

    def _worker(self) -> None:
        while True:
            with self._lock:
                job = None
                while not self._stopping.is_set() and (job := self._pick()) is None:
                    self._refuse_standstill()
                    self._idle += 1
                    self._work.wait(LOOK_S)
                    self._idle -= 1
                if job is None:
                    return
                self._busy += 1
                self._call_worker()
            job()
            with self._lock:
                self._busy -= 1

    def _pick(self) -> Callable[[], None] | None:
        """The most urgent job; None if there is none right now. Under the lock."""
        if self._jobs:
            return self._jobs.popleft()
        if not self._assembling and self._can_assemble():
            self._assembling = True
            return self._assemble
        if self._decodes:
            _, resident = heapq.heappop(self._decodes)
            return partial(self._load, resident)
        if self._can_plan():
            self._planning = True
            return self._plan
        if not self._r.fetchers and (found := self._admit()) is not None:
            return partial(self._load, found)
        return None

    def _finished(self) -> bool:
        """Whether every batch has been handed out."""
        return self._cursor.step >= self._r.steps.stop and not (self._cursor.draft or self._drafts or self._out)

    def _refuse_standstill(self) -> None:
        """Raise if nothing is under way, nothing can be begun and the consumer isn't what is waited for."""
        waits_for_consumer = self._cursor.draft is None and (self._out or self._cursor.step >= self._r.steps.stop)
        fetches = self._r.fetchers and (self._again or self._can_admit())
        if not (self._busy or waits_for_consumer or fetches):
            raise StreamError(
                f"the loader has come to a standstill, which is a bug in actstore; please report this: step "
                f"{self._cursor.step} of {self._r.steps}, {self._state()}, "
                f"of {[share.buffers for share in self._r.shares]} buffers, {len(self._loads)} chunks planned"
            )

    def _state(self) -> dict[str, int]:
        return {
            "batches_ready": len(self._out),
            "chunks_fetched": len(self._decodes),
            "chunks_in_flight": self._hedge.under_way,
            "buffers_free": sum(map(len, self._free)),
        }

    # planning

    def _can_plan(self) -> bool:
        return self._tasks is not None and not self._planning and len(self._loads) < self._lookahead

    def _plan(self) -> None:
        """Plan further slots."""
        assert self._tasks is not None
        found = [task for _, task in zip(range(PLAN), self._tasks, strict=False)]
        with self._lock:
            self._planning = False
            for task in found:
                self._planned[task.share, task.stream].append(task)
                self._loads.extend(task.loads)
            if len(found) < PLAN:
                self._tasks = None
            self._room.notify(len(self._loads))

    # loading

    def _can_admit(self) -> bool:
        return bool(self._loads and self._free[self._loads[0].share] and self._undecoded)

    def _admit(self) -> Resident | None:
        """The next chunk to load, with a buffer of its own; None if there is no room for it. Under the lock."""
        if not self._can_admit():
            return None
        resident = self._loads.popleft()
        resident.buffer, resident.serial = self._free[resident.share].pop(), self._serial
        self._serial += 1
        self._undecoded -= 1
        return resident

    def _fetcher(self) -> None:
        """Request chunks in order; with nothing else to do, once more the one that is overdue."""
        while True:
            with self._lock:
                first = second = None
                while not self._stopping.is_set():
                    if (first := self._again.popleft() if self._again else self._admit()) is not None:
                        break
                    if (second := self._hedge.overdue()) is not None:
                        break
                    self._room.wait(LOOK_S if self._hedge.idle else POLL_S)
                resident = first or second
                if resident is None:
                    return
                self._busy += 1
                resident.tries += 1
                began = self._hedge.begin(resident, second=first is None)
                self._call_worker()
            self._request(resident, began, second=first is None)
            with self._lock:
                self._busy -= 1

    def _request(self, resident: Resident, began: float, *, second: bool) -> None:
        columns = self._r.shares[resident.share].columns
        error: ActstoreError | None = None
        intact, data = resident.data or [None] * len(columns), list[Any]()
        try:
            for column, known in zip(columns.values(), intact, strict=True):
                data.append(self._source.fetch(column, resident.piece) if known is None else known)
        except ActstoreError as e:
            error = e
        seconds = time.perf_counter() - began
        with self._lock:
            self._meter.fetch_s += seconds
            asked = [found for found, known in zip(data, intact, strict=False) if known is None]
            self._meter.requests += len(asked)
            self._meter.stored_bytes += sum(map(len, asked))
            self._meter.hedges += second
            resident.tries -= 1
            if resident.fetched or (error is not None and (resident.tries or resident in self._again)):
                return  # the other request was faster, or may yet succeed
            resident.fetched = True
            if resident in self._again:  # a hedge answered before the damaged chunk was requested once more
                self._again.remove(resident)
            self._hedge.end(resident, seconds if error is None and not second else None)
            if error is None:
                self._meter.hedges_won += second
                resident.data = data
                heapq.heappush(self._decodes, (resident.serial, resident))
                self._call_worker()
                return
        self._skip(resident, error)

    def _load(self, resident: Resident) -> None:
        """Decode a chunk, read it first if nobody has; then it is ready."""
        i = resident.share
        share, memory, data = self._r.shares[i], self._memories[i], resident.data
        nbytes, reading_s, decode_s = 0, 0.0, 0.0
        held: dict[str, NDArray[np.uint8]] = {}
        k = 0
        try:
            for k, (name, column) in enumerate(share.columns.items()):
                fetched = None if data is None else data[k]
                done = self._source.load(column, resident.piece, memory, resident.buffer, fetched)
                nbytes, reading_s, decode_s = nbytes + done[0], reading_s + done[1], decode_s + done[2]
                if name in share.where.columns:
                    held[name] = memory.held(name, resident.buffer)
        except ActstoreError as e:
            self._unreadable(resident, e, k)
            return
        kept = self._kept[i]
        if kept is not None:
            found = filters.kept_of_chunk(share.store, share.where, share.columns, held, resident.piece)
            kept[resident.buffer, : len(found)] = found
        with self._lock:
            self._meter.fetch_s += reading_s
            self._meter.decode_s += decode_s
            self._meter.chunks += 1
            if data is None:
                self._meter.stored_bytes += nbytes
                self._meter.requests += len(share.columns)
            self._settle(resident)

    def _unreadable(self, resident: Resident, error: ActstoreError, k: int) -> None:
        """What arrived damaged from an object store is requested again, array `k` alone; other chunks are skipped."""
        columns = self._r.shares[resident.share].columns.values()
        if not (isinstance(error, IntegrityError) and any(map(self._source.remote, columns))):
            self._skip(resident, error)
            return
        if resident.rereads.get(k) == REREADS:
            self._skip(resident, IntegrityError(f"{error} (read {REREADS + 1} times)"))
            return
        with self._lock:
            self._meter.retries += 1
            resident.rereads[k] = resident.rereads.get(k, 0) + 1
            resident.fetched = False
            if resident.data is not None:
                resident.data = [None if i == k else data for i, data in enumerate(resident.data)]
            if not self._r.fetchers:
                heapq.heappush(self._decodes, (resident.serial, resident))
                return
            self._again.append(resident)
            self._room.notify()

    def _skip(self, resident: Resident, error: ActstoreError | None) -> None:
        """Go on without a chunk, if so many may be missing; else raise."""
        assert error is not None
        with self._lock:
            self._skips += 1
            over = self._skips > self._r.skip_chunks
        if over and self._r.skip_chunks and not self._stopping.is_set():
            raise StreamError(
                f"{self._skips} chunks of this epoch can't be read, skip_chunks allows {self._r.skip_chunks}; "
                f"the last one: {error}"
            ) from error
        if over or self._stopping.is_set():
            raise error
        log.warning("skipped a chunk (%d of %d allowed): %s", self._skips, self._r.skip_chunks, error)
        with self._lock:
            self._meter.skipped_chunks += 1
            resident.failed = True
            self._settle(resident)

    def _settle(self, resident: Resident) -> None:
        """A chunk is ready. Under the lock."""
        resident.data, resident.ready = None, True
        self._undecoded += 1
        self._room.notify()
        self._call_worker()

    @staticmethod
    def _kept_rows(share: Share) -> NDArray[np.int32] | None:
        """Room for the rows that pass the filter, by buffer; None without a filter."""
        if not share.where:
            return None
        rows = next(iter(share.columns.values())).index.array.chunk_rows
        return np.zeros((share.buffers, rows), np.int32)

    # batches

    def _can_assemble(self) -> bool:
        """Whether rows can be decided now: a slot is ready, or a batch may be begun."""
        cursor = self._cursor
        if cursor.draft is None:
            room = len(self._drafts) + len(self._out) <= self._r.prefetch
            return room and cursor.step < self._r.steps.stop
        planned = self._planned[cursor.spans[-1][:2]]
        return bool(planned) and planned[0].ready()

    def _begin(self, cursor: Cursor) -> Draft:
        shares = self._r.shares
        spans = [(i, s, *share.span(cursor.step, s)) for i, share in enumerate(shares) for s in share.streams]
        cursor.spans = [span for span in reversed(spans) if span[2] < span[3]]
        return Draft(self._memories[0].batch(self._r.batch_rows))

    def _assemble(self) -> None:
        """Decide rows of the batch at the cursor until it has all, or a slot isn't ready; have them gathered."""
        cursor = self._cursor
        new = cursor.draft is None
        draft = cursor.draft or self._begin(cursor)
        found: list[tuple[int, NDArray[np.int64], NDArray[np.int64]]] = []
        frees: list[Resident] = []
        while cursor.spans:
            i, stream, start, stop = cursor.spans[-1]
            planned = self._planned[i, stream]
            if not planned or not planned[0].ready():
                break
            task = planned[0]
            buffer, row = self._rows_of(task)
            end = min(stop, task.stop)
            here = slice(start - task.start, end - task.start)
            found.append((i, buffer[here], row[here]))
            if end == task.stop:
                frees.extend(planned.popleft().frees)
            if end == stop:
                cursor.spans.pop()
            else:
                cursor.spans[-1] = i, stream, end, stop
        jobs = self._gathers(draft, found)
        with self._lock:
            self._assembling = False
            if new:
                self._drafts.append(draft)
            draft.complete = not cursor.spans
            cursor.draft = None if draft.complete else draft
            cursor.step += draft.complete
            draft.gathering += len(jobs)
            flush = Flush(len(jobs), frees)
            self._flushes.append(flush)
            self._jobs.extend(partial(self._gather, draft, flush, job) for job in jobs)
            self._settle_flushes()

    def _rows_of(self, task: SlotTask) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Buffer (-1: skipped) and row in its chunk of every row of a slot whose chunks are ready."""
        if task.pairs is None:
            buffers = np.array([-1 if r.failed else r.buffer for r in task.residents])
            buffer, row = task.order.rows_of(task.t, task.slot, buffers)
            kept = self._kept[task.share]
            task.pairs = buffer, row if kept is None else kept[buffer, row].astype(np.int64)
        return task.pairs

    def _gathers(
        self, draft: Draft, found: list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]
    ) -> list[Callable[[], None]]:
        """Jobs that gather rows into a draft, in parts for several workers."""
        jobs: list[Callable[[], None]] = []
        for i, memory in enumerate(self._memories):
            mine = [(buffer, row) for share, buffer, row in found if share == i]
            if not mine:
                continue
            buffer, row = (np.concatenate(columns) for columns in zip(*mine, strict=True))
            if self._skips and (buffer < 0).any():
                self._meter.skipped_rows += int((buffer < 0).sum())
                row, buffer = row[buffer >= 0], buffer[buffer >= 0]
            size = len(row)
            if memory.parallel:
                size = min(max(-(-len(row) // self._r.workers), PART[0]), PART[1])
            for start in range(0, len(row), max(size, 1)):
                part = buffer[start : start + size], row[start : start + size]
                jobs.append(partial(memory.gather, draft.batch, draft.filled + start, *part))
            draft.filled += len(row)
        return jobs

    def _gather(self, draft: Draft, flush: Flush, job: Callable[[], None]) -> None:
        began = time.perf_counter()
        job()
        with self._lock:
            self._meter.gather_s += time.perf_counter() - began
            draft.gathering -= 1
            flush.gathering -= 1
            self._settle_flushes()

    def _settle_flushes(self) -> None:
        """Free what was gathered, in order as a chunk may serve several flushes; hand out batches. Under the lock."""
        while self._flushes and not self._flushes[0].gathering:
            for resident in self._flushes.popleft().frees:
                self._free[resident.share].append(resident.buffer)
                self._room.notify()
        while self._drafts and self._drafts[0].complete and not self._drafts[0].gathering:
            self._out.append(self._drafts.popleft())
            self._ready.notify()
        self._call_worker()


def _end(stopping: threading.Event, wake: Callable[[], None], threads: list[threading.Thread], pid: int) -> None:
    """Stop threads and wait for them; not in a forked child, where they aren't."""
    if os.getpid() != pid:
        return
    stopping.set()
    wake()
    end = time.monotonic() + ABANDON_S
    for thread in threads:
        fetcher = thread.name.startswith("actstore-fetch")
        thread.join(max(end - time.monotonic(), 0.0) if fetcher else None)
