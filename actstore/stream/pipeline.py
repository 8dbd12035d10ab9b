"""Fetch, decode and gather in threads: the order is known, so nothing is guessed.

Chunks are loaded strictly in the order of first use, each into a buffer of a fixed pool. Workers decode and, before
anything else, gather; one assembler decides what goes into a batch and gathers with them. Where the storage answers
slowly, fetchers read ahead of the workers; from a local directory the workers read by themselves. A buffer is free
again the moment the last slot that needs its chunk is done. With room for K chunks a stream the pipeline can't
deadlock, because loads never overtake the consumer's order; every further buffer is read-ahead.

All of it runs outside the GIL except the bookkeeping, which is done once a chunk and once a batch.
"""

import heapq
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ActstoreError, IntegrityError, StreamError
from actstore.store import codec
from actstore.store.manifest import Location
from actstore.store.reader import Store
from actstore.store.storage import LocalStorage
from actstore.stream import filter as filters
from actstore.stream.hedge import Hedge
from actstore.stream.host import Column
from actstore.stream.meter import Meter
from actstore.stream.order import StreamOrder
from actstore.stream.tasks import Draft, Resident, SlotTask, first_use_order

log = logging.getLogger("actstore.stream")

POLL_S = 0.1
PART = 512
"""Rows that one thread gathers at a time."""
REREADS = 2
"""Further reads of a chunk that arrived damaged from an object store, before it counts as damaged there."""
ABANDON_S = 2.0
"""Seconds that closing waits for requests under way; they end by themselves at their time-out."""


class Memory(Protocol):
    """Where decoded chunks and batches lie: `HostMemory` or `DeviceMemory`."""

    parallel: bool

    def chunk(self, name: str, buffer: int) -> NDArray[np.uint8]:
        """Where the calling thread decodes a chunk to."""
        ...

    def loaded(self, name: str, buffer: int) -> None:
        """A chunk has been decoded by the calling thread."""
        ...

    def batch(self, rows: int) -> Any:
        """The memory of a batch."""
        ...

    def gather(self, batch: Any, start: int, buffer: NDArray[np.int64], row: NDArray[np.int64]) -> None:
        """Fill rows of a batch."""
        ...

    def finish(self, batch: Any, rows: int) -> Any:
        """What is delivered of a batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a pipeline does: one rank's part of one epoch."""

    columns: Mapping[str, Column]
    where: filters.RowFilter
    orders: Mapping[int, StreamOrder]
    """This rank's streams."""
    step: int
    """First step."""
    steps: int
    """Of the epoch."""
    rows_per_step: int
    """Of each stream; the last step has what is left."""
    mix: int
    keep: bool
    """See `tasks.slot_tasks`."""
    workers: int
    fetchers: int
    """0: the workers read."""
    buffers: int
    prefetch: int
    """Batches that wait in the queue."""
    skip_chunks: int
    """Chunks that may be skipped when they can't be read."""


@dataclass
class _Gathering:
    """Parts of a batch that are being gathered."""

    left: int
    done: threading.Event = field(default_factory=threading.Event)


