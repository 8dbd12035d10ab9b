"""Training, saving, exporting and evaluating: behaviour on small problems with known answers."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from conftest import write_rows
from safetensors.numpy import load_file
from transformers import Gemma2Config, Gemma2ForCausalLM

from actstore.errors import ActstoreError, StreamError
from trainer import cli
from trainer.config import EvalConfig, TrainConfig
from trainer.evaluate import _Sums, evaluate
from trainer.export import fold, load_params, reconstruct, write_npz, write_saelens
from trainer.files import SavedSAE, load_sae, save_sae
from trainer.recipe import GEMMA_SCOPE, SHORT
from trainer.sae import init_sae
from trainer.splice import splice
from trainer.train import train


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TINY = dataclasses.replace(SHORT, batch_size=64, target_l0=4.0)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def stream(seed, d=16, scale=7.0, batch=64):
    rng = torch.Generator().manual_seed(seed)
    while True:
        yield scale * torch.randn(batch, d, generator=rng) / d**0.5 + 1.0


def trained(recipe=TINY, d=16, d_sae=48, steps=60, seed=0):
    sae = init_sae(d, d_sae, recipe, seed=seed, mean=torch.full((d,), 1 / 8))
    history = []
    train(sae, stream(seed), steps=steps, scale=8.0, log_every=20, on_log=history.append)
    return SavedSAE(
        sae,
        8.0,
        "resid_post.1",
        {"store": "f00", "provenance": {"model": {"name": "tiny"}, "tokens": {"seq_len": 256}}},
    ), history


def test_recovers_an_orthonormal_dictionary():
    """k-sparse positive codes over orthonormal atoms: each atom is found once, with its own threshold."""
    d, atoms, k = 32, 16, 2
    rng = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(d, d, generator=rng)).Q[:atoms]

    def batch():
        active = torch.rand(256, atoms, generator=rng).argsort(1) < k
        return active * (0.5 + torch.rand(256, atoms, generator=rng)) @ basis

    scale = math.sqrt(torch.cat([batch() for _ in range(20)]).square().sum(1).mean())
    change = {"target_l0": None, "sparsity_coefficient": 0.1, "init_b_dec_to_mean": False, "revival": 0.0}
    sae = init_sae(d, 64, dataclasses.replace(SHORT, batch_size=256, **change), seed=1)
    train(sae, iter(batch, None), steps=1500, scale=scale)
    x = torch.cat([batch() for _ in range(8)])
    f = sae.encode(x / scale)
    alive = (f > 0).float().mean(0) > 0.005
    cosines = basis @ sae.W_dec[alive].T
    assert alive.sum() == atoms
    assert cosines.amax(1).min() > 0.99
    assert (f > 0).sum(1).float().mean() == pytest.approx(k, abs=0.05)
    assert (sae.decode(f) * scale - x).square().sum() < 0.01 * (x - x.mean(0)).square().sum()


def test_target_l0_is_reached():
    _, history = trained(dataclasses.replace(TINY, target_l0=6.0, sparsity_coefficient=0.3), steps=400)
    assert history[-1].l0 == pytest.approx(6, rel=0.15)


def test_dead_latents_are_revived():
    def firing(revival):
        recipe = dataclasses.replace(TINY, dead_after_tokens=10 * 64, revival=revival, sparsity_coefficient=0.0)
        sae = init_sae(16, 48, recipe, mean=torch.full((16,), 1 / 8))
        sae.threshold[:12] = 1.5
        train(sae, stream(0), steps=600, scale=8.0)
        return (sae.encode(next(stream(1, batch=20_000)) / 8.0) > 0).any(0)[:12]

    assert not firing(0.0).any()
    assert firing(1e-3).sum() >= 10


def test_training_is_deterministic_and_improves():
    first, history = trained()
    second, _ = trained()
    assert all(torch.equal(p, second.sae.parameters[name]) for name, p in first.sae.parameters.items())
    assert history[-1].mse < history[0].mse
    assert [m.step for m in history] == [20, 40, 60]
    assert history[-1].rows == 60 * 64
    assert 0 <= history[-1].wait <= 1
    assert history[-1].lr == pytest.approx(TINY.learning_rate(59, 60))


def test_dead_latents_are_counted_in_tokens():
    recipe = dataclasses.replace(TINY, dead_after_tokens=3 * 64, sparsity_coefficient=0.0)
    sae = init_sae(16, 48, recipe, mean=torch.zeros(16))
    sae.threshold[:12] = 1e6
    history = []
    train(sae, stream(0), steps=3, scale=8.0, log_every=1, on_log=history.append)
    assert [m.dead for m in history] == [0, 0, 0.25]


def test_not_finite_loss_names_the_first_step():
    def poisoned():
        for step, batch in enumerate(stream(0)):
            yield batch * (math.nan if step == 7 else 1)

    with pytest.raises(ActstoreError, match="not finite from step 7 "):
        train(init_sae(16, 48, TINY, mean=torch.zeros(16)), poisoned(), steps=20, scale=8.0, log_every=10)


def test_batches_that_end_early_are_an_error():
    batches = [next(stream(0))] * 3
    with pytest.raises(StreamError, match="after 3 of 5 steps"):
        train(init_sae(16, 48, TINY, mean=torch.zeros(16)), batches, steps=5, scale=8.0)


@pytest.mark.parametrize("recipe", [TINY, dataclasses.replace(TINY, pre_bias=False, log_threshold=True)])
def test_fold_is_exact(recipe, tmp_path):
    saved, _ = trained(recipe)
    x = next(stream(9))
    f = saved.sae.encode(x / saved.scale)
    expected = (saved.sae.decode(f) * saved.scale).numpy()
    assert f.any()
    params = load_params(write_npz(saved, tmp_path))
    assert {name: value.dtype for name, value in params.items()} == dict.fromkeys(params, np.float32)
    assert all(np.array_equal(params[name], value) for name, value in fold(saved).items())
    assert np.abs(reconstruct(params, x.numpy()) - expected).max() < 1e-5 * np.abs(expected).max()
    assert names(tmp_path) == ["params.npz"]


def test_npz_is_checked(tmp_path):
    saved, _ = trained()
    params = fold(saved)
    np.savez(tmp_path / "gs2.npz", **{name.replace("W_", "w_"): value for name, value in params.items()})
    assert load_params(tmp_path / "gs2.npz").keys() == params.keys()
    np.savez(tmp_path / "short.npz", W_enc=params["W_enc"])
    with pytest.raises(ActstoreError, match="lacks W_dec"):
        load_params(tmp_path / "short.npz")
    np.savez(tmp_path / "shape.npz", **{**params, "b_enc": params["b_dec"]})
    with pytest.raises(ActstoreError, match="b_enc"):
        load_params(tmp_path / "shape.npz")
    np.savez(tmp_path / "pickle.npz", **{**params, "threshold": np.array([object()])})
    with pytest.raises(ActstoreError, match="pickle"):
        load_params(tmp_path / "pickle.npz")


def test_saelens_directory(tmp_path):
    """The loader's rules: exactly five float32 tensors, no rescaling, and a version that keeps b_dec out of x."""
    saved, _ = trained()
    write_saelens(saved, tmp_path, model_name="tiny", context_size=256)
    tensors, config = load_file(tmp_path / "sae_weights.safetensors"), json.loads((tmp_path / "cfg.json").read_text())
    assert sorted(tensors) == ["W_dec", "W_enc", "b_dec", "b_enc", "threshold"]
    assert all(np.array_equal(tensors[name], value) for name, value in fold(saved).items())
    assert (tensors["threshold"] >= 0).all()
    assert config["architecture"] == "jumprelu"
    assert (config["d_in"], config["d_sae"], config["dtype"]) == (16, 48, "float32")
    assert config["apply_b_dec_to_input"] is False
    assert config["normalize_activations"] == "none"
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert config["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    with pytest.raises(ActstoreError, match="no hook name"):
        write_saelens(saved._replace(site="elsewhere.1"), tmp_path, model_name="tiny", context_size=256)


def test_save_and_load(tmp_path):
    saved, _ = trained()
    save_sae(tmp_path, saved.sae, scale=saved.scale, site=saved.site, about={"store": "f00"})
    loaded = load_sae(tmp_path)
    assert names(tmp_path) == ["config.json", "sae.safetensors"]
    assert (loaded.scale, loaded.site, loaded.sae.recipe) == (8.0, "resid_post.1", TINY)
    assert all(torch.equal(p, saved.sae.parameters[name]) for name, p in loaded.sae.parameters.items())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(ActstoreError, match="version 99"):
        load_sae(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "d_sae": 49}))
    with pytest.raises(ActstoreError, match="expected"):
        load_sae(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ActstoreError, match=r"config\.json is missing"):
        load_sae(tmp_path)


