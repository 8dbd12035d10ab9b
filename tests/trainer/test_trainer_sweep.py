"""Many SAEs on one stream: each is bitwise what it would be alone; sweeps refuse early and end in the right layout."""

import json
import sys
import types
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import write_rows
from test_trainer_resume import SITES, content, make_store
from torch.utils._python_dispatch import TorchDispatchMode

from actstore.errors import ActstoreError
from trainer import cli
from trainer.config import SweepConfig, TrainConfig
from trainer.export import load_params
from trainer.files import load_sae
from trainer.recipe import SHORT
from trainer.sae import init_sae
from trainer.sweep import sweep
from trainer.train import start, train, train_from_store, train_many

TINY = replace(SHORT, batch_size=64, target_l0=4.0)
RATES = {"rows_per_second", "wait"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("sweep") / "store")


def config_of(store, out, **change):
    common = {"sites": SITES, "widths": (24, 40), "target_l0s": (3.0, 6.0), "seeds": (0, 1), "steps": 30}
    common |= {"preset": "short", "batch_size": 64, "log_every": 12, "checkpoint_every": 7}
    return SweepConfig(store=store, out=out, **{**common, **change})


class Counted:
    """Batches [64, 16] of a seed, counted as they are taken."""

    def __init__(self):
        self.taken, self._rng = 0, torch.Generator().manual_seed(0)

    def __iter__(self):
        while True:
            self.taken += 1
            yield 7 * torch.randn(64, 16, generator=self._rng) + 1


def recipes():
    yield TINY
    yield replace(TINY, target_l0=None, sparsity_coefficient=0.1)
    yield replace(TINY, architecture="topk", k=5, target_l0=None, dead_after_tokens=640)
    yield replace(TINY, architecture="batchtopk", k=5, target_l0=None, dead_after_tokens=640)
    yield replace(TINY, architecture="gated", target_l0=None)
    yield replace(TINY, beta1=0.9)
    yield replace(TINY, lazy_adam=True)


def fresh(recipe, seed):
    return init_sae(16, 40 + 8 * seed, recipe, seed=seed, mean=torch.full((16,), 0.1))


def figures(metrics):
    return {k: v for k, v in asdict(metrics).items() if k not in RATES}


def test_many_are_bitwise_what_each_is_alone():
    saes = [fresh(recipe, seed) for recipe in recipes() for seed in (0, 1)]
    runs = [start(str(i), sae, 25) for i, sae in enumerate(saes)]
    batches, together = Counted(), []
    train_many(runs, batches, steps=25, scale=28.0, log_every=10, on_log=together.append)
    assert batches.taken == 25, "one read feeds all"
    for i, (recipe, seed) in enumerate((recipe, seed) for recipe in recipes() for seed in (0, 1)):
        alone, history = fresh(recipe, seed), []
        train(alone, Counted(), steps=25, scale=28.0, log_every=10, on_log=history.append)
        for name, tensor in (alone.parameters | alone.buffers).items():
            assert torch.equal(tensor, (saes[i].parameters | saes[i].buffers)[name]), (i, name)
        assert [figures(m) for m in history] == [figures(line[i]) for line in together]


def test_a_sweep_is_bitwise_its_separate_runs(store, tmp_path):
    config = config_of(store, tmp_path / "sweep")
    trained = sweep(config)
    assert len(trained) == 2 * 2 * 2 * 2
    for one in trained:
        spec = next(spec for spec in config.specs if spec.name == one.name)
        out = tmp_path / "alone" / one.site / one.name
        alone = {"steps": 30, "preset": "short", "batch_size": 64, "log_every": 12, "target_l0": spec.recipe.target_l0}
        train_from_store(TrainConfig(store=store, site=one.site, out=out, d_sae=one.d_sae, seed=one.seed, **alone))
        expected = {k: v for k, v in content(out).items() if not k.startswith("checkpoints")}
        assert content(tmp_path / "sweep" / one.sae) == expected


def test_seeds_are_two(store, tmp_path):
    common = {"store": store, "site": SITES[0], "steps": 5, "preset": "short", "batch_size": 64, "d_sae": 40}
    a, b, c = (
        load_sae(tmp_path / str(i)).sae
        for i, seeds in enumerate([{}, {"seed": 1}, {"data_seed": 1}])
        if train_from_store(TrainConfig(out=tmp_path / str(i), **common, **seeds))
    )
    assert not torch.allclose(a.W_dec, b.W_dec, atol=0.1)
    assert torch.allclose(a.W_dec, c.W_dec, atol=0.1), "the same weights to begin with"
    assert not torch.equal(a.W_dec, c.W_dec)


