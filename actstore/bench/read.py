"""How fast a store is read, against each stage alone on the same chunks and threads: `actstore bench read`.

Every round measures memory copy, bare fetch, decode and gather, then the loader shuffled and in stored order, so that
ratios hold on a machine that drifts. Fetch takes the byte ranges that the loader would take, so for an object store it
is the raw concurrent GET of the same objects; for a directory it reads the page cache. Decode and gather share the
cores in the loader, hence the ceiling min(fetch, 1 / (1 / decode + 1 / gather)).
"""

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from actstore.bench.report import GB, PASSES, Rate, Report, alternate, copying, machine, medians, memory_copy, timed
from actstore.store.format import codec
from actstore.store.read.store import Store, open_store
from actstore.store.storage import LocalStorage
from actstore.stream import gather as gathering
from actstore.stream.dataset import ActivationDataset
from actstore.stream.memory import addresses
from actstore.stream.settings import Settings

REMOTE_FETCHES = 16
"""Requests in flight to an object store, unless told; `actstore bench storage` finds what a backend wants."""
SAMPLE_BYTES = 1 << 28
"""Decoded bytes of the chunks that the bare stages work on: more than any cache holds."""
WARM = 0.3
"""Of the seconds of a loader, in addition: what was read ahead at the start must not count."""
CEILING = "min(fetch, decode+gather)"


def bench_read(
    url: str,
    *,
    site: str | None = None,
    batch_size: int = 4096,
    seconds: float = 5.0,
    threads: int | None = None,
    inflight: int | None = None,
    rounds: int = PASSES,
) -> Report:
    """Read a store as a trainer does, and each stage bare on the same chunks and threads.

    `seconds` is how long each of the two loaders runs, over all rounds; `inflight` the requests at once to an object
    store.
    """
    store = open_store(url)
    site = site or next(iter(store.sites))
    store.check_site(site)
    cores = os.cpu_count() or 1
    local = isinstance(store.storage, LocalStorage)
    used, fetches = threads or cores, inflight or (threads or cores if local else REMOTE_FETCHES)
    with ThreadPoolExecutor(max(used, fetches)) as pool:
        bare = _Bare(store, site, pool, used, fetches, batch_size)
        runs = {
            "shuffled": _Loader(store, site, batch_size, seconds / rounds, threads, inflight, shuffle=True),
            "stored order": _Loader(store, site, batch_size, seconds / rounds, threads, inflight, shuffle=False),
        }
        stages = {
            "copy": timed(copying()),
            "fetch": timed(bare.fetch),
            "decode": timed(bare.decode),
            "gather": timed(bare.gather),
            "gather, 1 thread": timed(bare.gather_alone),
        }
        found = alternate({**stages, **runs}, rounds)
    names = {
        "fetch": f"fetch, {fetches} at once",
        "decode": f"decode, {used} threads",
        "gather": f"gather, {used} threads",
        "gather, 1 thread": "gather, 1 thread",
    }
    return _report(url, site, found, names, runs)


def _report(
    url: str, site: str, found: list[dict[str, float]], names: dict[str, str], runs: "dict[str, _Loader]"
) -> Report:
    median = medians(found)
    rates = [memory_copy(median["copy"])]
    for stage, what in names.items():
        ratio = statistics.median(r[stage] / r["copy"] for r in found)
        rates.append(Rate(what=what, gb_s=median[stage], of_ceiling=ratio, ceiling="memory copy"))
    for order in runs:
        ratio = statistics.median(r[order] / ceiling(r) for r in found)
        rates.append(Rate(what=f"loader, {order}", gb_s=median[order], of_ceiling=ratio, ceiling=CEILING))
    shuffling = statistics.median(r["shuffled"] / r["stored order"] for r in found)
    slowest = bound(median)
    together = 1 / (1 / median["decode"] + 1 / median["gather"])
    return Report(
        command=f"actstore bench read {url} --site {site}",
        rates=rates,
        bound=slowest,
        why=f"fetch {median['fetch']:.3g} GB/s, decode and gather on the same cores {together:.3g} GB/s "
        f"({median['decode']:.3g} and {median['gather']:.3g} alone)",
        machine=machine(),
        figures={"shuffled / stored order": shuffling, **{f"loader, {k}": run.figures() for k, run in runs.items()}},
    )


def ceiling(rates: dict[str, float]) -> float:
    """What the stages allow together, in GB/s."""
    return min(rates["fetch"], 1 / (1 / rates["decode"] + 1 / rates["gather"]))


def bound(rates: dict[str, float]) -> str:
    """The stage that limits: fetch if it is slower than decode and gather in turn, else the slower of these."""
    if rates["fetch"] <= 1 / (1 / rates["decode"] + 1 / rates["gather"]):
        return "fetch"
    return "decode" if rates["decode"] <= rates["gather"] else "gather"


