"""One forward pass for all sites, and a bucket's arrays out of many of them.

The pass is left by an exception from the hook that completes the set, so nothing after the deepest site runs: not the
rest of its layer, not the final norm, not the unembedding. Rows go straight to their permuted place, so the shuffle
inside a bucket costs no extra pass over memory.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from actstore.capture.sites import Hook, Site, hooks_of
from actstore.store.spec import parse_encoding
from actstore.tokens.rows import Rows, Span, rows_in


def raw_dtype(encoding: str, model: torch.dtype) -> torch.dtype:
    """What a bucket holds until it is encoded: float32, unless bfloat16 is stored or is what the model computes."""
    kind, _ = parse_encoding(encoding)
    return torch.bfloat16 if kind == "bf16" or (kind == "fixed" and model == torch.bfloat16) else torch.float32


class _CompleteError(Exception):
    """Raised inside the pass once every site has been seen."""


def decoder_of(model: nn.Module) -> Any:
    """The stack of decoder layers of a `transformers` model, with `.layers` and `.embed_tokens`."""
    get_decoder: Callable[[], Any] = model.get_decoder  # pyright: ignore[reportAssignmentType]
    return get_decoder()


@contextmanager
def _hooked(layers: nn.ModuleList, hooks: dict[str, Hook], sites: Sequence[Site]) -> Generator[dict[str, Tensor]]:
    found: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        found[name] = value
        if len(found) == len(sites):
            raise _CompleteError

    def hook(module: nn.Module, site: Site, side: str) -> torch.utils.hooks.RemovableHandle:
        def before(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            keep(site.name, inputs[0])

        def after(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
            keep(site.name, output)

        return module.register_forward_pre_hook(before) if side == "input" else module.register_forward_hook(after)

    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for site in sites:
            place = hooks[site.kind]
            handles.append(hook(layers[site.layer].get_submodule(place.module), site, place.side))
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def activations(
    model: nn.Module,
    ids: Int[Tensor, "sequences seq_len"],
    sites: Sequence[Site],
) -> dict[str, Float[Tensor, "sequences seq_len _"]]:
    """Activations of every site, by name, each [sequences, seq_len, d], on the device where they arose.

    Padding may only be at the end of sequences: attention is causal, so it can't reach what comes before.
    """
    decoder = decoder_of(model)
    hooks = hooks_of(model.config.model_type)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    with _hooked(decoder.layers, hooks, sites) as found:
        try:
            decoder(input_ids=ids.to(decoder.embed_tokens.weight.device), use_cache=False)
        except _CompleteError:
            return found
    raise AssertionError(f"the forward pass ended without {[s.name for s in sites if s.name not in found]}")


def bucket_rows(
    model: nn.Module,
    sites: Sequence[Site],
    ids: NDArray[np.int32],  # [sequences of the span, seq_len]
    span: Span,
    place: NDArray[np.int64],  # [rows of the span] stored place of each row
    *,
    special_ids: tuple[int, ...],
    batch_size: int,
    encoding: str,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, NDArray[Any]], Rows]:
    """A bucket in stored order: per site [rows, d] (bfloat16 bits as uint16, or float32), and its provenance.

    Batches start at the bucket's first sequence, so a bucket's values do not depend on who captures it or when.
    `advance` is called with the number of rows of each finished batch.
    """
    rows = rows_in(ids, special_ids, span)
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
