"""Models: what is loaded, what is refused before weights are read, and passes that cross devices."""

import copy
import json
import re
from io import StringIO

import pytest
import torch
import zarr
from accelerate.hooks import attach_align_device_hook_on_blocks
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import LAYERS, MULTIMODAL, VARIANTS, config_of, model_of, save, tokenizer_of
from torch import nn

from actstore.capture import CaptureConfig, capture
from actstore.capture import execute as execute_module
from actstore.capture.forward import activations, decoder_of
from actstore.capture.memory import _pass_bytes
from actstore.capture.model import load_config, load_model, model_identity, revision_of, with_layers
from actstore.capture.precision import saved_precision
from actstore.capture.sites import ARCHITECTURES, expand_sites, layers_of, parse_sites, site_widths
from actstore.errors import CaptureError
from actstore.progress import Progress
from actstore.store import open_store
from actstore.tokens import TokenizeConfig, open_tokens, tokenize

IDS = torch.randint(3, 2000, (2, 16), generator=torch.Generator().manual_seed(2))
TEXTS = [f"Document {i}: the quick brown fox, {'jumps over ' * (i % 5)}the lazy dog." for i in range(40)]
QUIET = Progress(Console(file=StringIO()))
MODELS = (*ARCHITECTURES, *VARIANTS)
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


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_model_is_loaded_as_it_was(tmp_path, kind):
    model = model_of(kind, torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), "bfloat16")
    assert saved_precision(str(tmp_path), load_config(str(tmp_path))) == "bfloat16"
    sites = tuple(site_widths(model.config))
    assert same(activations(loaded, IDS, sites), activations(model, IDS, sites))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_weights_of_layers_that_no_site_needs_are_never_read(tmp_path, kind):
    """They are not even in the file."""
    model = model_of(kind)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    deep = [n for n in weights if re.search(r"(?<!encoder\.)(layers|h)\.[23]\.", n)]
    assert len({n.rpartition(".")[0] for n in deep}) > 8
    kept = {name: w for name, w in weights.items() if name not in deep}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CaptureError, match="weights are missing"):
        load_model(str(tmp_path), layers=3)
    if kind in PER_LAYER_INPUTS:
        with pytest.raises(CaptureError, match="weights are missing"):
            load_model(str(tmp_path), layers=2)
        return
    sites = tuple(site for site in site_widths(model.config) if site.layer < 2)
    assert same(activations(load_model(str(tmp_path), layers=2), IDS, sites), activations(model, IDS, sites))


PER_LAYER_INPUTS = {"gemma4", "gemma4_text"}
"""They are loaded whole, because one table holds what every layer is given."""


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("kind", [k for k in MODELS if k not in MULTIMODAL])
def test_a_model_of_fewer_layers_has_the_sites_of_these_layers(kind, layers):
    """Seen in the modules: widths, mixers and experts of a layer are what they are in the whole model."""
    config = config_of(kind)
    before, whole = config.to_dict(), site_widths(config)
    cut = with_layers(config, layers)
    stays = LAYERS if kind in PER_LAYER_INPUTS else min(layers, LAYERS)
    assert site_widths(cut) == {site: width for site, width in whole.items() if site.layer < stays}
    assert cut.get_text_config().num_hidden_layers == stays
    assert config.to_dict() == before


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_that_share_keys_still_do_in_a_model_of_fewer_layers(tmp_path, layers):
    """Gemma 4's last layers reuse the keys of earlier ones: which ones do, is counted from the end."""
    model = model_of("gemma4_text", hidden_size_per_layer_input=0)
    whole = site_widths(model.config)
    assert {site.layer for site in whole if site.kind == "k"} == {0, 1}
    first = {site: width for site, width in whole.items() if site.layer < layers}
    assert site_widths(with_layers(model.config, layers)) == first
    if layers == 3:
        return  # transformers 5.23 can't run layers that share keys without per-layer inputs
    model.save_pretrained(tmp_path)
    found = activations(load_model(str(tmp_path), layers=layers), IDS, tuple(first))
    assert same(found, activations(model, IDS, tuple(first)))


