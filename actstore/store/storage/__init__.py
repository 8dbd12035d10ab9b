"""Object storage as actstore needs it: whole objects, ranges, conditional writes, listings.

`open_storage` chooses what is behind a URL: a directory, or one of two engines for what is remote. `fsspec` drives
gcsfs, s3fs and whatever else fsspec speaks; `obstore` is the faster client where it is installed and proven
(docs/decisions/0006-storage-engine.md). They promise the same, see `Storage`.
"""

import os
import secrets
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import unquote, urlsplit

import fsspec

from actstore.errors import StoreError
from actstore.store.storage.base import Buffers, Stat, Storage, check_key
from actstore.store.storage.local import PARTIAL, LocalStorage
from actstore.store.storage.remote import RemoteStorage, plain, without_secrets

__all__ = [
    "PARTIAL",
    "Buffers",
    "Engine",
    "LocalStorage",
    "RemoteStorage",
    "Stat",
    "Storage",
    "check_conditional_writes",
    "check_key",
    "open_storage",
]

Engine = Literal["auto", "fsspec", "obstore"]
"""The client of gs:// and s3://; other URLs have only one."""
ENGINE = "ACTSTORE_ENGINE"
"""Environment variable: the engine where the caller names none."""
_CLOUDS: dict[str, Literal["s3", "gs"]] = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


def open_storage(url: str | os.PathLike[str], *, engine: Engine | None = None) -> Storage:
    """The storage behind a path or an fsspec URL; nothing is read or created yet.

    `engine` None means `ACTSTORE_ENGINE`, else auto: obstore for s3:// where it is usable, fsspec for all else.
    """
    text = os.fspath(url)
    if not text.strip():
        raise ValueError("an empty path or URL; give a directory, gs://bucket/prefix or s3://bucket/prefix")
    parts = urlsplit(text)
    scheme = parts.scheme
    if scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"file URL names the host {parts.netloc!r}; expected file:///path with three slashes")
        return LocalStorage(Path(unquote(parts.path)))
    if not scheme or len(scheme) == 1 or "://" not in text:
        return LocalStorage(Path(text).expanduser())
    if parts.username or parts.password or parts.query:
        raise ValueError(f"{scheme}:// URL with user, password or query; credentials come from the environment "
                         "(docs/object-storage.md)")  # fmt: skip
    if scheme in _CLOUDS:
        return _open_cloud(text, _CLOUDS[scheme], engine or os.environ.get(ENGINE) or "auto")
    if scheme not in fsspec.available_protocols():
        raise ValueError(f"unknown URL scheme {scheme!r}; use a path, file://, gs://, s3:// or memory://")
    from actstore.store.storage.fsspec_drivers import FsspecDriver

    text = text.rstrip("/")
    try:
        driver = FsspecDriver(text)
    except ImportError as e:
        raise StoreError(f"{scheme}:// needs another package: {e}") from e
    except Exception as e:  # whatever the driver raises when it connects
        raise StoreError(f"{without_secrets(text)}: can't connect: {plain(e)}") from e
    return RemoteStorage(text, driver.root, lambda: FsspecDriver(text))


def _open_cloud(url: str, scheme: Literal["s3", "gs"], engine: str) -> RemoteStorage:
    if engine not in get_args(Engine):
        raise ValueError(f"storage engine {engine!r} ({ENGINE}), expected one of {', '.join(get_args(Engine))}")
    bucket, _, root = url.partition("://")[2].rstrip("/").partition("/")
    if not bucket or set(url) & set("?#") or "@" in bucket:
        raise ValueError(f"expected {scheme}://bucket/prefix without user, password or query; credentials come from "
                         "the environment (docs/object-storage.md)")  # fmt: skip
    if root:
        check_key(root)
    from actstore.store.storage import obstore_driver

    if engine == "obstore" or (engine == "auto" and scheme == "s3" and obstore_driver.usable()):
        return RemoteStorage(url.rstrip("/"), root, lambda: obstore_driver.ObstoreDriver(scheme, bucket))
    from actstore.store.storage import fsspec_drivers

    driver = fsspec_drivers.S3Driver if scheme == "s3" else fsspec_drivers.GcsDriver
    return RemoteStorage(url.rstrip("/"), root, lambda: driver(bucket))


def check_conditional_writes(storage: Storage, key: str) -> None:
    """Prove with a small object beside `key` that the server honours conditions; `StoreError` if it does not.

    Without them two workers could overwrite each other's work unseen. Nothing stays behind. A directory needs no proof.
    """
    if isinstance(storage, LocalStorage):
        return
    name = f"{key}-{secrets.token_hex(4)}"
    first, second, third = (secrets.token_bytes(16) for _ in range(3))
    try:
        created = storage.create(name, first)
        kept = not storage.create(name, second) and storage.get(name, 16) == first
        before = storage.stat(name)
        storage.put(name, second)
        now = storage.stat(name)
        if before is None or now is None:
            raise StoreError(f"{storage.url}: an object that was just written is missing")
        stale = storage.replace(name, third, before.version)
        swapped = storage.replace(name, third, now.version) and storage.get(name, 16) == third
    finally:
        storage.delete(name)
    if not (created and kept and swapped) or stale:
        raise StoreError(
            f"{storage.url}: this object store ignores conditional writes (If-None-Match, If-Match or generation "
            "matches), so two workers could overwrite each other; use one that honours them (docs/object-storage.md)"
        )
