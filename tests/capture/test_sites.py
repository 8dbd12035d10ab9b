"""Sites against the models' own arithmetic: every statement in `actstore.capture.sites`, in numbers.

Proofs run for every architecture of the table, in float32 and bfloat16, with eager and with fused attention.
"""

import copy
import importlib.util
import re
import sys
from functools import cache

import pytest
import torch
from tiny import LAYERS, MULTIMODAL, VARIANTS, VOCAB, config_of, model_of
from torch.nn.functional import embedding

from actstore.capture.forward import activations, decoder_of
from actstore.capture.model import without_head
from actstore.capture.precision import attention_of
from actstore.capture.sites import (
    ABSENT,
    ARCHITECTURES,
    CLASSIC,
    KINDS,
    Site,
    check_sites,
    expand_sites,
    layers_of,
    parse_sites,
    site_widths,
)

MODELS = (*(kind for kind in ARCHITECTURES if kind not in MULTIMODAL), *VARIANTS)
WITHOUT_SDPA = {"gemma2", "gpt_oss"}
EXPERTS = {"gemma4_experts", "gpt_oss", "mixtral", "olmoe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next"}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
ATTENTION = [(kind, a) for kind in MODELS for a in ("eager", "sdpa") if a == "eager" or kind not in WITHOUT_SDPA]
LIKE_LLAMA = {"gemma", "mistral", "mixtral", "qwen2", "smollm3"}
ABSENT_FROM = {
    "gemma4_experts": {f"{kind}.{i}" for kind in ("mlp_in", "mlp_hidden") for i in range(LAYERS)},
    "gemma4_text": {f"{kind}.{i}" for kind in "kv" for i in (2, 3)},
    "gpt_neox": {f"resid_mid.{i}" for i in range(LAYERS)},
    "gpt_oss": {f"mlp_hidden.{i}" for i in range(LAYERS)},
    "qwen3_5_text": {f"{kind}.{i}" for kind in "qkv" for i in (0, 2)},
    "qwen3_moe": {"mlp_hidden.0", "mlp_hidden.2", "mlp_hidden.3", "router.1"},
}
ABSENT_FROM["qwen3_next"] = ABSENT_FROM["qwen3_5_text"] | ABSENT_FROM["gpt_oss"]
ABSENT_FROM["qwen3_5_moe_text"] = ABSENT_FROM["qwen3_next"]
ABSENT_FROM["mixtral"] = ABSENT_FROM["olmoe"] = ABSENT_FROM["gpt_oss"]
for _kind in set(MODELS) - EXPERTS:
    ABSENT_FROM[_kind] = ABSENT_FROM.get(_kind, set()) | {f"router.{i}" for i in range(LAYERS)}

each = pytest.mark.parametrize("kind", MODELS)


def case(kind: str, attention: str, *dtype: str):
    """Fused attention is in the slow set where it is like Llama's, and in bfloat16."""
    slow = attention == "sdpa" and (kind in LIKE_LLAMA or "bf16" in dtype)
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(
        kind, attention, *(DTYPES[d] for d in dtype), marks=marks, id="-".join((kind, attention, *dtype))
    )


each_attention = pytest.mark.parametrize(("kind", "attention"), [case(*c) for c in ATTENTION])
every = pytest.mark.parametrize(("kind", "attention", "dtype"), [case(*c, d) for c in ATTENTION for d in DTYPES])


@cache
def all_of(kind: str) -> tuple[Site, ...]:
    """Every kind in every layer but those of `ABSENT_FROM`."""
    names = {f"{k}.{i}" for k in KINDS for i in range(LAYERS) if k != "resid_pre"} | {"resid_pre.0"}
    return parse_sites(sorted(names - ABSENT_FROM.get(kind, set())))


def names_of(kind: str) -> set[str]:
    return {site.name for site in all_of(kind)}


def mixer(layer) -> tuple[torch.nn.Module, str]:
    """What mixes tokens in this layer, and the name of its output projection."""
    known = {"self_attn": "o_proj", "linear_attn": "out_proj", "attn": "c_proj", "attention": "dense"}
    return next((getattr(layer, name), projection) for name, projection in known.items() if hasattr(layer, name))