SPECIAL = (0, 1, 2)


def rows_of(ids: np.ndarray) -> np.ndarray:
    """Positions that hold a token of text."""
    return ~np.isin(ids, SPECIAL)


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
    ids = np.random.default_rng(0).integers(3, 64, (5, 24)).astype(np.int32)
    ids[:, 0], ids[2, 9], ids[4, 17:] = 2, 1, 0
    return ids


def place(model, kind):
    layer = model.model.layers[1]
    return {"layer": (layer, "output"), "heads": (layer.self_attn.o_proj, "input")}[kind]


def manual_loss(model, ids, edit):
    """Cross-entropy by a loop over predictions, with layer 1's output edited by hand."""
    embedded = torch.from_numpy(ids.astype(np.int64))
    handle = model.model.layers[1].register_forward_hook(lambda m, a, output: edit(output))
    with torch.no_grad():
        logits = model(input_ids=embedded, use_cache=False).logits.double()
    handle.remove()
    losses = [
        -torch.log_softmax(logits[s, t], -1)[ids[s, t + 1]]
        for s in range(ids.shape[0])
        for t in range(ids.shape[1] - 1)
        if ids[s, t + 1] not in SPECIAL
    ]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def test_evaluation_matches_plain_computation(model, ids):
    saved, _ = trained()
    kept = torch.from_numpy(~np.isin(ids, SPECIAL))
    found = evaluate(model, *place(model, "layer"), saved, ids, rows_of(ids), batch_sequences=2)
    x = model.model(input_ids=torch.from_numpy(ids.astype(np.int64)), output_hidden_states=True).hidden_states[2]
    f = saved.sae.encode(x[kept] / 8)
    xhat = saved.sae.decode(f) * 8
    exact = x[kept].double()
    fvu = (exact - xhat.double()).square().sum() / (exact - exact.mean(0)).square().sum()
    assert found.fvu == pytest.approx(float(fvu), rel=1e-6)
    assert found.l0 == pytest.approx(float((f > 0).sum(1).double().mean()))
    assert found.dead == pytest.approx(float((f == 0).all(0).double().mean()))
    assert found.density == pytest.approx((f > 0).double().mean(0).tolist())
    assert (found.sequences, found.tokens) == (5, int(kept.sum()))
    spliced = x.clone()
    spliced[kept] = xhat
    zeroed = x.masked_fill(kept[..., None], 0)
    expected = [manual_loss(model, ids, lambda _, y=y: y) for y in (x, spliced, zeroed)]
    assert [found.ce_clean, found.ce_sae, found.ce_zero] == pytest.approx(expected, rel=1e-5)
    assert found.delta_loss == found.ce_sae - found.ce_clean
    assert found.loss_recovered == pytest.approx(1 - found.delta_loss / (found.ce_zero - found.ce_clean))


