"""The manifest: commit records, consolidated so that a finished store opens with one GET and no listing.

Records are consolidated in parts of `part_buckets` buckets, so that a large store is consolidated by many workers, each
in little memory, and an interrupted run goes on with the next part:

    manifest/<array>/<part>-<crc32c>.parquet   where the chunks of one array lie: columns `stored` and `crc32c`
    manifest/<part>-<stop bucket>.json         a part: digests of its buckets, names of its tables, exact statistics
    manifest.json                              the head: spec, names of all tables, merged statistics, fingerprint

A part exists when all its buckets are committed, and the head when all parts exist. A table's name holds its crc32c, so
it never changes, and a reader that has an old head finds the tables of that head. Everything here follows from the
commit records; without it the records say the same.
"""

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actstore.errors import IntegrityError, StoreError
from actstore.store.format import stats
from actstore.store.format.codec import crc32c, max_stored
from actstore.store.format.record import Chunks, CommitRecord, parse_crcs
from actstore.store.format.sealed import SEAL, UNSEALED, Sealed, decode, dump
from actstore.store.format.spec import ArraySpec, StoreSpec, WireSpec, arrays

MANIFEST = "manifest"
HEAD_KEY = "manifest.json"
TABLE_LIMIT = 1 << 24
"""Bytes of a table that a reader fetches."""
PART_CHUNKS, PART_BUCKETS = 1 << 18, 1 << 10
TABLE = re.compile(rf"{MANIFEST}/([^/]+)/([0-9]{{6,}})-[0-9a-f]{{8}}\.parquet")
_SCHEMA = pa.schema([pa.field(name, pa.uint32(), nullable=False) for name in ("stored", "crc32c")])


