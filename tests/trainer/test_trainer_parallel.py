"""Several processes: a shared SAE is the one of one process, up to rounding; dealt SAEs are it bitwise."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from commands import CONTEXT
from safetensors.torch import load_file
from test_trainer_resume import SITES, config_of, content, make_store, run

from actstore.errors import ActstoreError
from trainer import checkpoint, parallel, reference
from trainer.config import SAESpec
from trainer.parallel import LATENT_AXIS, Ranks, check_deal, check_sharding
from trainer.recipe import ANTHROPIC_2025, GEMMA_SCOPE_2, SHORT, Recipe
from trainer.sae import init_sae, shapes
from trainer.stream import Stream
from trainer.train import Run, start, train

D, OUT, W, B, STEPS = 12, 10, 40, 64, 6
WIDE = Recipe(bandwidth=0.2, threshold_init=0.15, lr=1e-3, lr_warmup_steps=3, sparsity_warmup_steps=2, batch_size=B)
DIRECT = replace(WIDE, log_threshold=False, sparsity_coefficient=0.05)
RECIPES = {
    "price": WIDE,
    "target": replace(DIRECT, target_l0=5.0, clip_norm=0.1, revival=0.02),
    "per_token": replace(DIRECT, sparsity_loss="l0_per_token", target_l0=5.0, frequency_penalty=0.1),
    "tanh": replace(ANTHROPIC_2025, unit_mean_square=True, bandwidth=0.2, batch_size=B, init_l0=5.0, lr=1e-3),
    "transcoder": replace(DIRECT, target_l0=5.0, lazy_adam=True).for_transcoder(),
    "skip": replace(DIRECT, target_l0=5.0, clip_norm=0.1, beta1=0.9).for_transcoder(skip=True),
    "bfloat16": replace(DIRECT, compute="bfloat16"),
}
COEFFICIENT = 0.02


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("parallel") / "store")


def member(rank, world, init, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=world)
    try:
        found = function(*arguments)
    except (ActstoreError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
    init.with_name(f"{init.name}_{rank}.pickle").write_bytes(pickle.dumps(found))


def processes(world, tmp_path, function, *arguments, timeout=100):
    """What `function` returns, or the message of its error, by rank; the exit code of processes that were killed."""
    init = tmp_path / f"group_{uuid.uuid4().hex}"
    members = [CONTEXT.Process(target=member, args=(rank, world, init, function, arguments)) for rank in range(world)]
    for process in members:
        process.start()
    deadline, found = time.monotonic() + timeout, []
    for rank, process in enumerate(members):
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            pytest.fail(f"rank {rank} hangs")
        file = init.with_name(f"{init.name}_{rank}.pickle")
        found.append(pickle.loads(file.read_bytes()) if file.exists() else process.exitcode)
    return found


def whole_sae(recipe, ranks=parallel.ALONE):
    """An SAE off its initial symmetry, or this rank's part of it."""
    d_out = None if recipe.pre_bias or recipe is RECIPES["tanh"] else OUT
    sample = torch.randn(50, D, generator=torch.Generator().manual_seed(7)) / D**0.5
    sae = init_sae(D, W, recipe, seed=3, d_out=d_out, sample=sample)
    rng = torch.Generator().manual_seed(2)
    for name, p in sae.parameters.items():
        if name != "W_dec":
            p += 0.05 * p.abs().mean() + 0.03 * torch.randn(p.shape, generator=rng)
    sae.constrain()
    return replace(sae, ranks=ranks, **{name: part(name, p, ranks) for name, p in sae.parameters.items()})


def part(name, tensor, ranks):
    axis, own = LATENT_AXIS.get(name), ranks.latents(W)
    return tensor if axis is None else tensor.narrow(axis, own.start, own.stop - own.start).clone()


def batches(recipe):
    rng = torch.Generator().manual_seed(1)
    out = D if recipe.pre_bias or recipe is RECIPES["tanh"] else OUT
    for _ in range(STEPS):
        yield torch.randn(B, D, generator=rng) / D**0.5, torch.randn(B, out, generator=rng) / out**0.5


