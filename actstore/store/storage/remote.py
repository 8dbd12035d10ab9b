"""What every remote backend shares: names, retries, limits, lost answers, forks and error messages.

A `Driver` makes single requests to one kind of server; `RemoteStorage` makes a `Storage` of it. What an error means and
whether the request is sent again is decided here and nowhere else (the clients' own retries are off): jittered
exponential back-off (Amazon's "full jitter") after time-outs, broken connections and 408, 429 and 5xx answers, until
`ACTSTORE_RETRY_DEADLINE` seconds have passed, or `FIRST_CONTACT` if the server has not answered once. A request that is
silent for `SILENCE` seconds, or takes longer than half the deadline, is a failed try. A request that is under way at
the deadline is not cut off, so a call ends within one and a half times the deadline.
"""

import contextlib
import copy
import os
import re
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_before_delay,
    wait_random_exponential,
)

from actstore.errors import StoreError
from actstore.store.storage.base import Buffers, Stat, Storage, check_key

T = TypeVar("T")

_inherited: list[object] = []
"""Clients that a fork has copied: to free them could wait for a thread that only the parent has."""
_connecting = threading.Lock()
"""Held by the one thread that makes a client, for all that ask at once."""


def _forked() -> None:
    global _connecting  # noqa: PLW0603  another thread of the parent may have held it
    _connecting = threading.Lock()


os.register_at_fork(after_in_child=_forked)

DEADLINE = "ACTSTORE_RETRY_DEADLINE"
"""Environment variable: seconds after which a failing request is not tried again."""
DEFAULT_DEADLINE = 120.0
SILENCE = 30.0
CONNECT = 10.0
FIRST_CONTACT = 40.0
"""Seconds for a server that has not answered once: its address is more likely wrong than it is busy."""
CHECK = "check the credentials, their permissions and the bucket's name (docs/object-storage.md)"