def part_buckets(spec: StoreSpec) -> int:
    """Buckets of a part: few enough that a worker holds the tables of all arrays."""
    return max(1, min(PART_BUCKETS, PART_CHUNKS // (spec.bucket_rows // spec.chunk_rows)))


def part_range(spec: StoreSpec, part: int) -> tuple[int, int]:
    """First bucket of a part, and the one after its last."""
    size = part_buckets(spec)
    return part * size, min((part + 1) * size, spec.buckets)


def num_parts(spec: StoreSpec) -> int:
    """Parts of the finished store."""
    return -(-spec.buckets // part_buckets(spec))


def part_key(spec: StoreSpec, part: int) -> str:
    """Object name of a part; another one if the store's last part has grown by an extension."""
    return f"{MANIFEST}/{part:06d}-{part_range(spec, part)[1]:08d}.json"


def table_key(array: str, part: int, crc: int) -> str:
    """Object name of a table."""
    return f"{MANIFEST}/{array}/{part:06d}-{crc:08x}.parquet"


def part_of(key: str) -> int | None:
    """The part that a table's name stands for; None for other names."""
    found = TABLE.fullmatch(key)
    return int(found[2]) if found else None


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consolidated buckets."""

    number: int
    digests: tuple[str, ...]
    """`CommitRecord.digest` of each bucket."""
    tables: dict[str, int]
    """crc32c of each array's table."""
    stored: dict[str, int]
    """Bytes of each array's chunks."""
    calibration: dict[str, int]
    stats: dict[str, stats.Exact]
    versions: dict[str, tuple[str, ...]]
    """Versions that computed the rows, by library."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """A finished store."""

    spec: StoreSpec
    tables: dict[str, tuple[int, ...]]
    """crc32c of each array's tables, one of each part."""
    stored: dict[str, int]
    calibration: dict[str, int]
    stats: dict[str, stats.Sums]
    versions: dict[str, tuple[str, ...]]
    fingerprint: str


class PartBuilder:
    """Adds up the commit records of a part, one at a time."""

    def __init__(self, spec: StoreSpec, number: int, buckets: NDArray[np.int64]) -> None:
        """`buckets` are those that will be added, ascending: all of the part, or what is committed of it."""
        self.spec, self.number, self.buckets = spec, number, buckets
        width = spec.bucket_rows // spec.chunk_rows
        self.tables = {n: np.zeros((2, len(buckets), width), np.uint32) for n in arrays(spec)}
        """Stored bytes and crc32c of every chunk, by array [2, buckets, chunks of a full bucket]."""
        self._digests = [""] * len(buckets)
        self._stats = {site: stats.Exact() for site in spec.sites}
        self._calibration: dict[str, int] | None = None
        self._versions: dict[str, set[str]] = {}

    def add(self, record: CommitRecord) -> None:
        """Add a bucket; `IntegrityError` if its `fixed` codes are in another calibration than those before."""
        row = int(np.searchsorted(self.buckets, record.bucket))
        for name, chunks in record.arrays.items():
            self.tables[name][0, row, : len(chunks.stored)] = chunks.stored
            self.tables[name][1, row, : len(chunks.crc32c)] = chunks.crc32c
        self._digests[row] = record.digest
        for site, sums in record.stats.items():
            self._stats[site].add(sums)
        self._calibration = same_calibration(self._calibration, record.calibration, f"bucket {record.bucket}")
        for library, version in record.versions.items():
            self._versions.setdefault(library, set()).add(version)

    def part(self, tables: dict[str, int]) -> Part:
        """The part, given the crc32c of its tables."""
        return Part(
            number=self.number,
            digests=tuple(self._digests),
            tables=tables,
            stored={name: int(t[0].sum(dtype=np.int64)) for name, t in self.tables.items()},
            calibration=self._calibration or {},
            stats=self._stats,
            versions={k: tuple(sorted(v)) for k, v in self._versions.items()},
        )

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Every array with the content of its table."""
        counts = self.spec.chunk_counts(self.buckets)
        return ((name, table_bytes(tables[0], tables[1], counts)) for name, tables in self.tables.items())


def same_calibration(known: dict[str, int] | None, found: dict[str, int], what: str) -> dict[str, int]:
    """`found`, or `IntegrityError` if it is not what is known already."""
    if known is not None and known != found:
        raise IntegrityError(f"{what}: its calibration {found} is not that of the other buckets, {known}")
    return found


def fingerprint(
    spec: StoreSpec, buckets: NDArray[np.int64], digests: Sequence[str], calibration: dict[str, int]
) -> str:
    """Hash of spec and content: equal content gives an equal fingerprint, in whatever order it was written."""
    h = hashlib.blake2b(dump(spec.to_json()), digest_size=16)
    h.update(buckets.astype("<i8").tobytes())
    h.update("".join(digests).encode())
    h.update(np.array([crc for _, crc in sorted(calibration.items())], "<u4").tobytes())
    return h.hexdigest()


class HeadBuilder:
    """Adds up parts, in their order, one at a time."""

    def __init__(self, spec: StoreSpec) -> None:
        """Nothing is added yet."""
        self._spec = spec
        self._tables = {name: list[int]() for name in arrays(spec)}
        self._stored = dict.fromkeys(self._tables, 0)
        self._stats = {site: stats.Exact() for site in spec.sites}
        self._calibration: dict[str, int] | None = None
        self._versions: dict[str, set[str]] = {}
        self._digests: list[str] = []

    def add(self, part: Part) -> None:
        """Add a part; `IntegrityError` if its `fixed` codes are in another calibration than those before."""
        for name, tables in self._tables.items():
            tables.append(part.tables.get(name, 0))
            self._stored[name] += part.stored[name]
        for site, exact in part.stats.items():
            self._stats[site].merge(exact)
        self._calibration = same_calibration(self._calibration, part.calibration, part_key(self._spec, part.number))
        for library, found in part.versions.items():
            self._versions.setdefault(library, set()).update(found)
        self._digests += part.digests

    def head(self, buckets: NDArray[np.int64]) -> Head:
        """The head of a store that has these buckets: all buckets of the parts that were added."""
        calibration = self._calibration or {}
        return Head(
            spec=self._spec,
            tables={name: tuple(crcs) for name, crcs in self._tables.items()},
            stored=self._stored,
            calibration=calibration,
            stats={site: exact.rounded() for site, exact in self._stats.items()} if self._digests else {},
            versions={k: tuple(sorted(v)) for k, v in self._versions.items()},
            fingerprint=fingerprint(self._spec, buckets, self._digests, calibration),
        )


def _hex(crcs: Sequence[int]) -> str:
    return "".join(f"{c:08x}" for c in crcs)


def part_bytes(part: Part) -> bytes:
    """The part's object."""
    return dump(
        {
            SEAL: UNSEALED,
            "digests": part.digests,
            "tables": {name: _hex([crc]) for name, crc in part.tables.items()},
            "stored": part.stored,
            "calibration": {site: _hex([crc]) for site, crc in part.calibration.items()},
            "stats": {site: stats.to_wire(s) for site, s in part.stats.items()},
            "versions": part.versions,
        }
    )


def head_bytes(head: Head) -> bytes:
    """The head's object."""
    return dump(
        {
            SEAL: UNSEALED,
            "spec": head.spec.to_json(),
            "tables": {name: _hex(crcs) for name, crcs in head.tables.items()},
            "stored": head.stored,
            "calibration": {site: _hex([crc]) for site, crc in head.calibration.items()},
            "stats": {site: stats.to_wire(s) for site, s in head.stats.items()},
            "versions": head.versions,
            "fingerprint": head.fingerprint,
        }
    )


Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]


class _WirePart(Sealed, frozen=True):
    digests: list[Digest]
    tables: dict[str, str]
    stored: dict[str, stats.Count]
    calibration: dict[str, str]
    stats: dict[str, stats.Wire]
    versions: dict[str, list[str]]


class _WireHead(Sealed, frozen=True):
    spec: WireSpec
    tables: dict[str, str]
    stored: dict[str, stats.Count]
    calibration: dict[str, str]
    stats: dict[str, stats.Wire]
    versions: dict[str, list[str]]
    fingerprint: Digest


def part_from_bytes(data: bytes, spec: StoreSpec, number: int, where: str) -> Part:
    """Parse and check a part's object against the spec; `StoreError` names what does not fit."""
    wire = decode(data, _WirePart, where)
    first, stop = part_range(spec, number)
    if len(wire.digests) != stop - first:
        raise StoreError(f"{where}: has {len(wire.digests)} buckets, expected {stop - first}")
    _check_names(wire, spec, where)
    rows = int(spec.bucket_sizes(np.arange(first, stop)).sum())
    return Part(
        number=number,
        digests=tuple(wire.digests),
        tables={name: int(parse_crcs(text, 1, where)[0]) for name, text in wire.tables.items()},
        stored=wire.stored,
        calibration=_calibration(wire.calibration, where),
        stats={n: _of_rows(stats.exact_from_wire(wire.stats[n], s.d, f"{where} {n}"), rows, where)
               for n, s in spec.sites.items()},
        versions={k: tuple(v) for k, v in wire.versions.items()},
    )  # fmt: skip


def head_from_bytes(data: bytes, where: str) -> Head:
    """Parse and check the head; `IntegrityError` if a byte changed, `StoreError` if it lies."""
    wire = decode(data, _WireHead, where)
    spec = wire.spec.spec(where)
    _check_names(wire, spec, where)
    rows, parts = spec.planned_rows, num_parts(spec)
    return Head(
        spec=spec,
        tables={n: tuple(parse_crcs(text, parts, where).tolist()) for n, text in wire.tables.items()},
        stored=wire.stored,
        calibration=_calibration(wire.calibration, where),
        stats={n: _of_rows(stats.sums_from_wire(wire.stats[n], s.d, f"{where} {n}"), rows, where)
               for n, s in spec.sites.items()},
        versions={k: tuple(v) for k, v in wire.versions.items()},
        fingerprint=wire.fingerprint,
    )  # fmt: skip


def _check_names(wire: _WirePart | _WireHead, spec: StoreSpec, where: str) -> None:
    fixed = {name for name, s in spec.sites.items() if s.kind == "fixed"}
    wanted = {"tables": set(arrays(spec)), "stored": set(arrays(spec)), "calibration": fixed, "stats": set(spec.sites)}
    for name, expected in wanted.items():
        if set(found := getattr(wire, name)) != expected:
            raise StoreError(
                f"{where}: {name} are of {str(sorted(found))[:200]}, expected {str(sorted(expected))[:200]}"
            )


def _calibration(wire: dict[str, str], where: str) -> dict[str, int]:
    return {site: int(parse_crcs(text, 1, where)[0]) for site, text in sorted(wire.items())}


def _of_rows(found: Any, rows: int, where: str) -> Any:
    if found.rows != rows:
        raise StoreError(f"{where}: statistics are of {found.rows} rows, expected {rows}")
    return found


def table_bytes(stored: NDArray[np.uint32], crcs: NDArray[np.uint32], counts: NDArray[np.int64]) -> bytes:
    """A table: `stored` and `crc32c` [buckets, chunks of a full bucket], of which each bucket has `counts`.

    Plain and uncompressed: half of the numbers are checksums, which do not compress, and a reader knows the size.
    """
    there = np.arange(stored.shape[1])[None, :] < counts[:, None]
    out = io.BytesIO()
    table = pa.table([pa.array(stored[there]), pa.array(crcs[there])], schema=_SCHEMA)
    pq.write_table(
        table, out, row_group_size=max(1, len(table)), compression="none", use_dictionary=False, store_schema=False
    )
    return out.getvalue()


def table_from_bytes(
    data: bytes, crc: int, array: ArraySpec, counts: NDArray[np.int64], width: int, where: str
) -> Chunks:
    """Both columns, as [buckets, width], zero where a bucket has fewer chunks than that.

    Raises `IntegrityError` if a byte changed, `StoreError` if it is no table of these buckets.
    """
    if crc32c(data) != crc:
        raise IntegrityError(f"{where}: has crc32c {crc32c(data):08x}, its name says {crc:08x}; it is damaged")
    rows = int(counts.sum())
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        about = file.metadata
        columns = [about.row_group(i).column(j) for i in range(about.num_row_groups) for j in range(about.num_columns)]
        if about.num_rows != rows or any(c.compression != "UNCOMPRESSED" or c.num_values > rows for c in columns):
            raise ValueError(f"has {about.num_rows} rows, expected {rows}, uncompressed")
        if file.schema_arrow.remove_metadata() != _SCHEMA or 8 * rows > len(data):
            raise ValueError(f"is of {file.schema_arrow} in {len(data)} bytes, expected {_SCHEMA}")
        flat = [column.to_numpy() for column in file.read(use_threads=False).columns]
    except (ValueError, OSError, pa.ArrowException) as e:
        raise StoreError(f"{where}: not a table of this store ({str(e)[:200]})") from e
    if rows and not 0 < flat[0].min() <= flat[0].max() <= max_stored(array.chunk_bytes):
        raise StoreError(f"{where}: stored bytes of a chunk are {flat[0].min()} to {flat[0].max()}, which can't be")
    there = np.arange(width)[None, :] < counts[:, None]
    out = np.zeros((2, len(counts), width), np.uint32)
    out[0][there], out[1][there] = flat
    return Chunks(stored=out[0], crc32c=out[1])
