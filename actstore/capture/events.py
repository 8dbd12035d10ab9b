"""The run's log in the store: `events/<run>/<n>.jsonl`, one JSON object a line: who did what, and what failed.

Object stores can't append, so lines are put in pieces, every `FLUSH_S` seconds and at the end. The log is no part of
the store's state: readers ignore it, and a run that dies loses the lines of its last seconds. A thread puts the pieces,
and a piece that can't be put is tried again with the next one, so a failing log neither delays nor ends a run.
"""

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from actstore.store.format.spec import EVENTS
from actstore.store.storage import Storage
from actstore.tokens.tokenizer import one_line

FLUSH_S = 30.0
MAX_LINES = 10_000
"""Lines that wait while pieces can't be put; older ones are left out."""
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY")
_SECRETS = (
    (re.compile(r"://[^/@\s]+@"), "://"),
    (re.compile(r"((?:signature|credential|security-token|token|sig|key)=)[^&\s'\"]+", re.IGNORECASE), r"\1..."),
)


def without_secrets(text: str) -> str:
    """The text without users and passwords in URLs, signed queries, and values of secret environment variables."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 8:
            text = text.replace(value, f"${name}")
    return text


class EventLog:
    """One run's log; made by `event_log`."""

    def __init__(self, storage: Storage, say: Callable[[str], None]) -> None:
        """Write below a name of this run's own; the first failure is told to `say`."""
        self.prefix = f"{EVENTS}/{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}"
        self.failures = 0
        """How often a piece could not be put."""
        self._storage, self._say = storage, say
        self._lines: list[str] = []
        self._pieces = 0
        self._flushed = time.monotonic()
        self._putter = ThreadPoolExecutor(1, "actstore-events")
        self._putting: Future[None] | None = None

    def write(self, event: str, **fields: object) -> None:
        """Note an event with its time (UTC); the fields are JSON values."""
        now = time.time()
        stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03}Z"
        self._lines.append(json.dumps({"time": stamp, "event": event, **fields}, allow_nan=False))
        if time.monotonic() - self._flushed > FLUSH_S and (self._putting is None or self._putting.done()):
            self._flushed = time.monotonic()
            self._putting = self._putter.submit(self._put)

    def close(self) -> None:
        """Put the rest."""
        self._putter.submit(self._put).result()
        self._putter.shutdown()

    def _put(self) -> None:
        num_lines = len(self._lines)
        try:
            if num_lines:
                piece = "".join(f"{line}\n" for line in self._lines[:num_lines])
                self._storage.put(f"{self.prefix}/{self._pieces:06}.jsonl", piece.encode())
                self._pieces += 1
                del self._lines[:num_lines]
        except Exception as e:  # noqa: BLE001  a storage may raise anything, and the run goes on without its log
            self.failures += 1
            if self.failures == 1:
                self._say(f"the run's log can't be written, the run goes on: {without_secrets(one_line(e))}")
            del self._lines[:-MAX_LINES]


@contextmanager
def event_log(storage: Storage, say: Callable[[str], None]) -> Generator[EventLog]:
    """A log that ends with how the run ended."""
    log = EventLog(storage, say)
    try:
        yield log
    except BaseException as e:
        log.write("failed", error=type(e).__name__)  # the message may hold paths of a machine
        raise
    finally:
        log.close()
