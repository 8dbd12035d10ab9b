"""Drivers on fsspec's file systems: gcsfs, s3fs, and anything else fsspec speaks.

gcsfs and s3fs serve as authenticated HTTP clients only: every request is made here, so that it is one request, has
the condition it needs and is tried once. That costs a dependency on calls (`call`, `call_s3`) that both document, and
gains generation conditions on GCS, which gcsfs does not offer, and single-request reads on S3.

* GCS (JSON API): one multipart upload whatever the size, `ifGenerationMatch`; the object's crc32c travels with it and
  the server refuses other bytes. Rapid (zonal) buckets, which need gRPC, are not served.
* S3: one PutObject (5 GB at most), `If-None-Match: *` and `If-Match`; botocore's CRC32 or SHA-256 travels with it.
* `memory://`: conditions under a lock in this process. Others: create-only where the driver has it, no `replace`.
"""

import base64
import io
import json
import secrets
import threading
from datetime import datetime
from typing import Any, ClassVar
from urllib.parse import quote

import aiohttp
import fsspec
from awscrt.checksums import crc32c

from actstore.errors import IntegrityError, StoreError
from actstore.store.storage.base import Buffers, Stat, join
from actstore.store.storage.remote import (
    RefusedError,
    TransientError,
    UnreachableError,
    connecting,
    longest,
    plain,
    silence,
)

PASSING = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP statuses that are worth another try."""
_UNSATISFIABLE = 416
_CONNECTIONS = 64


def passing(error: Exception) -> bool:
    """Whether a connection broke, stalled or was refused, or the answer says that it may pass."""
    if isinstance(error, aiohttp.ClientResponseError) and error.status >= 400:
        return error.status in PASSING
    return isinstance(error, (aiohttp.ClientError, TimeoutError, ConnectionError, json.JSONDecodeError))


def _passes(status: int | None, error: Exception) -> TransientError:
    return UnreachableError(plain(error)) if status is None else TransientError(f"status {status} {plain(error)}")


class GcsDriver:
    """Google Cloud Storage through gcsfs."""

    def __init__(self, bucket: str) -> None:
        """Connect with Google's application default credentials."""
        from gcsfs.core import GCSFileSystem

        class OneTry(GCSFileSystem):
            """gcsfs without its own retries."""

            _request = getattr(GCSFileSystem._request, "__wrapped__", GCSFileSystem._request)  # noqa: SLF001

        timeout = aiohttp.ClientTimeout(total=longest(), sock_connect=connecting(), sock_read=silence())
        self._fs: Any = OneTry(requests_timeout=timeout, use_listings_cache=False, skip_instance_cache=True)
        self._bucket = quote(bucket, safe="")

    def _call(self, method: str, path: str, **kwargs: Any) -> Any:
        return self._fs.call(method, f"{self._fs._location}/{path}", timeout=longest(), **kwargs)  # noqa: SLF001

    def _object(self, name: str) -> str:
        return f"storage/v1/b/{self._bucket}/o/{quote(name, safe='')}"

    def get(self, name: str, start: int, stop: int | None) -> bytes:
        """See `Driver`."""
        headers = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        try:
            return self._call("GET", f"download/{self._object(name)}", alt="media", headers=headers)[1]
        except Exception as e:
            if _http_status(e) == _UNSATISFIABLE:
                return b""
            raise

    def put(self, name: str, data: Buffers, *, create: bool = False, version: str | None = None) -> None:
        """See `Driver`."""
        pieces = [data] if isinstance(data, bytes) else data
        crc = 0
        for piece in pieces:
            crc = crc32c(piece, crc)  # pyright: ignore[reportArgumentType]  it takes any buffer
        crc_text = base64.b64encode(crc.to_bytes(4, "big")).decode()
        boundary = secrets.token_hex(16)
        meta = json.dumps({"name": name, "crc32c": crc_text})
        head = f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{meta}\r\n--{boundary}\r\n"
        body = [f"{head}Content-Type: application/octet-stream\r\n\r\n".encode(), *pieces]
        condition = "0" if create else version
        made = self._call(
            "POST",
            f"upload/storage/v1/b/{self._bucket}/o",
            uploadType="multipart",
            headers={"Content-Type": f"multipart/related; boundary={boundary}"},
            data=io.BytesIO(b"".join([*body, f"\r\n--{boundary}--".encode()])),
            json_out=True,
            **({} if condition is None else {"ifGenerationMatch": condition}),
        )
        if made.get("crc32c", crc_text) != crc_text:
            raise IntegrityError(f"{name}: the server stored other bytes than were sent; delete it and write it again")

    def head(self, name: str) -> Stat:
        """See `Driver`."""
        found = self._call("GET", self._object(name), json_out=True)
        modified = datetime.fromisoformat(found["updated"]).timestamp()
        return Stat(size=int(found["size"]), version=str(found["generation"]), modified=modified)

    def delete(self, name: str) -> None:
        """See `Driver`."""
        self._call("DELETE", self._object(name))

    def page(self, prefix: str, token: str | None) -> tuple[list[tuple[str, int]], str | None]:
        """See `Driver`."""
        path = f"storage/v1/b/{self._bucket}/o"
        fields = "items(name,size),nextPageToken"
        found = self._call("GET", path, prefix=prefix, pageToken=token, fields=fields, json_out=True)
        return [(i["name"], int(i["size"])) for i in found.get("items", [])], found.get("nextPageToken")

    def explain(self, error: Exception) -> Exception:
        """See `Driver`."""
        from google.auth.exceptions import GoogleAuthError
        from requests.exceptions import RequestException

        status = _http_status(error)
        if isinstance(error, FileExistsError):
            return RefusedError(plain(error))
        if isinstance(error, GoogleAuthError):
            return TransientError(plain(error)) if error.retryable else error
        expired = status == 401 and "Invalid Credentials" in str(error)
        if status in PASSING or expired or passing(error) or isinstance(error, RequestException):
            return _passes(status, error)
        return error


