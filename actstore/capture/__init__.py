"""Model to store: hooks, one forward pass for all sites, and Ray workers that turn buckets into committed objects."""

from actstore.capture.config import CaptureConfig
from actstore.capture.run import CaptureSummary, capture
from actstore.capture.sites import Site, check_sites, expand_sites, parse_sites

__all__ = ["CaptureConfig", "CaptureSummary", "Site", "capture", "check_sites", "expand_sites", "parse_sites"]
