"""What every remote backend shares: names, retries, limits, lost answers, forks and error messages.

A `Driver` makes single requests to one kind of server; `RemoteStorage` makes a `Storage` of it. Retries happen here and
nowhere else (the clients' own are off): jittered exponential back-off (Amazon's "full jitter") after time-outs,
broken connections and 408, 429 and 5xx answers, until `ACTSTORE_RETRY_DEADLINE` seconds have passed, or
`FIRST_CONTACT` if the server has not answered once. A request that is silent for `SILENCE` seconds, or takes longer
than half the deadline, is a failed try. A request that is under way at the deadline is not cut off, so a call ends
within one and a half times the deadline.
"""

import copy
import os
import re
import threading
from collections.abc import Callable
from typing import Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_before_delay,
    wait_random_exponential,
)

from actstore.errors import StoreError
from actstore.store.storage.base import (
    Buffers,
    Stat,
    check_key,
    check_prefix,
    holds,
    missing,
    too_large,
    too_short,
)

T = TypeVar("T")

DEADLINE = "ACTSTORE_RETRY_DEADLINE"
"""Environment variable: seconds after which a failing request is not tried again."""
DEFAULT_DEADLINE = 120.0
SILENCE = 30.0
CONNECT = 10.0
FIRST_CONTACT = 40.0
"""Seconds for a server that has not answered once: its address is more likely wrong than it is busy."""
CHECK = "check the credentials, their permissions and the bucket's name (docs/object-storage.md)"


class TransientError(Exception):
    """A request failed in a way that may pass."""


class UnreachableError(TransientError):
    """No answer came."""


class RefusedError(Exception):
    """The server refused a write because its condition does not hold."""


class Driver(Protocol):
    """Single requests to one kind of server, by full object name."""

    def get(self, name: str, start: int, stop: int | None) -> bytes | memoryview:
        """Bytes `start` to `stop` (None: all), fewer if the object ends before; `FileNotFoundError`."""
        ...

    def put(self, name: str, data: Buffers, *, create: bool = False, version: str | None = None) -> None:
        """Write, if asked only where no object is, or one of this version; else `RefusedError`."""
        ...

    def head(self, name: str) -> Stat:
        """What the server knows of the object; `FileNotFoundError`."""
        ...

    def delete(self, name: str) -> None:
        """Delete; `FileNotFoundError` is fine."""
        ...

    def page(self, prefix: str, token: str | None) -> tuple[list[tuple[str, int]], str | None]:
        """Names below the prefix with sizes, and where the next page starts if there is one."""
        ...

    def explain(self, error: Exception) -> Exception:
        """The error as `TransientError`, `RefusedError` or `FileNotFoundError`; itself if it is none of them."""
        ...


