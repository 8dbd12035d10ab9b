"""What a parquet file says of itself, read in Python, before pyarrow is trusted with it.

A footer can lie about its pages, a page can unpack to a million times its size, and pyarrow ends the process when it is
asked about some malformed columns. So sizes are taken from the headers of all pages here. Only what pyarrow writes for
the manifest is taken: plain or dictionary pages of columns without encryption. Format: apache/parquet-format,
`parquet.thrift`, in thrift's compact protocol.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any


def page_sizes(data: bytes) -> tuple[int, Counter[str], Counter[str]]:
    """Rows of the file; values, and bytes when unpacked, by column. Malformed files raise ValueError or IndexError."""
    footer, _ = _thrift(data, len(data) - 8 - int.from_bytes(data[-8:-4], "little"))
    values, unpacked = Counter[str](), Counter[str]()
    for column in (c[3] for group in footer[4] for c in group[1]):
        name = b".".join(column[3]).decode()
        for count, size in _pages(data, column, name):
            values[name] += count
            unpacked[name] += size
    return footer[3], values, unpacked


def _pages(data: bytes, column: dict[int, Any], name: str) -> Iterator[tuple[int, int]]:
    """Values and unpacked bytes of each page of a column, as its header says: the footer can say anything of them.

    Values of a dictionary are not counted; they take at least 4 bytes each.
    """
    at = min(column[9], column.get(11) or column[9])
    stop = at + column[7]
    if not 0 < at <= stop <= len(data):
        raise ValueError(f"column {name} lies outside the file")
    while at < stop:
        header, at = _thrift(data, at)
        about = header[{0: 5, 2: 7, 3: 8}[header[1]]]  # data, dictionary, data of version 2
        if about[4 if header[1] == 3 else 2] not in (0, 2, 8):
            raise ValueError(f"column {name} is neither plain nor a dictionary")
        if min(about[1], header[2], header[3]) < 0:
            raise ValueError(f"column {name} has a page of negative size")
        yield 0 if header[1] == 2 else about[1], header[2]  # a dictionary has no rows of its own
        at += header[3]


def _thrift(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """A struct of thrift's compact protocol, which parquet's metadata is in, by field number; and its end."""

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
            value = value >> 1 ^ -(value & 1)
            if not -(1 << 31) <= value < 1 << 31 and kind == 5:
                raise ValueError(f"its metadata has {value} in 32 bits")
            return value
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
            raise IndexError("its metadata ends early")
        return data[at - size : at]

    fields: dict[int, Any] = {}
    last = 0
    while byte := data[at]:
        at, last, kind = at + 1, last + (byte >> 4), byte & 15
        if byte < 16 or kind not in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12):
            raise ValueError(f"its metadata has byte {byte} where a field begins")
        fields[last] = read(kind)
    return fields, at + 1
