"""The token table: a zarr v3 group of three int32 arrays, and the parquet file that names the documents.

Order of writing is the commit protocol: arrays, then `documents.parquet`, then the group's own `zarr.json`. A table
without that last object does not exist. Everything that is read is checked before it takes memory: attributes field by
field, arrays and chunks as `arrays.py` says, the parquet file by the sizes of its pages.
"""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import Annotated

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actstore.errors import IntegrityError, MissingError, TokensError
from actstore.store.storage import LocalStorage, Storage, open_storage
from actstore.tokens.arrays import CRC_BYTES, TableArray, open_array
from actstore.tokens.claims import DAMAGED, decoded_limit, group_claims
from actstore.tokens.config import MAX_SEQ_LEN, MIN_SEQ_LEN, Packing
from actstore.tokens.ordered import in_order
from actstore.tokens.rule import RowRule
from actstore.tokens.tokenizer import one_line

ATTRIBUTE = "actstore_tokens"
FORMAT_VERSION = 1
GROUP_KEY, DOCUMENTS_KEY = "zarr.json", "documents.parquet"
MAX_SEQUENCES = (1 << 31) - 1
"""Rows name their sequence in an int32."""
DOCUMENT_COLUMNS = pa.schema(
    {
        "document": pa.int32(),
        "file": pa.string(),
        "record": pa.int64(),
        "source": pa.string(),
        "title": pa.string(),
    }
)
COUNTS = ("skipped", "left_out", "special", "empty_files", "unread", "repeated")
"""Attributes that count what is not in the table, or only once."""
_MAKE_ONE = "make one with: actstore tokenize TEXT --tokenizer T --out URL"
_MAX_GROUP_BYTES, _MAX_DOCUMENTS_BYTES = 1 << 23, 1 << 31
_COPIES = 16
"""Objects that are copied at a time."""
Natural = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """What the group says about a table."""

    fingerprint: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
    """BLAKE2b-128 of ids, documents, special ids and row rule: what a store's provenance names."""
    seq_len: Annotated[int, msgspec.Meta(ge=MIN_SEQ_LEN, le=MAX_SEQ_LEN)]
    sequences: Annotated[int, msgspec.Meta(ge=1, le=MAX_SEQUENCES)]
    tokens: Annotated[int, msgspec.Meta(ge=1)]
    """Rows: positions that are kept."""
    max_id: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    """The greatest token id: a model needs a vocabulary above it."""
    vocab_size: Annotated[int, msgspec.Meta(ge=1)]
    """The tokenizer's, added tokens included."""
    tokenizer: str
    tokenizer_digest: str
    """See `Tokenizer.digest`."""
    bos_id: Natural | None
    eos_id: Natural | None
    pad_id: Natural | None
    seed: int
    sources: list[dict[str, str | int]] = field(repr=False)
    text_column: str
    packing: Packing = "joined"
    bos: bool = True
    """Whether packing put BOS first, if there is one."""
    skip_first: Natural = 0
    skip_ids: tuple[Natural, ...] = ()
    skipped: Natural = 0
    """Malformed documents that were left out."""
    left_out: Natural = 0
    """Tokens of an incomplete last sequence, which are not in the table because nothing could pad it."""
    special: Natural = 0
    """BOS, EOS and padding found in `input_ids`: never rows, and in the table only with packing `ready`."""
    empty_files: Natural = 0
    """Source files in which no document held text."""
    unread: Natural = 0
    """Files in the sources' directories that are not read: of no known form, hidden, temporary, or of other tables."""
    unread_first: tuple[str, ...] = ()
    """Names of the first of them."""
    repeated: Natural = 0
    """Source files that were named more than once; each is read once."""