def child(module, *names: str):
    return next(getattr(module, name) for name in names if hasattr(module, name))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For models this small more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (3, 24), generator=torch.Generator().manual_seed(1))


@every
@torch.inference_mode()
def test_the_residual_stream_is_what_transformers_calls_hidden_states(kind, dtype, attention, ids):
    model = model_of(kind, dtype, attention=attention)
    decoder = decoder_of(model)
    found = activations(model, ids, all_of(kind))
    out = decoder(input_ids=ids, output_hidden_states=True, use_cache=False)
    assert torch.equal(found["resid_pre.0"], out.hidden_states[0])
    for layer in range(LAYERS - 1):
        assert torch.equal(found[f"resid_post.{layer}"], out.hidden_states[layer + 1])
    last = found[f"resid_post.{LAYERS - 1}"]
    assert not torch.equal(last, out.last_hidden_state)
    assert torch.equal(child(decoder, "norm", "final_layer_norm", "ln_f")(last), out.last_hidden_state)
    assert {str(x.dtype) for x in found.values()} == {str(dtype)}
    assert {x.shape[:2] for x in found.values()} == {ids.shape}


@each
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_resid_pre_is_the_embedding_after_gemmas_normaliser(kind, dtype, ids):
    model = model_of(kind, dtype)
    weight = model.get_input_embeddings().weight
    scale = weight.shape[1] ** 0.5 if kind.startswith("gemma") else 1.0
    expected = embedding(ids, weight) * torch.tensor(scale, dtype=dtype)
    if kind == "gpt2":
        expected = expected + decoder_of(model).wpe.weight[: ids.shape[1]]
    assert torch.equal(activations(model, ids, parse_sites("resid_pre.0"))["resid_pre.0"], expected)


