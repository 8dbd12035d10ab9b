"""Sites against the models' own arithmetic: every statement in `actstore.capture.sites`, in numbers.

Proofs run for every architecture of the table, in float32 and bfloat16, with eager and with fused attention.
"""

import copy
import importlib.util

import pytest
import torch
from tiny import LAYERS, VOCAB, config_of, model_of
from torch.nn.functional import embedding

from actstore.capture.forward import activations, decoder_of, left_padding
from actstore.capture.model import without_head
from actstore.capture.precision import attention_of
from actstore.capture.sites import ARCHITECTURES, KINDS, check_sites, expand_sites, parse_sites

SOFT_CAPPED = {"gemma2"}
ALL = (
    *parse_sites([f"{k}.{i}" for i in range(LAYERS) for k in KINDS if k != "resid_pre"]),
    *parse_sites("resid_pre.0"),
)
NAMES = {site.name for site in ALL}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
ATTENTION = [(kind, a) for kind in ARCHITECTURES for a in ("eager", "sdpa") if a == "eager" or kind not in SOFT_CAPPED]

each = pytest.mark.parametrize("kind", ARCHITECTURES)
each_attention = pytest.mark.parametrize(("kind", "attention"), ATTENTION)


def every(function):
    return pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)(each_attention(function))


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
    found = activations(model, ids, ALL)
    out = decoder(input_ids=ids, output_hidden_states=True, use_cache=False)
    assert torch.equal(found["resid_pre.0"], out.hidden_states[0])
    for layer in range(LAYERS - 1):
        assert torch.equal(found[f"resid_post.{layer}"], out.hidden_states[layer + 1])
    last = found[f"resid_post.{LAYERS - 1}"]
    assert not torch.equal(last, out.last_hidden_state)
    assert torch.equal(decoder.norm(last), out.last_hidden_state)
    assert {str(x.dtype) for x in found.values()} == {str(dtype)}


@each
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_resid_pre_is_the_embedding_after_gemmas_normaliser(kind, dtype, ids):
    model = model_of(kind, dtype)
    weight = decoder_of(model).embed_tokens.weight
    scale = weight.shape[1] ** 0.5 if kind.startswith("gemma") else 1.0
    expected = embedding(ids, weight) * torch.tensor(scale, dtype=dtype)
    assert torch.equal(activations(model, ids, parse_sites("resid_pre.0"))["resid_pre.0"], expected)


def proof(model, ids):
    """resid_pre + f(attn_out) is resid_mid, mlp_in is what the MLP reads of it, resid_mid + mlp_out is resid_post."""
    found = activations(model, ids, ALL)
    before = found["resid_pre.0"]
    for i, layer in enumerate(decoder_of(model).layers):
        attention = layer.self_attn.o_proj(found[f"attn_out.{i}"])
        mlp_in, mlp_out, after = (found[f"{kind}.{i}"] for kind in ("mlp_in", "mlp_out", "resid_post"))
        if hasattr(layer, "post_feedforward_layernorm"):
            middle = before + layer.post_attention_layernorm(attention)
            norm = getattr(layer, "pre_feedforward_layernorm", lambda x: x)
            assert torch.equal(mlp_out, layer.post_feedforward_layernorm(layer.mlp(mlp_in)))
        else:
            middle = before + attention
            norm = layer.post_attention_layernorm
            assert torch.equal(mlp_out, layer.mlp(mlp_in))
        assert torch.equal(mlp_in, norm(middle))
        assert torch.equal(middle + mlp_out, after)
        before = after


@every
@torch.inference_mode()
def test_attention_and_mlp_rebuild_the_residual_stream(kind, dtype, attention, ids):
    proof(model_of(kind, dtype, attention=attention), ids)


@torch.inference_mode()
def test_the_proof_refuses_an_architecture_that_does_not_fit_the_table(ids, monkeypatch):
    """Granite multiplies what attention and MLP add."""
    monkeypatch.setitem(ARCHITECTURES, "granite", ARCHITECTURES["llama"])
    with pytest.raises(AssertionError):
        proof(model_of("granite"), ids)


