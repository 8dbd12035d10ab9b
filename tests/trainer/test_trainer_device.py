"""What a run computes on and in which precision, and what its step would do on a GPU.

There is no GPU here. Tensors of the device `meta` take the GPU's path, and have no values to ask for; every operation
that they go through is looked at.
"""

import dataclasses
import re
from contextlib import nullcontext

import pytest
import torch
from test_trainer_resume import SITES, config_of, content, make_store, run
from test_trainer_run import run_cli
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from actstore.errors import MismatchError
from actstore.progress import Progress
from trainer import gpu, jumprelu, parallel, parts, reference
from trainer.config import EvalConfig, SweepConfig, TrainConfig
from trainer.device import choose_device, settle, tf32_products
from trainer.files import load_sae
from trainer.optim import _decay
from trainer.parallel import Ranks
from trainer.recipe import PRESETS, Recipe
from trainer.sae import init_sae
from trainer.stream import Stream
from trainer.train import _normalised, start, train_many


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("device") / "store")


def two_gpus(monkeypatch, capability=(9, 0)):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)


def test_every_command_takes_a_gpu_if_there_is_one(monkeypatch):
    for config in (TrainConfig, SweepConfig, EvalConfig):
        assert config.__dataclass_fields__["device"].default == "auto"
    assert choose_device("auto") == ("cpu", "auto: PyTorch sees no GPU")
    two_gpus(monkeypatch)
    assert choose_device("auto") == ("cuda", "auto: PyTorch sees a GPU")
    assert [choose_device(name)[0] for name in ("cpu", "cpu:0", "cuda", "cuda:1")] == ["cpu", "cpu", "cuda", "cuda:1"]
    with pytest.raises(ValueError, match=r"device is cuda:2, but .* sees cuda:0 to cuda:1"):
        choose_device("cuda:2")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "sees no GPU; give auto or cpu"),
        ("gpu", "expected auto, cpu, cuda or cuda:N"),
        ("mps", "expected auto"),
    ],
)
@pytest.mark.parametrize("command", ["train", "sweep", "eval"])
def test_a_device_that_is_not_there_is_one_line_before_anything_is_deleted(
    command, device, message, store, tmp_path, monkeypatch, capsys
):
    if command != "eval":
        run(config_of(command, store, tmp_path / "out", steps=2))
    before, common = content(tmp_path), ["--out", tmp_path / "out", "--device", device]
    training = ["--store", store, "--steps", 2, "--no-resume"]
    options = {
        "train": [*training, "--site", SITES[0]],
        "sweep": [*training, "--sites", *SITES, "--widths", 24],
        "eval": ["--sae", tmp_path / "sae", "--tokens", tmp_path / "tokens"],
    }[command]
    capsys.readouterr()
    assert run_cli(monkeypatch, command, *options, *common) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: device is {device}, ") and message in line
    assert content(tmp_path) == before


def test_torchrun_needs_a_gpu_for_each_process(monkeypatch):
    two_gpus(monkeypatch)
    for name, value in {"RANK": 2, "WORLD_SIZE": 4, "LOCAL_RANK": 2, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="LOCAL_RANK is 2, but this machine has 2 GPUs"), parallel.joined("cuda"):
        pass


def settled(capsys, config, *checkpoints):
    found = settle(config, checkpoints, Progress())
    return found, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("change", "on_cpu", "on_gpu"),
    [
        ({}, "float32 (the preset's)", "bfloat16 (the default on a GPU: bfloat16 factors, float32 sums and results)"),
        (
            {"compute": "float32"},
            "float32 (as asked)",
            "float32 (as asked; on a GPU its products are TF32, where the GPU has that)",
        ),
        ({"compute": "bfloat16"}, "bfloat16 (as asked)", "bfloat16 (as asked)"),
    ],
    ids=["default", "float32", "bfloat16"],
)
def test_the_precision_is_chosen_once_and_said(change, on_cpu, on_gpu, store, tmp_path, monkeypatch, capsys):
    for kind in ("train", "sweep"):
        config = config_of(kind, store, tmp_path, **change)
        found, lines = settled(capsys, config)
        assert lines == ["device cpu (auto: PyTorch sees no GPU)", f"compute {on_cpu}"]
        assert (found.device, found.compute) == ("cpu", on_cpu.split()[0])
        with monkeypatch.context() as patch:
            two_gpus(patch)
            found, lines = settled(capsys, config)
        assert lines == ["device cuda (auto: PyTorch sees a GPU)", f"compute {on_gpu}"]
        assert (found.device, found.compute) == ("cuda", on_gpu.split()[0])
        recipes = [found.recipe] if kind == "train" else [spec.recipe for spec in found.specs]
        assert {recipe.compute for recipe in recipes} == {found.compute}


