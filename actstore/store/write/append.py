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
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from actstore.errors import StoreError, warn
from actstore.store.format import codec as codecs
from actstore.store.format.bfloat16 import NATIVE as BFLOAT16
from actstore.store.format.spec import (
    BITS,
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

NO_PROVENANCE = -1
"""Stored for `token_id`, `sequence` or `position` where none was given."""
_BLOCK_ROWS = 1 << 13
"""Rows converted at a time: what bounds the temporary copies of an append."""
_INT32 = np.iinfo(np.int32)


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
        self._part = part
        self._buckets = range(index * writer.buckets // parts, (index + 1) * writer.buckets // parts)
        self._committed = writer.committed()
        self._next = self.first_row
        for bucket in self._buckets:
            if bucket not in self._committed:
                break
            self._next = writer.bucket_range(bucket)[1]
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._filling: _Bucket | None = None
        self._spare: dict[str, NDArray[Any]] | None = None
        self._flight: tuple[_Bucket, Future[Any]] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="actstore-append")
        self._closed = self._failed = self._warned = False
        self._pid, self._thread = os.getpid(), 0
        """The process and, from the first `append` on, the thread that the rows come from."""
        _settle_at_exit(self)

    @property
    def first_row(self) -> int:
        """First row of this part."""
        return min(self._buckets.start * self._spec.bucket_rows, self._spec.rows)

    @property
    def stop_row(self) -> int:
        """The row after the last of this part; very large while the store is open-ended."""
        return min(self._buckets.stop * self._spec.bucket_rows, self._spec.rows)

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
        rows, n, shapes = self._check_sites(sites)
        given = {"sequence": sequence, "position": position, "token_id": token_id}
        columns = {name: _column(name, given[name], n, shapes) for name in PROVENANCE_ARRAYS}
        if self._next + n > self.stop_row:
            whole = "the store" if self._part[1] == 1 else f"part {self._part}"
            raise ValueError(
                f"{n} rows from row {self._next} on go beyond row {self.stop_row}: {whole} has "
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
        self._thread = self._thread or threading.get_ident()
        if (os.getpid(), threading.get_ident()) != (self._pid, self._thread):
            where = "process" if os.getpid() != self._pid else "thread"
            raise ValueError(
                f"append was called from another {where} than before, so rows would be mixed up; give each its own "
                "part: actstore.create(..., rows=N, part=(i, n))"
            )

    def close(self) -> None:
        """Commit what is left and, if the whole store is there, write its manifest; harmless to repeat.

        `StoreError` if rows of this part are missing: what is committed stays, and the same settings continue it.
        """
        if self._closed:
            return
        if os.getpid() != self._pid:
            raise ValueError("this writer belongs to the process that made it; close it there")
        self._closed = True
        try:
            self._settle()
            if self._failed:
                raise StoreError(
                    f"{self._writer.url}: unfinished, since an earlier append failed; {self._how_to_go_on()}"
                )
            if self._spec.rows == OPEN_ENDED:
                self._fix()
            self._finish()
        finally:
            self._filling = self._spare = None
            self._pool.shutdown()

    def abandon(self) -> None:
        """Commit the full bucket that is being written, if any, and say that the writer was never closed."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        lost = self._next - self._filling.number * self._spec.bucket_rows if self._filling else 0
        with contextlib.suppress(StoreError):  # what can't be written is not in the store, as is said below
            self._settle()
        self._filling = self._spare = None
        self._pool.shutdown()
        print(
            f"actstore: the writer of {self._writer.url} was never closed: the store is unfinished, "
            f"{self._next - lost} rows are in full buckets, {lost} are lost; close it, or use it as a context manager",
            file=sys.stderr,
        )

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
        self._closed = True
        self._filling = self._spare = None
        if self._flight is not None:
            wait([self._flight[1]])
            other = self._flight[1].exception()
            if other is not None:
                error.add_note(f"Writing bucket {self._flight[0].number} failed too: {other!r}")
        self._pool.shutdown()

    def _check_sites(self, sites: Mapping[str, Any]) -> tuple[dict[str, Any], int, set[tuple[int, ...]]]:
        """The rows as [n, d], n, and the shapes that provenance may have."""
        if set(sites) != set(self._spec.sites):
            raise ValueError(f"sites are {sorted(sites)}, the store has {sorted(self._spec.sites)}; append all of them")
        rows: dict[str, Any] = {}
        leading: dict[str, tuple[int, ...]] = {}
        for name, site in self._spec.sites.items():
            x: Any = sites[name] if _is_tensor(sites[name]) else np.asarray(sites[name])
            if not (x.is_floating_point() if _is_tensor(x) else x.dtype.kind == "f" or x.dtype == BFLOAT16):
                raise ValueError(f"site {name} is {_name(x)}, expected floating-point numbers such as bfloat16")
            shape = tuple(x.shape)
            if shape[-1:] != (site.d,):
                raise ValueError(f"site {name} has shape {list(shape)}, expected [n, {site.d}] or [..., {site.d}]")
            leading[name] = shape[:-1]
            rows[name] = (x.detach() if _is_tensor(x) else x).reshape(-1, site.d)
        counts = {name: len(x) for name, x in rows.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"rows by site are {counts}, expected equally many: row i of all sites is one token")
        if len(set(leading.values())) > 1:
            raise ValueError(
                f"leading dimensions by site are {leading}, expected the same: row i of all sites is one token"
            )
        n = next(iter(counts.values()))
        return rows, n, {(n,), *leading.values()}

    def _dtype(self, name: str, x: Any) -> np.dtype[Any]:
        """What rows of a site are kept as in memory; for `fixed`, what came first decides."""
        dtype = held_as(self._spec.sites[name].kind, bfloat16=_name(x) == "bfloat16")
        if self._dtypes.get(name, dtype) != dtype:
            raise ValueError(
                f"site {name} got {_name(x)} rows after {'bfloat16' if dtype == FLOATS else 'other'} ones, "
                f"expected one kind throughout: with {self._spec.sites[name].encoding} all rows are bfloat16, or none"
            )
        return dtype

    def _take(self, rows: Mapping[str, Any], columns: Mapping[str, NDArray[np.int32] | None], n: int) -> None:
        done = 0
        while done < n:
            bucket = self._next // self._spec.bucket_rows
            first, stop = self._writer.bucket_range(bucket)
            count = min(n - done, stop - self._next)
            if bucket not in self._committed:
                filling = self._filling = self._filling or self._begin(bucket, stop - first)
                for start, end in _blocks(done, done + count):
                    place = filling.place[self._next - first + start - done :][: end - start]
                    for name, x in rows.items():
                        filling.arrays[name][place] = _raw(x[start:end], self._dtypes[name])
                    for name, column in columns.items():
                        filling.arrays[name][place] = NO_PROVENANCE if column is None else column[start:end]
            done += count
            self._next += count
            if self._next == stop and self._filling is not None:
                self._send(self._filling, stop - first)

    def _begin(self, bucket: int, rows: int) -> _Bucket:
        arrays, self._spare = self._spare or self._buffers(rows), None
        return _Bucket(bucket, self._writer.permutation(bucket), arrays)

    def _buffers(self, rows: int) -> dict[str, NDArray[Any]]:
        sites = {name: np.empty((rows, site.d), self._dtypes[name]) for name, site in self._spec.sites.items()}
        return sites | {name: np.empty(rows, np.int32) for name in PROVENANCE_ARRAYS}

    def _send(self, bucket: _Bucket, rows: int) -> None:
        """Write a bucket in the background, once the one before it is done."""
        self._settle()
        arrays = {name: a[:rows] for name, a in bucket.arrays.items()}
        self._filling = None
        self._flight = bucket, self._pool.submit(self._writer.write_arrays, bucket.number, arrays)

    def _settle(self) -> None:
        """Wait for the bucket being written; raises what went wrong there."""
        if self._flight is None:
            return
        bucket, written = self._flight
        wait([written])
        self._flight = None
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

    def _fix(self) -> None:
        """Make the rows that were appended the rows of the store; its last bucket gets the order of a short one."""
        if self._next == 0:
            raise StoreError(f"{self._writer.url}: no rows were appended, so there is nothing to close")
        self._writer.fix_rows(self._next)
        self._spec = self._writer.spec
        self._buckets = range(self._writer.buckets)
        if self._filling is None:
            return
        full = self._filling
        rows = self._next - full.number * self._spec.bucket_rows
        place = self._writer.permutation(full.number)
        source = np.empty(rows, np.int64)
        source[place] = full.place[:rows]
        arrays = self._spare or self._buffers(rows)
        for name, a in full.arrays.items():
            np.take(a, source, axis=0, out=arrays[name][:rows], mode="clip")
        self._send(_Bucket(full.number, place, arrays), rows)
        self._settle()

    def _finish(self) -> None:
        committed = self._writer.committed()
        missing = [b for b in self._buckets if b not in committed]
        if missing:
            whole = "the store" if self._part[1] == 1 else f"part {self._part}"
            short = f"{self.stop_row - self._next} of the {self.stop_row - self.first_row} rows of {whole} are missing"
            taken = f"bucket {missing[0]} is being written by somebody else"
            why = short if self._next < self.stop_row else taken
            raise StoreError(f"{self._writer.url}: {why}; {self._how_to_go_on()}")
        if len(committed) == self._writer.buckets:
            self._writer.finalise()

    def _how_to_go_on(self) -> str:
        return "committed buckets stay, and the same command continues from the next_row of a new writer"


def _settle_at_exit(writer: ActivationWriter) -> None:
    """At the end of a process that forgot to close a writer: finish its full bucket, and say what is missing.

    `threading` calls this before it ends the pools of `concurrent.futures`, which `atexit` would be too late for. The
    function is private; Python 3.9 to 3.14 have it, and `concurrent.futures` uses it for the same purpose.
    """
    reference = weakref.ref(writer)
    threading._register_atexit(lambda: _left_open(reference()))  # type: ignore[attr-defined] # noqa: SLF001


def _left_open(writer: ActivationWriter | None) -> None:
    if writer is not None:
        writer.abandon()


def _blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    return ((i, min(i + _BLOCK_ROWS, stop)) for i in range(start, stop, _BLOCK_ROWS))


def _is_tensor(x: Any) -> bool:
    """Whether x is a torch tensor: it can't be one if nobody has imported torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _name(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")


def _raw(x: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Rows as a bucket buffer holds them: bfloat16 bits or float32."""
    if _is_tensor(x):
        torch = sys.modules["torch"]  # converted where the tensor is, so that fewer bytes travel
        if dtype == BITS:
            return x.to(torch.bfloat16).cpu().view(torch.int16).numpy().view(BITS)
        return x.to(torch.float32).cpu().numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(BFLOAT16, copy=False).view(BITS) if dtype == BITS else x.astype(FLOATS, copy=False)


def _column(name: str, values: Any, n: int, shapes: set[tuple[int, ...]]) -> NDArray[np.int32] | None:
    """One provenance column as int32 [n]."""
    if values is None:
        return None
    column = values.detach().cpu().numpy() if _is_tensor(values) else np.asarray(values)
    if column.shape not in shapes:
        raise ValueError(f"{name} has shape {list(column.shape)}, expected [{n}], one whole number a row")
    if column.size == 0:
        return np.empty(0, np.int32)
    if column.dtype.kind not in "iu":
        raise ValueError(f"{name} is {column.dtype}, expected whole numbers such as int32")
    low, high = int(column.min()), int(column.max())
    if low < _INT32.min or high > _INT32.max:
        raise ValueError(f"{name} has values from {low} to {high}, expected ones that fit int32")
    return column.astype(np.int32).ravel()
