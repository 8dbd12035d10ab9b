"""What a plan means in figures, before a run: memory, requests, cost, mixing, and the rate to expect."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from actstore.stream.columns import Column
from actstore.stream.part import Part
from actstore.stream.plan import Fit
from actstore.stream.stages import Stages, gb_per_s, in_turn

REMEDIES = {
    "fetch": "raise max_inflight, use larger chunks, or move the store nearer",
    "decode": "raise threads, or use more cores",
    "gather": "raise threads, or deliver on the GPU with device='cuda'",
    "consumer": "nothing to mend here",
}
"""What to do about each bound."""
PROBE_CHUNKS, PROBE_ROWS = 4, 4096


def explain(
    part: Part,
    fit: Fit,
    *,
    laps: float,
    world: int,
    threads: tuple[int, int],
    probe: bool,
    prices: tuple[float, float],
) -> dict[str, Any]:
    """See `ActivationDataset.explain`; one store's figures for `laps` of its epochs, of one rank unless they say so."""
    spec, plan, columns = part.store.spec, part.plan, part.columns
    mixed = plan.mix * plan.streams
    present = {n: c.index.chunks[c.index.chunks > 0] for n, c in columns.items()}
    chunks = max(len(v) for v in present.values())
    twice = 0 if fit.keep else min((plan.mix - 1) * plan.streams, chunks)
    again = laps * (1 + twice / max(chunks, 1)) / world
    stored = sum(int(v.sum(dtype=np.int64)) for v in present.values()) * again
    requests = sum(len(v) for v in present.values()) * again
    found: dict[str, Any] = {
        "rows_per_batch": plan.batch_size,
        "chunks_mixed": mixed,
        "pool_bytes": fit.buffers * sum(c.chunk_bytes for c in columns.values() if not c.in_place),
        "read_twice": twice,
        "threads": threads[0],
        "max_inflight": threads[1] or threads[0],
        "requests": round(requests),
        "stored_bytes": round(stored),
        "dollars": round(requests / 1000 * prices[0] + stored / 1e9 * prices[1], 4),
    }
    tokens = part.store.provenance.get("tokens")
    length = tokens.get("seq_len", 0) if isinstance(tokens, dict) else 0
    if isinstance(length, int) and length > 1:
        found["pairs"] = (plan.batch_size - 1) * (length - 2) / (min(spec.bucket_rows, spec.rows) * mixed)
        found["design_effect_at_most"] = 1 + found["pairs"]
    if probe:
        found |= _expected(columns, threads, batch=plan.batch_size // world)
    return found


def together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all stores of a dataset: of one, its own."""
    if len(parts) == 1:
        return parts[0]
    added = ("rows_per_batch", "chunks_mixed", "pool_bytes", "read_twice", "requests", "stored_bytes", "dollars")
    whole: dict[str, Any] = {name: sum(part[name] for part in parts) for name in added}
    whole |= {name: parts[0][name] for name in ("threads", "max_inflight")}
    if all("expected_gb_s" in part for part in parts):
        # one pool of threads reads the stores in turn
        rows = sum(part["rows_per_batch"] for part in parts)
        seconds = sum(part["rows_per_batch"] / part["expected_rows_s"] for part in parts)
        whole["expected_rows_s"] = round(rows / seconds)
        slowest = max(parts, key=lambda part: part["rows_per_batch"] / part["expected_rows_s"])
        whole["expected_bound"] = slowest["expected_bound"]
    return whole | {"stores": parts}


def _expected(columns: Mapping[str, Column], threads: tuple[int, int], *, batch: int) -> dict[str, Any]:
    """GB/s of each stage on a few chunks, and of the whole."""
    workers, fetchers = threads
    rows = min(batch, PROBE_ROWS)
    stages = Stages(columns, num_chunks=PROBE_CHUNKS, batch_rows=rows, threads=1, fetchers=max(threads))
    # a first gather, like the fetch and decode of the constructor, meets cold caches and compilers
    stages.gather()
    rates = {
        "fetch": gb_per_s(stages.fetch),
        "decode": gb_per_s(stages.decode) * workers,
        "gather": gb_per_s(stages.gather) * workers,
    }
    alone = () if fetchers else (rates["fetch"],)
    whole = min(in_turn(rates["decode"], rates["gather"], *alone), rates["fetch"])
    return {
        "expected_gb_s": float(f"{whole:.3g}"),
        "expected_rows_s": max(round(whole * 1e9 / sum(c.index.array.row_bytes for c in columns.values())), 1),
        "expected_bound": min(rates, key=lambda k: rates[k]),
        **{f"{k}_gb_s": float(f"{v:.3g}") for k, v in rates.items()},
    }