@pytest.mark.parametrize("kind", ["layer", "heads"])
def test_perfect_reconstruction_costs_exactly_nothing(model, ids, kind):
    """A dictionary of +-unit vectors with threshold 0 reconstructs every float32 exactly."""
    sae = init_sae(16, 32, dataclasses.replace(TINY, init_b_dec_to_mean=False))
    sae.W_dec.copy_(torch.cat([torch.eye(16), -torch.eye(16)]))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.threshold.zero_()
    found = evaluate(model, *place(model, kind), SavedSAE(sae, 1.0, "", {}), ids, rows_of(ids))
    assert (found.delta_loss, found.loss_recovered, found.fvu) == (0.0, 1.0, 0.0)
    assert found.ce_zero != found.ce_clean
    assert found.l0 == 16


def test_splice_leaves_no_hook_behind(model, ids):
    tokens = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        clean = model(input_ids=tokens).logits
        with splice(model.model.layers[0], "output", torch.zeros_like):
            assert not torch.equal(model(input_ids=tokens).logits, clean)
        assert torch.equal(model(input_ids=tokens).logits, clean)


def test_streamed_fvu_survives_a_large_mean():
    """Means 1,000 times the deviation: float32 sums would be lost."""
    rng = np.random.default_rng(0)
    x = (1e3 + rng.standard_normal((5000, 8))).astype(np.float32)
    xhat = x + 0.3 * rng.standard_normal(x.shape).astype(np.float32)
    sums = _Sums(8, 1, 16, torch.device("cpu"))
    for part, guess in zip(np.split(x, 10), np.split(xhat, 10), strict=True):
        sums.add(torch.from_numpy(part), torch.from_numpy(guess), torch.zeros(500, 1), torch.arange(500) % 16)
    exact = x.astype(np.float64)
    brute = ((exact - xhat) ** 2).sum() / ((exact - exact.mean(0)) ** 2).sum()
    assert sums.fvu == pytest.approx(brute, rel=1e-8)


