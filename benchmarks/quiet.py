"""Whether a benchmark had its cores to itself: what was measured beside other work is not recorded."""

from collections.abc import Generator
from contextlib import contextmanager

import psutil

MOST = 0.1
"""The share of the processor that may be in use before a run, or be stolen by other virtual machines meanwhile."""


@contextmanager
def cores() -> Generator[None]:
    """Exit with a message if the machine is busy before the block, or was slowed by its neighbours during it."""
    if (busy := psutil.cpu_percent(interval=3.0) / 100) > MOST:
        raise SystemExit(f"not recorded: {busy:.0%} of the processor is in use by something else")
    before = psutil.cpu_times()
    yield
    after = psutil.cpu_times()
    stolen = getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)
    if (share := stolen / (sum(after) - sum(before))) > MOST:
        raise SystemExit(f"not recorded: other virtual machines took {share:.0%} of the processor")
