"""How much a file may decode to, and what its headers claim: read before pyarrow decodes a parquet or arrow file.

A file may claim some memory for nothing, and beyond that only in proportion to the bytes that it has.

pyarrow takes a header's word: a page or buffer of a few kB may claim, and zstd may fill, gigabytes. It also ends the
process (26.0.1) when it is asked about a column whose size statistics are damaged, so footers are read here. Formats:
apache/parquet-format, `parquet.thrift` (compact protocol); apache/arrow, `format/Message.fbs` (flatbuffers).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

DAMAGED = (pa.ArrowException, ValueError, LookupError, TypeError, OverflowError, MemoryError, OSError)
"""What reading a damaged file raises, here and in pyarrow."""
MAX_DOCUMENT_BYTES = 1 << 27
"""Of one document, which is encoded whole."""
_FREE_BYTES, _RATIO = 1 << 26, 256
_FREE_DOCUMENT_BYTES, _DOCUMENT_RATIO = 1 << 24, 64
_HEADER_BYTES, _MAX_HEADER_BYTES = 1 << 10, 1 << 24
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3


def decoded_limit(stored: int) -> int:
    """Most bytes that a part of a file of `stored` bytes may decode to at once."""
    return _FREE_BYTES + _RATIO * stored


def document_limit(stored: int) -> int:
    """Most bytes of a document in a compressed file of `stored` bytes; text hardly ever compresses to a 64th."""
    return min(MAX_DOCUMENT_BYTES, _FREE_DOCUMENT_BYTES + _DOCUMENT_RATIO * stored)


@dataclass
class GroupClaims:
    """What a row group decodes to, in bytes, of the columns that are read."""

    rows: int
    largest: int = 0
    """The largest page."""
    items: int = 0
    """All items of lists, 8 bytes each; one list may hold them all."""
    total: int = 0
    """All pages."""


def group_claims(raw: IO[bytes], file: pq.ParquetFile, columns: list[str], stored: int) -> Iterator[GroupClaims]:
    """What the pages of these columns claim, for each row group of `file`, which is `raw`, of `stored` bytes.

    One of `DAMAGED` for headers that make no sense, and for a page or list that claims more than `decoded_limit`.
    """
    length = int.from_bytes(_read(raw, stored - 8, 4), "little")
    footer, _ = _thrift(_read(raw, stored - 8 - length, length), 0)
    for group in footer.get(4, []):
        claims = GroupClaims(group[3])
        for i, column in enumerate(c[3] for c in group[1]):
            name = b".".join(column[3]).decode()
            if column[5] and any(f"{name}.".startswith(f"{c}.") for c in columns):
                lists = file.schema.column(i).max_repetition_level > 0
                at = min(column[9], column.get(11) or column[9])
                stop = at + column[7]
                if not 0 <= at <= stop <= stored:
                    raise ValueError(f"column {name} lies outside the file")
                while at < stop:
                    header, at = _page_header(raw, at)
                    if min(header[2], header[3]) < 0:
                        raise ValueError(f"a page of column {name} has a negative size")
                    claims.largest = max(claims.largest, header[2])
                    claims.total += header[2]
                    claims.items += 8 * (header.get(5) or header.get(8) or {1: 0})[1] * lists
                    at += header[3]
        _check(max(claims.largest, claims.items), stored)
        yield claims


def check_messages(raw: IO[bytes], stored: int) -> None:
    """Check that no message of an arrow stream of `stored` bytes decodes to more than `decoded_limit`; `DAMAGED`."""
    try:
        while raw.tell() < stored:
            message = pa.ipc.read_message(raw)
            _check(_unpacked(message.metadata.to_pybytes(), message.body), stored)
    except EOFError:
        return
    except struct.error as e:
        raise ValueError(f"a message's header makes no sense: {e}") from e


def _check(claimed: int, stored: int) -> None:
    if claimed > decoded_limit(stored):
        raise ValueError(
            f"a part of it claims {claimed} bytes, expected at most {decoded_limit(stored)} in a file of {stored}; "
            "if that is right, write the file again with less compression"
        )


def _read(raw: IO[bytes], at: int, size: int) -> bytes:
    if at < 0:
        raise ValueError("a header points before the file")
    raw.seek(at)
    return raw.read(size)


def _page_header(raw: IO[bytes], at: int) -> tuple[dict[int, Any], int]:
    """The header of the page at `at`, and where it ends."""
    try:
        header, length = _thrift(_read(raw, at, _HEADER_BYTES), 0)
    except IndexError:  # it holds long statistics
        header, length = _thrift(_read(raw, at, _MAX_HEADER_BYTES), 0)
    return header, at + length


def _thrift(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """A struct of thrift's compact protocol by field number, and its end; `IndexError` if `data` ends before."""

    def number() -> int:
        nonlocal at
        value = shift = 0
        while (byte := data[at]) & 128 and shift < 56:
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        at += 1
        return value | byte << shift

    def read(kind: int) -> Any:
        nonlocal at
        if kind in (1, 2):
            return kind == 1
        if kind in (4, 5, 6):
            value = number()
            return value >> 1 ^ -(value & 1)
        if kind == 9:
            at += 1
            inner, count = data[at - 1] & 15, data[at - 1] >> 4
            count = number() if count == 15 else count
            return [read(3 if inner in (1, 2) else inner) for _ in range(count)]
        if kind == 12:
            found, at = _thrift(data, at)
            return found
        size = {3: 1, 7: 8}.get(kind) or number()
        at += size
        if at > len(data):
            raise IndexError("metadata ends early")
        return data[at - size : at]

    fields: dict[int, Any] = {}
    last = 0
    while byte := data[at]:
        at, last, kind = at + 1, last + (byte >> 4), byte & 15
        if byte < 16 or kind not in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12):
            raise ValueError(f"metadata has byte {byte} where a field begins")
        fields[last] = read(kind)
    return fields, at + 1


def _unpacked(message: bytes, body: pa.Buffer) -> int:
    """Bytes that the buffers of a record or dictionary batch claim to unpack to; 0 if they are not compressed."""

    def number(code: str, at: int) -> int:
        return struct.unpack_from(f"<{code}", message, at)[0]

    def field(table: int, index: int) -> int:
        vtable = table - number("i", table)
        offset = number("H", vtable + 4 + 2 * index) if 4 + 2 * index < number("H", vtable) else 0
        return table + offset if offset else 0

    def follow(at: int) -> int:
        return at + number("I", at)

    root = follow(0)
    kind = number("b", field(root, 1)) if field(root, 1) else 0
    if kind not in (_DICTIONARY_BATCH, _RECORD_BATCH):
        return 0
    batch = follow(field(root, 2))
    if kind == _DICTIONARY_BATCH:
        batch = follow(field(batch, 1))
    if not field(batch, 3) or not field(batch, 2):
        return 0
    buffers = follow(field(batch, 2))
    claimed = 0
    for i in range(number("I", buffers)):
        offset, length = struct.unpack_from("<qq", message, buffers + 4 + 16 * i)
        if length:
            claimed += max(int.from_bytes(body[offset : offset + 8].to_pybytes(), "little", signed=True), 0)
    return claimed