def steps():
    """Of each recipe: gradients and statistics at the start, the state after some steps, elements added up in each."""
    ranks, found = parallel.current(), {}
    all_reduce, sizes = dist.all_reduce, []

    def counted(tensor):
        sizes.append(tensor.numel())
        all_reduce(tensor)

    parallel.dist.all_reduce = counted
    for name, recipe in RECIPES.items():
        sae, dead = whole_sae(recipe, ranks), torch.arange(W)[ranks.latents(W)] % 3 == 0
        x, y = next(batches(recipe))
        y = y if sae.W_dec.shape[1] == OUT else None
        gradients, statistics = sae.loss_and_gradients(x, COEFFICIENT, dead, y)
        kept = {k: t.numpy().copy() for k, t in (gradients | statistics._asdict()).items()}
        training, sizes[:] = start(name, sae, STEPS), []
        for number, (x, y) in enumerate(batches(recipe)):
            training.step(x, y if sae.W_dec.shape[1] == OUT else None, number, STEPS)
        state = {k: t.numpy().copy() for k, t in training.state.items()}
        found[name] = (kept, state, list(sizes))
    parallel.dist.all_reduce = all_reduce
    return found


@pytest.fixture(scope="module", params=[2, 4])
def stepped(request, tmp_path_factory):
    return processes(request.param, tmp_path_factory.mktemp("steps"), steps)


@pytest.fixture(scope="module")
def alone():
    return steps()


def joined(parts, name):
    """The tensor of all latents, from each rank's."""
    axis = LATENT_AXIS.get(name.rsplit("/", 1)[-1].removeprefix("first."), 0 if name == "fired" else None)
    return parts[0] if axis is None else np.concatenate(parts, axis)


def error(found, expected):
    return np.abs(found - expected).max() / (np.abs(expected).max() + 1e-12)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "bfloat16"])
def test_gradients_match_the_reference(name, stepped):
    recipe = RECIPES[name]
    sae, dead = whole_sae(recipe), torch.arange(W) % 3 == 0
    w = {k: p.double().requires_grad_() for k, p in sae.parameters.items()}
    x, y = (t.double() for t in next(batches(recipe)))
    loss = reference.loss(w, x, recipe, COEFFICIENT, dead, y if sae.W_dec.shape[1] == OUT else None)
    loss.backward()
    wanted = loss.item()
    ranks = [found[name][0] for found in stepped]
    for key, leaf in w.items():
        assert error(joined([r[key] for r in ranks], key), leaf.grad.numpy()) < 2e-5, key
    f = sae.encode(x.float())
    assert 0 < (f > 0).float().mean() < 1
    for r in ranks:
        assert float(r["loss"]) == pytest.approx(wanted, rel=1e-5)
        assert float(r["l0"]) == pytest.approx(float((f > 0).sum(1).double().mean()))
    assert np.array_equal(joined([r["fired"] for r in ranks], "fired"), (f > 0).sum(0).float().numpy())


@pytest.mark.parametrize("name", RECIPES)
def test_steps_are_those_of_one_process(name, stepped, alone):
    expected = alone[name][1]
    fresh = {k: t.numpy() for k, t in start(name, whole_sae(RECIPES[name]), STEPS).state.items()}
    for key, value in expected.items():
        found = joined([rank[name][1][key] for rank in stepped], key)
        assert found.shape == value.shape and found.dtype == value.dtype
        assert error(found, value) < (3e-2 if name == "bfloat16" else 5e-4), key
        if key.startswith("parameters") and name != "bfloat16":
            assert error(found, value) < error(fresh[key], value) / 10, f"{key} has hardly moved"


