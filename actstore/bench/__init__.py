"""Benchmarks of IO: `actstore bench`, the third of the user's jobs.

`codec`, `write`, `read`, `storage` and `peers` each compare rates with ceilings that the same run measures (memory
copy, bare decode, gather, raw GET) and name what bounds them.
"""

from actstore.bench.codec import bench_codec
from actstore.bench.everything import bench_all
from actstore.bench.peers import bench_peers
from actstore.bench.read import bench_read
from actstore.bench.report import GB, Rate, Report, activations_like, machine, memcpy, rate, show
from actstore.bench.storage import bench_storage
from actstore.bench.write import bench_write

__all__ = [
    "GB",
    "Rate",
    "Report",
    "activations_like",
    "bench_all",
    "bench_codec",
    "bench_peers",
    "bench_read",
    "bench_storage",
    "bench_write",
    "machine",
    "memcpy",
    "rate",
    "show",
]