@every
@torch.inference_mode()
def test_attn_out_is_what_attention_returns_without_its_output_projection(kind, dtype, attention, ids):
    model = model_of(kind, dtype, attention=attention)
    decoder = decoder_of(model)
    calls = []
    handles = [
        layer.self_attn.register_forward_pre_hook(lambda m, args, kw: calls.append((m, args, kw)), with_kwargs=True)
        for layer in decoder.layers
    ]
    decoder(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    found = activations(model, ids, ALL)
    for i, (module, args, kwargs) in enumerate(calls):
        bare = copy.copy(module)
        bare._modules = module._modules | {"o_proj": torch.nn.Identity()}
        assert torch.equal(bare(*args, **kwargs)[0], found[f"attn_out.{i}"])


@each
@torch.inference_mode()
def test_attn_out_is_the_heads_concatenated(kind, ids):
    """Head h is its row of transformers' attention weights times the values of its group."""
    from transformers import DynamicCache

    model = model_of(kind, attention="eager")
    found = activations(model, ids, ALL)
    cache = DynamicCache()
    out = decoder_of(model)(input_ids=ids, past_key_values=cache, use_cache=True, output_attentions=True)
    for i, weights in enumerate(out.attentions):
        values = cache.layers[i].values
        values = values.repeat_interleave(weights.shape[1] // values.shape[1], dim=1)
        expected = torch.cat(list((weights @ values).unbind(1)), dim=-1)
        torch.testing.assert_close(found[f"attn_out.{i}"], expected, rtol=1e-5, atol=1e-6)


@each
def test_widths_from_the_configuration_are_the_widths_of_the_activations(kind, ids):
    config = config_of(kind)
    found = activations(model_of(kind), ids, ALL)
    assert {name: x.shape[-1] for name, x in found.items()} == check_sites(config, ALL, "tiny")
    assert set(found) == {site.name for site in expand_sites("all", config)}


@each
def test_many_sites_in_one_pass_are_what_each_is_alone(kind, ids):
    model = model_of(kind)
    found = activations(model, ids, ALL)
    assert set(found) == NAMES
    for site in ALL:
        (alone,) = activations(model, ids, [site]).values()
        assert torch.equal(found[site.name], alone)


def test_only_soft_capped_attention_is_chosen_and_by_device():
    chosen = {kind: attention_of(config_of(kind)) for kind in ARCHITECTURES}
    assert {kind for kind, attention in chosen.items() if attention == "eager"} == SOFT_CAPPED
    assert {a for kind, a in chosen.items() if kind not in SOFT_CAPPED} == {"default"}
    on_gpu = {attention_of(config_of(kind), "cuda") for kind in SOFT_CAPPED}
    assert on_gpu == {"flex_attention" if importlib.util.find_spec("triton") else "eager"}


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
    expected = activations(model, ids, ALL)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", layer)
    monkeypatch.setattr(LlamaModel, "forward", decoder)
    found = activations(model, ids, ALL)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


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
        activations(model_of("llama"), ids[0], ALL)
    with pytest.raises(TypeCheckError):
        left_padding(ids.float(), 0)


@each
def test_a_model_without_its_head_has_the_same_sites(kind, ids):
    model = copy.deepcopy(model_of(kind))
    whole = activations(model, ids, ALL)
    without_head(model)
    kept = {n for n, p in model.named_parameters() if "layers." not in n or "vision" in n}
    assert {n.rpartition("model.")[2] for n in kept} == {"embed_tokens.weight", "norm.weight"}
    cut = activations(model, ids, ALL)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.slow  # compiles attention for the processor
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_flex_attention_caps_logits_as_eager_attention_does(ids):
    padded = ids.clone()
    padded[1, :10] = 0
    expected, found = (
        activations(model_of("gemma2", attention=a), padded, ALL, pad_id=0, bos_id=1)
        for a in ("eager", "flex_attention")
    )
    rows = padded != 0
    for name in NAMES:
        torch.testing.assert_close(found[name][rows], expected[name][rows], rtol=1e-4, atol=1e-5)


@each_attention
def test_padding_behind_a_sequence_changes_nothing_before_it(kind, attention, ids):
    model = model_of(kind, attention=attention)
    padded = ids.clone()
    padded[:, 10:] = 0
    found, cut = activations(model, ids, ALL), activations(model, padded, ALL, pad_id=0, bos_id=1)
    for name in NAMES:
        assert torch.equal(found[name][:, :10], cut[name][:, :10])


@each_attention
@pytest.mark.parametrize("pad", [0, 1], ids=["own", "bos"])
def test_tokens_behind_padding_have_the_values_they_have_without(kind, attention, pad, ids):
    """Windows of 8, so the padding is longer and shorter than one; a row of nothing but padding is left alone."""
    model = model_of(kind, attention=attention)
    lengths = (24, 15, 4, 0)
    padded = torch.full((4, 24), pad)
    for row, n in enumerate(lengths[:3]):
        padded[row, 24 - n :] = torch.cat([torch.tensor([1]), ids[0, 1:n]])
    found = activations(model, padded, ALL, pad_id=pad, bos_id=1)
    for row, n in enumerate(lengths[:3]):
        alone = activations(model, padded[row : row + 1, 24 - n :], ALL)
        for name in NAMES:
            torch.testing.assert_close(found[name][row, 24 - n :], alone[name][0], rtol=1e-4, atol=1e-5)
    assert all(x.isfinite().all() for x in found.values())


@each
def test_positions_count_from_the_first_token(kind, ids):
    """Rotary angles are relative but for rounding, which in bfloat16 is 1% where positions are shifted."""
    model = model_of(kind, torch.bfloat16, attention="eager")
    padded = ids.clone()
    padded[1, :13] = 0
    found, alone = activations(model, padded, ALL, 0, 1), activations(model, padded[1:2, 13:], ALL)
    for name in NAMES:
        expected = alone[name][0].float()
        assert (found[name][1, 13:].float() - expected).norm() < 4e-3 * expected.norm()


@each_attention
def test_without_padding_in_front_no_mask_is_passed(kind, attention, ids):
    model = model_of(kind, attention=attention)
    odd = ids.clone()
    odd[1, 5:9], odd[2] = 0, 0
    plain, checked = activations(model, odd, ALL), activations(model, odd, ALL, pad_id=0)
    assert all(torch.equal(plain[name], checked[name]) for name in NAMES)


@pytest.mark.parametrize(
    ("row", "bos", "padding"),
    [
        ([0, 0, 0, 5], 1, 3),
        ([0, 0, 1, 5], 1, 2),
        ([0, 5, 0, 0], 1, 1),
        ([5, 0, 0, 5], 1, 0),
        ([0, 0, 0, 0], 1, 0),
        ([0, 0, 0, 5], 0, 2),
        ([0, 5, 0, 5], 0, 0),
        ([0, 0, 0, 0], 0, 0),
        ([0, 0, 0, 5], None, 2),
    ],
)
def test_where_a_sequence_begins(row, bos, padding):
    assert left_padding(torch.tensor([row, [7, 7, 7, 7]]), 0, bos).tolist() == [padding, 0]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("resid_post.12, mlp_out.0", ["mlp_out.0", "resid_post.12"]),
        ("*.12", ["attn_out.12", "mlp_in.12", "mlp_out.12", "resid_post.12"]),
        ("resid_p*.0", ["resid_post.0", "resid_pre.0"]),
        ("mlp_out.8-10", ["mlp_out.8", "mlp_out.9", "mlp_out.10"]),
        ("mlp_*.24-25", ["mlp_in.24", "mlp_out.24", "mlp_in.25", "mlp_out.25"]),
        ("mlp_out.3-3,*_out.3,mlp_out.3,mlp_out.3", ["attn_out.3", "mlp_out.3"]),
        (["resid_post.2?", "resid_pre.*"], ["resid_pre.0", *(f"resid_post.{i}" for i in range(20, 26))]),
    ],
)
def test_patterns(patterns, names):
    assert [s.name for s in expand_sites(patterns, config_of("gemma2", num_hidden_layers=26))] == names