def test_a_gpu_without_bfloat16_multiplies_float32(store, tmp_path, monkeypatch, capsys):
    two_gpus(monkeypatch, (7, 5))
    found, lines = settled(capsys, config_of("train", store, tmp_path))
    assert found.compute == "float32" and "this GPU is too old for fast bfloat16 products" in lines[1]


@pytest.mark.parametrize("kind", ["train", "sweep"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_run_goes_on_in_the_precision_that_it_was_begun_with(kind, compute, store, tmp_path, monkeypatch, capsys):
    run(config_of(kind, store, tmp_path, steps=4, compute=compute))
    capsys.readouterr()
    before, other = content(tmp_path), {"float32": "bfloat16", "bfloat16": "float32"}[compute]
    run(config_of(kind, store, tmp_path, steps=4))
    lines = capsys.readouterr().err.splitlines()
    assert sum("device cpu" in line for line in lines) == 1, "said once"
    assert [line for line in lines if line.startswith(f"compute {compute} (as the run in ")], lines
    assert content(tmp_path) == before
    with pytest.raises(MismatchError, match=f"compute is '?{compute}'?, asked for '?{other}'?"):
        run(config_of(kind, store, tmp_path, steps=4, compute=other))
    for path in tmp_path.rglob("sae.safetensors"):
        assert load_sae(path.parent).sae.recipe.compute == compute
    two_gpus(monkeypatch)
    folders = sorted(path.parent for path in tmp_path.rglob("step_*"))
    assert settle(config_of(kind, store, tmp_path), folders, Progress()).compute == compute
    assert settle(config_of(kind, store, tmp_path, resume=False), folders, Progress()).compute == "bfloat16"


def test_tf32_is_for_training_on_a_gpu_alone(store, tmp_path, monkeypatch):
    matmul, seen = torch.backends.cuda.matmul, []
    with tf32_products("cpu"):
        assert not matmul.allow_tf32
    with pytest.raises(KeyError), tf32_products("cuda:1"):
        assert matmul.allow_tf32
        raise KeyError
    assert not matmul.allow_tf32
    monkeypatch.setattr("trainer.train.tf32_products", lambda device: seen.append(device) or nullcontext())
    run(config_of("sweep", store, tmp_path, steps=2))
    assert seen == ["cpu"] * len(SITES)


@pytest.mark.parametrize(
    ("device", "world", "backend", "wanted"),
    [
        ("cpu", 1, None, None),
        ("cuda:1", 1, None, "cuda:1"),
        ("cuda", 2, "nccl", "cuda"),
        ("cuda", 2, "gloo", None),
        ("cpu", 2, "gloo", None),
    ],
)
def test_batches_arrive_on_the_gpu_that_trains(device, world, backend, wanted, store, monkeypatch):
    import actstore

    asked = []
    monkeypatch.setattr("trainer.stream.current", lambda: Ranks(0, world))
    monkeypatch.setattr("torch.distributed.get_backend", lambda: backend)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(actstore, "ActivationDataset", lambda *_, **how: asked.append(how["device"]))
    Stream(store=actstore.open(store), site=SITES[0], target=None, batch_size=64, seed=0, device=device).open()
    assert asked == [wanted]


@pytest.mark.parametrize("kind", ["train", "sweep"])
def test_the_stream_knows_the_device(kind, store, tmp_path, monkeypatch):
    """As far as a machine without a GPU comes: to the first look at the store."""
    two_gpus(monkeypatch)
    asked, change = [], {"preset": "anthropic_2025"} if kind == "train" else {}
    monkeypatch.setattr("trainer.stream.Stream.open", lambda self: asked.append(self.device) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(config_of(kind, store, tmp_path, **change))
    assert asked == ["cuda"]


def test_rows_that_saes_are_begun_from_come_to_the_cpu(store, monkeypatch):
    import actstore

    stream = Stream(store=actstore.open(store), site=SITES[0], target=None, batch_size=64, seed=0)
    with FakeTensorMode():
        rows = torch.empty(64, 16, device="cuda")
        monkeypatch.setattr(Stream, "batches", lambda *_: iter([rows]))
        assert (rows.device.type, stream.first_rows().device.type) == ("cuda", "cpu")


class Watched(TorchDispatchMode):
    """Every operation: its name, the tensors that it reads and those that it returns."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        returned = operation(*args, **(kwargs or {}))
        read, made = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in ((args, kwargs), returned))
        self.operations.append((str(operation), read, made))
        return returned

    @property
    def names(self):
        return [name for name, _, _ in self.operations]

    def on_host(self):
        """Operations that have to do with a tensor in host memory: copies to the device, or mistakes."""
        return [name for name, read, made in self.operations if any(parts.on_cpu(t) for t in (*read, *made))]


@pytest.fixture
def no_values(monkeypatch):
    """No tensor is made from a Python number or an array, which would be copied to the device unwatched."""

    def refuse(*_, **__):
        raise AssertionError("a copy to the device")

    return lambda: [monkeypatch.setattr(torch, name, refuse) for name in ("tensor", "as_tensor", "from_numpy")]


def on_meta(recipe, d_out=None):
    sizes = {"mean": torch.zeros(d_out or 24), "sample": torch.randn(300, 24) / 5, "d_out": d_out}
    return init_sae(24, 96, recipe, device="meta", **sizes)


BASE = Recipe(k=8)
RECIPES = {
    **PRESETS,
    "topk": dataclasses.replace(BASE, architecture="topk"),
    "batchtopk": dataclasses.replace(BASE, architecture="batchtopk", prefixes=3),
    "gated": dataclasses.replace(BASE, architecture="gated"),
    "skip": BASE.for_transcoder(skip=True),
}


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_gpus_step_copies_nothing_and_its_products_come_out_in_float32(name, compute, no_values):
    """Nothing from or to host memory; asking for a value is an error on `meta`."""
    recipe = dataclasses.replace(RECIPES[name], compute=compute)
    d_out = 20 if recipe.skip else None
    training, x = start("sae", on_meta(recipe, d_out), 100), torch.empty(64, 24, device="meta")
    y = None if d_out is None else torch.empty(64, d_out, device="meta")
    no_values()
    with Watched() as watched:
        for step in range(2):
            training.step(x, y, step, 100)
    assert watched.on_host() == []
    products = [one for one in watched.operations if re.search(r"mm_?\.", one[0]) and len(one[1][-2]) > 1]
    assert len(products) >= 2 * 5
    assert {made[0].dtype for _, _, made in products} == {torch.float32}
    if compute == "bfloat16":  # the skip connection is float32 whatever the recipe multiplies in
        assert sum(name != "aten.mm.dtype" for name, _, _ in products) == (2 * 2 if recipe.skip else 0)
    else:
        assert not any(name == "aten.mm.dtype" for name, _, _ in products)


def test_an_older_torch_multiplies_the_same_factors_as_float32(monkeypatch):
    monkeypatch.setattr(parts, "FLOAT32_RESULTS", False)
    a, b = (torch.empty(8, 8, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with Watched() as watched:
        assert parts.multiply(a, b).dtype == torch.float32
    assert "aten.mm.default" in watched.names and "aten.mm.dtype" not in watched.names


def test_pre_activations_of_a_gpu_are_fine_enough_for_the_window(monkeypatch):
    """Thresholds of 0.4 and the published bandwidth: the reference's gradient, which rounded products do not give.

    A CPU does here what a GPU would, as an older torch does it.
    """
    recipe = Recipe(compute="bfloat16", log_threshold=False, pre_bias=False, threshold_init=0.4, bandwidth=1e-3)
    sae, rng = init_sae(16, 64, recipe, seed=1), torch.Generator().manual_seed(0)
    x = torch.randn(4096, 16, generator=rng).bfloat16().float() / 2
    for name in ("W_enc", "W_dec"):
        getattr(sae, name).copy_(getattr(sae, name).bfloat16().float())
    leaves = {name: p.double().requires_grad_() for name, p in sae.parameters.items()}
    reference.loss(leaves, x.double(), recipe, 1e3).backward()
    wanted = leaves["threshold"].grad

    def error():
        found = sae.loss_and_gradients(x, 1e3)[0]["threshold"].double()
        return float((found - wanted).norm() / wanted.norm())

    assert error() > 0.3
    for module in (parts, jumprelu):
        monkeypatch.setattr(module, "on_cpu", lambda _: False)
    monkeypatch.setattr(parts, "FLOAT32_RESULTS", False)
    assert error() < 0.01


class Stopped(Exception):
    pass


def test_triton_kernels_read_float32_pre_activations(monkeypatch):
    """On a GPU: from the products to the kernels and back; the kernels themselves are left out."""
    recipe = dataclasses.replace(PRESETS["gemma_scope"], compute="bfloat16", kernels="triton")
    kernels, seen = {}, []

    def kernel(name, _programs, z, f, *_, **__):
        kernels[name] = (z.dtype, f.dtype)

    monkeypatch.setattr(gpu, "run", kernel)
    with Watched() as watched:
        on_meta(recipe).loss_and_gradients(torch.empty(64, 24, device="meta"), 0.1)
    assert kernels == {
        "gate_forward": (torch.float32, torch.bfloat16),
        "gate_backward": (torch.float32, torch.float32),
    }
    assert watched.names.count("aten.mm.dtype") == 5

    def pick(name, _programs, product, *_, **__):
        seen.append((name, product.dtype))
        raise Stopped

    monkeypatch.setattr(gpu, "run", pick)
    monkeypatch.setattr(gpu, "LEAST_LATENTS", 1)
    with pytest.raises(Stopped):
        on_meta(recipe).loss_and_gradients(torch.empty(1024, 24, device="meta"), 0.1)
    assert seen == [("pick", torch.float32)]


def test_lazy_adams_decay_copies_nothing(no_values):
    updates = torch.ones(5, dtype=torch.int64, device="meta")
    no_values()
    with Watched() as watched:
        assert _decay(updates, BASE).dtype == torch.float32
    assert watched.on_host() == []


def test_rows_travel_in_their_own_type_and_are_copied_once():
    device = torch.device("meta")
    for rows, names in (
        (torch.ones(4, 3, dtype=torch.bfloat16, device=device), ["aten._to_copy.default", "aten.div_.Tensor"]),
        (torch.ones(4, 3, device=device), ["aten.div.Tensor"]),
        (torch.ones(4, 3), ["aten._to_copy.default", "aten.div_.Tensor"]),
        (torch.ones(4, 3, dtype=torch.bfloat16), ["aten._to_copy.default"] * 2 + ["aten.div_.Tensor"]),
    ):
        with Watched() as watched:
            assert _normalised(rows, 2.0, device).dtype == torch.float32
        assert watched.names == names
        assert watched.operations[0][2][0].dtype == (rows.dtype if parts.on_cpu(rows) else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_are_left_as_they_are(dtype):
    recipe = dataclasses.replace(PRESETS["short"], batch_size=32, target_l0=4.0)
    batch = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = batch.clone()
    states = []
    for batches in ([batch] * 3, [before.float().clone() for _ in range(3)]):
        training = start("sae", init_sae(16, 32, recipe, mean=torch.zeros(16)), 3)
        train_many([training], batches, steps=3, scale=3.0)
        states.append(training.state)
    assert torch.equal(batch, before)
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
