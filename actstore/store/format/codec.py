"""Chunk codecs: activations to compressed bytes and back.

Codec `planes` is the zarr chain `bytes`, `numcodecs.shuffle`, `zstd`, `crc32c`: element bytes are split into planes
(all low bytes, then all high bytes), each chunk becomes one standard zstd frame, and a crc32c of the frame follows
it. The encoder is tuned to find no matches and leave pure entropy coding: trained activations have no repeats, only a
predictable exponent byte (DFloat11, arXiv 2504.11651). Any zstd decoder reads the result. The crc32c is checked
before a frame is decoded; at 40 GB/s (awscrt) it costs 8% of decoding where zstd's own frame checksum costs 20%
(`docs/decisions/0003-checksums.md`). Codec `blosc` is `bytes`, `blosc`, `crc32c`, for readers such as TensorStore that
lack the shuffle codec: a little larger, half as fast. Codec `none` is `bytes`, `crc32c`.

Decoding `planes` ends at planes: `stream/` merges the bytes while it gathers rows, `merge` does it for everybody else.
"""

import struct
import threading
from typing import Any, Literal

import numba
import numpy as np
import zstandard
from awscrt import checksums
from numcodecs import blosc, zstd  # pyright: ignore[reportAttributeAccessIssue]  a compiled module
from numpy.typing import NDArray

from actstore.errors import IntegrityError

CodecName = Literal["planes", "blosc", "none"]
CODECS: tuple[CodecName, ...] = ("planes", "blosc", "none")
CRC_BYTES = 4
BLOSC_BLOCK = 1 << 19
"""Blosc's own choice of block compresses activations to 1.27 where 512 KiB reach 1.45."""

_BLOSC_HEADER = struct.Struct("<4xIII")
"""Version, flags and type size; then decoded bytes, block size, stored bytes (c-blosc 1, README_CHUNK_FORMAT)."""

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


