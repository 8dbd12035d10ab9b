"""Importing activations that other tools wrote: numpy, safetensors, SAELens' cached data sets, activault's files.

`import_activations` counts rows first, from headers only, so that the store has its final number of rows from the
start; it then reads from the first row that the store lacks, so that an interrupted import continues where it was.
Files are memory-mapped and their order is the natural one of their paths (`x_2` before `x_10`).

Nothing in a file is executed: numpy without pickle, torch files through the weights-only loader. A file that is
truncated, lies about its size, or holds something else is a `StoreError` naming it, never a shorter store.
"""

import hashlib
import importlib
import json
import math
import os
import re
import time
import zipfile
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actstore.errors import StoreError
from actstore.progress import Progress
from actstore.store.format.bfloat16 import NATIVE as BFLOAT16
from actstore.store.read.store import open_store
from actstore.store.write.append import create

Format = Literal["auto", "numpy", "safetensors", "saelens", "activault"]
SUFFIXES: dict[str, Format] = {
    ".npy": "numpy",
    ".npz": "numpy",
    ".safetensors": "safetensors",
    ".arrow": "saelens",
    ".pt": "activault",
}
"""What `auto` goes by."""
EXPECTED: dict[Format, str] = {
    "numpy": "an .npy or .npz file of floating-point arrays [..., d] without pickled objects",
    "safetensors": "a safetensors file with a floating-point tensor [..., d]",
    "saelens": "an Arrow stream as datasets.save_to_disk writes it, with a column of [context, d] lists",
    "activault": "a torch.save file (zip format) of plain tensors: states [n, context, d] and input_ids [n, context]",
}
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 12
_FLOATS = ("bfloat16", "float16", "float32", "float64")
_SAFETENSORS_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_INT32 = np.iinfo(np.int32)
_BLOCK_ROWS = 1 << 13
"""Rows read at a time."""
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
"""Last bytes of an Arrow stream; without them it was cut off, perhaps between two batches."""


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """What an import did."""

    format: Format
    files: int
    rows: int
    rows_imported: int
    """By this run; the others were there already."""
    nonfinite: int
    """Rows with NaN or infinity in the store: the files', and those beyond the range of the encoding."""
    saturated: int
    """Values in the store that `fixed` has clipped."""
    d: int
    seconds: float


