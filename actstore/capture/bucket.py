"""A bucket's arrays out of many forward passes.

Rows go straight to their permuted place, so the shuffle inside a bucket costs no extra pass over memory. Copying a
batch off the device and putting its rows in place goes on while the next batch's forward pass runs; at most
`BATCHES_IN_FLIGHT` batches wait for it. On a GPU nothing in the loop waits for the device: ids and row numbers are
pinned once a bucket and copied once a batch, and activations come back into pinned memory on a stream of their own.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actstore.capture.forward import activations
from actstore.capture.memory import BATCHES_IN_FLIGHT
from actstore.capture.sites import Site
from actstore.store.format.spec import BITS, held_as, parse_encoding
from actstore.tokens.rows import Rows, Span, rows_in
from actstore.tokens.rule import RowRule, leading_padding


def raw_dtype(encoding: str, model: torch.dtype) -> torch.dtype:
    """What a bucket holds until it is encoded: float32, unless bfloat16 is stored or is what the model computes."""
    held = held_as(parse_encoding(encoding)[0], bfloat16=model == torch.bfloat16)
    return torch.bfloat16 if held == BITS else torch.float32


def bucket_rows(
    model: nn.Module,
    sites: Sequence[Site],
    ids: NDArray[np.int32],  # [sequences of the span, seq_len]
    documents: NDArray[np.int32],  # the same of the table's `document`: which positions are rows
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
    rows = rows_in(ids, documents, rule, span)
    tokens, kept = _pinned(model, ids.astype(np.int64), _kept(rows, span, ids.shape[1]) % (batch_size * ids.shape[1]))
    padding = torch.from_numpy(leading_padding(documents))
    arrays: dict[str, NDArray[Any]] = {}
    flight: deque[Future[None]] = deque()

    def put(name: str, values: Callable[[], Tensor], where: NDArray[np.int64]) -> None:
        bits = _raw(values())
        if name not in arrays:
            arrays[name] = np.empty((span.rows, bits.shape[1]), bits.dtype)
        arrays[name][where] = bits  # numpy moves whole rows, twice as fast as index_copy_

    with ThreadPoolExecutor(1, thread_name_prefix="actstore-place") as placer:
        for start in range(0, len(ids), batch_size):
            batch = tokens[start : start + batch_size]
            first = span.first_sequence + start
            i, j = np.searchsorted(rows.sequence, (first, first + len(batch)))
            found = activations(model, batch, sites, padding[start : start + batch_size])
            chosen: dict[torch.device, Tensor] = {}  # a model over several GPUs has sites on each
            for name in list(found):
                values = found.pop(name)  # or a batch's activations stay until the next one's are there
                if values.device not in chosen:
                    chosen[values.device] = kept[i:j].to(values.device, non_blocking=True)
                picked = values.flatten(0, 1).index_select(0, chosen[values.device])
                picked = picked.to(raw_dtype(encoding, values.dtype))
                flight.append(placer.submit(put, name, _to_host(picked), place[i:j]))
            while len(flight) > (BATCHES_IN_FLIGHT - 1) * len(sites):
                flight.popleft().result()
            advance(int(j - i))
        for waiting in flight:
            waiting.result()
    return arrays, Rows(*(_permuted(column, place) for column in (rows.sequence, rows.position, rows.token_id)))


def _kept(rows: Rows, span: Span, seq_len: int) -> NDArray[np.int64]:
    """Number of each row's token among all tokens of the bucket's sequences."""
    return (rows.sequence.astype(np.int64) - span.first_sequence) * seq_len + rows.position


def _pinned(model: nn.Module, *arrays: NDArray[np.int64]) -> tuple[Tensor, ...]:
    """Tensors of these arrays, in pinned memory if the model is on a GPU: only that is copied without waiting."""
    on_gpu = next(model.parameters()).is_cuda
    return tuple(torch.from_numpy(a).pin_memory() if on_gpu else torch.from_numpy(a) for a in arrays)


def _to_host(values: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor off its device; the function waits for it. Pinned memory, beside the compute stream."""
    if values.device.type != "cuda":
        return values.cpu
    stream = _copy_stream(values.device)
    stream.wait_stream(torch.cuda.current_stream(values.device))
    with torch.cuda.stream(stream):
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    values.record_stream(stream)
    event = stream.record_event()

    def wait() -> Tensor:
        event.synchronize()
        return host

    return wait


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def _raw(values: Tensor) -> NDArray[Any]:
    return values.view(torch.uint16).numpy() if values.dtype == torch.bfloat16 else values.numpy()


def _permuted(column: NDArray[np.int32], place: NDArray[np.int64]) -> NDArray[np.int32]:
    stored = np.empty_like(column)
    stored[place] = column
    return stored
