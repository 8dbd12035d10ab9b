"""Which positions of a sequence are rows; needs token ids only."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class RowRule:
    """What is left out of the rows: special ids always (Gemma Scope sec. 3.1), and what the user asked for."""

    ids: tuple[int, ...]
    """Token ids that are never rows: BOS, EOS and padding, and the user's."""
    first_positions: int = 0
    """So many positions at the start of every sequence are never rows."""


def kept(ids: NDArray[np.int32], rule: RowRule) -> NDArray[np.bool_]:
    """Which positions of `ids` [n, seq_len] are rows; same shape."""
    mask = ~np.isin(ids, rule.ids)
    mask[:, : rule.first_positions] = False
    return mask
