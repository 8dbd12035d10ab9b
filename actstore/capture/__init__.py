"""Model to store: hooks, one forward pass for all sites, and Ray workers that turn buckets into committed objects.

`run` and `repair` check and plan, `execute` carries out: `pool` gives buckets to `replicas`, each of which is a
`worker` that runs the `forward` pass of a `model` and fills a `bucket`.
"""

from typing import TYPE_CHECKING

from actstore.capture.config import CaptureConfig
from actstore.capture.sites import Site, check_sites, expand_sites, parse_sites

if TYPE_CHECKING:
    from actstore.capture.run import CaptureSummary, capture

__all__ = ["CaptureConfig", "CaptureSummary", "Site", "capture", "check_sites", "expand_sites", "parse_sites"]


def __getattr__(name: str) -> object:
    """Load what is heavy only when it is asked for: the command line needs the settings alone."""
    if name in ("CaptureSummary", "capture"):
        from actstore.capture import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
