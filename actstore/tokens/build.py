"""`tokenize`: documents to a committed token table.

Packed tokens go to a spool first, because the keyed order needs the number of sequences; the table is then written
chunk by chunk. So memory stays at a few batches of documents and a few chunks, however much text there is, and a run
that was killed goes on from the spool. A batch is encoded by the tokenizer's own threads while the next one is read and
the last one packed; chunks are compressed and put side by side. Order and result don't depend on threads.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore import keyed
from actstore.errors import TokensError, mismatch
from actstore.progress import Progress
from actstore.store.storage import Storage, open_storage
from actstore.tokens.arrays import TableArray
from actstore.tokens.config import TokenizeConfig
from actstore.tokens.documents import Document, batches
from actstore.tokens.ordered import in_order
from actstore.tokens.pack import Layout, Packed, framed, pack
from actstore.tokens.rule import PADDING, RowRule, kept
from actstore.tokens.sources import NAMED, SourceFile, Sources, find_sources, identities
from actstore.tokens.spool import Spool, State, open_spool
from actstore.tokens.table import (
    ATTRIBUTE,
    DEFAULTS,
    DOCUMENTS_KEY,
    FORMAT_VERSION,
    GROUP_KEY,
    TokenTable,
    open_tokens,
)
from actstore.tokens.tokenizer import Tokenizer, load_tokenizer

CHUNK_TOKENS = 1 << 20
"""Tokens of a zarr chunk: 4 MiB of int32."""
CHUNK_SEQUENCES = 1 << 22
"""Sequences whose row counts are one object of 16 MiB."""
CHECKPOINT_TOKENS = 1 << 22
"""Tokens after which the spool is saved: what a killed run does again at most."""
_WRITERS = 4
"""Chunks that are read, compressed and put at a time."""
_ORDER_AND_ROWS = ("seed", "skip_first", "skip_ids")
"""Settings that matter only when the table is written, not to the spool."""


def tokenize(config: TokenizeConfig, progress: Progress) -> TokenTable:
    """Write the token table of `config`, or return it if it is there already; go on where a killed run was.

    `TokensError` if text or tokenizer can't be used; `MismatchError` if another table is at `config.out`.
    """
    storage = open_storage(config.out)
    sources = find_sources(config.sources, storage)
    for line in sources.notes():
        progress.say(line)
    tokenizer = load_tokenizer(config.tokenizer)
    settings = _settings(config, sources.files, tokenizer)
    if storage.exists(GROUP_KEY):
        return _existing(storage, config, settings)
    spooled = {k: v for k, v in settings.items() if k not in _ORDER_AND_ROWS}
    with open_spool(storage, spooled, progress.say, may_skip=config.on_error == "skip") as spool:
        if not storage.exists(GROUP_KEY):
            layout = Layout(**{field.name: settings[field.name] for field in fields(Layout)})
            _fill(spool, sources.files, tokenizer, layout, config, progress)
            _write(storage, spool, layout, settings, sources, progress)
    table = _existing(storage, config, settings)
    if table.special:
        progress.say(f"{table.special} BOS, EOS and padding tokens in input_ids are no rows")
    if table.left_out:
        progress.say(
            f"{table.left_out} tokens are left out: their sequence is not full, and the tokenizer has no padding"
        )
    return table


def _settings(config: TokenizeConfig, files: list[SourceFile], tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that fixes the table, by the names of its attributes."""
    skip_ids = tuple(sorted(set(config.skip_ids)))
    if skip_ids and skip_ids[-1] >= tokenizer.vocab_size:
        raise ValueError(f"skip_ids holds {skip_ids[-1]}, but {tokenizer.name} has {tokenizer.vocab_size} ids")
    asked = ("seq_len", "seed", "packing", "bos", "skip_first", "text_column")
    made_with = ("vocab_size", "bos_id", "eos_id", "pad_id")
    return {
        **{name: getattr(config, name) for name in asked},
        "skip_ids": skip_ids,
        "tokenizer": tokenizer.name,
        "tokenizer_digest": tokenizer.digest,
        **{name: getattr(tokenizer, name) for name in made_with},
        "sources": identities(files),
    }


def _existing(storage: Storage, config: TokenizeConfig, settings: dict[str, Any]) -> TokenTable:
    table = open_tokens(storage)
    asked: dict[str, object] = {**settings, "on_error": config.on_error}
    found: dict[str, object] = {name: getattr(table, name) for name in settings}
    found["on_error"] = "skip" if table.skipped else config.on_error
    if found != asked:
        raise mismatch(f"the token table at {storage.url}", found, asked, "Use another --out.")
    return table


