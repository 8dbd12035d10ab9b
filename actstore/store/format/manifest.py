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
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actstore.errors import IntegrityError, StoreError, brief
from actstore.store.format import stats
from actstore.store.format.codec import Crc, crc32c, max_stored
from actstore.store.format.record import Chunks, CommitRecord
from actstore.store.format.sealed import Crcs, Sealed, decode, dump
from actstore.store.format.spec import OPEN_ENDED, ArraySpec, StoreSpec, WireSpec, arrays

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


Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]


class _Consolidated(Sealed, frozen=True, eq=False):
    """What parts and the head say of their buckets."""

    stored: dict[str, stats.Count]
    """Bytes of each array's chunks."""
    calibration: dict[str, Crc]
    """Per `fixed` site, crc32c of its calibration."""
    stats: dict[str, stats.Sums]
    """Per site; exact in a part, rounded in the head."""
    versions: dict[str, tuple[str, ...]]
    """Versions that computed the rows, by library."""


class Part(_Consolidated, frozen=True, eq=False):
    """Consolidated buckets."""

    digests: tuple[Digest, ...]
    """`CommitRecord.digest` of each bucket."""
    tables: dict[str, Crc]
    """crc32c of each array's table."""


class Head(_Consolidated, frozen=True, eq=False, dict=True):
    """A finished store."""

    attribute: WireSpec = msgspec.field(name="spec")
    tables: dict[str, Crcs]
    """crc32c of each array's tables, one of each part."""
    fingerprint: Digest

    @cached_property
    def spec(self) -> StoreSpec:
        """The store's spec."""
        return self.attribute.spec(HEAD_KEY)


class _Builder:
    """Adds up parts, of which a commit record is the smallest."""

    def __init__(self, spec: StoreSpec) -> None:
        self.spec = spec
        self._digests: list[str] = []
        self._stored = dict.fromkeys(arrays(spec), 0)
        self._calibration: dict[str, Crc] | None = None
        self._stats = {site: stats.none(s.d) for site, s in spec.sites.items()}
        self._versions: dict[str, set[str]] = {}

    def _add(self, part: Part, what: str) -> None:
        if self._calibration not in (None, part.calibration):
            raise IntegrityError(
                f"{what}: its calibration {part.calibration} is not that of the other buckets, {self._calibration}"
            )
        self._calibration = part.calibration
        self._digests += part.digests
        for name, size in part.stored.items():
            self._stored[name] += size
        for site, sums in part.stats.items():
            self._stats[site] = stats.merge(self._stats[site], sums, self.spec.sites[site].d)
        for library, versions in part.versions.items():
            self._versions.setdefault(library, set()).update(versions)

    def part(self, tables: Mapping[str, int]) -> Part:
        """All that was added as one part, given the crc32c of its tables."""
        return Part(
            digests=tuple(self._digests),
            tables={name: Crc(crc) for name, crc in tables.items()},
            stored=self._stored,
            calibration=self._calibration or {},
            stats=self._stats,
            versions={library: tuple(sorted(versions)) for library, versions in self._versions.items()},
        )