@dataclass(frozen=True)
class _Piece:
    """Rows [..., d] in a file: all of it, or one Arrow batch."""

    values: Any
    """What slices along its first dimension: an array, a tensor, a safetensors slice; nothing is read before that."""
    shape: tuple[int, ...]
    dtype: str
    by_sequence: bool = False
    """The first dimension counts sequences, the second positions."""
    token_ids: Any = None
    """[sequences, positions], if the file has them."""

    def check(self) -> None:
        """Rows of floating-point numbers, with fitting token ids; `ValueError` says what else was found."""
        if self.dtype not in _FLOATS:
            raise ValueError(f"values are {self.dtype}, expected one of {', '.join(_FLOATS)}")
        if len(self.shape) < 2 or self.shape[-1] < 1 or (self.by_sequence and len(self.shape) != 3):
            wanted = "[sequences, positions, d]" if self.by_sequence else "[n, d] or [..., d]"
            raise ValueError(f"the shape is {list(self.shape)}, expected {wanted}")
        if self.token_ids is not None:
            shape, dtype = tuple(self.token_ids.shape), str(self.token_ids.dtype).removeprefix("torch.")
            if shape != self.shape[:-1] or not dtype.lstrip("u").startswith("int"):
                raise ValueError(f"token ids are {dtype}{list(shape)}, expected int32{list(self.shape[:-1])}")

    @property
    def counts(self) -> tuple[int, int]:
        """Number of rows and of sequences."""
        return math.prod(self.shape[:-1]), self.shape[0] if self.by_sequence else 0

    def blocks(self, start: int, first_sequence: int) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The rows from `start` on, [n, d] at a time, with their provenance."""
        inner = math.prod(self.shape[1:-1])
        step = max(1, _BLOCK_ROWS // max(inner, 1))
        for a in range(start // max(inner, 1), self.shape[0] if inner else 0, step):
            b = min(a + step, self.shape[0])
            drop = max(0, start - a * inner)
            provenance: dict[str, Any] = {}
            if self.by_sequence:
                provenance["sequence"] = np.repeat(np.arange(first_sequence + a, first_sequence + b), inner)[drop:]
                provenance["position"] = np.tile(np.arange(inner), b - a)[drop:]
            if self.token_ids is not None:
                ids = np.asarray(self.token_ids[a:b]).reshape(-1)[drop:]
                if ids.size and not _INT32.min <= int(ids.min()) <= int(ids.max()) <= _INT32.max:
                    raise ValueError(f"token ids go from {ids.min()} to {ids.max()}, expected ones that fit int32")
                provenance["token_id"] = ids
            yield self.values[a:b].reshape(-1, self.shape[-1])[drop:], provenance


def import_activations(
    sources: Iterable[str | Path],
    *,
    out: str,
    site: str,
    format: Format = "auto",  # noqa: A002  the name of the command's option
    tensor: str | None = None,
    encoding: str = "bf16",
    bucket_rows: int = 1 << 18,
    shard_rows: int = 1 << 14,
    chunk_rows: int = 1 << 11,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ImportSummary:
    """Make a store of one site from files and directories; the same call continues what was interrupted.

    `tensor` names the tensor, npz member or data set column; it may be left out where there is only one. See `create`
    for the other arguments and for the memory that this takes.
    """
    began, progress = time.monotonic(), progress or Progress()
    paths, found = _expand([Path(s) for s in sources], format)
    counts, d = _count(paths, found, tensor, progress)
    rows = sum(n for n, _ in counts)
    with create(
        out,
        sites={site: d},
        encoding=encoding,
        rows=rows,
        bucket_rows=bucket_rows,
        shard_rows=shard_rows,
        chunk_rows=chunk_rows,
        provenance={"imported": {"format": found, "files": [_identity(p) for p in paths], "tensor": tensor}},
        threads=threads,
    ) as writer:
        step = progress.step("import", total=rows, unit="rows")
        there = writer.next_row
        step.skip(there)
        first_row = first_sequence = 0
        for path, (count, sequences) in zip(paths, counts, strict=True):
            if first_row + count > writer.next_row:
                for x, provenance in _read(path, found, tensor, writer.next_row - first_row, first_sequence):
                    writer.append({site: x}, **provenance)
                    step.advance(len(x))
            first_row += count
            first_sequence += sequences
    sums = open_store(out).index.stats[site]
    return ImportSummary(
        format=found,
        files=len(paths),
        rows=rows,
        rows_imported=rows - there,
        nonfinite=sums.nonfinite,
        saturated=sums.saturated,
        d=d,
        seconds=time.monotonic() - began,
    )


def _identity(path: Path) -> dict[str, Any]:
    """Name, size and a digest of 64 samples of a file: a file that changed between two runs is noticed."""
    size, digest = path.stat().st_size, hashlib.blake2b(digest_size=16)
    with path.open("rb") as f:
        for i in range(_SAMPLES):
            f.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            digest.update(f.read(_SAMPLE_BYTES))
    return {"name": path.name, "bytes": size, "digest": digest.hexdigest()}


def _expand(sources: list[Path], wanted: Format) -> tuple[list[Path], Format]:
    """The files in natural order, and their common format."""
    files: list[Path] = []
    for source in sources:
        if not source.exists():
            raise StoreError(f"{source}: no such file or directory; files on object storage have to be copied here")
        if not (source.is_file() or source.is_dir()):
            raise StoreError(f"{source}: is no regular file; expected files and directories")
        files += _inside(source, wanted) if source.is_dir() else [source]
    files = sorted(dict.fromkeys(files), key=_natural)
    if not files:
        where = ", ".join(map(str, sources)) or "no files and directories"
        raise StoreError(f"no files to import in {where}; known are {', '.join(SUFFIXES)}")
    if wanted != "auto":
        return files, wanted
    first = SUFFIXES.get(files[0].suffix, "auto")
    for file in files:
        found = SUFFIXES.get(file.suffix, "auto")
        if found == "auto" or found != first:
            known = ", ".join(SUFFIXES) if first == "auto" else first
            raise StoreError(
                f"{file}: the name ends in {file.suffix!r}, expected {known}; import one format at a time, and name "
                "it with --format"
            )
    return files, first


def _natural(path: Path) -> list[int | str]:
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", str(path)))]


def _inside(directory: Path, wanted: Format) -> list[Path]:
    """Files of a directory that can be imported; of a saved data set only those that it lists, and all of those."""
    suffixes = [s for s, f in SUFFIXES.items() if wanted in ("auto", f)]
    files: list[Path] = []
    for path in directory.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if path.suffix in suffixes and path.is_file() and not hidden:
            files.append(path)
    for parent in {f.parent for f in files if f.suffix == ".arrow" and (f.parent / "state.json").exists()}:
        state = parent / "state.json"
        with _naming(state, "a data set's state.json"):
            listed = {parent / entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]}
            if missing := listed - set(files):
                raise ValueError(f"lists {min(missing).name}, which is missing; expected the whole data set")
            files = [f for f in files if f.suffix != ".arrow" or f.parent != parent or f in listed]
    return files


@contextmanager
def _naming(path: Path, expected: str) -> Generator[None]:
    """Make a `StoreError` that names the file of whatever a parser raises on foreign bytes."""
    try:
        yield
    except StoreError:
        raise
    except Exception as e:  # four formats' parsers: no list of what they raise is complete
        own = isinstance(e, (ValueError, OSError)) and str(e)
        what = str(e).splitlines()[0] if own else f"unreadable ({type(e).__name__})"
        raise StoreError(f"{path}: {what}; expected {expected}") from e


def _count(
    paths: list[Path], found: Format, tensor: str | None, progress: Progress
) -> tuple[list[tuple[int, int]], int]:
    """Rows and sequences of each file, as the headers say, and the one width of all rows."""
    step = progress.step("count", total=len(paths), unit="files")
    counts: list[tuple[int, int]] = []
    d = 0
    for path in paths:
        rows = sequences = 0
        with _naming(path, EXPECTED[found]):
            for piece in _PIECES[found](path, tensor):
                piece.check()
                if piece.shape[-1] != (d := d or piece.shape[-1]):
                    raise ValueError(f"rows have {piece.shape[-1]} values, those before have {d}; import them apart")
                rows, sequences = rows + piece.counts[0], sequences + piece.counts[1]
        counts.append((rows, sequences))
        step.advance(1)
    if not any(rows for rows, _ in counts):
        raise StoreError(f"{paths[0]}: no rows in {len(paths)} files; expected {EXPECTED[found]}")
    return counts, d


def _read(
    path: Path, found: Format, tensor: str | None, start: int, first_sequence: int
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The rows of a file from `start` on; what comes before is not read."""
    with _naming(path, EXPECTED[found]):
        for piece in _PIECES[found](path, tensor):
            piece.check()
            yield from piece.blocks(max(0, start), first_sequence)
            rows, sequences = piece.counts
            start, first_sequence = start - rows, first_sequence + sequences


