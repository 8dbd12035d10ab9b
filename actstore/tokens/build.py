"""`tokenize`: documents to a committed token table.

Packed sequences go to a temporary spool first, because the keyed order needs their number; the table is then written
chunk by chunk, so memory stays at one chunk however much text there is. The spool takes 8 bytes per token.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from actstore import keyed
from actstore.errors import TokensError, mismatch
from actstore.progress import Progress, Step
from actstore.store.storage import Storage, open_storage
from actstore.tokens import sources as text
from actstore.tokens.config import TokenizeConfig
from actstore.tokens.pack import Packed, pack, special_ids
from actstore.tokens.rule import RowRule, kept
from actstore.tokens.table import (
    ARRAYS,
    ATTRIBUTE,
    DOCUMENTS_KEY,
    FORMAT_VERSION,
    GROUP_KEY,
    TokenTable,
    open_tokens,
)
from actstore.tokens.tokenizer import Tokenizer, load_tokenizer

CHUNK_TOKENS = 1 << 20
"""Tokens of a zarr chunk: 4 MiB of int32."""
_DOCUMENTS_SCHEMA = pa.schema(
    {
        "document": pa.int32(),
        "file": pa.string(),
        "record": pa.int64(),
        "source": pa.string(),
        "title": pa.string(),
    }
)


def tokenize(config: TokenizeConfig, progress: Progress) -> TokenTable:
    """Write the token table of `config`, or return it if it is there already.

    `TokensError` if text or tokenizer can't be used; `MismatchError` if another table is at `config.out`.
    """
    storage = open_storage(config.out)
    files = text.list_files(config.sources)
    tokenizer = load_tokenizer(config.tokenizer)
    settings: dict[str, Any] = {
        "seq_len": config.seq_len,
        "seed": config.seed,
        "text_column": config.text_column,
        "tokenizer": tokenizer.name,
        "tokenizer_digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "sources": text.identities(files),
    }
    if storage.exists(GROUP_KEY):
        table = open_tokens(storage)
        found = {name: getattr(table, name) for name in settings}
        if found != settings:
            raise mismatch(f"the token table at {storage.url}", found, settings, "Use another --out.")
        return table
    with tempfile.TemporaryDirectory(prefix="actstore-tokens-") as folder:
        step = progress.step("tokenize", total=sum(f.size for f in files), unit="B")
        spool = Path(folder)
        sequences = _spool(spool, files, tokenizer, config, step)
        if not sequences:
            raise TokensError(f"{', '.join(config.sources)}: no text found, so there is nothing to write")
        _write(storage, spool, sequences, settings, progress)
    return open_tokens(storage)


def _spool(spool: Path, files: list[text.SourceFile], tokenizer: Tokenizer, config: TokenizeConfig, step: Step) -> int:
    """Pack every document into the spool files; return the number of sequences."""
    sequences = 0
    with (
        pq.ParquetWriter(spool / DOCUMENTS_KEY, _DOCUMENTS_SCHEMA) as names,
        (spool / "ids").open("wb") as ids_file,
        (spool / "document").open("wb") as documents_file,
    ):
        encoded = _encoded(files, tokenizer, config, names, step)
        for ids, documents in pack(encoded, tokenizer, config.seq_len):
            ids_file.write(ids.tobytes())
            documents_file.write(documents.tobytes())
            sequences += len(ids)
    return sequences


def _encoded(
    files: list[text.SourceFile], tokenizer: Tokenizer, config: TokenizeConfig, names: pq.ParquetWriter, step: Step
) -> Iterator[list[list[int]]]:
    """The documents' ids, batch by batch; documents are numbered and named on the way."""
    number = 0
    for file in files:
        for batch in text.batches(file, config.text_column):
            texts = [d.content for d in batch if isinstance(d.content, str)]
            encoded = iter(tokenizer.encode(texts))
            yield [next(encoded) if isinstance(d.content, str) else _ready(d, tokenizer) for d in batch]
            columns: list[list[Any]] = [
                list(range(number, number + len(batch))),
                [d.file for d in batch],
                [d.record for d in batch],
                [d.source for d in batch],
                [d.title for d in batch],
            ]
            names.write_table(pa.table(columns, schema=_DOCUMENTS_SCHEMA))
            number += len(batch)
            step.advance(sum(d.size for d in batch))


