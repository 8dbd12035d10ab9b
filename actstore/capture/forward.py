"""One forward pass for all sites.

The pass is left by an exception from the hook that completes the set, so nothing after the deepest site runs: not the
rest of its layer, not the final norm, not the unembedding.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from actstore.capture.sites import Hook, Site, hooks_of


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
