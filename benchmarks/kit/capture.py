"""Tokens per second of a forward pass alone, with hooks, and of a replica that stores what it sees."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from actstore import builtin
from actstore.bench import machine
from actstore.capture.config import Precision
from actstore.capture.forward import activations, decoder_of
from actstore.capture.model import load_config, model_identity, with_layers
from actstore.capture.precision import attention_of
from actstore.capture.segments import Work, open_segments, segment_prefix, work_of
from actstore.capture.sites import check_sites, expand_sites
from actstore.capture.worker import CALLS_IN_FLIGHT, Replica, ReplicaConfig
from actstore.progress import Progress
from actstore.store import SiteSpec, Store, StoreSpec, create_store, open_store, open_writer
from actstore.tokens import TokenizeConfig, copy_tokens, open_tokens, row_starts, tokenize
from kit.record import Kit

DENSE_BF16_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "V100": 0}
"""Dense bfloat16 peaks in NVIDIA's data sheets (SXM variants)."""


def token_table(kit: Kit, seq_len: int) -> str:
    """A token table of the built-in text."""
    out = str(kit.folder / f"tokens-{seq_len}")
    text = f"{builtin.NAME}-heldout" if kit.record.quick else builtin.NAME
    config = TokenizeConfig(sources=(text,), tokenizer=builtin.NAME, out=out, seq_len=seq_len)
    with Progress() as progress:
        tokenize(config, progress)
    return out


@dataclass(frozen=True, kw_only=True)
class Capture:
    """A store to capture."""

    model: str
    tokens: str
    sites: tuple[str, ...]
    device: str
    dtype: Precision
    rows: int
    bucket_rows: int


def _planned(kit: Kit, what: Capture, out: str) -> tuple[Replica, list[Work]]:
    """A replica and its work, as `actstore capture` plans them, without Ray."""
    config, table = load_config(what.model), open_tokens(what.tokens)
    attention = attention_of(config, what.device)
    widths = check_sites(config, expand_sites(what.sites, config), what.model)
    starts = row_starts(table)
    spec = StoreSpec(
        sites={name: SiteSpec(d=d) for name, d in widths.items()},
        provenance={"model": model_identity(what.model, config, what.dtype, attention)},
        rows=min(what.rows, int(starts[-1])),
        bucket_rows=what.bucket_rows,
        shard_rows=min(1 << 14, what.bucket_rows),
        chunk_rows=min(1 << 11, what.bucket_rows),
    )
    writer = create_store(out, spec)
    copy_tokens(table, writer.storage, segment_prefix(0))
    segment = open_segments(writer.storage, spec)[0]
    replica = ReplicaConfig(
        model=what.model,
        revision=None,
        dtype=what.dtype,
        attention=attention,
        device=what.device,
        store=out,
        batch_size=kit.size.batch_size,
        threads=machine()["cores"],
    )
    return Replica(replica), work_of(spec, 0, segment, starts, range(spec.buckets))


def captured(kit: Kit, what: Capture, folder: str) -> Store:
    """A store that a replica has written."""
    out = str(kit.folder / folder)
    drive(*_planned(kit, what, out))
    open_writer(out).finalise()
    return open_store(out)


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
    tokens = token_table(kit, size.seq_len)
    what = Capture(
        model=path,
        tokens=tokens,
        sites=size.sites,
        device=kit.device,
        dtype="bfloat16",
        rows=size.num_buckets * size.bucket_rows,
        bucket_rows=size.bucket_rows,
    )
    replica, works = _planned(kit, what, str(kit.folder / "captured"))
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
