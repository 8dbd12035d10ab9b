"""The loader against its limits: python benchmarks/loader.py [--only PART ...] [--dir DIR] [--quick].

Parts, each a minute or two once `--dir` has its stores (12 GB with all of them):

    planes    shuffled over bare decode and gather, with crc32c in neither; in stored order; `fixed:1e-3`
    none      uncompressed and shuffled over torch.index_select of a memory map
    rows      with token ids and positions over without
    filter    a filter that 90% of the rows pass over none, by rows delivered
    python    processor time of a chunk when fetch, decode and gather are replaced by nothing
    first     seconds to the first batch of a store of 4 chunks, imports excluded; and to any batch after resuming
    memory    peak anonymous memory over the budget, and its growth over 100,000 steps
    remote    over the slower of raw GET and decode, on SeaweedFS and fake-gcs-server on loopback
    state     size and time of a state, a pickle, and a plan of 20 PiB

256 chunks of 2,048 rows, d = 2304, the entropy of activations; batches of 4,096 rows, a thread a core, a warm page
cache. Whole epochs are measured, the filling of the pool included, after one that warms up and checks every crc32c.
A round measures everything once; ratios are taken within rounds, and medians over rounds are reported. A ratio is of
rates, so 1.0 means that the loader costs nothing beyond what it is compared with.
"""

import argparse
import json
import os
import pickle
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import record
import stores
import torch
from record import HERE, Row

import actstore
from actstore.bench import activations_like
from actstore.store import Store, open_store
from actstore.store.format import codec
from actstore.store.maintain.copy import copy
from actstore.stream import Settings
from actstore.stream.columns import columns_of
from actstore.stream.order import Geometry, StreamOrder
from actstore.stream.stages import Stages

sys.path.insert(0, str(HERE.parent / "tests"))
import servers

SITE, BATCH, CHUNKS = "resid_post.12", 4096, 64
"""Chunks that the bare stages work on, as many as the loader mixes."""
THREADS = len(os.sched_getaffinity(0))
REMOTE_FETCHERS = 16


class Cost(NamedTuple):
    """Seconds of work on a GB of activations."""

    wall: float
    processor: float

    def then(self, other: "Cost") -> "Cost":
        """The cost of both one after the other."""
        return Cost(self.wall + other.wall, self.processor + other.processor)


Round = dict[str, Cost]


def width(args: argparse.Namespace) -> int:
    return 64 if args.quick else 2304


def rows_of(args: argparse.Namespace) -> int:
    return 1 << 16 if args.quick else 1 << 19


def store(args: argparse.Namespace, encoding: str, chain: codec.CodecName = "planes") -> Store:
    """A store of the part's rows; it is made unless it is there."""
    url = args.dir / f"{encoding}-{chain}-{width(args)}".replace(":", "-")
    bucket_rows = rows_of(args) // 8
    stores.make(url, SITE, encoding, chain, d=width(args), rows=rows_of(args), bucket_rows=bucket_rows)
    return open_store(url)


def dataset(source: Store, **options: Any) -> actstore.ActivationDataset:
    settings = Settings(threads=THREADS)
    return actstore.ActivationDataset(source, sites=SITE, batch_size=BATCH, settings=settings, **options)


def bare(source: Store, fetchers: int = THREADS) -> Stages:
    columns = columns_of(source, (SITE,), (), dtype=None, factors={})
    return Stages(columns, num_chunks=CHUNKS, batch_rows=BATCH, threads=THREADS, fetchers=fetchers)


def epoch(data: actstore.ActivationDataset) -> int:
    """Read one epoch; returns the bytes of its activations."""
    return sum((batch[SITE] if isinstance(batch, Mapping) else batch).nbytes for batch in data)


def measured(jobs: dict[str, Callable[[], int]], rounds: int) -> list[Round]:
    """What every job costs in every round, after a round that warms up."""

    def cost(work: Callable[[], int]) -> Cost:
        wall, processor = time.perf_counter(), time.process_time()
        gb = work() / 1e9
        return Cost((time.perf_counter() - wall) / gb, (time.process_time() - processor) / gb)

    return [{name: cost(work) for name, work in jobs.items()} for _ in range(rounds + 1)][1:]


