"""Chunk codecs: activations to compressed bytes and back.

Codec `planes` is the zarr chain `bytes`, `numcodecs.shuffle`, `zstd`, `crc32c`: element bytes are split into planes
(all low bytes, then all high bytes), each chunk becomes one standard zstd frame, and a crc32c of the frame follows
it. The encoder is tuned to find no matches and leave pure entropy coding: trained activations have no repeats, only a
predictable exponent byte (DFloat11, arXiv 2504.11651). Any zstd decoder reads the result. The crc32c is checked
before a frame is decoded; at 40 GB/s (awscrt) it costs 8% of decoding where zstd's own frame checksum costs 20%
(`docs/decisions/0003-checksums.md`). Codec `none` is `bytes`, `crc32c`.

Decoding ends at planes: `stream/` merges the bytes while it gathers rows, `merge` does it for everybody else.
"""

import threading
from typing import Any, Literal

import numba
import numpy as np
import zstandard
from awscrt import checksums
from numcodecs import zstd  # pyright: ignore[reportAttributeAccessIssue]  a compiled module
from numpy.typing import NDArray

from actstore.errors import IntegrityError

CodecName = Literal["planes", "none"]
CODECS: tuple[CodecName, ...] = ("planes", "none")
CRC_BYTES = 4

_PARAMETERS = zstandard.ZstdCompressionParameters(
    write_content_size=1,
    write_checksum=0,
    strategy=zstandard.STRATEGY_FAST,
    min_match=7,
    hash_log=6,
    chain_log=6,
    window_log=17,
    target_length=0,
    search_log=1,
)
_local = threading.local()


def _compressor() -> zstandard.ZstdCompressor:
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
    return _local.compressor


def _scratch(nbytes: int) -> NDArray[np.uint8]:
    """Memory of this thread: fresh memory would cost a page fault every 4 KiB."""
    if getattr(_local, "scratch", np.empty(0)).nbytes < nbytes:
        _local.scratch = np.empty(nbytes, np.uint8)
    return _local.scratch[:nbytes]


def crc32c(data: Any, previous: int = 0) -> int:
    """CRC-32C (Castagnoli, RFC 3720) of bytes, continued from `previous`."""
    return checksums.crc32c(data, previous)


def metadata(codec: CodecName, itemsize: int) -> list[dict[str, Any]]:
    """The zarr v3 `codecs` field of one inner chunk of elements of `itemsize` bytes."""
    chain: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if codec == "planes":
        chain.append({"name": "numcodecs.shuffle", "configuration": {"elementsize": itemsize}})
        chain.append({"name": "zstd", "configuration": {"level": 1, "checksum": False}})
    chain.append({"name": "crc32c"})
    return chain


@numba.njit(nogil=True, cache=True)
def _split(elements: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    n, itemsize = elements.shape
    for b in range(itemsize):
        for i in range(n):
            out[b * n + i] = elements[i, b]


@numba.njit(nogil=True, cache=True)
def _split2(elements: NDArray[np.uint16], out: NDArray[np.uint8]) -> None:
    n = elements.shape[0]
    low, high = out[:n], out[n:]
    for i in range(n):
        low[i] = np.uint8(elements[i] & np.uint16(255))
        high[i] = np.uint8(elements[i] >> np.uint16(8))


@numba.njit(nogil=True, cache=True)
def _merge(planes: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    n, itemsize = out.shape
    for b in range(itemsize):
        for i in range(n):
            out[i, b] = planes[b * n + i]


def encode(elements: NDArray[Any], codec: CodecName) -> bytes:
    """One chunk, crc32c included.

    `elements` is C-contiguous and little endian, of 2 or 4 bytes an element.
    """
    itemsize = elements.dtype.itemsize
    if codec == "none":
        payload = elements.tobytes()
    else:
        planes = _scratch(elements.nbytes)
        if itemsize == 2:
            _split2(elements.reshape(-1).view(np.uint16), planes)
        else:
            _split(elements.reshape(-1).view(np.uint8).reshape(-1, itemsize), planes)
        payload = _compressor().compress(planes.data)
    return payload + crc32c(payload).to_bytes(CRC_BYTES, "little")


def decode_into(data: Any, codec: CodecName, out: NDArray[np.uint8], what: str) -> None:
    """Check and decode one chunk into `out` [bytes of the chunk]: planes for `planes`, elements for `none`.

    `what` names the chunk in the error. Raises `IntegrityError` if the checksum or the decoded size is wrong.
    """
    view = memoryview(data)
    payload, stored = view[:-CRC_BYTES], int.from_bytes(view[-CRC_BYTES:], "little")
    found = crc32c(payload) if len(view) > CRC_BYTES else None
    if found != stored:
        computed = "missing" if found is None else f"{found:08x}"
        raise IntegrityError(
            f"{what}: crc32c is {computed}, the chunk says {stored:08x}; the stored bytes are damaged. "
            "Find the extent with: actstore verify --deep"
        )
    if codec == "none":
        if len(payload) != out.nbytes:
            raise IntegrityError(f"{what}: holds {len(payload)} bytes, expected {out.nbytes}")
        out[:] = np.frombuffer(payload, np.uint8)
        return
    size = zstandard.frame_content_size(payload)
    if size != out.nbytes:
        raise IntegrityError(f"{what}: its zstd frame holds {size} bytes, expected {out.nbytes}")
    try:
        zstd.decompress(payload, out)
    except RuntimeError as e:
        raise IntegrityError(f"{what}: its zstd frame does not decode ({e})") from e


def merge(decoded: NDArray[np.uint8], codec: CodecName, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Elements of `dtype` from what `decode_into` left: the inverse of the plane split."""
    if codec == "none":
        return decoded.view(dtype)
    out = np.empty((decoded.size // dtype.itemsize, dtype.itemsize), np.uint8)
    _merge(decoded, out)
    return out.reshape(-1).view(dtype)