def _http_status(error: Exception) -> int | None:
    """The status in gcsfs's `HttpError`."""
    code = str(getattr(error, "code", None))
    return int(code) if code.isdigit() else None


class S3Driver:
    """S3 and its likes through s3fs."""

    def __init__(self, bucket: str) -> None:
        """Connect with botocore's credentials, region and endpoint (`AWS_ENDPOINT_URL`)."""
        try:
            from s3fs import S3FileSystem
        except ImportError as e:
            raise StoreError("s3:// needs s3fs or obstore: pip install 'actstore[s3]' or 'actstore[fast]'") from e

        config = {
            "connect_timeout": connecting(),
            "read_timeout": silence(),
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": _CONNECTIONS,
        }
        self._fs: Any = S3FileSystem(config_kwargs=config, use_listings_cache=False, skip_instance_cache=True)
        self._fs.retries = 1
        self._bucket = bucket

    def _call(self, method: str, **kwargs: Any) -> Any:
        return self._fs.call_s3(method, Bucket=self._bucket, timeout=longest(), **kwargs)

    def get(self, name: str, start: int, stop: int | None) -> bytes:
        """See `Driver`."""
        ends: dict[str, int] = {} if stop is None else {"start": start, "end": stop}
        try:
            return self._fs.cat_file(f"{self._bucket}/{name}", max_concurrency=1, timeout=longest(), **ends)
        except Exception as e:
            if _s3_error(e)[0] == _UNSATISFIABLE:
                return b""
            raise

    def put(self, name: str, data: Buffers, *, create: bool = False, version: str | None = None) -> None:
        """See `Driver`."""
        condition = {"IfNoneMatch": "*"} if create else {"IfMatch": version} if version is not None else {}
        try:
            self._call("put_object", Key=name, Body=join(data), **condition)
        except FileNotFoundError as e:
            if version is not None and _s3_error(e)[1] != "NoSuchBucket":
                raise RefusedError("the object vanished") from e
            raise

    def head(self, name: str) -> Stat:
        """See `Driver`."""
        found = self._call("head_object", Key=name)
        modified = found["LastModified"].timestamp()
        return Stat(size=int(found["ContentLength"]), version=str(found["ETag"]), modified=modified)

    def delete(self, name: str) -> None:
        """See `Driver`."""
        self._call("delete_object", Key=name)

    def page(self, prefix: str, token: str | None) -> tuple[list[tuple[str, int]], str | None]:
        """See `Driver`."""
        more = {} if token is None else {"ContinuationToken": token}
        found = self._call("list_objects_v2", Prefix=prefix, **more)
        return [(i["Key"], int(i["Size"])) for i in found.get("Contents", [])], found.get("NextContinuationToken")

    def explain(self, error: Exception) -> Exception:
        """See `Driver`."""
        from botocore import exceptions as boto
        from botocore.parsers import ResponseParserError

        status, code = _s3_error(error)
        if status == 412 or isinstance(error, FileExistsError):
            return RefusedError(plain(error))
        broken = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, ResponseParserError)
        if status in S3_PASSING or code in S3_PASSING or passing(error) or isinstance(error, broken):
            return _passes(status, error)
        if code == "NoSuchBucket":
            return StoreError(f"s3://{self._bucket}: there is no such bucket")
        return FileNotFoundError(plain(error)) if status == 404 else error


