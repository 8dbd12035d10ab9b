"""Object storage as actstore needs it: whole objects, ranges, conditional writes, listings.

`open_storage` chooses what is behind a URL. `base.py` says what every storage promises, `local.py` keeps it with a
directory, `remote.py` with a driver: `obstore_driver.py`, or `gcsfs_driver.py` for gs://
(docs/decisions/0006-storage-engine.md).
"""

import os
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from actstore.errors import StoreError
from actstore.store.storage.base import Storage, check_key
from actstore.store.storage.local import PARTIAL, LocalStorage
from actstore.store.storage.remote import Driver, RemoteStorage

__all__ = [
    "PARTIAL",
    "LocalStorage",
    "Storage",
    "check_conditional_writes",
    "open_storage",
]

ENGINE = "ACTSTORE_ENGINE"
"""Environment variable: the client of gs://, gcsfs (default) or obstore; other URLs have only one."""
SERVED = "a path, file://, gs://, s3://, az://, memory://, or http(s):// for reading"
_ALIASES = {"s3a": "s3", "gcs": "gs"}


def open_storage(url: str | os.PathLike[str]) -> Storage:
    """The storage behind a path or a URL as fsspec spells it; nothing is read or created yet."""
    text = os.fspath(url)
    if not text.strip():
        raise ValueError("an empty path or URL; give a directory, gs://bucket/prefix or s3://bucket/prefix")
    parts = urlsplit(text)
    scheme = _ALIASES.get(parts.scheme, parts.scheme)
    if scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"file URL names the host {parts.netloc!r}; expected file:///path with three slashes")
        return LocalStorage(Path(unquote(parts.path)))
    if len(scheme) <= 1 or "://" not in text:
        return LocalStorage(Path(text).expanduser())
    rest = text.partition("://")[2].rstrip("/")
    bucket, _, root = rest.partition("/")
    if "@" in bucket or set(text) & set("?#") or not (bucket or scheme == "memory"):
        raise ValueError(f"expected {scheme}://bucket/prefix without user, password or query; credentials come from "
                         "the environment (docs/object-storage.md)")  # fmt: skip
    if scheme == "memory":
        bucket, root = "", rest.strip("/")
    elif scheme in ("http", "https"):
        root = unquote(root)
    if root:
        check_key(root)
    return RemoteStorage(f"{parts.scheme}://{rest}", root, _driver(scheme, bucket))


def _driver(scheme: str, bucket: str) -> Callable[[], Driver]:
    """What connects to a bucket; only the client that is needed is imported."""
    engine = os.environ.get(ENGINE) or "gcsfs"
    if engine not in ("gcsfs", "obstore"):
        raise ValueError(f"{ENGINE} is {engine!r}, expected gcsfs or obstore")
    if scheme == "gs" and engine == "gcsfs":
        from actstore.store.storage.gcsfs_driver import GcsfsDriver

        return partial(GcsfsDriver, bucket)
    from actstore.store.storage.obstore_driver import SCHEMES, ObstoreDriver

    if scheme not in SCHEMES:
        raise ValueError(f"unknown URL scheme {scheme!r}; use {SERVED}")
    return partial(ObstoreDriver, scheme, bucket)


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
