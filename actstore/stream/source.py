"""Where chunks come from: maps of a directory's shards, reads, or requests to an object store; checked and decoded."""

import threading
import time
from collections.abc import Iterable
from typing import Any

from actstore.errors import StreamError
from actstore.store.format import codec
from actstore.store.read.index import Location
from actstore.store.read.store import Store
from actstore.store.storage import LocalStorage
from actstore.stream.columns import Column
from actstore.stream.maps import Maps
from actstore.stream.memory import Memory
from actstore.stream.order import Piece


class Source:
    """The chunks of stores, for one pipeline; safe to use from several threads."""

    def __init__(self, stores: Iterable[Store], maps: Maps, stopping: threading.Event) -> None:
        """Read from `maps` what is mapped; `stopping` ends requests that are tried again."""
        self._maps = maps
        self._storages = {store.url: store.storage.until(stopping) for store in stores}
        self._local = threading.local()

    def remote(self, column: Column) -> bool:
        """Whether a column comes from an object store."""
        return not isinstance(self._storages[column.store.url], LocalStorage)

    def take_retries(self) -> int:
        """Requests that were sent again since the last call."""
        found = sum(storage.retries for storage in self._storages.values())
        for storage in self._storages.values():
            storage.retries = 0
        return found

    def fetch(self, column: Column, piece: Piece) -> Any:
        """The stored bytes of a chunk, requested; or brought in, where they are mapped."""
        at, what = _locate(column, piece)
        try:
            if column.mapped:
                return self._maps.chunk(column.store.storage, at)[0]
            return self._storages[column.store.url].get_range(at.key, at.offset, at.length)
        except OSError as e:
            raise StreamError(f"{what}: reading failed ({e})") from e

    def load(
        self, column: Column, piece: Piece, memory: Memory, buffer: int, data: Any = None
    ) -> tuple[int, float, float]:
        """Bring a chunk into a buffer, from `data` if it was fetched: bytes read, seconds reading and decoding."""
        at, what = _locate(column, piece)
        array, began = column.index.array, time.perf_counter()
        length, checked = (at.length if data is None else 0), False
        try:
            if column.mapped:
                data, checked = self._maps.chunk(column.store.storage, at)
            elif data is None:
                data = self._read(column, at)
        except OSError as e:
            raise StreamError(f"{what}: reading failed ({e})") from e
        fetched = time.perf_counter()
        payload = data[: -codec.CRC_BYTES]
        if not checked:
            codec.check_chunk(data, array.codec, column.chunk_bytes, what, committed=at.crc32c)
            if column.mapped:
                self._maps.checked(column.store.storage, at)
        if column.in_place:
            memory.take(column.name, buffer, payload)
        else:
            codec.decode_payload(payload, array.codec, memory.chunk(column.name, buffer), what)
            memory.loaded(column.name, buffer)
        return length, fetched - began, time.perf_counter() - fetched

    def _read(self, column: Column, at: Location) -> Any:
        """The stored bytes of a chunk; from a directory, in memory that this thread's next read takes again."""
        storage = self._storages[column.store.url]
        if not isinstance(storage, LocalStorage):
            return storage.get_range(at.key, at.offset, at.length)
        if getattr(self._local, "memory", memoryview(b"")).nbytes < at.length:
            self._local.memory = memoryview(bytearray(at.length + at.length // 8))
        view: memoryview = self._local.memory[: at.length]
        storage.read_into([view], at.key, at.offset)
        return view


def _locate(column: Column, piece: Piece) -> tuple[Location, str]:
    """Where a chunk lies, and what errors call it."""
    store = column.store
    at = column.index.locate(piece.place, int(store.index.buckets[piece.place]), piece.chunk)
    return at, f"{store.url}/{at.key} chunk at byte {at.offset}"
