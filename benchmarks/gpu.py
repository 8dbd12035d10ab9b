"""The GPU kit: what actstore's GPU code computes and how fast it is, in one command.

    python benchmarks/gpu.py                        on a machine with a CUDA GPU, under 8 minutes on an H100
    python benchmarks/gpu.py --device cpu --quick   everywhere: the same code with small numbers

Parts, in the order in which data flows; `--only` picks some:

    values    sites, store, batches and one training step on the device against the CPU
    capture   Gemma 2 2B's first 13 layers with random weights: bare forward pass, with hooks, with storing
    loader    a pinned copy; batches on the device; the stall of a consumer at the rate of a 16k-wide SAE
    trainer   one JumpReLU step at d = 2304, batch 4096: against the products alone, by kind of kernel, against SAELens

Prints a table and writes JSON with hardware and versions after every part, so that a run that is cut off leaves what
it measured. Exit code 1 if a check fails or a part ends in an error. `docs/playbooks/gpu.md` says what a bare machine
needs.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]  # a bare machine has actstore as a checkout only

import numpy as np  # noqa: E402
import stores  # noqa: E402
import tiny  # noqa: E402  the tests' small random models
import torch  # noqa: E402
import trainer_speed as speed  # noqa: E402

import actstore  # noqa: E402
from actstore import builtin  # noqa: E402
from actstore.bench import machine  # noqa: E402
from actstore.capture.forward import activations, decoder_of  # noqa: E402
from actstore.capture.model import load_config, load_model, model_identity, with_layers  # noqa: E402
from actstore.capture.precision import attention_of  # noqa: E402
from actstore.capture.segments import Work, open_segments, segment_prefix, work_of  # noqa: E402
from actstore.capture.sites import check_sites, expand_sites  # noqa: E402
from actstore.capture.worker import CALLS_IN_FLIGHT, Replica, ReplicaConfig  # noqa: E402
from actstore.console import print_table, write_json  # noqa: E402
from actstore.progress import Progress  # noqa: E402
from actstore.store import SiteSpec, StoreSpec, create_store, open_store  # noqa: E402
from actstore.tokens import TokenizeConfig, copy_tokens, open_tokens, row_starts, tokenize  # noqa: E402

GEMMA_2_2B = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 256_000,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
"""google/gemma-2-2b's config.json."""
DENSE_BF16_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "V100": 0}
"""Dense bfloat16 peaks in NVIDIA's data sheets (SXM variants)."""
GIB = 1 << 30
SAE_BYTES_PER_S = 9 * GIB
"""What one 16k-wide SAE reads at Gemma Scope's batch of 4,096 rows of 2,304 bfloat16 and 2 ms a step."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much the kit does."""

    model: dict[str, Any]
    num_layers: int
    sites: tuple[str, ...]
    seq_len: int
    batch_size: int
    bucket_rows: int
    num_buckets: int
    d: int
    store_rows: int
    batch_rows: int
    widths: tuple[int, ...]
    product: int
    """Side of the square matrices whose product tells the device's peak."""
    rounds: int
    seconds: float
    """How long a rate of the loader is measured."""