@dataclass(frozen=True, kw_only=True)
class TokenTable(Attributes):
    """A committed token table; reads are independent of each other and thread-safe."""

    storage: Storage = field(repr=False, compare=False)
    prefix: str = field(default="", repr=False, compare=False)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """BOS, EOS and padding, ascending."""
        return tuple(sorted({i for i in (self.bos_id, self.eos_id, self.pad_id) if i is not None}))

    @property
    def rule(self) -> RowRule:
        """Which positions are rows."""
        return RowRule(ids=self.skip_ids, first_positions=self.skip_first)

    def summary(self) -> dict[str, object]:
        """What the table holds, what it leaves out and why."""
        figures: dict[str, object] = {n: getattr(self, n) for n in ("sequences", "seq_len", "tokens", *COUNTS)}
        return figures | {"unread_first": ", ".join(self.unread_first), "fingerprint": self.fingerprint}

    def ids(self, start: int, stop: int) -> NDArray[np.int32]:
        """Token ids of sequences [start, stop): [n, seq_len]."""
        ids = self._read("ids", start, stop)
        if ids.size and not 0 <= ids.min() <= ids.max() <= self.max_id:
            raise IntegrityError(
                f"{self._where('ids')}: ids are {ids.min()} to {ids.max()}, expected 0 to {self.max_id}"
            )
        return ids

    def documents(self, start: int, stop: int) -> NDArray[np.int32]:
        """Document numbers of sequences [start, stop), -1 at BOS and EOS, -2 at padding: [n, seq_len]."""
        return self._read("document", start, stop)

    def row_counts(self) -> NDArray[np.int32]:
        """Rows in each sequence [sequences]."""
        counts = self._read("rows", 0, self.sequences)
        found = int(counts.sum(dtype=np.int64)), int(counts.min()), int(counts.max())
        if found[0] != self.tokens or found[1] < 0 or found[2] > self.seq_len:
            raise IntegrityError(
                f"{self._where('rows')}: sequences of {found[1]} to {found[2]} rows, {found[0]} in all, expected 0 to "
                f"{self.seq_len} and {self.tokens}; make the table again"
            )
        return counts

    def document_names(self) -> pa.Table:
        """Columns document, file, record, source, title; one row per document."""
        data = self.storage.get(self.prefix + DOCUMENTS_KEY, _MAX_DOCUMENTS_BYTES)
        try:
            file = pq.ParquetFile(
                pa.BufferReader(data), read_dictionary=["file", "source", "title"], page_checksum_verification=True
            )
            names, raw = DOCUMENT_COLUMNS.names, io.BytesIO(data)
            claimed = sum(claims.total for claims in group_claims(raw, file, names, len(data)))
            claimed += 24 * file.metadata.num_rows  # a number, or a place in a dictionary, for each column
            if file.schema_arrow.names != names or claimed > decoded_limit(len(data)):
                raise ValueError(f"{claimed} bytes of {', '.join(file.schema_arrow.names)}")
            return file.read()
        except DAMAGED as e:
            raise IntegrityError(f"{self._where(DOCUMENTS_KEY)} is damaged: {one_line(e)}; make it again") from e

    def objects(self) -> Iterator[tuple[str, TableArray | None]]:
        """Keys of all objects but the group, without prefix, and the array that an object is a chunk of."""
        for array in self._arrays.values():
            yield array.metadata_key, None
            for i in range(array.num_chunks):
                yield array.chunk_key(i), array
        yield DOCUMENTS_KEY, None

    @cached_property
    def _arrays(self) -> dict[str, TableArray]:
        whole = self.sequences, self.seq_len
        shapes = {"ids": whole, "document": whole, "rows": whole[:1]}
        return {name: open_array(self.storage, self.prefix, name, shape) for name, shape in shapes.items()}

    def _where(self, key: str) -> str:
        return f"{self.storage.url}: {self.prefix}{key}"

    def _read(self, name: str, start: int, stop: int) -> NDArray[np.int32]:
        if not 0 <= start <= stop <= self.sequences:
            raise ValueError(f"sequences [{start}, {stop}) are not within [0, {self.sequences})")
        array = self._arrays[name]
        out = np.empty((stop - start, *array.shape[1:]), np.int32)
        for first in range(start - start % array.chunk_rows, stop, array.chunk_rows):
            key = array.chunk_key(first // array.chunk_rows)
            chunk = array.decode(self.storage.get(self.prefix + key, array.max_stored), self._where(key))
            begin, end = max(start, first), min(stop, first + array.chunk_rows)
            out[begin - start : end - start] = chunk[begin - first : end - first]
        return out


DEFAULTS: dict[str, object] = {f.name: f.default for f in fields(Attributes) if f.default is not MISSING}
"""Attributes that a table does not name where they have these values; tables older than an attribute read so too."""


def open_tokens(source: str | Storage, prefix: str = "") -> TokenTable:
    """Open a committed token table at a URL, or below `prefix` (ending in '/') of a storage.

    `TokensError` says what was found instead.
    """
    storage = open_storage(source) if isinstance(source, str) else source
    try:
        raw = storage.get(prefix + GROUP_KEY, _MAX_GROUP_BYTES)
    except MissingError as e:
        raise TokensError(f"{storage.url}: {_what_is_there(storage)}, not a token table; {_MAKE_ONE}") from e
    try:
        attributes = json.loads(raw)["attributes"]
        data = attributes.get(ATTRIBUTE)
    except (ValueError, RecursionError, TypeError, LookupError, AttributeError) as e:
        raise TokensError(f"{storage.url}: {prefix}{GROUP_KEY} is not a zarr group's metadata; {_MAKE_ONE}") from e
    if data is None and "actstore" in attributes:
        raise TokensError(f"{storage.url}: this is an activation store; its token table is at {storage.url}/tokens")
    if not isinstance(data, dict):
        raise TokensError(f"{storage.url}: a zarr group without {ATTRIBUTE!r}, not a token table; {_MAKE_ONE}")
    return TokenTable(**vars(_checked(data, f"{storage.url}: {ATTRIBUTE}")), storage=storage, prefix=prefix)


def _checked(data: dict[str, object], where: str) -> Attributes:
    """The attributes; `TokensError` for those of another version, or that can't be."""
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise TokensError(
            f"{where}: format version is {version!r}, this actstore reads {FORMAT_VERSION}; update actstore"
        )
    values = DEFAULTS | {k: v for k, v in data.items() if k != "format_version"}
    names = {f.name for f in fields(Attributes)}
    if values.keys() != names:
        raise TokensError(f"{where}: fields are {sorted(values)}, expected {sorted(names)}")
    try:
        return msgspec.convert(values, Attributes)
    except msgspec.ValidationError as e:
        name = re.split(r"\W+", str(e).rpartition("$.")[2])[0]
        raise TokensError(f"{where}: {name} is {values.get(name)!r:.200}, which can't be; the table is damaged") from e


def _what_is_there(storage: Storage) -> str:
    if not isinstance(storage, LocalStorage):
        return "no zarr group there"
    root = storage.root
    if root.is_file():
        return "a file"
    if not root.is_dir():
        return "no such directory"
    kinds = sorted({p.suffix or "other" for p in root.iterdir()})
    return f"a directory of {', '.join(kinds[:4])} files" if kinds else "an empty directory"


def copy_tokens(table: TokenTable, storage: Storage, prefix: str = "tokens") -> TokenTable:
    """Copy a table below `prefix` of another storage, unless it is there already; return the copy.

    A copy that was interrupted goes on: chunks that are there, with equal size and checksum, are not copied again.
    `IntegrityError` if a chunk is damaged.
    """
    prefix = prefix.strip("/")
    group = f"{prefix}/{GROUP_KEY}"
    if storage.exists(group):
        copy = open_tokens(storage, f"{prefix}/")
        if copy.fingerprint != table.fingerprint:
            raise TokensError(
                f"{storage.url}: {prefix}/ holds another token table ({copy.fingerprint}); use another --out"
            )
        return copy
    present = storage.list(prefix)

    def put(item: tuple[str, TableArray | None]) -> None:
        key, array = item
        source, target = table.prefix + key, f"{prefix}/{key}"
        size = present.get(target, 0)
        if array and CRC_BYTES < size == table.storage.size(source):
            at = size - CRC_BYTES, CRC_BYTES
            if storage.get_range(target, *at) == table.storage.get_range(source, *at):
                return
        data = table.storage.get(source, array.max_stored if array else _MAX_DOCUMENTS_BYTES)
        if array:
            array.checked(data, f"{table.storage.url}: {source}")
        storage.put(target, data)

    for _ in in_order(put, table.objects(), threads=_COPIES, ahead=2 * _COPIES):
        pass
    storage.put(group, table.storage.get(table.prefix + GROUP_KEY, _MAX_GROUP_BYTES))
    return open_tokens(storage, f"{prefix}/")
