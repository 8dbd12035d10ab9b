"""Sites against the models' own arithmetic: every statement in `actstore.capture.sites`, in numbers."""

import copy

import pytest
import torch
from tiny import LAYERS, VOCAB, config_of, model_of

from actstore.capture.forward import activations, decoder_of
from actstore.capture.model import truncate
from actstore.capture.sites import ARCHITECTURES, check_sites, parse_sites

KINDS = list(ARCHITECTURES)
GEMMA = [k for k in KINDS if k.startswith("gemma")]
DTYPES = [torch.float32, torch.bfloat16]
ALL = parse_sites(",".join(f"{kind}.{layer}" for layer in range(LAYERS) for kind in ARCHITECTURES["llama"]))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (3, 24), generator=torch.Generator().manual_seed(1))


def both(function):
    return pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])(
        pytest.mark.parametrize("kind", KINDS)(function)
    )


def recorded(module: torch.nn.Module, run):
    """The output of a module during `run`."""
    seen = []
    handle = module.register_forward_hook(lambda _m, _i, output: seen.append(output))
    run()
    handle.remove()
    return seen[0]


@both
def test_resid_post_is_what_transformers_calls_hidden_states(kind, dtype, ids):
    model = model_of(kind, dtype)
    decoder = decoder_of(model)
    found = activations(model, ids, ALL)
    with torch.inference_mode():
        out = decoder(input_ids=ids, output_hidden_states=True, use_cache=False)
        for layer in range(LAYERS - 1):
            assert torch.equal(found[f"resid_post.{layer}"], out.hidden_states[layer + 1])
        last = found[f"resid_post.{LAYERS - 1}"]
        assert not torch.equal(last, out.last_hidden_state)
        assert torch.equal(decoder.norm(last), out.last_hidden_state)


@both
def test_attn_out_and_mlp_rebuild_the_residual_stream(kind, dtype, ids):
    """resid_pre + f(attn_out) is resid_mid, mlp_in is its norm, and resid_mid + mlp_out is resid_post: bit for bit."""
    model = model_of(kind, dtype)
    decoder = decoder_of(model)
    found = activations(model, ids, ALL)
    with torch.inference_mode():
        embedded = decoder.embed_tokens(ids)
        for i, layer in enumerate(decoder.layers):
            before = embedded if i == 0 else found[f"resid_post.{i - 1}"]
            attention = layer.self_attn.o_proj(found[f"attn_out.{i}"])
            mlp_in, mlp_out = found[f"mlp_in.{i}"], found[f"mlp_out.{i}"]
            if kind in GEMMA:
                middle = before + layer.post_attention_layernorm(attention)
                assert torch.equal(mlp_in, layer.pre_feedforward_layernorm(middle))
                assert torch.equal(mlp_out, layer.post_feedforward_layernorm(layer.mlp(mlp_in)))
            else:
                middle = before + attention
                assert torch.equal(mlp_in, layer.post_attention_layernorm(middle))
                assert torch.equal(mlp_out, layer.mlp(mlp_in))
            assert torch.equal(middle + mlp_out, found[f"resid_post.{i}"])


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_attn_out_is_the_heads_concatenated(kind, ids):
    """Head h is its attention weights times its group's values, and o_proj of all heads is attention's output."""
    model = copy.deepcopy(model_of(kind))
    model.set_attn_implementation("eager")
    decoder = decoder_of(model)
    attention = decoder.layers[1].self_attn
    output, weights = recorded(attention, lambda: decoder(input_ids=ids, use_cache=False))
    v = recorded(attention.v_proj, lambda: decoder(input_ids=ids, use_cache=False))
    found = activations(model, ids, parse_sites("attn_out.1"))["attn_out.1"]
    assert torch.equal(attention.o_proj(found), output)
    d, heads = attention.head_dim, weights.shape[1]
    groups = v.shape[-1] // d
    assert found.shape[-1] == heads * d
    for h in range(heads):
        g = h * groups // heads
        expected = weights[:, h] @ v[..., g * d : (g + 1) * d]
        torch.testing.assert_close(found[..., h * d : (h + 1) * d], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_widths_from_the_configuration_are_the_widths_of_the_activations(kind, ids):
    config = config_of(kind)
    found = activations(model_of(kind), ids, ALL)
    assert {name: x.shape[-1] for name, x in found.items()} == check_sites(config, ALL, "tiny")


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


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_changes_nothing_below(kind, ids):
    model = copy.deepcopy(model_of(kind))
    sites = parse_sites("resid_post.1,mlp_out.0,attn_out.1,mlp_in.1")
    whole = activations(model, ids, sites)
    truncate(model, 1)
    assert len(decoder_of(model).layers) == 2
    cut = activations(model, ids, sites)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_padding_at_the_end_changes_nothing_before_it(ids):
    model = model_of("gemma2")
    padded = ids.clone()
    padded[:, 10:] = 0
    sites = parse_sites(f"resid_post.{LAYERS - 1}")
    found, cut = activations(model, ids, sites), activations(model, padded, sites)
    (name,) = found
    assert torch.equal(found[name][:, :10], cut[name][:, :10])


def test_names():
    assert [s.name for s in parse_sites("resid_post.12, mlp_out.0")] == ["resid_post.12", "mlp_out.0"]
    assert parse_sites(("attn_out.1", "mlp_in.2,mlp_in.3")) == parse_sites("attn_out.1,mlp_in.2,mlp_in.3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo.1", r"unknown site kind 'foo' in 'foo.1': known are resid_post, mlp_out, attn_out, mlp_in"),
        ("resid_post", "has no layer number"),
        ("resid_post.-1", "has no layer number"),
        ("resid_post.01", "has no layer number"),
        ("mlp_out.1,mlp_out.1", "named twice"),
        ("", "no sites given"),
    ],
)
def test_bad_names_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_sites(text)


def test_sites_that_the_model_lacks_are_refused():
    with pytest.raises(ValueError, match=r"site resid_post.40: gemma2 model tiny has layers 0-3"):
        check_sites(config_of("gemma2"), parse_sites("resid_post.40"), "tiny")
    from transformers import GPT2Config

    with pytest.raises(ValueError, match=r"architecture 'gpt2' has no table of sites: known are gemma2"):
        check_sites(GPT2Config(), parse_sites("resid_post.0"), "tiny")
