"""Raw concurrent PUT and GET of a backend by object size and concurrency: `actstore bench storage`.

Objects of random bytes go through the same `Storage` as a store's. The knee of a size is the least concurrency within
90% of its best rate: what to give the loader as requests in flight. Rounds go over the whole grid, and medians over
them are reported. Everything written is deleted again, after Ctrl-C too. A server on the same machine shares its cores
with the client: the report says how many the client took.
"""

import os
import secrets
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from actstore.bench.report import GB, Rate, Report, machine, memcpy, memory_copy, scratch
from actstore.store.storage import LocalStorage, Storage

SIZES = (0.25, 1.0, 4.0, 8.0, 16.0, 32.0)
"""MiB an object."""
CONCURRENCY = (1, 2, 4, 8, 16, 32, 64)
VERBS = ("PUT", "GET")
KNEE = 0.9
WAVE = 1 << 28
"""Bytes that may be in flight: cells with more are left out, since memory holds them all."""
RISING = 1.4
"""Gain from the last but one concurrency to the last that says that latency is the bound."""
MEMORY = 0.5
"""Share of a memory copy above which memory is the bound: the system had the objects in its cache."""
BUSY = 0.6
"""Share of all cores, taken by the client, that says that the processor is; servers nearby and neighbours take some."""

_Cell = tuple[str, float, int]
"""Verb, MiB and requests at once."""


def bench_storage(
    url: str,
    *,
    sizes: Sequence[float] = SIZES,
    concurrency: Sequence[int] = CONCURRENCY,
    seconds: float = 1.0,
    gb: float = 1.0,
    rounds: int = 3,
) -> Report:
    """Rates of PUT and GET below `url` for every size (MiB) and concurrency.

    A cell takes `seconds` over all rounds, less where `gb` GB have been moved; but every thread finishes one object a
    round.
    """
    if min(sizes) <= 0 or min(concurrency) < 1:
        raise ValueError(f"sizes {tuple(sizes)} and concurrency {tuple(concurrency)} must be positive")
    grid = [(mib, n) for n in sorted(concurrency) for mib in sorted(sizes) if n * mib * 2**20 <= WAVE]
    copying_s: list[float] = []
    found: dict[_Cell, list[tuple[float, float]]] = {}
    with scratch(url) as storage:
        for _ in range(rounds):
            copying_s.append(memcpy())
            for mib, n in grid:
                for verb, figures in _cell(storage, mib, n, seconds / rounds, gb * GB / rounds):
                    found.setdefault((verb, mib, n), []).append(figures)
        local = isinstance(storage, LocalStorage)
    rates = [memory_copy(statistics.median(copying_s)), *(_rate(c, f, copying_s) for c, f in found.items())]
    knees = {verb: {f"{m:g} MiB": knee(_curve(rates, verb, m)) for m, n in grid if n == grid[0][1]} for verb in VERBS}
    bound, why = _bound(rates, local=local)
    return Report(
        command=f"actstore bench storage {url} --seconds {seconds:g}{_options(sizes, concurrency)}",
        rates=rates,
        bound=bound,
        why=why,
        machine=machine(),
        figures={"knee": knees},
    )


def _options(sizes: Sequence[float], concurrency: Sequence[int]) -> str:
    """What differs from the command's defaults."""
    out = ""
    if tuple(sizes) != SIZES:
        out += " --sizes " + " ".join(f"{s:g}" for s in sizes)
    if tuple(concurrency) != CONCURRENCY:
        out += " --concurrency " + " ".join(map(str, concurrency))
    return out


def _rate(cell: _Cell, found: list[tuple[float, float]], copying_s: list[float]) -> Rate:
    """Medians over the rounds of a cell."""
    verb, mib, n = cell
    return Rate(
        what=f"{verb} {mib:g} MiB, {n} at once",
        gb_s=statistics.median(gb_s for gb_s, _ in found),
        of_ceiling=statistics.median(gb_s / c for (gb_s, _), c in zip(found, copying_s, strict=True)),
        ceiling="memory copy",
        more={"verb": verb, "MiB": mib, "at once": n, "client cores": statistics.median(c for _, c in found)},
    )


def knee(curve: dict[int, float]) -> int:
    """Least concurrency whose rate is within 90% of the best."""
    best = max(curve.values())
    return min(n for n, gb_s in curve.items() if gb_s >= KNEE * best)


def _curve(rates: list[Rate], verb: str, mib: float) -> dict[int, float]:
    """GB/s by concurrency."""
    chosen = [r for r in rates if r.more.get("verb") == verb and r.more["MiB"] == mib]
    return {r.more["at once"]: r.gb_s for r in chosen}


def _cell(
    storage: Storage, mib: float, workers: int, seconds: float, most: float
) -> Iterator[tuple[str, tuple[float, float]]]:
    """PUT, then GET of what it wrote: GB/s and cores taken; every thread has an object of its own."""
    data = secrets.token_bytes(int(mib * 2**20))

    def put(i: int) -> None:
        storage.put(f"{mib:g}/{i}", data)

    def get(i: int) -> None:
        storage.get_range(f"{mib:g}/{i}", 0, len(data))

    for verb, job in zip(VERBS, (put, get), strict=True):
        yield verb, _measure(job, workers, len(data), seconds, most)


def _measure(job: Callable[[int], None], workers: int, nbytes: int, seconds: float, most: float) -> tuple[float, float]:
    """GB/s of `job` on so many threads, and how many cores that takes this process."""
    stop, left = threading.Event(), threading.Semaphore(max(int(most / nbytes) - workers, 0))

    def work(i: int) -> int:
        job(i)
        done = nbytes
        while not stop.is_set() and left.acquire(blocking=False):
            job(i)
            done += nbytes
        return done

    with ThreadPoolExecutor(workers) as pool:
        try:
            began, own = time.perf_counter(), _processor()
            jobs = [pool.submit(work, i) for i in range(workers)]
            while not all(j.done() for j in jobs) and time.perf_counter() - began < seconds:
                time.sleep(0.005)
            stop.set()
            moved = sum(j.result() for j in jobs) / GB
            spent, own = time.perf_counter() - began, _processor() - own
            return moved / spent, own / spent
        finally:
            stop.set()  # Ctrl-C: what is in flight ends, nothing more begins


def _processor() -> float:
    """User and system seconds of this process."""
    times = os.times()
    return times.user + times.system


def _bound(rates: list[Rate], *, local: bool) -> tuple[str, str]:
    """What limits GET at its best: the latency of requests, the client's processor, or the backend."""
    best = max((r for r in rates if r.more.get("verb") == "GET"), key=lambda r: r.gb_s)
    curve = _curve(rates, "GET", best.more["MiB"])
    *_, before, top = (0, 0, *sorted(curve))
    own = best.more["client cores"]
    why = f"best is {best.what} with {best.gb_s:.3g} GB/s on {own:.2g} of {os.cpu_count()} cores"
    if before and curve[top] >= RISING * curve[before]:
        return "latency", f"{why}; more requests at once may give more"
    if best.of_ceiling >= MEMORY:
        return "memory", f"{why}; that is {best.of_ceiling:.0%} of a memory copy"
    if own >= BUSY * (os.cpu_count() or 1):
        return "processor", f"{why}; the client itself is what is slow"
    return ("disk" if local else "server or network"), f"{why}; more requests at once give no more"
