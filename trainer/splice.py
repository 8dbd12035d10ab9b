"""A site in a running model: where it is, watched or replaced, and the loss that follows."""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

Replace = Callable[[Float[Tensor, "sequences length d_model"]], Float[Tensor, "sequences length d_model"]]
"""From a site's activations to what the model goes on with."""


@contextmanager
def splice(module: nn.Module, side: str, replace: Replace) -> Generator[None]:
    """While open, the model goes on with `replace(activations)` at this side ('input' or 'output') of `module`."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (replace(args[0]), *args[1:])

    def after(_: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        return (replace(output[0]), *output[1:]) if isinstance(output, tuple) else replace(output)

    hook = module.register_forward_pre_hook(before) if side == "input" else module.register_forward_hook(after)
    try:
        yield
    finally:
        hook.remove()


def watch(module: nn.Module, side: str, seen: dict[str, Tensor], name: str) -> AbstractContextManager[None]:
    """While open, the activations at this side of `module` are kept in `seen`, under `name`."""

    def keep(x: Tensor) -> Tensor:
        seen[name] = x
        return x

    return splice(module, side, keep)


def cross_entropy(
    model: nn.Module, ids: Int[Tensor, "sequences length"], kept: Bool[Tensor, "sequences length"]
) -> Float64[Tensor, " length"]:
    """Next-token loss summed over sequences, by the position of the token that is predicted; 0 where it isn't kept.

    One sequence's logits at a time become float32.
    """
    logits = model(input_ids=ids, use_cache=False).logits
    targets = ids.masked_fill(~kept, -100)
    total = torch.zeros(ids.shape[1], dtype=torch.float64, device=ids.device)
    for row, target in zip(logits, targets, strict=True):
        total[1:] += nn.functional.cross_entropy(row[:-1].float(), target[1:], reduction="none")
    return total


SPLICED = ("resid_pre", "resid_post", "attn_out", "mlp_in", "mlp_hidden", "mlp_out")
"""Kinds of site that an SAE can stand in for: what is put there is all that the rest of the model sees of it."""


def place_of(model: nn.Module, site: str) -> tuple[nn.Module, str]:
    """The module, and which side of it, that `site` is in a `transformers` model.

    `ValueError` for a kind that is not in `SPLICED`, or that the model does not have.
    """
    from actstore.capture.forward import module_of
    from actstore.capture.sites import check_sites, parse_sites

    (place,) = parse_sites(site)
    if place.kind not in SPLICED:
        raise ValueError(f"site {site}: an SAE can be spliced in at {', '.join(SPLICED)} only")
    config: Any = model.config
    check_sites(config, (place,), str(config.name_or_path))
    module, hook = module_of(model, place)
    return module, hook.side