PASSING = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP statuses that are worth another try."""
PASSING_CODES = frozenset({"BadDigest", "IncompleteBody", "RequestTimeout", "SlowDown", "XAmzContentSHA256Mismatch"})
"""Error codes of S3 that are worth another try, whatever their status."""
NO_BUCKET = frozenset({"NoSuchBucket", "ContainerNotFound"})


class TransientError(Exception):
    """A request failed in a way that may pass."""


class UnreachableError(TransientError):
    """No answer came."""


class RefusedError(Exception):
    """The server refused a write because its condition does not hold."""


class Answer(NamedTuple):
    """HTTP status, or None if no whole answer came, and error code of a request that failed."""

    status: int | None = None
    code: str = ""


class Driver(Protocol):
    """Single requests to one kind of server, by full object name; each raises what its client raises."""

    def get(self, name: str, start: int, stop: int | None) -> bytes | memoryview:
        """Bytes `start` to `stop` (None: all), fewer if the object ends before."""
        ...

    def put(self, name: str, data: Buffers, *, create: bool, version: str | None) -> None:
        """Write, if asked only where no object is, or one of this version."""
        ...

    def head(self, name: str) -> Stat:
        """What the server knows of the object."""
        ...

    def delete(self, name: str) -> None:
        """Delete; a missing object may be an error."""
        ...

    def page(self, prefix: str, token: str | None) -> tuple[list[tuple[str, int]], str | None]:
        """Names below the prefix with sizes, and where the next page starts if there is one."""
        ...

    def answer(self, error: Exception) -> Answer | None:
        """What the server said; None if the error came from elsewhere and another try would not help."""
        ...


def meaning(driver: Driver, error: Exception) -> Exception:
    """The error as one of the above, or `FileNotFoundError` for a missing object; itself if it will not pass."""
    answer = driver.answer(error)
    if answer is None:
        return error
    if answer.status is None and not answer.code:
        return UnreachableError(plain(error))
    if answer.code in NO_BUCKET:
        return StoreError(f"there is no such bucket; {CHECK}")
    if answer.status in PASSING or answer.code in PASSING_CODES:
        return TransientError(plain(error))
    if answer.status == 412:
        return RefusedError(plain(error))
    return FileNotFoundError(plain(error)) if answer.status == 404 else error


class RemoteStorage(Storage):
    """A `Storage` on a driver, which is made anew in a forked child."""

    def __init__(self, url: str, root: str, connect: Callable[[], Driver]) -> None:
        """Objects lie below the name `root`; `connect` makes the driver."""
        self.url = url
        self._root = f"{root}/" if root else ""
        self._connect = connect
        self._pid = 0
        self._made: Driver | None = None
        self._answered = False
        self._stop = threading.Event()
        deadline()
        self._driver()

    def _driver(self) -> Driver:
        if self._made is None or self._pid != os.getpid():
            with _connecting:
                self._make()
        assert self._made is not None
        return self._made

    def _make(self) -> None:
        if self._pid == os.getpid():
            return  # by another thread
        _inherited.append(self._made)
        try:
            self._made = self._connect()
        except Exception as e:
            raise StoreError(f"{self.url}: can't connect: {plain(e)}; {CHECK}") from e
        if self._pid:  # a fork may have left the lock of the parent's event taken
            self._stop = threading.Event()
        self._pid = os.getpid()

    def until(self, stop: threading.Event) -> "RemoteStorage":
        """See `Storage`; retries are counted apart."""
        made = copy.copy(self)
        made._stop, made.retries = stop, 0  # noqa: SLF001
        return made

    def _run(self, doing: str, call: Callable[[Driver], T]) -> T:
        """One request, tried until it succeeds, fails for good or the deadline has passed.

        Only `FileNotFoundError` and `RefusedError` are left to the caller, who knows whether they are errors.
        """
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
            except Exception as e:
                found = e if isinstance(e, TransientError) else meaning(driver, e)
                self._answered |= not isinstance(found, UnreachableError)
                if found is e:
                    raise
                raise found from e
            self._answered = True
            return made

        try:
            return retrying(once)
        except (RefusedError, FileNotFoundError):
            raise
        except TransientError as e:
            tries = retrying.statistics.get("attempt_number", 1)
            silent = self._patience() < deadline()
            why = f"the server is unreachable or overloaded. {DEADLINE} (seconds) allows more time"
            why = "it has not answered once; check its address, the network and whether it runs" if silent else why
            raise StoreError(
                f"{self.url}: could not {doing}: {tries} tries within {self._patience():g} s, the last one: "
                f"{plain(e)}; {why}"
            ) from e
        except StoreError as e:
            raise type(e)(f"{self.url}: could not {doing}: {e}") from e
        except Exception as e:
            raise StoreError(f"{self.url}: could not {doing}: {plain(e)}; {CHECK}") from e

    def _patience(self) -> float:
        """Seconds until a failing request is not tried again."""
        return deadline() if self._answered else min(deadline(), FIRST_CONTACT)

    def _count(self, _state: RetryCallState) -> None:
        self.retries += 1  # no lock, which a fork could leave taken: two threads may count as one

    def _enough(self, state: RetryCallState) -> bool:
        return self._stop.is_set() or stop_before_delay(self._patience())(state)

    def _name(self, key: str) -> str:
        return self._root + check_key(key)

    def _read(self, key: str, start: int, stop: int | None) -> bytes | memoryview:
        name = self._name(key)
        try:
            return self._run(f"read {key}", lambda d: d.get(name, start, stop))
        except FileNotFoundError as e:
            raise self._missing(key) from e

    def get(self, key: str, limit: int | None = None) -> bytes:
        """See `Storage`."""
        data = bytes(self._read(key, 0, None if limit is None else limit + 1))
        if limit is not None and len(data) > limit:
            raise self._too_large(key, limit)
        return data

    def get_range(self, key: str, offset: int, length: int) -> bytes | memoryview:
        """See `Storage`."""
        data = self._read(key, offset, offset + length) if length else b""
        if len(data) != length:
            raise self._too_short(key, offset, length, len(data))
        return data

    def _write(self, key: str, data: Buffers, *, create: bool = False, version: str | None = None) -> None:
        name = self._name(key)

        def write(driver: Driver) -> None:
            try:
                driver.put(name, data, create=create, version=version)
            except Exception as e:
                # Servers may refuse a write because of another that then fails.
                if create and isinstance(meaning(driver, e), RefusedError) and not _there(driver, name):
                    raise TransientError("refused because of an object that is not there") from e
                raise

        try:
            self._run(f"write {key}", write)
        except FileNotFoundError as e:
            if version is not None:
                raise RefusedError("the object vanished") from e
            raise StoreError(f"{self.url}: could not write {key}: there is no such bucket; {CHECK}") from e

    def put(self, key: str, data: Buffers) -> None:
        """See `Storage`."""
        self._write(key, data)

    def _put_if(self, key: str, data: Buffers, version: str | None) -> bool:
        try:
            self._write(key, data, create=version is None, version=version)
        except RefusedError:
            return False
        return True

    def delete(self, key: str) -> None:
        """See `Storage`."""
        name = self._name(key)
        with contextlib.suppress(FileNotFoundError):
            self._run(f"delete {key}", lambda d: d.delete(name))

    def stat(self, key: str) -> Stat | None:
        """See `Storage`."""
        name = self._name(key)
        try:
            return self._run(f"look up {key}", lambda d: d.head(name))
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> dict[str, int]:
        """See `Storage`."""
        below = self._root + (f"{check_key(prefix.rstrip('/'))}/" if prefix else "")
        found: dict[str, int] = {}
        token: str | None = None
        while True:
            try:
                items, token = self._run(f"list {prefix or 'objects'}", lambda d, t=token: d.page(below, t))
            except FileNotFoundError as e:
                raise StoreError(f"{self.url}: could not list objects: there is no such bucket; {CHECK}") from e
            found.update((n[len(self._root) :], size) for n, size in items if n.startswith(below) and n[-1] != "/")
            if token is None:
                return dict(sorted(found.items()))


def _there(driver: Driver, name: str) -> bool:
    try:
        driver.head(name)
    except Exception as e:
        if not isinstance(meaning(driver, e), FileNotFoundError):
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


def limits() -> tuple[float, float, float]:
    """Seconds that a request may take, may be silent for, and may take to connect."""
    longest = deadline() / 2
    return longest, min(SILENCE, longest), min(CONNECT, longest)


def plain(error: BaseException) -> str:
    """What an error says, in one short line without query strings, which may hold signatures."""
    text, _, cause = str(error).partition("Debug source")  # obstore's messages end with its structures
    text = " ".join(text.split()) or type(error).__name__
    text = re.sub(r"^(Generic \w+ error: )?(.* in [\d.]+\S?s - )?(Server returned non-2xx status code: )?", "", text)
    if said := re.search(r'(?:message|error): "(.*?)"|(InvalidCertificate\(\s*\w+|TimedOut)', cause):
        text = f"{text}: {said[1] or ' '.join(said[2].replace('(', ' ').split())}"
    if said := re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", text):
        text = f"{text.partition('<')[0]}{said[1]}, {said[2]}"
    text = text.rstrip(" :.")
    text = re.sub(r"\?[^\s\"')>,]+", "", re.sub(r"//[^\s/@]+@", "//", text))
    return text if len(text) < 400 else text[:400] + "..."