@pytest.mark.parametrize("name", RECIPES)
def test_what_no_latent_owns_is_bitwise_the_same_on_all_ranks(name, stepped):
    first = stepped[0][name]
    shared = [key for key in first[1] if LATENT_AXIS.get(key.rsplit("/", 1)[-1].removeprefix("first.")) is None]
    assert {"parameters/b_dec", "moments/b_dec", "first_bad", "window_l0"} <= set(shared)
    assert ("parameters/W_skip" in shared) == (name == "skip")
    for rank in stepped[1:]:
        assert all(rank[name][1][key].tobytes() == first[1][key].tobytes() for key in shared)
        assert all(rank[name][0][key].tobytes() == first[0][key].tobytes() for key in ("loss", "mse", "l0", "b_dec"))


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_step_communicates(name, stepped, alone):
    recipe = RECIPES[name]
    out = whole_sae(recipe).W_dec.shape[1]
    one = [B * (out + 1), out + 4 + (D * out if recipe.skip else 0)]
    one += [len(whole_sae(recipe).parameters)] * (recipe.clip_norm is not None)
    assert all(rank[name][2] == one * STEPS for rank in stepped)
    assert alone[name][2] == []


@pytest.mark.parametrize("world", [2, 5])
@pytest.mark.parametrize("name", RECIPES)
def test_initial_weights_are_parts_of_the_same(name, world, monkeypatch):
    monkeypatch.setattr("trainer.sae.BLOCK", 7)
    recipe, rng = RECIPES[name], torch.Generator().manual_seed(7)
    keys = {"seed": 3, "d_out": None if recipe.pre_bias else OUT, "sample": torch.randn(50, D, generator=rng)}
    expected = init_sae(D, W, recipe, **keys)
    parts = [init_sae(D, W, recipe, **keys, ranks=Ranks(rank, world)) for rank in range(world)]
    for key, p in expected.parameters.items():
        found = joined([one.parameters[key].numpy() for one in parts], key)
        same = error(found, p.numpy()) < 1e-5 if key == "b_enc" and recipe.init_l0 else np.array_equal(found, p.numpy())
        assert same, key


def read(url, count):
    stream = Stream(store=parallel_store(url), site=SITES[0], target=SITES[1], batch_size=64, seed=3)
    with stream.open() as data:
        source = stream.batches(data)
        return [tuple(t.numpy().copy() for t in next(source)) for _ in range(count)] + [data.state_dict()]


def parallel_store(url):
    import actstore

    return actstore.open(url)


def gathered(_):
    ranks = parallel.current()
    rows = torch.full((3, 5), ranks.rank + 0.5, dtype=torch.bfloat16)
    return ranks.gather(rows).float().numpy(), ranks.same(4), ranks.same(ranks.rank)


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_batches_are_bitwise_those_of_one_process(world, store, tmp_path):
    """Over the end of an epoch of 16 batches."""
    expected = read(store, 20)
    for found in processes(world, tmp_path, read, store, 20):
        assert found[-1] == expected[-1]
        for a, b in zip(found[:-1], expected[:-1], strict=True):
            assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
    rows, same, other = processes(world, tmp_path, gathered, None)[0]
    assert np.array_equal(rows, np.broadcast_to(np.arange(world)[:, None, None] + 0.5, (world, 3, 5)))
    assert same and not other


def deadly(config, victims, step, in_file=0):
    """Run, but ranks `victims` are killed in this step, or at this write of a checkpoint; returns the first step."""
    do, sync, writes, first = Run.step, checkpoint._sync, [0], []
    doomed = dist.get_rank() in victims

    def deadly_step(self, x, y, number, steps):
        first.append(number)
        if doomed and number == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return do(self, x, y, number, steps)

    def deadly_sync(path):
        writes[0] += 1
        if doomed and writes[0] == in_file:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    Run.step, checkpoint._sync = deadly_step, deadly_sync
    run(config)
    return first[0]


def assert_killed(found, victims):
    """The victims by the signal, the others by what became of their communication, none left waiting."""
    for rank, end in enumerate(found):
        assert end == -signal.SIGKILL if rank in victims else isinstance(end, int) and end != 0, found


def differing(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if a[name] != b[name]]


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """What two processes that nobody disturbs write."""
    out = tmp_path_factory.mktemp("whole")
    assert processes(2, out, deadly, config_of("train", store, out / "run"), [], 0) == [0, 0]
    return out / "run"