def test_numbers_of_layers_are_not_taken_for_a_list_by_layer():
    config = config_of("qwen3_moe", mlp_only_layers=[3, 1, 2, 0])
    assert {s.kind for s in site_widths(with_layers(config, 2)) if s.kind in ("router", "mlp_hidden")} == {"mlp_hidden"}


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_a_multimodal_model_is_loaded_as_its_text_model(tmp_path, kind):
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config_of(kind)).eval()
    model.save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).model_type == kind
    sites = parse_sites([f"resid_post.{i}" for i in range(LAYERS - 1)])
    loaded = load_model(str(tmp_path), attention="eager")
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        hidden = model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states
    found = activations(loaded, IDS, sites)
    assert all(torch.equal(found[f"resid_post.{i}"], hidden[i + 1]) for i in range(LAYERS - 1))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache with two revisions of lab/tiny, and no network; models by revision."""
    commits = {"main": "a" * 40, "v1": "b" * 40}
    models = {revision: model_of("llama", seed=seed) for seed, revision in enumerate(commits)}
    for revision, commit in commits.items():
        folder = tmp_path / "models--lab--tiny"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        models[revision].save_pretrained(folder / "snapshots" / commit)
        models[commit] = models[revision]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return models


@pytest.mark.parametrize("revision", [None, "main", "v1", "a" * 40, "b" * 40])
def test_a_hub_revision_decides_on_configuration_and_weights(hub, revision):
    expected = hub[revision or "main"]
    config = load_config("lab/tiny", revision)
    assert revision_of(config) == ("b" * 40 if revision in ("v1", "b" * 40) else "a" * 40)
    assert model_identity("lab/tiny", config, "float32", "default")["weights"] == revision_of(config)
    sites = parse_sites("resid_post.1")
    assert same(activations(load_model("lab/tiny", revision=revision), IDS, sites), activations(expected, IDS, sites))


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")
def test_a_capture_keeps_the_revision_that_it_was_begun_with(hub, tmp_path, in_process, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(TEXTS))
    tokenizer_of(TEXTS).save_pretrained(tmp_path / "tokenizer")
    tokens = TokenizeConfig(
        sources=(str(text),), tokenizer=str(tmp_path / "tokenizer"), seq_len=16, out=str(tmp_path / "tokens")
    )
    table = tokenize(tokens, QUIET)
    config = CaptureConfig(
        model="lab/tiny",
        tokens=tokens.out,
        sites=("resid_post.1",),
        out=str(tmp_path / "store"),
        encoding="f32",
        bucket_rows=128,
        shard_rows=128,
        chunk_rows=64,
        device="cpu",
        dtype="float32",
    )
    with monkeypatch.context() as patch, pytest.raises(CaptureError, match="not complete"):
        patch.setattr(execute_module.Pool, "run", lambda *_: None)  # it ends before any bucket is captured
        capture(config, QUIET)
    (tmp_path / "models--lab--tiny" / "refs" / "main").write_text("b" * 40)
    assert revision_of(load_config("lab/tiny")) == "b" * 40
    capture(config, QUIET)
    assert open_store(config.out).spec.provenance["model"]["weights"] == "a" * 40
    group = zarr.open_group(config.out, mode="r")
    ids = torch.from_numpy(table.ids(0, config.batch_size)).long()
    values = activations(hub["main"], ids, parse_sites("resid_post.1"))["resid_post.1"]
    first = group["sequence"][:] < config.batch_size
    place = torch.from_numpy(group["sequence"][:][first]), torch.from_numpy(group["position"][:][first])
    assert torch.equal(torch.from_numpy(group["resid_post.1"][:][first]), values[place])


def test_a_hub_revision_that_is_not_there_is_refused(hub):
    with pytest.raises(CaptureError, match="lab/tiny: no such directory, and the hub gave none"):
        load_config("lab/tiny", "c" * 40)
    with pytest.raises(CaptureError, match="lab/tiny: no such directory, and the hub gave none"):
        load_model("lab/tiny", revision="v2")


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The sixteen values of e2m1, by bits."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_experts_of_gpt_oss_are_unpacked(tmp_path, dtype):
    """The hub has gpt-oss as MXFP4: blocks of 32 values of 4 bits, two a byte, with a power of two each."""
    sizes = {"hidden_size": 64, "intermediate_size": 32}
    model = model_of.__wrapped__("gpt_oss", getattr(torch, dtype), **sizes)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in [n for n in weights if n.endswith("_proj") and "experts" in n]:
        experts, inputs, outputs = weights.pop(name).shape
        codes = torch.randint(16, (experts, outputs, inputs // 32, 32))
        scales = torch.randint(121, 125, (experts, outputs, inputs // 32))
        values = FP4[codes] * 2.0 ** (scales[..., None] - 127)
        model.get_parameter(name).data = values.flatten(2).transpose(1, 2).contiguous().to(getattr(torch, dtype))
        weights[f"{name}_blocks"] = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        weights[f"{name}_scales"] = scales.to(torch.uint8)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sites = tuple(site_widths(load_config(str(tmp_path))))
    assert same(activations(load_model(str(tmp_path), dtype), IDS, sites), activations(model, IDS, sites))


def test_only_mixtures_of_experts_are_recorded_as_batch_dependent(tmp_path):
    for kind in ("llama", "qwen3_moe", "gpt_oss"):
        model_of(kind).save_pretrained(tmp_path / kind)
        path = str(tmp_path / kind)
        identity = model_identity(path, load_config(path), "float32", "eager")
        assert identity.get("batch_dependent", False) == (kind != "llama")


@pytest.mark.parametrize("device", ["balanced", "cpu"])
def test_placement_changes_no_value(tmp_path, device):
    model = model_of("gemma2")
    model.save_pretrained(tmp_path)
    sites = expand_sites("all", model.config)
    found = activations(load_model(str(tmp_path), device=device, attention="eager"), IDS, sites)
    assert same(found, activations(model, IDS, sites))


def spread(kind: str, at: int):
    """The model with layers from `at` on another device, joined by accelerate's hooks as `device_map` does it."""
    model = copy.deepcopy(model_of(kind, torch.bfloat16))
    decoder, layers = decoder_of(model), "h" if kind == "gpt2" else "layers"
    parts: dict[str, nn.Module] = {n: m for n, m in decoder.named_children() if n != layers}
    final = list(parts)[-1] if kind == "gpt2" else "norm"
    parts |= {f"{layers}.{i}": layer for i, layer in enumerate(layers_of(model))}
    far = [name for name in parts if name == final or (name.startswith(f"{layers}.") and int(name.split(".")[1]) >= at)]
    for name in far:
        parts[name].to("meta")
    devices = {name: torch.device("meta" if name in far else "cpu") for name in parts}
    attach_align_device_hook_on_blocks(decoder, execution_device=devices, offload=dict.fromkeys(parts, False))
    return model


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("ids", [IDS, PADDED], ids=["plain", "padded"])
def test_sites_come_back_on_the_device_where_they_arise(kind, ids):
    """Device `meta` stands for a second GPU: it has shapes and no values. Its experts multiply bfloat16 only."""
    model = spread(kind, 2)
    sites = tuple(site_widths(model.config))
    padding = (ids == 0).long().cumprod(1).sum(1)
    found = activations(model, ids, sites, padding)
    expected = activations(model_of(kind, torch.bfloat16), ids, sites, padding)
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


