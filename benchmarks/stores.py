"""Write stores of synthetic rows for benchmarks. Their rows repeat; their entropy is that of real activations."""

from pathlib import Path

import numpy as np

from actstore.bench import activations_like
from actstore.store import SiteSpec, StoreSpec, create_store
from actstore.store.format import codec

BLOCK_ROWS = 1 << 15
"""Different rows; a store repeats them."""


def make(url: Path, site: str, encoding: str, chain: codec.CodecName, *, d: int, rows: int, bucket_rows: int) -> None:
    """Write a store of `rows` rows of one site, unless it is there."""
    if (url / "manifest.json").exists():
        return
    sites = {site: SiteSpec(d=d, encoding=encoding)}
    shard_rows, chunk_rows = min(1 << 14, bucket_rows), min(1 << 11, bucket_rows)
    spec = StoreSpec(
        sites=sites, rows=rows, bucket_rows=bucket_rows, shard_rows=shard_rows, chunk_rows=chunk_rows, codec=chain
    )
    writer = create_store(url, spec)
    block = activations_like(min(BLOCK_ROWS, bucket_rows), d)
    if encoding == "f32":
        block = (block.astype(np.uint32) << 16).view(np.float32)
    values = np.concatenate([block] * -(-bucket_rows // len(block)))
    for bucket in range(spec.buckets):
        first, stop = spec.bucket_range(bucket)
        row = np.arange(first, stop, dtype=np.int32)[np.argsort(spec.permutation(bucket))]
        provenance = {"sequence": row // 127, "position": row % 127 + 1, "token_id": row % 10}
        writer.write_arrays(bucket, {site: values[: stop - first], **provenance})
    writer.finalise()