@pytest.mark.parametrize(
    ("victims", "step", "in_file", "from_step"),
    [
        ([1], 23, 0, 20),
        ([0, 1], 30, 0, 28),
        ([1], -1, 2, 4),
        pytest.param([0], -1, 2, 0, marks=pytest.mark.slow),
        ([0], -1, 3, 0),
        ([0], -1, 4, 4),
    ],
    ids=["one", "all", "its tensors", "the index", "before the rename", "after it"],
)
def test_killed_processes_go_on_bitwise(victims, step, in_file, from_step, store, whole, tmp_path):
    config = config_of("train", store, tmp_path / "run")
    assert_killed(processes(2, tmp_path, deadly, config, victims, step, in_file), victims)
    assert processes(2, tmp_path, deadly, config, [], 0) == [from_step] * 2
    assert differing(content(tmp_path / "run"), content(whole)) == []


def test_any_number_of_processes_goes_on(store, whole, tmp_path):
    config = config_of("train", store, tmp_path / "run")
    assert_killed(processes(2, tmp_path, deadly, config, [0, 1], 13), [0, 1])
    assert_killed(processes(4, tmp_path, deadly, config, [0, 1, 2, 3], 27), [0, 1, 2, 3])
    run(config)
    run(config_of("train", store, tmp_path / "alone"))
    expected = load_file(tmp_path / "alone/sae.safetensors")
    for folder in (tmp_path / "run", whole):
        found = load_file(folder / "sae.safetensors")
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
        for key, value in expected.items():
            assert error(found[key].numpy(), value.numpy()) < 2e-3, key
        (a, b) = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "alone"))
        assert a.keys() == b.keys() and a["recipe"] == b["recipe"] and a["d_sae"] == 40
        assert a["final"]["l0"] == pytest.approx(b["final"]["l0"], rel=0.02)
        assert a["final"]["dead"] == pytest.approx(b["final"]["dead"], abs=0.03)
    written = [sorted(p.name for p in (f / f"checkpoints/step_{42:09}").iterdir()) for f in (whole, tmp_path / "run")]
    assert written[0] == ["checkpoint.json", "sae.0-of-2.state.safetensors", "sae.1-of-2.state.safetensors"]
    assert written[1] == ["checkpoint.json", "sae.state.safetensors"]
    assert json.loads((tmp_path / f"run/checkpoints/step_{42:09}/checkpoint.json").read_text())["format_version"] == 1


def state_of(config, shards):
    """The state that this rank reads from the last checkpoint."""
    ranks = parallel.current()
    sae = init_sae(16, 40, config.recipe, mean=torch.zeros(16), sample=torch.zeros(4, 16), ranks=ranks)
    state = start("sae", sae, config.steps).state
    checkpoint.restore(config.out / f"checkpoints/step_{config.steps:09}", "sae", state, shards=shards, ranks=ranks)
    return {key: tensor.numpy().copy() for key, tensor in state.items()}


def test_shards_are_read_in_any_number_and_assembled_bitwise(store, tmp_path):
    """With first moments too."""
    config = replace(config_of("train", store, tmp_path / "run", steps=8), preset="anthropic_2025")
    assert processes(2, tmp_path, deadly, config, [], -1) == [0, 0]
    expected, sae = state_of(config, 2), load_file(tmp_path / "run/sae.safetensors")
    assert {k: tuple(t.shape) for k, t in sae.items()} == shapes(config.recipe, 16, 40)
    assert all(np.array_equal(expected[f"parameters/{key}"], t.numpy()) for key, t in sae.items())
    found = processes(4, tmp_path, state_of, config, 2)
    assert found[0]["moments/first.W_enc"].shape == (16, 10)
    for key, value in expected.items():
        assert np.array_equal(joined([rank[key] for rank in found], key), value), key


def measured():
    """The metrics of a shared SAE, some of whose latents die soon."""
    recipe = replace(WIDE, threshold_init=0.9, dead_after_tokens=2 * B)
    sae = init_sae(D, W, recipe, ranks=parallel.current())
    return asdict(train(sae, (x for x, _ in batches(recipe)), steps=STEPS, scale=1.0))


