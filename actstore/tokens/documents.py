"""Documents out of files: parquet, arrow, JSON lines and plain text, streamed.

Arrow files are what `datasets.save_to_disk` writes; they are read with pyarrow, so `datasets` is not needed. A plain
text file is one document, whatever blank lines it has. A malformed document is passed on with what is wrong with it,
because whether to go on is not decided here; a damaged file, of which the rest can't be trusted, is an error.

What a file decodes to at once is bounded (`claims.py`). Records of a table become Python values one by
one, because records may share one long value in memory.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from actstore.errors import TokensError
from actstore.tokens.claims import DAMAGED, MAX_DOCUMENT_BYTES, check_messages, document_limit, group_claims
from actstore.tokens.sources import SourceFile
from actstore.tokens.tokenizer import one_line

BATCH_DOCUMENTS, BATCH_CHARS = 1024, 1 << 20
"""A batch of documents is encoded in parallel and ends at whichever comes first."""
IDS = "input_ids"
"""Column or field of documents that are token ids."""
_READ_BYTES = 1 << 22
"""Read of a parquet file at once, however large its row groups are."""
_DECODED_BYTES = 1 << 26
"""Decoded of it at once, unless one record takes more."""
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
        chars += len(document.content) + len(document.source) + len(document.title)
        if len(batch) == BATCH_DOCUMENTS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _documents(file: SourceFile, text_column: str, start: int) -> Iterator[Document]:
    try:
        with file.fs.open(file.path, "rb") as raw:
            if file.kind in ("parquet", "arrow"):
                yield from _from_table(file, raw, text_column, start)
                return
            with _stream(file, raw) as stream:
                if file.kind != "txt":
                    yield from _from_lines(file, raw, stream, text_column, start)
                elif not start:
                    text = stream.read(_limit(file) + 1)
                    yield _document(file, file.name, 0, {"text": text}, "text", file.size)
    except DAMAGED as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise
        raise TokensError(f"{file.name}: the file is damaged or not what its name says: {one_line(e)}") from e


def _stream(file: SourceFile, raw: IO[bytes]) -> io.BufferedReader:
    """Arrow's streams notice a compressed file that ends too early, zstandard's do not."""
    kind = _COMPRESSIONS.get(file.path.rpartition(".")[2])
    return io.BufferedReader(pa.CompressedInputStream(raw, kind) if kind else raw)  # pyright: ignore[reportArgumentType]


def _limit(file: SourceFile) -> int:
    """Most bytes of one document."""
    compressed = file.path.endswith(tuple(_COMPRESSIONS)) or file.kind in ("parquet", "arrow")
    return document_limit(file.size) if compressed else MAX_DOCUMENT_BYTES


def _too_long(file: SourceFile) -> str:
    return f"one document of more than {_limit(file)} bytes in a file of {file.size}; cut it into several"


def _from_table(file: SourceFile, raw: IO[bytes], text_column: str, start: int) -> Iterator[Document]:
    rows = _parquet_rows if file.kind == "parquet" else _arrow_rows
    for record, batch, share in rows(file, raw, text_column, start):
        columns = {name: _checked(batch.column(name)) for name in batch.schema.names}
        for i in range(max(start - record, 0), batch.num_rows):
            row = {name: column[i].as_py() for name, column in columns.items() if name != IDS}
            if IDS in columns and row.get(text_column) is None:
                row[IDS] = columns[IDS][i].as_py()
            yield _document(file, f"{file.name}, record {record + i}", record + i, row, text_column, share)


_Rows = Iterator[tuple[int, pa.RecordBatch, float]]
"""The first record of a batch, the columns that are read, and each record's share of the file's bytes."""


def _parquet_rows(file: SourceFile, raw: IO[bytes], text_column: str, start: int) -> _Rows:
    """Records of the row groups that end after `start`; no batch decodes to more than it should."""
    table = pq.ParquetFile(raw, buffer_size=_READ_BYTES, pre_buffer=False)
    columns = _columns(file, table.schema_arrow.names, text_column)
    record = 0
    for group, claims in enumerate(group_claims(raw, table, columns, file.size)):
        if record + claims.rows > start:
            each = max(claims.largest, claims.items // max(claims.rows, 1), _DECODED_BYTES // BATCH_DOCUMENTS)
            for batch in table.iter_batches(max(1, _DECODED_BYTES // each), row_groups=[group], columns=columns):
                yield record, batch, file.size / table.metadata.num_rows
                record += batch.num_rows
        else:
            record += claims.rows


def _arrow_rows(file: SourceFile, raw: IO[bytes], text_column: str, start: int) -> _Rows:
    """The same of an arrow stream, which does not tell its length; the position in the file does as well."""
    check_messages(raw, file.size)
    raw.seek(0)
    reader = pa.ipc.open_stream(raw)
    columns = _columns(file, reader.schema.names, text_column)
    record = before = 0
    for batch in reader:
        share = (raw.tell() - before) / max(batch.num_rows, 1)
        before = raw.tell()
        if record + batch.num_rows > start:
            yield record, batch.select(columns), share
        record += batch.num_rows


def _columns(file: SourceFile, names: list[str], text_column: str) -> list[str]:
    wanted = list(dict.fromkeys((text_column, IDS, "source", "title")))
    if not {text_column, IDS} & set(names):
        raise TokensError(
            f"{file.name}: no column {text_column!r} or {IDS!r} among {', '.join(names)}; see --text-column"
        )
    for name in wanted:
        if names.count(name) > 1:
            raise TokensError(f"{file.name}: {names.count(name)} columns are called {name!r}; rename all but one")
    return [name for name in wanted if name in names]


def _checked(column: pa.Array) -> pa.Array:
    """The column with offsets that stay inside it, and strings as bytes: one that is no UTF-8 must not spoil others."""
    if isinstance(column, pa.DictionaryArray):
        return pa.DictionaryArray.from_arrays(column.indices, _checked(column.dictionary))
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.view(pa.binary() if pa.types.is_string(column.type) else pa.large_binary())
    column.validate(full=True)
    return column


def _from_lines(
    file: SourceFile, raw: IO[bytes], stream: io.BufferedReader, text_column: str, start: int
) -> Iterator[Document]:
    """A document for each line; of one that is too long no more than the limit is held."""
    record, before, limit = -1, 0, _limit(file)
    while line := stream.readline(limit):
        record += 1
        part = line
        while len(part) == limit and not part.endswith(b"\n"):
            line, part = b"", stream.readline(limit)
        size, before = raw.tell() - before, raw.tell()
        if record >= start and (line.strip() or not line):
            row, problem = _parsed(line, text_column) if line else ({}, _too_long(file))
            yield _document(file, f"{file.name}, line {record + 1}", record, row, text_column, size, problem)


def _parsed(line: bytes, text_column: str) -> tuple[dict[str, object], str]:
    """The object that a line holds, and what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        return {}, f"not JSON: {e}"
    if not isinstance(row, dict):
        return {}, f"JSON, but {type(row).__name__}, expected an object"
    if not {text_column, IDS} & row.keys():
        return {}, f"no field {text_column!r} or {IDS!r}; see --text-column"
    return row, ""


def _document(
    file: SourceFile, place: str, record: int, row: dict[str, object], text_column: str, size: float, problem: str = ""
) -> Document:
    """The document in a record: its text, or its ids where it has no text."""
    content: str | list[int] = ""
    if not problem:
        column = IDS if row.get(text_column) is None else text_column
        content, problem = _content(row.get(column), column, text_column)
        if isinstance(content, str) and len(content) > _limit(file):
            content, problem = "", _too_long(file)
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


def _content(value: object, column: str, text_column: str) -> tuple[str | list[int], str]:
    """Text or ids, and what is wrong with them."""
    if isinstance(value, (str, bytes)) and column != text_column:
        return "", f"{column} is text, expected a list of token ids; if it is the text, say --text-column {column}"
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
    if not set(map(type, value)) <= {int}:
        wrong = next(i for i in value if type(i) is not int)
        return "", f"{column} holds {wrong!r:.40}, expected token ids, which are whole numbers"
    return value, ""


def _label(value: object) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value or "")
    return text.encode(errors="replace").decode()