def _choose(names: Iterable[str], wanted: str | None) -> str:
    names = list(names)
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        if not names:
            raise ValueError("it has no tensor that fits")
        raise ValueError(f"it has the tensors {', '.join(sorted(names)[:20])}; name one of them with --tensor")
    assert wanted
    return wanted


def _numpy(path: Path, tensor: str | None) -> Iterator[_Piece]:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as f:
            shape, dtype, fortran = _npy_header(f, path.stat().st_size)
            offset = f.tell()
        if math.prod(shape):
            mapped = np.memmap(path, dtype, "r", offset, shape, order="F" if fortran else "C")
            yield _Piece(mapped, shape, dtype.name)
        return
    with zipfile.ZipFile(path) as archive:
        member = _choose((n.removesuffix(".npy") for n in archive.namelist()), tensor)
        info = archive.getinfo(f"{member}.npy")
        with archive.open(info) as f:
            shape, dtype, fortran = _npy_header(f, info.file_size)
            if fortran:
                raise ValueError("the array is in Fortran order; save numpy.ascontiguousarray of it")
            yield _Piece(_Member(f, f.tell(), shape, dtype), shape, dtype.name)


def _npy_header(f: IO[bytes], size: int) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    """Shape, data type and order of the array that `f` holds; its bytes are exactly the rest of `size`."""
    version = np.lib.format.read_magic(f)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"the npy version is {version}, expected 1.0 or 2.0")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(f)
    dtype = np.dtype(BFLOAT16) if dtype == np.dtype("V2") else dtype  # how numpy saves ml_dtypes.bfloat16
    if dtype.name not in _FLOATS or min(shape, default=0) < 0:
        raise ValueError(f"the array is {dtype.name}{list(shape)}, expected one of {', '.join(_FLOATS)}")
    expected = f.tell() + math.prod(shape) * dtype.itemsize
    if size != expected:
        raise ValueError(f"it has {size} bytes, but its header stands for {expected}; it is truncated or damaged")
    return shape, dtype, fortran


