"""`trainer eval`: by position, by data set, on another model of the same shape; its JSON and its report."""

import dataclasses
import html.parser
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from actstore import builtin
from actstore.capture import model as model_module
from actstore.errors import ActstoreError, MismatchError
from actstore.tokens import TokenizeConfig, open_tokens, tokenize
from trainer import cli, report
from trainer import evaluate as evaluate_module
from trainer.config import EvalConfig
from trainer.evaluate import EDGES, _bins, evaluate, evaluate_saved, write_evaluations
from trainer.export import released, write_npz, write_saelens
from trainer.files import SavedSAE, load_sae, save_sae
from trainer.recipe import Recipe
from trainer.sae import init_sae, sae_of

SPECIAL = (0, 1, 2)


def rows_of(ids: np.ndarray) -> np.ndarray:
    """Positions that hold a token of text."""
    return ~np.isin(ids, SPECIAL)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sae_for(d, d_sae, threshold=0.05, recipe=None, seed=0, **sizes):
    recipe = recipe or Recipe(log_threshold=False, pre_bias=False)
    sae = init_sae(d, d_sae, recipe, seed=seed, **sizes)
    if recipe.architecture == "jumprelu":
        sae.threshold.fill_(threshold)
    return sae


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = Gemma2Config(
        **shape, num_key_value_heads=1, head_dim=8, vocab_size=64, sliding_window=16, attn_implementation="eager"
    )
    model = Gemma2ForCausalLM(config).eval()
    for p in model.parameters():
        p.data.mul_(3)
    return model


@pytest.fixture(scope="module")
def ids():
    ids = np.random.default_rng(0).integers(3, 64, (5, 23)).astype(np.int32)
    ids[:, 0], ids[2, 9], ids[4, 17:] = 2, 1, 0
    return ids


def numbers(evaluation):
    return {name: value for name, value in evaluation.figures.items() if not isinstance(value, str)}


def test_bins_are_powers_of_two():
    found = _bins(torch.tensor([0, 1, 2, 3, 4, 7, 8, 1023, 1024])).tolist()
    assert found == [0, 1, 2, 2, 3, 3, 4, 10, 11]


@torch.no_grad()
def test_positions_match_plain_computation(model, ids):
    saved = SavedSAE(sae_for(16, 48), 8.0, "resid_post.1", {})
    layer, tokens = model.model.layers[1], torch.from_numpy(ids.astype(np.int64))
    found = evaluate(model, layer, "output", saved, ids, rows_of(ids), batch_sequences=2)
    kept = ~np.isin(ids, SPECIAL)
    x = model.model(input_ids=tokens, output_hidden_states=True).hidden_states[2]
    f = saved.sae.encode(x.flatten(0, 1) / 8).unflatten(0, ids.shape)
    xhat = (saved.sae.decode(f.flatten(0, 1)) * 8).view_as(x)

    def losses(value):
        handle = layer.register_forward_hook(lambda *_: value)
        logits = model(input_ids=tokens, use_cache=False).logits.double()
        handle.remove()
        found = torch.zeros(ids.shape, dtype=torch.float64)
        found[:, 1:] = -logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
        return found.numpy()

    spliced = torch.where(torch.from_numpy(kept)[..., None], xhat, x)
    delta = losses(spliced) - losses(x)
    x, xhat, active = x.double().numpy(), xhat.double().numpy(), (f > 0).sum(-1).numpy()
    mean = x[kept].mean(0)
    assert [(p.first, p.stop) for p in found.positions] == [(1, 2), (2, 4), (4, 8), (8, 16), (16, 23)]
    for p in found.positions:
        here = kept & ((np.arange(23) >= p.first) & (np.arange(23) < p.stop))
        assert p.tokens == here.sum()
        fvu = ((x - xhat)[here] ** 2).sum() / ((x[here] - mean) ** 2).sum()
        assert (p.fvu, p.l0) == pytest.approx((fvu, active[here].mean()), rel=1e-5)
        assert p.delta_loss == pytest.approx(delta[here].mean(), rel=1e-4, abs=1e-6)
    assert sum(p.tokens for p in found.positions) == found.tokens == kept.sum()
    assert sum(p.tokens * p.delta_loss for p in found.positions) / found.tokens == pytest.approx(found.delta_loss)
    assert sum(p.tokens * p.l0 for p in found.positions) / found.tokens == pytest.approx(found.l0)


