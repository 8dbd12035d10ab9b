"""How a dataset reads: what changes speed and memory, and none of the rows that it yields."""

import os
import re
from dataclasses import dataclass
from typing import Literal

from actstore.stream.maps import Verify

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is rarely changed.

    Raises:
        ValueError: for a value that can't be carried out.

    """

    threads: int | None = None
    """Threads that decode and gather; default one a core, less under torchrun with several ranks."""
    max_inflight: int | None = None
    """Requests under way at a time; default 16 for object stores, and for a directory none but those of the threads."""
    memory_budget: int | str | None = None
    """Bytes, or text such as "8GB", for chunks, reads and batches; default what the plan needs plus read-ahead."""
    prefetch: int = 4
    """Batches ready in advance."""
    verify: Verify = "once"
    """"once" checks a chunk of a local file the first time that it is loaded, "every" each time; what arrives from an
    object store is always checked."""
    on_error: Literal["raise", "skip"] = "raise"
    """"skip" goes on without chunks that can't be read, and counts them in `stats()`; their rows are missing from
    their batches."""
    skip_chunks: int = 16
    """Chunks an epoch that "skip" may leave out before it raises."""
    isolate: bool = False
    """Run the pipeline in a process of its own, with one more copy of each batch."""
    replay: bool = False
    """Read a few batches once and repeat these very tensors for the rest of the epoch: the rate of a trainer that
    never waits. Don't change them."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name, least in (("threads", 1), ("max_inflight", 1), ("prefetch", 1), ("skip_chunks", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}")
        for name, known in (("verify", ("once", "every")), ("on_error", ("raise", "skip"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {known[0]!r} or {known[1]!r}")
        if self.isolate and not hasattr(os, "memfd_create"):
            raise ValueError("isolate needs Linux, whose shared memory can do without a name")
        _ = self.budget

    @property
    def budget(self) -> int | None:
        """`memory_budget` in bytes."""
        return None if self.memory_budget is None else parse_bytes(self.memory_budget)

    @property
    def skips(self) -> int:
        """Chunks an epoch that may be left out."""
        return self.skip_chunks if self.on_error == "skip" else 0


def parse_bytes(size: int | str) -> int:
    """Bytes of a number or of text such as "8GB" (10^9) or "1.5 GiB" (2^30); ValueError for anything else."""
    if not isinstance(size, str):
        return int(size)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?\s*", size.upper())
    if found is None:
        raise ValueError(f"size is {size!r}, expected bytes such as 8000000000, '8GB' or '7.5 GiB'")
    return int(float(found[1]) * _UNITS[found[2]])
