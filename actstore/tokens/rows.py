"""Row numbers: (sequence, position) over kept positions, in that order.

BOS, EOS and padding are never rows (Gemma Scope sec. 3.1). Because this needs the token table only, every row's bucket
and shard is known before a model is loaded.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actstore.tokens.rule import RowRule, kept
from actstore.tokens.table import TokenTable


@dataclass(frozen=True)
class Span:
    """The sequences that hold a range of rows."""

    first_sequence: int
    stop_sequence: int
    skip: int
    """Kept positions of the first sequence that lie before the range."""
    rows: int


@dataclass(frozen=True)
class Rows:
    """A range of rows, in row order."""

    sequence: NDArray[np.int32]
    position: NDArray[np.int32]
    token_id: NDArray[np.int32]


def row_starts(table: TokenTable) -> NDArray[np.int64]:
    """First row of each sequence, then the number of rows [sequences + 1]."""
    starts = np.zeros(table.sequences + 1, np.int64)
    np.cumsum(table.row_counts(), out=starts[1:])
    return starts


def span_of(starts: NDArray[np.int64], first_row: int, stop_row: int) -> Span:
    """The sequences that hold rows [first_row, stop_row)."""
    if not 0 <= first_row < stop_row <= starts[-1]:
        raise ValueError(f"rows [{first_row}, {stop_row}) are not within [0, {starts[-1]})")
    first = int(np.searchsorted(starts, first_row, side="right")) - 1
    stop = int(np.searchsorted(starts, stop_row, side="left"))
    return Span(first, stop, first_row - int(starts[first]), stop_row - first_row)


def rows_in(ids: NDArray[np.int32], documents: NDArray[np.int32], rule: RowRule, span: Span) -> Rows:
    """The rows of a span, given ids and document numbers of its sequences [stop_sequence - first_sequence, seq_len]."""
    sequence, position = np.nonzero(kept(ids, documents, rule))
    chosen = slice(span.skip, span.skip + span.rows)
    sequence, position = sequence[chosen], position[chosen]
    token_id = ids[sequence, position]
    return Rows((sequence + span.first_sequence).astype(np.int32), position.astype(np.int32), token_id)