def test_densities_dead_and_dense(model, ids):
    """Latents that always, sometimes and never fire, and the histogram's bins."""
    sae = sae_for(16, 4)
    sae.W_enc.zero_()
    sae.b_enc.copy_(torch.tensor([1.0, -1.0, 1.0, 0.0]))
    sae.W_enc[:, 3] = torch.randn(16, generator=torch.Generator().manual_seed(1))
    sae.threshold.fill_(0.5)
    found = evaluate(model, model.model.layers[1], "output", SavedSAE(sae, 1.0, "", {}), ids, rows_of(ids))
    assert found.density[:3] == (1, 0, 1)
    assert 0.1 < found.density[3] < 0.9
    assert (found.dead, found.dense) == (0.25, 0.75)
    assert (sum(found.histogram), found.histogram[-1]) == (3, 2 + (found.density[3] > 10 ** EDGES[-2]))
    assert len(found.histogram) == len(EDGES) - 1


def test_a_position_without_predictions_has_no_loss(model, ids):
    """Position 0 is a token like others where no BOS is put in front, but nothing predicts it."""
    ids = ids.copy()
    ids[:, 0] = 5
    found = evaluate(model, model.model.layers[1], "output", SavedSAE(sae_for(16, 48), 8.0, "", {}), ids, rows_of(ids))
    first = found.positions[0]
    assert (first.first, first.stop, first.tokens, first.delta_loss) == (0, 1, 5, None)
    assert found.positions[1].delta_loss is not None


