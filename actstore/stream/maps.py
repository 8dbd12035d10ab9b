"""Shards of local stores in memory maps.

On local file systems whole shards are mapped and stay mapped. The pages of a chunk are brought in before they are
touched, by a call that reports a truncated file as an error, where a touch would kill the process. What a map shows
was checked once; what arrives from elsewhere is checked every time.
"""

import ctypes
import errno
import mmap
import os
import threading
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StreamError
from actstore.store.read.index import Location
from actstore.store.read.store import Store
from actstore.store.storage import LocalStorage, Storage

Verify = Literal["once", "every"]
MAPS = 4096
"""Shards that stay mapped; Linux allows a process 65,530 maps."""
LOCAL_FILE_SYSTEMS = (
    "bcachefs", "btrfs", "erofs", "ext2", "ext3", "ext4", "f2fs", "overlay", "squashfs", "tmpfs", "xfs", "zfs"
)  # fmt: skip
"""Where a page of a map is never fetched over a network. Others are read with `pread`."""
_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14


class Maps:
    """Shards in memory maps; those that were not used for longest go first. A chunk keeps its map alive."""

    def __init__(self, verify: Verify) -> None:
        """Map nothing yet; with "every" no chunk counts as checked."""
        self._verify = verify
        self._lock = threading.Lock()
        self._maps: OrderedDict[str, tuple[NDArray[np.uint8], set[int]]] = OrderedDict()

    def chunk(self, storage: Storage, at: Location) -> tuple[NDArray[np.uint8], bool]:
        """The stored bytes of a chunk, all of them in memory, and whether they were checked before."""
        assert isinstance(storage, LocalStorage)
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

    def checked(self, storage: Storage, at: Location) -> None:
        """A chunk of a map is what was committed."""
        with self._lock:
            if self._verify == "once" and (known := self._maps.get(f"{storage.url}/{at.key}")):
                known[1].add(at.offset)


def mappable(store: Store) -> bool:
    """Whether a store lies on a local file system of a machine that can map safely."""
    return isinstance(store.storage, LocalStorage) and _can_bring_in() and is_local(store.storage.root)


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
