"""The settings of `actstore capture`; importing this module loads no deep-learning library."""

from dataclasses import dataclass
from typing import Literal

DType = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """Run a language model over a token table and keep the activations of its sites."""

    model: str
    """builtin, a hub id, a local directory, or a .gguf file."""
    tokens: str
    """The token table: what `actstore tokenize` wrote."""
    sites: tuple[str, ...]
    """Sites such as resid_post.12,mlp_out.12,attn_out.12,mlp_in.12."""
    out: str
    """Where the store goes: a directory or an fsspec URL."""
    workers: int = 1
    """Model replicas, each a Ray actor."""
    batch_size: int = 8
    """Sequences per forward pass."""
    dtype: DType = "auto"
    """Precision of the forward pass; auto: as the model was saved."""
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
    device: str = "auto"
    """cpu, cuda, balanced (one model over all GPUs a worker sees), or auto: cuda where Ray has a GPU per worker."""
    threads: int | None = None
    """CPU threads per worker; default: this machine's cores divided by the workers."""
    address: str | None = None
    """Address of a running Ray cluster; default: start Ray on this machine."""
    check_tokenizer: bool = True
    """Refuse tokens that another vocabulary made, where the model brings its tokenizer."""

    def __post_init__(self) -> None:
        """Check the numbers; `ValueError` names the field."""
        for name in ("workers", "batch_size", "rows", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if self.out.startswith("memory:") or self.tokens.startswith("memory:"):
            raise ValueError("memory:// URLs live in one process, and capture works in several; use a directory")