def epochs_of(**data: actstore.ActivationDataset) -> dict[str, Callable[[], int]]:
    return {name: lambda ds=ds: epoch(ds) for name, ds in data.items()}


def compared(what: str, rounds: list[Round], ours: str, limit: Callable[[Round], Cost]) -> Row:
    """Our rate over the limit's, by the clock and by processor time, and our GB/s."""
    return {
        "what": what,
        "ratio": statistics.median(limit(r).wall / r[ours].wall for r in rounds),
        "ratio in processor time": statistics.median(limit(r).processor / r[ours].processor for r in rounds),
        "GB/s": statistics.median(1 / r[ours].wall for r in rounds),
        "limit, GB/s": statistics.median(1 / limit(r).wall for r in rounds),
    }


def planes(args: argparse.Namespace) -> list[Row]:
    """Decode and gather share the loader's threads, so their limit is that of both one after the other."""
    source, lossy = store(args, "bf16"), store(args, "fixed:1e-3")
    stages = bare(source)
    with dataset(source) as shuffled, dataset(source, shuffle=False) as ordered, dataset(lossy) as fixed:
        jobs = {"decode": stages.decode, "gather": stages.gather}
        found = measured(jobs | epochs_of(shuffled=shuffled, ordered=ordered, fixed=fixed), args.rounds)

    def limit(r: Round) -> Cost:
        return r["decode"].then(r["gather"])

    return [
        compared("shuffled over bare decode + gather", found, "shuffled", limit),
        compared("in stored order over bare decode + gather", found, "ordered", limit),
        compared("shuffled over stored order", found, "shuffled", lambda r: r["ordered"]),
        compared("fixed:1e-3 over bf16, shuffled", found, "fixed", lambda r: r["shuffled"]),
    ]


