"""What a replica needs in memory, known before it starts: two buckets, the model, and what does not grow.

    bucket_rows * (2 * sum(d) * itemsize    one bucket is filled while the other is written
                   + 52)                    provenance: 12 of a row that is written; of one being filled its id (4), its
                                            place (8), and sequence, position and token in both orders (28)
    (threads + puts) * largest shard        shards that are being encoded or put
    parameters                              up to the deepest layer, and what malloc keeps of a head that is loaded and
                                            freed: tensors below 32 MiB
    3 * batch_size * seq_len * sum(d) * ..  activations: of the pass that runs, and of batches that wait for their place
    one layer's widest moment               the MLP's inner tensors, or eager attention's seq_len^2 logits (Gemma 2)
    PROCESS                                 Python, torch, transformers, their compiled kernels and scratch, and Ray

It is what a replica takes where storage is slower than the model, so that both buckets are full; where it is faster,
the second one is being filled. A GGUF file's weights exist twice while they are loaded, and that peak counts if it is
the higher one; a safetensors file is mapped, and its pages are the kernel's to take back. On a GPU the model and the
pass are in its own memory, and not counted. `benchmarks/capture.py` compares all this with what processes take.
"""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from actstore.errors import CaptureError
from actstore.store import StoreSpec
from actstore.store.format.encoder import buffer_bytes
from actstore.store.format.spec import arrays
from actstore.store.write.bucket import LOCAL_PUTS, REMOTE_PUTS

BATCHES_IN_FLIGHT = 2
"""Batches whose activations wait to be put in place."""
PROVENANCE_BYTES = 52
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
    spec: StoreSpec, model_config: Any, *, dtype_bytes: int, seq_len: int, batch_size: int, threads: int, **where: bool
) -> Needs:
    """What a replica of this store needs.

    `where` says whether the store is `local`, the model `on_gpu`, and its file a `gguf`. `model_config` is that of the
    model as it is loaded, `dtype_bytes` the size of one parameter.
    """
    width = sum(s.d * _itemsize(s.kind, dtype_bytes) for s in spec.sites.values())
    puts = LOCAL_PUTS if where["local"] else REMOTE_PUTS
    buffers = (threads + puts) * max(buffer_bytes(a) for a in arrays(spec).values())
    on_cpu = not where["on_gpu"]
    held = (BATCHES_IN_FLIGHT + on_cpu) * batch_size * seq_len * width
    fixed, loading = PROCESS + buffers + held, 0
    if on_cpu or where.get("gguf"):
        kept = kept_bytes(model_config, dtype_bytes, spec)
        loading = PROCESS + 2 * parameter_bytes(model_config, dtype_bytes) if where.get("gguf") else 0
        fixed += (kept + _pass_bytes(model_config, batch_size, seq_len, dtype_bytes)) * on_cpu
    row = 2 * width + PROVENANCE_BYTES
    return Needs(row=row, bucket_rows=min(spec.bucket_rows, spec.rows), fixed=fixed, loading=loading)


def _itemsize(kind: str, dtype_bytes: int) -> int:
    return 2 if kind == "bf16" else 4 if kind == "f32" else dtype_bytes


def _pass_bytes(model_config: Any, batch_size: int, seq_len: int, dtype_bytes: int) -> int:
    """One layer of a forward pass at its widest.

    MLP: its two inner tensors and some copies of the residual stream. Eager attention: logits as computed, in float32
    (the same ones if that is the model's precision) and their softmax in float32.
    """
    from actstore.capture.precision import attention_of

    text = model_config.get_text_config()
    mlp = batch_size * seq_len * (2 * text.intermediate_size + 6 * text.hidden_size) * dtype_bytes
    if attention_of(model_config) != "eager":
        return mlp
    logits = batch_size * text.num_attention_heads * seq_len**2
    return max(mlp, logits * (8 + dtype_bytes % 4))


def parameter_bytes(model_config: Any, dtype_bytes: int) -> int:
    """Of the whole model."""
    return sum(p.numel() * dtype_bytes for p in _without_weights(model_config).parameters())


def kept_bytes(model_config: Any, dtype_bytes: int, spec: StoreSpec) -> int:
    """What stays of the parameters that a worker loads, once those that no site needs are freed."""
    from actstore.capture.model import with_layers, without_head
    from actstore.capture.sites import num_layers, parse_sites

    model = _without_weights(with_layers(model_config, num_layers(parse_sites(spec.sites))))
    sizes = {name: p.numel() * dtype_bytes for name, p in model.named_parameters()}
    without_head(model)
    left = {name for name, _ in model.named_parameters()}
    return sum(n for name, n in sizes.items() if name in left or n <= KEPT_BY_MALLOC)


def _without_weights(model_config: Any) -> Any:
    """The model's modules on device `meta`."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(deepcopy(model_config))  # which fills in defaults


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
