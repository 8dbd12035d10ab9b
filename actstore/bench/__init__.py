"""Benchmarks of IO: `actstore bench`, the third of the user's jobs.

`write`, `read` and `storage` each compare rates with ceilings that the same run measures (memory copy, bare encode,
decode and gather, raw GET) and name what bounds them. `benchmarks/` compares with other loaders.
"""

from actstore.bench.read import bench_read
from actstore.bench.report import Rate, Report, activations_like, machine, memcpy, show
from actstore.bench.storage import bench_storage
from actstore.bench.write import bench_write

__all__ = [
    "Rate",
    "Report",
    "activations_like",
    "bench_read",
    "bench_storage",
    "bench_write",
    "machine",
    "memcpy",
    "show",
]
