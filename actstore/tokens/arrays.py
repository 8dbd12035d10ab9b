"""Arrays of a token table: zarr metadata, and chunks to and from bytes.

Nothing is decoded whose size is not known before: metadata must be exactly what this module writes, an object may be
no longer than its chunk can take, and the zstd frame in it must declare the chunk's size.
"""

import json
from dataclasses import dataclass
from math import prod

import numpy as np
import zstandard
from awscrt.checksums import crc32c
from numpy.typing import NDArray

from actstore.errors import IntegrityError, TokensError
from actstore.store.storage import Storage

MAX_CHUNK_BYTES = 1 << 26
"""Of a decoded chunk; `tokenize` writes 4 MiB, or one sequence if that is longer."""
CRC_BYTES = 4
_MAX_METADATA_BYTES = 1 << 16
_LEVEL = 3
_AGAIN = "make the table again"


@dataclass(frozen=True)
class TableArray:
    """An int32 array, cut into chunks along its first axis."""

    name: str
    shape: tuple[int, ...]
    """[sequences, seq_len], or [sequences]: such an array is stored without compression."""
    chunk_rows: int

    @property
    def _chunk_shape(self) -> tuple[int, ...]:
        return (self.chunk_rows, *self.shape[1:])

    @property
    def _compressed(self) -> bool:
        return len(self.shape) > 1

    @property
    def chunk_bytes(self) -> int:
        """Of a decoded chunk."""
        return 4 * prod(self._chunk_shape)

    @property
    def max_stored(self) -> int:
        """Most bytes that a chunk takes on storage."""
        return CRC_BYTES + self.chunk_bytes + (self.chunk_bytes // 128 + 1024 if self._compressed else 0)

    @property
    def num_chunks(self) -> int:
        """Objects of the array beside its metadata."""
        return -(-self.shape[0] // self.chunk_rows)

    @property
    def metadata_key(self) -> str:
        """Object name of the metadata."""
        return f"{self.name}/zarr.json"

    def chunk_key(self, index: int) -> str:
        """Object name of a chunk."""
        return f"{self.name}/c/{index}" + "/0" * (len(self.shape) - 1)

    def metadata(self) -> dict[str, object]:
        """The array's `zarr.json`."""
        zstd = [{"name": "zstd", "configuration": {"level": _LEVEL, "checksum": False}}] if self._compressed else []
        codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, *zstd, {"name": "crc32c"}]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": "int32",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self._chunk_shape)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": codecs,
            "attributes": {},
            "dimension_names": ["sequence", "position"][: len(self.shape)],
        }

    def encode(self, values: NDArray[np.int32]) -> bytes:
        """A chunk as stored; the last one of an array is filled up with zeros."""
        chunk = np.zeros(self._chunk_shape, "<i4")
        chunk[: len(values)] = values
        payload = zstandard.ZstdCompressor(level=_LEVEL).compress(chunk.data) if self._compressed else chunk.tobytes()
        return payload + crc32c(payload).to_bytes(CRC_BYTES, "little")

    def decode(self, data: bytes, where: str) -> NDArray[np.int32]:
        """The chunk that `data` holds; `IntegrityError` if it is not what `encode` wrote."""
        payload = self.checked(data, where)
        try:
            if self._compressed:
                fits = zstandard.get_frame_parameters(payload).content_size == self.chunk_bytes
                payload = zstandard.ZstdDecompressor().decompress(payload, allow_extra_data=False) if fits else b""
        except zstandard.ZstdError as e:
            raise IntegrityError(f"{where} is damaged: {e}; {_AGAIN}") from e
        if len(payload) != self.chunk_bytes:
            raise IntegrityError(f"{where} is damaged: it is no chunk of {self.chunk_bytes} bytes; {_AGAIN}")
        return np.frombuffer(payload, "<i4").reshape(self._chunk_shape)

    def checked(self, data: bytes, where: str) -> bytes:
        """The payload of a stored chunk; `IntegrityError` if it does not have its checksum."""
        payload = data[:-CRC_BYTES]
        if crc32c(payload) != int.from_bytes(data[-CRC_BYTES:], "little") or len(data) < CRC_BYTES:
            raise IntegrityError(f"{where} is damaged: its checksum is another; {_AGAIN}")
        return payload


def open_array(storage: Storage, prefix: str, name: str, shape: tuple[int, ...]) -> TableArray:
    """The array as its metadata describes it; `TokensError` unless that is what `TableArray.metadata` says."""
    key = f"{prefix}{name}/zarr.json"
    where = f"{storage.url}: {key}"
    try:
        found = json.loads(storage.get(key, _MAX_METADATA_BYTES))
        rows = found["chunk_grid"]["configuration"]["chunk_shape"][0]
    except (ValueError, RecursionError, TypeError, LookupError) as e:
        raise TokensError(f"{where} is not the metadata of a zarr array; {_AGAIN}") from e
    array = TableArray(name, shape, rows if type(rows) is int else 0)
    if not 1 <= array.chunk_rows <= shape[0] or array.chunk_bytes > MAX_CHUNK_BYTES:
        raise TokensError(
            f"{where}: chunks have {rows!r:.40} sequences, expected 1 to {shape[0]} and no more than "
            f"{MAX_CHUNK_BYTES} bytes; {_AGAIN}"
        )
    expected = array.metadata()
    wrong = [f"{k} is {found.get(k)!r:.200}, expected {v!r}" for k, v in expected.items() if found.get(k) != v]
    wrong += [f"{k!r:.40} is unknown" for k in found.keys() - expected.keys()]
    if wrong:
        raise TokensError(f"{where}: {'; '.join(wrong)}; {_AGAIN}")
    return array
