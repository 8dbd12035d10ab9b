"""Loading: chunks from storage into buffers, in the order of first use, by fetchers and workers.

Workers decode and, before anything else, do the jobs that others submit (gathering). Where the storage answers slowly,
fetchers read ahead of them; from a local directory the workers read by themselves. Loads never overtake the order in
which slots need them, so room for K chunks a stream suffices; every further buffer is read-ahead.
"""

import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ActstoreError, IntegrityError, StreamError
from actstore.store.format import codec
from actstore.store.read.index import Location
from actstore.store.read.store import Store
from actstore.store.storage import LocalStorage
from actstore.stream import filter as filters
from actstore.stream.columns import Column
from actstore.stream.hedge import Hedge
from actstore.stream.meter import Meter
from actstore.stream.order import StreamOrder
from actstore.stream.residency import Resident, SlotTask, first_use_order

log = logging.getLogger("actstore.stream")

POLL_S = 0.1
REREADS = 2
"""Further reads of a chunk that arrived damaged from an object store, before it counts as damaged there."""


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


class Loader:
    """The chunks of a reading: planned, loaded, ready, freed. `loops` are for threads to run."""

    def __init__(self, store: Store, reading: Reading, memory: Memory, meter: Meter, stopping: threading.Event) -> None:
        """Nothing is loaded before the loops run; they end once `stopping` is set and `wake` called."""
        self._store, self._r, self._memory, self._meter = store, reading, memory, meter
        self._where = store.url
        self._stopping = stopping
        self._storage = store.storage.until(stopping)
        self._remote = not isinstance(self._storage, LocalStorage)
        self._hedge = Hedge(enabled=self._remote and reading.fetchers > 1)
        self._local = threading.local()
        self.lock = threading.Lock()
        self._room, self._work, self._ready = (threading.Condition(self.lock) for _ in range(3))
        self._free = list(range(reading.buffers))
        self._undecoded = reading.fetchers + reading.workers
        """Further chunks that may be fetched or wait for a worker."""
        self._decodes: list[tuple[int, Resident]] = []
        self._jobs: deque[Callable[[], None]] = deque()
        self._planned: dict[int, deque[SlotTask]] = {s: deque() for s in reading.orders}
        self._loads = self._load_order()
        self._serial = self._skips = 0
        self._exhausted = False

    def loops(self) -> list[tuple[str, Callable[[], None]]]:
        """Name and loop of every thread that is needed."""
        found = [(f"actstore-work-{i}", self._serve) for i in range(self._r.workers)]
        return found + [(f"actstore-fetch-{i}", self._fetch) for i in range(self._r.fetchers)]

    def wake(self) -> None:
        """Let everybody who waits see that it is over."""
        with self.lock:
            for condition in (self._room, self._work, self._ready):
                condition.notify_all()

    def planned(self, stream: int) -> deque[SlotTask]:
        """Slots of a stream that are planned and not yet used up, first one first."""
        return self._planned[stream]

    def await_slot(self, stream: int) -> bool:
        """Wait until the next slot of a stream is ready; False if it is over."""
        planned = self._planned[stream]
        with self.lock:
            while not (planned and planned[0].ready()):
                if self._stopping.is_set():
                    return False
                self._ready.wait(POLL_S)
        return True

    def free(self, spent: list[SlotTask]) -> None:
        """Take back the buffers of slots that are used up."""
        with self.lock:
            self._free.extend(r.buffer for task in spent for r in task.frees)
            self._room.notify_all()
            self._work.notify_all()

    def submit(self, jobs: list[Callable[[], None]]) -> None:
        """Have jobs done by workers before anything else, and by the caller, who returns when none is left to begin."""
        with self.lock:
            self._jobs.extend(jobs)
            self._work.notify(max(len(jobs) - 1, 0))
        while True:
            with self.lock:
                job = self._jobs.popleft() if self._jobs else None
            if job is None:
                return
            job()

    @property
    def waiting(self) -> dict[str, int]:
        """Chunks that wait for a worker, chunks being fetched, free buffers."""
        with self.lock:
            return {
                "chunks_fetched": len(self._decodes),
                "chunks_in_flight": self._hedge.under_way,
                "buffers_free": len(self._free),
            }

    def close(self) -> None:
        """Count retries, and let go of all memory at once instead of with the next collection of reference cycles."""
        self._meter.add(retries=self._storage.retries)
        self._storage.retries = 0
        del self._memory, self._loads
        self._planned.clear()
        self._jobs.clear()

    def _load_order(self) -> Iterator[Resident]:
        """Loads in first-use order; the assembler knows each slot before its first load. Runs under the lock."""
        r = self._r
        for task in first_use_order(r.orders, step=r.step, rows_per_step=r.rows_per_step, mix=r.mix, keep=r.keep):
            self._planned[task.stream].append(task)
            self._ready.notify_all()
            yield from task.loads

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
            with self.lock:
                while True:
                    if self._stopping.is_set():
                        return
                    if self._jobs:
                        job = self._jobs.popleft()
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
            with self.lock:
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
        with self.lock:
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
        with self.lock:
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
        with self.lock:
            resident.data, resident.ready = None, True
            self._undecoded += 1
            self._ready.notify_all()
            self._room.notify()
