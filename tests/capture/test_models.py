"""Models: what is loaded, what is refused before weights are read, and passes that cross devices."""

import copy
import re

import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from safetensors.torch import load_file, save_file
from tiny import LAYERS, config_of, model_of
from torch import nn

from actstore.capture.forward import activations, decoder_of
from actstore.capture.model import load_config, load_model
from actstore.capture.precision import saved_precision
from actstore.capture.sites import ARCHITECTURES, expand_sites, parse_sites
from actstore.errors import CaptureError

IDS = torch.randint(3, 2000, (2, 16), generator=torch.Generator().manual_seed(2))
PADDED = torch.cat([IDS[:1], torch.cat([torch.zeros(1, 5, dtype=torch.long), IDS[1:, 5:]], dim=1)])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For models this small more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(found, expected) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_saved_model_is_loaded_as_it_was(tmp_path, kind):
    model = model_of(kind, torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), "bfloat16")
    assert saved_precision(str(tmp_path), load_config(str(tmp_path))) == "bfloat16"
    sites = expand_sites("all", model.config)
    assert same(activations(loaded, IDS, sites), activations(model, IDS, sites))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_weights_of_layers_that_no_site_needs_are_never_read(tmp_path, kind):
    """They are not even in the file."""
    model = model_of(kind)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: w for name, w in weights.items() if not re.search(r"(?<!encoder\.)layers\.[23]\.", name)}
    assert len(weights) - len(kept) == 2 * len([n for n in weights if "layers.1." in n and "encoder" not in n])
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CaptureError, match="weights are missing"):
        load_model(str(tmp_path), layers=3)
    sites = parse_sites("resid_pre.0,resid_post.1,mlp_out.0,attn_out.1,mlp_in.1")
    assert same(activations(load_model(str(tmp_path), layers=2), IDS, sites), activations(model, IDS, sites))


@pytest.mark.parametrize("device", ["balanced", "cpu"])
def test_placement_changes_no_value(tmp_path, device):
    model = model_of("gemma2")
    model.save_pretrained(tmp_path)
    sites = expand_sites("all", model.config)
    found = activations(load_model(str(tmp_path), device=device, attention="eager"), IDS, sites)
    assert same(found, activations(model, IDS, sites))


def spread(kind: str, at: int):
    """The model with layers from `at` on another device, joined by accelerate's hooks as `device_map` does it."""
    model = copy.deepcopy(model_of(kind))
    decoder = decoder_of(model)
    parts: dict[str, nn.Module] = {n: m for n, m in decoder.named_children() if n != "layers"}
    parts |= {f"layers.{i}": layer for i, layer in enumerate(decoder.layers)}
    far = [name for name in parts if name == "norm" or (name[:6] == "layers" and int(name[7:]) >= at)]
    for name in far:
        parts[name].to("meta")
    devices = {name: torch.device("meta" if name in far else "cpu") for name in parts}
    attach_align_device_hook_on_blocks(decoder, execution_device=devices, offload=dict.fromkeys(parts, False))
    return model


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("ids", [IDS, PADDED], ids=["plain", "padded"])
def test_sites_come_back_on_the_device_where_they_arise(kind, ids):
    """Device `meta` stands for a second GPU: it has shapes and no values."""
    model = spread(kind, 2)
    sites = expand_sites("all", model.config)
    found = activations(model, ids, sites, pad_id=0, bos_id=1)
    expected = activations(model_of(kind), ids, sites, pad_id=0, bos_id=1)
    near = {site.name for site in sites if site.layer < 2}
    assert {name: x.device.type for name, x in found.items()} == {n: "cpu" if n in near else "meta" for n in expected}
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in expected.items()}
    assert all(torch.equal(found[name], expected[name]) for name in near)


def test_a_model_that_was_put_off_to_disk_is_refused(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    model_of("llama").save_pretrained(tmp_path / "model")
    real = AutoModelForCausalLM.from_pretrained
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(LAYERS)}

    def too_small(*args, device_map, **kwargs):
        return real(*args, device_map=places, offload_folder=tmp_path / "offload", **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", too_small)
    with pytest.raises(CaptureError, match="the GPUs there are can't hold it; use more of them"):
        load_model(str(tmp_path / "model"), device="balanced")


@pytest.mark.parametrize("kind", ["gpt2", "t5", "granite"])
def test_an_architecture_without_sites_is_refused_before_its_weights_are_read(tmp_path, kind):
    config_of(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"architecture '{kind}' has no table of sites: known are gemma2, gemma3"):
        load_model(str(tmp_path))