def per_layer_inputs(model, ids) -> list:
    """What Gemma 4 hands to each layer beside the stream."""
    calls = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: calls.append(args[1] if len(args) > 1 else None))
        for layer in layers_of(model)
    ]
    decoder_of(model)(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def mlp_of(layer, middle: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """What the layer's MLP and experts make of the stream, before the norm behind them."""
    out = layer.mlp(read)
    out = out[0] if isinstance(out, tuple) else out
    if getattr(layer, "enable_moe_block", False):
        flat = middle.flatten(0, 1)
        _, weights, chosen = layer.router(flat)
        experts = layer.experts(layer.pre_feedforward_layernorm_2(flat), chosen, weights).reshape(middle.shape)
        out = layer.post_feedforward_layernorm_1(out) + layer.post_feedforward_layernorm_2(experts)
    return out


def end_of(layer, after: torch.Tensor, per_layer_input: torch.Tensor | None) -> torch.Tensor:
    """Gemma 4: the branch of per-layer inputs, and the scalar of the layer."""
    if hasattr(layer, "per_layer_input_gate"):
        gated = layer.act_fn(layer.per_layer_input_gate(after)) * per_layer_input
        after = after + layer.post_per_layer_input_norm(layer.per_layer_projection(gated))
    return after * layer.layer_scalar if hasattr(layer, "layer_scalar") else after


def proof(model, ids, sites):
    """resid_pre + f(attn_out) is resid_mid, mlp_in is what the MLP reads of it, resid_mid + mlp_out is resid_post."""
    found = activations(model, ids, sites)
    before, extra = found["resid_pre.0"], per_layer_inputs(model, ids)
    for i, layer in enumerate(layers_of(model)):
        module, projection = mixer(layer)
        attention = getattr(module, projection)(found[f"attn_out.{i}"])
        mlp_out, after = found[f"mlp_out.{i}"], found[f"resid_post.{i}"]
        gemma_or_olmo = hasattr(layer, "post_feedforward_layernorm")
        if gemma_or_olmo:
            attention = layer.post_attention_layernorm(attention)
        middle = before + attention
        parallel = getattr(layer, "use_parallel_residual", False)
        if gemma_or_olmo:
            norm = getattr(layer, "pre_feedforward_layernorm", lambda x: x)
        else:
            norm = child(layer, "post_attention_layernorm", "ln_2")
        read = norm(before if parallel else middle)
        if not parallel:
            assert torch.equal(found[f"resid_mid.{i}"], middle)
        if f"mlp_in.{i}" in found:
            assert torch.equal(found[f"mlp_in.{i}"], read)
        made = mlp_of(layer, middle, read)
        if f"mlp_hidden.{i}" in found:
            project = child(layer.mlp, "down_proj", "c_proj", "dense_4h_to_h")
            assert torch.equal(project(found[f"mlp_hidden.{i}"]), made)
        assert torch.equal(mlp_out, layer.post_feedforward_layernorm(made) if gemma_or_olmo else made)
        summed = mlp_out + attention + before if parallel else middle + mlp_out
        assert torch.equal(end_of(layer, summed, extra[i]), after)
        before = after


@every
@torch.inference_mode()
def test_attention_and_mlp_rebuild_the_residual_stream(kind, dtype, attention, ids):
    proof(model_of(kind, dtype, attention=attention), ids, all_of(kind))


@torch.inference_mode()
def test_the_proof_refuses_an_architecture_that_does_not_fit_the_table(ids, monkeypatch):
    """Granite multiplies what attention and MLP add."""
    monkeypatch.setitem(ARCHITECTURES, "granite", ARCHITECTURES["llama"])
    with pytest.raises(AssertionError):
        proof(model_of("granite"), ids, all_of("llama"))


@every
@torch.inference_mode()
def test_attn_out_is_what_attention_returns_without_its_output_projection(kind, dtype, attention, ids):
    model = model_of(kind, dtype, attention=attention)
    calls = []
    mixers = [mixer(layer) for layer in layers_of(model)]
    handles = [
        module.register_forward_pre_hook(lambda m, args, kw: calls.append((m, args, kw)), with_kwargs=True)
        for module, _ in mixers
    ]
    decoder_of(model)(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    found = activations(model, ids, all_of(kind))
    for i, ((module, args, kwargs), (_, projection)) in enumerate(zip(calls, mixers, strict=True)):
        bare = copy.copy(module)
        bare._modules = module._modules | {projection: torch.nn.Identity()}
        out = bare(*args, **kwargs)
        assert torch.equal(out[0] if isinstance(out, tuple) else out, found[f"attn_out.{i}"])


@pytest.fixture
def heads(monkeypatch):
    """What attention multiplies: per layer its module, queries, keys and values after rotation, weights, angles."""

    def run(model, ids) -> dict[int, dict]:
        modeling = sys.modules[type(decoder_of(model)).__module__]
        eager, seen, angles = modeling.eager_attention_forward, {}, {}

        def watched(module, query, key, value, *args, **kwargs):
            out, weights = eager(module, query, key, value, *args, **kwargs)
            seen[module.layer_idx] = {"module": module, "q": query, "k": key, "v": value, "weights": weights}
            return out, weights

        monkeypatch.setattr(modeling, "eager_attention_forward", watched)
        handles = [
            mixer(layer)[0].register_forward_pre_hook(
                lambda module, _, kw: angles.update({module.layer_idx: kw.get("position_embeddings")}), with_kwargs=True
            )
            for layer in layers_of(model)
        ]
        decoder_of(model)(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
        return {i: {**what, "angles": angles[i], "modeling": modeling} for i, what in seen.items()}

    return run


def rotated(x: torch.Tensor, of: dict) -> torch.Tensor:
    """[sequences, heads, seq_len, head_dim] at its positions; models without rotation in this layer leave it."""
    if of["angles"] is None or getattr(of["module"], "use_rope", 1) == 0:
        return x
    rotate = of["modeling"].apply_rotary_pos_emb
    return rotate(x, *of["angles"]) if "gemma4" in rotate.__module__ else rotate(x, x, *of["angles"])[0]


@each
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@torch.inference_mode()
def test_q_k_and_v_are_what_attention_multiplies_but_for_rotation(kind, dtype, ids, heads):
    model = model_of(kind, dtype, attention="eager")
    found = activations(model, ids, all_of(kind))
    seen = heads(model, ids)
    assert {f"q.{i}" for i in seen} == {name for name in found if name[:2] == "q."}
    for i, of in seen.items():
        for name in ("q", "k", "v"):
            if f"{name}.{i}" not in found:
                assert f"{name}.{i}" in ABSENT_FROM[kind]
                continue
            split = found[f"{name}.{i}"].unflatten(-1, (of[name].shape[1], -1)).transpose(1, 2)
            assert torch.equal(split if name == "v" else rotated(split, of), of[name])


@each
@torch.inference_mode()
def test_attn_out_is_the_heads_concatenated(kind, ids, heads):
    """Head h is its row of transformers' attention weights times the values of its group; Qwen 3.5 gates it."""
    model = model_of(kind, attention="eager")
    found = activations(model, ids, all_of(kind))
    for i, of in heads(model, ids).items():
        weights, values = of["weights"], of["v"]
        values = values.repeat_interleave(weights.shape[1] // values.shape[1], dim=1)
        expected = torch.cat(list((weights @ values).unbind(1)), dim=-1)
        if hasattr(layers_of(model)[0], "linear_attn"):
            layer = layers_of(model)[i]
            both = layer.self_attn.q_proj(layer.input_layernorm(found[f"resid_post.{i - 1}"]))
            expected *= both.unflatten(-1, (weights.shape[1], 2, -1))[..., 1, :].flatten(2).sigmoid()
        torch.testing.assert_close(found[f"attn_out.{i}"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(EXPERTS))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@torch.inference_mode()
def test_router_is_what_transformers_records_of_it(kind, dtype, ids):
    model = model_of(kind, dtype)
    found = activations(model, ids, all_of(kind))
    logits = [found[name].flatten(0, 1) for name in sorted(found) if name.startswith("router")]
    if kind == "gemma4_experts":
        logits = [x.softmax(-1, dtype=torch.float32) for x in logits]
    recorded = decoder_of(model)(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
    assert len(logits) == len(recorded)
    assert all(torch.equal(x, y) for x, y in zip(logits, recorded, strict=True))


@each
def test_widths_from_the_configuration_are_the_widths_of_the_activations(kind, ids):
    config = config_of(kind)
    found = activations(model_of(kind), ids, all_of(kind))
    assert {name: x.shape[-1] for name, x in found.items()} == check_sites(config, all_of(kind), "tiny")
    assert {site.name for site in site_widths(config)} == names_of(kind)
    assert any(site.kind == "router" for site in all_of(kind)) == (kind in EXPERTS)


@each
def test_many_sites_in_one_pass_are_what_each_is_alone(kind, ids):
    model = model_of(kind)
    found = activations(model, ids, all_of(kind))
    assert set(found) == names_of(kind)
    for site in all_of(kind):
        (alone,) = activations(model, ids, [site]).values()
        assert torch.equal(found[site.name], alone)
        assert alone.untyped_storage().nbytes() == alone.nbytes  # it keeps no larger tensor in memory


@each
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_sequence_has_the_same_values_in_batches_of_every_size(kind, dtype, ids):
    model = model_of(kind, dtype)
    found = activations(model, ids, all_of(kind))
    for rows in (slice(0, 1), slice(1, 3)):
        for name, x in activations(model, ids[rows], all_of(kind)).items():
            difference = (found[name][rows] - x).float().norm()
            assert difference <= (1e-5 if dtype == torch.float32 else 2e-2) * x.float().norm()


def test_only_attention_with_caps_or_sinks_is_chosen_and_by_device():
    chosen = {kind: attention_of(config_of(kind)) for kind in ARCHITECTURES}
    assert {kind for kind, attention in chosen.items() if attention == "eager"} == WITHOUT_SDPA
    assert {a for kind, a in chosen.items() if kind not in WITHOUT_SDPA} == {"default"}
    capped = attention_of(config_of("gemma2"), "cuda")
    assert capped == ("flex_attention" if importlib.util.find_spec("triton") else "eager")
    assert attention_of(config_of("gpt_oss"), "cuda") == "eager"


def test_keyword_calls_and_tuples_as_other_versions_of_transformers_have_them(ids, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

    def layer(self, hidden_states, **kwargs):
        residual = hidden_states
        hidden_states, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = residual + hidden_states
        return hidden_states + self.mlp(x=self.post_attention_layernorm(hidden_states)), None

    def decoder(self, input_ids, use_cache):
        x = self.embed_tokens(input_ids)
        rope = self.rotary_emb(x, position_ids=torch.arange(x.shape[1])[None])
        for module in self.layers:
            x = module(attention_mask=None, position_embeddings=rope, hidden_states=x)[0]
        return x

    model = model_of("llama")
    expected = activations(model, ids, all_of("llama"))
    monkeypatch.setattr(LlamaDecoderLayer, "forward", layer)
    monkeypatch.setattr(LlamaModel, "forward", decoder)
    found = activations(model, ids, all_of("llama"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_nothing_runs_after_the_deepest_site_and_no_hook_stays(ids):
    model = model_of("gemma2")
    decoder = decoder_of(model)
    ran = []
    names = {id(m): n for n, m in model.named_modules()}
    handles = [m.register_forward_hook(lambda m, *_: ran.append(names[id(m)])) for m in model.modules()]
    activations(model, ids, parse_sites("resid_post.0,attn_out.2"))
    for handle in handles:
        handle.remove()
    assert any("layers.2.self_attn.q_proj" in n for n in ran)
    forbidden = ("layers.2.self_attn.o_proj", "layers.2.mlp", "layers.3", "model.norm", "lm_head")
    assert not [n for n in ran if any(f in n for f in forbidden)]
    assert not [n for n, m in decoder.named_modules() if m._forward_hooks or m._forward_pre_hooks]


def test_hooks_are_removed_after_an_error(ids):
    model = model_of("llama")
    with pytest.raises(IndexError):
        activations(model, torch.full_like(ids, VOCAB), parse_sites("resid_post.1"))
    assert not [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]


def test_shapes_are_checked(ids):
    from jaxtyping import TypeCheckError

    with pytest.raises(TypeCheckError):
        activations(model_of("llama"), ids[0], all_of("llama"))
    with pytest.raises(TypeCheckError):
        activations(model_of("llama"), ids, all_of("llama"), ids)


@each
def test_a_model_without_its_head_has_the_same_sites(kind, ids):
    model = copy.deepcopy(model_of(kind))
    whole = activations(model, ids, all_of(kind))
    without_head(model)
    assert {id(p) for p in model.parameters()} == {id(p) for p in decoder_of(model).parameters()}
    cut = activations(model, ids, all_of(kind))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.slow  # compiles attention for the processor
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_flex_attention_caps_logits_as_eager_attention_does(ids):
    padded = ids.clone()
    padded[1, :10] = 0
    expected, found = (
        activations(
            model_of("gemma2", attention=a), padded, all_of("gemma2"), torch.tensor([0, 10, *[0] * (len(ids) - 2)])
        )
        for a in ("eager", "flex_attention")
    )
    rows = padded != 0
    for name in names_of("gemma2"):
        torch.testing.assert_close(found[name][rows], expected[name][rows], rtol=1e-4, atol=1e-5)


@each_attention
def test_padding_behind_a_sequence_changes_nothing_before_it(kind, attention, ids):
    model = model_of(kind, attention=attention)
    padded = ids.clone()
    padded[:, 10:] = 0
    none = torch.zeros(len(ids), dtype=torch.int64)
    found, cut = activations(model, ids, all_of(kind)), activations(model, padded, all_of(kind), none)
    tolerance = 1e-4 if kind in EXPERTS else 0  # experts multiply rows of the whole batch as one matrix
    for name in names_of(kind):
        torch.testing.assert_close(found[name][:, :10], cut[name][:, :10], rtol=tolerance, atol=tolerance)


@each_attention
@pytest.mark.parametrize("pad", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["own", "bos"])
def test_tokens_behind_padding_have_the_values_they_have_without(kind, attention, pad, ids):
    """Windows of 8, so the padding is longer and shorter than one; a row of nothing but padding is left alone."""
    model = model_of(kind, attention=attention)
    lengths = (24, 15, 4, 0)
    padded = torch.full((4, 24), pad)
    for row, n in enumerate(lengths[:3]):
        padded[row, 24 - n :] = torch.cat([torch.tensor([1]), ids[0, 1:n]])
    found = activations(model, padded, all_of(kind), torch.tensor([0, 9, 20, 0]))
    for row, n in enumerate(lengths[:3]):
        alone = activations(model, padded[row : row + 1, 24 - n :], all_of(kind))
        for name in names_of(kind):
            torch.testing.assert_close(found[name][row, 24 - n :], alone[name][0], rtol=1e-4, atol=1e-5)
    assert all(x.isfinite().all() for x in found.values())


@each
def test_positions_count_from_the_first_token(kind, ids):
    """Rotary angles are relative but for rounding, which in bfloat16 is 1% where positions are shifted."""
    model = model_of(kind, torch.bfloat16, attention="eager")
    padded = ids.clone()
    padded[1, :13] = 0
    padding = torch.tensor([0, 13, *[0] * (len(ids) - 2)])
    found = activations(model, padded, all_of(kind), padding)
    alone = activations(model, padded[1:2, 13:], all_of(kind))
    for name in names_of(kind):
        expected = alone[name][0].float()
        assert (found[name][1, 13:].float() - expected).norm() < 4e-3 * expected.norm()


@each_attention
def test_without_padding_in_front_no_mask_is_passed(kind, attention, ids):
    model = model_of(kind, attention=attention)
    odd = ids.clone()
    odd[1, 5:9], odd[2] = 0, 0
    none = torch.zeros(len(odd), dtype=torch.int64)
    plain, checked = activations(model, odd, all_of(kind)), activations(model, odd, all_of(kind), none)
    assert all(torch.equal(plain[name], checked[name]) for name in names_of(kind))


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("resid_post.12, mlp_out.0", ["mlp_out.0", "resid_post.12"]),
        ("*.12", ["attn_out.12", "mlp_in.12", "mlp_out.12", "resid_post.12"]),
        ("resid_p*.0", ["resid_post.0", "resid_pre.0"]),
        ("mlp_out.8-10", ["mlp_out.8", "mlp_out.9", "mlp_out.10"]),
        ("mlp_*.24-25", [f"mlp_{kind}.{i}" for i in (24, 25) for kind in ("hidden", "in", "out")]),
        ("[qkv].3,resid_*.3", ["k.3", "q.3", "resid_mid.3", "resid_post.3", "v.3"]),
        ("mlp_out.3-3,*_out.3,mlp_out.3,mlp_out.3", ["attn_out.3", "mlp_out.3"]),
        (["resid_post.2?", "resid_pre.*"], ["resid_pre.0", *(f"resid_post.{i}" for i in range(20, 26))]),
    ],
)
def test_patterns(patterns, names):
    assert [s.name for s in expand_sites(patterns, config_of("gemma2", num_hidden_layers=26))] == names


def test_all_is_every_classic_kind_in_every_layer_and_the_embedding():
    sites = expand_sites("all", config_of("gemma3"))
    assert set(sites) == {site for site in all_of("gemma3_text") if site.kind in CLASSIC}
    assert set(sites) == set(expand_sites("*", config_of("llama"))) == set(expand_sites("all", config_of("gpt_neox")))
    assert len(sites) == 4 * LAYERS + 1
    assert len(expand_sites("resid_post.*", config_of("llama"))) == LAYERS


@pytest.mark.parametrize("pattern", ["mlp_out.4", "mlp_out.*4", "mlp_out.2-4", "mlp_in.3-2", "foo.*", "*.0-9", "a.0-1"])
def test_patterns_that_match_nothing_are_refused(pattern):
    message = rf"site .*: this llama model has layers 0-3 and kinds {', '.join(KINDS)}$"
    with pytest.raises(ValueError, match=message):
        expand_sites(["resid_post.0", pattern], config_of("llama"))


@pytest.mark.parametrize(
    ("kind", "pattern", "first", "others"),
    [
        ("gemma4_experts", "all", "mlp_in.0", "no mlp_in"),
        ("gemma4_text", "v.*", "v.2", "v.0, v.1"),
        ("gpt_neox", "resid_*.1-2", "resid_mid.1", "no resid_mid"),
        ("gpt_oss", "mlp_*.0", "mlp_hidden.0", "no mlp_hidden"),
        ("llama", "router.3", "router.3", "no router"),
        ("qwen3_5", "q.*", "q.0", "q.1, q.3"),
        ("qwen3_moe", "router.*", "router.1", "router.0, router.2, router.3"),
    ],
)
def test_a_layer_that_lacks_a_site_is_refused_with_the_reason(kind, pattern, first, others, ids):
    config, (site,) = config_of(kind), parse_sites(first)
    why = rf"{first}, because {ABSENT[site.kind]}"
    with pytest.raises(ValueError, match=rf"^site {re.escape(pattern)}: this \w+ model has no {why}; it has {others}$"):
        expand_sites(["resid_post.0", pattern], config)
    with pytest.raises(ValueError, match=rf"^site {first}: \w+ model tiny has no {why}; it has {others}$"):
        check_sites(config, [site], "tiny")
    with pytest.raises(ValueError, match=rf"^site {first}: the model does not have it, because {ABSENT[site.kind]}$"):
        activations(model_of(kind), ids, [site])


@each
def test_every_site_that_a_layer_lacks_has_a_reason(kind):
    config, layers = config_of(kind), range(LAYERS)
    every = {Site(i, k) for k in KINDS for i in layers if k != "resid_pre" or i == 0}
    assert {site.kind for site in every - set(site_widths(config))} <= set(ABSENT)


def test_names():
    assert [s.name for s in parse_sites("resid_post.12, mlp_out.0")] == ["resid_post.12", "mlp_out.0"]
    assert parse_sites(("attn_out.1", "mlp_in.2,mlp_in.3")) == parse_sites("attn_out.1,mlp_in.2,mlp_in.3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo.1", r"unknown site kind 'foo' in 'foo.1': known are resid_pre, resid_mid, resid_post, attn_out"),
        ("resid_post", "has no layer number"),
        ("resid_post.-1", "has no layer number"),
        ("resid_post.01", "has no layer number"),
        ("resid_pre.5", "what enters layer 5 is resid_post.4; use that name"),
        ("", "no sites given"),
        (" , ", "no sites given"),
    ],
)
def test_bad_names_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_sites(text)
    with pytest.raises(ValueError, match=message):
        expand_sites(text, config_of("llama"))


def test_sites_that_the_model_lacks_are_refused():
    with pytest.raises(ValueError, match=r"site mlp_out\.1 is named twice"):
        parse_sites("mlp_out.1,mlp_out.1")
    with pytest.raises(ValueError, match=r"site resid_post.40: gemma2 model tiny has layers 0-3"):
        check_sites(config_of("gemma2"), parse_sites("resid_post.40"), "tiny")
    for kind, setting in (("gemma3_text", True), ("gemma4_text", "all")):
        with pytest.raises(ValueError, match="model tiny: its attention is bidirectional"):
            check_sites(config_of(kind, use_bidirectional_attention=setting), parse_sites("resid_post.0"), "tiny")
    images_only = config_of("gemma4_text", use_bidirectional_attention="vision")
    assert check_sites(images_only, parse_sites("resid_post.0"), "tiny") == {"resid_post.0": 48}
    for refuse in (lambda c: check_sites(c, parse_sites("resid_post.0"), "tiny"), lambda c: expand_sites("all", c)):
        with pytest.raises(ValueError, match=r"architecture 'granite' has no table of sites: known are gemma, gemma2"):
            refuse(config_of("granite"))
