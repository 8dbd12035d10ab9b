"""What a storage backend promises, whatever is behind it.

Keys are '/'-separated and relative to the store's URL; one that could leave it is refused. Every write is atomic: a
reader sees the whole object or none. Two conditional writes carry the commit protocol: of any number of racing callers
with different bytes exactly one gets True from `create`, and exactly one from `replace` of the same version.

A refused conditional write may be our own, whose answer was lost on the way. So a refusal is read back and compared:
True means "our bytes are there". Reading back stops at `READ_BACK` bytes; a larger object that was refused is False,
and its writer has to compare checksums. False from `replace` can also mean that ours was there and has been replaced
since. Prior art: S3's and GCS's conditional puts (docs/object-storage.md).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event

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


class Storage(ABC):
    """What `store/`, `tokens/` and `stream/` use of a storage backend."""

    url: str
    retries: int = 0
    """Requests that were sent once more, since the storage was opened; 0 for a directory."""

    @abstractmethod
    def get(self, key: str, limit: int | None = None) -> bytes:
        """The whole object; `StoreError` if it is missing, or larger than `limit` bytes (no more are fetched)."""

    @abstractmethod
    def get_range(self, key: str, offset: int, length: int) -> bytes | memoryview:
        """Exactly `length` bytes from `offset`; `StoreError` if the object is shorter."""

    @abstractmethod
    def put(self, key: str, data: Buffers) -> None:
        """Write the object, replacing what was there."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete the object; fine if it is missing."""

    @abstractmethod
    def stat(self, key: str) -> Stat | None:
        """Size, version and time of the last write; None if the object is missing."""

    @abstractmethod
    def list(self, prefix: str) -> dict[str, int]:
        """The objects below `prefix/` (all of them for ""), sorted by key, with their sizes."""

    @abstractmethod
    def _put_if(self, key: str, data: Buffers, version: str | None) -> bool:
        """Write the object if its version is `version`, or if None there is none; whether that was so."""

    def create(self, key: str, data: Buffers) -> bool:
        """Write the object unless there is one; False if another one is there."""
        return self._put_if(key, data, None) or self._holds(key, data)

    def replace(self, key: str, data: Buffers, version: str) -> bool:
        """Write the object if its version is still `version`; False if it changed or vanished."""
        return self._put_if(key, data, version) or self._holds(key, data)

    def exists(self, key: str) -> bool:
        """Whether the object exists."""
        return self.stat(key) is not None

    def size(self, key: str) -> int:
        """Bytes of the object; `StoreError` if it is missing."""
        found = self.stat(key)
        if found is None:
            raise self._missing(key)
        return found.size

    def until(self, stop: Event) -> "Storage":  # noqa: ARG002  a directory tries nothing twice
        """The same storage, whose requests are not tried again once `stop` is set."""
        return self

    def _holds(self, key: str, data: Buffers) -> bool:
        size = len(data) if isinstance(data, bytes) else sum(map(len, data))
        found = self.stat(key) if size <= READ_BACK else None
        return found is not None and found.size == size and self.get(key, READ_BACK) == b"".join(pieces(data))

    def _missing(self, key: str) -> MissingError:
        return MissingError(f"{self.url}: object {key} is missing")

    def _too_large(self, key: str, limit: int) -> StoreError:
        return StoreError(
            f"{self.url}: object {key} is larger than the {limit} bytes it may have; the store is damaged"
        )

    def _too_short(self, key: str, offset: int, length: int, found: int) -> StoreError:
        return StoreError(f"{self.url}: object {key} has {found} bytes from {offset} on, expected {length}")


def pieces(data: Buffers) -> Sequence[bytes | memoryview]:
    """An object's content as pieces, even if it is only one."""
    return [data] if isinstance(data, bytes) else data


def check_key(key: str) -> str:
    """Return `key` if it stays below the root, else raise `StoreError`."""
    if {"", ".", ".."} & set(key.split("/")) or {"\\", "\0"} & set(key):
        raise StoreError(f"object name {key!r} is not a relative path of plain names; the URL or the metadata is wrong")
    return key
