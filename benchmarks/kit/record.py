"""What the kit's parts share: how much to do, and the record of figures and checks."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

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
GIB = 1 << 30


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
    bucket_rows=1 << 10,
    num_buckets=2,
    d=64,
    store_rows=1 << 13,
    batch_rows=512,
    widths=(256,),
    product=256,
    rounds=2,
    seconds=0.2,
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
