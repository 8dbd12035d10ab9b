"""What starting, resuming, finalising and opening a large store cost: python benchmarks/scale.py [BUCKETS ...].

Synthetic commit records of the store that docs/capture.md captures from Gemma 2 2B: 78 sites, 122,071 buckets. Lengths,
checksums and statistics are random, as real ones are. Each step runs in a fresh process on a directory, which counts
the bytes that it reads and how far its memory grows. Costs at three sizes give the growth law, and with it the full
store. Needs about 4 MB of disk for each bucket.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs

from actstore.store import SiteSpec, StoreSpec, create_store, open_store
from actstore.store.format import manifest, stats
from actstore.store.format import record as records
from actstore.store.format.spec import arrays
from actstore.store.read.index import committed, read_spec
from actstore.store.storage import LocalStorage
from actstore.store.write.finalise import missing_parts, write_head, write_part

Row = dict[str, Any]
FULL = 122_071
SITES = {
    f"{kind}.{i}": d for kind, d in (("resid_post", 2304), ("mlp_out", 2304), ("attn_out", 2048)) for i in range(26)
}


def spec_of(buckets: int) -> StoreSpec:
    """The store of so many buckets."""
    sites = {name: SiteSpec(d=d) for name, d in SITES.items()}
    return StoreSpec(sites=sites, rows=buckets << 16, bucket_rows=1 << 16, chunk_rows=1 << 12)


def write_records(root: Path, buckets: int) -> int:
    """Create the store and commit every bucket without its shards; returns the bytes of a record."""
    spec, rng = spec_of(buckets), np.random.default_rng(0)
    storage = create_store(root, spec).storage
    assert isinstance(storage, LocalStorage)
    (storage.root / records.COMMITS).mkdir()

    def write(bucket: int) -> int:
        chunks = {
            name: records.Chunks(
                stored=rng.normal(a.chunk_bytes * 0.69, a.chunk_bytes * 0.002, 16).astype(np.uint32) + 9,
                crc32c=rng.integers(0, 1 << 32, 16, dtype=np.uint32),
            )
            for name, a in arrays(spec).items()
        }
        sums = {
            name: structs.replace(
                stats.none(d), rows=1 << 16, total=rng.normal(size=d), squares=rng.normal(size=d) ** 2
            )
            for name, d in SITES.items()
        }
        made = records.CommitRecord(
            bucket=bucket,
            attempt=f"{bucket:016d}",
            rows=1 << 16,
            arrays=chunks,
            calibration={},
            stats=sums,
            versions={"torch": "2.13.0"},
        )
        data = records.to_bytes(made)
        storage.path(records.commit_key(bucket)).write_bytes(data)
        return len(data)

    return max(write(b) for b in range(buckets))


class Counting(LocalStorage):
    """A directory that counts the bytes that are read."""

    read = 0

    def get(self, key: str, limit: int | None = None) -> bytes:
        """See `Storage`."""
        data = super().get(key, limit)
        self.read += len(data)
        return data


def step(name: str, root: str) -> None:
    """Do one step in this process, and print what it cost."""
    storage = Counting(Path(root))
    spec = read_spec(storage)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if name == "start":
        count = len(committed(storage, spec))
    elif name == "part":
        write_part(storage, spec, 0)
        count = 1
    elif name == "finalise":
        parts = missing_parts(storage, spec)
        for part in parts:
            write_part(storage, spec, part)
        count = len(parts)
    elif name == "head":
        count = int(write_head(storage, spec))
    else:
        store = open_store(root)
        index = store.index.arrays["resid_post.12"]
        count = len(index.chunks)
    seconds = time.perf_counter() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    print(json.dumps({"step": name, "count": count, "s": seconds, "read_mb": storage.read / 1e6, "grown_mb": grown}))


def run(name: str, root: Path) -> dict[str, Any]:
    """A step in a fresh process."""
    command = [sys.executable, __file__, "--step", name, str(root)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def measure(buckets: int) -> dict[str, Any]:
    """All steps on a store of so many buckets, whose last half is committed after a first finalisation died."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "s"
        size = write_records(root, buckets)
        found = {"buckets": buckets, "record_mb": size / 1e6, "parts": manifest.num_parts(spec_of(buckets))}
        found |= {f"start_{k}": v for k, v in run("start", root).items() if k in ("s", "read_mb", "grown_mb")}
        part = run("part", root)
        rest = run("finalise", root)
        found |= {"part_s": part["s"], "part_grown_mb": max(part["grown_mb"], rest["grown_mb"])}
        found |= {"finalise_s": part["s"] + rest["s"], "parts_made_after_restart": rest["count"]}
        found |= {f"head_{k}": v for k, v in run("head", root).items() if k in ("s", "read_mb", "grown_mb")}
        found |= {f"open_{k}": v for k, v in run("open", root).items() if k in ("s", "grown_mb")}
        return found


def scale(args: argparse.Namespace) -> list[Row]:
    """Each step runs in a process of its own. The last column is what the growth law, a line, gives the whole store."""
    sizes = [1, 2] if args.quick else args.buckets
    found = [measure(buckets) for buckets in sizes]
    rows: list[Row] = []
    for name in found[0]:
        values = [r[name] for r in found]
        slope, constant = np.polyfit(sizes, values, 1).tolist()
        row: Row = {"what": name, **{f"{n:,} buckets": value for n, value in zip(sizes, values, strict=True)}}
        rows.append({**row, f"{FULL:,} by the law": slope * FULL + constant})
    return rows


if __name__ == "__main__":
    if "--step" in sys.argv[1:2]:
        step(*sys.argv[2:])
    else:
        import record  # what it imports would slow every step

        arguments = record.parser(__doc__)
        arguments.add_argument("buckets", nargs="*", type=int, default=[305, 610, 1221], metavar="BUCKETS")
        record.main(__file__, {"scale": scale}, arguments)
