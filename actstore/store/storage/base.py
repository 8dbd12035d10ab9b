"""What a storage backend promises, whatever is behind it.

Keys are '/'-separated and relative to the store's URL; one that could leave it is refused. Every write is atomic: a
reader sees the whole object or none. Two conditional writes carry the commit protocol: of any number of racing callers
with different bytes exactly one gets True from `create`, and exactly one from `replace` of the same version.

A refused conditional write may be our own, whose answer was lost on the way. So a refusal is read back and compared:
True means "our bytes are there". Reading back stops at `READ_BACK` bytes; a larger object that was refused is False,
and its writer has to compare checksums. False from `replace` can also mean that ours was there and has been replaced
since. Prior art: S3's and GCS's conditional puts (docs/object-storage.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event
from typing import Protocol, runtime_checkable

from actstore.errors import MissingError, StoreError

Buffers = bytes | Sequence[bytes | memoryview]
"""An object's content, or pieces of it that are written one after another."""

READ_BACK = 1 << 20
"""Largest object, in bytes, that a refused conditional write reads back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """What the storage knows of an object."""

    size: int
    """Bytes."""
    version: str
    """Opaque; changes with every write."""
    modified: float
    """Unix time of the last write."""


@runtime_checkable
class Storage(Protocol):
    """What `store/`, `tokens/` and `stream/` use of a storage backend."""

    url: str
    retries: int
    """Requests that were sent once more, since the storage was opened; 0 for a directory."""

    def get(self, key: str, limit: int | None = None) -> bytes:
        """The whole object; `StoreError` if it is missing, or larger than `limit` bytes (no more are fetched)."""
        ...

    def get_range(self, key: str, offset: int, length: int) -> bytes | memoryview:
        """Exactly `length` bytes from `offset`; `StoreError` if the object is shorter."""
        ...

    def until(self, stop: Event) -> "Storage":
        """The same storage, whose requests are not tried again once `stop` is set."""
        ...

    def put(self, key: str, data: Buffers) -> None:
        """Write the object, replacing what was there."""
        ...

    def create(self, key: str, data: Buffers) -> bool:
        """Write the object unless there is one; False if another one is there."""
        ...

    def replace(self, key: str, data: Buffers, version: str) -> bool:
        """Write the object if its version is still `version`; False if it changed or vanished."""
        ...

    def delete(self, key: str) -> None:
        """Delete the object; fine if it is missing."""
        ...

    def exists(self, key: str) -> bool:
        """Whether the object exists."""
        ...

    def stat(self, key: str) -> Stat | None:
        """Size, version and time of the last write; None if the object is missing."""
        ...

    def size(self, key: str) -> int:
        """Bytes of the object; `StoreError` if it is missing."""
        ...

    def list(self, prefix: str) -> dict[str, int]:
        """The objects below `prefix/` (all of them for ""), sorted by key, with their sizes."""
        ...


def check_key(key: str) -> str:
    """Return `key` if it stays below the root, else raise `StoreError`."""
    parts = key.split("/")
    if not key or any(p in ("", ".", "..") for p in parts) or "\\" in key or "\0" in key:
        raise StoreError(f"object name {key!r} is not a relative path of plain names; the store's metadata is damaged")
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix` without a trailing '/' if it stays below the root, else raise `StoreError`."""
    return check_key(prefix.rstrip("/")) if prefix else ""


def length(data: Buffers) -> int:
    """Bytes of an object's content."""
    return len(data) if isinstance(data, bytes) else sum(map(len, data))


def join(data: Buffers) -> bytes:
    """An object's content in one piece; no copy if it is one already."""
    return data if isinstance(data, bytes) else b"".join(data)


def holds(storage: Storage, key: str, data: Buffers) -> bool:
    """Whether the object there, if any, is `data`, read back up to `READ_BACK` bytes."""
    if length(data) > READ_BACK:
        return False
    found = storage.stat(key)
    return found is not None and found.size == length(data) and storage.get(key, READ_BACK) == join(data)


def missing(url: str, key: str) -> MissingError:
    """The error for an object that is not there."""
    return MissingError(f"{url}: object {key} is missing")


def too_large(url: str, key: str, limit: int) -> StoreError:
    """The error for an object that is larger than its reader allows."""
    return StoreError(f"{url}: object {key} is larger than the {limit} bytes it may have; the store is damaged")


def too_short(url: str, key: str, offset: int, length: int, found: int) -> StoreError:
    """The error for a range that the object does not have."""
    return StoreError(f"{url}: object {key} has {found} bytes from {offset} on, expected {length}")
