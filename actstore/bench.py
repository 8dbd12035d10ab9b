"""IO benchmarks: how fast a store is written and read here, against ceilings measured in the same run.

Figures are GB of decoded activations per second. Machines are shared and differ, so ratios to the ceilings (memory
copy, bare reads, bare codec calls, bare gather) are what to compare; each figure is the median of several passes.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.store import codec
from actstore.store.reader import Store, open_store
from actstore.stream.dataset import ActivationDataset
from actstore.stream.gather import gather
from actstore.stream.pipeline import RAW

GB = 1e9
PASSES = 5


@dataclass(frozen=True, kw_only=True)
class Rate:
    """One line of a benchmark."""

    what: str
    gb_s: float
    of_ceiling: float
    """Ratio to the ceiling that the line names."""
    ceiling: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """One benchmark run."""

    command: str
    rates: list[Rate]
    bound: str
    """The stage that limits the whole."""
    machine: dict[str, Any]


def machine() -> dict[str, Any]:
    """Processor, cores and the versions that matter."""
    names = ("actstore", "numpy", "numcodecs", "zstandard", "numba", "torch", "zarr", "fsspec")
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        **{n: version(n) for n in names},
    }


def rate(work: Callable[[], int], passes: int = PASSES) -> float:
    """Median GB/s of `work`, which returns the bytes it moved; one pass warms up."""
    work()
    found: list[float] = []
    for _ in range(passes):
        began = time.perf_counter()
        moved = work()
        found.append(moved / (time.perf_counter() - began) / GB)
    return statistics.median(found)


def _threaded(pool: ThreadPoolExecutor, one: Callable[[int], int], count: int) -> Callable[[], int]:
    return lambda: sum(pool.map(one, range(count)))


def memcpy(nbytes: int = 1 << 24) -> float:
    """GB/s of copying warm memory on one core."""
    source, target = np.ones(nbytes, np.uint8), np.empty(nbytes, np.uint8)

    def work() -> int:
        for _ in range(8):
            np.copyto(target, source)
        return 8 * nbytes

    return rate(work)


def bench_read(
    url: str, *, site: str | None = None, batch_size: int = 4096, seconds: float = 5.0, threads: int | None = None
) -> Report:
    """Read a store as a trainer does, and each stage bare on the same chunks and threads."""
    store = open_store(url)
    site = site or next(iter(store.sites))
    store.check_site(site)
    used = threads or os.cpu_count() or 1
    stages = _read_stages(store, site, used, batch_size)
    copy = memcpy()
    together = 1 / (1 / stages["decode"] + 1 / stages["gather"])
    slowest = min(together, stages["fetch"])
    loaded = {
        name: _loader_rate(store, site, batch_size, seconds, threads, shuffle=shuffle)
        for name, shuffle in (("loader, shuffled", True), ("loader, stored order", False))
    }
    ceiling = "slower of fetch and decode+gather"
    rates = [
        Rate(what="memory copy, 1 core", gb_s=copy, of_ceiling=1.0, ceiling="itself"),
        Rate(
            what=f"fetch, {used} threads",
            gb_s=stages["fetch"],
            of_ceiling=stages["fetch"] / copy,
            ceiling="memory copy",
        ),
        Rate(
            what=f"decode, {used} threads",
            gb_s=stages["decode"],
            of_ceiling=stages["decode"] / copy,
            ceiling="memory copy",
        ),
        Rate(what="gather, 1 thread", gb_s=stages["gather"], of_ceiling=stages["gather"] / copy, ceiling="memory copy"),
        *(Rate(what=k, gb_s=v, of_ceiling=v / slowest, ceiling=ceiling) for k, v in loaded.items()),
    ]
    bound = min(stages, key=lambda k: stages[k])
    return Report(command=f"actstore bench read {url} --site {site}", rates=rates, bound=bound, machine=machine())


def _read_stages(store: Store, site: str, threads: int, batch_size: int) -> dict[str, float]:
    """GB/s of fetch, decode and gather, each alone."""
    where = store.index.arrays[site]
    array = where.array
    present = np.argwhere(where.chunks > 0)
    chosen = present[np.linspace(0, len(present) - 1, min(len(present), 64)).astype(int)]
    places = [where.locate(int(p), int(store.index.buckets[p]), int(c)) for p, c in chosen]
    stored = [store.storage.get_range(p.key, p.offset, p.length) for p in places]
    decoded = np.empty((len(places), array.chunk_bytes), np.uint8)
    rng = np.random.default_rng(0)
    buffer, row = rng.integers(0, len(places), batch_size), rng.integers(0, array.chunk_rows, batch_size)
    out = np.empty((batch_size, *array.shape[1:]), RAW[array.dtype.name])

    def fetch(i: int) -> int:
        store.storage.get_range(places[i].key, places[i].offset, places[i].length)
        return array.chunk_bytes

    def decode(i: int) -> int:
        codec.decode_into(stored[i], array.codec, decoded[i], f"chunk {i}")
        return array.chunk_bytes

    def gather_batch() -> int:
        gather(decoded, buffer, row, out, planes=array.codec == "planes")
        return out.nbytes

    with ThreadPoolExecutor(threads) as pool:
        return {
            "fetch": rate(_threaded(pool, fetch, len(places))),
            "decode": rate(_threaded(pool, decode, len(places))),
            "gather": rate(gather_batch),
        }


def _loader_rate(
    store: Store, site: str, batch_size: int, seconds: float, threads: int | None, *, shuffle: bool
) -> float:
    """GB/s of batches for about `seconds`, after one batch."""
    streams = next(s for s in (8, 4, 2, 1) if batch_size % s == 0)
    dataset = ActivationDataset(
        store,
        sites=site,
        batch_size=min(batch_size, store.rows // streams * streams),
        streams=streams,
        threads=threads,
        shuffle=shuffle,
    )
    with dataset:
        moved, began = 0, time.perf_counter()
        first = True
        while time.perf_counter() - began < seconds:
            for batch in dataset:
                if first:
                    first, began = False, time.perf_counter()
                else:
                    moved += batch.nbytes
                if time.perf_counter() - began >= seconds:
                    break
        return moved / (time.perf_counter() - began) / GB


def activations_like(rows: int, d: int, seed: int = 0) -> NDArray[np.uint16]:
    """bf16 bits [rows, d] with the entropy of real activations.

    Student-t noise (5 degrees of freedom) times a lognormal scale per dimension: exponents of about 2.9 bits, as
    measured on mid-layer residual streams, so that compression ratio and speed carry over.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_t(5, (rows, d)).astype(np.float32) * np.exp(rng.normal(0, 0.6, d)).astype(np.float32)
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
