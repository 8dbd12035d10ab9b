"""The commit object: the small JSON object that makes a bucket exist.

`commits/<bucket>.json` is in one of two states. While an attempt writes the bucket it is an intent, which holds the
attempt's id and nothing else. A bucket exists when the object is a commit record, which says how long every chunk is
(so that no reader needs a shard's index), what its crc32c is (so that an intact chunk in the wrong place is found), and
the statistics. Only a compare-and-swap replaces one by the other (`docs/decisions/0005-commit.md`).

An intent has at most `INTENT_BYTES`, a record has more. So a listing, which gives sizes, tells which buckets exist.
Like all metadata the object is read as untrusted: numbers that contradict the store's spec raise `StoreError`.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from actstore.errors import StoreError
from actstore.store.format import stats
from actstore.store.format.codec import max_stored
from actstore.store.format.sealed import SEAL, UNSEALED, Sealed, decode, dump
from actstore.store.format.shard import MARK_BYTES, tail_bytes
from actstore.store.format.spec import FORMAT_VERSION, ArraySpec, StoreSpec, arrays

COMMITS = "commits"
INTENT_BYTES = 256
_ATTEMPT = re.compile(r"[!-~]{16}")
_HEX = re.compile(r"[0-9a-f]*")
_MAX_VERSIONS = 16


def commit_key(bucket: int) -> str:
    """Object name of a bucket's commit object."""
    return f"{COMMITS}/{bucket:08d}.json"


def bucket_of(key: str) -> int | None:
    """The bucket that a commit object's name stands for; None for other names."""
    stem = key.removeprefix(f"{COMMITS}/").removesuffix(".json")
    number = int(stem) if stem.isascii() and stem.isdigit() and len(stem) <= 18 else -1
    return number if number >= 0 and commit_key(number) == key else None


