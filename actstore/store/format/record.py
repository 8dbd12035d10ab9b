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
from typing import Annotated, Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from actstore.errors import StoreError
from actstore.store.format import stats
from actstore.store.format.codec import Crc, max_stored
from actstore.store.format.sealed import Crcs, Sealed, decode, dump, from_json
from actstore.store.format.shard import MARK_BYTES, stored_bytes
from actstore.store.format.spec import FORMAT_VERSION, ArraySpec, StoreSpec, arrays

COMMITS = "commits"
INTENT_BYTES = 256
_ATTEMPT = re.compile(r"[!-~]{16}")
_MAX_VERSIONS = 16


def commit_key(bucket: int) -> str:
    """Object name of a bucket's commit object."""
    return f"{COMMITS}/{bucket:08d}.json"


def bucket_of(key: str) -> int | None:
    """The bucket that a commit object's name stands for; None for other names."""
    stem = key.removeprefix(f"{COMMITS}/").removesuffix(".json")
    number = int(stem) if stem.isascii() and stem.isdigit() and len(stem) <= 18 else -1
    return number if number >= 0 and commit_key(number) == key else None


def is_record(size: int) -> bool:
    """Whether a commit object of so many bytes is a record, so that its bucket exists."""
    return size > INTENT_BYTES


def committed_buckets(sizes: Mapping[str, int], spec: StoreSpec) -> NDArray[np.int64]:
    """Buckets that exist, ascending, given the sizes of the objects below `commits`; `StoreError` for a strange name.

    Commit objects beyond the rows are left out: attempts that died before an open-ended store got its rows leave them.
    """
    found: list[int] = []
    for key, size in sizes.items():
        bucket = bucket_of(key)
        if bucket is None:
            raise StoreError(f"{key}: not the name of a commit object; delete it, or see: actstore verify")
        if is_record(size) and bucket < spec.buckets:
            found.append(bucket)
    return np.array(sorted(found), np.int64)


class _WireChunks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    stored: list[Annotated[int, msgspec.Meta(gt=0, lt=1 << 32)]]
    crc32c: Crcs


class Chunks:
    """The chunks of one array in one bucket, in the order of places."""

    def __init__(self, *, stored: NDArray[np.uint32], crc32c: NDArray[np.uint32]) -> None:
        """`stored` bytes of each chunk, crc32c included, and what its last four bytes say [chunks]."""
        self.stored, self.crc32c = stored, crc32c

    def to_json(self) -> dict[str, Any]:
        """What a record holds."""
        return {"stored": self.stored.tolist(), "crc32c": self.crc32c}

    @classmethod
    def from_json(cls, value: object) -> "Chunks":
        """The inverse of `to_json`."""
        wire = msgspec.convert(value, _WireChunks, dec_hook=from_json)
        return cls(stored=np.array(wire.stored, np.uint32), crc32c=wire.crc32c)


class _Attempted(Sealed, frozen=True, kw_only=True, tag_field="state"):
    format_version: int = 0
    """Set by `to_bytes`, so that an object without it is refused."""
    bucket: int
    attempt: str
    """Random id of the attempt."""


class Intent(_Attempted, frozen=True, tag="writing"):
    """A bucket that an attempt is writing, or was writing when it died."""


class CommitRecord(_Attempted, frozen=True, kw_only=True, tag="committed", eq=False):
    """One committed bucket."""

    rows: int
    arrays: dict[str, Chunks]
    """By array name."""
    calibration: dict[str, Crc]
    """Per `fixed` site, crc32c of the calibration object that its codes are in."""
    stats: dict[str, stats.Sums]
    """Per site."""
    versions: Annotated[dict[str, Annotated[str, msgspec.Meta(max_length=64)]], msgspec.Meta(max_length=16)]
    """Of the libraries that computed the rows, where the writer says."""

    def stored_bytes(self, spec: StoreSpec) -> int:
        """Bytes of all shards."""
        return sum(
            stored_bytes(
                int(self.arrays[name].stored.sum(dtype=np.int64)), -(-self.rows // a.shard_rows), a.chunks_per_shard
            )
            for name, a in arrays(spec).items()
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
    return to_bytes(Intent(bucket=bucket, attempt=attempt))


def to_bytes(content: Intent | CommitRecord) -> bytes:
    """The object's content."""
    assert _ATTEMPT.fullmatch(content.attempt) and len(content.attempt) == MARK_BYTES
    data = dump(msgspec.structs.replace(content, format_version=FORMAT_VERSION))
    assert is_record(len(data)) == isinstance(content, CommitRecord)
    return data


def from_bytes(data: bytes, spec: StoreSpec, bucket: int) -> CommitRecord | Intent:
    """Parse and check the object against the spec; `StoreError` names it and what is wrong."""
    where = commit_key(bucket)
    found: Intent | CommitRecord = decode(data, cast("Any", Intent | CommitRecord), where)
    _expect(f"{where}: format_version", found.format_version, FORMAT_VERSION)
    _expect(f"{where}: bucket", found.bucket, bucket)
    if not _ATTEMPT.fullmatch(found.attempt):
        raise StoreError(f"{where}: attempt is {found.attempt[:60]!r}, expected 16 printable characters")
    if is_record(len(data)) != isinstance(found, CommitRecord):
        raise StoreError(f"{where}: has {len(data)} bytes; an intent has at most {INTENT_BYTES}, a record more")
    if isinstance(found, Intent):
        return found
    first, stop = spec.bucket_range(bucket)
    specs = arrays(spec)
    _expect(f"{where}: rows", found.rows, stop - first)
    _expect(f"{where}: arrays", set(found.arrays), set(specs))
    _expect(f"{where}: calibration", set(found.calibration), spec.fixed_sites)
    _expect(f"{where}: statistics", set(found.stats), set(spec.sites))
    for name, site in spec.sites.items():
        stats.check(found.stats[name], found.rows, site.d, f"{where} {name}")
        if not all(first <= row < stop for row in found.stats[name].nonfinite_rows):
            raise StoreError(f"{where} {name}: nonfinite_rows {found.stats[name].nonfinite_rows} are not in the bucket")
    for name, a in specs.items():
        chunks, count, most = found.arrays[name], -(-found.rows // a.chunk_rows), max_stored(a.chunk_bytes)
        _expect(
            f"{where} {name}: number of stored bytes and of crc32c",
            (len(chunks.stored), len(chunks.crc32c)),
            (count, count),
        )
        if (largest := int(chunks.stored.max())) > most:
            raise StoreError(f"{where} {name}: stored bytes of a chunk are {largest}, expected up to {most}")
    return found


def _expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        shown = [sorted(x) if isinstance(x, (set, frozenset)) else x for x in (found, expected)]
        raise StoreError(f"{what} is {str(shown[0])[:200]}, expected {str(shown[1])[:200]}")