def none(args: argparse.Namespace) -> list[Row]:
    """Rows of an .npy map are selected in a random order of the whole epoch, into batches that are allocated once."""
    file, rows, d = args.dir / f"rows-{width(args)}.npy", rows_of(args), width(args)
    if not file.exists():
        block = activations_like(min(1 << 15, rows), d)
        whole = np.lib.format.open_memmap(file, "w+", np.uint16, (rows, d))
        for start in range(0, rows, len(block)):
            whole[start : start + len(block)] = block
        whole.flush()
    mapped = torch.from_numpy(np.load(file, mmap_mode="c").view(np.int16))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    out = [torch.empty(BATCH, d, dtype=torch.int16) for _ in range(4)]
    torch.set_num_threads(THREADS)

    def select() -> int:
        for i in range(rows // BATCH):
            torch.index_select(mapped, 0, order[i * BATCH : (i + 1) * BATCH], out=out[i % len(out)])
        return rows // BATCH * out[0].nbytes

    with dataset(store(args, "bf16", "none")) as data:
        found = measured({"select": select, **epochs_of(loader=data)}, args.rounds)
    return [compared("shuffled over index_select of a memory map", found, "loader", lambda r: r["select"])]


def rows(args: argparse.Namespace) -> list[Row]:
    """`with_rows=True` also delivers sequence, position and token id; rates are of the activations alone."""
    source = store(args, "bf16")
    with dataset(source) as plain, dataset(source, with_rows=True) as more:
        found = measured(epochs_of(plain=plain, more=more), args.rounds)
    return [compared("with_rows over without", found, "more", lambda r: r["plain"])]


def filtered(args: argparse.Namespace) -> list[Row]:
    """`drop_tokens` drops a tenth of the rows. Every chunk is decoded all the same, so 0.9 of a decode is lost."""
    source = store(args, "bf16")
    with dataset(source) as plain, dataset(source, drop_tokens=(0,)) as fewer:
        passed = len(fewer) / len(plain)
        found = measured(epochs_of(plain=plain, fewer=fewer), args.rounds)
    row = compared("a filter over none", found, "fewer", lambda r: r["plain"])
    return [{**row, "batches over batches without": passed}]


def python(args: argparse.Namespace) -> list[Row]:
    """Maps, decoding and gathering do nothing: planning, bookkeeping and the order of rows remain."""
    source, found = store(args, "bf16"), list[Row]()
    stages = bare(source)
    native = ("actstore.stream.maps._bring_in", "actstore.stream.memory.gather")
    with dataset(source) as plain, dataset(source, with_rows=True) as more:
        for what, data in (("site alone", plain), ("with_rows", more)):
            epoch(data)
            alone = measured({"decode": stages.decode, "gather": stages.gather}, args.rounds)
            chunk_gb = source.spec.chunk_rows * width(args) * 2 / 1e9
            of = statistics.median(r["decode"].then(r["gather"]).processor * chunk_gb for r in alone)
            with ExitStack() as nothing:
                for name in native:
                    nothing.enter_context(patch(name, lambda *_, **__: None))
                nothing.enter_context(patch.object(codec, "decode_payload", lambda *_: None))
                chunks, began = data.stats()["chunks"], time.process_time()
                for _ in range(args.rounds):
                    epoch(data)
                spent = (time.process_time() - began) / (data.stats()["chunks"] - chunks)
            found.append({"what": what, "processor ms per chunk": 1e3 * spent, "over decode + gather": spent / of})
    return found


FIRST = """
import sys, time
from actstore import ActivationDataset
began = time.perf_counter()
with ActivationDataset(sys.argv[1], sites=sys.argv[2], batch_size=4096) as data:
    next(iter(data))
    print(time.perf_counter() - began)
"""


def first(args: argparse.Namespace) -> list[Row]:
    """A process each for the store of 4 chunks: opening it, planning, and the first batch of 4,096 rows."""
    url, small = args.dir / f"four-{width(args)}", 4 << 11
    stores.make(url, SITE, "bf16", "planes", d=width(args), rows=small, bucket_rows=small)
    command = [sys.executable, "-c", FIRST, str(url), SITE]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(args.rounds + 1)]
    fresh = [float(done.stdout) for done in runs[1:]]
    with dataset(store(args, "bf16")) as data:
        return [_waited("first batch of 4 chunks, a new process", fresh), *waits(data)]


def waits(data: actstore.ActivationDataset) -> list[Row]:
    """Seconds to the first batch of an epoch that is not the first, and to the next one after resuming anywhere."""
    epoch(data)
    began_epoch, resumed = list[float](), list[float]()
    rng = random.Random(0)  # noqa: S311  which steps are resumed

    def seconds() -> float:
        began = time.perf_counter()
        next(iter(data))
        return time.perf_counter() - began

    for _ in range(5):
        data.set_epoch(data.epoch + 1)
        began_epoch.append(seconds())
        data.load_state_dict(data.state_dict() | {"step": rng.randrange(1, len(data))})
        resumed.append(seconds())
    return [_waited("first batch of an epoch", began_epoch), _waited("batch after resuming", resumed)]


def _waited(what: str, seconds: list[float]) -> Row:
    return {"what": what, "s, median": statistics.median(seconds), "s, worst": max(seconds)}


SOAK = """
import re, sys, threading, time
from pathlib import Path
from actstore import ActivationDataset
from actstore.stream import Settings

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def watch():
    while True:
        peak.append(max(peak.pop(), anonymous()))
        time.sleep(0.02)

url, site, budget, steps, batch_size = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
imported = anonymous()
peak, seen = [imported], []
threading.Thread(target=watch, daemon=True).start()
with ActivationDataset(url, sites=site, batch_size=batch_size, settings=Settings(memory_budget=budget)) as data:
    done = 0
    while done < steps:
        for batch in data:
            done += 1
            if done % (steps // 20) == 0:
                seen.append(anonymous())
            if done == steps:
                break
print(imported, peak[0], seen[len(seen) // 4], seen[-1])
"""