FULL = Size(
    model=GEMMA_2_2B,
    num_layers=13,
    sites=("resid_post.12",),
    seq_len=1024,
    batch_size=8,
    bucket_rows=1 << 17,
    num_buckets=8,
    d=2304,
    store_rows=1 << 20,
    batch_rows=4096,
    widths=(16_384, 65_536),
    product=8192,
    rounds=5,
    seconds=8.0,
)
QUICK = replace(
    FULL,
    model={
        **GEMMA_2_2B,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 4096,
        "query_pre_attn_scalar": 16,
    },
    num_layers=3,
    sites=("resid_post.2",),
    seq_len=128,
    bucket_rows=1 << 13,
    num_buckets=2,
    d=64,
    store_rows=1 << 14,
    batch_rows=512,
    widths=(256,),
    product=256,
    rounds=2,
    seconds=0.3,
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure or check."""

    part: str
    what: str
    value: float | None
    unit: str
    share: float | None = None
    """Of what `of` names."""
    of: str = ""
    passed: bool | None = None
    """Of a check: whether the value is within `of`; None for a figure."""


@dataclass(kw_only=True)
class Record:
    """What a run has found; written after every part."""

    device: str
    quick: bool
    machine: dict[str, Any]
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    lines: list[Line] = field(default_factory=list[Line])
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    """Of each part."""
    failed: dict[str, str] = field(default_factory=dict[str, str])
    """Parts that ended in an error, with it."""
    not_measured: dict[str, str] = field(default_factory=dict[str, str])
    """What could not be measured on this machine, and why."""

    @property
    def ok(self) -> bool:
        """Whether every check passed and every part ran to its end."""
        return not self.failed and all(line.passed is not False for line in self.lines)


@dataclass(frozen=True, kw_only=True)
class Kit:
    """What every part is given."""

    device: str
    size: Size
    folder: Path
    record: Record

    def check(self, part: str, what: str, value: float, limit: float, unit: str = "relative error") -> None:
        """Record a check that passes up to `limit`; NaN fails."""
        self._add(Line(part=part, what=what, value=value, unit=unit, of=f"at most {limit:g}", passed=value <= limit))

    def figure(self, part: str, what: str, value: float, unit: str, share: float | None = None, of: str = "") -> None:
        """Record a figure, with its share of another one."""
        self._add(Line(part=part, what=what, value=value, unit=unit, share=share, of=of))

    def _add(self, line: Line) -> None:
        self.record.lines.append(line)
        print(f"{line.part}: {line.what}: {line.value:.4g} {line.unit}", file=sys.stderr, flush=True)

    def wait(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        """Median seconds of some work over the rounds; one more round warms up."""
        found: list[float] = []
        for _ in range(self.size.rounds + 1):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - began)
        return statistics.median(found[1:])


# -- values -----------------------------------------------------------------------------------------------------------

TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
"""Relative error of a site against the CPU's float32; four layers of bfloat16 rounding are about 1e-2."""


def values(kit: Kit) -> None:
    """Compare what the device computes with what the CPU does."""
    _site_values(kit)
    _stored_values(kit)
    _batch_values(kit)
    _step_values(kit)


def _site_values(kit: Kit) -> None:
    """Every site of two small random models, padded and not, by the attention that capture takes on the device."""
    ids = torch.randint(3, tiny.VOCAB, (4, 64), generator=torch.Generator().manual_seed(0))
    ids[1, :20] = 0
    for kind in ("gemma2", "llama"):
        folder = kit.folder / kind
        tiny.model_of(kind).save_pretrained(folder)
        config = load_config(str(folder))
        sites = expand_sites("all", config)
        kept = torch.ones(ids.shape, dtype=torch.bool)
        kept[1, :20] = False
        expected = activations(load_model(str(folder)), ids, sites, pad_id=0, bos_id=1)
        for dtype in ("float32", "bfloat16"):
            model = load_model(str(folder), dtype, kit.device)
            found = activations(model, ids, sites, pad_id=0, bos_id=1)
            worst = max(_error(found[s.name].cpu()[kept], expected[s.name][kept]) for s in sites)
            what = f"{len(sites)} sites, {kind}, {attention_of(config, kit.device)} attention, {dtype}"
            kit.check("values", what, worst, TOLERANCE[dtype])


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


def _stored_values(kit: Kit) -> None:
    """A store that a replica wrote from the device, against the CPU's; and a second one, which must be the same."""
    tokens = _tokens(kit, seq_len=64)
    rows, bucket_rows = 1024, 512
    sites = ("resid_post.3", "mlp_out.3")
    written = [
        _captured(kit, builtin.NAME, tokens, sites, folder, device, dtype, rows, bucket_rows)
        for folder, device, dtype in (
            ("expected", "cpu", "float32"),
            ("found", kit.device, "bfloat16"),
            ("again", kit.device, "bfloat16"),
        )
    ]
    expected, found, again = (open_store(path) for path in written)
    for site in sites:
        reference, here, there = (_raw(store, site) for store in (expected, found, again))
        kit.check("values", f"stored rows of {site}, bfloat16", _error(here, reference), TOLERANCE["bfloat16"])
        different = float((here.view(torch.int16) != there.view(torch.int16)).sum())
        kit.check("values", f"stored values of {site} that a second capture changes", different, 0, "values")


def _raw(store: Any, site: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(store[site][:]).view(np.int16)).view(torch.bfloat16)


def _batch_values(kit: Kit) -> None:
    """Batches on the device against the host's, bit for bit, in every encoding and codec."""
    rows, options = 2048, {"sites": "resid_post.1", "batch_size": 256, "seed": 3}
    for encoding in ("bf16", "f32", "fixed:1e-3"):
        for codec in ("planes", "none"):
            url = kit.folder / f"batches-{encoding}-{codec}".replace(":", "-")
            stores.make(url, "resid_post.1", encoding, codec, d=96, rows=rows, bucket_rows=1024)
            with (
                actstore.ActivationDataset(url, **options) as host,
                actstore.ActivationDataset(url, **options, device=kit.device) as device,
            ):
                pairs = zip(host, device, strict=True)
                different = sum(float((a != b.cpu()).sum()) for a, b in pairs)
            what = f"batches of {encoding}, {codec}: values that differ from the host's"
            kit.check("values", what, different, 0, "values")


GRADIENT_TOLERANCE = {"float32": 3e-2, "bfloat16": 1e-1}
"""Latents whose pre-activation is within rounding of its threshold fire on one side only; float32 may be TF32."""


def _step_values(kit: Kit) -> None:
    """Gradients of one JumpReLU step against the CPU's in float32."""
    from trainer.recipe import SHORT
    from trainer.sae import init_sae

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 256, generator=generator) / 16
    dead = torch.zeros(1024, dtype=torch.bool)
    recipe = replace(SHORT, threshold_init=0.1, init_b_dec_to_mean=False)
    expected, _ = init_sae(256, 1024, recipe).loss_and_gradients(x, 0.03, dead)
    for compute in ("float32", "bfloat16"):
        sae = init_sae(256, 1024, replace(recipe, compute=compute), device=kit.device)
        found, _ = sae.loss_and_gradients(x.to(kit.device), 0.03, dead.to(kit.device))
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            error = _error(found[name], expected[name])
            kit.check("values", f"gradient of {name}, {compute} products", error, GRADIENT_TOLERANCE[compute])


