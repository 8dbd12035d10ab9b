"""How many rows of each chunk pass a filter: what its order needs to know before the first batch.

Counting reads the provenance columns once (a few bytes a row against thousands), or, for `max_norm`, the site itself,
which costs as much as an epoch of reading. The counts are kept in the user's cache: the next
start costs nothing.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StreamError
from actstore.store.format import codec
from actstore.store.read.store import Store
from actstore.stream.filter import RowFilter, dropped, element_type

COUNTS_VERSION = 1
"""Of what a filter means; counts of other versions are not used."""


def chunk_sizes(store: Store) -> NDArray[np.int64]:
    """Rows of every chunk [committed buckets, chunks per bucket]."""
    spec = store.spec
    held = spec.bucket_sizes(store.index.buckets)[:, None]
    first = np.arange(spec.bucket_rows // spec.chunk_rows) * spec.chunk_rows
    return np.clip(held - first[None, :], 0, spec.chunk_rows)


def count_rows(store: Store, where: RowFilter, *, threads: int) -> NDArray[np.int64]:
    """Rows of every chunk that pass [committed buckets, chunks per bucket], counted once for a store and a filter.

    Raises `StreamError` if no row passes, or if `drop_positions` or `drop_tokens` leaves out nothing: the store does
    not know positions or token ids, or has no row of this kind.
    """
    sizes, file = chunk_sizes(store), _file(store, where)
    with contextlib.suppress(OSError, ValueError):
        kept_counts = np.load(file, allow_pickle=False)
        if kept_counts.dtype == np.int64 and kept_counts.shape == sizes.shape and (kept_counts <= sizes).all():
            return kept_counts
    counts = _count(store, where, sizes, threads)
    with contextlib.suppress(OSError):  # the next start counts again
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as made:
            np.save(made, counts)
        Path(made.name).replace(file)
    return counts


def _file(store: Store, where: RowFilter) -> Path:
    """Where the counts of a store and a filter are kept: in the user's cache, the store is read-only."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or f"{os.environ.get('HOME', '/nonexistent')}/.cache")
    text = json.dumps([COUNTS_VERSION, store.fingerprint, asdict(where)])
    return home / "actstore" / "counts" / f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.npy"


def _count(store: Store, where: RowFilter, sizes: NDArray[np.int64], threads: int) -> NDArray[np.int64]:
    counts = np.zeros_like(sizes)
    spec = store.spec
    per_shard = spec.shard_rows // spec.chunk_rows
    calibrations = {s: store.calibration(s) for s, _ in where.max_norm if s in store.index.calibration}

    known, matched = set[str](), set[str]()  # columns with a value, rules that left something out

    def count(shard: tuple[int, int]) -> None:
        place, first_chunk = shard
        chunks = [c for c in range(first_chunk, min(first_chunk + per_shard, sizes.shape[1])) if sizes[place, c]]
        columns = {n: _shard_chunks(store, n, place, chunks) for n in where.columns}
        for i, c in enumerate(chunks):
            rows = int(sizes[place, c])
            first = int(store.index.buckets[place]) * spec.bucket_rows + c * spec.chunk_rows
            here = {n: v[i][:rows] for n, v in columns.items()}
            known.update(n for n in ("position", "token_id") if n in here and (here[n] >= 0).any())
            out = dropped(where, here, first, calibrations)
            matched.update(rule for rule, mask in out.items() if mask.any())
            counts[place, c] = rows - np.count_nonzero(np.logical_or.reduce(list(out.values())))

    shards = ((p, c) for p in range(len(sizes)) for c in range(0, sizes.shape[1], per_shard) if sizes[p, c])
    with ThreadPoolExecutor(threads) as pool:
        for batch in _batches(shards, 64 * threads):
            list(pool.map(count, batch))
    for column, rule, values in (("position", "drop_positions", where.drop_positions),
                                 ("token_id", "drop_tokens", where.drop_tokens)):  # fmt: skip
        if values and rule not in matched:
            why = (
                f"no row has one of {list(values)}" if column in known else f"the store holds no {column} for its rows"
            )
            raise StreamError(f"{store.url}: {rule} leaves out nothing, because {why}; leave the filter out")
    if not counts.any():
        raise StreamError(f"none of the {int(sizes.sum()):,} rows of {store.url} passes the filter {where}; loosen it")
    return counts


def _batches(items: Iterator[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    batch: list[tuple[int, int]] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    yield batch


def _shard_chunks(store: Store, name: str, place: int, chunks: list[int]) -> list[NDArray[Any]]:
    """Chunks of one shard, decoded [chunk_rows, ...], from one read."""
    where, owner = store.index.arrays[name], store.owner(name)
    array, bucket = where.array, int(store.index.buckets[place])
    at = [where.locate(place, bucket, c) for c in chunks]
    start, stop = at[0].offset, at[-1].offset + at[-1].length
    data = memoryview(owner.storage.get_range(at[0].key, start, stop - start))
    found: list[NDArray[Any]] = []
    for a in at:
        decoded = np.empty(array.chunk_bytes, np.uint8)
        piece = data[a.offset - start : a.offset - start + a.length]
        codec.decode_into(
            piece, array.codec, decoded, f"{owner.url}/{a.key} chunk at byte {a.offset}", committed=a.crc32c
        )
        found.append(codec.merge(decoded, array.codec, element_type(store, name)).reshape(-1, *array.shape[1:]))
    return found
