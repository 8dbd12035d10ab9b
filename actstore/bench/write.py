"""How fast a store is written, against encoding and putting alone: `actstore bench write`.

In every round, on the same rows and threads: bare codec calls on chunks, a bucket written with puts that keep nothing,
the same number of bytes put with nothing else to do, and a bucket written for real. Ratios are taken inside a round and
their median is reported, because shared machines drift. Rows are a block of activations, repeated: chunks are
compressed alone, so repetition does not make them smaller.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.bench.report import (
    GB,
    PASSES,
    Rate,
    Report,
    activations_like,
    alternate,
    copying,
    machine,
    medians,
    memory_copy,
    scratch,
)
from actstore.store import SiteSpec, Storage, StoreSpec, StoreWriter, create_store, open_store
from actstore.store.format import codec
from actstore.store.format.spec import PROVENANCE_ARRAYS
from actstore.store.read.values import BucketRows, Values
from actstore.store.storage import LocalStorage
from actstore.store.write.bucket import LOCAL_PUTS, REMOTE_PUTS
from actstore.store.write.protocol import NotWritten
from actstore.stream.stages import gb_per_s

BLOCK_ROWS = 1 << 15
SITE = "bench.0"


class _Repeated:
    """A block of rows again and again: the `Rows` of a bucket of any size."""

    def __init__(self, block: NDArray[Any], rows: int) -> None:
        self.shape, self.dtype, self._block = (rows, *block.shape[1:]), block.dtype, block

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        start, stop, _ = rows.indices(self.shape[0])
        first = start % len(self._block)
        if first + stop - start <= len(self._block):
            return self._block[first : first + stop - start]
        return self._block[np.arange(start, stop) % len(self._block)]


class _Discarding:
    """A storage that keeps metadata and drops shards."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def create(self, key: str, data: Any) -> bool:
        return True if "/c/" in key else self._storage.create(key, data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


def bench_write(
    url: str | None = None,
    *,
    like: str | None = None,
    d: int = 2304,
    gb: float = 2.4,
    threads: int | None = None,
    rounds: int = PASSES,
) -> Report:
    """Write buckets of `gb` GB below `url` and remove them again.

    Rows are synthetic, [n, d] with the entropy of activations, or come from the first bf16 site of the store `like`.
    """
    block = activations_like(BLOCK_ROWS, d) if like is None else rows_of(like)
    rows = max(int(gb * GB / (2 * block.shape[1])) // 16384, 1) * 16384
    spec = StoreSpec(sites={SITE: SiteSpec(d=block.shape[1])}, rows=rows, bucket_rows=rows)
    with tempfile.TemporaryDirectory(prefix="actstore-bench-") as folder, scratch(url or folder) as storage:
        run = _Run(storage, spec, block, threads or os.cpu_count() or 1)
        found = alternate({"copy": partial(gb_per_s, copying()), **run.stages()}, rounds)
    median = medians(found)
    through = statistics.median(r["through"] / r["encode"] for r in found)
    whole = statistics.median(r["write"] / min(r["encode"], r["put"]) for r in found)
    rates = [
        memory_copy(median["copy"]),
        _rate(f"encode, bare, {run.threads} threads", median, "encode"),
        _rate(f"put, {run.puts} at once", median, "put"),
        Rate(what="write, puts dropped", gb_s=median["through"], of_ceiling=through, ceiling="bare encode"),
        Rate(what="write", gb_s=median["write"], of_ceiling=whole, ceiling="slower of encode and put"),
    ]
    where = f" {url}" if url else ""
    command = f"actstore bench write{where} --gb {gb:g} " + (f"--like {like}" if like else f"--d {d}")
    bound = "encode" if median["encode"] < median["put"] else "put"
    why = f"encode {median['encode']:.3g} GB/s, put {median['put']:.3g} GB/s"
    return Report(command=command, rates=rates, bound=bound, why=why, machine=machine())


def _rate(what: str, median: dict[str, float], stage: str) -> Rate:
    return Rate(what=what, gb_s=median[stage], of_ceiling=median[stage] / median["copy"], ceiling="memory copy")


def rows_of(url: str, rows: int = BLOCK_ROWS) -> NDArray[Any]:
    """bf16 bits [rows, d] from the start of a store's first bf16 site; `ValueError` if there is none."""
    store = open_store(url)
    site = next((name for name, s in store.sites.items() if s.kind == "bf16"), None)
    if site is None or not store.rows:
        raise ValueError(f"{url} has no bf16 site with committed rows")
    return BucketRows(Values(store, site), store, site, 0)[:rows]


class _Run:
    """What the rounds share."""

    def __init__(self, storage: Storage, spec: StoreSpec, block: NDArray[Any], threads: int) -> None:
        self.spec, self.threads, self._block, self._storage = spec, threads, block, storage
        self.puts = LOCAL_PUTS if isinstance(storage, LocalStorage) else REMOTE_PUTS
        self._bytes = spec.rows * spec.sites[SITE].d * 2
        chunk = np.ascontiguousarray(block[: spec.chunk_rows])
        self._out = [np.empty(codec.max_stored(chunk.nbytes), np.uint8) for _ in range(threads)]
        # a shard's worth of what chunks compress to
        size = codec.encode_into(chunk, spec.codec, self._out[0])[0] * (spec.shard_rows // spec.chunk_rows)
        self._object = np.random.default_rng(0).bytes(size)

    def stages(self) -> dict[str, Callable[[], float]]:
        """GB/s of each stage, in the order of a round."""
        return {
            "encode": lambda: self._timed(self._encode),
            "through": lambda: self._timed(lambda: self._write(keep=False)),
            "put": lambda: self._timed(self._put),
            "write": lambda: self._timed(lambda: self._write(keep=True)),
        }

    def _timed(self, work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
        for key in self._storage.list(""):
            self._storage.delete(key)
        if isinstance(self._storage, LocalStorage):
            os.sync()  # what one stage left to the system is not the next one's
        return self._bytes / seconds / GB

    def _encode(self) -> None:
        size, chunks = self.spec.chunk_rows, self.spec.rows // self.spec.chunk_rows

        def one(thread: int) -> None:
            for i in range(thread, chunks, self.threads):
                first = i * size % (len(self._block) - size + 1)
                codec.encode_into(self._block[first : first + size], self.spec.codec, self._out[thread])

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(one, range(self.threads)))

    def _put(self) -> None:
        count = self.spec.rows // self.spec.shard_rows
        with ThreadPoolExecutor(self.puts) as pool:
            list(pool.map(lambda i: self._storage.create(f"raw/c/{i}", self._object), range(count)))

    def _write(self, *, keep: bool) -> None:
        create_store(self._storage.url, self.spec)
        storage: Any = self._storage if keep else _Discarding(self._storage)
        zeros = np.zeros(self.spec.rows, np.int32)
        made = StoreWriter(storage, self.spec, threads=self.threads).write_arrays(
            0, {SITE: _Repeated(self._block, self.spec.rows), **dict.fromkeys(PROVENANCE_ARRAYS, zeros)}
        )
        assert not isinstance(made, NotWritten)
