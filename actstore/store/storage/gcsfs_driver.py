"""Google Cloud Storage through gcsfs, the default for gs://.

gcsfs serves as an authenticated HTTP client only: every request is made here, so that it is one request, has the
condition it needs and is tried once. That costs a dependency on a call (`call`) that gcsfs documents, and gains
generation conditions, which gcsfs does not offer. A write is one multipart upload (JSON API) whatever the size, with
`ifGenerationMatch`; the object's crc32c travels with it and the server refuses other bytes. Rapid (zonal) buckets,
which need gRPC, are not served.
"""

import base64
import io
import json
import secrets
from datetime import datetime
from typing import Any
from urllib.parse import quote

import aiohttp
from awscrt.checksums import crc32c
from gcsfs.core import GCSFileSystem
from google.auth.exceptions import GoogleAuthError
from requests.exceptions import RequestException

from actstore.errors import IntegrityError
from actstore.store.storage.base import Buffers, Stat, pieces
from actstore.store.storage.remote import Answer, limits

_NO_ANSWER = (aiohttp.ClientError, RequestException, TimeoutError, ConnectionError, json.JSONDecodeError)


class OneTry(GCSFileSystem):
    """gcsfs without its own retries."""

    _request = getattr(GCSFileSystem._request, "__wrapped__", GCSFileSystem._request)  # noqa: SLF001


class GcsfsDriver:
    """See `Driver`."""

    def __init__(self, bucket: str) -> None:
        """Connect with Google's application default credentials."""
        self._longest, silence, connect = limits()
        timeout = aiohttp.ClientTimeout(total=self._longest, sock_connect=connect, sock_read=silence)
        self._fs: Any = OneTry(requests_timeout=timeout, use_listings_cache=False, skip_instance_cache=True)
        self._bucket = f"storage/v1/b/{quote(bucket, safe='')}/o"

    def _call(self, method: str, path: str, **kwargs: Any) -> Any:
        return self._fs.call(method, f"{self._fs._location}/{path}", timeout=self._longest, **kwargs)  # noqa: SLF001

    def _object(self, name: str) -> str:
        return f"{self._bucket}/{quote(name, safe='')}"

    def get(self, name: str, start: int, stop: int | None) -> bytes:
        """See `Driver`."""
        headers = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        try:
            return self._call("GET", f"download/{self._object(name)}", alt="media", headers=headers)[1]
        except Exception as e:
            if _status(e) == 416:  # the object ends before `start`
                return b""
            raise

    def put(self, name: str, data: Buffers, *, create: bool, version: str | None) -> None:
        """See `Driver`."""
        crc = 0
        for piece in pieces(data):
            crc = crc32c(piece, crc)  # pyright: ignore[reportArgumentType]  it takes any buffer
        crc_text = base64.b64encode(crc.to_bytes(4, "big")).decode()
        boundary = secrets.token_hex(16)
        meta = json.dumps({"name": name, "crc32c": crc_text})
        head = f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{meta}\r\n--{boundary}\r\n"
        head += "Content-Type: application/octet-stream\r\n\r\n"
        condition = "0" if create else version
        made = self._call(
            "POST",
            f"upload/{self._bucket}",
            uploadType="multipart",
            headers={"Content-Type": f"multipart/related; boundary={boundary}"},
            data=io.BytesIO(b"".join([head.encode(), *pieces(data), f"\r\n--{boundary}--".encode()])),
            json_out=True,
            **({} if condition is None else {"ifGenerationMatch": condition}),
        )
        if made.get("crc32c", crc_text) != crc_text:
            raise IntegrityError("the server stored other bytes than were sent; delete the object and write it again")

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
        fields = "items(name,size),nextPageToken"
        found = self._call("GET", self._bucket, prefix=prefix, pageToken=token, fields=fields, json_out=True)
        return [(i["name"], int(i["size"])) for i in found.get("items", [])], found.get("nextPageToken")

    def answer(self, error: Exception) -> Answer | None:
        """See `Driver`; gcsfs has Python's errors for two statuses."""
        status = _status(error)
        if isinstance(error, FileNotFoundError):
            return Answer(404)
        if isinstance(error, FileExistsError):
            return Answer(412)
        if status == 401 and "Invalid Credentials" in str(error):
            return Answer(503)  # a token that has expired, and that the next try renews
        if status is not None:
            return Answer(status)
        passes = error.retryable if isinstance(error, GoogleAuthError) else isinstance(error, _NO_ANSWER)
        return Answer() if passes else None


def _status(error: Exception) -> int | None:
    """The status in gcsfs's `HttpError` or aiohttp's `ClientResponseError`."""
    code = str(getattr(error, "code", None) or getattr(error, "status", None))
    return int(code) if code.isdigit() else None
