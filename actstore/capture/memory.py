"""What a replica needs in memory, known before it starts: two buckets, the model, and what does not grow.

    2 * bucket_rows * (sum(d) * itemsize + 44)    one bucket is filled while the other is written; 44 bytes of a row are
                                                  its provenance, in the token table's order and in the stored one
    (threads + puts) * largest shard              shards that are being encoded or put
    parameters                                    up to the deepest layer
    batch_size * seq_len * ...                    one forward pass, and the activations that wait to be put in place
    PROCESS                                       Python, torch and Ray

On a GPU the model and the pass are in its own memory, and not counted.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from actstore.errors import CaptureError
from actstore.store import StoreSpec
from actstore.store.encoder import buffer_bytes
from actstore.store.spec import arrays
from actstore.store.writer import LOCAL_PUTS, REMOTE_PUTS

BATCHES_IN_FLIGHT = 2
"""Batches whose activations wait to be put in place."""
PROVENANCE_BYTES = 44
PROCESS = 700_000_000
"""Bytes of a worker that has loaded nothing yet."""
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes of one replica at its peak."""

    row: int
    """Of one row in one bucket."""
    bucket_rows: int
    fixed: int
    """What does not depend on bucket_rows."""

    @property
    def total(self) -> int:
        """All of it."""
        return 2 * self.bucket_rows * self.row + self.fixed


def needs(
    spec: StoreSpec, model_config: Any, *, dtype_bytes: int, seq_len: int, batch_size: int, threads: int, **where: bool
) -> Needs:
    """What a replica of this store needs; `where` says whether the store is `local` and the model `on_gpu`.

    `model_config` is that of the model as it is loaded, `dtype_bytes` the size of one parameter.
    """
    text = model_config.get_text_config()
    width = sum(s.d * _itemsize(s.kind, dtype_bytes) for s in spec.sites.values())
    puts = LOCAL_PUTS if where["local"] else REMOTE_PUTS
    buffers = (threads + puts) * max(buffer_bytes(a) for a in arrays(spec).values())
    tokens = batch_size * seq_len
    waiting = BATCHES_IN_FLIGHT * tokens * width
    model = parameter_bytes(model_config, dtype_bytes) + _pass_bytes(text, tokens, dtype_bytes)
    return Needs(
        row=width + PROVENANCE_BYTES,
        bucket_rows=min(spec.bucket_rows, spec.rows),
        fixed=buffers + waiting + PROCESS + (0 if where["on_gpu"] else model),
    )


def _itemsize(kind: str, dtype_bytes: int) -> int:
    return 2 if kind == "bf16" else 4 if kind == "f32" else dtype_bytes


def _pass_bytes(text: Any, tokens: int, dtype_bytes: int) -> int:
    """One layer of a forward pass at its widest: the MLP's two inner tensors and some copies of the residual stream."""
    return tokens * (2 * text.intermediate_size + 6 * text.hidden_size) * dtype_bytes


def parameter_bytes(model_config: Any, dtype_bytes: int) -> int:
    """Of the whole model, counted without loading it."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(model_config)
    return sum(p.numel() for p in model.parameters()) * dtype_bytes


def check_memory(needed: Needs, workers: int, shard_rows: int, *, resident: int = 0) -> None:
    """Refuse what this machine can't hold; `CaptureError` says which bucket_rows it can.

    `resident` bytes of it are this process's own already.
    """
    free = free_memory() + resident
    if needed.total * workers <= free:
        return
    fits = int((free / workers - needed.fixed) / (2 * needed.row)) // shard_rows * shard_rows
    advice = f"lower --bucket-rows to {fits} or less" if fits > 0 else "use fewer --workers, a smaller --batch-size"
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
