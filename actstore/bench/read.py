"""How fast a store is read, against each stage alone on the same chunks and threads: `actstore bench read`.

Every round measures memory copy, bare fetch, decode and gather, then the loader shuffled and in stored order, so that
ratios hold on a machine that drifts. Fetch takes the byte ranges that the loader would take, so for an object store it
is the raw concurrent GET of the same objects; for a directory it brings in the pages of its maps. Decode and gather
share the cores in the loader, hence the ceiling min(fetch, 1 / (1 / decode + 1 / gather)).
"""

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from actstore.bench.report import GB, PASSES, Rate, Report, alternate, copying, machine, medians, memory_copy
from actstore.store.read.store import Store, open_store
from actstore.store.storage import LocalStorage
from actstore.stream.columns import columns_of
from actstore.stream.dataset import ActivationDataset
from actstore.stream.settings import Settings
from actstore.stream.stages import Stages, gb_per_s, in_turn

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
    columns = columns_of(store, (site,), (), dtype=None, factors={})
    num_chunks = max(2 * fetches, SAMPLE_BYTES // columns[site].chunk_bytes)
    bare = Stages(columns, num_chunks=num_chunks, batch_rows=batch_size, threads=used, fetchers=fetches)
    stages: dict[str, Callable[[], int]] = {
        "copy": copying(),
        "fetch": bare.fetch,
        "decode": bare.decode,
        "gather": bare.gather,
        "gather, 1 thread": partial(bare.gather, threads=1),
    }
    loader = partial(_Loader, store, site, batch_size, seconds / rounds, threads, inflight)
    runs = {"shuffled": loader(shuffle=True), "stored order": loader(shuffle=False)}
    found = alternate({**{name: partial(gb_per_s, work) for name, work in stages.items()}, **runs}, rounds)
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
    together = in_turn(median["decode"], median["gather"])
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
    return min(rates["fetch"], in_turn(rates["decode"], rates["gather"]))


def bound(rates: dict[str, float]) -> str:
    """The stage that limits: fetch if it is slower than decode and gather in turn, else the slower of these."""
    if rates["fetch"] <= in_turn(rates["decode"], rates["gather"]):
        return "fetch"
    return "decode" if rates["decode"] <= rates["gather"] else "gather"


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
