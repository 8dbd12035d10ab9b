"""Exports, the model card, and SAEs that others trained: what is written is read back as the same function."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from actstore.errors import ActstoreError
from trainer import cli
from trainer.card import Released, config_digest, folders_of, model_card, width_name
from trainer.export import (
    fold,
    load_params,
    reconstruct,
    released,
    write_dictionary_learning,
    write_release,
    write_saelens,
)
from trainer.files import SavedSAE, save_sae
from trainer.recipe import Recipe
from trainer.releases import load_any, site_of
from trainer.sae import init_sae, sae_of

D, D_SAE, SCALE = 16, 48, 8.0
RECIPES = {
    "jumprelu": Recipe(),
    "jumprelu_plain": Recipe(pre_bias=False, log_threshold=False),
    "jumprelu_free_rows": Recipe(unit_decoder=False, relu_before_jump=False),
    "batchtopk": Recipe(architecture="batchtopk", k=5),
    "gated": Recipe(architecture="gated"),
    "topk": Recipe(architecture="topk", k=5),
}
PROVENANCE = {
    "model": {"name": "org/tiny | model", "weights": "0" * 40, "dtype": "float32"},
    "tokens": {"fingerprint": "beef", "seq_len": 256},
}


def saved_sae(recipe, seed=0, **about):
    """An SAE whose every tensor matters."""
    rng = torch.Generator().manual_seed(seed)
    sae = init_sae(D, D_SAE, recipe, seed=seed)
    tensors = {**sae.parameters, **sae.buffers}
    for name, tensor in tensors.items():
        noise = torch.rand(tensor.shape, generator=rng, dtype=tensor.dtype)
        if name == "threshold":
            tensors[name] = (0.1 + 0.3 * noise).log() if tensor.ndim and recipe.log_threshold else 0.1 + 0.3 * noise
        elif name == "W_dec" and recipe.unit_decoder:
            continue
        else:
            tensors[name] = tensor + 0.3 * (noise - 0.5)
    config = {"store": "f00", "seed": seed, "rows": 1000, "provenance": PROVENANCE, **about}
    return SavedSAE(sae_of(recipe, tensors), SCALE, "resid_post.1", config)


def rows(n=256, seed=9):
    rng = np.random.default_rng(seed)
    return (SCALE * rng.standard_normal((n, D)) / D**0.5 + 1).astype(np.float32)


def outputs(saved, x):
    """Features in raw units and reconstructions, of raw activations."""
    scaled = torch.from_numpy(x) / saved.scale
    f = saved.sae.encode(scaled)
    return (f * saved.scale).numpy(), (saved.sae.decode(f, scaled) * saved.scale).numpy()


def close(found, expected, tolerance=2e-6):
    return np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def save(saved, out):
    save_sae(out, saved.sae, scale=saved.scale, site=saved.site, about=saved.config)
    return out


@pytest.mark.parametrize("name", [n for n in RECIPES if n != "topk"])
def test_the_fold_is_exact(name):
    """Folded in float64 it would be the same function to 1e-12; rounded once to float32, to 1e-6."""
    saved, x = saved_sae(RECIPES[name]), rows().astype(np.float64)
    p = {key: tensor.double().numpy() for key, tensor in {**saved.sae.parameters, **saved.sae.buffers}.items()}
    pi = (x / SCALE - p["b_dec"] * saved.sae.recipe.pre_bias) @ p["W_enc"]
    if name == "gated":
        f = (pi + p["b_gate"] > 0) * np.maximum(pi * np.exp(p["r_mag"]) + p["b_mag"], 0)
    else:
        z, theta = pi + p["b_enc"], np.exp(p["threshold"]) if saved.sae.recipe.log_threshold else p["threshold"]
        f = z * (z > (p["threshold"] if name == "batchtopk" else theta))
    expected = SCALE * (f @ p["W_dec"] + p["b_dec"])
    params = fold(saved)
    assert {key: array.dtype for key, array in params.items()} == dict.fromkeys(params, np.float32)
    assert 1 < (f > 0).sum(1).mean() < D_SAE / 2
    assert close(reconstruct(params, x), expected, 1e-6)
    assert np.abs(np.linalg.norm(params["W_dec"], axis=1) - 1).max() < 1e-6


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("site", ["resid_post.1", "mlp_out.0", "attn_out.3"])
def test_saelens_is_read_back_as_the_same_function(name, site, tmp_path):
    saved, x = saved_sae(RECIPES[name])._replace(site=site), rows()
    write_saelens(saved, tmp_path, model_name="tiny", context_size=256)
    loaded = load_any(tmp_path)
    assert (loaded.site, loaded.scale) == (site, 1.0)
    f, xhat = outputs(saved, x)
    f_loaded, xhat_loaded = outputs(loaded, x)
    assert close(xhat_loaded, xhat)
    if name != "jumprelu_free_rows":
        assert np.array_equal(f_loaded > 0, f > 0)
        assert close(f_loaded, f)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == ("topk" if name == "topk" else "jumprelu")
    assert sorted(load_file(tmp_path / "sae_weights.safetensors")) == sorted(fold(saved))


def test_saelens_has_no_hook_for_mlp_in(tmp_path):
    """TransformerLens' hook_normalized lacks the norm's gain."""
    with pytest.raises(ActstoreError, match="no hook name"):
        write_saelens(saved_sae(Recipe())._replace(site="mlp_in.1"), tmp_path, model_name="tiny", context_size=1)


def lens(folder, *, tensors=None, **config):
    """A SAELens directory by hand."""
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (D, D_SAE), "W_dec": (D_SAE, D), "b_enc": (D_SAE,), "b_dec": (D,)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} | (tensors or {})
    folder.mkdir(exist_ok=True)
    save_file(arrays, folder / "sae_weights.safetensors")
    metadata = {"sae_lens_version": "6.54.12", "hook_name": "blocks.2.hook_resid_pre", "model_name": "m"}
    whole = {"architecture": "standard", "apply_b_dec_to_input": False, "metadata": metadata, **config}
    (folder / "cfg.json").write_text(json.dumps({k: v for k, v in whole.items() if v is not None}))
    return arrays


def test_saelens_standard_and_old_versions(tmp_path):
    x = rows()
    for old in (False, True):
        about = {"metadata": None, "architecture": None, "apply_b_dec_to_input": None} if old else {}
        p = lens(tmp_path / "a", hook_name="blocks.2.hook_resid_pre", **about)
        loaded = load_any(tmp_path / "a")
        f = np.maximum((x - p["b_dec"] * old) @ p["W_enc"] + p["b_enc"], 0)
        assert close(outputs(loaded, x)[0], f)
        assert close(outputs(loaded, x)[1], f @ p["W_dec"] + p["b_dec"])
        assert loaded.site == "resid_post.1", "what enters layer 2 leaves layer 1"


@pytest.mark.parametrize("rescale", [False, True])
def test_saelens_topk(rescale, tmp_path):
    """Chosen by pre-activation, or by pre-activation times the length of the decoder row, which is then the feature."""
    p, x = lens(tmp_path, architecture="topk", k=6, rescale_acts_by_decoder_norm=rescale), rows()
    loaded = load_any(tmp_path)
    length = np.linalg.norm(p["W_dec"], axis=1) if rescale else np.ones(D_SAE, np.float32)
    z = (x @ p["W_enc"] + p["b_enc"]) * length
    f = np.where(z >= np.sort(z, 1)[:, -6:-5], np.maximum(z, 0), 0)
    assert close(outputs(loaded, x)[0], f, 5e-6)
    assert close(outputs(loaded, x)[1], (f / length) @ p["W_dec"] + p["b_dec"], 5e-6)


def test_saelens_gated(tmp_path):
    rng = np.random.default_rng(1)
    extra = {name: rng.standard_normal(D_SAE).astype(np.float32) for name in ("b_gate", "b_mag", "r_mag")}
    p, x = lens(tmp_path, tensors=extra, architecture="gated", apply_b_dec_to_input=True), rows()
    pi = (x - p["b_dec"]) @ p["W_enc"]
    f = (pi + p["b_gate"] > 0) * np.maximum(pi * np.exp(p["r_mag"]) + p["b_mag"], 0)
    assert close(outputs(load_any(tmp_path), x)[0], f, 5e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "matching_pursuit"}, "architecture matching_pursuit"),
        ({"architecture": "standard", "activation_fn": "tanh-relu"}, "standard with tanh-relu"),
        ({"normalize_activations": "layer_norm"}, "normalised by 'layer_norm'"),
        ({"normalize_activations": "expected_average_only_in"}, "Fold that into the weights"),
        ({"architecture": "jumprelu"}, "lacks threshold"),
        ({"architecture": "topk"}, "k is None"),
        ({"finetuning_scaling_factor": True}, "finetuning"),
        ({"metadata": {"sae_lens_version": "6.0.0", "hook_name": "blocks.1.ln2.hook_normalized"}}, "give --site"),
    ],
)
def test_what_cannot_be_expressed_is_refused(config, message, tmp_path):
    lens(tmp_path, **config)
    with pytest.raises(ActstoreError, match=re.escape(message)):
        load_any(tmp_path)


def test_hook_names():
    assert site_of("blocks.0.hook_resid_pre") == "resid_pre.0"
    assert site_of("blocks.7.attn.hook_z") == "attn_out.7"
    assert site_of("blocks.7.hook_mlp_out") == "mlp_out.7"
    assert site_of("hook_embed") == site_of("blocks.7.ln2.hook_normalized") == ""


@pytest.mark.parametrize(
    ("release", "site", "model"),
    [
        ("gemma-scope-2b-pt-res", "resid_post.20", "google/gemma-2-2b"),
        ("models--google--gemma-scope-9b-it-res", "resid_post.20", "google/gemma-2-9b-it"),
        ("gemma-scope-9b-pt-mlp", "mlp_out.20", "google/gemma-2-9b"),
        ("gemma-scope-2b-pt-att", "attn_out.20", "google/gemma-2-2b"),
    ],
)
def test_gemma_scope(release, site, model, tmp_path):
    """The tutorial's arithmetic, and a site from the folder and the release's name."""
    params, x = fold(saved_sae(Recipe())), rows()
    folder = tmp_path / release / "layer_20/width_16k/average_l0_71"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **params)
    for path in (folder, folder / "params.npz"):
        loaded = load_any(path)
        assert (loaded.site, loaded.config["provenance"]["model"]["name"]) == (site, model)
        pre = x @ params["W_enc"] + params["b_enc"]
        acts = (pre > params["threshold"]) * np.maximum(pre, 0)
        assert close(outputs(loaded, x)[0], acts)
        assert close(outputs(loaded, x)[1], acts @ params["W_dec"] + params["b_dec"])
    assert load_any(folder, site="mlp_out.3").site == "mlp_out.3"


def test_gemma_scope_that_is_no_sae_of_one_site(tmp_path):
    for name, message in (
        ("gemma-scope-2b-pt-transcoders/layer_1", "holds transcoders"),
        ("r/embedding", "embeddings"),
    ):
        folder = tmp_path / name / "width_4k"
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **fold(saved_sae(Recipe())))
        with pytest.raises(ActstoreError, match=message):
            load_any(folder)
    np.savez(tmp_path / "params.npz", **fold(saved_sae(Recipe())))
    with pytest.raises(ActstoreError, match="give --site"):
        load_any(tmp_path)


def test_gemma_scope_2(tmp_path):
    params, x = fold(saved_sae(Recipe())), rows()
    folder = tmp_path / "resid_post_all/layer_13_width_16k_l0_medium"
    folder.mkdir(parents=True)
    arrays = {name.replace("W_", "w_"): array for name, array in params.items()}
    save_file(arrays, folder / "params.safetensors")
    assert load_any(folder).site == "resid_post.13"
    (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt"}))
    loaded = load_any(folder)
    assert loaded.config["provenance"]["model"]["name"] == "google/gemma-3-1b-pt"
    assert close(outputs(loaded, x)[1], reconstruct(params, x))
    save_file(arrays | {"affine_skip_connection": np.zeros((D, D), np.float32)}, folder / "params.safetensors")
    with pytest.raises(ActstoreError, match="transcoder"):
        load_any(folder)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ActstoreError, match=r"none of params\.npz"):
        load_any(tmp_path)
    (tmp_path / "ae.pt").write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
    with pytest.raises(ActstoreError, match="pickle"):
        load_any(tmp_path)
    save(saved_sae(Recipe()), tmp_path / "run/a")
    (tmp_path / "ae.pt").unlink()
    with pytest.raises(ActstoreError, match="1 lie below it"):
        load_any(tmp_path)
    loaded = load_any(tmp_path / "run/a", site="resid_post.2")
    assert (loaded.site, loaded.scale) == ("resid_post.2", SCALE)


@pytest.mark.parametrize("name", RECIPES)
def test_dictionary_learning_directory(name, tmp_path):
    """Their encoders, by hand: `tests/peers/exports.py` has the package itself."""
    saved, x = saved_sae(RECIPES[name], seed=3), torch.from_numpy(rows())
    write_dictionary_learning(saved, tmp_path, model_name="org/tiny", context_size=256)
    config, state = json.loads((tmp_path / "config.json").read_text()), torch.load(tmp_path / "ae.pt")
    if name == "topk":
        assert config["trainer"]["dict_class"] == "AutoEncoderTopK"
        z = ((x - state["b_dec"]) @ state["encoder.weight"].T + state["encoder.bias"]).relu()
        f = torch.zeros_like(z).scatter(1, z.topk(config["trainer"]["k"]).indices, z.topk(5).values)
        xhat = f @ state["decoder.weight"].T + state["b_dec"]
    else:
        assert config["trainer"]["dict_class"] == "JumpReluAutoEncoder"
        z = x @ state["W_enc"] + state["b_enc"]
        xhat = (z * (z > state["threshold"])).relu() @ state["W_dec"] + state["b_dec"]
    assert close(xhat.numpy(), outputs(saved, x.numpy())[1])
    wanted = {"activation_dim": D, "dict_size": D_SAE, "layer": 1, "lm_name": "org/tiny", "seed": 3}
    assert wanted.items() <= config["trainer"].items()
    assert config["buffer"]["ctx_len"] == 256


FIGURES = {"l0": 71.2, "fvu": 0.2, "delta_loss": 0.05, "loss_recovered": 0.97, "dead": 0.01}
MEASURED = {"model": "org/tiny", "data": "/x/held|out", "sequences": 2048, "tokens": 2_000_000}


def test_a_release_is_ready_for_upload(tmp_path):
    saved = [saved_sae(Recipe()), saved_sae(dataclasses.replace(Recipe(), bandwidth=0.002), seed=1)]
    released = [
        Released(saved=s, figures={**FIGURES, **MEASURED, "l0": l0}) for s, l0 in zip(saved, (71.2, 20.4), strict=True)
    ]
    write_release(released, tmp_path, license_id="cc-by-4.0")
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    folders = [f"layer_1/width_48/average_l0_{n}" for n in (20, 71)]
    assert files == ["README.md", *(f"{f}/{n}" for f in folders for n in ("config.json", "params.npz"))]
    text = (tmp_path / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.license == "cc-by-4.0"
    assert card.data.tags == ["sparse-autoencoder", "mechanistic-interpretability", "actstore", "jumprelu"]
    assert card.data.base_model is None, "that name is none of the Hub's"
    for said in ("f00", "beef", "2,000,000", "71.2", "20.4", "0.05", "0.001, 0.002", "org/tiny \\| model"):
        assert said in text
    for s, folder in zip(saved, reversed(folders), strict=True):
        assert load_params(tmp_path / folder / "params.npz").keys() == fold(s).keys()
        loaded = load_any(tmp_path / folder)
        assert (loaded.site, loaded.config["store"]) == ("resid_post.1", "f00")
        assert close(outputs(loaded, rows())[1], outputs(s, rows())[1])


@pytest.mark.parametrize("name", ["org/tiny", 'bad"name: [x', "---\nlicense: mit\n---", "a/../b", "<script>"])
def test_no_name_breaks_the_card(name):
    saved = saved_sae(Recipe(), provenance={"model": {"name": name, "weights": "0" * 40}})
    text = model_card([Released(saved=saved, figures=FIGURES)], ["layer_1"], "mit\nx: y")
    matter = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    assert matter.keys() <= {"tags", "license", "base_model"}
    assert matter["license"] == "mit\nx: y"
    assert matter.get("base_model") == ("org/tiny" if name == "org/tiny" else None)
    assert "<script>" not in text
    assert len([line for line in text.splitlines() if line == "---"]) == 2


def test_widths_and_folders():
    widths = {16384: "16k", 32768: "32k", 65536: "65k", 131072: "131k", 262144: "262k", 524288: "524k", 1 << 20: "1m"}
    assert {d: width_name(d) for d in widths} == widths
    assert width_name(48) == "48"
    one, other = (Released(saved=saved_sae(Recipe(), seed=seed), figures=FIGURES) for seed in (0, 1))
    folder = "layer_1/width_48/average_l0_71"
    assert folders_of([one]) == [folder]
    assert folders_of([one, other]) == [f"{folder}_seed_0", f"{folder}_seed_1"]
    with pytest.raises(ActstoreError, match="several SAEs would be"):
        folders_of([one, one])
    elsewhere = Released(saved=one.saved._replace(site="mlp_out.4"), figures=FIGURES)
    assert folders_of([one, elsewhere]) == [f"resid_post/{folder}", "mlp_out/layer_4/width_48/average_l0_71"]


def test_topk_has_no_place_in_a_release(tmp_path):
    with pytest.raises(ActstoreError, match="no place for TopK"):
        write_release([Released(saved=saved_sae(RECIPES["topk"]), figures=FIGURES)], tmp_path)


def export_cli(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["trainer", "export", *(str(a) for a in arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def test_the_command_line_writes_every_format(tmp_path, monkeypatch, capsys):
    last = {"l0": 70.0, "mean_l0": 71.2, "fvu": 0.25, "dead": 0.0}
    for seed, l0 in ((0, 71.2), (1, 20.4)):
        saved = saved_sae(Recipe(), seed=seed, final={**last, "mean_l0": l0})
        save(saved, tmp_path / f"sweep/saes/{seed}")
    one = ["--sae", tmp_path / "sweep/saes/0", "--model-name", "tiny"]
    for name in ("npz", "saelens", "dictionary_learning"):
        assert export_cli(monkeypatch, *one, "--out", tmp_path / name, "--format", name) == 0
    made = {
        name: sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("npz", "saelens", "dictionary_learning")
    }
    assert made == {
        "npz": ["params.npz"],
        "saelens": ["cfg.json", "sae_weights.safetensors"],
        "dictionary_learning": ["ae.pt", "config.json"],
    }
    arguments = ["--sae", tmp_path / "sweep", "--out", tmp_path / "all", "--format", "gemma_scope", "--license", "mit"]
    assert export_cli(monkeypatch, *arguments) == 0
    assert sorted(p.parent.name for p in (tmp_path / "all").glob("**/params.npz")) == ["average_l0_20", "average_l0_71"]
    card = ModelCard.load(tmp_path / "all/README.md")
    assert card.data.license == "mit"
    assert "last training batch" in card.text
    assert export_cli(monkeypatch, "--sae", tmp_path / "all", "--out", tmp_path / "x", "--format", "gemma_scope") == 1
    assert "no SAE in" in capsys.readouterr().err


def test_figures_come_from_the_evaluation_and_tell_no_paths(tmp_path):
    folder = save(saved_sae(Recipe(), final={"l0": 3.0}), tmp_path / "sae")
    (tmp_path / "model").mkdir()
    about = {**FIGURES, **MEASURED, "model": str(tmp_path / "model"), "density": [0.1], "positions": []}
    whole = {"config": config_digest(folder), "evaluations": [about]}
    (folder / "evaluation.json").write_text(json.dumps(whole))
    (item,) = released(folder)
    assert item.figures == {**FIGURES, **MEASURED, "model": "model", "data": "held|out"}
    write_release([item], tmp_path / "out")
    assert not any(
        str(tmp_path) in p.read_text() for p in (tmp_path / "out").rglob("*") if p.suffix != ".npz" and p.is_file()
    )
    save(saved_sae(Recipe(), final={"l0": 4.0}), folder)
    with pytest.raises(ActstoreError, match="of another SAE"):
        released(folder)
    unknown = save(saved_sae(Recipe()), tmp_path / "unknown")
    with pytest.raises(ActstoreError, match="run `trainer eval` on it first"):
        released(unknown)


def test_transcoders_are_not_exported(tmp_path):
    sae = init_sae(D, D_SAE, Recipe(pre_bias=False), d_out=D)
    saved = SavedSAE(sae, 1.0, "mlp_in.1", {"target": {"site": "mlp_out.1", "scale": 1.0}})
    with pytest.raises(ActstoreError, match="transcoder"):
        fold(saved)


def test_broken_files_are_named(tmp_path):
    lens(tmp_path)
    good = (tmp_path / "sae_weights.safetensors").read_bytes()
    for spoilt in (b"", b"PK\x03\x04", good[:200], good[:-8]):
        (tmp_path / "sae_weights.safetensors").write_bytes(spoilt)
        with pytest.raises(ActstoreError, match=r"sae_weights\.safetensors can't be read"):
            load_any(tmp_path)
    tensors = {name: torch.from_numpy(array).bfloat16() for name, array in lens(tmp_path).items()}
    save_torch(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ActstoreError, match=r"bfloat16|can't be read"):
        load_any(tmp_path)
    for text in ("[1]", "{", ""):
        lens(tmp_path)
        (tmp_path / "cfg.json").write_text(text)
        with pytest.raises(ActstoreError, match=r"cfg\.json"):
            load_any(tmp_path)
    (tmp_path / "sparsify").mkdir()
    for name in ("cfg.json", "sae.safetensors"):
        (tmp_path / "sparsify" / name).write_text("{}")
    with pytest.raises(ActstoreError, match="sparsify"):
        load_any(tmp_path / "sparsify")


def test_a_damaged_npz_is_named(tmp_path):
    """Empty, cut short anywhere, damaged bytes, or no npz at all: an error that names the file, or the right arrays."""
    path, params = tmp_path / "params.npz", fold(saved_sae(Recipe()))
    np.savez_compressed(path, **params)
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    np.save(tmp_path / "one.npy", params["W_enc"])
    cases = [b"", b"PK", (tmp_path / "one.npy").read_bytes(), *(whole[:n] for n in range(1, len(whole), 977))]
    flips = rng.integers(0, len(whole), 60)
    cases += [whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :] for at in flips]
    for data in cases:
        path.write_bytes(data)
        try:
            found = load_params(path)
        except ActstoreError as error:
            refused += 1
            assert str(path) in str(error)
        else:
            assert all(np.array_equal(found[name], params[name]) for name in params)
    assert refused > len(cases) / 2
