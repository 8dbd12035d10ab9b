"""Writing activations from anywhere: rows in, committed buckets out.

`create` gives an `ActivationWriter`; `append` takes rows in any portions, numbers them in order of arrival and
scatters them straight to their shuffled place in the bucket being filled. A full bucket is encoded, written and
committed by one background thread while the next one fills. The store is a function of the rows alone: how they were
cut into portions, interrupted and resumed leaves no trace.

Promises: whole buckets or nothing, whatever stops the process; an error of the background thread is raised by the next
`append` or by `close`; after any error nothing more is committed and everything stays resumable. The price is memory:
two buckets, `2 * bucket_rows * sum(d) * itemsize` bytes (2 for bf16, 4 for f32), and the bucket in work at a crash.
"""

import contextlib
import json
import math
import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StoreError, warn
from actstore.store.format import codec as codecs
from actstore.store.format.spec import (
    FLOATS,
    GROUP_KEY,
    OPEN_ENDED,
    PROVENANCE_ARRAYS,
    SiteSpec,
    StoreSpec,
    held_as,
)
from actstore.store.read.index import read_spec
from actstore.store.storage import open_storage
from actstore.store.write.bucket import StoreWriter, create_store, remarks
from actstore.store.write.protocol import NotWritten
from actstore.store.write.rows import converted, dtype_name, provenance_column, site_rows

_BLOCK_ROWS = 1 << 13
"""Rows converted at a time: what bounds the temporary copies of an append."""
_HOW_TO_GO_ON = "committed buckets stay, and the same command continues from the next_row of a new writer"


def create(
    url: str | os.PathLike[str],
    *,
    sites: Mapping[str, int],
    encoding: str = "bf16",
    rows: int | None = None,
    part: tuple[int, int] = (0, 1),
    bucket_rows: int = 1 << 18,
    shard_rows: int = 1 << 14,
    chunk_rows: int = 1 << 11,
    seed: int = 0,
    codec: codecs.CodecName = "planes",
    provenance: Mapping[str, Any] | None = None,
    threads: int | None = None,
) -> "ActivationWriter":
    """Create a store, or continue one that was made with the same settings; use the result as a context manager.

        with actstore.create("s3://bucket/mine", sites={"resid_post.12": 2304}) as w:
            w.append({"resid_post.12": x}, token_id=t, sequence=q, position=p)

    Memory: two buckets, `2 * bucket_rows * sum(d) * itemsize` bytes (2 for bf16, 4 for f32; for `fixed:EPS` that of
    what is appended), with 40 bytes a bucket row for provenance and order.

    Args:
        url: where the store goes: a directory or an fsspec URL.
        sites: width of the activation vectors by site, such as {"resid_post.12": 2304}.
        encoding: bf16, f32 or fixed:EPS, for all sites.
        rows: exactly so many rows, over all parts. None: as many as are appended before `close`, by one writer.
        part: (i, n) makes this the i-th of n writers of the store, each with its own run of whole buckets.
        bucket_rows: rows of a bucket: shuffle scope and unit of commit.
        shard_rows: rows of a shard: one object on storage.
        chunk_rows: rows of a chunk: the unit of reading.
        seed: key of the row order inside buckets.
        codec: see `actstore.store.format.codec`.
        provenance: where the rows come from: model, text, versions; JSON values only.
        threads: encoding threads; default one a core.

    Raises `ValueError` for impossible settings, `MismatchError` if the store at `url` was made with others.

    """
    index, parts = part
    if not 0 <= index < parts:
        raise ValueError(f"part is {part}, expected (i, n) with 0 <= i < n")
    if rows is None and parts > 1:
        raise ValueError(f"part is {part}, which needs rows=N: how else would the parts know where they begin")
    spec = StoreSpec(
        sites={name: SiteSpec(d=d, encoding=encoding) for name, d in sites.items()},
        rows=OPEN_ENDED if rows is None else rows,
        bucket_rows=bucket_rows,
        shard_rows=shard_rows,
        chunk_rows=chunk_rows,
        seed=seed,
        codec=codec,
        provenance=_plain(provenance or {}),
    )
    if rows is None:
        storage = open_storage(url)
        if storage.exists(GROUP_KEY):  # whatever number of rows an earlier writer fixed
            spec = replace(spec, rows=read_spec(storage).rows)
    return ActivationWriter(create_store(url, spec, threads=threads), part)