# -- capture ----------------------------------------------------------------------------------------------------------


def _tokens(kit: Kit, seq_len: int) -> str:
    """A token table of the built-in text."""
    out = str(kit.folder / f"tokens-{seq_len}")
    text = f"{builtin.NAME}-heldout" if kit.record.quick else builtin.NAME
    config = TokenizeConfig(sources=(text,), tokenizer=builtin.NAME, out=out, seq_len=seq_len)
    with Progress() as progress:
        tokenize(config, progress)
    return out


def _planned(
    kit: Kit,
    model: str,
    tokens: str,
    sites: tuple[str, ...],
    folder: str,
    device: str,
    dtype: Any,
    rows: int,
    bucket_rows: int,
) -> tuple[Replica, list[Work]]:
    """A replica and its work, as `actstore capture` plans them, without Ray."""
    config, table = load_config(model), open_tokens(tokens)
    attention = attention_of(config, device)
    widths = check_sites(config, expand_sites(sites, config), model)
    starts = row_starts(table)
    spec = StoreSpec(
        sites={name: SiteSpec(d=d) for name, d in widths.items()},
        provenance={"model": model_identity(model, config, dtype, attention)},
        rows=min(rows, int(starts[-1])),
        bucket_rows=bucket_rows,
        shard_rows=min(1 << 14, bucket_rows),
        chunk_rows=min(1 << 11, bucket_rows),
    )
    out = str(kit.folder / folder)
    writer = create_store(out, spec)
    copy_tokens(table, writer.storage, segment_prefix(0))
    segment = open_segments(writer.storage, spec)[0]
    threads = max(1, machine()["cores"])
    replica = Replica(
        ReplicaConfig(
            model=model,
            revision=None,
            dtype=dtype,
            attention=attention,
            device=device,
            store=out,
            batch_size=kit.size.batch_size,
            threads=threads,
        )
    )
    return replica, work_of(spec, 0, segment, starts, range(spec.buckets))