def test_all_is_every_kind_in_every_layer_and_the_embedding():
    sites = expand_sites("all", config_of("gemma3"))
    assert set(sites) == set(ALL) == set(expand_sites("*", config_of("llama")))
    assert len(sites) == 4 * LAYERS + 1
    assert len(expand_sites("resid_post.*", config_of("llama"))) == LAYERS


@pytest.mark.parametrize("pattern", ["mlp_out.4", "mlp_out.*4", "mlp_out.2-4", "mlp_in.3-2", "foo.*", "*.0-9", "a.0-1"])
def test_patterns_that_the_model_cannot_serve_are_refused(pattern):
    message = r"site .*: this llama model has layers 0-3 and kinds resid_pre, attn_out, mlp_in, mlp_out, resid_post$"
    with pytest.raises(ValueError, match=message):
        expand_sites(["resid_post.0", pattern], config_of("llama"))


def test_names():
    assert [s.name for s in parse_sites("resid_post.12, mlp_out.0")] == ["resid_post.12", "mlp_out.0"]
    assert parse_sites(("attn_out.1", "mlp_in.2,mlp_in.3")) == parse_sites("attn_out.1,mlp_in.2,mlp_in.3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo.1", r"unknown site kind 'foo' in 'foo.1': known are resid_pre, attn_out, mlp_in, mlp_out, resid_post"),
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
    two_ways = config_of("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="model tiny: its attention is bidirectional"):
        check_sites(two_ways, parse_sites("resid_post.0"), "tiny")
    for refuse in (lambda c: check_sites(c, parse_sites("resid_post.0"), "tiny"), lambda c: expand_sites("all", c)):
        with pytest.raises(ValueError, match=r"architecture 'gpt2' has no table of sites: known are gemma2"):
            refuse(config_of("gpt2"))
