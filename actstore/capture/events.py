"""The run's log in the store: `events/<run>/<n>.jsonl`, one JSON object a line, for whoever asks later what happened.

Object stores can't append, so lines are put in pieces, every `FLUSH_S` seconds and at the end. The log is no part of
the store's state: readers ignore it, and a run that dies loses the lines of its last seconds.
"""

import json
import secrets
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

from actstore.errors import StoreError
from actstore.store.format.spec import EVENTS
from actstore.store.storage import Storage

FLUSH_S = 30.0


class EventLog:
    """One run's log; made by `event_log`."""

    def __init__(self, storage: Storage) -> None:
        """Write below a name of this run's own."""
        self.prefix = f"{EVENTS}/{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}"
        self._storage = storage
        self._lines: list[str] = []
        self._pieces = 0
        self._flushed = time.monotonic()

    def write(self, event: str, **fields: Any) -> None:
        """Note an event with its time (UTC); the fields are JSON values."""
        now = time.time()
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03}Z"
        self._lines.append(json.dumps({"time": stamp, "event": event, **fields}, allow_nan=False))
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Put what was noted since the last time."""
        self._flushed = time.monotonic()
        if self._lines:
            self._storage.put(f"{self.prefix}/{self._pieces:06}.jsonl", "".join(f"{x}\n" for x in self._lines).encode())
            self._lines.clear()
            self._pieces += 1


@contextmanager
def event_log(storage: Storage) -> Generator[EventLog]:
    """A log that ends with how the run ended."""
    log = EventLog(storage)
    try:
        yield log
    except BaseException as e:
        log.write("failed", error=type(e).__name__)  # the message may hold paths of a machine
        with suppress(StoreError):  # the run's own error is what the user must see
            log.flush()
        raise
    log.flush()