def _captured(kit: Kit, *how: Any) -> str:
    """The URL of a store that a replica has written."""
    replica, works = _planned(kit, *how)
    drive(replica, works)
    actstore.store.open_writer(replica.config.store).finalise()
    return replica.config.store


def drive(replica: Replica, works: list[Work]) -> float:
    """Seconds for some buckets, as many at a time as the pool hands out; the last one's writing included."""
    replica.start()
    began = time.perf_counter()
    with ThreadPoolExecutor(CALLS_IN_FLIGHT) as pool:
        list(pool.map(replica.capture, works))
    return time.perf_counter() - began


def capture(kit: Kit) -> None:
    """Tokens per second of the bare pass, of the pass with hooks, and of a replica that stores what it sees."""
    size = kit.size
    path = _random_model(kit)
    tokens = _tokens(kit, size.seq_len)
    rows = size.num_buckets * size.bucket_rows
    replica, works = _planned(kit, path, tokens, size.sites, "captured", kit.device, "bfloat16", rows, size.bucket_rows)
    began = time.perf_counter()
    replica.start()
    kit.figure("capture", f"load {size.num_layers} of {size.num_layers + 1} layers", time.perf_counter() - began, "s")
    if kit.device == "cuda":
        kit.figure("capture", "device memory after loading", torch.cuda.max_memory_allocated() / 1e9, "GB")
    loaded = replica._loaded  # noqa: SLF001  the kit looks inside: it times the passes of this very model
    assert loaded is not None
    model, config = loaded.model, load_config(path)
    batch = open_tokens(tokens).ids(0, size.batch_size)
    ids = torch.from_numpy(batch.astype(np.int64))
    ids = ids.pin_memory() if kit.device == "cuda" else ids

    @torch.inference_mode()
    def bare() -> None:
        decoder_of(model)(input_ids=ids.to(kit.device, non_blocking=True), use_cache=False)

    bare()  # compiles attention where it is compiled
    tokens_per_pass = ids.numel()
    flop = _flop_per_token(with_layers(config, size.num_layers), size.seq_len)
    peak, timed = _peak(kit), works[1:]
    drive(replica, works[:1])  # compiles the encoder, and fills the pools of pinned memory
    rates = {
        "bare forward pass": tokens_per_pass / kit.seconds(bare),
        "with hooks": tokens_per_pass / kit.seconds(lambda: activations(model, ids, loaded.sites)),
        "with storing": sum(work.span.rows for work in timed) / drive(replica, timed),
    }
    alone = rates["bare forward pass"]
    for name, rate in rates.items():
        kit.figure("capture", name, rate, "tokens/s", rate / alone, "the bare pass")
        kit.figure("capture", f"{name}, arithmetic", rate * flop / 1e12, "TFLOP/s", rate * flop / peak, PEAK)


def _random_model(kit: Kit) -> str:
    """A directory with a random bfloat16 model of the kit's shape, one layer deeper than its sites."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = with_layers(AutoConfig.for_model("gemma2", **kit.size.model), kit.size.num_layers + 1)
    config.dtype = torch.bfloat16
    with torch.device(kit.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = kit.folder / "model"
    model.save_pretrained(folder)
    return str(folder)


def _flop_per_token(config: Any, seq_len: int) -> float:
    """2 a weight of the layers, and 4 a head's width for each of the seq_len / 2 tokens that causal attention sees."""
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        layers: Any = decoder_of(AutoModelForCausalLM.from_config(config)).layers
    weights = sum(p.numel() for p in layers.parameters())
    attention = 2 * seq_len * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 2 * weights + attention


PEAK = "a square bfloat16 product"


def _peak(kit: Kit) -> float:
    """FLOP/s of one large product with float32 accumulation, as this device does it."""
    n = kit.size.product
    a, b = (torch.randn(n, n, device=kit.device).bfloat16() for _ in range(2))
    peak = 2 * n**3 / kit.seconds(lambda: a @ b)
    name = torch.cuda.get_device_name() if kit.device == "cuda" else ""
    published = next((v for k, v in DENSE_BF16_TFLOPS.items() if k in name), 0)
    share = peak / published / 1e12 if published else None
    kit.figure("capture", f"{PEAK}, {n} wide", peak / 1e12, "TFLOP/s", share, "the data sheet" if share else "")
    return peak


