"""The commit record: the small JSON object whose existence makes a bucket exist.

`commits/<bucket>.json` is created once, by conditional put, after all shards of the bucket are stored. It says how
long every chunk is (so that no reader needs a shard's index), the crc32c of every object, and the statistics. Like
all metadata it is read as untrusted: numbers that contradict the store's spec raise `StoreError`.
"""

from dataclasses import dataclass
from typing import Any

from actstore.errors import StoreError
from actstore.store import stats
from actstore.store.shard import index_bytes
from actstore.store.spec import FORMAT_VERSION, SEAL, UNSEALED, ArraySpec, StoreSpec, arrays, dump, load_sealed

MAX_CHUNK_BYTES = (1 << 32) - 1
FIELDS = {"format_version", SEAL, "bucket", "attempt", "rows", "shards", "stats"}


def commit_key(bucket: int) -> str:
    """Object name of a bucket's commit record."""
    return f"commits/{bucket:08d}.json"


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One stored shard."""

    crc32c: int
    """Of the whole object."""
    chunks: tuple[int, ...]
    """Stored bytes of each chunk, in place order from offset 0; places beyond are absent."""


@dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """One committed bucket."""

    bucket: int
    attempt: str
    """Random id of the attempt that committed."""
    rows: int
    shards: dict[str, tuple[ShardRecord, ...]]
    """Per array, its shards of this bucket in order."""
    stats: dict[str, stats.Sums]
    """Per site."""

    def stored_bytes(self, spec: StoreSpec) -> int:
        """Bytes of all shards, indexes included."""
        return sum(
            sum(s.chunks) + index_bytes(a.chunks_per_shard) for a in arrays(spec).values() for s in self.shards[a.name]
        )


def shard_count(array: ArraySpec, rows: int) -> int:
    """Shards that a bucket of so many rows has in this array."""
    return -(-rows // array.shard_rows)


def chunk_counts(array: ArraySpec, rows: int) -> list[int]:
    """Chunks present in each of the shards of a bucket of so many rows."""
    chunks = -(-rows // array.chunk_rows)
    return [min(array.chunks_per_shard, chunks - i * array.chunks_per_shard) for i in range(shard_count(array, rows))]


def to_bytes(record: CommitRecord) -> bytes:
    """The object's content."""
    return dump(
        {
            "format_version": FORMAT_VERSION,
            SEAL: UNSEALED,
            "bucket": record.bucket,
            "attempt": record.attempt,
            "rows": record.rows,
            "shards": {
                name: [{"crc32c": f"{s.crc32c:08x}", "chunks": list(s.chunks)} for s in shards]
                for name, shards in record.shards.items()
            },
            "stats": {site: stats.to_json(s) for site, s in record.stats.items()},
        }
    )


def from_bytes(data: bytes, spec: StoreSpec, bucket: int) -> CommitRecord:
    """Parse and check a record against the spec; `StoreError` names the object and what is wrong."""
    where = commit_key(bucket)
    parsed = load_sealed(data, where)
    if not isinstance(parsed, dict) or set(parsed) != FIELDS:
        raise StoreError(f"{where}: not a commit record")
    first, stop = spec.bucket_range(bucket)
    expected = {"format_version": FORMAT_VERSION, "bucket": bucket, "rows": stop - first}
    for name, value in expected.items():
        if parsed[name] != value:
            raise StoreError(f"{where}: {name} is {parsed[name]!r}, expected {value}")
    if not isinstance(parsed["attempt"], str) or not 0 < len(parsed["attempt"]) <= 64:
        raise StoreError(f"{where}: attempt is {parsed['attempt']!r}, expected a short id")
    shards = {a.name: _shards(parsed["shards"], a, stop - first, where) for a in arrays(spec).values()}
    if not isinstance(parsed["stats"], dict) or set(parsed["stats"]) != set(spec.sites):
        raise StoreError(f"{where}: statistics are not those of sites {sorted(spec.sites)}")
    sums = {name: stats.from_json(parsed["stats"][name], s.d, f"{where} {name}") for name, s in spec.sites.items()}
    return CommitRecord(bucket=bucket, attempt=parsed["attempt"], rows=stop - first, shards=shards, stats=sums)


def _shards(data: Any, array: ArraySpec, rows: int, where: str) -> tuple[ShardRecord, ...]:
    counts = chunk_counts(array, rows)
    try:
        found = data[array.name]
        if len(found) != len(counts):
            raise ValueError(f"{len(found)} shards, expected {len(counts)}")
        result: list[ShardRecord] = []
        for entry, count in zip(found, counts, strict=True):
            chunks = tuple(entry["chunks"])
            if len(chunks) != count or not all(type(c) is int and 0 < c <= MAX_CHUNK_BYTES for c in chunks):
                raise ValueError(f"chunk lengths are {str(chunks)[:60]}, expected {count} positive numbers")
            result.append(ShardRecord(crc32c=int(entry["crc32c"], 16), chunks=chunks))
        return tuple(result)
    except (TypeError, KeyError, ValueError) as e:
        raise StoreError(f"{where}: shards of {array.name} are malformed ({e})") from e
