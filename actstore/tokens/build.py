"""`tokenize`: documents to a committed token table.

Packed tokens go to a spool first, because the keyed order needs the number of sequences; the table is then written
chunk by chunk. So memory stays at a few batches of documents and one chunk, however much text there is, and a run that
was killed goes on from the spool. A batch is encoded by the tokenizer's own threads while the next one is read and the
last one packed; order and result don't depend on threads.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from actstore import keyed
from actstore.errors import TokensError, mismatch
from actstore.progress import Progress
from actstore.store.storage import Storage, open_storage
from actstore.tokens.config import TokenizeConfig
from actstore.tokens.documents import Document, batches
from actstore.tokens.pack import NO_DOCUMENT, Layout, Packed, framed, pack, special_ids
from actstore.tokens.rule import RowRule, kept
from actstore.tokens.sources import SourceFile, identities, list_files
from actstore.tokens.spool import Spool, State, open_spool
from actstore.tokens.table import (
    ARRAYS,
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
CHECKPOINT_TOKENS = 1 << 22
"""Tokens after which the spool is saved: what a killed run does again at most."""
_AHEAD = 1
"""Batches that wait, read, while another one is encoded."""
_ORDER_AND_ROWS = ("seed", "skip_first", "skip_ids")
"""Settings that matter only when the table is written, not to the spool."""


def tokenize(config: TokenizeConfig, progress: Progress) -> TokenTable:
    """Write the token table of `config`, or return it if it is there already; go on where a killed run was.

    `TokensError` if text or tokenizer can't be used; `MismatchError` if another table is at `config.out`.
    """
    storage = open_storage(config.out)
    files = list_files(config.sources)
    tokenizer = load_tokenizer(config.tokenizer)
    settings = _settings(config, files, tokenizer)
    if storage.exists(GROUP_KEY):
        return _existing(storage, config, settings)
    spooled = {k: v for k, v in settings.items() if k not in _ORDER_AND_ROWS}
    with open_spool(storage, spooled, may_skip=config.on_error == "skip") as spool:
        if not storage.exists(GROUP_KEY):
            layout = _layout(config, tokenizer)
            _fill(spool, files, tokenizer, layout, config, progress)
            _write(storage, spool, layout, settings, progress)
    return _existing(storage, config, settings)


def _settings(config: TokenizeConfig, files: list[SourceFile], tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that fixes the table, by the names of its attributes."""
    skip_ids = tuple(sorted(set(config.skip_ids)))
    if skip_ids and skip_ids[-1] >= tokenizer.vocab_size:
        raise ValueError(f"skip_ids holds {skip_ids[-1]}, but {tokenizer.name} has {tokenizer.vocab_size} ids")
    return {
        "seq_len": config.seq_len,
        "seed": config.seed,
        "packing": config.packing,
        "bos": config.bos,
        "skip_first": config.skip_first,
        "skip_ids": skip_ids,
        "text_column": config.text_column,
        "tokenizer": tokenizer.name,
        "tokenizer_digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
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


def _layout(config: TokenizeConfig, tokenizer: Tokenizer) -> Layout:
    return Layout(
        packing=config.packing,
        seq_len=config.seq_len,
        first_id=tokenizer.bos_id if config.bos and config.packing != "ready" else None,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        special_ids=special_ids(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id),
    )


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
    for after, documents, encoded in _encoded(_batches(files, tokenizer, config, state), tokenizer):
        ids, numbers = pack(encoded, state.documents, layout)
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
        spool.append(padding, np.full_like(padding, NO_DOCUMENT), [], 0)
        spool.save(state)


def _batches(
    files: list[SourceFile], tokenizer: Tokenizer, config: TokenizeConfig, state: State
) -> Iterator[tuple[State, list[Document]]]:
    """What is left to do after `state`: batches without the malformed documents, and the state after each."""
    for index in range(state.file, len(files)):
        for read in batches(files[index], config.text_column, state.record if index == state.file else 0):
            usable = [d for d in read if _usable(d, tokenizer, config)]
            state = replace(
                state,
                file=index,
                record=read[-1].record + 1,
                size=state.size + sum(d.size for d in read),
                documents=state.documents + len(usable),
                skipped=state.skipped + len(read) - len(usable),
            )
            yield state, usable


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


def _encoded(
    read: Iterable[tuple[State, list[Document]]], tokenizer: Tokenizer
) -> Iterator[tuple[State, list[Document], list[list[int]]]]:
    """The batches with their documents' ids, in order; one is encoded while the next is read and the last packed."""
    with ThreadPoolExecutor(1) as pool:
        ahead: deque[tuple[State, list[Document], Future[list[list[int]]]]] = deque()
        for state, documents in read:
            ahead.append((state, documents, pool.submit(_ids, documents, tokenizer)))
            if len(ahead) > _AHEAD:
                first, of_first, ids = ahead.popleft()
                yield first, of_first, ids.result()
        for state, documents, ids in ahead:
            yield state, documents, ids.result()


def _ids(documents: list[Document], tokenizer: Tokenizer) -> list[list[int]]:
    encoded = iter(tokenizer.encode([d.content for d in documents if isinstance(d.content, str)]))
    return [next(encoded) if isinstance(d.content, str) else d.content for d in documents]


def _write(storage: Storage, spool: Spool, layout: Layout, settings: dict[str, Any], progress: Progress) -> None:
    """Write the spooled sequences in keyed order, and commit the table."""
    sequences = spool.state.tokens // layout.body
    if not sequences:
        raise TokensError("no text found in the sources, so there is nothing to write")
    rule = RowRule(ids=(*layout.special_ids, *settings["skip_ids"]), first_positions=settings["skip_first"])
    order_key = keyed.key(settings["seed"], "sequences")
    rows = max(1, CHUNK_TOKENS // layout.seq_len)
    chunks = [slice(start, min(start + rows, sequences)) for start in range(0, sequences, rows)]
    step = progress.step("write", total=sequences, unit="sequences")
    tokens = max_id = 0

    def ordered() -> Iterator[Packed]:
        nonlocal tokens, max_id
        for chunk in chunks:
            order = keyed.invert(np.arange(chunk.start, chunk.stop), sequences, order_key)
            ids, documents = framed(
                spool.read("ids", order, layout.body), spool.read("document", order, layout.body), layout
            )
            tokens += int(kept(ids, rule).sum())
            max_id = max(max_id, int(ids.max()))
            yield ids, documents
            step.advance(len(ids))

    digest = fingerprint(_put_arrays(storage, ordered(), chunks, (sequences, layout.seq_len)), settings)
    if not tokens:
        raise TokensError(
            "the documents hold no token but special ones and what --skip-first and --skip-ids leave out, so there is "
            "nothing to write"
        )
    storage.put(DOCUMENTS_KEY, [np.memmap(spool.documents(), np.uint8, "r").data])
    attributes = {"format_version": FORMAT_VERSION, "fingerprint": digest, "sequences": sequences, "tokens": tokens}
    attributes |= {"max_id": max_id, **settings, "skipped": spool.state.skipped}
    attributes["left_out"] = int((spool.tail(layout.body) >= 0).sum())
    attributes = {k: v for k, v in attributes.items() if k not in DEFAULTS or v != DEFAULTS[k]}
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