def _ready(document: text.Document, tokenizer: Tokenizer) -> list[int]:
    ids = document.content
    assert isinstance(ids, list)
    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
        raise TokensError(
            f"{document.file}, record {document.record}: input_ids are {min(ids)}..{max(ids)}, but {tokenizer.name} "
            f"has {tokenizer.vocab_size} ids; name the tokenizer that made them"
        )
    return ids


def _write(storage: Storage, spool: Path, sequences: int, settings: dict[str, Any], progress: Progress) -> None:
    seq_len = settings["seq_len"]
    rule = RowRule(ids=special_ids(settings["bos_id"], settings["eos_id"], settings["pad_id"]))
    packed = {name: np.memmap(spool / name, np.int32, "r", shape=(sequences, seq_len)) for name in ARRAYS}
    order_key = keyed.key(settings["seed"], "sequences")
    rows = max(1, CHUNK_TOKENS // seq_len)
    chunks = [slice(start, min(start + rows, sequences)) for start in range(0, sequences, rows)]
    step = progress.step("write", total=sequences, unit="sequences")
    tokens = max_id = 0

    def ordered() -> Iterator[Packed]:
        nonlocal tokens, max_id
        for chunk in chunks:
            order = keyed.invert(np.arange(chunk.start, chunk.stop), sequences, order_key)
            ids, documents = packed["ids"][order], packed["document"][order]
            tokens += int(kept(ids, rule).sum())
            max_id = max(max_id, int(ids.max()))
            yield ids, documents
            step.advance(len(ids))

    digest = fingerprint(_put_arrays(storage, ordered(), chunks, (sequences, seq_len)), settings)
    if not tokens:
        raise TokensError("the documents hold no token but special ones, so there is nothing to write")
    storage.put(DOCUMENTS_KEY, (spool / DOCUMENTS_KEY).read_bytes())
    attributes = {"format_version": FORMAT_VERSION, "fingerprint": digest, "sequences": sequences, "tokens": tokens}
    attributes |= {"max_id": max_id, **settings}
    group = {"zarr_format": 3, "node_type": "group", "attributes": {ATTRIBUTE: attributes}}
    storage.put(GROUP_KEY, json.dumps(group, indent=2).encode())


def _put_arrays(
    storage: Storage, blocks: Iterable[Packed], chunks: list[slice], shape: tuple[int, int]
) -> Iterator[Packed]:
    """Write both arrays chunk by chunk through zarr-python, and pass the blocks on."""
    objects: dict[str, Any] = {}
    arrays = {
        name: zarr.create_array(
            MemoryStore(objects),
            name=name,
            shape=shape,
            chunks=(chunks[0].stop, shape[1]),
            dtype="int32",
            compressors=[ZstdCodec(level=3), Crc32cCodec()],
            dimension_names=["sequence", "position"],
            config={"write_empty_chunks": True},
        )
        for name in ARRAYS
    }
    for chunk, block in zip(chunks, blocks, strict=True):
        for name, values in zip(ARRAYS, block, strict=True):
            arrays[name][chunk] = values
        for key in [k for k in objects if k != GROUP_KEY]:
            storage.put(key, objects.pop(key).to_bytes())
        yield block


def fingerprint(blocks: Iterable[Packed], settings: dict[str, Any]) -> str:
    """BLAKE2b-128 over the special ids, all token ids and all document numbers, however they are cut into blocks."""
    ids_hash, documents_hash = hashlib.blake2b(), hashlib.blake2b()
    for ids, documents in blocks:
        ids_hash.update(_little(ids))
        documents_hash.update(_little(documents))
    fixed = json.dumps([settings[name] for name in ("seq_len", "bos_id", "eos_id", "pad_id")])
    return hashlib.blake2b(fixed.encode() + ids_hash.digest() + documents_hash.digest(), digest_size=16).hexdigest()


def _little(values: NDArray[np.int32]) -> bytes:
    return values.astype("<i4", copy=False).tobytes()