# -- loader -----------------------------------------------------------------------------------------------------------


def loader(kit: Kit) -> None:
    """Decoded GB/s on the host and on the device, the processor cores that takes, and how long a consumer waits."""
    size, copy = kit.size, _bare_copy(kit)
    for encoding in ("bf16", "fixed:1e-3"):
        url = kit.folder / f"loader-{encoding}".replace(":", "-")
        began = time.perf_counter()
        stores.make(url, "resid_post.12", encoding, "planes", d=size.d, rows=size.store_rows, bucket_rows=1 << 13)
        print(f"loader: wrote {url.name} in {time.perf_counter() - began:.1f} s", file=sys.stderr)
        for device in dict.fromkeys((None, kit.device)):
            name = f"{encoding}, on {device or 'the host'}"
            with actstore.ActivationDataset(
                url, sites="resid_post.12", batch_size=size.batch_rows, device=device
            ) as data:
                rate, cores = _rate(kit, data)
                kit.figure("loader", f"{name}, whole epochs", rate / 1e9, "GB/s", rate / copy, "a bare pinned copy")
                kit.figure("loader", f"{name}, processor", cores, "cores")
                if device is not None:
                    stall = _stall(kit, data)
                    kit.figure("loader", f"{name}, consumer of 9 GiB/s waits", 100 * stall, "% of its time")


def _bare_copy(kit: Kit) -> float:
    """Bytes per second from pinned memory to the device, in pieces of a chunk."""
    nbytes = 2048 * kit.size.d * 2
    host = torch.ones(nbytes, dtype=torch.uint8, pin_memory=kit.device == "cuda")
    target = torch.empty(nbytes, dtype=torch.uint8, device=kit.device)

    def copies() -> None:
        for _ in range(64):
            target.copy_(host, non_blocking=True)

    rate = 64 * nbytes / kit.seconds(copies)
    kit.figure("loader", "bare pinned copy", rate / 1e9, "GB/s")
    return rate


def _epochs(data: Any) -> Iterator[torch.Tensor]:
    while True:
        yield from data


def _rate(kit: Kit, data: Any) -> tuple[float, float]:
    """Bytes per second over whole epochs, filling of the pool included, and processor cores in use; one warms up."""
    for _ in data:
        pass
    kit.wait()
    moved, began, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < kit.size.seconds:
        for batch in data:
            moved += batch.nbytes
        kit.wait()
    elapsed = time.perf_counter() - began
    return moved / elapsed, (time.process_time() - used) / elapsed


def _stall(kit: Kit, data: Any) -> float:
    """Share of its time that a consumer waits which takes a batch whenever an SAE at full speed would."""
    batches = _epochs(data)
    first = next(batches)
    every = first.nbytes / SAE_BYTES_PER_S
    began = due = time.perf_counter()
    waited = 0.0
    while due - began < kit.size.seconds:
        while (now := time.perf_counter()) < due:
            time.sleep(max(0.0, due - now - 1e-4) / 2)
        next(batches)
        kit.wait()
        late = time.perf_counter() - due
        waited += late
        due = due + late + every
    return waited / (time.perf_counter() - began)


# -- trainer ----------------------------------------------------------------------------------------------------------


def trainer(kit: Kit) -> None:
    """One JumpReLU step: against the dense bfloat16 limit, by kind of kernel, and against SAELens' step."""
    for width in kit.size.widths:
        speed.D, speed.W, speed.B, speed.DEVICE = kit.size.d, width, kit.size.batch_rows, kit.device
        flop = 10 * speed.D * speed.W * speed.B
        name = f"width {width}"
        bare = kit.seconds(speed.products(torch.bfloat16))
        kit.figure("trainer", f"{name}: its five products alone, bfloat16", 1e3 * bare, "ms")
        for compute in ("bfloat16", "float32"):
            step = speed.ours("jumprelu", compute)
            seconds = kit.seconds(step)
            kit.figure("trainer", f"{name}: step, {compute} products", 1e3 * seconds, "ms", bare / seconds, "products")
            kit.figure("trainer", f"{name}: step, {compute} products", speed.B / seconds, "tokens/s")
            kit.figure("trainer", f"{name}: step, {compute} products", flop / seconds / 1e12, "TFLOP/s")
            for kind, spent in _by_kind(kit, step).items():
                what = f"{name}: {compute}, {kind}"
                kit.figure("trainer", what, 1e3 * spent, "ms", spent / seconds, "the step")
        if kit.device == "cuda":
            kit.figure("trainer", f"{name}: peak device memory", torch.cuda.max_memory_allocated() / 1e9, "GB")
            torch.cuda.reset_peak_memory_stats()
        try:
            other = kit.seconds(speed.saelens("bfloat16"))
        except ImportError as e:
            kit.record.not_measured[f"SAELens' step, {name}"] = str(e)
        else:
            kit.figure("trainer", f"{name}: SAELens' step, autocast", 1e3 * other, "ms")


