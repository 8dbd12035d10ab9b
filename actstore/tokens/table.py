"""The token table: a zarr v3 group of two int32 arrays, and the parquet file that names the documents.

Order of writing is the commit protocol: arrays, then `documents.parquet`, then the group's own `zarr.json`. A table
without that last object does not exist. Everything read is checked: attributes field by field, array metadata against
them, chunks by their crc32c.
"""

import json
import re
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from actstore.errors import IntegrityError, StoreError, TokensError
from actstore.store.storage import LocalStorage, Storage, open_storage
from actstore.tokens.config import Packing
from actstore.tokens.pack import special_ids
from actstore.tokens.rule import RowRule

ATTRIBUTE = "actstore_tokens"
FORMAT_VERSION = 1
GROUP_KEY, DOCUMENTS_KEY = "zarr.json", "documents.parquet"
ARRAYS = ("ids", "document")
MAKE_ONE = "make one with: actstore tokenize TEXT --tokenizer T --out URL"
_CODECS = {"bytes", "zstd", "crc32c"}
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """A committed token table; reads are independent of each other and thread-safe."""

    fingerprint: str
    """BLAKE2b-128 of ids, documents, special ids and row rule: what a store's provenance names."""
    seq_len: int
    sequences: int
    tokens: int
    """Rows: positions that `rule` keeps."""
    max_id: int
    """The greatest token id: a model needs a vocabulary above it."""
    vocab_size: int
    """The tokenizer's, added tokens included."""
    tokenizer: str
    tokenizer_digest: str
    """See `Tokenizer.digest`."""
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    seed: int
    sources: list[dict[str, Any]] = field(repr=False)
    text_column: str
    packing: Packing = "joined"
    bos: bool = True
    """Whether packing put BOS first, if there is one."""
    skip_first: int = 0
    skip_ids: tuple[int, ...] = ()
    skipped: int = 0
    """Malformed documents that were left out."""
    left_out: int = 0
    """Tokens of an incomplete last sequence, which are not in the table because nothing could pad it."""
    storage: Storage = field(repr=False, compare=False)
    prefix: str = field(default="", repr=False, compare=False)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """BOS, EOS and padding."""
        return special_ids(self.bos_id, self.eos_id, self.pad_id)

    @property
    def rule(self) -> RowRule:
        """Which positions are rows."""
        return RowRule(ids=(*self.special_ids, *self.skip_ids), first_positions=self.skip_first)

    def ids(self, start: int, stop: int) -> NDArray[np.int32]:
        """Token ids of sequences [start, stop): [n, seq_len]."""
        return self._read("ids", start, stop)

    def documents(self, start: int, stop: int) -> NDArray[np.int32]:
        """Document numbers of sequences [start, stop), -1 at special tokens: [n, seq_len]."""
        return self._read("document", start, stop)

    def document_names(self) -> pa.Table:
        """Columns document, file, record, source, title; one row per document."""
        return pq.read_table(pa.BufferReader(self.storage.get(self.prefix + DOCUMENTS_KEY)))

    def keys(self) -> list[str]:
        """The table's objects in the order in which to write them, the commit last; without prefix."""
        arrays = [f"{name}/{GROUP_KEY}" for name in ARRAYS]
        chunks = [
            f"{name}/c/{i}/0" for name in ARRAYS for i in range(-(-self.sequences // self._metadata[name]["chunk"]))
        ]
        return [*arrays, *chunks, DOCUMENTS_KEY, GROUP_KEY]

    @cached_property
    def _metadata(self) -> dict[str, dict[str, Any]]:
        return {name: _array_metadata(self, name) for name in ARRAYS}

    def _read(self, name: str, start: int, stop: int) -> NDArray[np.int32]:
        if not 0 <= start <= stop <= self.sequences:
            raise ValueError(f"sequences [{start}, {stop}) are not within [0, {self.sequences})")
        if start == stop:
            return np.empty((0, self.seq_len), np.int32)
        metadata = self._metadata[name]
        keys = [GROUP_KEY] + [
            f"c/{i}/0" for i in range(start // metadata["chunk"], (stop - 1) // metadata["chunk"] + 1)
        ]
        buffer = default_buffer_prototype().buffer
        objects = {
            key: buffer.from_bytes(metadata["json"] if key == GROUP_KEY else self._get(f"{name}/{key}")) for key in keys
        }
        try:
            array = zarr.open_array(MemoryStore(objects), mode="r")
            return np.ascontiguousarray(array[start:stop], np.int32)
        except (ValueError, RuntimeError) as e:
            raise IntegrityError(f"{self.storage.url}: {self.prefix}{name} is damaged: {e}; make it again") from e

    def _get(self, key: str) -> bytes:
        return self.storage.get(self.prefix + key)


DEFAULTS: dict[str, Any] = {
    f.name: f.default for f in fields(TokenTable) if f.default is not MISSING and f.name != "prefix"
}
"""Attributes that a table does not name where they have these values; tables older than an attribute read so too."""


def _array_metadata(table: TokenTable, name: str) -> dict[str, Any]:
    raw = table.storage.get(f"{table.prefix}{name}/{GROUP_KEY}")
    where = f"{table.storage.url}: {table.prefix}{name}/{GROUP_KEY}"
    try:
        data = json.loads(raw)
        shape, chunk = data["shape"], data["chunk_grid"]["configuration"]["chunk_shape"]
        codecs = {c["name"] for c in data["codecs"]}
        dtype = data["data_type"]
    except (ValueError, TypeError, KeyError) as e:
        raise TokensError(f"{where} is damaged: {e!r}") from e
    expected = [table.sequences, table.seq_len]
    if shape != expected or dtype != "int32" or not codecs <= _CODECS:
        raise TokensError(f"{where}: found {dtype} {shape} with {sorted(codecs)}, expected int32 {expected}")
    if not isinstance(chunk, list) or len(chunk) != 2 or chunk[1] != table.seq_len or not _whole(chunk[0], 1):
        raise TokensError(f"{where}: chunks are {chunk!r}, expected [n, {table.seq_len}]")
    return {"chunk": chunk[0], "json": raw}


def open_tokens(source: str | Storage, prefix: str = "") -> TokenTable:
    """Open a committed token table at a URL, or below `prefix` (ending in '/') of a storage.

    `TokensError` says what was found instead.
    """
    storage = open_storage(source) if isinstance(source, str) else source
    try:
        raw = storage.get(prefix + GROUP_KEY)
    except StoreError as e:
        raise TokensError(f"{storage.url}: {_what_is_there(storage)}, not a token table; {MAKE_ONE}") from e
    try:
        attributes = json.loads(raw)["attributes"]
        data = attributes.get(ATTRIBUTE)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise TokensError(f"{storage.url}: {prefix}{GROUP_KEY} is not a zarr group's metadata; {MAKE_ONE}") from e
    if data is None and "actstore" in attributes:
        raise TokensError(f"{storage.url}: this is an activation store; its token table is at {storage.url}/tokens")
    if not isinstance(data, dict):
        raise TokensError(f"{storage.url}: a zarr group without {ATTRIBUTE!r}, not a token table; {MAKE_ONE}")
    return TokenTable(**_checked(data, f"{storage.url}: {ATTRIBUTE}"), storage=storage, prefix=prefix)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _checked(data: dict[str, Any], where: str) -> dict[str, Any]:
    if data.get("format_version") != FORMAT_VERSION:
        found = data.get("format_version")
        raise TokensError(
            f"{where}: format version is {found!r}, this actstore reads {FORMAT_VERSION}; update actstore"
        )
    values = DEFAULTS | {k: v for k, v in data.items() if k != "format_version"}
    names = {f.name for f in fields(TokenTable)} - {"storage", "prefix"}
    if values.keys() != names:
        raise TokensError(f"{where}: fields are {sorted(values)}, expected {sorted(names)}")
    checks = {
        **{name: _whole(values[name], 1) for name in ("sequences", "tokens", "vocab_size")},
        "seq_len": _whole(values["seq_len"], 2),
        "max_id": _whole(values["max_id"], 0) and values["max_id"] < 1 << 31,
        "seed": _whole(values["seed"], -(1 << 63)),
        **{name: values[name] is None or _whole(values[name], 0) for name in ("bos_id", "eos_id", "pad_id")},
        **{name: isinstance(values[name], str) for name in ("tokenizer", "tokenizer_digest", "text_column")},
        "fingerprint": isinstance(values["fingerprint"], str) and bool(_FINGERPRINT.fullmatch(values["fingerprint"])),
        "packing": values["packing"] in get_args(Packing),
        "bos": isinstance(values["bos"], bool),
        "skip_ids": isinstance(values["skip_ids"], (list, tuple)) and all(_whole(i, 0) for i in values["skip_ids"]),
        **{name: _whole(values[name], 0) for name in ("skip_first", "skipped", "left_out")},
        "sources": isinstance(values["sources"], list) and all(isinstance(s, dict) for s in values["sources"]),
    }
    for name, good in checks.items():
        if not good:
            raise TokensError(f"{where}: {name} is {values[name]!r}, which can't be; the table is damaged")
    return values | {"skip_ids": tuple(values["skip_ids"])}


def _what_is_there(storage: Storage) -> str:
    if not isinstance(storage, LocalStorage):
        return "no zarr group there"
    root: Path = storage.root
    if root.is_file():
        return "a file"
    if not root.is_dir():
        return "no such directory"
    kinds = sorted({p.suffix or "other" for p in root.iterdir()})
    return f"a directory of {', '.join(kinds[:4])} files" if kinds else "an empty directory"


def copy_tokens(table: TokenTable, storage: Storage, prefix: str = "tokens") -> TokenTable:
    """Copy a table below `prefix` of another storage, unless it is there already; return the copy."""
    prefix = f"{prefix.strip('/')}/"
    if storage.exists(prefix + GROUP_KEY):
        copy = open_tokens(storage, prefix)
        if copy.fingerprint != table.fingerprint:
            raise TokensError(
                f"{storage.url}: {prefix} holds another token table ({copy.fingerprint}); use another --out"
            )
        return copy
    for key in table.keys():  # noqa: SIM118  a list of objects, not a mapping
        storage.put(prefix + key, table.storage.get(table.prefix + key))
    return open_tokens(storage, prefix)