class _Bare:
    """Fetch, decode and gather, each alone; every call returns the decoded bytes that it was for."""

    def __init__(
        self, store: Store, site: str, pool: ThreadPoolExecutor, threads: int, fetches: int, batch_size: int
    ) -> None:
        where = store.index.arrays[site]
        self._array, self._storage, self._pool = where.array, store.storage, pool
        self._threads, self._fetches = threads, fetches
        self._calibration = store.calibration(site) if site in store.index.calibration else None
        present = np.argwhere(where.chunks > 0)
        count = min(len(present), max(2 * fetches, SAMPLE_BYTES // self._array.chunk_bytes))
        chosen = present[np.linspace(0, len(present) - 1, count).astype(int)]
        self._places = [where.locate(int(p), int(store.index.buckets[p]), int(c)) for p, c in chosen]
        self._stored = [self._storage.get_range(p.key, p.offset, p.length) for p in self._places]
        self._decoded = np.empty((count, self._array.chunk_bytes), np.uint8)
        rng = np.random.default_rng(0)
        self._buffer, self._row = (
            rng.integers(0, count, batch_size),
            rng.integers(0, self._array.chunk_rows, batch_size),
        )
        width = int(np.prod(self._array.shape[1:]))
        self._out = np.empty((batch_size, width), f"u{self._array.dtype.itemsize}")
        self._batches = max(1, self._decoded.nbytes // self._out.nbytes)

    def _spread(self, one: Callable[[int], None], count: int, workers: int) -> None:
        """`one` for every number below `count`, on so many threads; whoever is free takes the next one."""
        numbers = iter(range(count))

        def some(_: int) -> None:
            for i in numbers:
                one(i)

        list(self._pool.map(some, range(min(workers, count))))

    def fetch(self) -> int:
        def one(i: int) -> None:
            p = self._places[i]
            self._storage.get_range(p.key, p.offset, p.length)

        self._spread(one, len(self._places), self._fetches)
        return self._decoded.nbytes

    def decode(self) -> int:
        def one(i: int) -> None:
            codec.decode_into(self._stored[i], self._array.codec, self._decoded[i], f"chunk {i}")

        self._spread(one, len(self._places), self._threads)
        return self._decoded.nbytes

    def gather(self) -> int:
        edges = np.linspace(0, len(self._row), self._threads + 1).astype(int)

        def one(i: int) -> None:
            self._gather(slice(edges[i % self._threads], edges[i % self._threads + 1]))

        self._spread(one, self._threads * self._batches, self._threads)
        return self._batches * self._out.nbytes

    def gather_alone(self) -> int:
        for _ in range(self._batches):
            self._gather(slice(None))
        return self._batches * self._out.nbytes

    def _gather(self, rows: slice) -> None:
        buffer, row, out = self._buffer[rows], self._row[rows], self._out[rows]
        gathering.gather(addresses(self._decoded), buffer, row, out, self._array, self._calibration)


class _Loader:
    """Batches for some seconds in every round."""

    def __init__(
        self,
        store: Store,
        site: str,
        batch_size: int,
        seconds: float,
        threads: int | None,
        inflight: int | None,
        *,
        shuffle: bool,
    ) -> None:
        streams = next(s for s in (8, 4, 2, 1) if batch_size % s == 0)
        settings = Settings(threads=threads, max_inflight=inflight)
        size = min(batch_size, store.rows // streams * streams)
        self._new: Callable[[], ActivationDataset] = lambda: ActivationDataset(
            store, sites=site, batch_size=size, shuffle=shuffle, streams=streams, settings=settings
        )
        self._seconds = seconds
        self._first: list[float] = []
        self._stats: dict[str, Any] = {}

    def __call__(self) -> float:
        """GB/s of one round: epochs on end, timed after `WARM` of the round, so that it is steady at both ends."""
        with self._new() as dataset:
            if len(dataset) < 2:
                raise ValueError(f"an epoch has {len(dataset)} batches, too few to time; choose a smaller --batch-size")
            moved, began, end = 0, 0.0, 0.0
            created = time.perf_counter()
            while not end or time.perf_counter() < end:
                for number, batch in enumerate(dataset):
                    now = time.perf_counter()
                    if end:
                        moved += batch.nbytes
                        if now >= end:
                            break
                    elif not number and not began:
                        self._first.append(now - created)
                        began = now
                    elif now - began >= WARM * self._seconds:
                        began, end = now, now + self._seconds
            self._stats = dict(dataset.stats())
            return moved / (time.perf_counter() - began) / GB

    def figures(self) -> dict[str, Any]:
        """First batch, and what the loader itself says of its last round."""
        own = {k: v for k, v in self._stats.items() if k in ("stall", "bound")}
        return {"first batch s": statistics.median(self._first), **own}
