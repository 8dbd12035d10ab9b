"""Objects, requests and metadata of large stores: python benchmarks/counts.py. The table is in docs/format.md.

Requests of a bucket are counted while one is written; sizes are those of real records and manifests of random lengths
and checksums, made for a few buckets and scaled: they grow by a constant for every bucket.
"""

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs

from actstore.console import print_table
from actstore.store import SiteSpec, StoreSpec, create_store
from actstore.store.format import manifest, record, stats
from actstore.store.format.spec import arrays
from actstore.store.storage import LocalStorage

RATIO = 1.455
TOKENS = 8_000_000_000
WIDTHS_2B = {"resid_post": 2304, "mlp_out": 2304, "attn_z": 2048}


class Counting:
    """Counts the requests that go to a storage."""

    def __init__(self, storage: LocalStorage) -> None:
        """Pass everything on to `storage`."""
        self.requests: Counter[str] = Counter()
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        """Count calls of the storage protocol."""
        if name in ("get", "get_range", "list", "stat", "exists", "create", "replace", "put"):
            self.requests[name] += 1
        return getattr(self._storage, name)


def requests_of_a_bucket() -> Counter[str]:
    """What writing one bucket of one shard asks of the storage."""
    spec = StoreSpec(sites={"a": SiteSpec(d=1)}, rows=16, bucket_rows=16, shard_rows=16, chunk_rows=16)
    with tempfile.TemporaryDirectory() as root:
        writer, storage = create_store(root, spec), Counting(LocalStorage(Path(root)))
        writer.storage = storage  # pyright: ignore[reportAttributeAccessIssue]
        zeros = np.zeros(16, np.int32)
        rows = {"a": np.zeros((16, 1), np.uint16), "sequence": zeros, "position": zeros, "token_id": zeros}
        writer.write_arrays(0, rows)
        return storage.requests


def metadata_bytes(spec: StoreSpec) -> tuple[float, float]:
    """Bytes of a commit record, and of the manifest for each bucket."""
    rng = np.random.default_rng(0)

    def chunks(array: Any) -> record.Chunks:
        typical, count = int(array.chunk_bytes / RATIO), spec.bucket_rows // array.chunk_rows
        stored = rng.normal(typical, typical * 0.002, count).astype(np.uint32)
        return record.Chunks(stored=stored, crc32c=rng.integers(0, 1 << 32, count, dtype=np.uint32))

    def made(bucket: int) -> record.CommitRecord:
        sums = {
            n: structs.replace(
                stats.none(s.d), rows=spec.bucket_rows, total=rng.normal(size=s.d), squares=rng.random(s.d)
            )
            for n, s in spec.sites.items()
        }
        return record.CommitRecord(
            bucket=bucket,
            attempt=rng.bytes(8).hex(),
            rows=spec.bucket_rows,
            arrays={name: chunks(a) for name, a in arrays(spec).items()},
            calibration={},
            stats=sums,
            versions={},
        )

    size = manifest.part_buckets(spec)
    small = replace(spec, rows=size * spec.bucket_rows)
    builder = manifest.PartBuilder(small, 0, np.arange(size))
    for b in range(size):
        builder.add(made(b))
    tables = sum(len(data) for _, data in builder.files())
    return len(record.to_bytes(made(0))), (tables + len(manifest.part_bytes(builder.part({})))) / size


def line(name: str, sites: dict[str, SiteSpec], rows: int, stores: int = 1) -> dict[str, Any]:
    """Figures of so many stores of these sites."""
    spec = StoreSpec(sites=sites, rows=rows)
    per_bucket = sum(spec.bucket_rows // a.shard_rows for a in arrays(spec).values())
    of_record, of_manifest = metadata_bytes(spec)
    requests = requests_of_a_bucket()
    puts = requests["create"] + requests["replace"] + requests["put"] - 4  # the four shards of that bucket
    buckets = spec.buckets * stores
    stored = sum(rows * s.d * 2 for s in sites.values()) * stores / RATIO
    shard_mb = [spec.shard_rows * s.d * 2 / RATIO / 1e6 for s in sites.values()]
    chunks = buckets * len(arrays(spec)) * (spec.bucket_rows // spec.chunk_rows)
    return {
        "": name,
        "stored": f"{stored / 2**50:.2f} PiB" if stored > 2**49 else f"{stored / 2**40:.1f} TiB",
        "objects": f"{buckets * (per_bucket + 1) / 1e6:.2f} M",
        "MB of a shard": f"{np.mean(shard_mb):.0f}",
        "PUTs": f"{buckets * (per_bucket + puts) / 1e6:.2f} M",
        "GETs and HEADs to write": f"{buckets * (requests['get'] + requests['stat'] + requests['exists']) / 1e6:.3f} M",
        "GETs an epoch of one site": f"{chunks / len(arrays(spec)) / stores / 1e6:.1f} M",
        "commit records": f"{buckets * of_record / 1e9:.2f} GB",
        "manifest": f"{of_manifest * spec.buckets / 1e6:,.0f} MB" + (f" x {stores}" if stores > 1 else ""),
    }


def main() -> None:
    """Print the table as Markdown."""
    sites_2b = {f"{kind}.{layer}": SiteSpec(d=d) for kind, d in WIDTHS_2B.items() for layer in range(26)}
    layer_2b = {f"{kind}.0": SiteSpec(d=d) for kind, d in WIDTHS_2B.items()}
    one_9b = {"resid_post.20": SiteSpec(d=3584)}
    of_one = TOKENS * 3584 * 4
    lines = [
        line("one 9B site, 8 B rows", one_9b, TOKENS),
        line("all 78 2B sites, 8 B rows, one store", sites_2b, TOKENS),
        line("the same, a store for each layer", layer_2b, TOKENS, stores=26),
        line("20 PiB of float32, a store for each site", one_9b, TOKENS, stores=round(20 * 2**50 / of_one)),
    ]
    header = tuple(lines[0])
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for found in lines:
        print("| " + " | ".join(found.values()) + " |")
    print_table("requests of a bucket of 4 shards", dict(sorted(requests_of_a_bucket().items())))


if __name__ == "__main__":
    main()
