"""Where chunks come from: maps of a directory's shards, reads, or requests to an object store; checked and decoded.

On local file systems whole shards are mapped and stay mapped. The pages of a chunk are brought in before they are
touched, by a call that reports a truncated file as an error, where a touch would kill the process. What a map shows
was checked once; what arrives from elsewhere is checked every time.
"""

import ctypes
import errno
import mmap
import os
import threading
import time
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StreamError
from actstore.store.format import codec
from actstore.store.read.index import Location
from actstore.store.read.store import Store
from actstore.store.storage import LocalStorage
from actstore.stream.columns import Column
from actstore.stream.memory import Memory
from actstore.stream.order import Piece

Verify = Literal["once", "every"]
MAPS = 4096
"""Shards that stay mapped; Linux allows a process 65,530 maps."""
LOCAL_FILE_SYSTEMS = (
    "bcachefs", "btrfs", "erofs", "ext2", "ext3", "ext4", "f2fs", "overlay", "squashfs", "tmpfs", "xfs", "zfs"
)  # fmt: skip
"""Where a page of a map is never fetched over a network. Others are read with `pread`."""
_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14


class Source:
    """The chunks of one store, for one pipeline; safe to use from several threads."""

    def __init__(self, store: Store, maps: "Maps | None", stopping: threading.Event) -> None:
        """Read from `maps` if there are any; `stopping` ends requests that are tried again."""
        self.store, self._maps = store, maps
        self.storage = store.storage.until(stopping)
        self.remote = not isinstance(self.storage, LocalStorage)
        self._local = threading.local()

    def fetch(self, column: Column, piece: Piece) -> Any:
        """The stored bytes of a chunk, requested; or brought in, where they are mapped."""
        at, what = self._locate(column, piece)
        try:
            if self._maps is not None:
                return self._maps.chunk(self.storage, at)[0]
            return self.storage.get_range(at.key, at.offset, at.length)
        except OSError as e:
            raise StreamError(f"{what}: reading failed ({e})") from e

    def load(
        self, column: Column, piece: Piece, memory: Memory, buffer: int, data: Any = None
    ) -> tuple[int, float, float]:
        """Bring a chunk into a buffer, from `data` if it was fetched: bytes read, seconds reading and decoding."""
        at, what = self._locate(column, piece)
        array, began = column.index.array, time.perf_counter()
        length, checked = (at.length if data is None else 0), False
        if self._maps is not None:
            try:
                data, checked = self._maps.chunk(self.storage, at)
            except OSError as e:
                raise StreamError(f"{what}: reading failed ({e})") from e
        if data is None:
            data = self._read(at, what)
        fetched = time.perf_counter()
        payload = data[: -codec.CRC_BYTES]
        if not checked:
            payload = codec.check_chunk(data, array.codec, column.chunk_bytes, what, committed=at.crc32c)
            if self._maps is not None:
                self._maps.checked(self.storage, at)
        if self._maps is not None and array.codec == "none":
            memory.take(column.name, buffer, data[: -codec.CRC_BYTES])
        else:
            codec.decode_payload(payload, array.codec, memory.chunk(column.name, buffer), what)
            memory.loaded(column.name, buffer)
        return length, fetched - began, time.perf_counter() - fetched

    def _locate(self, column: Column, piece: Piece) -> tuple[Location, str]:
        """Where a chunk lies, and what errors call it."""
        at = column.index.locate(piece.place, int(self.store.index.buckets[piece.place]), piece.chunk)
        return at, f"{self.store.url}/{at.key} chunk at byte {at.offset}"

    def _read(self, at: Location, what: str) -> memoryview:
        """The stored bytes of a chunk in a directory, in memory that this thread's next read takes again."""
        assert isinstance(self.storage, LocalStorage)
        if getattr(self._local, "memory", memoryview(b"")).nbytes < at.length:
            self._local.memory = memoryview(bytearray(at.length + at.length // 8))
        view: memoryview = self._local.memory[: at.length]
        try:
            self.storage.read_into([view], at.key, at.offset)
        except OSError as e:
            raise StreamError(f"{what}: reading failed ({e})") from e
        return view


class Maps:
    """Shards in memory maps; those that were not used for longest go first. A chunk keeps its map alive."""

    def __init__(self, verify: Verify) -> None:
        """Map nothing yet; with "every" no chunk counts as checked."""
        self._verify = verify
        self._lock = threading.Lock()
        self._maps: OrderedDict[str, tuple[NDArray[np.uint8], set[int]]] = OrderedDict()

    def chunk(self, storage: LocalStorage, at: Location) -> tuple[NDArray[np.uint8], bool]:
        """The stored bytes of a chunk, all of them in memory, and whether they were checked before."""
        name = f"{storage.url}/{at.key}"
        with self._lock:
            if name not in self._maps:
                self._maps[name] = storage.map(at.key), set()
                if len(self._maps) > MAPS:
                    self._maps.popitem(last=False)
            self._maps.move_to_end(name)
            shard, checked = self._maps[name]
        if len(shard) < at.offset + at.length:
            raise StreamError(
                f"{name}: has {len(shard)} bytes, expected at least {at.offset + at.length}; it was cut short. "
                "Find the extent with: actstore verify"
            )
        found = shard[at.offset : at.offset + at.length]
        _bring_in(found)
        return found, at.offset in checked

    def checked(self, storage: LocalStorage, at: Location) -> None:
        """A chunk of a map is what was committed."""
        with self._lock:
            if self._verify == "once" and (known := self._maps.get(f"{storage.url}/{at.key}")):
                known[1].add(at.offset)


def maps_for(store: Store, verify: Verify) -> Maps | None:
    """Maps for a store that lies on a local file system of a machine that can map safely; else None."""
    if isinstance(store.storage, LocalStorage) and _can_bring_in() and is_local(store.storage.root):
        return Maps(verify)
    return None


def is_local(root: Path) -> bool:
    """Whether a directory lies on one of `LOCAL_FILE_SYSTEMS`."""
    path, found = os.path.realpath(root), ("", "")
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        left, _, right = line.partition(" - ")
        mounted = left.split()[4].encode().decode("unicode_escape")
        if Path(path).is_relative_to(mounted) and len(mounted) >= len(found[0]):
            found = mounted, right.split()[0]
    return found[1] in LOCAL_FILE_SYSTEMS


@lru_cache
def _can_bring_in() -> bool:
    """Whether this system knows MADV_POPULATE_READ."""
    try:
        _bring_in(np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.uint8))
    except (OSError, AttributeError):
        return False
    return Path("/proc/self/mountinfo").exists()


def _bring_in(data: NDArray[np.uint8]) -> None:
    """Have pages read before they are touched; OSError where the file has none any more."""
    address = data.ctypes.data
    first = address - address % mmap.PAGESIZE
    length = ctypes.c_size_t(address + len(data) - first)
    while _libc().madvise(ctypes.c_void_p(first), length, _POPULATE_READ):
        if ctypes.get_errno() != errno.EINTR:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@lru_cache
def _libc() -> ctypes.CDLL:
    """The C library; Python's own `madvise` would hold the interpreter's lock while a disk reads."""
    return ctypes.CDLL(None, use_errno=True)
