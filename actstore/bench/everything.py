"""All benchmarks one after the other, on one store of synthetic rows: `actstore bench all`."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import actstore
from actstore import console
from actstore.bench.codec import bench_codec
from actstore.bench.peers import bench_peers
from actstore.bench.read import bench_read
from actstore.bench.report import Report, activations_like, scratch, show
from actstore.bench.storage import CONCURRENCY, SIZES, bench_storage
from actstore.bench.write import BLOCK_ROWS, bench_write
from actstore.store.format.bfloat16 import NATIVE as BFLOAT16

SITE = "bench.0"


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured."""

    rows: int
    """Of the store that is read."""
    peer_rows: int
    bucket_rows: int
    gb: float
    """GB of a write."""
    seconds: float
    """Of each loader."""
    rounds: int
    sizes: tuple[float, ...]
    concurrency: tuple[int, ...]
    cell_s: float
    install: bool
    """Whether missing environments of peers are made."""


FULL = Effort(
    rows=458_752,
    peer_rows=458_752,
    bucket_rows=1 << 16,
    gb=2.4,
    seconds=10.0,
    rounds=5,
    sizes=SIZES,
    concurrency=CONCURRENCY,
    cell_s=1.0,
    install=True,
)
QUICK = Effort(
    rows=131_072,
    peer_rows=32_768,
    bucket_rows=1 << 15,
    gb=0.3,
    seconds=4.0,
    rounds=2,
    sizes=(1.0, 8.0),
    concurrency=(1, 4, 16),
    cell_s=0.3,
    install=False,
)


def bench_all(
    out: Path,
    *,
    url: str | None = None,
    d: int = 2304,
    quick: bool = False,
    environments: Path = Path(".peers"),
    suffix: str = "png",
) -> dict[str, Any]:
    """Run every benchmark below `url` (default a temporary directory); `out` gets `all.json` and a plot of each.

    Returns what `all.json` holds.
    """
    effort = QUICK if quick else FULL
    found: dict[str, Report] = {}
    figures: dict[str, Any] = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="actstore-bench-") as folder, scratch(url or folder) as storage:
        for name, run in _runs(storage.url, d, effort, environments):
            report = run()
            found[name] = replace(report, command=report.command.replace(storage.url, url or "DIR"))
            show(found[name], plot=out / f"{name}.{suffix}")
            reports = {n: asdict(r) for n, r in found.items()}
            figures = {"quick": quick, "seconds": round(time.perf_counter() - began, 1), "reports": reports}
            console.write_json(out / "all.json", figures)
    print(f"all took {figures['seconds']:.0f} s; figures and plots are in {out}")
    return figures


def _runs(url: str, d: int, effort: Effort, environments: Path) -> Iterator[tuple[str, Callable[[], Report]]]:
    yield "codec", lambda: bench_codec(d=d, rounds=effort.rounds)
    yield "write", lambda: bench_write(f"{url}/write", d=d, gb=effort.gb, rounds=effort.rounds)
    _make_store(f"{url}/store", effort, d)
    yield "read", lambda: bench_read(f"{url}/store", seconds=effort.seconds, rounds=effort.rounds)
    yield (
        "storage",
        lambda: bench_storage(f"{url}/raw", sizes=effort.sizes, concurrency=effort.concurrency, seconds=effort.cell_s),
    )
    yield (
        "peers",
        lambda: bench_peers(
            rows=effort.peer_rows,
            d=d,
            seconds=effort.seconds / 2,
            rounds=1 if not effort.install else 3,
            environments=environments,
            install=effort.install,
        ),
    )


def _make_store(url: str, effort: Effort, d: int) -> None:
    """A finished bf16 store of one site, to read."""
    block = activations_like(min(BLOCK_ROWS, effort.bucket_rows), d).view(BFLOAT16)
    with actstore.create(url, sites={SITE: d}, rows=effort.rows, bucket_rows=effort.bucket_rows) as writer:
        while writer.next_row < effort.rows:
            writer.append({SITE: block})
