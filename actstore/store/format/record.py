"""The commit record: the small JSON object that makes a bucket exist.

`commits/<bucket>.json` is in one of two states. While an attempt writes the bucket it is an intent: the attempt's id
and nothing else. A bucket exists when it is `committed`: it then says how long every chunk is (so that no reader needs
a shard's index), what its crc32c is (so that an intact chunk in the wrong place is found), and the statistics. Only
compare-and-swap moves it from one to the other, so whoever has taken the intent over has ended the attempt before
(`docs/decisions/0005-commit.md`).

Like all metadata it is read as untrusted: numbers that contradict the store's spec raise `StoreError`.
"""

import re
from dataclasses import dataclass
from typing import Any

from actstore.errors import StoreError
from actstore.store.format import stats
from actstore.store.format.codec import max_stored
from actstore.store.format.shard import index_bytes
from actstore.store.format.spec import FORMAT_VERSION, SEAL, UNSEALED, ArraySpec, StoreSpec, arrays, dump, load_sealed

COMMITS = "commits"
WRITING, COMMITTED = "writing", "committed"
MAX_ATTEMPT = 64
"""Characters of an attempt's id."""
_HEX = re.compile(r"[0-9a-f]*")
_INTENT_FIELDS = {"format_version", SEAL, "bucket", "attempt", "state"}
_FIELDS = _INTENT_FIELDS | {"rows", "shards", "calibration", "stats"}


def commit_key(bucket: int) -> str:
    """Object name of a bucket's commit record."""
    return f"{COMMITS}/{bucket:08d}.json"


def bucket_of(key: str, spec: StoreSpec) -> int | None:
    """The bucket that a commit record's name stands for; `StoreError` for other names.

    None beyond the rows, where attempts leave intents that died before an open-ended store got its number of rows.
    """
    stem = key.removeprefix(f"{COMMITS}/").removesuffix(".json")
    if not (stem.isascii() and stem.isdigit()) or commit_key(int(stem)) != key:
        raise StoreError(f"{key}: not the name of a commit record")
    return int(stem) if int(stem) < spec.buckets else None


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One stored shard."""

    chunks: tuple[int, ...]
    """Stored bytes of each chunk, in place order from offset 0; places beyond are absent."""
    crc32c: tuple[int, ...]
    """Of each chunk: what its last four bytes say."""


@dataclass(frozen=True, kw_only=True)
class Intent:
    """A bucket that an attempt is writing, or was writing when it died."""

    bucket: int
    attempt: str


@dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """One committed bucket."""

    bucket: int
    attempt: str
    """Random id of the attempt that committed."""
    rows: int
    shards: dict[str, tuple[ShardRecord, ...]]
    """Per array, its shards of this bucket in order."""
    calibration: dict[str, int]
    """Per `fixed` site, crc32c of the calibration object that its codes are in."""
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


def _head(state: str, bucket: int, attempt: str) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, SEAL: UNSEALED, "state": state, "bucket": bucket, "attempt": attempt}


def intent_bytes(bucket: int, attempt: str) -> bytes:
    """The object's content while `attempt` writes the bucket."""
    return dump(_head(WRITING, bucket, attempt))


def to_bytes(record: CommitRecord) -> bytes:
    """The object's content."""
    return dump(
        {
            **_head(COMMITTED, record.bucket, record.attempt),
            "rows": record.rows,
            "shards": {
                name: [{"crc32c": "".join(f"{c:08x}" for c in s.crc32c), "chunks": list(s.chunks)} for s in shards]
                for name, shards in record.shards.items()
            },
            "calibration": {site: f"{crc:08x}" for site, crc in record.calibration.items()},
            "stats": {site: stats.to_json(s) for site, s in record.stats.items()},
        }
    )