def test_metrics_are_of_all_latents(tmp_path):
    expected = measured()
    assert 0 < expected["dead"] < 1
    for found in processes(4, tmp_path, measured):
        for key in expected.keys() - {"rows_per_second", "wait"}:
            assert found[key] == pytest.approx(expected[key], rel=1e-4), key


@pytest.mark.parametrize("damage", ["missing", "cut", "of another run"])
def test_a_damaged_shard_is_named(damage, store, whole, tmp_path):
    import shutil

    shutil.copytree(whole, tmp_path / "run")
    file = tmp_path / f"run/checkpoints/step_{42:09}/sae.1-of-2.state.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        checkpoint.write_tensors(file, {"idle": torch.zeros(20)})
    with pytest.raises(ActstoreError, match="step_000000042"):
        run(config_of("train", store, tmp_path / "run"))
    found = processes(2, tmp_path, deadly, config_of("train", store, tmp_path / "run"), [], 0)
    assert all("ActstoreError" in one and "step_000000042" in one for one in found)


def separately(config):
    """As on machines that share no file system."""
    return run(replace(config, out=config.out / str(dist.get_rank())))


def test_processes_that_see_other_checkpoints_are_refused(store, whole, tmp_path):
    import shutil

    shutil.copytree(whole, tmp_path / "out/1")
    found = processes(2, tmp_path, separately, config_of("train", store, tmp_path / "out"))
    assert "rank 0 finds none" in found[0] and "rank 1 finds step 42" in found[1]
    assert all("file system that all share" in one for one in found)


def grid(store, out, **change):
    few = {"widths": (24, 40), "target_l0s": (3.0,), "seeds": (0,), "steps": 20}
    return replace(config_of("sweep", store, out), **{**few, **change})


@pytest.mark.parametrize(
    ("world", "change"),
    [
        (2, {"widths": (24, 40, 32)}),
        (4, {"seeds": (0, 1), "architecture": "batchtopk"}),
        (2, {"preset": "anthropic_2025"}),
    ],
    ids=["uneven", "batchtopk", "from data"],
)
def test_dealt_saes_are_bitwise_those_of_one_process(world, change, store, tmp_path):
    run(grid(store, tmp_path / "alone", **change))
    assert processes(world, tmp_path, deadly, grid(store, tmp_path / "dealt", **change), [], -1) == [0] * world
    found, expected = content(tmp_path / "dealt"), content(tmp_path / "alone")
    assert differing(found, expected) == []
    assert sum(name.endswith("params.npz") for name in found) >= 2 and "sweep.json" in found


def test_a_dealt_sweep_goes_on_with_any_number_of_processes(store, tmp_path):
    run(grid(store, tmp_path / "alone"))
    config = grid(store, tmp_path / "dealt")
    assert_killed(processes(2, tmp_path, deadly, config, [1], 9), [1])
    with pytest.raises(KeyboardInterrupt):
        interrupted(config, 14)
    assert processes(2, tmp_path, deadly, config, [], -1) == [12, 12]
    assert differing(content(tmp_path / "dealt"), content(tmp_path / "alone")) == []


def interrupted(config, step):
    do = Run.step

    def stopping(self, x, y, number, steps):
        if number == step:
            raise KeyboardInterrupt
        return do(self, x, y, number, steps)

    Run.step = stopping
    try:
        run(config)
    finally:
        Run.step = do


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "topk", "k": 5, "target_l0": None}, "TopK chooses among all latents .* take jumprelu"),
        ({"architecture": "batchtopk", "k": 5, "target_l0": None}, "BatchTopK chooses among all latents"),
        ({"architecture": "gated", "target_l0": None}, "second reconstruction"),
        ({"prefixes": 3}, "3 Matryoshka prefixes"),
        ({}, "d_sae 42 is not a multiple of the 4 processes; the next is 44"),
    ],
)
def test_what_can_not_be_shared_is_refused(change, words):
    spec = SAESpec(name="sae", d_sae=42, seed=0, recipe=replace(SHORT, target_l0=5.0).replaced(**change))
    spec = replace(spec, recipe=replace(spec.recipe, **change))
    with pytest.raises(ValueError, match=words):
        check_sharding(Ranks(1, 4), spec)
    check_sharding(Ranks(0, 1), spec)