class RemoteStorage:
    """A `Storage` on a driver, which is made anew in a forked child."""

    def __init__(self, url: str, root: str, connect: Callable[[], Driver]) -> None:
        """Objects lie below the name `root`; `connect` makes the driver and sends no request."""
        self.url = url
        self._where = without_secrets(url)
        self._root = root
        self._connect = connect
        self._pid = 0
        self._made: Driver | None = None
        self._answered = False
        self._stop = threading.Event()
        self.retries = 0
        """Requests that were sent once more."""
        deadline()
        self._driver()

    def _driver(self) -> Driver:
        if self._made is None or self._pid != os.getpid():
            try:
                self._made = self._connect()
            except StoreError:
                raise
            except Exception as e:
                raise StoreError(f"{self._where}: can't connect: {plain(e)}; {CHECK}") from e
            if self._pid:  # a fork may have left the lock of the parent's event taken
                self._stop = threading.Event()
            self._pid = os.getpid()
        return self._made

    def until(self, stop: threading.Event) -> "RemoteStorage":
        """See `Storage`; retries are counted apart."""
        made = copy.copy(self)
        made.__dict__.update(_stop=stop, retries=0)
        return made

    def _name(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}" if self._root else check_key(key)

    def _run(self, doing: str, call: Callable[[Driver], T]) -> T:
        """One request, tried until it succeeds, fails for good or the deadline has passed."""
        driver = self._driver()
        retrying = Retrying(
            retry=retry_if_exception_type(TransientError),
            wait=wait_random_exponential(multiplier=0.2, max=10),
            stop=self._enough,
            before_sleep=self._count,
            sleep=sleep_using_event(self._stop),
            reraise=True,
        )

        def once() -> T:
            try:
                made = call(driver)
            except (TransientError, RefusedError, StoreError):
                raise
            except Exception as e:
                found = driver.explain(e)
                self._answered |= not isinstance(found, UnreachableError)
                if found is e:
                    raise
                raise found from e
            self._answered = True
            return made

        try:
            return retrying(once)
        except (RefusedError, FileNotFoundError, StoreError):
            raise
        except TransientError as e:
            tries = retrying.statistics.get("attempt_number", 1)
            silent = self._patience() < deadline()
            why = f"the server is unreachable or overloaded. {DEADLINE} (seconds) allows more time"
            why = "it has not answered once; check its address, the network and whether it runs" if silent else why
            raise StoreError(
                f"{self._where}: could not {doing}: {tries} tries within {self._patience():g} s, the last one: "
                f"{plain(e)}; {why}"
            ) from e
        except Exception as e:
            raise StoreError(f"{self._where}: could not {doing}: {plain(e)}; {CHECK}") from e

    def _patience(self) -> float:
        """Seconds until a failing request is not tried again."""
        return deadline() if self._answered else min(deadline(), FIRST_CONTACT)

    def _count(self, _state: RetryCallState) -> None:
        self.retries += 1  # no lock, which a fork could leave taken: two threads may count as one

    def _enough(self, state: RetryCallState) -> bool:
        return self._stop.is_set() or stop_before_delay(self._patience())(state)

    def _write(self, key: str, data: Buffers, *, create: bool = False, version: str | None = None) -> None:
        name = self._name(key)

        def write(driver: Driver) -> None:
            try:
                driver.put(name, data, create=create, version=version)
            except Exception as e:
                if create and isinstance(driver.explain(e), RefusedError) and not _there(driver, name):
                    raise TransientError("refused because of an object that is not there") from e
                raise

        try:
            self._run(f"write {key}", write)
        except FileNotFoundError as e:
            raise StoreError(f"{self._where}: could not write {key}: there is no such bucket; {CHECK}") from e

    def get(self, key: str, limit: int | None = None) -> bytes:
        """See `Storage`."""
        name, stop = self._name(key), None if limit is None else limit + 1
        try:
            data = bytes(self._run(f"read {key}", lambda d: d.get(name, 0, stop)))
        except FileNotFoundError as e:
            raise missing(self._where, key) from e
        if limit is not None and len(data) > limit:
            raise too_large(self._where, key, limit)
        return data

    def get_range(self, key: str, offset: int, length: int) -> bytes | memoryview:
        """See `Storage`."""
        if length == 0:
            return b""
        name = self._name(key)
        try:
            data = self._run(f"read {key}", lambda d: d.get(name, offset, offset + length))
        except FileNotFoundError as e:
            raise missing(self._where, key) from e
        if len(data) != length:
            raise too_short(self._where, key, offset, length, len(data))
        return data

    def put(self, key: str, data: Buffers) -> None:
        """See `Storage`."""
        self._write(key, data)

    def create(self, key: str, data: Buffers) -> bool:
        """See `Storage`."""
        try:
            self._write(key, data, create=True)
        except RefusedError:
            return holds(self, key, data)
        return True

    def replace(self, key: str, data: Buffers, version: str) -> bool:
        """See `Storage`."""
        try:
            self._write(key, data, version=version)
        except RefusedError:
            return holds(self, key, data)
        return True

    def delete(self, key: str) -> None:
        """See `Storage`."""
        name = self._name(key)
        try:
            self._run(f"delete {key}", lambda d: d.delete(name))
        except FileNotFoundError:
            return

    def exists(self, key: str) -> bool:
        """See `Storage`."""
        return self.stat(key) is not None

    def stat(self, key: str) -> Stat | None:
        """See `Storage`."""
        name = self._name(key)
        try:
            return self._run(f"look up {key}", lambda d: d.head(name))
        except FileNotFoundError:
            return None

    def size(self, key: str) -> int:
        """See `Storage`."""
        found = self.stat(key)
        if found is None:
            raise missing(self._where, key)
        return found.size

    def list(self, prefix: str) -> dict[str, int]:
        """See `Storage`."""
        parts = [p for p in (self._root, check_prefix(prefix)) if p]
        below = "/".join([*parts, ""]) if parts else ""
        start = len(self._root) + 1 if self._root else 0
        found: dict[str, int] = {}
        token: str | None = None
        while True:
            try:
                items, token = self._run(f"list {prefix or 'objects'}", lambda d, t=token: d.page(below, t))
            except FileNotFoundError as e:
                raise StoreError(f"{self._where}: there is no such bucket; {CHECK}") from e
            found.update((n[start:], size) for n, size in items if n.startswith(below) and not n.endswith("/"))
            if token is None:
                return dict(sorted(found.items()))


def _there(driver: Driver, name: str) -> bool:
    try:
        driver.head(name)
    except Exception as e:
        if not isinstance(driver.explain(e), FileNotFoundError):
            raise
        return False
    return True


def deadline() -> float:
    """Seconds from `ACTSTORE_RETRY_DEADLINE`, or the default."""
    text = os.environ.get(DEADLINE, "")
    try:
        seconds = float(text or DEFAULT_DEADLINE)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{DEADLINE} is {text!r}, expected a number of seconds above 0")
    return seconds


def longest() -> float:
    """Seconds that one request may take."""
    return deadline() / 2


def silence() -> float:
    """Seconds without a byte after which a connection counts as broken."""
    return min(SILENCE, longest())


def connecting() -> float:
    """Seconds within which a connection must stand."""
    return min(CONNECT, longest())


def without_secrets(url: str) -> str:
    """The URL without user, password and query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def plain(error: BaseException) -> str:
    """What an error says, in one short line without query strings, which may hold signatures."""
    text = " ".join(str(error).partition("Debug source")[0].split()) or type(error).__name__
    if said := re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", text):
        text = f"{text.partition('<')[0]}{said[1]}, {said[2]}"
    text = text.rstrip(" :")
    text = re.sub(r"\?[^\s\"')>,]+", "", re.sub(r"//[^\s/@]+@", "//", text))
    return text if len(text) < 400 else text[:400] + "..."
