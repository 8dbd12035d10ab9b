"""Packing: documents to sequences, in one of three ways.

`joined` puts EOS between documents and cuts where a sequence is full: no token is lost and nothing is padded, but a
sequence holds parts of several documents (Gemma Scope, and most training of language models). `separate` keeps
documents apart and pays with padding. `ready` trusts the sequences that it is given.

A batch is packed without regard to the batches before it: what it adds is a flat run of tokens, in which `body` tokens
are a sequence without its BOS. So a run that was interrupted needs no more than that run to go on.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from actstore.errors import TokensError
from actstore.tokens.config import Packing

NO_DOCUMENT = -1
"""Document number of BOS, EOS and padding."""

Packed = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Token ids and document numbers, of the same shape."""


def special_ids(bos_id: int | None, eos_id: int | None, pad_id: int | None) -> tuple[int, ...]:
    """The ids that never become rows, ascending."""
    return tuple(sorted({i for i in (bos_id, eos_id, pad_id) if i is not None}))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How sequences look."""

    packing: Packing
    seq_len: int
    first_id: int | None
    """BOS, where packing puts it first."""
    eos_id: int | None
    pad_id: int | None
    special_ids: tuple[int, ...]

    @property
    def body(self) -> int:
        """Tokens of a sequence without the BOS that packing puts first."""
        return self.seq_len - (self.first_id is not None)


def pack(documents: list[list[int]], first: int, layout: Layout) -> Packed:
    """What the documents, numbered from `first`, add to the flat run of tokens: [n].

    Special ids inside a document (`input_ids` have them) are left out unless it is `ready`: packing puts in its own.
    `TokensError` if padding is needed and the tokenizer has no special id to pad with.
    """
    lengths = np.array([len(d) for d in documents], np.int64)
    ids = np.fromiter(chain.from_iterable(documents), np.int32, int(lengths.sum()))
    index = np.repeat(np.arange(len(documents)), lengths)
    special = np.isin(ids, layout.special_ids)
    numbers = np.where(special, NO_DOCUMENT, index + first).astype(np.int32)
    if layout.packing == "ready":
        return _padded(ids, numbers, lengths, np.full_like(lengths, layout.seq_len), first, layout)
    ids, numbers = ids[~special], numbers[~special]
    lengths = np.bincount(index[~special], minlength=len(documents))
    if layout.packing == "separate":
        return _padded(ids, numbers, lengths, -(-lengths // layout.body) * layout.body, first, layout)
    if layout.eos_id is not None:
        starts = np.cumsum(lengths) - lengths
        before = starts if first else starts[1:]
        ids, numbers = np.insert(ids, before, layout.eos_id), np.insert(numbers, before, NO_DOCUMENT)
    return ids, numbers


def _padded(
    ids: NDArray[np.int32],
    numbers: NDArray[np.int32],
    lengths: NDArray[np.int64],
    room: NDArray[np.int64],
    first: int,
    layout: Layout,
) -> Packed:
    """Give document i `room[i]` places, the last ones padding."""
    if layout.pad_id is None:
        if (lengths < room).any():
            raise TokensError(
                f"document {first + int(np.argmax(lengths < room))} does not fill its last sequence, and the tokenizer "
                "has no padding, EOS or BOS id to fill it with; use --packing joined or another tokenizer"
            )
        return ids, numbers
    place = np.arange(ids.size) + np.repeat(np.cumsum(room - lengths) - (room - lengths), lengths)
    out = np.full(int(room.sum()), layout.pad_id, np.int32), np.full(int(room.sum()), NO_DOCUMENT, np.int32)
    out[0][place], out[1][place] = ids, numbers
    return out


def framed(ids: NDArray[np.int32], numbers: NDArray[np.int32], layout: Layout) -> Packed:
    """Sequences [n, seq_len] of bodies [n, body]."""
    if layout.first_id is None:
        return ids, numbers
    front = ((0, 0), (1, 0))
    return np.pad(ids, front, constant_values=layout.first_id), np.pad(numbers, front, constant_values=NO_DOCUMENT)
