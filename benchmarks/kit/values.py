"""What the device computes against what the CPU does: sites, stored rows, batches, one training step."""

from dataclasses import replace

import numpy as np
import stores
import tiny
import torch

import actstore
from actstore import builtin
from actstore.capture.forward import activations
from actstore.capture.model import load_config, load_model
from actstore.capture.precision import attention_of
from actstore.capture.sites import expand_sites
from actstore.store import Store
from kit.capture import Capture, captured, token_table
from kit.record import Kit
from trainer.device import tf32_products
from trainer.recipe import SHORT
from trainer.sae import init_sae

TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
"""Relative error of a site against the CPU's float32; four layers of bfloat16 rounding are about 1e-2."""


def values(kit: Kit) -> None:
    """Compare what the device computes with what the CPU does."""
    _site_values(kit)
    _stored_values(kit)
    _batch_values(kit)
    _step_values(kit)


def _site_values(kit: Kit) -> None:
    """Every site of two small random models, padded and not, by the attention that capture takes on the device."""
    ids = torch.randint(3, tiny.VOCAB, (4, 64), generator=torch.Generator().manual_seed(0))
    ids[1, :20] = 0
    for kind in ("gemma2", "llama"):
        folder = kit.folder / kind
        tiny.model_of(kind).save_pretrained(folder)
        config = load_config(str(folder))
        sites = expand_sites("all", config)
        kept = torch.ones(ids.shape, dtype=torch.bool)
        kept[1, :20] = False
        padding = torch.tensor([0, 20, *[0] * (len(ids) - 2)])
        expected = activations(load_model(str(folder)), ids, sites, padding)
        for dtype in ("float32", "bfloat16"):
            model = load_model(str(folder), dtype, kit.device)
            found = activations(model, ids, sites, padding)
            worst = max(_error(found[s.name].cpu()[kept], expected[s.name][kept]) for s in sites)
            what = f"{len(sites)} sites, {kind}, {attention_of(config, kit.device)} attention, {dtype}"
            kit.check("values", what, worst, TOLERANCE[dtype])


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


def _stored_values(kit: Kit) -> None:
    """A store that a replica wrote from the device, against the CPU's; and a second one, which must be the same."""
    on_cpu = Capture(
        model=builtin.NAME,
        tokens=token_table(kit, seq_len=64),
        sites=("resid_post.3", "mlp_out.3"),
        device="cpu",
        dtype="float32",
        rows=1024,
        bucket_rows=512,
    )
    on_device = replace(on_cpu, device=kit.device, dtype="bfloat16")
    expected, found, again = (
        captured(kit, what, folder)
        for what, folder in ((on_cpu, "expected"), (on_device, "found"), (on_device, "again"))
    )
    for site in on_cpu.sites:
        reference, here, there = (_raw(store, site) for store in (expected, found, again))
        kit.check("values", f"stored rows of {site}, bfloat16", _error(here, reference), TOLERANCE["bfloat16"])
        different = float((here.view(torch.int16) != there.view(torch.int16)).sum())
        kit.check("values", f"stored values of {site} that a second capture changes", different, 0, "values")


def _raw(store: Store, site: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(store[site][:]).view(np.int16)).view(torch.bfloat16)


def _batch_values(kit: Kit) -> None:
    """Batches on the device against the host's, bit for bit, in every encoding and codec."""
    rows, options = 2048, {"sites": "resid_post.1", "batch_size": 256, "seed": 3}
    for encoding in ("bf16", "f32", "fixed:1e-3"):
        for codec in ("planes", "none"):
            url = kit.folder / f"batches-{encoding}-{codec}".replace(":", "-")
            stores.make(url, "resid_post.1", encoding, codec, d=96, rows=rows, bucket_rows=1024)
            with (
                actstore.ActivationDataset(url, **options) as host,
                actstore.ActivationDataset(url, **options, device=kit.device) as device,
            ):
                pairs = zip(host, device, strict=True)
                different = sum(float((a != b.cpu()).sum()) for a, b in pairs)
            what = f"batches of {encoding}, {codec}: values that differ from the host's"
            kit.check("values", what, different, 0, "values")


GRADIENT_TOLERANCE = {"float32": 3e-2, "bfloat16": 1e-1}
"""Latents whose pre-activation is within rounding of its threshold fire on one side only; float32 may be TF32."""


def _step_values(kit: Kit) -> None:
    """Gradients of one JumpReLU step against the CPU's in float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 256, generator=generator) / 16
    dead = torch.zeros(1024, dtype=torch.bool)
    recipe = replace(SHORT, threshold_init=0.1, init_b_dec_to_mean=False)
    expected, _ = init_sae(256, 1024, recipe).loss_and_gradients(x, 0.03, dead)
    for compute in ("float32", "bfloat16"):
        sae = init_sae(256, 1024, replace(recipe, compute=compute), device=kit.device)
        with tf32_products(kit.device):
            found, _ = sae.loss_and_gradients(x.to(kit.device), 0.03, dead.to(kit.device))
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            error = _error(found[name], expected[name])
            kit.check("values", f"gradient of {name}, {compute} products", error, GRADIENT_TOLERANCE[compute])