def test_gemma_scopes_layout(store, tmp_path):
    trained = sweep(config_of(store, tmp_path, sites=SITES[:1], widths=(40, 1024), target_l0s=(6.0,), seeds=(0,)))
    for one, width in zip(trained, ("40", "1k"), strict=True):
        lines = (tmp_path / one.sae / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        assert [json.loads(line)["step"] for line in lines] == [12, 24, 30]
        assert one.average_l0 == last["mean_l0"] != last["l0"]
        assert one.release == f"release/layer_1/width_{width}/average_l0_{round(one.average_l0)}"
        assert load_params(tmp_path / one.release / "params.npz")["W_enc"].shape == (16, one.d_sae)
    assert (tmp_path / "release/README.md").exists()
    assert json.loads((tmp_path / "sweep.json").read_text())["saes"] == [vars(one) for one in trained]


def test_mean_l0_is_over_the_window():
    history, every = [], []
    for kept, log_every in ((every, 1), (history, 10)):
        train(fresh(TINY, 0), Counted(), steps=25, scale=28.0, log_every=log_every, on_log=kept.append)
    windows = [every[:10], every[10:20], every[20:]]
    assert [m.mean_l0 for m in history] == pytest.approx([np.mean([m.l0 for m in w]) for w in windows], rel=1e-5)


def test_saes_that_the_layout_can_not_tell_apart_are_released_once(store, tmp_path):
    """At a coefficient of almost nothing L0 does not depend on it."""
    grid = {"sparsity_coefficients": (1e-9, 2e-9), "target_l0s": ()}
    trained = sweep(config_of(store, tmp_path, sites=SITES[:1], widths=(24,), seeds=(0, 1), **grid))
    releases = [one.release for one in trained if one.release]
    assert len(releases) == len(set(releases)) == 2
    assert all((tmp_path / one.sae / "sae.safetensors").exists() for one in trained)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_for_topk_the_target_is_k(architecture, store, tmp_path):
    config = config_of(store, tmp_path, sites=SITES[:1], widths=(24,), seeds=(0,), architecture=architecture)
    trained = sweep(config)
    assert [load_sae(tmp_path / one.sae).sae.recipe.k for one in trained] == [3, 6]
    assert [one.average_l0 for one in trained] == pytest.approx([3, 6], rel=0.01)
    assert [one.release is None for one in trained] == [architecture == "topk"] * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sites": ("resid_post.1", "mlp_out.9")}, "no site 'mlp_out.9'"),
        ({"batch_size": 60}, "batch_size 60 is not a multiple of streams=8; the next is 64"),
        ({"batch_size": 4096}, "batch_size 4096 is more than the 1024 committed rows"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"widths": (24, 0)}, "the width is 0"),
        ({"widths": ()}, "widths is empty"),
        ({"widths": (24, 24)}, "widths names a value twice"),
        ({"target_l0s": (3.0, 25.0)}, "L0 target is 25, more than the 24 latents"),
        ({"target_l0s": (0.0,)}, "target_l0s has 0, they must be positive"),
        ({"target_l0s": (float("nan"),)}, "target_l0s has nan"),
        ({"sparsity_coefficients": (1.0,)}, "are both given"),
        ({"sparsity_coefficients": (-1.0,), "target_l0s": ()}, "sparsity_coefficient is -1.0"),
        ({"architecture": "topk", "target_l0s": (2.5,)}, "it is k, a whole number"),
        ({"architecture": "topk", "target_l0s": (), "sparsity_coefficients": (1.0,)}, "topk has no sparsity"),
        ({"steps": 0}, "steps is 0"),
        ({"targets": SITES[:1]}, "1 targets for 2 sites"),
        ({"skip": True}, "skip is for transcoders"),
        ({"sites": SITES[:1], "targets": ("x",)}, "no site 'x'"),
        ({"checkpoint_every": -1}, "checkpoint_every is -1"),
    ],
)
def test_refused_before_anything_is_trained(change, words, store, tmp_path):
    with pytest.raises(ValueError, match=words):
        sweep(config_of(store, tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_l0": 41.0}, "L0 target is 41, more than the 40 latents"),
        ({"target_l0": -1.0}, "target_l0 is -1"),
        ({"architecture": "topk", "target_l0": 41.0}, "L0 target is 41"),
        ({"architecture": "topk", "target_l0": 0.0}, "it is k, a whole number from 1 on"),
        ({"site": "mlp_out.9"}, r"no site 'mlp_out\.9'"),
        ({"target": "mlp_out.9"}, r"no site 'mlp_out\.9'"),
        ({"batch_size": 100}, "the next is 104"),
        ({"d_sae": 0}, "d_sae is 0"),
        ({"skip": True}, "skip is for transcoders"),
    ],
)
def test_training_one_refuses_as_early(change, words, store, tmp_path):
    common = {"store": store, "site": SITES[0], "steps": 5, "preset": "short", "batch_size": 64, "d_sae": 40}
    with pytest.raises(ValueError, match=words):
        train_from_store(TrainConfig(out=tmp_path / "out", **{**common, **change}))
    assert not (tmp_path / "out").exists()


