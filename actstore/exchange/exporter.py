"""Exporting rows of a store to a file that other tools read: safetensors, npy or parquet.

Rows come in row order, so the shuffle inside buckets is undone, with the columns `row`, `sequence`, `position` and
`token_id`. Each chunk that holds a wanted row is read once, and its rows are scattered to their places in a
memory-mapped file, whose pages the system writes out when it likes. Memory stays at a few chunks, 50 bytes per row of
one bucket (and of the sample), and at most the pages of one bucket, whatever the size of the export. Parquet, which is
written front to back, goes through a scratch file of one bucket beside it.

bf16 sites are BF16 in safetensors and float32, which is exact, in the others; f32 and `fixed` sites are float32. The
output appears under its name when it is complete; a failed export leaves nothing, a killed one a `.partial` that the
next one replaces.
"""

import json
import math
import mmap
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actstore import keyed
from actstore.errors import StoreError
from actstore.progress import Progress
from actstore.store.format.spec import FLOATS, PROVENANCE_ARRAYS, arrays
from actstore.store.read.store import Store, open_store
from actstore.store.read.values import Values
from actstore.store.storage import LocalStorage

Format = Literal["safetensors", "npy", "parquet"]
FORMATS: tuple[Format, ...] = ("safetensors", "npy", "parquet")
ROW = "row"
_ABOUT = "about.json"
_BLOCK_BYTES = 1 << 25
"""Of a parquet row group, before compression."""
_SAFETENSORS_DTYPES = {"<i8": "I64", "<i4": "I32", "<f4": "F32", "<u2": "BF16"}
_Columns = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]
"""Type and shape of a row by column."""


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What an export wrote."""

    format: Format
    rows: int
    sites: list[str]
    bytes: int
    """Of the output."""
    fingerprint: str
    """Of the store."""
    seconds: float


def export(
    url: str | Path,
    out: str | Path,
    *,
    sites: list[str] | None = None,
    rows: tuple[int, int] | None = None,
    sample: int | None = None,
    seed: int = 0,
    format: Format | None = None,  # noqa: A002  the name of the command's option
    progress: Progress | None = None,
) -> ExportSummary:
    """Write rows of a store to `out`: a file, or for npy a directory with one file per column.

    `rows` is a range (first row, row after the last); `sample` draws so many rows uniformly without replacement from
    all committed ones, keyed by `seed`; neither means every row of the store. `sites` None means all of them; `format`
    None goes by the suffix of `out`. Raises `StoreError` if a wanted row is not committed or `out` exists.
    """
    began, out = time.monotonic(), Path(out)
    chosen = format or _format_of(out)
    if rows is not None and sample is not None:
        raise ValueError("rows and sample exclude each other: give a range of rows or the size of a sample")
    store = open_store(url)
    names = sorted(store.sites) if sites is None else list(dict.fromkeys(sites))
    for name in names:
        store.check_site(name)
    if not names or ROW in names:
        raise ValueError(f"sites are {names}, expected one or more, none of them called {ROW!r}")
    count, wanted = _sample(store, sample, seed) if sample is not None else _range(store, rows)
    if isinstance(store.storage, LocalStorage) and out.resolve().is_relative_to(store.storage.root.resolve()):
        raise ValueError(f"{out} lies in the store; choose another --out")
    if out.exists():
        raise StoreError(f"{out} exists already; delete it or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    _clear(partial, store)
    try:
        _WRITERS[chosen](_Export(store, names, count, wanted, chosen, progress or Progress()), partial)
        size = sum(p.stat().st_size for p in (partial.iterdir() if partial.is_dir() else [partial]))
        partial.rename(out)
    except BaseException:  # KeyboardInterrupt too
        _clear(partial, store)
        raise
    return ExportSummary(
        format=chosen,
        rows=count,
        sites=names,
        bytes=size,
        fingerprint=store.fingerprint,
        seconds=time.monotonic() - began,
    )


def parse_rows(text: str) -> tuple[int, int]:
    """A range of rows from START:STOP."""
    start, colon, stop = text.partition(":")
    if not colon or not (start + stop).isascii() or not (start.isdigit() and stop.isdigit()):
        raise ValueError(f"rows are {text!r}, expected START:STOP, such as 0:4096")
    return int(start), int(stop)


def _format_of(out: Path) -> Format:
    for known in FORMATS:
        if out.suffix == f".{known}":
            return known
    raise ValueError(f"{out} does not say the format; end it in .safetensors or .parquet, or give --format")


def _clear(partial: Path, store: Store) -> None:
    """Delete what an interrupted export of this store left."""
    if partial.is_symlink() or not partial.is_dir():
        partial.unlink(missing_ok=True)
        return
    known = {f"{name}.npy" for name in (ROW, *arrays(store.spec))} | {_ABOUT}
    if foreign := {p.name for p in partial.iterdir()} - known:
        raise StoreError(f"{partial} holds {min(foreign)}, which is not of this store; delete it or choose another out")
    for p in partial.iterdir():
        p.unlink()
    partial.rmdir()


def _range(store: Store, rows: tuple[int, int] | None) -> tuple[int, Iterator[NDArray[np.int64]]]:
    """How many rows a range has, and their numbers, bucket by bucket."""
    start, stop = rows or (0, store.spec.rows)
    if not 0 <= start < stop <= store.spec.rows:
        raise ValueError(f"rows are {start}:{stop}, expected a range within 0:{store.spec.rows}")
    size = store.spec.bucket_rows
    committed = store.index.buckets[np.searchsorted(store.index.buckets, start // size) :]
    gaps = np.flatnonzero(committed != np.arange(start // size, start // size + len(committed)))
    missing = start // size + (int(gaps[0]) if len(gaps) else len(committed))
    if missing * size < stop:
        there = f"; rows {start}:{missing * size} are there" if missing * size > start else ""
        raise StoreError(f"{store.url}: bucket {missing} (rows from {missing * size}) is not committed yet{there}")
    buckets = np.arange(start // size, -(-stop // size))
    ends = np.minimum(stop, buckets * size + store.spec.bucket_sizes(buckets))
    starts = np.minimum(np.maximum(start, buckets * size), ends)  # a short bucket may end before the range begins
    count = int((ends - starts).sum())
    if not count:
        raise ValueError(
            f"rows {start}:{stop} hold no row: an extension begins with a new bucket, the last one was short"
        )
    return count, (np.arange(*bounds) for bounds in zip(starts, ends, strict=True))


def _sample(store: Store, count: int, seed: int) -> tuple[int, Iterator[NDArray[np.int64]]]:
    """How many rows a sample has, and their numbers, bucket by bucket."""
    if not store.rows:
        raise StoreError(f"{store.url}: no bucket is committed yet, so there are no rows to draw from")
    if not 0 < count <= store.rows:
        raise ValueError(f"sample is {count}, expected 1 to {store.rows}, the committed rows")
    # the start of a keyed permutation of the committed rows
    drawn = np.sort(keyed.permute(np.arange(count), store.rows, keyed.key(seed, "export")))
    ends = np.cumsum(store.spec.bucket_sizes(store.index.buckets))
    place = np.searchsorted(ends, drawn, side="right")
    rows = store.index.buckets[place] * store.spec.bucket_rows + drawn - np.concatenate([[0], ends])[place]
    return count, iter(np.split(rows, np.flatnonzero(np.diff(place)) + 1))


class _Export:
    """What the three formats share: the columns, and how rows get to their places in them."""

    def __init__(
        self,
        store: Store,
        sites: list[str],
        count: int,
        wanted: Iterator[NDArray[np.int64]],
        chosen: Format,
        progress: Progress,
    ) -> None:
        self.store, self.count, self.wanted = store, count, wanted
        exact = None if chosen == "safetensors" else FLOATS
        self.values = {name: Values(store, name, exact) for name in sites}
        self.values |= {name: Values(store, name) for name in PROVENANCE_ARRAYS}
        self.columns: _Columns = {ROW: (np.dtype("<i8"), ())} | {
            name: (v.dtype, arrays(store.spec)[name].shape[1:]) for name, v in self.values.items()
        }
        self.row_bytes = sum(map(self.width, self.columns))
        self.step = progress.step("export", total=count * self.row_bytes, unit="B")

    def width(self, name: str) -> int:
        """Bytes of a row of a column."""
        dtype, shape = self.columns[name]
        return dtype.itemsize * math.prod(shape)

    def view(self, data: NDArray[np.uint8], names: Iterable[str], rows: int) -> dict[str, NDArray[Any]]:
        """The columns [rows, ...] that lie one after another in `data`."""
        out: dict[str, NDArray[Any]] = {}
        at = 0
        for name in names:
            dtype, shape = self.columns[name]
            end = at + rows * self.width(name)
            out[name], at = data[at:end].view(dtype).reshape(rows, *shape), end
        return out

    def about(self) -> dict[str, str]:
        """What the output says of the store, in strings."""
        encodings = {name: site.encoding for name, site in self.store.sites.items() if name in self.values}
        return {
            "actstore_fingerprint": self.store.fingerprint,
            "actstore_encoding": json.dumps(encodings, sort_keys=True),
            "actstore_provenance": json.dumps(self.store.provenance, sort_keys=True),
        }

    def fill(self, rows: NDArray[np.int64], out: dict[str, NDArray[Any]]) -> None:
        """Put rows of one bucket into the columns [rows, ...] of `out`."""
        if not len(rows):
            return
        size, bucket = self.store.spec.chunk_rows, int(rows[0]) // self.store.spec.bucket_rows
        place = self.store.index.place(bucket)
        assert place is not None
        stored = self.store.spec.permutation(bucket)[rows - bucket * self.store.spec.bucket_rows]
        order = np.argsort(stored)
        chunks, first = np.unique(stored[order] // size, return_index=True)
        targets = np.split(order, first[1:])

        def scatter(name: str, i: int) -> int:
            chunk = int(chunks[i])
            picked = self.values[name].chunk(place, chunk)[stored[targets[i]] - chunk * size]
            out[name][targets[i]] = picked
            return picked.nbytes

        out[ROW][:] = rows
        self.step.advance(out[ROW].nbytes)
        jobs = [(name, i) for name in self.values for i in range(len(chunks))]
        with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="actstore-export") as pool:
            for done in pool.map(lambda job: scatter(*job), jobs):
                self.step.advance(done)

    def fill_all(self, out: dict[str, NDArray[Any]], maps: list[mmap.mmap]) -> None:
        """Put every wanted row into the columns of `out`, which lie in `maps`."""
        at = 0
        for rows in self.wanted:
            self.fill(rows, {name: column[at : at + len(rows)] for name, column in out.items()})
            at += len(rows)
            for m in maps:
                m.madvise(mmap.MADV_DONTNEED)  # the file keeps its pages, this process lets go of them


def _mapped(file: Any, size: int) -> mmap.mmap:
    """A file that is open for reading and writing, made `size` bytes long, with room on the disk for all of them."""
    os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and a crash in a mapping
    return mmap.mmap(file.fileno(), size)


def _safetensors(export: _Export, partial: Path) -> None:
    """One file: the length of the header, the header, the tensors one after another."""
    header: dict[str, Any] = {"__metadata__": export.about()}
    end = 0
    # the widest first, as the library does it, so that every tensor is aligned
    names = sorted(export.columns, key=lambda name: -export.columns[name][0].itemsize)
    for name in names:
        dtype, shape = export.columns[name]
        start, end = end, end + export.count * export.width(name)
        kind, full = _SAFETENSORS_DTYPES[dtype.str], [export.count, *shape]
        header[name] = {"dtype": kind, "shape": full, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with partial.open("w+b") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.flush()
        mapped = _mapped(f, 8 + len(text) + end)
        data = np.frombuffer(mapped, np.uint8, offset=8 + len(text))
        export.fill_all(export.view(data, names, export.count), [mapped])


def _npy(export: _Export, partial: Path) -> None:
    """A directory with one array per column."""
    partial.mkdir()
    out: dict[str, NDArray[Any]] = {}
    maps: list[mmap.mmap] = []
    for name, (dtype, shape) in export.columns.items():
        full = (export.count, *shape)
        with (partial / f"{name}.npy").open("w+b") as f:
            np.lib.format.write_array_header_1_0(f, {"descr": dtype.str, "fortran_order": False, "shape": full})
            f.flush()
            start = f.tell()
            maps.append(_mapped(f, start + export.count * export.width(name)))
            out[name] = np.frombuffer(maps[-1], dtype, offset=start).reshape(full)
    export.fill_all(out, maps)
    (partial / _ABOUT).write_text(json.dumps(export.about(), indent=1) + "\n")


def _parquet(export: _Export, partial: Path) -> None:
    """One file; sites are columns of fixed-size lists."""
    types = {np.dtype("<i8"): pa.int64(), np.dtype("<i4"): pa.int32(), FLOATS: pa.float32()}
    fields = [
        pa.field(name, pa.list_(types[dtype], shape[0]) if shape else types[dtype], nullable=False)
        for name, (dtype, shape) in export.columns.items()
    ]
    schema = pa.schema(fields, metadata=export.about())
    with pq.ParquetWriter(partial, schema, compression="zstd", use_dictionary=False) as writer:
        for rows in filter(len, export.wanted):
            with tempfile.TemporaryFile(dir=partial.parent) as scratch:
                _parquet_bucket(export, rows, _mapped(scratch, len(rows) * export.row_bytes), writer)


def _parquet_bucket(export: _Export, rows: NDArray[np.int64], scratch: mmap.mmap, writer: pq.ParquetWriter) -> None:
    out = export.view(np.frombuffer(scratch, np.uint8), export.columns, len(rows))
    export.fill(rows, out)
    block = max(1, _BLOCK_BYTES // export.row_bytes)
    for start in range(0, len(rows), block):
        part = {name: column[start : start + block] for name, column in out.items()}
        writer.write_table(_table(part, writer.schema))


def _table(columns: dict[str, NDArray[Any]], schema: pa.Schema) -> pa.Table:
    made: list[Any] = []
    for field in schema:
        column = columns[field.name]
        flat = pa.array(column.reshape(-1))
        made.append(flat if column.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, type=field.type))
    return pa.Table.from_arrays(made, schema=schema)


_WRITERS = {"safetensors": _safetensors, "npy": _npy, "parquet": _parquet}
