"""Documents out of files: parquet, arrow, jsonl and plain text, local or anywhere fsspec reaches.

Files are streamed in a fixed order (arguments as given, directories sorted), so document numbers are reproducible.
Arrow files are what `datasets.save_to_disk` writes; they are read with pyarrow, so `datasets` is not needed. A plain
text file is one document, whatever blank lines it has.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.compression import compr
from fsspec.utils import infer_compression

from actstore.builtin import TEXTS
from actstore.errors import TokensError

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")
BATCH_DOCUMENTS, BATCH_CHARS = 1024, 1 << 20
"""A batch of documents is encoded in parallel and ends at whichever comes first."""
MAX_LISTED = 1000
"""Files that a token table names one by one."""
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class SourceFile:
    """One file of text."""

    fs: Any
    path: str
    name: str
    """Path below the argument that named it; never a machine's own path."""
    size: int

    def identity(self) -> dict[str, Any]:
        """Name, bytes, and a digest of the file's first and last 64 KiB: enough to notice another file."""
        head = self.fs.cat_file(self.path, start=0, end=_SAMPLE_BYTES)
        tail = self.fs.cat_file(self.path, start=max(0, self.size - _SAMPLE_BYTES), end=self.size)
        digest = hashlib.blake2b(head + tail, digest_size=16).hexdigest()
        return {"name": self.name, "bytes": self.size, "sample": digest}


@dataclass(frozen=True)
class Document:
    """One document: text, or ids that are ready."""

    file: str
    record: int
    """Index in its file."""
    source: str
    title: str
    content: str | list[int]
    size: float
    """Its share of the file's bytes, for progress."""


def list_files(sources: tuple[str, ...]) -> list[SourceFile]:
    """Every file behind the arguments, in reading order; `TokensError` if one is missing or of no known kind."""
    files: list[SourceFile] = []
    for source in sources:
        fs, root = fsspec.core.url_to_fs(str(TEXTS.get(source, source)))
        root = str(root).rstrip("/")
        if fs.isfile(root):
            paths, base = [root], root.rpartition("/")[0]
        elif fs.isdir(root):
            paths, base = sorted(p for p in fs.find(root) if p.endswith(SUFFIXES)), root
        else:
            raise TokensError(f"{source}: no such file or directory")
        if not paths or not all(p.endswith(SUFFIXES) for p in paths):
            raise TokensError(f"{source}: no text in a known form; expected {', '.join(SUFFIXES)}")
        files += [SourceFile(fs, p, p[len(base) :].lstrip("/"), int(fs.size(p))) for p in paths]
    return files


def identities(files: list[SourceFile]) -> list[dict[str, Any]]:
    """What a token table records of its sources: every file, or one digest for all where there are very many."""
    each = [file.identity() for file in files]
    if len(each) <= MAX_LISTED:
        return each
    digest = hashlib.blake2b(json.dumps(each).encode(), digest_size=16).hexdigest()
    return [{"name": f"{len(each)} files", "bytes": sum(f.size for f in files), "sample": digest}]


def batches(file: SourceFile, text_column: str) -> Iterator[list[Document]]:
    """The file's documents in order, in batches small enough to encode at once."""
    batch: list[Document] = []
    chars = 0
    for document in _documents(file, text_column):
        batch.append(document)
        chars += len(document.content)
        if len(batch) == BATCH_DOCUMENTS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _documents(file: SourceFile, text_column: str) -> Iterator[Document]:
    try:
        if file.path.endswith((".parquet", ".arrow")):
            yield from _from_table(file, text_column)
        elif ".jsonl" in file.path.rpartition("/")[2]:
            yield from _from_jsonl(file, text_column)
        else:
            with _open(file) as f:
                yield Document(file.name, 0, file.name, "", f.read().decode(), file.size)
    except (pa.ArrowException, UnicodeDecodeError, EOFError) as e:
        raise TokensError(f"{file.name}: the file is damaged or not what its name says: {e}") from e


def _open(file: SourceFile) -> Any:
    raw = file.fs.open(file.path, "rb")
    kind = infer_compression(file.path)
    openers: dict[Any, Any] = compr
    return openers[kind](raw, mode="rb") if kind else raw


def _from_table(file: SourceFile, text_column: str) -> Iterator[Document]:
    record = 0
    with file.fs.open(file.path, "rb") as f:
        if file.path.endswith(".parquet"):
            table = pq.ParquetFile(f)
            content, columns = _columns(file, table.schema_arrow.names, text_column)
            record_batches = table.iter_batches(BATCH_DOCUMENTS, columns=columns)
            total = table.metadata.num_rows
        else:
            reader = pa.ipc.open_stream(f)
            content, columns = _columns(file, reader.schema.names, text_column)
            record_batches = (b.select(columns) for b in reader)
            total = 0  # a stream does not tell its length; the position in the file does as well
        before = 0
        for batch in record_batches:
            share = file.size / total if total else (f.tell() - before) / max(batch.num_rows, 1)
            before = 0 if total else f.tell()
            for row in batch.to_pylist():
                yield _document(file, record, row, content, share)
                record += 1


def _columns(file: SourceFile, names: list[str], text_column: str) -> tuple[str, list[str]]:
    content = text_column if text_column in names else "input_ids"
    if content not in names:
        raise TokensError(
            f"{file.name}: no column {text_column!r} or 'input_ids' among {', '.join(names)}; see --text-column"
        )
    return content, [content, *(c for c in ("source", "title") if c in names and c != content)]


def _from_jsonl(file: SourceFile, text_column: str) -> Iterator[Document]:
    with _open(file) as f:
        for record, line in enumerate(f):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as e:
                raise TokensError(f"{file.name}, line {record + 1}: not JSON: {e}") from e
            if not isinstance(row, dict) or not ({text_column, "input_ids"} & row.keys()):
                raise TokensError(f"{file.name}, line {record + 1}: no field {text_column!r}; see --text-column")
            yield _document(file, record, row, text_column if text_column in row else "input_ids", len(line))


def _document(file: SourceFile, record: int, row: dict[str, Any], content: str, size: float) -> Document:
    value = row[content]
    if value is None:
        value = ""
    ready = isinstance(value, list) and all(isinstance(i, int) for i in value)
    if not ready and not isinstance(value, str):
        raise TokensError(
            f"{file.name}, record {record}: {content} is {type(value).__name__}, expected text or token ids"
        )
    source, title = row.get("source"), row.get("title")
    return Document(file.name, record, str(source or file.name), str(title or ""), value, size)