@pytest.mark.parametrize("kind", ["gptj", "t5", "granite"])
def test_an_architecture_without_sites_is_refused_before_its_weights_are_read(tmp_path, kind):
    config_of(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"architecture '{kind}' has no table of sites: known are gemma, gemma2"):
        load_model(str(tmp_path))


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")
@pytest.mark.parametrize(
    ("kind", "patterns"),
    [
        ("gemma4_text", "all,q.*,[kv].0-1,mlp_hidden.*"),
        ("gpt2", "resid_*.2,[qkv].1,mlp_*.2"),
        ("qwen3_moe", "router.2-3,mlp_hidden.1,v.3,mlp_out.*"),
    ],
)
def test_sites_of_every_kind_and_width_are_stored_as_they_are(tmp_path, in_process, kind, patterns):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    model, tokens = str(save(tmp_path / "model", kind, torch.float32, TEXTS)), str(tmp_path / "tokens")
    tokenize(TokenizeConfig(sources=(str(text),), tokenizer=model, seq_len=16, out=tokens), QUIET)
    out, sizes = str(tmp_path / "store"), {"bucket_rows": 4096, "shard_rows": 4096, "chunk_rows": 64}
    more = {"device": "cpu", "threads": 1, "encoding": "f32", "batch_size": 5}
    capture(CaptureConfig(model=model, tokens=tokens, sites=(patterns,), out=out, **sizes, **more), QUIET)
    group, table, store = zarr.open_group(out, mode="r"), open_tokens(tokens), open_store(out)
    assert store.spec.provenance["model"].get("batch_dependent", False) == (kind == "qwen3_moe")
    sites = expand_sites(patterns, load_config(model))
    assert set(store.sites) == {site.name for site in sites}
    ids = torch.from_numpy(table.ids(0, table.sequences)).long()
    batches = [activations(load_model(model), batch, sites) for batch in ids.split(5)]
    rows = group["sequence"][:], group["position"][:]
    for site in sites:
        expected = torch.cat([batch[site.name] for batch in batches])[rows]
        assert torch.equal(torch.from_numpy(group[site.name][:]), expected)


def peak_of(model, ids) -> int:
    """Bytes that a pass to the last layer takes beside what is there before, as torch's profiler counts them."""
    site = parse_sites(f"resid_post.{LAYERS - 1}")
    activations(model, ids, site)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        activations(model, ids, site)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now, most = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


LINEAR = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
WIDE = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma4_experts": {"moe_intermediate_size": 192},
    "gpt2": {"n_inner": 400},
    "gpt_oss": {"intermediate_size": 160},
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "qwen3_moe": {"mlp_only_layers": [], "moe_intermediate_size": 192, "num_experts_per_tok": 3},
    "qwen3_next": LINEAR,
}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [k for k in MODELS if k not in MULTIMODAL])
def test_one_pass_takes_about_what_memory_reckons_with(kind, dtype):
    sizes = {"hidden_size": 128, "intermediate_size": 512, "max_position_embeddings": 131072} | WIDE.get(kind, {})
    model = model_of.__wrapped__(kind, dtype, **sizes)
    ids = torch.randint(3, 2000, (2, 128), generator=torch.Generator().manual_seed(2))
    reckoned = _pass_bytes(model.config, *ids.shape, dtype.itemsize)
    assert 0.65 * reckoned < peak_of(model, ids) < 1.3 * reckoned