@dataclass(frozen=True)
class _Member:
    """An array in an npz archive, read a slice at a time."""

    file: IO[bytes]
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        self.file.seek(self.offset + rows.start * size)
        return np.frombuffer(self.file.read((rows.stop - rows.start) * size), self.dtype).reshape(-1, *self.shape[1:])


def _safetensors(path: Path, tensor: str | None) -> Iterator[_Piece]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:  # numpy's has no bfloat16
        values = f.get_slice(_choose(f.keys(), tensor))
        dtype: str = values.get_dtype()
        yield _Piece(values, tuple(values.get_shape()), _SAFETENSORS_DTYPES.get(dtype, dtype))


def _saelens(path: Path, tensor: str | None) -> Iterator[_Piece]:
    with path.open("rb") as f:
        f.seek(-min(len(_END_OF_STREAM), path.stat().st_size), os.SEEK_END)
        if f.read() != _END_OF_STREAM:
            raise ValueError("the end of the Arrow stream is missing, so it is truncated or something else")
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as batches:
        column = _choose((f.name for f in batches.schema if _is_matrix(f.type)), tensor)
        has_ids = "token_ids" in batches.schema.names
        for batch in batches:
            chosen = batch.select([column, "token_ids"] if has_ids else [column])
            if chosen.num_rows:
                chosen.validate(full=True)
                values = _nested(chosen.column(0))
                ids = _nested(chosen.column(1)) if has_ids else None
                yield _Piece(values, values.shape, values.dtype.name, by_sequence=True, token_ids=ids)


def _inner(kind: Any) -> Any:
    """The type inside a list type; None for any other."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return kind.value_type if is_list else None


def _is_matrix(kind: Any) -> bool:
    """Whether a column holds lists of lists of floating-point numbers, as `datasets.Array2D` stores them."""
    rows = _inner(kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind)
    return rows is not None and (value := _inner(rows)) is not None and pa.types.is_floating(value)


def _nested(column: Any) -> NDArray[Any]:
    """Nested lists as an array; they must be equally long at every level and hold no nulls."""
    column = column.storage if isinstance(column, pa.ExtensionArray) else column
    shape = [len(column)]
    while _inner(column.type) is not None:
        lengths = np.unique(column.value_lengths().to_numpy(zero_copy_only=False))
        if column.null_count or len(lengths) != 1:
            raise ValueError(f"lists in a column are {lengths.tolist()[:5]} long, expected one length and no nulls")
        shape.append(int(lengths[0]))
        column = column.flatten()
    return column.to_numpy(zero_copy_only=True).reshape(shape)


def _activault(path: Path, tensor: str | None) -> Iterator[_Piece]:
    torch = importlib.import_module("torch")  # store/ imports no torch; only who has such files gets here
    data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    name = tensor or "states"
    found: dict[str, Any] = {k: data.get(k) for k in (name, "input_ids")} if isinstance(data, dict) else {}
    for key in (name, "input_ids"):
        value: Any = found.get(key)
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu" or not value.is_contiguous():
            raise ValueError(f"there is no plain tensor {key!r} in it")
    values = found[name]
    dtype = str(values.dtype).removeprefix("torch.")
    yield _Piece(values, tuple(values.shape), dtype, by_sequence=True, token_ids=found["input_ids"])


_PIECES = {"numpy": _numpy, "safetensors": _safetensors, "saelens": _saelens, "activault": _activault}
