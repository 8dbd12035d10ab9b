"""A bucket's arrays out of many forward passes.

Rows go straight to their permuted place, so the shuffle inside a bucket costs no extra pass over memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actstore.capture.forward import activations
from actstore.capture.sites import Site
from actstore.store.spec import parse_encoding
from actstore.tokens.rows import Rows, Span, rows_in
from actstore.tokens.rule import RowRule


def raw_dtype(encoding: str, model: torch.dtype) -> torch.dtype:
    """What a bucket holds until it is encoded: float32, unless bfloat16 is stored or is what the model computes."""
    kind, _ = parse_encoding(encoding)
    return torch.bfloat16 if kind == "bf16" or (kind == "fixed" and model == torch.bfloat16) else torch.float32


def bucket_rows(
    model: nn.Module,
    sites: Sequence[Site],
    ids: NDArray[np.int32],  # [sequences of the span, seq_len]
    span: Span,
    place: NDArray[np.int64],  # [rows of the span] stored place of each row
    *,
    rule: RowRule,
    batch_size: int,
    encoding: str,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, NDArray[Any]], Rows]:
    """A bucket in stored order: per site [rows, d] (bfloat16 bits as uint16, or float32), and its provenance.

    Batches start at the bucket's first sequence, so a bucket's values do not depend on who captures it or when.
    `advance` is called with the number of rows of each finished batch.
    """
    rows = rows_in(ids, rule, span)
    arrays: dict[str, NDArray[Any]] = {}
    for start in range(0, len(ids), batch_size):
        batch = ids[start : start + batch_size].astype(np.int64)
        first = span.first_sequence + start
        i, j = np.searchsorted(rows.sequence, (first, first + len(batch)))
        chosen = torch.from_numpy((rows.sequence[i:j].astype(np.int64) - first) * ids.shape[1] + rows.position[i:j])
        for name, values in activations(model, torch.from_numpy(batch), sites).items():
            picked = values.flatten(0, 1)[chosen.to(values.device)]
            bits = _raw(picked.to(raw_dtype(encoding, values.dtype)).cpu())
            if name not in arrays:
                arrays[name] = np.empty((span.rows, bits.shape[1]), bits.dtype)
            arrays[name][place[i:j]] = bits  # numpy moves whole rows, twice as fast as index_copy_
        advance(int(j - i))
    return arrays, Rows(*(_permuted(column, place) for column in (rows.sequence, rows.position, rows.token_id)))


def _raw(values: Tensor) -> NDArray[Any]:
    return values.view(torch.uint16).numpy() if values.dtype == torch.bfloat16 else values.numpy()


def _permuted(column: NDArray[np.int32], place: NDArray[np.int64]) -> NDArray[np.int32]:
    stored = np.empty_like(column)
    stored[place] = column
    return stored