class PartBuilder(_Builder):
    """Adds up the commit records of a part, one at a time."""

    def __init__(self, spec: StoreSpec, number: int, buckets: NDArray[np.int64]) -> None:
        """`buckets` are those that will be added, ascending: all of part `number`, or what is committed of it."""
        super().__init__(spec)
        self.number, self.buckets = number, buckets
        width = spec.bucket_rows // spec.chunk_rows
        self.tables = {n: np.zeros((2, len(buckets), width), np.uint32) for n in arrays(spec)}
        """Stored bytes and crc32c of every chunk, by array [2, buckets, chunks of a full bucket]."""

    def add(self, record: CommitRecord) -> None:
        """Add the next bucket; `IntegrityError` if its `fixed` codes are in another calibration than those before."""
        for name, chunks in record.arrays.items():
            for table, values in zip(self.tables[name], (chunks.stored, chunks.crc32c), strict=True):
                table[len(self._digests), : len(values)] = values
        bucket = Part(
            digests=(record.digest,),
            tables={},
            stored={name: int(chunks.stored.sum(dtype=np.int64)) for name, chunks in record.arrays.items()},
            calibration=record.calibration,
            stats=record.stats,
            versions={library: (version,) for library, version in record.versions.items()},
        )
        self._add(bucket, f"bucket {record.bucket}")

    def chunks(self, array: ArraySpec) -> Chunks:
        """The chunks of an array [buckets, chunks of a full bucket]."""
        return Chunks(stored=self.tables[array.name][0], crc32c=self.tables[array.name][1])

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Every array with the content of its table."""
        counts = self.spec.chunk_counts(self.buckets)
        return ((name, table_bytes(tables[0], tables[1], counts)) for name, tables in self.tables.items())


class HeadBuilder(_Builder):
    """Adds up parts, in their order, one at a time."""

    def __init__(self, spec: StoreSpec) -> None:
        """Nothing is added yet."""
        super().__init__(spec)
        self._tables = {name: list[int]() for name in arrays(spec)}

    def add(self, part: Part) -> None:
        """Add a part; `IntegrityError` if its `fixed` codes are in another calibration than those before."""
        self._add(part, f"the part of the manifest behind {len(self._digests)} buckets")
        for name, tables in self._tables.items():
            tables.append(part.tables.get(name, 0))

    def head(self, buckets: NDArray[np.int64]) -> Head:
        """The head of a store that has these buckets: all buckets of the parts that were added."""
        whole, sites = self.part({}), self.spec.sites if self._digests else {}
        return Head(
            attribute=msgspec.convert(self.spec.to_json(), WireSpec),
            tables={name: np.array(crcs, np.uint32) for name, crcs in self._tables.items()},
            stored=whole.stored,
            calibration=whole.calibration,
            stats={name: stats.rounded(whole.stats[name], site.d) for name, site in sites.items()},
            versions=whole.versions,
            fingerprint=fingerprint(self.spec, buckets, whole.digests, whole.calibration),
        )


def fingerprint(
    spec: StoreSpec, buckets: NDArray[np.int64], digests: Sequence[str], calibration: dict[str, Crc]
) -> str:
    """Hash of spec and content: equal content gives an equal fingerprint, in whatever order it was written."""
    h = hashlib.blake2b(dump(spec.to_json()), digest_size=16)
    h.update(buckets.astype("<i8").tobytes())
    h.update("".join(digests).encode())
    h.update(np.array([crc for _, crc in sorted(calibration.items())], "<u4").tobytes())
    return h.hexdigest()


part_bytes = head_bytes = dump
"""A part's, and the head's object."""


def part_from_bytes(data: bytes, spec: StoreSpec, number: int, where: str) -> Part:
    """Parse and check a part's object against the spec; `StoreError` names what does not fit."""
    found = decode(data, Part, where)
    first, stop = part_range(spec, number)
    if len(found.digests) != stop - first:
        raise StoreError(f"{where}: has {len(found.digests)} buckets, expected {stop - first}")
    _check(found, spec, int(spec.bucket_sizes(np.arange(first, stop)).sum()), stats.MAX_PARTS, where)
    return found


def head_from_bytes(data: bytes, where: str) -> Head:
    """Parse and check the head; `IntegrityError` if a byte changed, `StoreError` if it lies."""
    found = decode(data, Head, where)
    spec = found.spec
    if spec.rows == OPEN_ENDED:
        raise StoreError(f"{where}: the store is open-ended, so it can't be finished; delete the object")
    _check(found, spec, spec.planned_rows, 1, where)
    for name, crcs in found.tables.items():
        if len(crcs) != num_parts(spec):
            raise StoreError(f"{where}: tables of {name} are {len(crcs)} crc32c, expected {num_parts(spec)}")
    return found


def _check(found: Part | Head, spec: StoreSpec, rows: int, vectors: int, where: str) -> None:
    names, sites = set(arrays(spec)), set(spec.sites)
    for field, expected in (("tables", names), ("stored", names), ("calibration", spec.fixed_sites), ("stats", sites)):
        if set(known := getattr(found, field)) != expected:
            raise StoreError(
                f"{where}: {field} are of {str(sorted(known))[:200]}, expected {str(sorted(expected))[:200]}"
            )
    for name, site in spec.sites.items():
        stats.check(found.stats[name], rows, site.d, f"{where} {name}", parts=vectors)


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
        raise StoreError(f"{where}: not a table of this store ({brief(e)})") from e
    if rows and not 0 < flat[0].min() <= flat[0].max() <= max_stored(array.chunk_bytes):
        raise StoreError(f"{where}: stored bytes of a chunk are {flat[0].min()} to {flat[0].max()}, which can't be")
    there = np.arange(width)[None, :] < counts[:, None]
    out = np.zeros((2, len(counts), width), np.uint32)
    out[0][there], out[1][there] = flat
    return Chunks(stored=out[0], crc32c=out[1])
