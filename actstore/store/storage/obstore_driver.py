"""The fast engine: obstore (the Rust crate `object_store`) for S3 and Google Cloud Storage.

It moves bytes outside Python's interpreter lock and event loop, and lends them without a copy. The price: the library
does not survive `fork`, neither an inherited client nor a new one in the child, so a process remembers whether it, or a
parent before the fork, has used it. One PUT an object, never multipart: conditions need that, and multipart would bill
12 operations for 48 MiB. On S3 the signature covers the body's SHA-256, which the server checks.

Credentials, region and endpoint come from botocore where it is installed (profiles, SSO, roles), else from obstore's
own reading of the `AWS_*` variables. GCS goes through the XML API, which no local server speaks: unproven here.
"""

import importlib.util
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from actstore.errors import StoreError
from actstore.store.storage.base import Buffers, Stat
from actstore.store.storage.fsspec_drivers import S3_PASSING
from actstore.store.storage.remote import (
    RefusedError,
    TransientError,
    UnreachableError,
    connecting,
    longest,
    plain,
    silence,
)

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Config, S3Credential

_CREDENTIAL_LIFE = timedelta(minutes=5)
_PAGE = 1000
_first_pid: int | None = None


def usable() -> bool:
    """Whether obstore is installed and no parent of this process used it before the fork."""
    return _first_pid in (None, os.getpid()) and importlib.util.find_spec("obstore") is not None


class ObstoreDriver:
    """S3 or GCS through obstore."""

    def __init__(self, scheme: Literal["s3", "gs"], bucket: str) -> None:
        """Connect; `StoreError` in a process forked from one that used obstore."""
        global _first_pid  # noqa: PLW0603  what fork copies is exactly what this has to remember
        if not usable():
            if importlib.util.find_spec("obstore") is None:
                raise StoreError("engine obstore is not installed: pip install 'actstore[fast]'")
            raise StoreError(
                "obstore was used before this process was forked and would hang here; start workers with the spawn "
                "method, or set ACTSTORE_ENGINE=fsspec"
            )
        _first_pid = os.getpid()
        import obstore

        self._ob = obstore
        self._scheme, self._bucket = scheme, bucket
        self._token: Literal["e_tag", "version"] = "e_tag" if scheme == "s3" else "version"
        connect = _s3(bucket) if scheme == "s3" else _gcs(bucket)
        self._reads: Any = connect(silence())
        self._writes: Any = connect(longest())  # obstore counts the time a request takes to send as silence

    def get(self, name: str, start: int, stop: int | None) -> memoryview:
        """See `Driver`; a view of Rust's memory."""
        try:
            found = self._ob.get(self._reads, name, options={} if stop is None else {"range": (start, stop)})
            return memoryview(found.bytes())
        except self._ob.exceptions.BaseError as e:
            if _status(e) == 416:
                return memoryview(b"")
            raise

    def put(self, name: str, data: Buffers, *, create: bool = False, version: str | None = None) -> None:
        """See `Driver`."""
        body: Any = data or b""
        if create:
            self._ob.put(self._writes, name, body, mode="create", use_multipart=False)
        elif version is not None:
            self._ob.put(self._writes, name, body, mode={self._token: version}, use_multipart=False)  # pyright: ignore[reportArgumentType]  a TypedDict with a chosen key
        else:
            self._ob.put(self._writes, name, body, use_multipart=False)

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

    def explain(self, error: Exception) -> Exception:
        """See `Driver`."""
        kinds = self._ob.exceptions
        if isinstance(error, (kinds.AlreadyExistsError, kinds.PreconditionError)):
            return TransientError(plain(error)) if _status(error) == 409 else RefusedError(plain(error))
        code = re.search(r"<Code>(\w+)</Code>", str(error))
        if code and code[1] == "NoSuchBucket":
            return StoreError(f"{self._scheme}://{self._bucket}: there is no such bucket")
        status = _status(error)
        if isinstance(error, kinds.GenericError):
            passes = status is None or status in S3_PASSING or (code is not None and code[1] in S3_PASSING)
            kind = UnreachableError if status is None and code is None else TransientError
            return kind(plain(error)) if passes else error
        return error


def _status(error: Exception) -> int | None:
    """The HTTP status that obstore names in an error's text only."""
    found = re.search(r"status code: (\d{3})", str(error))
    return int(found[1]) if found else None


def _options(read: float, *, http: bool) -> "tuple[ClientConfig, RetryConfig]":
    """Time-outs, and no tries of obstore's own."""
    client: ClientConfig = {
        "allow_http": http,
        "connect_timeout": timedelta(seconds=connecting()),
        "read_timeout": timedelta(seconds=read),
        "timeout": timedelta(seconds=longest()),
    }
    return client, {"max_retries": 0, "retry_timeout": timedelta(seconds=longest())}


def _s3(bucket: str) -> Callable[[float], object]:
    from obstore.store import S3Store

    config: S3Config = {}
    credentials = None
    if importlib.util.find_spec("botocore") is not None:
        import botocore.session

        session = botocore.session.get_session()
        client = session.create_client("s3")  # resolves profiles, regions and endpoints; sends nothing
        endpoint = str(client.meta.endpoint_url)
        config = {"endpoint": endpoint, "region": client.meta.region_name or "us-east-1"}
        client.close()
        credentials = _Credentials(session.get_credentials())
    else:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")

    def connect(read: float) -> object:
        client, retry = _options(read, http=endpoint.startswith("http://"))
        return S3Store(
            bucket, config=config, client_options=client, retry_config=retry, credential_provider=credentials
        )

    return connect


def _gcs(bucket: str) -> Callable[[float], object]:
    from obstore.store import GCSStore

    def connect(read: float) -> object:
        client, retry = _options(read, http=False)
        return GCSStore(bucket, client_options=client, retry_config=retry)

    return connect


class _Credentials:
    """botocore's credentials, which refresh themselves, as obstore asks for them."""

    def __init__(self, credentials: Any) -> None:
        if credentials is None:
            raise StoreError("no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE")
        self._credentials = credentials

    def __call__(self) -> "S3Credential":
        now = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(UTC) + _CREDENTIAL_LIFE,
        }
