"""How fast and how large a store of a million shards opens: python benchmarks/manifest.py [SHARDS].

One site of d = 2304 with default bucket, shard and chunk sizes; lengths and checksums are random, as real ones are. The
manifest is opened by a fresh process that counts its requests.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from actstore.console import print_table
from actstore.store import SiteSpec, StoreSpec
from actstore.store.format import manifest
from actstore.store.format.spec import arrays
from actstore.store.format.stats import Sums
from actstore.store.storage import LocalStorage

HERE = Path(__file__).parent


def synthetic(shards: int) -> manifest.Index:
    """An index of a finished store with so many shards of its site."""
    spec = StoreSpec(sites={"resid_post.12": SiteSpec(d=2304)}, rows=shards << 14)
    rng = np.random.default_rng(0)
    buckets, width = spec.buckets, spec.bucket_rows // spec.chunk_rows

    def index(array: Any) -> manifest.ArrayIndex:
        typical = array.chunk_bytes * 0.69
        lengths = rng.normal(typical, typical * 0.002, (buckets, width)).astype(np.uint32)
        crcs = rng.integers(0, 1 << 32, (buckets, width), dtype=np.uint32)
        return manifest.ArrayIndex(array=array, chunks=lengths, crc32c=crcs)

    return manifest.Index(
        spec=spec,
        buckets=np.arange(buckets),
        attempts=tuple(rng.bytes(8).hex() for _ in range(buckets)),
        arrays={name: index(a) for name, a in arrays(spec).items()},
        calibration={},
        stats={"resid_post.12": Sums(rows=spec.rows, total=np.ones(2304), squares=np.ones(2304), max_abs=1.0)},
    )


class Counting(LocalStorage):
    """A directory that counts what it is asked."""

    requests: dict[str, int]

    def __getattribute__(self, name: str) -> Any:
        """Count calls of the storage protocol."""
        if name in ("get", "get_range", "list", "stat", "exists", "size"):
            counts = self.__dict__.setdefault("requests", {})
            counts[name] = counts.get(name, 0) + 1
        return super().__getattribute__(name)


def peak() -> float:
    """Largest resident set of this process so far, MB (getrusage would count the parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def open_there(root: str) -> None:
    """What the fresh process does."""
    from actstore.store.read.store import Store

    before, began = peak(), time.perf_counter()
    storage = Counting(Path(root))
    store = Store(storage)
    opened = time.perf_counter() - began
    opened_mb, began = peak(), time.perf_counter()
    assert store.index.arrays["resid_post.12"].locate(3, 3, 500).length
    first_chunk = time.perf_counter() - began
    rng, index = np.random.default_rng(1), store.index
    began, lookups = time.perf_counter(), 100_000
    for bucket in rng.integers(0, store.spec.buckets, lookups).tolist():
        assert index.place(bucket) == bucket
    found = {
        "shards": int(store.spec.rows >> 14),
        "open_s": opened,
        "peak_mb": opened_mb,
        "peak_above_imports_mb": opened_mb - before,
        "first_chunk_found_s": first_chunk,
        "peak_mb_then": peak(),
        "requests": dict(storage.requests),
        "find_a_bucket_us": (time.perf_counter() - began) / lookups * 1e6,
    }
    print(json.dumps(found))


def main() -> None:
    """Make the manifest, open it elsewhere, keep the figures."""
    if sys.argv[1:2] == ["--open"]:
        return open_there(sys.argv[2])
    from actstore.bench import machine

    shards = int(sys.argv[1]) if sys.argv[1:] else 1_000_000
    with tempfile.TemporaryDirectory() as root:
        data = manifest.to_parquet(synthetic(shards))
        LocalStorage(Path(root)).put(manifest.MANIFEST_KEY, data)
        runs = [
            json.loads(
                subprocess.run([sys.executable, __file__, "--open", root], capture_output=True, check=True).stdout
            )
            for _ in range(5)
        ]
    best = sorted(runs, key=lambda r: r["open_s"])[len(runs) // 2] | {"manifest_mb": len(data) / 1e6}
    print_table(
        "python benchmarks/manifest.py, median of 5", {k: v if k != "requests" else str(v) for k, v in best.items()}
    )
    if shards == 1_000_000:
        record = {"command": "python benchmarks/manifest.py", "figures": best, "machine": machine()}
        (HERE / "manifest.json").write_text(json.dumps(record, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