def _fill(
    spool: Spool,
    files: list[SourceFile],
    tokenizer: Tokenizer,
    layout: Layout,
    config: TokenizeConfig,
    progress: Progress,
) -> None:
    """Pack every document that is not in the spool yet into it."""
    state, unsaved = spool.state, 0
    step = progress.step("tokenize", total=sum(f.size for f in files), unit="B")
    step.skip(state.size)

    def encode(batch: tuple[State, list[Document]]) -> tuple[State, list[Document], list[list[int]]]:
        encoded = iter(tokenizer.encode([d.content for d in batch[1] if isinstance(d.content, str)]))
        return *batch, [next(encoded) if isinstance(d.content, str) else d.content for d in batch[1]]

    read = _batches(files, tokenizer, config, state, progress.say)
    for after, documents, encoded in in_order(encode, read, threads=1, ahead=1):
        given = [not isinstance(d.content, str) for d in documents]
        (ids, numbers), special = pack(encoded, given, state.documents, layout)
        after = replace(after, special=state.special + special)
        spool.append(ids, numbers, documents, state.documents)
        unsaved += ids.size
        if unsaved >= CHECKPOINT_TOKENS:
            spool.save(after)
            unsaved = 0
        if after.skipped:
            step.note(f"{after.skipped} malformed documents skipped")
        step.advance(after.size - state.size)
        state = after
    _finish(spool, replace(state, file=len(files), record=0), layout)


def _finish(spool: Spool, state: State, layout: Layout) -> None:
    """Save the spool as complete, its last sequence padded if it holds a token and something can pad it."""
    spool.save(state)
    tail = spool.tail(layout.body)
    if (tail >= 0).any() and layout.pad_id is not None:
        padding = np.full(layout.body - tail.size, layout.pad_id, np.int32)
        spool.append(padding, np.full_like(padding, PADDING), [], 0)
        spool.save(state)


def _batches(
    files: list[SourceFile], tokenizer: Tokenizer, config: TokenizeConfig, state: State, say: Callable[[str], None]
) -> Iterator[tuple[State, list[Document]]]:
    """What is left to do after `state`: batches without the malformed documents, and the state after each.

    A file without text ends in an empty batch, whose state counts it.
    """
    for index in range(state.file, len(files)):
        for read in batches(files[index], config.text_column, state.record):
            usable = [d for d in read if _usable(d, tokenizer, config)]
            state = replace(
                state,
                file=index,
                record=read[-1].record + 1,
                size=state.size + sum(d.size for d in read),
                documents=state.documents + len(usable),
                skipped=state.skipped + len(read) - len(usable),
                has_text=state.has_text or any(d.content for d in usable),
            )
            yield state, usable
        if not state.has_text:
            state = replace(state, empty_files=state.empty_files + 1)
            if state.empty_files <= NAMED:
                say(f"{files[index].name}: no document in it holds text")
            yield replace(state, file=index + 1, record=0), []
        state = replace(state, file=index + 1, record=0, has_text=False)


def _usable(document: Document, tokenizer: Tokenizer, config: TokenizeConfig) -> bool:
    """Whether the document is well formed; `TokensError` if it is not and such are not skipped."""
    problem = document.problem or _problem(document, tokenizer, config)
    if problem and config.on_error == "raise":
        raise TokensError(
            f"{document.place}: {problem}; put it right, or leave such documents out with --on-error skip"
        )
    return not problem


def _problem(document: Document, tokenizer: Tokenizer, config: TokenizeConfig) -> str:
    """What is wrong with a document that is well formed, given tokenizer and packing; empty if nothing is."""
    ids = document.content
    if isinstance(ids, str):
        return "text, but --packing ready expects input_ids (see --text-column)" if config.packing == "ready" else ""
    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
        return (
            f"input_ids are {min(ids)}..{max(ids)}, but {tokenizer.name} has {tokenizer.vocab_size} ids; "
            "name the tokenizer that made them"
        )
    if config.packing == "ready" and len(ids) > config.seq_len:
        return f"{len(ids)} input_ids, but --packing ready with --seq-len {config.seq_len} expects no more than that"
    return ""


