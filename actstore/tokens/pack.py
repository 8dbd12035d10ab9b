"""Packing: concatenate documents with EOS between them, cut, put BOS first.

No token is lost and none is repeated except at no cost: a document goes on in the next sequence where it was cut. The
alternative, one document per sequence, wastes padding on short documents and drops the ends of long ones.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from actstore.tokens.tokenizer import Tokenizer

NO_DOCUMENT = -1
"""Document number of BOS, EOS and padding."""

Packed = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Token ids and document numbers, both [n, seq_len]."""


def special_ids(bos_id: int | None, eos_id: int | None, pad_id: int | None) -> tuple[int, ...]:
    """The ids that never become rows, ascending."""
    return tuple(sorted({i for i in (bos_id, eos_id, pad_id) if i is not None}))


def pack(documents: Iterable[list[list[int]]], tokenizer: Tokenizer, seq_len: int) -> Iterator[Packed]:
    """Whole sequences as the batches of documents complete them; the last one is padded at its end.

    Documents are numbered in order from 0. Special ids inside a document (ready `input_ids` have them) are left out:
    packing puts in its own. A tokenizer without BOS gives sequences that start with a token; without EOS, documents
    follow each other directly; without any special id to pad with, an incomplete last sequence is left out.
    """
    specials = special_ids(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    body = seq_len - (tokenizer.bos_id is not None)
    ids, numbers = np.empty(0, np.int32), np.empty(0, np.int32)
    number = 0
    for batch in documents:
        parts, part_numbers = [ids], [numbers]
        for document in batch:
            if number and tokenizer.eos_id is not None:
                parts.append(np.array([tokenizer.eos_id], np.int32))
                part_numbers.append(np.array([NO_DOCUMENT], np.int32))
            tokens = np.asarray(document, np.int32)
            tokens = tokens[~np.isin(tokens, specials)]
            parts.append(tokens)
            part_numbers.append(np.full(tokens.size, number, np.int32))
            number += 1
        ids, numbers = np.concatenate(parts), np.concatenate(part_numbers)
        whole = ids.size // body * body
        if whole:
            yield _framed(ids[:whole], numbers[:whole], tokenizer.bos_id, seq_len)
            ids, numbers = ids[whole:], numbers[whole:]
    if (numbers >= 0).any() and tokenizer.pad_id is not None:
        missing = body - ids.size
        ids = np.pad(ids, (0, missing), constant_values=tokenizer.pad_id)
        numbers = np.pad(numbers, (0, missing), constant_values=NO_DOCUMENT)
        yield _framed(ids, numbers, tokenizer.bos_id, seq_len)


def _framed(ids: NDArray[np.int32], numbers: NDArray[np.int32], bos_id: int | None, seq_len: int) -> Packed:
    if bos_id is None:
        return ids.reshape(-1, seq_len), numbers.reshape(-1, seq_len)
    front = ((0, 0), (1, 0))
    return (
        np.pad(ids.reshape(-1, seq_len - 1), front, constant_values=bos_id),
        np.pad(numbers.reshape(-1, seq_len - 1), front, constant_values=NO_DOCUMENT),
    )