def test_width_mismatch_is_named(model, ids):
    saved = SavedSAE(init_sae(12, 24, GEMMA_SCOPE), 1.0, "", {})
    with pytest.raises(ActstoreError, match="16 wide, the SAE reads 12"):
        evaluate(model, *place(model, "layer"), saved, ids, rows_of(ids))


def test_config_makes_the_recipe(tmp_path):
    base = {"store": "s", "site": "resid_post.1", "out": tmp_path, "steps": 10}
    assert TrainConfig(**base).recipe is not None
    assert TrainConfig(**base).recipe == GEMMA_SCOPE
    changed = TrainConfig(**base, preset="short", lr=1e-3, target_l0=0.0).recipe
    assert changed == dataclasses.replace(SHORT, lr=1e-3, target_l0=None)
    with pytest.raises(ValueError, match="steps is 0"):
        TrainConfig(**{**base, "steps": 0})
    with pytest.raises(ValueError, match="sequences"):
        EvalConfig(sae=tmp_path, tokens=("t",), sequences=0)


def run_cli(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["trainer", *(str(a) for a in arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def test_command_line_exports_and_reports_errors(tmp_path, capsys, monkeypatch):
    saved, _ = trained()
    save_sae(tmp_path / "sae", saved.sae, scale=saved.scale, site=saved.site, about=saved.config)
    assert run_cli(monkeypatch, "export", "--sae", tmp_path / "sae", "--out", tmp_path / "npz") == 0
    assert load_params(tmp_path / "npz/params.npz")["W_enc"].shape == (16, 48)
    assert run_cli(monkeypatch, "export", "--sae", tmp_path / "sae", "--out", tmp_path / "npz/../sae") == 2
    assert "is the SAE's own directory" in capsys.readouterr().err
    lens = ["export", "--sae", tmp_path / "sae", "--out", tmp_path / "lens", "--format", "saelens"]
    assert run_cli(monkeypatch, *lens) == 0
    metadata = json.loads((tmp_path / "lens/cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["context_size"]) == ("tiny", 256)
    assert run_cli(monkeypatch, "export", "--sae", tmp_path, "--out", tmp_path / "x") == 1
    assert "no SAE in" in capsys.readouterr().err


def make_store(path, d=24, rows=2048):
    from actstore.store import SiteSpec, StoreSpec, create_store

    spec = StoreSpec(
        sites={"resid_post.1": SiteSpec(d=d, encoding="f32")},
        rows=rows,
        bucket_rows=1024,
        shard_rows=512,
        chunk_rows=64,
        provenance={"model": {"name": "tiny"}},
    )
    writer = create_store(path, spec)
    x = (5 * np.random.default_rng(0).standard_normal((rows, d)) + 2).astype(np.float32)
    for b in range(writer.buckets):
        first, stop = writer.bucket_range(b)
        index = np.arange(stop - first, dtype=np.int32)
        write_rows(writer, b, {"resid_post.1": x[first:stop]}, sequence=index, position=index, token_id=index)
    writer.finalise()
    return x


def test_training_from_a_store(tmp_path, monkeypatch, capsys):
    x = make_store(tmp_path / "store")
    common = ["--store", tmp_path / "store", "--site", "resid_post.1", "--preset", "short", "--batch-size", 256]
    common += ["--steps", 20, "--log-every", 5, "--d-sae", 48]
    for out in ("a", "b"):
        arguments = ["train", *common, "--out", tmp_path / out, "--json", tmp_path / f"{out}.json"]
        assert run_cli(monkeypatch, *arguments) == 0
    loaded = load_sae(tmp_path / "a")
    assert loaded.scale == pytest.approx(math.sqrt((x.astype(np.float64) ** 2).sum(1).mean()))
    assert names(tmp_path / "a") == ["checkpoints", "config.json", "metrics.jsonl", "sae.safetensors"]
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert json.loads((tmp_path / "a.json").read_text())["final"] == lines[-1]
    assert lines[-1]["rows"] == 20 * 256 > len(x), "the store was read more than once"
    other = load_sae(tmp_path / "b")
    assert all(torch.equal(p, other.sae.parameters[name]) for name, p in loaded.sae.parameters.items())
    capsys.readouterr()
    assert run_cli(monkeypatch, "train", *common, "--out", tmp_path / "c", "--site", "mlp_out.9") == 2
    assert run_cli(monkeypatch, "train", *common, "--out", tmp_path / "c", "--steps", 0) == 2
    errors = capsys.readouterr().err
    assert "no site 'mlp_out.9'" in errors and "Traceback" not in errors