def refused(store, out):
    found = []
    for change in ({"d_sae": 41}, {"preset": "gemma_scope_2"}, {"architecture": "topk"}):
        with pytest.raises(ValueError) as stopped:
            run(replace(config_of("train", store, out), **change))
        found.append(str(stopped.value))
    with pytest.raises(ValueError) as stopped:
        run(grid(store, out, widths=(24,)))
    return [*found, str(stopped.value)]


def test_refused_before_anything_is_written(store, tmp_path):
    for d_sae, prefixes, topk, few in processes(2, tmp_path, refused, store, tmp_path / "out"):
        assert "d_sae 41 is not a multiple of the 2 processes" in d_sae
        assert f"{GEMMA_SCOPE_2.prefixes} Matryoshka prefixes" in prefixes and "TopK" in topk
        assert few.startswith("2 processes for a sweep of 1 SAEs a site; start at most 1")
    three = processes(3, tmp_path, deadly, replace(config_of("train", store, tmp_path / "out"), d_sae=42), [], 0)
    assert three == ["ValueError: world size 3 does not divide streams=8; use one of [1, 2, 4, 8]"] * 3
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="5 processes for a sweep of 4 SAEs"):
        check_deal(Ranks(0, 5), 4)


def poisoned(config, kind):
    """A NaN row, or an infinite weight on rank 1 alone, or a NaN in one SAE that rank 1 has."""
    do = Run.step

    def step(self, x, y, number, steps):
        x = x.clone()
        if number == 10 and (kind == "row" or (kind == "sae" and self.name == "width_40_target_3_seed_0")):
            x[5] = math.nan
        statistics = do(self, x, y, number, steps)
        if number == 7 and kind == "weight" and dist.get_rank() == 1:
            self.sae.W_dec[3, 2] = math.inf
        return statistics

    Run.step = step
    run(config)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "row",
            "the loss of sae is not finite from step 10 (of 42) on. The last good checkpoint is {}/step_000000008",
        ),
        (
            "weight",
            "the parameters of sae are not finite after 8 of 42 steps. The last good checkpoint is {}/step_",
        ),
        ("sae", "the loss of width_40_target_3_seed_0 is not finite from step 10 (of 20) on. "),
    ],
    ids=["row", "weight", "sae"],
)
def test_all_stop_with_the_same_message(kind, words, store, tmp_path):
    out = tmp_path / "out"
    config = grid(store, out) if kind == "sae" else config_of("train", store, out)
    found = processes(2, tmp_path, poisoned, config, kind)
    assert found[0] == found[1]
    assert found[0].startswith(f"ActstoreError: {words.format(out / 'checkpoints')}")


def test_torchrun(store, tmp_path):
    """The command line as it is documented; the figures are those of one process."""
    command = ["train", "--store", store, "--site", SITES[0], "--steps", "12", "--preset", "short", "--d-sae", "40"]
    command += ["--batch-size", "64", "--target-l0", "4", "--log-every", "4", "--out", str(tmp_path / "two")]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "trainer.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, *launch, *command, "--json", str(tmp_path / "figures.json")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("SAE ") == 1 and found.stderr.count("100%") == 1, "the lead alone is seen"
    run(replace(config_of("train", store, tmp_path / "one"), steps=12, log_every=4))
    one, two = (load_file(tmp_path / name / "sae.safetensors") for name in ("one", "two"))
    assert all(error(two[key].numpy(), one[key].numpy()) < 2e-3 for key in one)
    last = json.loads((tmp_path / "two/metrics.jsonl").read_text().splitlines()[-1])
    assert json.loads((tmp_path / "figures.json").read_text())["final"] == last and last["step"] == 12
    assert len(list((tmp_path / "two/checkpoints").glob("*/sae.*-of-2.state.safetensors"))) == 2
