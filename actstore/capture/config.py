"""The settings of `actstore capture`; importing this module loads no deep-learning library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Precision = Literal["bfloat16", "float16", "float32"]
DType = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """What carries a run out; no stored value depends on it."""

    workers: int = 1
    """Model replicas. A single one on this machine runs in this process; several are Ray actors. A replica that the
    cluster has no room for yet starts when it grows."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto: on a cluster on GPUs, else on this machine's GPU if it has one."""
    devices_per_worker: float = 1.0
    """GPUs of a replica. Its layers are spread over them; 0.5 lets two replicas share a GPU."""
    threads: int | None = None
    """CPU threads per worker; default: its share of the cores of the machine that it runs on."""
    address: str | None = None
    """Address of a running Ray cluster, such as auto; default: RAY_ADDRESS, else this machine only."""
    allow: tuple[Literal["versions"], ...] = ()
    """Differences from the run that began the store that are accepted, and recorded in each bucket: versions of torch
    and transformers."""
    shared_directory: bool = False
    """A directory as --out is on a file system that every node of the cluster has mounted at the same path."""
    runtime_env: Path | None = None
    """JSON file with a Ray runtime environment for the workers, such as {"env_vars": {...}}."""

    def __post_init__(self) -> None:
        """Check the numbers; `ValueError` names the field."""
        for name in ("workers", "threads", "batch_size", "rows"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        devices = self.devices_per_worker
        if not (0 < devices < 1 or (devices >= 1 and devices == int(devices))):
            raise ValueError(f"devices_per_worker is {devices:g}, expected a whole number, or a part of one GPU as 0.5")
        if devices > 1 and self.device == "cpu":
            raise ValueError(f"devices_per_worker is {devices:g}, which needs GPUs, but device is cpu")


@dataclass(frozen=True, kw_only=True)
class RepairConfig(WorkersConfig):
    """Capture again what `actstore verify --deep` condemns."""

    model: str | None = None
    """The model, as for capture; default: what the store says it was."""


@dataclass(frozen=True, kw_only=True)
class CaptureConfig(WorkersConfig):
    """Run a language model over a token table and keep the activations of its sites."""

    model: str
    """builtin, a hub id, a local directory, or a .gguf file."""
    tokens: str
    """The token table: what `actstore tokenize` wrote."""
    sites: tuple[str, ...]
    """Sites such as resid_post.12,mlp_out.12,mlp_hidden.12,q.12; or all, resid_post.*, *.12, mlp_out.0-12."""
    out: str
    """Where the store goes: a directory or an fsspec URL."""
    extend: bool = False
    """Add these tokens to a finished store; what is there stays as it is."""
    batch_size: int = 8
    """Sequences per forward pass."""
    dtype: DType = "auto"
    """Precision of the forward pass. auto: as the store was begun; else bfloat16 on a GPU that has it, and on a CPU
    float32 unless the model was saved in bfloat16 and the processor has bfloat16 products."""
    encoding: str = "bf16"
    """bf16, exact for a bfloat16 model, else rounded to nearest even; f32; or fixed:EPS, which adds an FVU of EPS."""
    codec: Literal["planes", "blosc", "none"] = "planes"
    """How chunks are compressed: planes, blosc for readers such as TensorStore, none for fast local disks."""
    bucket_rows: int = 1 << 20
    """Rows of a bucket: shuffle scope and unit of commit. Gemma Scope used about 10^6."""
    shard_rows: int = 1 << 14
    """Rows of a shard: one object on storage."""
    chunk_rows: int = 1 << 11
    """Rows of a chunk: the unit of reading."""
    seed: int = 0
    """Key of the order of rows inside buckets."""
    rows: int | None = None
    """Capture the first so many rows only; default: all."""
    check_tokenizer: bool = True
    """Refuse tokens that another vocabulary made, where the model brings its tokenizer."""

    def __post_init__(self) -> None:
        """Check the numbers; `ValueError` names the field."""
        super().__post_init__()
        if self.out.startswith("memory:") or self.tokens.startswith("memory:"):
            raise ValueError("memory:// URLs live in one process, and capture works in several; use a directory")
