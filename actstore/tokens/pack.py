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
from actstore.tokens.rule import NO_DOCUMENT, PADDING

Packed = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Token ids and document numbers, of the same shape."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How sequences look."""

    packing: Packing
    seq_len: int
    bos: bool
    """Whether packing puts BOS first, if there is one; not with `ready`."""
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None

    @property
    def first_id(self) -> int | None:
        """BOS, where packing puts it first."""
        return self.bos_id if self.bos and self.packing != "ready" else None

    @property
    def body(self) -> int:
        """Tokens of a sequence without the BOS that packing puts first."""
        return self.seq_len - (self.first_id is not None)


def pack(documents: list[list[int]], given: list[bool], first: int, layout: Layout) -> tuple[Packed, int]:
    """What the documents, numbered from `first`, add to the flat run of tokens: [n].

    `given` says which documents came as ids and not as text. Their BOS, EOS and padding, counted in the second result,
    are left out unless they are `ready`: packing puts in its own. `TokensError` if padding is needed and the tokenizer
    has no special id to pad with.
    """
    lengths = np.array([len(d) for d in documents], np.int64)
    ids = np.fromiter(chain.from_iterable(documents), np.int32, int(lengths.sum()))
    index = np.repeat(np.arange(len(documents)), lengths)
    numbers = (index + first).astype(np.int32)
    if any(given):
        special = _special(ids, index, lengths, layout) * np.array(given)[index]
        numbers[special < 0] = special[special < 0]
    real = numbers >= 0
    num_special = int((~real).sum())
    if layout.packing == "ready":
        return _padded(ids, numbers, lengths, np.full_like(lengths, layout.seq_len), first, layout), num_special
    ids, numbers = ids[real], numbers[real]
    lengths = np.bincount(index[real], minlength=len(documents))
    if layout.packing == "separate":
        room = -(-lengths // layout.body) * layout.body
        return _padded(ids, numbers, lengths, room, first, layout), num_special
    if layout.eos_id is not None:
        starts = np.cumsum(lengths) - lengths
        before = starts if first else starts[1:]
        ids, numbers = np.insert(ids, before, layout.eos_id), np.insert(numbers, before, NO_DOCUMENT)
    return (ids, numbers), num_special


def _special(
    ids: NDArray[np.int32], index: NDArray[np.int64], lengths: NDArray[np.int64], layout: Layout
) -> NDArray[np.int32]:
    """NO_DOCUMENT at BOS and EOS of documents that came as ids, PADDING at their padding, 0 elsewhere: [n].

    Padding is a run at the start or the end of a document. Between other tokens its id is a token: a vocabulary may pad
    with its unknown token. Where BOS or EOS pads, the last of a run at the start, or first of one at the end, is it.
    """
    stops = np.cumsum(lengths)
    tokens = np.concatenate(([-1], np.flatnonzero(ids != layout.pad_id), [ids.size]))
    begin = tokens[np.searchsorted(tokens, stops - lengths)]
    end = tokens[np.searchsorted(tokens, stops) - 1] + 1
    begin -= layout.pad_id == (layout.eos_id if layout.bos_id is None else layout.bos_id)
    end += layout.pad_id == layout.eos_id
    place = np.arange(ids.size)
    padding = (place < begin[index]) | (place >= end[index])
    framing = np.isin(ids, [i for i in (layout.bos_id, layout.eos_id) if i is not None])
    return np.where(padding, PADDING, np.where(framing, NO_DOCUMENT, 0)).astype(np.int32)


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
    out = np.full(int(room.sum()), layout.pad_id, np.int32), np.full(int(room.sum()), PADDING, np.int32)
    out[0][place], out[1][place] = ids, numbers
    return out


def framed(ids: NDArray[np.int32], numbers: NDArray[np.int32], layout: Layout) -> Packed:
    """Sequences [n, seq_len] of bodies [n, body]."""
    if layout.first_id is None:
        return ids, numbers
    front = ((0, 0), (1, 0))
    return np.pad(ids, front, constant_values=layout.first_id), np.pad(numbers, front, constant_values=NO_DOCUMENT)
