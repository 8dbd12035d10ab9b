"""The pipeline in a process of its own: `isolate=True`.

For trainers whose Python keeps the interpreter lock busy, and so slows the pipeline's bookkeeping, or is slowed by it
(Meta's SPDL measured both). The process is a fresh interpreter that runs nothing of the caller's program and stays for
all epochs. It opens the store as the caller's plan has it and fills slots of an anonymous shared memory, which has no
name that could stay behind. Each batch is copied out of its slot, one pass over memory, so that what is delivered
belongs to the consumer. The process ends when its parent closes the dataset, or dies.

Both sides speak JSON over a socket. The parent says begin (a position), stop, or free (a slot), the process sends
batches (a slot), the end, or an error. Every loop has a number, and what belongs to an earlier loop is ignored.
"""

import contextlib
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
import warnings
import weakref
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actstore import errors
from actstore.errors import ActstoreError, StreamError
from actstore.store.read.join import reopen
from actstore.stream.columns import Batch, Column, host_type, tensors_of
from actstore.stream.memory import HostMemory, Recycler, as_tensor
from actstore.stream.meter import Meter
from actstore.stream.settings import Settings

POLL_S = 0.1
END_S = 5.0
"""Seconds that the process has to end by itself."""
CREDIT = 2
"""Batches that may be on their way to the consumer."""
_OURS = ("wait_s", "elapsed_s", "batches", "delivered_bytes", "stall")
"""Figures that the parent measures."""