def from_bytes(data: bytes, spec: StoreSpec, bucket: int) -> CommitRecord | Intent:
    """Parse and check the object against the spec; `StoreError` names it and what is wrong."""
    where = commit_key(bucket)
    parsed = load_sealed(data, where)
    state = parsed.get("state") if isinstance(parsed, dict) else None
    if not isinstance(parsed, dict) or state not in (WRITING, COMMITTED):
        raise StoreError(f"{where}: not a commit record")
    if set(parsed) != (_FIELDS if state == COMMITTED else _INTENT_FIELDS):
        raise StoreError(f"{where}: fields are {sorted(parsed)}, expected {sorted(_FIELDS)}")
    first, stop = spec.bucket_range(bucket)
    expected = {
        "format_version": FORMAT_VERSION,
        "bucket": bucket,
        **({"rows": stop - first} if "rows" in parsed else {}),
    }
    for name, value in expected.items():
        if type(parsed[name]) is not int or parsed[name] != value:
            raise StoreError(f"{where}: {name} is {parsed[name]!r}, expected {value}")
    if not is_attempt(parsed["attempt"]):
        raise StoreError(f"{where}: attempt is {parsed['attempt']!r}, expected a short id")
    if state == WRITING:
        return Intent(bucket=bucket, attempt=parsed["attempt"])
    fixed = {name for name, s in spec.sites.items() if s.kind == "fixed"}
    _expect_names(parsed["shards"], set(arrays(spec)), f"{where}: shards")
    _expect_names(parsed["calibration"], fixed, f"{where}: calibration")
    _expect_names(parsed["stats"], set(spec.sites), f"{where}: statistics")
    sums = {name: stats.from_json(parsed["stats"][name], s.d, f"{where} {name}") for name, s in spec.sites.items()}
    for name, s in sums.items():
        if s.rows != stop - first:
            raise StoreError(f"{where} {name}: statistics are of {s.rows} rows, expected {stop - first}")
    return CommitRecord(
        bucket=bucket,
        attempt=parsed["attempt"],
        rows=stop - first,
        shards={a.name: _shards(parsed["shards"], a, stop - first, where) for a in arrays(spec).values()},
        calibration={name: parse_crcs(parsed["calibration"][name], 1, where)[0] for name in sorted(fixed)},
        stats=sums,
    )


def is_attempt(text: object) -> bool:
    """Whether it can be the id of an attempt: a few printable ASCII characters."""
    return isinstance(text, str) and 0 < len(text) <= MAX_ATTEMPT and text.isascii() and text.isprintable()


def _expect_names(found: Any, expected: set[str], what: str) -> None:
    if not isinstance(found, dict) or set(found) != expected:
        names = sorted(found) if isinstance(found, dict) else found
        raise StoreError(f"{what} are of {str(names)[:200]}, expected {sorted(expected)}")


def parse_crcs(text: Any, count: int, where: str) -> tuple[int, ...]:
    """`count` crc32c, 8 hexadecimal digits each."""
    if not isinstance(text, str) or not _HEX.fullmatch(text) or len(text) != 8 * count:
        raise StoreError(f"{where}: crc32c is {str(text)[:60]!r}, expected {8 * count} hexadecimal digits")
    return tuple(int(text[i : i + 8], 16) for i in range(0, len(text), 8))


def _shards(data: Any, array: ArraySpec, rows: int, where: str) -> tuple[ShardRecord, ...]:
    counts = chunk_counts(array, rows)
    most = max_stored(array.chunk_bytes)
    try:
        found = data[array.name]
        if len(found) != len(counts):
            raise ValueError(f"{len(found)} shards, expected {len(counts)}")
        result: list[ShardRecord] = []
        for entry, count in zip(found, counts, strict=True):
            if set(entry) != {"crc32c", "chunks"} or not isinstance(entry["chunks"], list):
                raise ValueError(f"a shard has fields {str(entry)[:60]}")
            chunks = tuple(entry["chunks"])
            if len(chunks) != count or not all(type(c) is int and 0 < c <= most for c in chunks):
                raise ValueError(f"chunk lengths are {str(chunks)[:60]}, expected {count} from 1 to {most}")
            result.append(ShardRecord(chunks=chunks, crc32c=parse_crcs(entry["crc32c"], count, where)))
        return tuple(result)
    except (TypeError, KeyError, ValueError) as e:
        raise StoreError(f"{where}: shards of {array.name} are malformed ({e})") from e
