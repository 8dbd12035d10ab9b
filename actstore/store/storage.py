"""Object storage as actstore needs it: whole objects, ranges, create-only puts, listings.

A local directory and anything fsspec speaks (`gs://`, `s3://`, `memory://`) look the same. Every put is atomic: a
reader sees the whole object or none. `create` is the one primitive that the commit protocol rests on: of any number
of racing callers exactly one gets True. Locally that is `link(2)` of a synced temporary file, remotely the store's own
conditional put through fsspec's `mode="create"`.

Keys are '/'-separated and relative; a key that could leave the store's root is refused.
"""

import os
import secrets
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

import fsspec

from actstore.errors import StoreError

PARTIAL = ".partial"
"""Suffix of a local file that is still being written."""


@runtime_checkable
class Storage(Protocol):
    """What `store/`, `tokens/` and `stream/` use of a storage backend."""

    url: str

    def get(self, key: str) -> bytes:
        """The whole object; `StoreError` if it does not exist."""
        ...

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; `StoreError` if the object is shorter."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write the object, replacing what was there."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write the object unless it exists; False if it does."""
        ...

    def exists(self, key: str) -> bool:
        """Whether the object exists."""
        ...

    def size(self, key: str) -> int:
        """Bytes of the object."""
        ...

    def list(self, prefix: str) -> list[str]:
        """Sorted keys of the objects below `prefix/`."""
        ...


def check_key(key: str) -> str:
    """Return `key` if it stays below the root, else raise `StoreError`."""
    parts = key.split("/")
    if not key or any(p in ("", ".", "..") for p in parts) or "\\" in key or "\0" in key:
        raise StoreError(f"object name {key!r} is not a relative path of plain names; the store's metadata is damaged")
    return key


class LocalStorage:
    """A directory."""

    def __init__(self, root: Path) -> None:
        """Use `root`, which need not exist yet."""
        self.root = root
        self.url = str(root)

    def path(self, key: str) -> Path:
        """The file that holds `key`."""
        return self.root / check_key(key)

    def get(self, key: str) -> bytes:
        """See `Storage`."""
        try:
            return self.path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
            raise StoreError(f"{self.url}: object {key} is missing") from e

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """See `Storage`."""
        try:
            with self.path(key).open("rb", buffering=0) as f:
                data = os.pread(f.fileno(), length, offset)
        except FileNotFoundError as e:
            raise StoreError(f"{self.url}: object {key} is missing") from e
        if len(data) != length:
            raise StoreError(f"{self.url}: object {key} ends at {offset + len(data)}, expected {offset + length} bytes")
        return data

    def _write_partial(self, key: str, data: bytes) -> tuple[Path, Path]:
        target = self.path(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{secrets.token_hex(8)}{PARTIAL}")
        try:
            with partial.open("wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return partial, target

    def put(self, key: str, data: bytes) -> None:
        """See `Storage`."""
        partial, target = self._write_partial(key, data)
        partial.replace(target)
        _sync_directory(target.parent)

    def create(self, key: str, data: bytes) -> bool:
        """See `Storage`."""
        partial, target = self._write_partial(key, data)
        try:
            os.link(partial, target)
        except FileExistsError:
            return False
        finally:
            partial.unlink()
        _sync_directory(target.parent)
        return True

    def exists(self, key: str) -> bool:
        """See `Storage`."""
        return self.path(key).is_file()

    def size(self, key: str) -> int:
        """See `Storage`."""
        try:
            return self.path(key).stat().st_size
        except FileNotFoundError as e:
            raise StoreError(f"{self.url}: object {key} is missing") from e

    def list(self, prefix: str) -> list[str]:
        """See `Storage`."""
        below = self.root / prefix if prefix else self.root
        files = (p for p in below.rglob("*") if p.is_file() and not p.name.endswith(PARTIAL))
        return sorted(p.relative_to(self.root).as_posix() for p in files)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class FsspecStorage:
    """Anything fsspec speaks."""

    def __init__(self, url: str) -> None:
        """Connect to `url`; credentials come from the environment, as fsspec's drivers document."""
        self.url = url.rstrip("/")
        fs, root = fsspec.core.url_to_fs(self.url)
        self._fs: Any = fs
        self._root = str(root).rstrip("/")

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def get(self, key: str) -> bytes:
        """See `Storage`."""
        try:
            return self._fs.cat_file(self._path(key))
        except FileNotFoundError as e:
            raise StoreError(f"{self.url}: object {key} is missing") from e

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """See `Storage`."""
        try:
            data = self._fs.cat_file(self._path(key), start=offset, end=offset + length)
        except FileNotFoundError as e:
            raise StoreError(f"{self.url}: object {key} is missing") from e
        if len(data) != length:
            raise StoreError(f"{self.url}: object {key} ends at {offset + len(data)}, expected {offset + length} bytes")
        return data

    def put(self, key: str, data: bytes) -> None:
        """See `Storage`."""
        self._fs.pipe_file(self._path(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """See `Storage`.

        A refused put may be our own whose answer was lost, so what is there now decides. s3fs reports a lost race as
        `OSError` on servers that do not name the condition.
        """
        try:
            self._fs.pipe_file(self._path(key), data, mode="create")
        except FileExistsError:
            return False
        except OSError:
            if self.exists(key):
                return self.get(key) == data
            raise
        return True

    def exists(self, key: str) -> bool:
        """See `Storage`."""
        self._fs.invalidate_cache()
        return bool(self._fs.isfile(self._path(key)))

    def size(self, key: str) -> int:
        """See `Storage`."""
        self._fs.invalidate_cache()
        try:
            return int(self._fs.size(self._path(key)))
        except FileNotFoundError as e:
            raise StoreError(f"{self.url}: object {key} is missing") from e

    def list(self, prefix: str) -> list[str]:
        """See `Storage`."""
        self._fs.invalidate_cache()
        below = f"{self._root}/{prefix}".rstrip("/")
        start = len(self._fs._strip_protocol(self._root)) + 1  # noqa: SLF001  fsspec's public way to normalise a path
        return sorted(str(p)[start:] for p in self._fs.find(below))


def open_storage(url: str | os.PathLike[str]) -> Storage:
    """The storage behind a path or an fsspec URL; nothing is read or created yet."""
    text = os.fspath(url)
    scheme = urlsplit(text).scheme
    if scheme in ("", "file") or len(scheme) == 1:
        return LocalStorage(Path(text.removeprefix("file://")).expanduser())
    if scheme not in fsspec.available_protocols():
        raise ValueError(f"unknown URL scheme {scheme!r} in {text!r}; use a path, file://, gs://, s3:// or memory://")
    return FsspecStorage(text)