class Pipeline:
    """Batches of one rank for one epoch, from a given step on."""

    def __init__(self, store: Store, reading: Reading, memory: Memory, meter: Meter) -> None:
        """Start the threads."""
        self._store, self._r, self._memory, self._meter = store, reading, memory, meter
        self._where = store.url
        self._stopping = threading.Event()
        self._storage = store.storage.until(self._stopping)
        self._remote = not isinstance(self._storage, LocalStorage)
        self._hedge = Hedge(enabled=self._remote and reading.fetchers > 1)
        self._local = threading.local()
        lock = threading.Lock()
        self._room, self._work, self._ready = (threading.Condition(lock) for _ in range(3))
        self._lock = lock
        self._free = list(range(reading.buffers))
        self._undecoded = reading.fetchers + reading.workers
        """Further chunks that may be fetched or wait for a worker."""
        self._decodes: list[tuple[int, Resident]] = []
        self._gathers: deque[Callable[[], None]] = deque()
        self._error: BaseException | None = None
        self._skips = 0
        self._planned: dict[int, deque[SlotTask]] = {s: deque() for s in reading.orders}
        self._loads = self._load_order()
        self._serial = 0
        self._exhausted = self._closed = False
        self._out: queue.Queue[Any] = queue.Queue(maxsize=reading.prefetch)
        targets = [(f"actstore-work-{i}", self._serve) for i in range(reading.workers)]
        targets += [(f"actstore-fetch-{i}", self._fetch) for i in range(reading.fetchers)]
        targets.append(("actstore-assemble", self._assemble))
        self._threads = [
            threading.Thread(target=self._guard, args=(target,), name=name, daemon=True) for name, target in targets
        ]
        for thread in self._threads:
            thread.start()

    def _load_order(self) -> Iterator[Resident]:
        """Loads in first-use order; the assembler knows each slot before its first load. Runs under the lock."""
        r = self._r
        for task in first_use_order(r.orders, step=r.step, rows_per_step=r.rows_per_step, mix=r.mix, keep=r.keep):
            self._planned[task.stream].append(task)
            self._ready.notify_all()
            yield from task.loads

    def _guard(self, target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as e:  # noqa: BLE001  handed to the consumer, which raises it
            with self._lock:
                self._error = self._error or e
            self._halt()

    def _halt(self) -> None:
        with self._lock:
            self._stopping.set()
            for condition in (self._room, self._work, self._ready):
                condition.notify_all()

    def _admit(self) -> Resident | None:
        """The next chunk to load, with a buffer of its own; None without room, or at the end. Under the lock."""
        if not self._free or self._exhausted or not self._undecoded:
            return None
        resident = next(self._loads, None)
        if resident is None:
            self._exhausted = True
            self._room.notify_all()
            return None
        resident.buffer, resident.serial = self._free.pop(), self._serial
        self._serial += 1
        self._undecoded -= 1
        return resident

    def _serve(self) -> None:
        """A worker: gather first, else decode what was fetched, else read and decode."""
        while True:
            with self._lock:
                while True:
                    if self._stopping.is_set():
                        return
                    if self._gathers:
                        job = self._gathers.popleft()
                        break
                    if self._decodes:
                        _, resident = heapq.heappop(self._decodes)
                        job = self._loader(resident)
                        break
                    if not self._r.fetchers and (resident := self._admit()) is not None:
                        job = self._loader(resident)
                        break
                    self._work.wait(POLL_S)
            job()

    def _loader(self, resident: Resident) -> Callable[[], None]:
        return lambda: self._load(resident)

    def _fetch(self) -> None:
        """A fetcher: request chunks in order, or once more the one that is overdue."""
        while True:
            with self._lock:
                while True:
                    if self._stopping.is_set():
                        return
                    second = True
                    if (resident := self._hedge.overdue()) is not None:
                        break
                    second = False
                    if (resident := self._admit()) is not None:
                        break
                    if self._exhausted and self._hedge.idle:
                        return
                    self._room.wait(POLL_S)
                resident.tries += 1
                began = self._hedge.begin(resident, second=second)
            self._request(resident, began, second=second)

    def _request(self, resident: Resident, began: float, *, second: bool) -> None:
        error: ActstoreError | None = None
        data: list[Any] = []
        try:
            data = [self._read(name, resident) for name in self._r.columns]
        except ActstoreError as e:
            error = e
        seconds = time.perf_counter() - began
        self._meter.add(fetch_s=seconds, hedges=second)
        with self._lock:
            resident.tries -= 1
            if resident.fetched or (error is not None and resident.tries):
                return  # the other request was faster, or may yet succeed
            resident.fetched = True
            self._hedge.end(resident, seconds if error is None and not second else None)
            if error is None:
                resident.data = data
                heapq.heappush(self._decodes, (resident.serial, resident))
                self._work.notify()
        if error is not None:
            self._skip(resident, error)
        elif second:
            self._meter.add(hedges_won=1)

    def _locate(self, name: str, resident: Resident) -> tuple[Location, str]:
        """Where a chunk lies, and what errors call it."""
        piece = resident.piece
        at = self._r.columns[name].index.locate(piece.place, int(self._store.index.buckets[piece.place]), piece.chunk)
        return at, f"{self._where}/{at.key} chunk at byte {at.offset}"

    def _read(self, name: str, resident: Resident) -> Any:
        """The stored bytes of a chunk; from a directory, in memory that this thread's next read takes again."""
        at, what = self._locate(name, resident)
        if not self._r.fetchers and isinstance(self._storage, LocalStorage):
            if getattr(self._local, "memory", memoryview(b"")).nbytes < at.length:
                self._local.memory = memoryview(bytearray(at.length + at.length // 8))
            view: memoryview = self._local.memory[: at.length]
            self._read_into([view], at, what)
            return view
        self._meter.add(stored_bytes=at.length, requests=1)
        try:
            return self._storage.get_range(at.key, at.offset, at.length)
        except OSError as e:
            raise StreamError(f"{what}: reading failed ({e})") from e

    def _read_into(self, out: list[memoryview], at: Location, what: str) -> None:
        """Fill buffers with the stored bytes of a chunk in a directory."""
        assert isinstance(self._storage, LocalStorage)
        self._meter.add(stored_bytes=at.length, requests=1)
        try:
            self._storage.read_into(out, at.key, at.offset)
        except OSError as e:
            raise StreamError(f"{what}: reading failed ({e})") from e

    def _load(self, resident: Resident) -> None:
        """Decode a chunk, read it first if nobody has; then it is ready."""
        try:
            for i, name in enumerate(self._r.columns):
                self._decode(name, resident, None if resident.data is None else resident.data[i])
            self._select(resident)
        except ActstoreError as e:
            self._skip(resident, e)
            return
        self._meter.add(chunks=1)
        self._settle(resident)

    def _decode(self, name: str, resident: Resident, data: Any) -> None:
        column = self._r.columns[name]
        at, what = self._locate(name, resident)
        out = self._memory.chunk(name, resident.buffer)
        if data is None and column.index.array.codec == "none" and at.length == out.nbytes + codec.CRC_BYTES:
            self._take(out, at, what)
            self._memory.loaded(name, resident.buffer)
            return
        reads = 0
        while True:
            began = time.perf_counter()
            if data is None:
                data = self._read(name, resident)
                fetched = time.perf_counter()
                self._meter.add(fetch_s=fetched - began)
                began = fetched
            try:
                codec.decode_into(data, column.index.array.codec, out, what, committed=at.crc32c)
                break
            except IntegrityError as e:
                if not self._remote or reads == REREADS:
                    if not reads:
                        raise
                    raise IntegrityError(f"{e} (read {reads + 1} times)") from e
                reads, data = reads + 1, None
                self._meter.add(retries=1)
        self._memory.loaded(name, resident.buffer)
        self._meter.add(decode_s=time.perf_counter() - began)

    def _take(self, out: NDArray[np.uint8], at: Location, what: str) -> None:
        """Read a chunk that is stored as it is straight to its place."""
        began = time.perf_counter()
        tail = bytearray(codec.CRC_BYTES)
        self._read_into([out.data, memoryview(tail)], at, what)
        fetched = time.perf_counter()
        codec.check_crc(out.data, tail, what, committed=at.crc32c)
        self._meter.add(fetch_s=fetched - began, decode_s=time.perf_counter() - fetched)

    def _select(self, resident: Resident) -> None:
        """Note which rows of a chunk pass the filter."""
        if not self._r.where:
            return
        store, piece = self._store, resident.piece
        spec, bucket = store.spec, int(store.index.buckets[piece.place])
        first, stop = spec.bucket_range(bucket)
        rows = min(spec.chunk_rows, stop - first - piece.chunk * spec.chunk_rows)
        decoded: dict[str, NDArray[Any]] = {}
        calibrations = {n: c.calibration for n, c in self._r.columns.items() if c.calibration is not None}
        for name in self._r.where.columns:
            array = self._r.columns[name].index.array
            elements = codec.merge(
                self._memory.chunk(name, resident.buffer), array.codec, filters.element_type(store, name)
            )
            decoded[name] = elements.reshape(-1, *array.shape[1:])[:rows]
        row = bucket * spec.bucket_rows + piece.chunk * spec.chunk_rows
        resident.kept = np.flatnonzero(filters.kept(self._r.where, decoded, row, calibrations))
        if len(resident.kept) < piece.start + piece.rows:
            raise StreamError(
                f"{self._where}: {len(resident.kept)} rows of chunk {piece.chunk} of bucket {bucket} pass the filter, "
                f"{piece.start + piece.rows} were counted; the store changed, open it again"
            )

    def _skip(self, resident: Resident, error: ActstoreError) -> None:
        """Go on without a chunk, if so many may be missing; else raise."""
        with self._lock:
            self._skips += 1
            over = self._skips > self._r.skip_chunks
        if over or self._stopping.is_set():
            if self._r.skip_chunks:
                raise StreamError(
                    f"{self._skips} chunks of this epoch can't be read, skip_chunks allows {self._r.skip_chunks}; "
                    f"the last one: {error}"
                ) from error
            raise error
        log.warning("skipped a chunk (%d of %d allowed): %s", self._skips, self._r.skip_chunks, error)
        self._meter.add(skipped_chunks=1)
        resident.failed = True
        self._settle(resident)

    def _settle(self, resident: Resident) -> None:
        with self._lock:
            resident.data, resident.ready = None, True
            self._undecoded += 1
            self._ready.notify_all()
            self._room.notify()

    def _assemble(self) -> None:
        r = self._r
        for step in range(r.step, r.steps):
            shares = {s: self._share(order, step) for s, order in r.orders.items()}
            draft = Draft(self._memory.batch(sum(stop - start for start, stop in shares.values())))
            for s, (start, stop) in shares.items():
                if not self._collect(draft, s, start, stop):
                    return
            if not self._flush(draft) or not self._put(self._memory.finish(draft.batch, draft.filled)):
                return
        self._put(None)

    def _share(self, order: StreamOrder, step: int) -> tuple[int, int]:
        """The rows of a stream that belong to a step."""
        return min(step * self._r.rows_per_step, order.rows), min((step + 1) * self._r.rows_per_step, order.rows)

    def _collect(self, draft: Draft, stream: int, start: int, stop: int) -> bool:
        """Add rows start to stop of a stream to the draft; False if stopped."""
        planned = self._planned[stream]
        while start < stop:
            if not planned or not planned[0].ready():
                # what is being waited for may need the buffers that the draft holds
                if not self._flush(draft):
                    return False
                with self._lock:
                    while not (planned and planned[0].ready()):
                        if self._stopping.is_set():
                            return False
                        self._ready.wait(POLL_S)
            task = planned[0]
            end = min(stop, task.first_row + task.slot.rows)
            buffer, row = task.rows
            part = slice(start - task.first_row, end - task.first_row)
            draft.parts.append((buffer[part], row[part]))
            start = end
            if end == task.first_row + task.slot.rows:
                draft.spent.append(planned.popleft())
        return True

    def _flush(self, draft: Draft) -> bool:
        """Gather what the draft points to, and free the buffers of the slots it used up; False if stopped."""
        if draft.parts:
            buffer, row = (np.concatenate(columns) for columns in zip(*draft.parts, strict=True))
            if (buffer < 0).any():
                self._meter.add(skipped_rows=int((buffer < 0).sum()))
                row, buffer = row[buffer >= 0], buffer[buffer >= 0]
            if not self._gather(draft, buffer, row):
                return False
            draft.filled += len(row)
            draft.parts.clear()
        if draft.spent:
            with self._lock:
                self._free.extend(r.buffer for task in draft.spent for r in task.frees)
                self._room.notify_all()
                self._work.notify_all()
            draft.spent.clear()
        return True

    def _gather(self, draft: Draft, buffer: NDArray[np.int64], row: NDArray[np.int64]) -> bool:
        """Gather in parts, together with the workers; False if stopped."""
        size = PART if self._memory.parallel else max(len(row), 1)
        starts = range(0, len(row), size)
        state = _Gathering(len(starts))

        def part(start: int) -> None:
            began = time.perf_counter()
            stop = min(start + size, len(row))
            self._memory.gather(draft.batch, draft.filled + start, buffer[start:stop], row[start:stop])
            self._meter.add(gather_s=time.perf_counter() - began)
            with self._lock:
                state.left -= 1
                if not state.left:
                    state.done.set()

        with self._lock:
            self._gathers.extend(lambda start=start: part(start) for start in starts)
            self._work.notify(max(len(starts) - 1, 0))
        while True:
            with self._lock:
                job = self._gathers.popleft() if self._gathers else None
            if job is None:
                break
            job()
        while starts and not state.done.wait(POLL_S):
            if self._stopping.is_set():
                return False
        return True

    def _put(self, batch: Any) -> bool:
        while not self._stopping.is_set():
            try:
                self._out.put(batch, timeout=POLL_S)
            except queue.Full:
                continue
            return True
        return False

    def next(self) -> Any:
        """The next batch, None at the end; raises what a thread raised."""
        began = time.perf_counter()
        while True:
            if self._closed:
                raise StreamError(
                    "this loop was ended by close(), refresh(), load_state_dict() or another loop over the same "
                    "dataset; begin a new one"
                )
            try:
                batch = self._out.get(timeout=POLL_S)
                break
            except queue.Empty:
                if self._error is not None:
                    raise self._explained() from self._error
        self._meter.add(wait_s=time.perf_counter() - began, batches=batch is not None)
        return batch

    def _explained(self) -> BaseException:
        error = self._error
        assert error is not None
        return type(error)(*error.args) if isinstance(error, ActstoreError) else error

    @property
    def waiting(self) -> dict[str, int]:
        """Batches that are ready, chunks that wait for a worker, chunks being fetched, free buffers."""
        with self._lock:
            return {
                "batches_ready": self._out.qsize(),
                "chunks_fetched": len(self._decodes),
                "chunks_in_flight": self._hedge.under_way,
                "buffers_free": len(self._free),
            }

    def close(self) -> None:
        """Stop all threads; a request under way is left to its time-out if it does not end soon."""
        if self._closed:
            return
        self._closed = True
        self._halt()
        end = time.monotonic() + ABANDON_S
        for thread in self._threads:
            fetcher = thread.name.startswith("actstore-fetch")
            thread.join(max(end - time.monotonic(), 0.0) if fetcher else None)
        self._meter.add(retries=self._storage.retries)
        self._storage.retries = 0
        # what is lent goes back at once, not with the next collection of reference cycles
        del self._memory, self._loads
        self._planned.clear()
        self._gathers.clear()