def memory(args: argparse.Namespace) -> list[Row]:
    """Anonymous memory is sampled 50 times a second; pages of mapped files are not in it. Growth is after a quarter."""
    narrow, shorter = args.dir / "narrow", 50 if args.quick else 1
    stores.make(narrow, SITE, "bf16", "planes", d=256, rows=1 << 19, bucket_rows=1 << 16)
    wide = (store(args, "bf16").url, 1_500_000_000, 1000 // shorter, BATCH)
    found: list[Row] = []
    for url, budget, steps, batch_size in ((narrow, 200_000_000, 100_000 // shorter, 64), wide):
        command = [sys.executable, "-c", SOAK, url, SITE, budget, steps, batch_size]
        done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
        imported, peak, early, late = map(int, done.stdout.split())
        row = {"steps": steps, "rows a batch": batch_size, "budget MB": budget / 1e6, "imports MB": imported / 1e6}
        row |= {"peak over budget": peak / budget, "less imports": (peak - imported) / budget}
        found.append({**row, "growth MB": (late - early) / 1e6})
    return found


def remote(args: argparse.Namespace) -> list[Row]:
    """The servers run on the loader's cores. GET asks for 16 chunks at a time, as the loader does."""
    found: list[Row] = []
    for name, url in served(args):
        source = open_store(url)
        stages = bare(source, REMOTE_FETCHERS)
        with dataset(source) as data:
            jobs = {"fetch": stages.fetch, "decode": stages.decode, **epochs_of(loader=data)}
            measures = measured(jobs, args.rounds)
            slower = compared(f"{name}: over the slower of raw GET and decode", measures, "loader", _slower)
            both = compared(f"{name}: over both in turn", measures, "loader", lambda r: r["fetch"].then(r["decode"]))
            found += [slower, both, *({**row, "what": f"{name}: {row['what']}"} for row in waits(data))]
    return found


def _slower(r: Round) -> Cost:
    return max(r["fetch"], r["decode"])


def served(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Both servers in turn: name, and URL of a copy of the bf16 store."""
    os.environ.update(servers.AWS)
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        for name, server in (("SeaweedFS", servers.s3), ("fake-gcs-server", servers.gcs)):
            with server(Path(scratch)) as running:
                os.environ[running.variable] = running.url
                url = running.fresh()
                copy(store(args, "bf16").url, url)
                yield name, url


def state(args: argparse.Namespace) -> list[Row]:
    """The plan is of 5 x 10^9 chunks; timed is its making, with a slot in its middle."""
    calls, plans = 10_000, list[float]()
    geometry = Geometry(chunk_rows=2048, chunks_per_bucket=512, buckets=10**7, short=((10**7 - 1, 1000),))
    for seed in range(20):
        began = time.perf_counter()
        order = StreamOrder(geometry, seed=seed, epoch=1, streams=8, stream=3, mix=8, shuffle=True)
        order.slot(order.slot_at(order.rows // 3))
        plans.append(time.perf_counter() - began)
    with dataset(store(args, "bf16")) as data:
        began = time.perf_counter()
        for _ in range(calls):
            data.state_dict()
        figures = {
            "state_dict, bytes of JSON": len(json.dumps(data.state_dict())),
            "state_dict, microseconds": (time.perf_counter() - began) / calls * 1e6,
            "pickled dataset, bytes": len(pickle.dumps(data)),
            "plan of 20 PiB, ms": statistics.median(plans[1:]) * 1e3,
        }
    return [{"what": what, "value": value} for what, value in figures.items()]


PARTS = {
    "planes": planes,
    "none": none,
    "rows": rows,
    "filter": filtered,
    "python": python,
    "first": first,
    "memory": memory,
    "remote": remote,
    "state": state,
}

if __name__ == "__main__":
    record.main(__file__, PARTS, record.parser(__doc__))