def test_few_rows_at_once_give_the_same_figures(model, ids, monkeypatch):
    saved = SavedSAE(sae_for(16, 48), 8.0, "", {})
    whole = evaluate(model, model.model.layers[1], "output", saved, ids, rows_of(ids))
    monkeypatch.setattr("trainer.evaluate.rows_at_once", lambda _: 7)
    parts = evaluate(model, model.model.layers[1], "output", saved, ids, rows_of(ids))
    assert numbers(parts) == pytest.approx(numbers(whole), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_replaces_what_it_reconstructs(model, ids, skip):
    recipe = dataclasses.replace(Recipe(log_threshold=False), pre_bias=False, skip=skip)
    sae, mlp = sae_for(16, 48, recipe=recipe, d_out=16), model.model.layers[1].mlp
    out = model.model.layers[1].post_feedforward_layernorm
    if skip:
        sae.W_skip.copy_(torch.eye(16) / 2)
    saved = SavedSAE(sae, 4.0, "mlp_in.1", {"target": {"site": "mlp_out.1", "scale": 2.0}})
    found = evaluate(model, mlp, "input", saved, ids, rows_of(ids), target=(out, "output"))
    seen = []
    handles = [mlp.register_forward_pre_hook(lambda _, a: seen.append(a[0]))]
    handles += [out.register_forward_hook(lambda _, a, y: seen.append(y))]
    model(input_ids=torch.from_numpy(ids.astype(np.int64)))
    for handle in handles:
        handle.remove()
    kept = torch.from_numpy(~np.isin(ids, SPECIAL))
    x, y = (s[kept] for s in seen)
    yhat = 2 * sae.decode(sae.encode(x / 4), x / 4)
    exact = y.double()
    fvu = (exact - yhat.double()).square().sum() / (exact - exact.mean(0)).square().sum()
    assert found.fvu == pytest.approx(float(fvu), rel=1e-5)
    assert found.delta_loss != 0
    with pytest.raises(ActstoreError, match="the SAE writes 16"):
        evaluate(
            model,
            mlp,
            "input",
            saved,
            ids,
            rows_of(ids),
            target=(model.model.layers[1].mlp.gate_proj, "output"),
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two token tables, a model that is the built-in one with noise, and an SAE of the built-in one."""
    folder = tmp_path_factory.mktemp("eval")
    text = "\n".join(json.dumps({"text": "a cat sat. " * 40 + str(i)}) for i in range(8))
    (folder / "other.jsonl").write_text(text)
    for name, source in (("heldout", f"{builtin.NAME}-heldout"), ("cats", str(folder / "other.jsonl"))):
        config = TokenizeConfig(sources=(source,), tokenizer=builtin.NAME, out=str(folder / name), seq_len=64)
        from actstore.progress import Progress

        tokenize(config, Progress())
    model = AutoModelForCausalLM.from_pretrained(builtin.MODEL, dtype=torch.float32)
    d = model.config.hidden_size
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.add_(0.3 * p.data.std() * torch.randn_like(p))
    model.save_pretrained(folder / "tuned")
    about = {"store": "f00", "seed": 0, "provenance": {"model": {"name": builtin.NAME}, "tokens": {"seq_len": 64}}}
    save_sae(folder / "sae", sae_for(d, 4 * d, 0.03), scale=4.0, site="resid_post.2", about=about)
    return folder


def test_models_and_data_sets(place, tmp_path):
    """One JSON and one page with all of them; the SAE is the same, so what differs is the model and the data."""
    config = EvalConfig(
        sae=place / "sae",
        tokens=(str(place / "heldout"), str(place / "cats")),
        model=(builtin.NAME, str(place / "tuned")),
        sequences=6,
        out=tmp_path,
    )
    found = evaluate_saved(config)
    assert [(e.model, e.data) for e in found] == [(m, t) for m in config.model for t in config.tokens]
    assert len({e.ce_clean for e in found}) == len({e.fvu for e in found}) == 4
    assert found[0].ce_clean < found[2].ce_clean, "noise in its weights costs a model"
    alone = evaluate_saved(dataclasses.replace(config, tokens=config.tokens[1:], model=(), out=tmp_path / "alone"))
    assert alone == (found[1],)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["evaluations"] == json.loads(json.dumps([dataclasses.asdict(e) for e in found]))
    assert (written["site"], len(written["log10_edges"])) == ("resid_post.2", len(found[0].histogram) + 1)
    page = (tmp_path / "evaluation.html").read_text()
    for said in ("By model and data set", "By position", "Firing densities", "tuned, cats", "builtin, heldout"):
        assert said in page
    check_page(page)


def check_page(page):
    """Well-formed enough that every tag is closed, and nothing is loaded or run."""
    opened = []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag not in ("script", "link", "img", "iframe")
            assert not any(name in ("src", "onload") for name, _ in attrs)
            if tag != "meta":
                opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Parser().feed(page)
    assert not opened


def test_releases_of_others_are_evaluated_alike(place, tmp_path):
    """The same SAE as Gemma Scope and as SAELens would hold it: the same figures."""
    saved = load_sae(place / "sae")
    write_npz(saved, tmp_path / "npz/layer_2/width_1k/average_l0_9")
    write_saelens(saved, tmp_path / "lens", model_name="builtin", context_size=64)
    common = {"tokens": (str(place / "heldout"),), "model": (builtin.NAME,), "sequences": 3}
    (ours,) = evaluate_saved(EvalConfig(sae=place / "sae", **common, out=tmp_path))
    for path, site in ((tmp_path / "npz/layer_2/width_1k/average_l0_9", "resid_post.2"), (tmp_path / "lens", None)):
        (theirs,) = evaluate_saved(EvalConfig(sae=path, site=site, **common))
        assert numbers(theirs) == pytest.approx(numbers(ours), rel=1e-4)
        assert not (path / "evaluation.json").exists(), "nothing is written beside what others trained"
    with pytest.raises(ActstoreError, match="give --site"):
        evaluate_saved(EvalConfig(sae=tmp_path / "npz/layer_2/width_1k/average_l0_9", **common))


def test_by_default_ours_is_written_beside_it(place, tmp_path):
    saved = load_sae(place / "sae")
    save_sae(tmp_path, saved.sae, scale=saved.scale, site=saved.site, about=saved.config)
    evaluate_saved(EvalConfig(sae=tmp_path, tokens=(str(place / "cats"),), sequences=2))
    names = ["config.json", "evaluation.html", "evaluation.json", "sae.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    (item,) = released(tmp_path)
    assert (item.figures["data"], item.figures["sequences"]) == ("cats", 2), "the model card shows them"


def test_all_below_a_directory_are_evaluated_together(place, tmp_path, capsys, monkeypatch):
    """A sweep's SAEs: each gets what it would get alone, beside it, and one page compares them."""
    saved = load_sae(place / "sae")
    d = saved.sae.W_enc.shape[0]
    for name, threshold, site in (
        ("a/one", 0.03, "resid_post.2"),
        ("a/two", 0.3, "resid_post.2"),
        ("b", 0.1, "mlp_out.1"),
    ):
        about = {name: saved.config[name] for name in ("store", "seed", "provenance")}
        save_sae(tmp_path / name, sae_for(d, 2 * d, threshold), scale=4.0, site=site, about=about)
    common = {"tokens": (str(place / "heldout"), str(place / "cats")), "sequences": 3}
    found = evaluate_saved(EvalConfig(sae=tmp_path, **common))
    assert [(e.sae, e.data) for e in found] == [
        (str(tmp_path / n), t) for n in ("a/one", "a/two", "b") for t in common["tokens"]
    ]
    for name in ("a/two", "b"):
        alone = evaluate_saved(EvalConfig(sae=tmp_path / name, out=tmp_path / "alone", **common))
        assert alone == tuple(e for e in found if e.sae == str(tmp_path / name))
        written = (tmp_path / name / "evaluation.json").read_text()
        assert written == (tmp_path / "alone/evaluation.json").read_text()
    rows = json.loads((tmp_path / "frontier.json").read_text())["evaluations"]
    assert [(r["sae"], r["architecture"], r["site"]) for r in rows[::2]] == [
        ("a/one", "jumprelu", "resid_post.2"),
        ("a/two", "jumprelu", "resid_post.2"),
        ("b", "jumprelu", "mlp_out.1"),
    ]
    assert [r["fvu"] for r in rows] == [e.fvu for e in found]
    page = (tmp_path / "frontier.html").read_text()
    assert page.count("<h2>") == 4, "a section for each site and data set"
    check_page(page)
    options = ["--sae", tmp_path, "--tokens", place / "cats", "--sequences", "1", "--out", tmp_path / "o"]
    monkeypatch.setattr("sys.argv", ["trainer", "eval", *map(str, options)])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert "SAEs in" in capsys.readouterr().out
    assert (tmp_path / "o/a/two/evaluation.html").exists()


SLOW = "slow, this processor has no bfloat16 products, float32 is faster"


@pytest.mark.parametrize(
    ("recorded", "asked", "slow", "dtype", "reason"),
    [
        (["bfloat16"], "auto", False, "bfloat16", "auto: what the store was captured in"),
        (["bfloat16"], "auto", True, "bfloat16", f"auto: what the store was captured in; {SLOW}"),
        (["float16", "float16"], "auto", True, "float16", "auto: what the store was captured in"),
        ([None], "auto", True, "float32", "auto: no SAE records what its store was captured in"),
        (["int8"], "auto", False, "float32", "auto: no SAE records what its store was captured in"),
        (["bfloat16", "float16"], "auto", True, "float32", "auto: the SAEs' stores do not agree"),
        (["bfloat16"], "float32", True, "float32", "as asked"),
    ],
)
def test_the_model_is_loaded_in_what_its_store_was_captured_in(
    recorded, asked, slow, dtype, reason, place, tmp_path, monkeypatch, capsys
):
    saved = load_sae(place / "sae")
    for i, one in enumerate(recorded):
        about = {"store": "f00", "seed": i, "provenance": {"model": {"name": builtin.NAME, "dtype": one}}}
        save_sae(tmp_path / str(i), saved.sae, scale=4.0, site="resid_post.2", about=about)
    loaded, load = [], model_module.load_model

    def watched(name, dtype, device):
        loaded.append((dtype, device))
        return load(name, "float32", device)

    monkeypatch.setattr(model_module, "load_model", watched)
    monkeypatch.setattr(evaluate_module, "slow_bfloat16", lambda device: slow)
    tokens = (str(place / "cats"),)
    evaluate_saved(EvalConfig(sae=tmp_path, tokens=tokens, sequences=2, dtype=asked))
    assert loaded == [(dtype, "cpu")]
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["device cpu (auto: PyTorch sees no GPU)", f"model in {dtype} ({reason})"]
    for path in tmp_path.rglob("evaluation.json"):
        assert [one["dtype"] for one in json.loads(path.read_text())["evaluations"]] == [dtype]


def test_tokens_of_another_vocabulary_are_refused(place, monkeypatch):
    config = EvalConfig(sae=place / "sae", tokens=(str(place / "cats"),))
    table = dataclasses.replace(open_tokens(str(place / "cats")), max_id=10**6)
    monkeypatch.setattr("actstore.tokens.open_tokens", lambda _: table)
    with pytest.raises(MismatchError, match="holds token 1000000"):
        evaluate_saved(config)


def test_a_report_escapes_names_and_keeps_equal_ones_apart(model, ids, tmp_path):
    saved = SavedSAE(sae_for(16, 48), 8.0, "", {})
    found = evaluate(model, model.model.layers[1], "output", saved, ids, rows_of(ids))
    two = [dataclasses.replace(found, model=f"/{x}/same", data="<b>") for x in "ab"]
    assert list(report.evaluation_labels(two)) == ["/a/same, <b>", "/b/same, <b>"]
    write_evaluations(tmp_path, "sae", "<site>", two)
    page = (tmp_path / "evaluation.html").read_text()
    assert "<b>" not in page and "<site>" not in page
    check_page(page)


def test_an_sae_that_is_silent_has_a_page(model, ids, tmp_path):
    found = evaluate(
        model, model.model.layers[1], "output", SavedSAE(sae_for(16, 8, 1e9), 1.0, "", {}), ids, rows_of(ids)
    )
    assert (found.l0, found.dead, sum(found.histogram)) == (0, 1, 0)
    write_evaluations(tmp_path, "sae", "site", [found])
    check_page((tmp_path / "evaluation.html").read_text())


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "gated"])
def test_every_architecture(model, ids, architecture):
    recipe = Recipe(architecture=architecture, k=6)
    sae = sae_for(16, 48, recipe=recipe)
    sae = sae_of(recipe, {**sae.parameters, **sae.buffers})
    found = evaluate(model, model.model.layers[1], "output", SavedSAE(sae, 8.0, "", {}), ids, rows_of(ids))
    assert 0 < found.l0 <= 48 and np.isfinite(found.fvu)
    if architecture == "topk":
        assert found.l0 <= 6


def test_the_command_line(place, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["trainer", "eval", *(str(a) for a in arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code

    common = ["--sae", place / "sae", "--sequences", 2, "--out", tmp_path]
    tables = ["--tokens", place / "heldout", place / "cats"]
    assert run(*common, *tables, "--model", builtin.NAME, "--json", tmp_path / "f.json") == 0
    assert [e["data"] for e in json.loads((tmp_path / "f.json").read_text())["evaluations"]] == [
        str(place / "heldout"),
        str(place / "cats"),
    ]
    assert "delta_loss" in capsys.readouterr().out
    assert (tmp_path / "evaluation.html").exists()
    assert run(*common, *tables, "--site", "resid_post.99") == 2
    assert run("--sae", tmp_path, "--tokens", "t") == 1
    errors = capsys.readouterr().err
    assert "no SAE in" in errors and "Traceback" not in errors