def committed_buckets(sizes: Mapping[str, int], spec: StoreSpec) -> NDArray[np.int64]:
    """Buckets that exist, ascending, given the sizes of the objects below `commits`; `StoreError` for a strange name.

    Commit objects beyond the rows are left out: attempts that died before an open-ended store got its rows leave them.
    """
    found: list[int] = []
    for key, size in sizes.items():
        bucket = bucket_of(key)
        if bucket is None:
            raise StoreError(f"{key}: not the name of a commit object; delete it, or see: actstore verify")
        if size > INTENT_BYTES and bucket < spec.buckets:
            found.append(bucket)
    return np.array(sorted(found), np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunks:
    """The chunks of one array in one bucket, in the order of places."""

    stored: NDArray[np.uint32]
    """Stored bytes of each chunk [chunks], crc32c included."""
    crc32c: NDArray[np.uint32]
    """Of each chunk [chunks]: what its last four bytes say."""


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
    arrays: dict[str, Chunks]
    """By array name."""
    calibration: dict[str, int]
    """Per `fixed` site, crc32c of the calibration object that its codes are in."""
    stats: dict[str, stats.Sums]
    """Per site."""
    versions: dict[str, str] = field(default_factory=dict[str, str])
    """Of the libraries that computed the rows, where the writer says."""

    def stored_bytes(self, spec: StoreSpec) -> int:
        """Bytes of all shards."""
        total = sum(int(c.stored.sum(dtype=np.int64)) for c in self.arrays.values())
        return total + sum(
            -(-self.rows // a.shard_rows) * tail_bytes(a.chunks_per_shard) for a in arrays(spec).values()
        )

    @property
    def digest(self) -> str:
        """Of the content: BLAKE2b-128 over the crc32c of all chunks, array by array in the order of names."""
        h = hashlib.blake2b(digest_size=16)
        for name in sorted(self.arrays):
            h.update(self.arrays[name].crc32c.astype("<u4", copy=False).tobytes())
        return h.hexdigest()


def shard_chunks(array: ArraySpec, committed: CommitRecord) -> list[Chunks]:
    """The chunks of each shard that an array has in a bucket."""
    whole, step = committed.arrays[array.name], array.chunks_per_shard
    return [
        Chunks(stored=whole.stored[i : i + step], crc32c=whole.crc32c[i : i + step])
        for i in range(0, len(whole.stored), step)
    ]


def intent_bytes(bucket: int, attempt: str) -> bytes:
    """The object's content while `attempt` writes the bucket."""
    return _checked(dump(_head("writing", bucket, attempt)), intent=True)


def to_bytes(record: CommitRecord) -> bytes:
    """The object's content."""
    content = {
        "rows": record.rows,
        "arrays": {
            name: {"stored": c.stored.tolist(), "crc32c": c.crc32c.astype(">u4").tobytes().hex()}
            for name, c in record.arrays.items()
        },
        "calibration": {site: f"{crc:08x}" for site, crc in record.calibration.items()},
        "stats": {site: stats.to_wire(s) for site, s in record.stats.items()},
        "versions": record.versions,
    }
    return _checked(dump({**_head("committed", record.bucket, record.attempt), **content}), intent=False)


def _head(state: str, bucket: int, attempt: str) -> dict[str, Any]:
    assert _ATTEMPT.fullmatch(attempt) and len(attempt) == MARK_BYTES
    return {"format_version": FORMAT_VERSION, SEAL: UNSEALED, "state": state, "bucket": bucket, "attempt": attempt}


def _checked(data: bytes, *, intent: bool) -> bytes:
    assert (len(data) <= INTENT_BYTES) == intent
    return data


class _WireChunks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    stored: list[Annotated[int, msgspec.Meta(gt=0, lt=1 << 32)]]
    crc32c: str


class _WireIntent(Sealed, frozen=True, tag_field="state", tag="writing"):
    format_version: int
    bucket: int
    attempt: str


class _WireRecord(Sealed, frozen=True, tag_field="state", tag="committed"):
    format_version: int
    bucket: int
    attempt: str
    rows: int
    arrays: dict[str, _WireChunks]
    calibration: dict[str, str]
    stats: dict[str, stats.Wire]
    versions: dict[str, Annotated[str, msgspec.Meta(max_length=64)]]


def from_bytes(data: bytes, spec: StoreSpec, bucket: int) -> CommitRecord | Intent:
    """Parse and check the object against the spec; `StoreError` names it and what is wrong."""
    where = commit_key(bucket)
    wire: _WireIntent | _WireRecord = decode(data, cast("Any", _WireIntent | _WireRecord), where)
    _expect(f"{where}: format_version", wire.format_version, FORMAT_VERSION)
    _expect(f"{where}: bucket", wire.bucket, bucket)
    if not _ATTEMPT.fullmatch(wire.attempt):
        raise StoreError(f"{where}: attempt is {wire.attempt[:60]!r}, expected 16 printable characters")
    if (len(data) <= INTENT_BYTES) != isinstance(wire, _WireIntent):
        raise StoreError(f"{where}: has {len(data)} bytes; an intent has at most {INTENT_BYTES}, a record more")
    if isinstance(wire, _WireIntent):
        return Intent(bucket=bucket, attempt=wire.attempt)
    first, stop = spec.bucket_range(bucket)
    rows, specs = stop - first, arrays(spec)
    fixed = {name for name, s in spec.sites.items() if s.kind == "fixed"}
    _expect(f"{where}: rows", wire.rows, rows)
    _expect(f"{where}: arrays", set(wire.arrays), set(specs))
    _expect(f"{where}: calibration", set(wire.calibration), fixed)
    _expect(f"{where}: statistics", set(wire.stats), set(spec.sites))
    if len(wire.versions) > _MAX_VERSIONS:
        raise StoreError(f"{where}: names {len(wire.versions)} versions, at most {_MAX_VERSIONS} are allowed")
    sums = {n: stats.sums_from_wire(wire.stats[n], s.d, f"{where} {n}") for n, s in spec.sites.items()}
    for name, s in sums.items():
        _expect(f"{where} {name}: rows of the statistics", s.rows, rows)
        if not all(first <= row < stop for row in s.nonfinite_rows):
            raise StoreError(f"{where} {name}: nonfinite_rows {s.nonfinite_rows} are not in the bucket")
    return CommitRecord(
        bucket=bucket,
        attempt=wire.attempt,
        rows=rows,
        arrays={
            name: _chunks(wire.arrays[name], -(-rows // a.chunk_rows), max_stored(a.chunk_bytes), f"{where} {name}")
            for name, a in specs.items()
        },
        calibration={name: int(parse_crcs(wire.calibration[name], 1, where)[0]) for name in sorted(fixed)},
        stats=sums,
        versions=wire.versions,
    )


def _expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        shown = [sorted(x) if isinstance(x, set) else x for x in (found, expected)]
        raise StoreError(f"{what} is {str(shown[0])[:200]}, expected {str(shown[1])[:200]}")


def _chunks(wire: _WireChunks, count: int, most: int, where: str) -> Chunks:
    if len(wire.stored) != count or max(wire.stored, default=0) > most:
        raise StoreError(f"{where}: stored bytes are {str(wire.stored)[:60]}, expected {count} numbers up to {most}")
    return Chunks(stored=np.array(wire.stored, np.uint32), crc32c=parse_crcs(wire.crc32c, count, where))


def parse_crcs(text: str, count: int, where: str) -> NDArray[np.uint32]:
    """`count` crc32c, 8 hexadecimal digits each."""
    if not _HEX.fullmatch(text) or len(text) != 8 * count:
        raise StoreError(f"{where}: crc32c is {text[:60]!r}, expected {8 * count} hexadecimal digits")
    return np.frombuffer(bytes.fromhex(text), ">u4").astype(np.uint32)
