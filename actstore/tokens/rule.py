"""Which positions of a sequence are rows.

A position is left out for its place: packing put BOS, EOS or padding there, or `input_ids` held it there, and the
table's `document` array says so. An id alone decides nothing, because a vocabulary may pad with its unknown token. Only
the ids that a user names are left out wherever they are.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NO_DOCUMENT, PADDING = -1, -2
"""Document numbers of BOS and EOS, and of padding."""


@dataclass(frozen=True, kw_only=True)
class RowRule:
    """What is left out of the rows beside BOS, EOS and padding."""

    ids: tuple[int, ...] = ()
    """Token ids that are never rows."""
    first_positions: int = 0
    """So many tokens at the start of every sequence are never rows; padding before it does not count, BOS does."""


def kept(ids: NDArray[np.int32], documents: NDArray[np.int32], rule: RowRule) -> NDArray[np.bool_]:
    """Which positions are rows, given token ids and document numbers [n, seq_len]; same shape."""
    mask = documents >= 0
    if rule.ids:
        mask &= ~np.isin(ids, rule.ids)
    if rule.first_positions:
        begin = np.argmax(documents != PADDING, axis=1)
        mask &= np.arange(ids.shape[1]) >= begin[:, None] + rule.first_positions
    return mask


def leading_padding(documents: NDArray[np.int32]) -> NDArray[np.int64]:
    """How many positions at the start of each sequence are padding [n]; 0 for a sequence of nothing else."""
    run = (documents == PADDING).cumprod(axis=1).sum(axis=1)
    return np.where(run == documents.shape[1], 0, run).astype(np.int64)
