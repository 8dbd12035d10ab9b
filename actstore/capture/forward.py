"""One forward pass for all sites.

The pass is left by an exception from the hook that completes the set, so nothing after the deepest site runs: not the
rest of its layer, not the final norm, not the unembedding. Hooks find a module's input whether it is passed by position
or by keyword, and its output whether it comes alone or first in a tuple; both differ between versions of transformers.

Attention is causal, so padding behind a sequence changes nothing. Padding before one is masked and positions count from
the first token; only a batch that has some gets a mask, because a mask may choose other kernels and so other rounding.
"""

import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from actstore.capture.sites import ABSENT, Hook, Site, heads_of, hooks_of, layers_of


class _CompleteError(Exception):
    """Raised inside the pass once every site has been seen."""


def decoder_of(model: nn.Module) -> Any:
    """The part of a `transformers` model from the embedding to the final norm."""
    get_decoder: Callable[[], Any] = model.get_decoder  # pyright: ignore[reportAssignmentType]
    return get_decoder()


def module_of(model: Any, site: Site) -> tuple[nn.Module, Hook]:
    """The module that the site is an input or output of; `ValueError` says why the model does not have the site."""
    hook = hooks_of(model.config.model_type)[site.kind]
    module = hook.of(layers_of(model)[site.layer])
    if module is None:
        raise ValueError(f"site {site.name}: the model does not have it, because {ABSENT[site.kind]}")
    return module, hook


@torch.inference_mode()
def activations(
    model: nn.Module,
    ids: Int[Tensor, "sequences seq_len"],
    sites: Sequence[Site],
    padding: Int[Tensor, " sequences"] | None = None,
) -> dict[str, Float[Tensor, "sequences seq_len _"]]:
    """Activations of every site, by name, each [sequences, seq_len, d], on the device where they arose.

    `padding` says how many positions at the start of each sequence are padding; it is on the host, so that nothing
    waits for a device. Tokens behind it get what they have without it, within rounding. What sites hold at padding is
    finite and means nothing.
    """
    decoder = decoder_of(model)
    device = decoder.get_input_embeddings().weight.device
    masks = {} if padding is None else _masks(padding, ids.shape[1])
    with _hooked(model, sites, ids.shape) as found:
        try:
            masks = {name: mask.to(device) for name, mask in masks.items()}
            decoder(input_ids=ids.to(device, non_blocking=True), use_cache=False, **masks)
        except _CompleteError:
            return found
    raise AssertionError(f"the forward pass ended without {[s.name for s in sites if s.name not in found]}")


def _masks(padding: Int[Tensor, " sequences"], seq_len: int) -> dict[str, Int[Tensor, "sequences seq_len"]]:
    """What the decoder must be told: nothing if no sequence begins with padding."""
    if not padding.any():
        return {}
    positions = torch.arange(seq_len, device=padding.device) - padding[:, None]
    return {"attention_mask": (positions >= 0).long(), "position_ids": positions.clamp(min=0)}


@contextmanager
def _hooked(model: Any, sites: Sequence[Site], shape: torch.Size) -> Generator[dict[str, Tensor]]:
    """Collect the sites' tensors during a pass over ids of this shape that ends with `_CompleteError`."""
    found: dict[str, Tensor] = {}
    wanted = {site.name for site in sites}

    def keep(site: Site, hook: Hook, value: Tensor) -> None:
        found[site.name] = _rows(value, site, hook, model.config).reshape(*shape, -1)
        if len(found) == len(wanted):
            raise _CompleteError

    handles: list[RemovableHandle] = []
    try:
        for site in sites:
            module, hook = module_of(model, site)
            attach = _on_input if hook.side == "input" else _on_output
            handles.append(attach(module, partial(keep, site, hook)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _rows(value: Tensor, site: Site, hook: Hook, config: Any) -> Tensor:
    """The tensor with tokens in order and the site's own heads; a copy where it was part of a larger one."""
    if hook.layout == "rows":
        return value
    if hook.layout == "heads_first":
        return value.transpose(1, 2)
    num_q, num_kv = heads_of(config, site.layer)
    each, part = value.unflatten(-1, (num_q + 2 * num_kv, -1)), ("q", "k", "v").index(site.kind)
    blocks = each.split((num_q, num_kv, num_kv), dim=-2)
    return (blocks[part] if hook.layout == "blocks" else each[..., part::3, :]).contiguous()


def _on_input(module: nn.Module, keep: Callable[[Tensor], None]) -> RemovableHandle:
    # the class's signature: accelerate replaces the instance's forward
    first = list(inspect.signature(type(module).forward).parameters)[1]

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs[first])

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _on_output(module: nn.Module, keep: Callable[[Tensor], None]) -> RemovableHandle:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        keep(output[0] if isinstance(output, tuple) else output)

    return module.register_forward_hook(hook)