S3_PASSING: frozenset[int | str] = PASSING | {
    409,  # two conditional writes met; AWS asks to try again
    "BadDigest",
    "IncompleteBody",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}
"""Statuses and error codes of S3 that are worth another try."""


def _s3_error(error: BaseException) -> tuple[int | None, str]:
    """HTTP status and S3 error code of an error of s3fs, which wraps botocore's."""
    response: dict[str, Any] = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status, str(response.get("Error", {}).get("Code", ""))


class FsspecDriver:
    """Any other file system of fsspec's."""

    _memory: ClassVar = threading.Lock()

    def __init__(self, url: str) -> None:
        """Connect to `url` as fsspec's driver documents."""
        fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
        self._fs: Any = fs
        self._scheme = url.partition("://")[0]
        self.root = str(root).rstrip("/")

    def get(self, name: str, start: int, stop: int | None) -> bytes:
        """See `Driver`."""
        return self._fs.cat_file(name) if stop is None else self._fs.cat_file(name, start=start, end=stop)

    def put(self, name: str, data: Buffers, *, create: bool = False, version: str | None = None) -> None:
        """See `Driver`."""
        if self._scheme != "memory":
            if version is not None:
                raise StoreError(f"{self._scheme}:// has no compare-and-swap here; use a path, gs:// or s3://")
            self._fs.pipe_file(name, join(data), mode="create" if create else "overwrite")
            return
        with self._memory:
            if create and self._fs.isfile(name):
                raise RefusedError("it exists")
            if version is not None and not (self._fs.isfile(name) and self.head(name).version == version):
                raise RefusedError("it changed")
            self._fs.pipe_file(name, join(data))

    def head(self, name: str) -> Stat:
        """See `Driver`."""
        info = self._fs.info(name)
        if info["type"] != "file":
            raise FileNotFoundError(name)
        modified = self._fs.modified(name).timestamp()
        version = str(info.get("etag") or info.get("ETag") or f"{modified!r}-{info['size']}")
        return Stat(size=int(info["size"]), version=version, modified=modified)

    def delete(self, name: str) -> None:
        """See `Driver`."""
        self._fs.rm_file(name)

    def page(self, prefix: str, token: str | None) -> tuple[list[tuple[str, int]], str | None]:  # noqa: ARG002
        """See `Driver`; all in one page."""
        below = self.root + prefix.removeprefix(self.root)
        try:
            found = self._fs.find(below.rstrip("/"), detail=True)
        except FileNotFoundError:
            return [], None
        start = len(self._fs._strip_protocol(self.root))  # noqa: SLF001  fsspec's public way to normalise a path
        return [(self.root + str(p)[start:], int(i["size"])) for p, i in found.items()], None

    def explain(self, error: Exception) -> Exception:
        """See `Driver`."""
        if isinstance(error, FileExistsError):
            return RefusedError(plain(error))
        return TransientError(plain(error)) if passing(error) else error