def _plain(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON, so that the same settings compare equal on resumption."""
    try:
        return json.loads(json.dumps(dict(provenance), allow_nan=False))
    except (TypeError, ValueError) as e:
        raise ValueError(f"provenance must be JSON values ({e})") from e


@dataclass
class _Bucket:
    """A bucket in memory, in stored order."""

    number: int
    place: NDArray[np.int64]
    """Stored place of each of its rows."""
    arrays: dict[str, NDArray[Any]]
    """Sites and provenance; longer than the bucket where the bucket is short."""


class ActivationWriter:
    """Takes rows for one store (or one part of it), from one thread of one process; made by `create`."""

    def __init__(self, writer: StoreWriter, part: tuple[int, int]) -> None:
        """Continue `writer` where its committed buckets end."""
        self._writer = writer
        self._spec = writer.spec
        index, parts = part
        self._whole = "the store" if parts == 1 else f"part {part}"
        self._buckets = range(index * writer.buckets // parts, (index + 1) * writer.buckets // parts)
        self._committed = writer.committed()
        self._next = self._first_missing()
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._filling: _Bucket | None = None
        self._spare: dict[str, NDArray[Any]] | None = None
        self._flight: tuple[_Bucket, Future[Any]] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="actstore-append")
        self._closed = self._failed = self._warned = False
        self._caller: tuple[int, int] | None = None
        """The process and the thread that the rows come from."""

    def _start(self, bucket: int) -> int:
        return min(bucket * self._spec.bucket_rows, self._spec.rows)

    def _first_missing(self) -> int:
        """First row of the first bucket of this part that is not committed."""
        return self._start(next((b for b in self._buckets if b not in self._committed), self._buckets.stop))

    @property
    def first_row(self) -> int:
        """First row of this part."""
        return self._start(self._buckets.start)

    @property
    def stop_row(self) -> int:
        """The row after the last of this part; very large while the store is open-ended."""
        return self._start(self._buckets.stop)

    @property
    def next_row(self) -> int:
        """Number of the row that the next `append` begins with; right after `create`, where to continue."""
        return self._next

    def append(
        self,
        sites: Mapping[str, Any],
        *,
        token_id: Any = None,
        sequence: Any = None,
        position: Any = None,
    ) -> None:
        """Take rows from `next_row` on; all of them or, with `ValueError`, none.

        `sites[name]` is [n, d], or [..., d] with the leading dimensions flattened: a torch tensor on any device or a
        numpy array, of floating-point numbers. Values become bfloat16 (round to nearest even) or float32; beyond its
        range they become infinite, NaN stays NaN. Provenance is whole numbers that fit int32, [n] or with the leading
        dimensions of the rows. Rows of buckets that are committed already are counted and otherwise ignored.
        """
        self._check_caller()
        if self._closed or self._failed:
            why = "is closed" if self._closed else "failed before"
            raise ValueError(f"this writer {why}; continue with another actstore.create of the same settings")
        rows, leading = site_rows(sites, self._spec)
        given = {"sequence": sequence, "position": position, "token_id": token_id}
        columns = {name: provenance_column(name, given[name], leading) for name in PROVENANCE_ARRAYS}
        n = math.prod(leading)
        if self._next + n > self.stop_row:
            raise ValueError(
                f"{n} rows from row {self._next} on go beyond row {self.stop_row}: {self._whole} has "
                f"{self.stop_row - self.first_row} rows; append no more, or create another store"
            )
        dtypes = {name: self._dtype(name, x) for name, x in rows.items()}
        try:
            if self._flight is not None and self._flight[1].done():
                self._settle()
            if n:
                self._dtypes = dtypes
            self._take(rows, columns, n)
        except BaseException:  # KeyboardInterrupt too: some rows may be taken, so that nothing may follow them
            self._failed = True
            raise

    def _check_caller(self) -> None:
        """Refuse what would mix up rows: the order of rows is the order of calls, in one thread of one process."""
        caller = os.getpid(), threading.get_ident()
        if self._caller is None:
            _appended.add(self)
            self._caller = caller
        if self._caller != caller:
            where = "process" if self._caller[0] != caller[0] else "thread"
            raise ValueError(
                f"append was called from another {where} than before, so rows would be mixed up; give each its own "
                "part: actstore.create(..., rows=N, part=(i, n))"
            )

    def _dtype(self, name: str, x: Any) -> np.dtype[Any]:
        """What rows of a site are held as in memory. A `fixed` site keeps that of the first rows."""
        site = self._spec.sites[name]
        dtype = held_as(site.kind, bfloat16=dtype_name(x) == "bfloat16")
        if self._dtypes.get(name, dtype) != dtype:
            raise ValueError(
                f"site {name} got {dtype_name(x)} rows after {'bfloat16' if dtype == FLOATS else 'other'} ones, "
                f"expected one kind throughout: with {site.encoding} all rows are bfloat16, or none"
            )
        return dtype

    def _take(self, rows: Mapping[str, Any], columns: Mapping[str, NDArray[np.int32]], n: int) -> None:
        """Put rows in their stored places, block by block, and send every bucket that gets full."""
        at = 0
        while at < n:
            bucket = self._next // self._spec.bucket_rows
            first, stop = self._writer.bucket_range(bucket)
            end = min(n, at + _BLOCK_ROWS, at + stop - self._next)
            if bucket not in self._committed:
                self._filling = self._filling or self._begin(bucket)
                place = self._filling.place[self._next - first :][: end - at]
                for name, x in rows.items():
                    self._filling.arrays[name][place] = converted(x[at:end], self._dtypes[name])
                for name, column in columns.items():
                    self._filling.arrays[name][place] = column[at:end]
            self._next += end - at
            at = end
            if self._next == stop and self._filling is not None:
                self._send(self._filling)

    def _begin(self, bucket: int) -> _Bucket:
        place = self._writer.permutation(bucket)
        arrays, self._spare = self._spare or self._buffers(len(place)), None
        return _Bucket(bucket, place, arrays)

    def _buffers(self, rows: int) -> dict[str, NDArray[Any]]:
        sites = {name: np.empty((rows, site.d), self._dtypes[name]) for name, site in self._spec.sites.items()}
        return sites | {name: np.empty(rows, np.int32) for name in PROVENANCE_ARRAYS}

    def _send(self, bucket: _Bucket) -> None:
        """Write a bucket in the background, once the one before it is done."""
        self._settle()
        arrays = {name: a[: len(bucket.place)] for name, a in bucket.arrays.items()}
        self._filling = None
        self._flight = bucket, self._pool.submit(self._writer.write_arrays, bucket.number, arrays)

    def _settle(self) -> None:
        """Wait for the bucket being written; raises what went wrong there."""
        if self._flight is None:
            return
        (bucket, written), self._flight = self._flight, None
        made = written.result()
        if isinstance(made, NotWritten):
            raise StoreError(
                f"{self._writer.url}: bucket {bucket.number} was {made.value} by another writer, so the rows given "
                "here are not in the store; let one writer at a time append to it, or give each a part of its own"
            )
        if not self._warned and (lines := remarks(made)):
            self._warned = True
            warn(f"{self._writer.url}: {'; '.join(lines)}; actstore info has the sums")
        self._committed.add(bucket.number)
        self._spare = bucket.arrays

    def close(self) -> None:
        """Commit what is left and, if the whole store is there, write its manifest; harmless to repeat.

        `StoreError` if rows of this part are missing: what is committed stays, and the same settings continue it.
        """
        if self._closed:
            return
        if self._caller is not None and self._caller[0] != os.getpid():
            raise ValueError("this writer belongs to the process that made it; close it there")
        try:
            self._settle()
            if self._failed:
                raise StoreError(f"{self._writer.url}: unfinished, since an earlier append failed; {_HOW_TO_GO_ON}")
            if self._spec.rows == OPEN_ENDED:
                self._fix()
            self._finish()
        finally:
            self._release()

    def _fix(self) -> None:
        """Make the rows that were appended the rows of the store; its last bucket gets the order of a short one."""
        if self._next == 0:
            raise StoreError(f"{self._writer.url}: no rows were appended, so there is nothing to close")
        self._writer.fix_rows(self._next)
        self._spec = self._writer.spec
        self._buckets = range(self._writer.buckets)
        if self._filling is not None:
            full, short = self._filling, self._begin(self._filling.number)
            for start in range(0, len(short.place), _BLOCK_ROWS):
                old, new = (b.place[: len(short.place)][start : start + _BLOCK_ROWS] for b in (full, short))
                for name, a in full.arrays.items():
                    short.arrays[name][new] = a[old]
            self._send(short)
            self._settle()

    def _finish(self) -> None:
        committed = self._writer.committed()
        missing = [b for b in self._buckets if b not in committed]
        if missing:
            why = f"bucket {missing[0]} is being written by another writer"
            if self._next < self.stop_row:
                rows = self.stop_row - self.first_row
                why = f"{self.stop_row - self._next} of the {rows} rows of {self._whole} are missing"
            raise StoreError(f"{self._writer.url}: {why}; {_HOW_TO_GO_ON}")
        if len(committed) == self._writer.buckets:
            self._writer.finalise()

    def _release(self) -> None:
        """Wait for the background thread, and give back the memory."""
        self._closed = True
        self._pool.shutdown()
        self._filling = self._spare = self._flight = None
        _appended.discard(self)

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; after an exception wait for the bucket being written, commit nothing else."""
        if error is None:
            self.close()
            return
        try:
            self._settle()
        except Exception as e:  # noqa: BLE001  whatever it was, the first error is the one to raise
            error.add_note(f"Writing the full bucket before it failed too: {e!r}")
        self._release()

    def abandon(self) -> None:
        """Commit the full bucket that is being written, if any, and say that the writer was never closed."""
        if self._caller is None or self._caller[0] != os.getpid():
            return
        with contextlib.suppress(Exception):  # what can't be written is lost, as is said below
            self._settle()
        self._release()
        kept = self._first_missing()
        print(
            f"actstore: the writer of {self._writer.url} was never closed: the store is unfinished, "
            f"{kept - self.first_row} rows are in full buckets, {max(self._next - kept, 0)} are lost; close it, or use "
            "it as a context manager",
            file=sys.stderr,
        )


_appended: set[ActivationWriter] = set()
"""Writers that were given rows and are not closed yet."""


def _abandon_all() -> None:
    for writer in list(_appended):
        writer.abandon()


# `threading` calls this before it ends the pools of `concurrent.futures`, which `atexit` would be too late for. The
# function is private; Python 3.9 to 3.14 have it, and `concurrent.futures` uses it for the same purpose.
threading._register_atexit(_abandon_all)  # type: ignore[attr-defined] # noqa: SLF001
