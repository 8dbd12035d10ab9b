"""The pipeline in a process of its own: `isolate=True`.

For trainers whose Python keeps the interpreter lock busy, and so slows the pipeline's bookkeeping, or is slowed by it
(Meta's SPDL measured both). The process is a fresh interpreter that runs nothing of the caller's program; it opens the
store itself and fills slots of an anonymous shared memory, which has no name that could stay behind. Each batch is
copied out of its slot, one pass over memory, so that what is delivered belongs to the consumer. The process ends when
its parent closes the dataset, or dies.
"""

import json
import mmap
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from actstore import errors
from actstore.errors import ActstoreError, StreamError
from actstore.stream.columns import Batch, Column
from actstore.stream.memory import HostMemory, Recycler, as_tensor
from actstore.stream.meter import Meter

POLL_S = 0.1
END_S = 5.0
"""Seconds that the process has to end by itself."""


class _Slots:
    """Batches of at most `rows` rows in shared memory."""

    def __init__(self, fd: int, columns: Mapping[str, Column], rows: int, count: int) -> None:
        self._columns = {n: c for n, c in columns.items() if c.deliver}
        self._rows = rows
        self.size = max(count * sum(map(self._bytes, self._columns.values())), 1)
        if os.fstat(fd).st_size < self.size:
            os.ftruncate(fd, self.size)
        self._memory = mmap.mmap(fd, self.size)
        self.slots = [self._arrays(i) for i in range(count)]

    def _bytes(self, column: Column) -> int:
        return -(-self._rows * int(np.prod(column.shape)) * column.host_type.itemsize // 64) * 64

    def _arrays(self, slot: int) -> Batch:
        offset = slot * sum(map(self._bytes, self._columns.values()))
        found: Batch = {}
        for name, column in self._columns.items():
            shape = (self._rows, *column.shape)
            found[name] = np.ndarray(shape, column.host_type, self._memory, offset)
            offset += self._bytes(column)
        return found


class IsolatedPipeline:
    """What `Pipeline` is to its consumer, in another process."""

    def __init__(
        self,
        settings: Mapping[str, Any],
        columns: Mapping[str, Column],
        *,
        rows: int,
        prefetch: int,
        meter: Meter,
        recycler: Recycler,
    ) -> None:
        """Start the process. `settings` are JSON: those of the dataset and its position; `rows` of a batch at most."""
        self._columns, self._meter, self._recycler = columns, meter, recycler
        fd = os.memfd_create("actstore-batches")
        try:
            self._slots = _Slots(fd, columns, rows, prefetch + 2)
            ours, theirs = socket.socketpair()
            path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]).rstrip(
                os.pathsep
            )
            command = [sys.executable, "-c", _MAIN, str(fd), str(theirs.fileno())]
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    pass_fds=(fd, theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": path},
                )
        finally:
            os.close(fd)
        self._pipe = Connection(ours.detach())
        self._pipe.send_bytes(json.dumps(dict(settings) | {"rows": rows, "slots": prefetch + 2}).encode())
        self.waiting: dict[str, int] = {}
        self._closed = False

    def next(self) -> dict[str, Tensor] | None:
        """The next batch, None at the end; raises what the process raised."""
        began = time.perf_counter()
        message = self._receive()
        if "error" in message:
            kind = getattr(errors, str(message["kind"]), StreamError)
            raise kind(message["error"])
        with self._meter.lock:
            for name, value in message.get("meter", {}).items():
                setattr(self._meter, name, value)
        self.waiting = message.get("waiting", {})
        batch = None
        if "slot" in message:
            batch = self._copy(self._slots.slots[message["slot"]], int(message["filled"]))
            self._send({"free": message["slot"]})
        self._meter.add(wait_s=time.perf_counter() - began, batches=batch is not None)
        return batch

    def _copy(self, source: Batch, rows: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, array in source.items():
            out = self._recycler.empty(name, array.shape, array.dtype)
            np.copyto(out[:rows], array[:rows])
            found[name] = as_tensor(out[:rows], self._columns[name].dtype)
        return found

    def _receive(self) -> dict[str, Any]:
        try:
            while not self._closed and not self._pipe.poll(POLL_S):
                pass
            if not self._closed:
                return json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError) as e:
            if not self._closed:
                code = self._process.wait(END_S)
                why = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                raise StreamError(
                    f"the loader's process ended ({why}); if it was killed for memory, lower memory_budget. The "
                    "dataset's state is good: a new loop continues after load_state_dict(state_dict())"
                ) from e
        raise StreamError(
            "this loop was ended by close(), refresh(), load_state_dict() or another loop; begin a new one"
        )

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._pipe.send_bytes(json.dumps(message).encode())
        except OSError:
            return  # the process is gone, which the next receive reports

    def close(self) -> None:
        """End the process."""
        if self._closed:
            return
        self._closed = True
        self._pipe.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_MAIN = "import sys; from actstore.stream.isolate import serve; serve(int(sys.argv[1]), int(sys.argv[2]))"


def serve(memory: int, pipe: int) -> None:
    """The process: run the pipeline of a dataset and say what is in which slot."""
    from actstore.stream.dataset import ActivationDataset

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair, which then closes the pipe
    connection = Connection(pipe)
    config = json.loads(connection.recv_bytes())
    rows, count = config.pop("rows"), config.pop("slots")
    free: queue.Queue[int] = queue.Queue()
    for i in range(count):
        free.put(i)
    threading.Thread(target=_acknowledged, args=(connection, free), daemon=True).start()
    lock = threading.Lock()

    def send(message: dict[str, Any]) -> None:
        with lock:
            connection.send_bytes(json.dumps(message).encode())

    position = config.pop("position")
    try:
        dataset = ActivationDataset(**config)
        slots = _Slots(memory, dataset.columns, rows, count)
        lent: queue.Queue[int] = queue.Queue()

        def lend(n: int) -> Batch:
            slot = free.get()
            lent.put(slot)
            return {k: v[:n] for k, v in slots.slots[slot].items()}

        pipeline = dataset.pipeline(lambda columns, buffers: HostMemory(columns, buffers, Recycler(), lend), **position)
        meter = dataset.meter
        while (batch := pipeline.next()) is not None:
            figures = {k: v for k, v in meter.figures().items() if k not in _OURS}
            filled = len(next(iter(batch.values())))
            send({"slot": lent.get(), "filled": filled, "meter": figures, "waiting": pipeline.waiting})
            del batch
        send({"end": True})
        threading.Event().wait()  # until the parent closes the pipe
    except ActstoreError as e:
        send({"error": str(e), "kind": type(e).__name__})
    except BaseException as e:  # noqa: BLE001  the parent raises it
        send({"error": f"{type(e).__name__}: {e}", "kind": "StreamError"})
    threading.Event().wait()


_OURS = ("wait_s", "elapsed_s", "batches", "delivered_bytes", "stall")
"""Figures that the parent measures."""


def _acknowledged(connection: Connection, free: "queue.Queue[int]") -> None:
    """Take slots back; end the process with the pipe."""
    try:
        while True:
            free.put(json.loads(connection.recv_bytes())["free"])
    except (EOFError, OSError):
        os._exit(0)