class _Slots:
    """Batches of at most `rows` rows in shared memory."""

    def __init__(self, fd: int, columns: Mapping[str, Column], rows: int, count: int) -> None:
        self._rows, self._tensors = rows, tensors_of(columns)
        self._nbytes = {n: self._bytes(*of) for n, of in self._tensors.items()}
        self.size = max(count * sum(self._nbytes.values()), 1)
        if os.fstat(fd).st_size < self.size:
            os.ftruncate(fd, self.size)
        self._memory = mmap.mmap(fd, self.size)
        self.slots = [self._arrays(i) for i in range(count)]

    def _bytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return -(-self._rows * int(np.prod(shape)) * dtype.itemsize // 64) * 64

    def _arrays(self, slot: int) -> Batch:
        offset = slot * sum(self._nbytes.values())
        found: Batch = {}
        for name, (shape, dtype) in self._tensors.items():
            found[name] = np.ndarray((self._rows, *shape), host_type(dtype), self._memory, offset)
            offset += self._nbytes[name]
        return found


class IsolatedProcess:
    """The process of one dataset, as its parent sees it."""

    def __init__(
        self,
        arguments: Mapping[str, Any],
        columns: Mapping[str, Column],
        *,
        rows: int,
        prefetch: int,
        meter: Meter,
        recycler: Recycler,
    ) -> None:
        """Start it. `arguments` are the dataset's as JSON, `rows` those of the largest batch."""
        self._tensors, self._meter, self._recycler = tensors_of(columns), meter, recycler
        self._before = meter.figures()
        self._loop, self.waiting, self._closed = 0, dict[str, int](), False
        count = prefetch + 1 + CREDIT
        fd = os.memfd_create("actstore-batches")
        try:
            self._slots = _Slots(fd, columns, rows, count)
            ours, theirs = socket.socketpair()
            roots = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _MAIN, str(fd), str(theirs.fileno())],
                    pass_fds=(fd, theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(roots)},
                )
        finally:
            os.close(fd)
        self._pipe = Connection(ours.detach())
        self._end = weakref.finalize(self, _end, self._pipe, self._process, os.getpid())
        self._send({"arguments": dict(arguments), "rows": rows, "slots": count})

    @property
    def alive(self) -> bool:
        """Whether it can begin another loop."""
        return not self._closed and self._process.poll() is None

    def begin(self, *, epoch: int, step: int) -> "IsolatedPipeline":
        """Batches from a position on; an earlier loop ends."""
        self._loop += 1
        self._send({"begin": {"epoch": epoch, "step": step}, "loop": self._loop})
        return IsolatedPipeline(self, self._loop)

    def next(self, loop: int) -> dict[str, Tensor] | None:
        """The next batch of a loop, None at the end; raises what the process raised."""
        began = time.perf_counter()
        while (message := self._receive(loop))["loop"] != loop:
            pass
        if "error" in message:
            kind = getattr(errors, str(message["kind"]), StreamError)
            raise kind(message["error"])
        for name, value in message.get("meter", {}).items():
            setattr(self._meter, name, self._before[name] + value)
        self.waiting = message.get("waiting", {})
        batch = None
        if "slot" in message:
            batch = self._copy(self._slots.slots[message["slot"]], int(message["filled"]))
            self._send({"free": message["slot"], "loop": loop})
        self._meter.wait_s += time.perf_counter() - began
        self._meter.batches += batch is not None
        return batch

    def _copy(self, source: Batch, rows: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, array in source.items():
            out = self._recycler.empty(name, array.shape, array.dtype)
            np.copyto(out[:rows], array[:rows])
            found[name] = as_tensor(out[:rows], self._tensors[name][1])
        return found

    def _receive(self, loop: int) -> dict[str, Any]:
        try:
            while self._loop == loop and not self._closed and not self._pipe.poll(POLL_S):
                pass
            if self._loop == loop and not self._closed:
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
        with contextlib.suppress(OSError):  # the process is gone, which the next receive reports
            self._pipe.send_bytes(json.dumps(message).encode())

    def end(self, loop: int) -> None:
        """Stop a loop; the process waits for the next one."""
        if loop == self._loop:
            self._loop += 1
            self._send({"stop": True, "loop": self._loop})

    def abandon(self) -> None:
        """In a forked child: the process is the parent's, and must see the pipe's end when the parent closes it."""
        self._closed, self._process.returncode = True, 0
        self._end.detach()
        self._pipe.close()

    def close(self) -> None:
        """End the process."""
        self._closed = True
        self._end()


def _end(pipe: Connection, process: "subprocess.Popen[bytes]", pid: int) -> None:
    """End a process that this one started, also when nobody refers to it any more."""
    if os.getpid() != pid:
        return
    pipe.close()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class IsolatedPipeline:
    """One loop over an `IsolatedProcess`: what `Pipeline` is to its consumer."""

    def __init__(self, process: IsolatedProcess, loop: int) -> None:
        """Loop number `loop` of a process."""
        self._process, self._loop = process, loop

    def next(self) -> dict[str, Tensor] | None:
        """See `Pipeline`."""
        return self._process.next(self._loop)

    @property
    def waiting(self) -> dict[str, int]:
        """See `Pipeline`; as of the latest batch."""
        return self._process.waiting

    def count_retries(self) -> None:
        """See `Pipeline`; counted with each batch."""

    def close(self) -> None:
        """Stop the loop."""
        self._process.end(self._loop)


_MAIN = "import sys; from actstore.stream.isolate import serve; serve(int(sys.argv[1]), int(sys.argv[2]))"


def serve(memory: int, pipe: int) -> None:
    """The process: run pipelines of a dataset and say what is in which slot."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair, which then closes the pipe
    served = _Served(Connection(pipe))
    try:
        served.open(memory)
        while True:
            served.run()
    except EOFError:
        os._exit(0)


class _Served:
    """The process's side: one dataset, and the loop that it runs."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._sending = connection, threading.Lock()
        self._begins: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._lock = threading.Lock()
        self._loop = 0
        self._credit = threading.Semaphore(0)
        self._pipeline: Any = None

    def open(self, memory: int) -> None:
        """Make the dataset; an error goes to the first loop."""
        from actstore.stream.dataset import ActivationDataset

        config = json.loads(self._connection.recv_bytes())
        threading.Thread(target=self._listen, daemon=True).start()
        self._error: dict[str, str] = {}
        warnings.simplefilter("ignore", errors.ActstoreWarning)  # the parent has said it
        try:
            arguments = config["arguments"]
            stores = [(reopen(snapshot), weight) for snapshot, weight in arguments.pop("stores")]
            self._dataset = ActivationDataset(stores, **arguments | {"settings": Settings(**arguments["settings"])})
            self._slots = _Slots(memory, self._dataset.columns, config["rows"], config["slots"])
        except BaseException as e:  # noqa: BLE001  the parent raises it
            self._error = _told(e)

    def _listen(self) -> None:
        """Hear what the parent says; end the process with the pipe."""
        try:
            while True:
                message = json.loads(self._connection.recv_bytes())
                with self._lock:
                    if "free" in message:
                        if message["loop"] == self._loop:
                            self._free.append(message["free"])
                            self._credit.release()
                        continue
                    self._loop, pipeline = message["loop"], self._pipeline
                    self._credit.release()  # whoever waits sees that its loop is over
                if pipeline is not None:
                    pipeline.close()
                if "begin" in message:
                    self._begins.put(message)
        except (EOFError, OSError):
            os._exit(0)

    def run(self) -> None:
        """One loop, from its begin to its end."""
        message = self._begins.get()
        assert message is not None
        loop, lent = message["loop"], queue.Queue[int]()
        if self._error:
            self._send(loop, self._error)
            return
        with self._lock:
            if self._loop != loop:
                return
            self._free = list(range(len(self._slots.slots)))
            self._credit = credit = threading.Semaphore(CREDIT)

        def lend(n: int) -> Batch:
            with self._lock:
                slot = self._free.pop()
            lent.put(slot)
            return {k: v[:n] for k, v in self._slots.slots[slot].items()}

        try:
            self._stream(loop, message["begin"], lend, lent, credit)
        except BaseException as e:  # noqa: BLE001  the parent raises it
            self._send(loop, _told(e))
        finally:
            with self._lock:
                pipeline, self._pipeline = self._pipeline, None
            if pipeline is not None:
                pipeline.close()

    def _stream(
        self, loop: int, position: dict[str, int], lend: Any, lent: "queue.Queue[int]", credit: threading.Semaphore
    ) -> None:
        dataset = self._dataset
        pipeline = dataset.pipeline(
            lambda name, columns, buffers: HostMemory(columns, buffers, dataset.recycler, name=name, lend=lend),
            **position,
        )
        with self._lock:
            self._pipeline = pipeline
        while credit.acquire() and self._loop == loop:
            batch = pipeline.next()
            pipeline.count_retries()
            figures = {k: v for k, v in dataset.meter.figures().items() if k not in _OURS}
            if batch is None:
                self._send(loop, {"meter": figures})
                return
            filled = len(next(iter(batch.values())))
            del batch
            said = {"slot": lent.get(), "filled": filled, "meter": figures, "waiting": pipeline.waiting}
            self._send(loop, said)

    def _send(self, loop: int, message: dict[str, Any]) -> None:
        with self._sending, contextlib.suppress(OSError):
            self._connection.send_bytes(json.dumps(message | {"loop": loop}).encode())


def _told(error: BaseException) -> dict[str, str]:
    """An error for the parent."""
    if isinstance(error, ActstoreError):
        return {"error": str(error), "kind": type(error).__name__}
    return {"error": f"{type(error).__name__}: {error}", "kind": "StreamError"}
