"""Checkpoints: a run that was killed and goes on is bitwise the one that was not; nothing else is gone on from."""

import json
import math
import os
import random
import resource
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import CONTEXT
from conftest import write_rows

from actstore.errors import ActstoreError, MismatchError
from trainer import checkpoint
from trainer.config import SweepConfig, TrainConfig
from trainer.sweep import sweep
from trainer.train import Run, Stream, train_from_store

SITES = ("resid_post.1", "mlp_out.1")
TIMING = {"rows_per_second", "wait", "seconds", "metrics"}
"""Keys that say how long something took; `metrics` are bytes of lines that do."""
STEPS = 42


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("resume") / "store")


def make_store(path, d=16, rows=1024):
    """Noise, and at the second site what is a rotation and half the size of the first."""
    from actstore.store import SiteSpec, StoreSpec, create_store

    sites = {site: SiteSpec(d=d, encoding="f32") for site in SITES}
    writer = create_store(path, StoreSpec(sites=sites, rows=rows, bucket_rows=512, shard_rows=128, chunk_rows=32))
    turn = np.linalg.qr(np.random.default_rng(9).standard_normal((d, d))).Q
    for bucket in range(rows // 512):
        rng = np.random.default_rng(bucket)
        x = (rng.standard_normal((512, d)) * 3 + 1).astype(np.float32)
        data = {SITES[0]: x, SITES[1]: (x @ turn / 2).astype(np.float32)}
        ids = {name: np.zeros(512, np.int32) for name in ("sequence", "position", "token_id")}
        write_rows(writer, bucket, data, **ids)
    writer.finalise()
    return str(path)


def config_of(kind, store, out, **change):
    common = {"store": store, "out": out, "steps": STEPS, "preset": "short", "batch_size": 64}
    common |= {"log_every": 5, "checkpoint_every": 4, **change}
    if kind == "train":
        return TrainConfig(site=SITES[0], d_sae=40, target_l0=4.0, **common)
    return SweepConfig(sites=SITES, widths=(24, 40), target_l0s=(3.0, 6.0), **common)


def run(config):
    return sweep(config) if isinstance(config, SweepConfig) else train_from_store(config)


def test_a_full_disk_is_one_line_and_the_run_goes_on(store, tmp_path):
    """As files may not grow beyond a limit here: the checkpoint is not written, and the same command continues."""
    config = config_of("train", store, tmp_path / "out")
    run(replace(config, steps=4, out=tmp_path / "short"))
    largest = max(file.stat().st_size for file in (tmp_path / "short").rglob("*.safetensors"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*\.step_000000004/sae\.state\.safetensors'"):
            run(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in (tmp_path / "out/checkpoints").iterdir() if path.name.startswith("step_")]
    run(config)
    run(replace(config, out=tmp_path / "other"))
    assert (tmp_path / "out/sae.safetensors").read_bytes() == (tmp_path / "other/sae.safetensors").read_bytes()


def test_files_have_the_permissions_that_new_files_get(store, tmp_path):
    mask = os.umask(0o027)
    try:
        run(config_of("train", store, tmp_path / "out", steps=4))
    finally:
        os.umask(mask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"sae.safetensors", "sae.state.safetensors", "config.json"} < modes.keys()
    assert set(modes.values()) == {0o640}, modes


def child(config, victim, in_file):
    """Run, but be killed in step `victim`, counted over all sites, or by the `in_file`-th write of a checkpoint."""
    torch.set_num_threads(1)
    step, sync, batches, writes, began = Run.step, checkpoint._sync, Stream.batches, [0], []

    def deadly_step(self, x, y, number, steps):
        if victim == (len(began) - 1) * steps + number and self.name == victims[victim % len(victims)]:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, x, y, number, steps)

    def deadly_sync(path):
        writes[0] += 1
        if writes[0] == in_file:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    def counted(self, data):
        began.append(self.site)
        return batches(self, data)

    victims = ["sae"] if isinstance(config, TrainConfig) else [spec.name for spec in config.specs]
    Run.step, checkpoint._sync, Stream.batches = deadly_step, deadly_sync, counted
    run(config)


def spawn(config, *, victim=None, in_file=None):
    """The exit code of a process that runs `config`."""
    process = CONTEXT.Process(target=child, args=(config, victim, in_file))
    process.start()
    process.join(120)
    return process.exitcode


def steps_in(checkpoints):
    """What is kept, beside the lock."""
    return sorted(path.name for path in checkpoints.iterdir() if path.name != checkpoint.LOCK)


def stripped(value):
    if isinstance(value, dict):
        return {k: stripped(v) for k, v in value.items() if k not in TIMING}
    return [stripped(v) for v in value] if isinstance(value, list) else value


def content(out):
    """Every file below `out`, JSON without how long it took."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name, data = str(path.relative_to(out)), path.read_bytes()
        if path.suffix == ".jsonl":
            found[name] = [stripped(json.loads(line)) for line in data.splitlines()]
        else:
            found[name] = stripped(json.loads(data)) if path.suffix == ".json" else data
    return found


def killed(config, kills, seed=0):
    """Kill the run in random steps, first to last, over all sites, and let it end."""
    sites = len(config.sites) if isinstance(config, SweepConfig) else 1
    for victim in sorted(random.Random(seed).sample(range(1, sites * config.steps), kills)):
        assert spawn(config, victim=victim) == -signal.SIGKILL
    assert spawn(config) == 0


@pytest.mark.parametrize("kind", ["train", "sweep"])
def test_killed_runs_go_on_bitwise(kind, store, tmp_path):
    run(config_of(kind, store, tmp_path / "whole"))
    killed(config_of(kind, store, tmp_path / "killed"), 3)
    expected, found = content(tmp_path / "whole"), content(tmp_path / "killed")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert sum(name.endswith("sae.safetensors") for name in found) == {"train": 1, "sweep": 8}[kind]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["train", "sweep"])
def test_twenty_kills(kind, store, tmp_path):
    run(config_of(kind, store, tmp_path / "whole"))
    killed(config_of(kind, store, tmp_path / "killed"), 20, seed=time.time_ns())
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "batchtopk"},
        {"architecture": "gated"},
        {"preset": "anthropic_2025"},
        {"preset": "gemma_scope_2"},
        {"target": SITES[1], "skip": True},
    ],
    ids=str,
)
def test_all_state_is_kept(change, store, tmp_path, monkeypatch):
    """Running thresholds, first moments, schedules over a share of the run, pairs of sites."""
    whole, broken = (replace(config_of("train", store, tmp_path / name), **change) for name in ("whole", "broken"))
    run(whole)
    step = Run.step
    for victim in (11, 30):

        def interrupted(self, x, y, number, steps, victim=victim):
            if number == victim:
                raise KeyboardInterrupt
            return step(self, x, y, number, steps)

        monkeypatch.setattr(Run, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(broken)
    monkeypatch.undo()
    run(broken)
    assert content(tmp_path / "broken") == content(tmp_path / "whole")


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    """The content of a run of 16 steps."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run(config_of("train", store, out, steps=16))
    return content(out)


@pytest.mark.parametrize("in_file", [1, 2, 3, 4, 5, 9, 10])
def test_killed_while_a_checkpoint_is_written(in_file, store, undisturbed, tmp_path):
    """Four writes a checkpoint: tensors, index, the hidden directory, the folder after the rename."""
    config = config_of("train", store, tmp_path / "killed", steps=16)
    assert spawn(config, in_file=in_file) == -signal.SIGKILL
    run(config)
    assert content(tmp_path / "killed") == undisturbed


def test_the_last_n_are_kept(store, tmp_path):
    for keep in (1, 3):
        run(config_of("train", store, tmp_path / str(keep), steps=18, keep=keep))
        steps = steps_in(tmp_path / str(keep) / "checkpoints")
        assert steps == ["step_000000012", "step_000000016", "step_000000018"][-keep:]


def test_by_default_only_the_end_of_a_short_run_is_kept(store, tmp_path):
    run(config_of("train", store, tmp_path, checkpoint_every=0))
    assert steps_in(tmp_path / "checkpoints") == [f"step_{STEPS:09}"]


def test_a_finished_run_is_not_trained_again(store, tmp_path, monkeypatch):
    config = config_of("train", store, tmp_path)
    first, before = run(config), content(tmp_path)
    monkeypatch.setattr(Run, "step", None)
    again = run(config)
    assert again.final == first.final
    assert content(tmp_path) == before


def test_other_settings_are_refused_by_name(store, tmp_path):
    run(config_of("train", store, tmp_path))
    before = content(tmp_path)
    with pytest.raises(MismatchError) as refused:
        run(config_of("train", store, tmp_path, lr=1e-3, data_seed=5))
    message = str(refused.value)
    assert "data_seed is 0, asked for 5; lr is 0.002, asked for 0.001." in message
    assert "--no-resume" in message
    assert content(tmp_path) == before
    run(config_of("train", store, tmp_path, lr=1e-3, data_seed=5, resume=False))
    assert content(tmp_path)["config.json"]["recipe"]["lr"] == 1e-3


def test_a_sweep_names_the_field_and_the_sae(store, tmp_path):
    run(config_of("sweep", store, tmp_path, steps=4))
    with pytest.raises(MismatchError, match=r"saes is \[.*width_24_target_3_seed_0.*\], asked for \["):
        run(SweepConfig(**{**vars(config_of("sweep", store, tmp_path, steps=4)), "widths": (24,)}))
    shutil.rmtree(tmp_path / "checkpoints" / SITES[0])
    before = content(tmp_path)
    with pytest.raises(MismatchError, match=r"mlp_out\.1/step_000000004 differs: steps is 4, asked for 5"):
        run(config_of("sweep", store, tmp_path, steps=5))
    assert content(tmp_path) == before, "refused before the first site was trained"


def test_what_does_not_matter_may_change(store, tmp_path):
    assert spawn(config_of("train", store, tmp_path), victim=30) == -signal.SIGKILL
    run(config_of("train", store, tmp_path, checkpoint_every=7, keep=1))
    assert steps_in(tmp_path / "checkpoints") == [f"step_{STEPS:09}"]


@pytest.mark.parametrize("damage", ["index", "tensors", "shapes"])
def test_a_damaged_checkpoint_is_named_and_can_be_deleted(damage, store, tmp_path):
    config = config_of("train", store, tmp_path / "a", keep=3)
    run(config)
    expected, newest = content(tmp_path / "a"), tmp_path / f"a/checkpoints/step_{STEPS:09}"
    if damage == "index":
        (newest / "checkpoint.json").write_text("{")
    elif damage == "tensors":
        (newest / "sae.state.safetensors").write_bytes((newest / "sae.state.safetensors").read_bytes()[:-10])
    else:
        checkpoint.write_tensors(newest / "sae.state.safetensors", {"idle": torch.zeros(3)})
    with pytest.raises(ActstoreError, match="step_000000042"):
        run(config)
    for file in newest.iterdir():
        file.unlink()
    run(config)
    assert content(tmp_path / "a") == expected


def test_metrics_that_are_missing_are_refused(store, tmp_path):
    config = config_of("train", store, tmp_path)
    assert spawn(config, victim=20) == -signal.SIGKILL
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ActstoreError, match=r"metrics.jsonl has 0 bytes, its checkpoint knew \d+"):
        run(config)


def test_a_loss_that_is_not_finite_names_sae_step_and_checkpoint(store, tmp_path, monkeypatch):
    step = Run.step

    def poisoned(self, x, y, number, steps):
        bad = number == 10 and self.name == "width_24_target_6_seed_0"
        return step(self, x * math.nan if bad else x, y, number, steps)

    monkeypatch.setattr(Run, "step", poisoned)
    with pytest.raises(ActstoreError) as stopped:
        run(config_of("sweep", store, tmp_path))
    good = tmp_path / "checkpoints" / SITES[0] / "step_000000008"
    assert str(stopped.value).startswith(
        f"the loss of width_24_target_6_seed_0 is not finite from step 10 (of {STEPS}) on. "
        f"The last good checkpoint is {good}. "
    )
    assert steps_in(good.parent) == ["step_000000004", "step_000000008"]
    monkeypatch.undo()
    run(config_of("sweep", store, tmp_path))
    run(config_of("sweep", store, tmp_path / "whole"))
    whole = content(tmp_path / "whole")
    assert whole == {k: v for k, v in content(tmp_path).items() if not k.startswith("whole/")}


def test_parameters_that_are_not_finite_are_never_kept(store, tmp_path, monkeypatch):
    step = Run.step

    def poisoned(self, x, y, number, steps):
        statistics = step(self, x, y, number, steps)
        if number == 7:
            self.sae.b_dec[3] = math.inf
        return statistics

    monkeypatch.setattr(Run, "step", poisoned)
    with pytest.raises(ActstoreError, match="parameters of sae are not finite after 8 of 42 steps"):
        run(config_of("train", store, tmp_path))
    assert steps_in(tmp_path / "checkpoints") == ["step_000000004"]


@pytest.mark.parametrize("kind", ["train", "sweep"])
def test_two_processes_do_not_train_into_one_directory(store, tmp_path, kind):
    """The second is refused and changes nothing; when the first has ended, however it did, the place is free."""
    config = config_of(kind, store, tmp_path / "out", steps=4)
    place = config.out / "checkpoints" / (SITES[0] if kind == "sweep" else "")
    with checkpoint.locked(place):
        with pytest.raises(ActstoreError, match="another process is training into"):
            run(config)
        assert [path for path in config.out.rglob("*") if path.is_file()] == [place / checkpoint.LOCK]
    run(config)
    assert (config.out / "checkpoints").exists()


def test_a_sweep_begun_anew_leaves_no_release_of_the_old_one(store, tmp_path):
    config = config_of("sweep", store, tmp_path / "out", steps=4)
    (tmp_path / "out/release/layer_1/width_24/average_l0_999").mkdir(parents=True)
    run(replace(config, resume=False))
    assert not (tmp_path / "out/release/layer_1/width_24/average_l0_999").exists()
    assert list((tmp_path / "out/release").glob("**/params.npz"))
