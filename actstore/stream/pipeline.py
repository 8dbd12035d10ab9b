"""Batches from chunks: the order is known, so nothing is guessed.

One assembler decides what goes into a batch and gathers its rows together with the loader's workers, which come first
to that and then to loading (`loading.py`). A buffer is free again the moment the last slot that needs its chunk is
done. With room for K chunks a stream the pipeline can't deadlock, because loads never overtake the consumer's order.

All of it runs outside the GIL except the bookkeeping, which is done once a chunk and once a batch.
"""

import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ActstoreError, StreamError
from actstore.store.read.store import Store
from actstore.stream.source import POLL_S, Loader, Memory, Reading
from actstore.stream.meter import Meter
from actstore.stream.order import StreamOrder
from actstore.stream.residency import Draft

PART = 512
"""Rows that one thread gathers at a time."""
ABANDON_S = 2.0
"""Seconds that closing waits for requests under way; they end by themselves at their time-out."""


class Pipeline:
    """Batches of one rank for one epoch, from a given step on."""

    def __init__(self, store: Store, reading: Reading, memory: Memory, meter: Meter) -> None:
        """Start the threads."""
        self._r, self._memory, self._meter = reading, memory, meter
        self._stopping = threading.Event()
        self._loader = Loader(store, reading, memory, meter, self._stopping)
        self._error: BaseException | None = None
        self._closed = False
        self._out: queue.Queue[Any] = queue.Queue(maxsize=reading.prefetch)
        self._threads = [
            threading.Thread(target=self._guard, args=(loop,), name=name, daemon=True)
            for name, loop in [*self._loader.loops(), ("actstore-assemble", self._assemble)]
        ]
        for thread in self._threads:
            thread.start()
        # at the interpreter's end too: a thread that is still in native code then can abort the process
        self._end = weakref.finalize(self, _end, self._stopping, self._loader, self._threads, os.getpid())

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as e:  # noqa: BLE001  handed to the consumer, which raises it
            self._error = self._error or e
            self._halt()

    def _halt(self) -> None:
        self._stopping.set()
        self._loader.wake()

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
        planned = self._loader.planned(stream)
        while start < stop:
            waits = not planned or not planned[0].ready()
            # what is being waited for may need the buffers that the draft holds
            if waits and not (self._flush(draft) and self._loader.await_slot(stream)):
                return False
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
            self._loader.free(draft.spent)
            draft.spent.clear()
        return True

    def _gather(self, draft: Draft, buffer: NDArray[np.int64], row: NDArray[np.int64]) -> bool:
        """Gather in parts, together with the workers; False if stopped."""
        size = PART if self._memory.parallel else max(len(row), 1)
        starts = range(0, len(row), size)
        left, done, lock = [len(starts)], threading.Event(), threading.Lock()

        def part(start: int) -> None:
            began = time.perf_counter()
            stop = min(start + size, len(row))
            self._memory.gather(draft.batch, draft.filled + start, buffer[start:stop], row[start:stop])
            self._meter.add(gather_s=time.perf_counter() - began)
            with lock:
                left[0] -= 1
                if not left[0]:
                    done.set()

        self._loader.submit([partial(part, start) for start in starts])
        while starts and not done.wait(POLL_S):
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
        """Batches that are ready, and the loader's queues."""
        return {"batches_ready": self._out.qsize(), **self._loader.waiting}

    def close(self) -> None:
        """Stop all threads; a request under way is left to its time-out if it does not end soon."""
        if self._closed:
            return
        self._closed = True
        self._end()
        self._loader.close()
        del self._memory


def _end(stopping: threading.Event, loader: Loader, threads: list[threading.Thread], pid: int) -> None:
    """Stop threads and wait for them; not in a forked child, where they aren't."""
    if os.getpid() != pid:
        return
    stopping.set()
    loader.wake()
    end = time.monotonic() + ABANDON_S
    for thread in threads:
        fetcher = thread.name.startswith("actstore-fetch")
        thread.join(max(end - time.monotonic(), 0.0) if fetcher else None)
