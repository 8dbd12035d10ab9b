"""What a replica needs in memory, known before it starts: two buckets, the model, and what does not grow.

    bucket_rows * (2 * sum(d) * itemsize    one bucket is filled while the other is written
                   + 56)                    provenance: 12 of a row that is written; of one being filled its id (4), its
                                            document (4), its
                                            place (8), and sequence, position and token in both orders (28)
    (threads + puts) * largest shard        shards that are being encoded or put
    parameters                              up to the deepest layer, and what malloc keeps of a head that is loaded and
                                            freed: tensors below 32 MiB
    3 * batch_size * seq_len * sum(d) * ..  activations: of the pass that runs, and of batches that wait for their place
    one layer's widest moment               the MLP's inner tensors, the experts', linear attention's heads, or eager
                                            attention's seq_len^2 logits (Gemma 2, gpt-oss)
    PROCESS                                 Python, torch, transformers, their compiled kernels and scratch, and Ray

It is what a replica takes where storage is slower than the model, so that both buckets are full; where it is faster,
the second one is being filled. A GGUF file's weights exist twice while they are loaded, and that peak counts if it is
the higher one; a safetensors file is mapped, and its pages are the kernel's to take back. On a GPU the model and the
pass are in its own memory, and not counted. `benchmarks/capture.py` compares all this with what processes take.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from actstore.capture.config import Precision
from actstore.capture.sites import skeleton
from actstore.errors import CaptureError
from actstore.store import StoreSpec
from actstore.store.format.encoder import buffer_bytes
from actstore.store.format.spec import arrays, held_as
from actstore.store.write.bucket import LOCAL_PUTS, REMOTE_PUTS

BATCHES_IN_FLIGHT = 2
"""Batches whose activations wait to be put in place."""
PROVENANCE_BYTES = 56
PROCESS = 720_000_000
"""Bytes of a worker beside everything else; measured 620 to 760 million."""
KEPT_BY_MALLOC = 32 << 20
"""glibc gives freed memory back at once only in pieces above this (its DEFAULT_MMAP_THRESHOLD_MAX)."""
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes of one replica at its peak."""

    row: int
    """Of one row in both buckets."""
    bucket_rows: int
    fixed: int
    """What does not depend on bucket_rows."""
    loading: int = 0
    """While the model is loaded, before there is a bucket."""

    @property
    def total(self) -> int:
        """All of it."""
        return max(self.bucket_rows * self.row + self.fixed, self.loading)


def needs(
    spec: StoreSpec,
    model_config: Any,
    *,
    dtype: Precision,
    seq_len: int,
    batch_size: int,
    threads: int,
    local: bool,
    on_gpu: bool,
    gguf: bool = False,
) -> Needs:
    """What a replica of this store needs.

    `local` is whether the store is in a directory, `gguf` whether the model is in such a file. `model_config` is that
    of the model as it is loaded, `dtype` what it computes in.
    """
    dtype_bytes = 4 if dtype == "float32" else 2
    width = sum(s.d * held_as(s.kind, bfloat16=dtype == "bfloat16").itemsize for s in spec.sites.values())
    puts = LOCAL_PUTS if local else REMOTE_PUTS
    buffers = (threads + puts) * max(buffer_bytes(a) for a in arrays(spec).values())
    on_cpu = not on_gpu
    held = (BATCHES_IN_FLIGHT + on_cpu) * batch_size * seq_len * width
    fixed, loading = PROCESS + buffers + held, 0
    if on_cpu or gguf:
        kept = kept_bytes(model_config, dtype_bytes, spec)
        loading = PROCESS + 2 * parameter_bytes(model_config, dtype_bytes) if gguf else 0
        fixed += (kept + _pass_bytes(model_config, batch_size, seq_len, dtype_bytes)) * on_cpu
    row = 2 * width + PROVENANCE_BYTES
    return Needs(row=row, bucket_rows=min(spec.bucket_rows, spec.rows), fixed=fixed, loading=loading)


def _pass_bytes(model_config: Any, batch_size: int, seq_len: int, dtype_bytes: int) -> int:
    """One layer of a forward pass at its widest; `tests/capture/test_models.py` compares it with a profiler's count.

    An MLP holds three inner tensors and some copies of the residual stream. Experts hold one row for each expert that a
    token is routed to. Linear attention holds about 17 float32 copies of its heads. Eager attention holds logits as
    computed, in float32 (the same ones if that is the model's precision) and their softmax in float32; with sinks it
    holds three copies and more in the model's precision.
    """
    from actstore.capture.precision import SINKS, attention_of
    from actstore.capture.sites import site_widths

    text, tokens = model_config.get_text_config(), batch_size * seq_len
    sinks, hidden = text.model_type in SINKS, text.hidden_size
    inner = 3 * max((w for site, w in site_widths(model_config).items() if site.kind == "mlp_hidden"), default=0)
    if chosen := getattr(text, "top_k_experts", None) or getattr(text, "num_experts_per_tok", None):
        expert = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
        inner = max(inner, chosen * (max((10 if sinks else 4) * expert, 4 * hidden) + hidden))
    linear = getattr(text, "linear_num_value_heads", 0) * getattr(text, "linear_value_head_dim", 0)
    logits = 0
    if attention_of(model_config) == "eager":
        logits = text.num_attention_heads * seq_len * (3.3 * dtype_bytes if sinks else 8 + dtype_bytes % 4)
    return int(tokens * (6 * hidden * dtype_bytes + max(inner * dtype_bytes, 17 * 4 * linear, logits)))


def parameter_bytes(model_config: Any, dtype_bytes: int) -> int:
    """Of the whole model."""
    return sum(p.numel() * dtype_bytes for p in skeleton(model_config).parameters())


def kept_bytes(model_config: Any, dtype_bytes: int, spec: StoreSpec) -> int:
    """What stays of the parameters that a worker loads, once those that no site needs are freed."""
    from actstore.capture.model import with_layers, without_head
    from actstore.capture.sites import num_layers, parse_sites

    model = skeleton(with_layers(model_config, num_layers(parse_sites(spec.sites))))
    sizes = {name: p.numel() * dtype_bytes for name, p in model.named_parameters()}
    without_head(model)
    left = {name for name, _ in model.named_parameters()}
    return sum(n for name, n in sizes.items() if name in left or n <= KEPT_BY_MALLOC)


def check_memory(needed: Needs, workers: int, shard_rows: int, *, resident: int = 0) -> None:
    """Refuse what this machine can't hold; `CaptureError` says which bucket_rows it can.

    `resident` bytes of it are this process's own already.
    """
    free = free_memory() + resident
    if needed.total * workers <= free:
        return
    fits = (free // workers - needed.fixed) // needed.row // shard_rows * shard_rows
    lower = fits > 0 and needed.loading * workers <= free
    advice = f"lower --bucket-rows to {fits} or less" if lower else "use fewer --workers, a smaller --batch-size"
    raise CaptureError(
        f"capture needs {needed.total / 1e9:.3g} GB per worker for {workers} worker{'s' * (workers > 1)}, "
        f"{free / 1e9:.3g} GB are free: {advice}, or use a larger machine"
    )


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of the container it is in."""
    free = psutil.virtual_memory().available
    for limit_file, used_file in _CGROUPS:
        limit = Path(limit_file)
        if limit.exists() and (text := limit.read_text().strip()) != "max":
            used = int(Path(used_file).read_text()) - _page_cache(limit.parent)
            free = min(free, max(int(text) - used, 0))
    return free


def _page_cache(cgroup: Path) -> int:
    """What the kernel would give back of a container's memory."""
    stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    return int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))
