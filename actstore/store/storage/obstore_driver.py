"""obstore, the Rust crate `object_store`: s3://, az://, http(s):// and memory://, and gs:// on demand.

It moves bytes outside Python's interpreter lock and event loop, and lends them without a copy. One PUT an object, never
multipart: conditions need that, and multipart would bill 12 operations for 48 MiB. On S3 the signature covers the
body's SHA-256, which the server checks. S3's credentials, region and endpoint come from botocore (environment, shared
files and profiles, SSO, roles); Azure's and Google's from obstore's own reading of their environment variables. GCS
goes through the XML API, which no local server speaks: unproven here.

obstore 0.12's threads do not survive `fork`, and it can't start others. So a forked child loads a copy of the library,
which starts afresh, when it first connects.
"""

import importlib
import os
import re
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import botocore.session
import obstore
import obstore.store

from actstore.errors import StoreError
from actstore.store.storage.base import Buffers, Stat, pieces
from actstore.store.storage.remote import Answer, limits

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Config, S3Credential

SCHEMES = ("s3", "az", "memory", "http", "https", "gs")

_NATIVE = "obstore._obstore"
_LIBRARY = Path(str(sys.modules[_NATIVE].__file__))
_BEYOND_THE_END = ("status code: 416", "Wanted range starting at", 'header: "bytes 0--1/0"')
_CREDENTIAL_LIFE = timedelta(minutes=5)
_PAGE = 1000

_memory = obstore, obstore.store.MemoryStore()
"""What memory:// URLs name, for as long as the process lives. Its objects need no threads, so a fork keeps them."""
_loaded: ModuleType | None = obstore
_loading = threading.Lock()


def _seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


def _forked() -> None:
    global _loaded, _loading  # another thread of the parent may have held the lock
    _loaded, _loading = None, threading.Lock()


os.register_at_fork(after_in_child=_forked)


def _load() -> ModuleType:
    """obstore, whose threads are this process's own."""
    global _loaded  # noqa: PLW0603
    with _loading:
        if _loaded is None:
            if sys.platform != "linux":
                raise StoreError("obstore was used before this process was forked; start workers with method spawn")
            for name in [n for n in sys.modules if n.partition(".")[0] == "obstore"]:
                del sys.modules[name]
            with open(os.memfd_create("obstore"), "wb") as file:  # noqa: PTH123  a descriptor is no path
                file.write(_LIBRARY.read_bytes())
                file.flush()
                loader = ExtensionFileLoader(_NATIVE, f"/proc/self/fd/{file.fileno()}")
                spec = spec_from_loader(_NATIVE, loader)
                assert spec is not None
                sys.modules[_NATIVE] = module_from_spec(spec)
                loader.exec_module(sys.modules[_NATIVE])
            _loaded = importlib.import_module("obstore")
        return _loaded


class ObstoreDriver:
    """See `Driver`."""

    def __init__(self, scheme: str, bucket: str) -> None:
        """Connect to a bucket, container or host; the credentials are found, and nothing else is sent."""
        self._scheme = scheme
        self._token = "version" if scheme == "gs" else "e_tag"
        if scheme == "memory":
            self._ob, self._reads = _memory
            self._writes = self._reads
            return
        self._ob = _load()
        longest, silence, connecting = map(_seconds, limits())
        client: ClientConfig = {"allow_http": True, "connect_timeout": connecting, "timeout": longest}
        stores = self._ob.store
        if scheme == "s3":
            config, credentials, bundle = _aws()
            connect = partial(stores.S3Store, bucket, config=config, credential_provider=credentials)
            if bundle:
                client["root_certificate"] = Path(bundle).read_bytes()
        elif scheme in ("http", "https"):
            connect = partial(stores.HTTPStore, f"{scheme}://{bucket}")
        else:
            connect = partial(stores.GCSStore if scheme == "gs" else stores.AzureStore, bucket)
        connect = partial(connect, retry_config={"max_retries": 0, "retry_timeout": longest})
        self._reads = connect(client_options={**client, "read_timeout": silence})
        # obstore counts the time that a request takes to send as silence.
        self._writes = connect(client_options={**client, "read_timeout": longest})

    def get(self, name: str, start: int, stop: int | None) -> memoryview:
        """See `Driver`; a view of Rust's memory."""
        try:
            found = self._ob.get(self._reads, name, options={} if stop is None else {"range": (start, stop)})
            return memoryview(found.bytes())
        except self._ob.exceptions.BaseError as e:
            if any(text in str(e) for text in _BEYOND_THE_END):
                return memoryview(b"")
            raise

    def put(self, name: str, data: Buffers, *, create: bool, version: str | None) -> None:
        """See `Driver`."""
        mode = "create" if create else "overwrite" if version is None else {self._token: version}
        if self._scheme == "memory":
            data = b"".join(pieces(data))  # what obstore keeps would be the caller's buffer
        self._ob.put(self._writes, name, data or b"", mode=mode, use_multipart=False)

    def head(self, name: str) -> Stat:
        """See `Driver`."""
        found = self._ob.head(self._reads, name)
        return Stat(size=found["size"], version=str(found[self._token]), modified=found["last_modified"].timestamp())

    def delete(self, name: str) -> None:
        """See `Driver`."""
        self._ob.delete(self._reads, name)

    def page(self, prefix: str, token: str | None) -> tuple[list[tuple[str, int]], str | None]:
        """See `Driver`; the rest of the listing, or what came before a failure."""
        found: list[tuple[str, int]] = []
        try:
            for items in self._ob.list(self._reads, prefix or None, offset=token, chunk_size=_PAGE):
                found.extend((i["path"], i["size"]) for i in items)
        except self._ob.exceptions.BaseError:
            if not found:
                raise
            return found, found[-1][0]
        return found, None

    def answer(self, error: Exception) -> Answer | None:
        """See `Driver`; obstore names status and code in an error's text only."""
        kinds = self._ob.exceptions
        found = re.search(r"status code: (\d{3})", str(error))
        status = int(found[1]) if found else None
        found = re.search(r"<Code>(\w+)</Code>", str(error))
        code = found[1] if found else ""
        if isinstance(error, FileNotFoundError):
            return Answer(404, code)
        if self._scheme == "s3" and status == 409:
            return Answer(503, code)  # two conditional writes met; AWS asks to try again
        if isinstance(error, (kinds.AlreadyExistsError, kinds.PreconditionError)):
            return Answer(412, code)
        return Answer(status, code) if status or isinstance(error, kinds.GenericError) else None


def _aws() -> "tuple[S3Config, Callable[[], S3Credential], str | None]":
    """Region and endpoint, credentials, and the file of an own certificate authority, as botocore finds them."""
    session = botocore.session.get_session()
    client = session.create_client("s3")  # resolves profiles, regions and endpoints; sends nothing
    config: S3Config = {"endpoint": client.meta.endpoint_url, "region": client.meta.region_name or "us-east-1"}
    client.close()
    found = session.get_credentials()
    if found is None:
        raise StoreError("no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE")

    def credentials() -> "S3Credential":
        now = found.get_frozen_credentials()  # refreshes those that expire
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(UTC) + _CREDENTIAL_LIFE,
        }

    return config, credentials, session.get_config_variable("ca_bundle")
