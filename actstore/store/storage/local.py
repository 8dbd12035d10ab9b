"""A directory as object storage.

A write goes to a partial file beside its target, is synced, and gets its name by `rename` (put, replace) or `link`
(create). The directory is synced too, and so is the parent of every directory that a write makes, up to the first one
that was there, so what was acknowledged survives a power cut. `replace` compares and renames under an advisory lock on
`.lock` in the root, which `put` and `delete` take for their one system call as well; the kernel releases it when its
holder dies. On a file system without hard links (exFAT, SMB, many FUSE ones) `create` compares and renames under that
lock too, which is as safe, because then every writer does so. A file system without locks is refused.

A version is inode, time and size of an open file. Opening is what makes a network file system ask its server, where
`stat` may answer from a cache (NFS: close-to-open consistency), so a swap under the lock sees the last write of every
machine. Every write sets the modification time itself, because the kernel's clock ticks only every few milliseconds.

Symbolic links below the root are followed as long as they stay below it.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import stat
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actstore.errors import MissingError, StoreError
from actstore.store.storage.base import Buffers, Stat, Storage, check_key, pieces

PARTIAL = ".partial"
"""Suffix of a file that is still being written."""
LOCK = ".lock"
"""Name, in the root, of the file whose lock `replace` holds."""
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_PIECES = 512  # below every system's IOV_MAX


class LocalStorage(Storage):
    """A directory."""

    def __init__(self, root: Path) -> None:
        """Use `root`, which need not exist yet; a later change of the working directory does not move it."""
        self.root = Path(os.path.abspath(root))  # noqa: PTH100  resolve() would follow links
        self.url = str(self.root)

    def path(self, key: str) -> Path:
        """The file that holds `key`; `StoreError` if a symbolic link leads it out of the root."""
        return self._inside(check_key(key))

    def _inside(self, key: str) -> Path:
        path, name = self.root / key, str(self.root)
        for part in key.split("/"):
            name = f"{name}/{part}"
            if os.path.islink(name):  # noqa: PTH114  a Path costs more than the system call
                real = Path(os.path.realpath(path))
                if real.is_symlink():
                    raise StoreError(f"{self.url}: {key} is a circle of symbolic links at {name}")
                if not real.is_relative_to(self.root.resolve()):
                    raise StoreError(f"{self.url}: {key} leads out of the store through the symbolic link {name}")
                break
        return path

    def get(self, key: str, limit: int | None = None) -> bytes:
        """See `Storage`."""
        with self._opened(key) as (fd, found):
            if limit is not None and found.st_size > limit:
                raise self._too_large(key, limit)
            return _pread(fd, 0, found.st_size)

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """See `Storage`."""
        with self._opened(key) as (fd, found):
            data = _pread(fd, offset, min(length, max(found.st_size - offset, 0)))
        if len(data) != length:
            raise self._too_short(key, offset, length, len(data))
        return data

    def read_into(self, out: Sequence[memoryview], key: str, offset: int) -> None:
        """Fill one buffer after the other with the bytes from `offset` on: `get_range` without fresh memory."""
        at = offset
        with self._opened(key) as (fd, found):
            for buffer in out:
                end = at + len(buffer)
                while at < end and (n := os.preadv(fd, [buffer[len(buffer) - (end - at) :]], at)):
                    at += n
                if at != end:
                    raise self._too_short(key, offset, sum(map(len, out)), max(found.st_size - offset, 0))

    def map(self, key: str) -> NDArray[np.uint8]:
        """An object in a memory map: its bytes as they are when they are touched, and only while it isn't cut short."""
        with self._opened(key) as (fd, found):
            if not found.st_size:
                return np.empty(0, np.uint8)
            return np.frombuffer(mmap.mmap(fd, found.st_size, prot=mmap.PROT_READ), np.uint8)

    @contextlib.contextmanager
    def _opened(self, key: str) -> Generator[tuple[int, os.stat_result]]:
        """File descriptor of an object, and what `fstat` says of it."""
        try:
            fd = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait for a writer
        except (FileNotFoundError, NotADirectoryError) as e:
            raise self._missing(key) from e
        try:
            found = os.fstat(fd)
            if stat.S_ISDIR(found.st_mode):
                raise self._missing(key)
            if not stat.S_ISREG(found.st_mode):
                raise StoreError(f"{self.url}: {key} is no regular file")
            yield fd, found
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _partial(self, key: str, data: Buffers) -> Generator[tuple[Path, Path]]:
        """A synced partial file and its target; what is left of the partial file is deleted."""
        target = self.path(key)
        _make_directory(target.parent)
        partial = target.with_name(f"{target.name}.{secrets.token_hex(8)}{PARTIAL}")
        try:
            with partial.open("wb", buffering=0) as f:
                _write(f.fileno(), data)
                now = time.time_ns()
                os.utime(f.fileno(), ns=(now, now))
                os.fsync(f.fileno())
            yield partial, target
        finally:
            partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _lock(self) -> Generator[None]:
        fd = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # NFS locks files open for writing
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
            except OSError as e:
                raise StoreError(
                    f"{self.url}: the file system has no file locks ({e.strerror}), so several writers could overwrite "
                    "each other; use another directory, or an object store"
                ) from e
            yield
        finally:
            os.close(fd)

    def put(self, key: str, data: Buffers) -> None:
        """See `Storage`."""
        with self._partial(key, data) as (partial, target):
            with self._lock():
                partial.replace(target)
            _sync_directory(target.parent)

    def _put_if(self, key: str, data: Buffers, version: str | None) -> bool:
        if not self._is(key, version):
            return False
        with self._partial(key, data) as (partial, target):
            named = _link(partial, target) if version is None else None
            if named is None:
                with self._lock():
                    named = self._is(key, version)
                    if named:
                        partial.replace(target)
            if named:
                _sync_directory(target.parent)
            return named

    def _is(self, key: str, version: str | None) -> bool:
        found = self.stat(key)
        return (found and found.version) == version

    def delete(self, key: str) -> None:
        """See `Storage`."""
        path = self.path(key)
        if path.is_file():
            with self._lock():
                path.unlink(missing_ok=True)
            _sync_directory(path.parent)

    def stat(self, key: str) -> Stat | None:
        """See `Storage`."""
        try:
            with self._opened(key) as (_, found):
                version = f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"
                return Stat(size=found.st_size, version=version, modified=found.st_mtime_ns / 1e9)
        except MissingError:
            return None

    def partials(self) -> tuple[Path, ...]:
        """Files that were, or are, being written: leftovers of killed writers once they are old."""
        return tuple(sorted(p for p in self._files("") if p.name.endswith(PARTIAL)))

    def list(self, prefix: str) -> dict[str, int]:
        """See `Storage`; symbolic links to directories are not followed."""
        found: dict[str, int] = {}
        for path in self._files(prefix):
            key = path.relative_to(self.root).as_posix()
            if not path.name.endswith(PARTIAL) and key != LOCK:
                with contextlib.suppress(FileNotFoundError):
                    found[key] = self._inside(key).stat().st_size
        return dict(sorted(found.items()))

    def _files(self, prefix: str) -> Iterator[Path]:
        top = self.path(prefix.rstrip("/")) if prefix else self.root
        for folder, folders, files in os.walk(top):
            for name in folders:
                if (Path(folder) / name).is_symlink():
                    self._inside((Path(folder) / name).relative_to(self.root).as_posix())
            yield from (Path(folder) / name for name in files)


def _pread(fd: int, offset: int, length: int) -> bytes:
    """Up to `length` bytes; one system call reads at most 2 GiB."""
    read: list[bytes] = []
    while length and (piece := os.pread(fd, length, offset)):
        read.append(piece)
        offset, length = offset + len(piece), length - len(piece)
    return read[0] if len(read) == 1 else b"".join(read)


def _write(fd: int, data: Buffers) -> None:
    """Write all pieces, without joining them."""
    views = [memoryview(p) for p in pieces(data) if len(p)][::-1]
    while views:
        written = os.writev(fd, views[: -_PIECES - 1 : -1])
        while views and written >= len(views[-1]):
            written -= len(views.pop())
        if views:
            views[-1] = views[-1][written:]


def _link(path: Path, target: Path) -> bool | None:
    """Give a file a second name if that is free; None on a file system without hard links."""
    try:
        os.link(path, target)
    except FileExistsError:
        return False
    except OSError as e:
        if e.errno not in _NO_LINKS:
            raise
        return None
    return True


def _make_directory(path: Path) -> None:
    """Make a directory and those above it; each that is new survives a power cut."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        _sync_directory(made.parent)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