class _Local(threading.local):
    """What each thread keeps."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self.scratch: dict[str, NDArray[np.uint8]] = {}


_local = _Local()


def scratch(purpose: str, nbytes: int) -> NDArray[np.uint8]:
    """Memory of this thread, the same for a purpose each time: fresh memory would cost a page fault every 4 KiB."""
    if purpose not in _local.scratch or _local.scratch[purpose].nbytes < nbytes:
        _local.scratch[purpose] = np.empty(nbytes, np.uint8)
    return _local.scratch[purpose][:nbytes]


class Crc(int):
    """A crc32c; JSON has it as 8 hexadecimal digits."""


def crc32c(data: Any, previous: int = 0) -> Crc:
    """CRC-32C (Castagnoli, RFC 3720) of bytes, continued from `previous`."""
    return Crc(checksums.crc32c(data, previous))


def metadata(codec: CodecName, itemsize: int) -> list[dict[str, Any]]:
    """The zarr v3 `codecs` field of one inner chunk of elements of `itemsize` bytes."""
    chain: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if codec == "planes":
        chain.append({"name": "numcodecs.shuffle", "configuration": {"elementsize": itemsize}})
        chain.append({"name": "zstd", "configuration": {"level": 1, "checksum": False}})
    if codec == "blosc":
        settings = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "blocksize": BLOSC_BLOCK, "typesize": itemsize}
        chain.append({"name": "blosc", "configuration": settings})
    chain.append({"name": "crc32c"})
    return chain


def max_stored(decoded: int) -> int:
    """More bytes than any chunk of so many decoded bytes takes: what a record may claim."""
    return decoded + decoded // 64 + 4096


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


def encode_into(elements: NDArray[Any], codec: CodecName, out: NDArray[np.uint8]) -> tuple[int, int]:
    """Encode one chunk to the start of `out`, which has `max_stored` bytes: stored bytes, crc32c included, and crc32c.

    `elements` is C-contiguous and little endian, of 2 or 4 bytes an element. Nothing is allocated for `planes`: fresh
    memory would cost a tenth of the time.
    """
    if codec == "planes":
        size = _compress_planes(elements, out)
    elif codec == "blosc":
        payload = np.frombuffer(blosc.compress(elements.reshape(-1), b"zstd", 1, blosc.SHUFFLE, BLOSC_BLOCK), np.uint8)
        size = len(payload)
        out[:size] = payload
    else:
        size = elements.nbytes
        out[:size] = elements.reshape(-1).view(np.uint8)
    crc = crc32c(out[:size].data)
    out[size : size + CRC_BYTES] = np.frombuffer(crc.to_bytes(CRC_BYTES, "little"), np.uint8)
    return size + CRC_BYTES, crc


def _compress_planes(elements: NDArray[Any], out: NDArray[np.uint8]) -> int:
    planes, itemsize = scratch("planes", elements.nbytes), elements.dtype.itemsize
    if itemsize == 2:
        _split2(elements.reshape(-1).view(np.uint16), planes)
    else:
        planes.reshape(itemsize, -1)[:] = elements.reshape(-1).view(np.uint8).reshape(-1, itemsize).T
    size, view = 0, out.data
    with _local.compressor.stream_reader(planes.data, size=planes.nbytes) as frame:
        while got := frame.readinto(view[size:]):
            size += got
    return size


def encode(elements: NDArray[Any], codec: CodecName) -> bytes:
    """One chunk as `encode_into` makes it."""
    out = np.empty(max_stored(elements.nbytes), np.uint8)
    return out[: encode_into(elements, codec, out)[0]].tobytes()


def decode_into(
    data: Any, codec: CodecName, out: NDArray[np.uint8], what: str, *, committed: int | None = None
) -> None:
    """Check and decode one chunk into `out` [bytes of the chunk]: planes for `planes`, elements for the others.

    `what` names the chunk in the `IntegrityError`, raised if a checksum or the decoded size is wrong; `committed` is
    the crc32c that the commit record has for the chunk.
    """
    decode_payload(check_chunk(data, codec, out.nbytes, what, committed=committed), codec, out, what)


def check_chunk(data: Any, codec: CodecName, decoded: int, what: str, *, committed: int | None = None) -> memoryview:
    """What is to be decoded of one chunk, once its checksums and the size that it says it has are right."""
    view = memoryview(data)
    payload = view[:-CRC_BYTES]
    check_crc(payload, view[-CRC_BYTES:], what, committed=committed)
    size = _decoded_bytes(payload, codec)
    if size != decoded:
        raise IntegrityError(f"{what}: holds {size} bytes, expected {decoded}")
    return payload


def decode_payload(payload: Any, codec: CodecName, out: NDArray[np.uint8], what: str) -> None:
    """`decode_into` without the checks, of a chunk without its checksum."""
    try:
        if codec == "none":
            out[:] = np.frombuffer(payload, np.uint8)
        elif codec == "blosc":
            blosc.decompress(payload, out)
        else:
            zstd.decompress(payload, out)
    except (RuntimeError, ValueError) as e:
        raise IntegrityError(f"{what}: does not decode as {codec} ({e})") from e


def check_crc(payload: Any, tail: Any, what: str, *, committed: int | None) -> None:
    """`IntegrityError` unless `tail`, the end of a chunk, is the crc32c of what comes before it, and as committed."""
    found, stored = crc32c(payload) if len(payload) else None, int.from_bytes(tail, "little")
    if found != stored:
        computed = "missing" if found is None else f"{found:08x}"
        raise IntegrityError(
            f"{what}: crc32c is {computed}, the chunk says {stored:08x}; the stored bytes are damaged. "
            "Find the extent with: actstore verify --deep"
        )
    if committed not in (None, stored):
        raise IntegrityError(
            f"{what}: is an intact chunk, but not the one that was committed here (crc32c {stored:08x}, committed "
            f"{committed:08x}); objects were swapped or restored from elsewhere. Find the extent with: actstore verify"
        )


def _decoded_bytes(payload: memoryview, codec: CodecName) -> int | None:
    """What a chunk says it decodes to; None if it is no chunk of this codec."""
    if codec == "none":
        return len(payload)
    if codec == "planes":
        try:
            return zstandard.frame_content_size(payload)
        except zstandard.ZstdError:
            return None
    if len(payload) < _BLOSC_HEADER.size:
        return None
    decoded, _, stored = _BLOSC_HEADER.unpack_from(payload)
    return decoded if stored == len(payload) else None


def merge(decoded: NDArray[np.uint8], codec: CodecName, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Elements of `dtype` from what `decode_into` left: the inverse of the plane split."""
    if codec != "planes":
        return decoded.view(dtype)
    out = np.empty((decoded.size // dtype.itemsize, dtype.itemsize), np.uint8)
    _merge(decoded, out)
    return out.reshape(-1).view(dtype)