KINDS = {
    "products": ("gemm", "nvjet", "cutlass", "xmma", "aten::mm", "aten::addmm"),
    "copies between host and device": ("Memcpy HtoD", "Memcpy DtoH"),
    "reductions": ("reduce", "aten::sum", "norm"),
}
"""Kernels by a part of their name; the rest is pointwise."""


def _by_kind(kit: Kit, step: Callable[[], object]) -> dict[str, float]:
    """Seconds of a step that the device spends in each kind of kernel."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CUDA] if kit.device == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiled:
        for _ in range(kit.size.rounds):
            step()
        kit.wait()
    spent = dict.fromkeys([*KINDS, "pointwise and the rest"], 0.0)
    for event in profiled.key_averages():
        name = event.key
        kind = next((k for k, parts in KINDS.items() if any(p in name for p in parts)), "pointwise and the rest")
        micros = event.self_device_time_total if kit.device == "cuda" else event.self_cpu_time_total
        spent[kind] += 1e-6 * micros / kit.size.rounds
    return {kind: seconds for kind, seconds in spent.items() if seconds}


# -- the command ------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Kit], None]] = {
    "values": values,
    "capture": capture,
    "loader": loader,
    "trainer": trainer,
}


def hardware(device: str) -> dict[str, Any]:
    """The machine, and its GPU."""
    found = machine()
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found |= {"gpu": gpu.name, "gpu memory GiB": round(gpu.total_memory / GIB), "cuda": torch.version.cuda}
    return found


def main() -> int:
    """Run the parts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes, under a minute on two cores")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--json", type=Path, help="default: gpu.json beside this script, on a GPU without --quick")
    parser.add_argument("--folder", type=Path, help="for stores and models, up to 20 GB; default: a temporary one")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no GPU here; --device cpu --quick runs the same code", file=sys.stderr)
        return 1
    recorded = arguments.device == "cuda" and not arguments.quick
    file = arguments.json or (HERE / "gpu.json" if recorded else None)
    record = Record(device=arguments.device, quick=arguments.quick, machine=hardware(arguments.device))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        kit = Kit(
            device=arguments.device,
            size=QUICK if arguments.quick else FULL,
            folder=Path(folder),
            record=record,
        )
        for name in arguments.only:
            began = time.perf_counter()
            try:
                PARTS[name](kit)
            except Exception as e:  # noqa: BLE001  the other parts still tell something
                traceback.print_exc()
                record.failed[name] = f"{type(e).__name__}: {e}"
            record.seconds[name] = time.perf_counter() - began
            write_json(file, asdict(record))
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
    show(record)
    return 0 if record.ok else 1


def show(record: Record) -> None:
    """Print every figure on a line, and what is missing."""
    print_table("machine", record.machine)
    for line in record.lines:
        share = "" if line.share is None else f"{line.share:.2f} of {line.of}"
        check = {None: share, True: f"ok ({line.of})", False: f"FAILED ({line.of})"}[line.passed]
        print(f"{line.part:8} {line.what:66} {line.value:>11.4g} {line.unit:15} {check}".rstrip())
    for name, error in record.failed.items():
        print(f"{name} ended in an error: {error}")
    for name, why in record.not_measured.items():
        print(f"not measured: {name}: {why}")
    print(json.dumps({"ok": record.ok, "seconds": {k: round(v, 1) for k, v in record.seconds.items()}}))


if __name__ == "__main__":
    sys.exit(main())