def test_statistics_of_no_use_are_refused(tmp_path):
    from actstore.store import SiteSpec, StoreSpec, create_store

    sites, rows = {s: SiteSpec(d=4, encoding="f32") for s in SITES}, {"rows": 512, "bucket_rows": 512}
    writer = create_store(tmp_path / "s", StoreSpec(sites=sites, shard_rows=128, chunk_rows=32, **rows))
    with pytest.raises(ActstoreError, match="no committed bucket yet"):
        sweep(config_of(str(tmp_path / "s"), tmp_path / "out"))
    x = np.ones((512, 4), np.float32)
    x[:, 2] = np.nan
    ids = {name: np.zeros(512, np.int32) for name in ("sequence", "position", "token_id")}
    write_rows(writer, 0, {SITES[0]: np.ones((512, 4), np.float32), SITES[1]: x}, **ids)
    writer.finalise()
    with pytest.raises(ActstoreError, match=r"mean squared norm of mlp_out\.1 is nan"):
        sweep(config_of(str(tmp_path / "s"), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_step_never_waits_for_the_device():
    """Reading a tensor's value is what waits; a step reads none."""

    class Reads(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    run, x = start("one", fresh(TINY, 0), 10), next(iter(Counted())) / 28
    with Reads() as reads:
        for step in range(10):
            run.step(x, None, step, 10)
    assert reads.found == 0


def test_a_transcoder_reads_two_sites(store, tmp_path):
    common = {"store": store, "steps": 400, "preset": "short", "batch_size": 64, "d_sae": 40}
    config = TrainConfig(site=SITES[0], target=SITES[1], skip=True, out=tmp_path, **common)
    result, saved = train_from_store(config), load_sae(tmp_path)
    assert saved.config["target"]["site"] == SITES[1]
    assert saved.config["target"]["scale"] == pytest.approx(saved.scale / 2)
    assert saved.sae.parameters["W_skip"].abs().max() > 0
    assert result.final.fvu < 0.05
    with pytest.raises(ValueError, match="no site 'x'"):
        train_from_store(replace(config, target="x", out=tmp_path / "x"))
    with pytest.raises(ValueError, match="skip is for transcoders"):
        replace(config, target=None)


def test_a_sweep_of_transcoders_is_bitwise_its_separate_runs(store, tmp_path):
    common = {"steps": 20, "skip": True}
    grid = {"sites": SITES[:1], "targets": SITES[1:], "widths": (40,), "seeds": (3,), "target_l0s": (4.0,)}
    (one,) = sweep(config_of(store, tmp_path / "s", **grid, **common))
    common |= {"preset": "short", "batch_size": 64, "log_every": 12, "d_sae": 40, "seed": 3, "target_l0": 4.0}
    train_from_store(TrainConfig(store=store, site=SITES[0], target=SITES[1], out=tmp_path / "t", **common))
    alone = {k: v for k, v in content(tmp_path / "t").items() if not k.startswith("checkpoints")}
    assert content(tmp_path / "s" / one.sae) == alone
    assert one.release is None


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_missing_packages_are_named(name, store, tmp_path, monkeypatch):
    for module in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ActstoreError, match=rf"--{name} needs {name}, .* pip install 'actstore\[{name}\]'"):
        sweep(config_of(store, tmp_path / "out", **{name: tmp_path / "x" if name == "tensorboard" else "project"}))


def test_what_is_logged_elsewhere(store, tmp_path, monkeypatch):
    logged, scalars, began = [], [], []

    class FakeRun:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            logged.append("closed")

        def log(self, values, step):
            logged.append((step, values))

    class FakeWriter:
        def __init__(self, folder, purge_step):
            self.folder, self.purge = folder, purge_step

        def add_scalar(self, key, value, step):
            scalars.append((self.folder, key, step))

        def close(self):
            scalars.append("closed")

    fakes = types.SimpleNamespace(init=lambda **about: began.append(about) or FakeRun())
    monkeypatch.setitem(sys.modules, "wandb", fakes)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=FakeWriter))
    grid = {"sites": SITES[:1], "widths": (24,), "target_l0s": (3.0,)}
    sweep(config_of(store, tmp_path / "out", wandb="p", tensorboard=tmp_path / "tb", **grid))
    assert (began[0]["project"], began[0]["resume"], began[0]["config"]["d_sae"]) == ("p", "allow", 24)
    names = [f"width_24_target_3_seed_{seed}" for seed in (0, 1)]
    assert [(step, next(iter(values)).split("/")[0]) for step, values in logged[:-1]] == [
        (step, name) for step in (12, 24, 30) for name in names
    ]
    assert logged[-1] == "closed"
    assert (str(tmp_path / "tb" / SITES[0] / names[1]), "fvu", 24) in scalars
    assert scalars[-2:] == ["closed", "closed"]


def test_command_line(store, tmp_path, monkeypatch, capsys):
    arguments = ["trainer", "sweep", "--store", store, "--out", str(tmp_path / "out"), "--steps", "10"]
    arguments += ["--preset", "short", "--batch-size", "64", "--sites", *SITES, "--widths", "24", "40"]
    arguments += ["--target-l0s", "3", "--json", str(tmp_path / "f.json")]
    for _ in range(2):
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
    shown = capsys.readouterr()
    assert "width_40_target_3_seed_0" in shown.out
    assert len(json.loads((tmp_path / "f.json").read_text())["saes"]) == 4
    assert "train mlp_out.1: 100%" in shown.err and "fvu" in shown.err and "dead" in shown.err and "wait" in shown.err
    monkeypatch.setattr("sys.argv", [*arguments, "--widths", "0"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