def _write(
    storage: Storage, spool: Spool, layout: Layout, settings: dict[str, Any], sources: Sources, progress: Progress
) -> None:
    """Write the spooled sequences in keyed order, and commit the table."""
    sequences = spool.state.tokens // layout.body
    if not sequences:
        raise TokensError("no text found in the sources, so there is nothing to write")
    rule = RowRule(ids=settings["skip_ids"], first_positions=settings["skip_first"])
    counts, max_id = np.zeros(sequences, np.int32), 0
    step = progress.step("write", total=sequences, unit="sequences")

    def written() -> Iterator[Packed]:
        nonlocal max_id
        done = 0
        for ids, documents in _put_sequences(storage, spool, layout, sequences, settings["seed"]):
            counts[done : done + len(ids)] = kept(ids, documents, rule).sum(axis=1)
            max_id = max(max_id, int(ids.max()))
            done += len(ids)
            step.advance(len(ids))
            yield ids, documents

    digest, tokens = fingerprint(written(), settings), int(counts.sum(dtype=np.int64))
    if not tokens:
        raise TokensError(
            "the documents hold no token but special ones and what --skip-first and --skip-ids leave out, so there is "
            "nothing to write"
        )
    rows = TableArray("rows", (sequences,), min(sequences, CHUNK_SEQUENCES))
    _put_metadata(storage, rows)
    for i in range(rows.num_chunks):
        storage.put(rows.chunk_key(i), rows.encode(counts[i * rows.chunk_rows : (i + 1) * rows.chunk_rows]))
    storage.put(DOCUMENTS_KEY, [np.memmap(spool.documents(), np.uint8, "r").data])
    attributes = {"format_version": FORMAT_VERSION, "fingerprint": digest, "sequences": sequences, "tokens": tokens}
    attributes |= {"max_id": max_id, **settings, "left_out": int((spool.tail(layout.body) >= 0).sum())}
    attributes |= {name: getattr(spool.state, name) for name in ("skipped", "special", "empty_files")}
    attributes |= {"unread": len(sources.unread), "unread_first": tuple(sources.unread[:NAMED])}
    attributes |= {"repeated": len(sources.repeated)}
    attributes = {k: v for k, v in attributes.items() if k not in DEFAULTS or v != DEFAULTS[k]}
    group = {"zarr_format": 3, "node_type": "group", "attributes": {ATTRIBUTE: attributes}}
    storage.put(GROUP_KEY, json.dumps(group, indent=2).encode())


def _put_sequences(storage: Storage, spool: Spool, layout: Layout, sequences: int, seed: int) -> Iterator[Packed]:
    """Write `ids` and `document`, several chunks at a time, and pass the sequences on in order."""
    order_key = keyed.key(seed, "sequences")
    rows = min(sequences, max(1, CHUNK_TOKENS // layout.seq_len))
    arrays = [TableArray(name, (sequences, layout.seq_len), rows) for name in ("ids", "document")]
    for array in arrays:
        _put_metadata(storage, array)

    def put(chunk: int) -> Packed:
        places = np.arange(chunk * rows, min((chunk + 1) * rows, sequences))
        order = keyed.invert(places, sequences, order_key)
        block = framed(spool.read("ids", order, layout.body), spool.read("document", order, layout.body), layout)
        for array, values in zip(arrays, block, strict=True):
            storage.put(array.chunk_key(chunk), array.encode(values))
        return block

    yield from in_order(put, range(arrays[0].num_chunks), threads=_WRITERS, ahead=_WRITERS - 1)


def _put_metadata(storage: Storage, array: TableArray) -> None:
    storage.put(array.metadata_key, json.dumps(array.metadata(), indent=2).encode())


def fingerprint(blocks: Iterable[Packed], settings: dict[str, Any]) -> str:
    """BLAKE2b-128 over the special ids, all token ids and document numbers, however they are cut, and the row rule.

    A rule that leaves out nothing but special ids adds nothing.
    """
    ids_hash, documents_hash = hashlib.blake2b(), hashlib.blake2b()
    for ids, documents in blocks:
        ids_hash.update(_little(ids))
        documents_hash.update(_little(documents))
    fixed = [settings[name] for name in ("seq_len", "bos_id", "eos_id", "pad_id")]
    if settings["skip_first"] or settings["skip_ids"]:
        fixed += [settings["skip_first"], settings["skip_ids"]]
    return hashlib.blake2b(
        json.dumps(fixed).encode() + ids_hash.digest() + documents_hash.digest(), digest_size=16
    ).hexdigest()


def _little(values: NDArray[np.int32]) -> bytes:
    return values.astype("<i4", copy=False).tobytes()
