"""Documents out of files: parquet, arrow, jsonl and plain text, streamed.

Arrow files are what `datasets.save_to_disk` writes; they are read with pyarrow, so `datasets` is not needed. A plain
text file is one document, whatever blank lines it has. A malformed document is passed on with what is wrong with it,
because whether to go on is not decided here; a damaged file, of which the rest can't be trusted, is an error.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actstore.errors import TokensError
from actstore.tokens.sources import SourceFile

BATCH_DOCUMENTS, BATCH_CHARS = 1024, 1 << 20
"""A batch of documents is encoded in parallel and ends at whichever comes first."""
_READ_BYTES = 1 << 22
"""Read and decoded of a parquet file at once, however large its row groups are."""
_COMPRESSIONS = {"gz": "gzip", "zst": "zstd"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One document: text, or ids that are ready."""

    place: str
    """File, and line or record: what messages name."""
    file: str
    record: int
    """Index in its file."""
    content: str | list[int]
    source: str = ""
    title: str = ""
    size: float
    """Its share of the file's bytes, for progress."""
    problem: str = ""
    """What is wrong with it; there is no content then."""


def batches(file: SourceFile, text_column: str, start: int = 0) -> Iterator[list[Document]]:
    """The file's documents from record `start` on, in order, in batches small enough to encode at once."""
    batch: list[Document] = []
    chars = 0
    for document in _documents(file, text_column, start):
        batch.append(document)
        chars += len(document.content)
        if len(batch) == BATCH_DOCUMENTS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _documents(file: SourceFile, text_column: str, start: int) -> Iterator[Document]:
    try:
        with file.fs.open(file.path, "rb") as raw:
            if file.path.endswith((".parquet", ".arrow")):
                yield from _from_table(file, raw, text_column, start)
            elif ".jsonl" in file.path.rpartition("/")[2]:
                yield from _from_jsonl(file, raw, text_column, start)
            elif not start:
                yield _document(file, file.name, 0, {"text": _decompressed(file, raw).read()}, "text", file.size)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise
        raise TokensError(f"{file.name}: the file is damaged or not what its name says: {e}") from e


def _decompressed(file: SourceFile, raw: Any) -> Any:
    """Arrow's streams notice a compressed file that ends too early, zstandard's do not."""
    kind = _COMPRESSIONS.get(file.path.rpartition(".")[2])
    return io.BufferedReader(pa.CompressedInputStream(raw, kind)) if kind else raw  # pyright: ignore[reportArgumentType]


def _from_table(file: SourceFile, raw: Any, text_column: str, start: int) -> Iterator[Document]:
    record = 0
    rows = _parquet_rows if file.path.endswith(".parquet") else _arrow_rows
    for batch, share in rows(file, raw, text_column):
        if record + batch.num_rows > start:
            columns = {name: _values(batch.column(name)) for name in batch.schema.names}
            content = next(name for name in (text_column, "input_ids") if name in columns)
            for i in range(max(start - record, 0), batch.num_rows):
                row = {name: values[i] for name, values in columns.items()}
                yield _document(file, f"{file.name}, record {record + i}", record + i, row, content, share)
        record += batch.num_rows


def _parquet_rows(file: SourceFile, raw: Any, text_column: str) -> Iterator[tuple[pa.RecordBatch, float]]:
    """Rows of the columns that are read, and each one's share of the file's bytes."""
    table = pq.ParquetFile(raw, buffer_size=_READ_BYTES, pre_buffer=False)
    columns = _columns(file, table.schema_arrow.names, text_column)
    groups, total = table.metadata.num_row_groups, table.metadata.num_rows
    size = sum(table.metadata.row_group(i).total_byte_size for i in range(groups))
    rows = min(BATCH_DOCUMENTS, max(1, _READ_BYTES * total // max(size, 1)))
    for batch in table.iter_batches(rows, columns=columns):
        yield batch, file.size / total


def _arrow_rows(file: SourceFile, raw: Any, text_column: str) -> Iterator[tuple[pa.RecordBatch, float]]:
    """The same of an arrow stream, which does not tell its length; the position in the file does as well."""
    reader = pa.ipc.open_stream(raw)
    columns = _columns(file, reader.schema.names, text_column)
    before = 0
    for batch in reader:
        share = (raw.tell() - before) / max(batch.num_rows, 1)
        before = raw.tell()
        for first in range(0, batch.num_rows, BATCH_DOCUMENTS):
            yield batch.select(columns).slice(first, BATCH_DOCUMENTS), share


def _columns(file: SourceFile, names: list[str], text_column: str) -> list[str]:
    content = text_column if text_column in names else "input_ids"
    if content not in names:
        raise TokensError(
            f"{file.name}: no column {text_column!r} or 'input_ids' among {', '.join(names)}; see --text-column"
        )
    return [content, *(c for c in ("source", "title") if c in names and c != content)]


def _values(column: pa.Array) -> list[Any]:
    """Python values; strings as bytes, because one that is no UTF-8 must not spoil the others."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.view(pa.binary() if pa.types.is_string(column.type) else pa.large_binary())
    return column.to_pylist()


def _from_jsonl(file: SourceFile, raw: Any, text_column: str, start: int) -> Iterator[Document]:
    before = 0
    for record, line in enumerate(_decompressed(file, raw)):
        size, before = raw.tell() - before, raw.tell()
        if record >= start and line.strip():
            row, problem = _parsed(line, text_column)
            content = text_column if text_column in row else "input_ids"
            yield _document(file, f"{file.name}, line {record + 1}", record, row, content, size, problem)


def _parsed(line: bytes, text_column: str) -> tuple[dict[str, Any], str]:
    """The object that a line holds, and what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        return {}, f"not JSON: {e}"
    if not isinstance(row, dict):
        return {}, f"JSON, but {type(row).__name__}, expected an object"
    if not {text_column, "input_ids"} & row.keys():
        return {}, f"no field {text_column!r} or 'input_ids'; see --text-column"
    return row, ""


def _document(
    file: SourceFile, place: str, record: int, row: dict[str, Any], column: str, size: float, problem: str = ""
) -> Document:
    content: str | list[int] = ""
    if not problem:
        content, problem = _content(row[column], column)
    return Document(
        place=place,
        file=file.name,
        record=record,
        content=content,
        source=_label(row.get("source")) or file.name,
        title=_label(row.get("title")),
        size=size,
        problem=problem,
    )


def _content(value: object, column: str) -> tuple[str | list[int], str]:
    """Text or ids, and what is wrong with them."""
    try:
        if isinstance(value, bytes):
            return value.decode(), ""
        if isinstance(value, str):
            value.encode()
            return value, ""
    except UnicodeError as e:
        return "", f"{column} is not UTF-8: {e.reason} at {e.start}"  # pyright: ignore[reportAttributeAccessIssue]
    if value is None:
        return "", ""
    if not isinstance(value, list):
        return "", f"{column} is {type(value).__name__}, expected text or token ids"
    wrong = next((i for i in value if type(i) is not int), 0)
    if wrong != 0 or type(wrong) is not int:
        return "", f"{column} holds {wrong!r:.40}, expected token ids, which are whole numbers"
    return value, ""


def _label(value: object) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value or "")
    return text.encode(errors="replace").decode()
