"""The loader against its limits: python benchmarks/loader.py [--only PART,...] [--dir DIR].

Parts: rates (decode, gather and reading of chunks alone, then the loader; formats; shuffle; a memory map), remote
(SeaweedFS and fake-gcs-server on loopback), latency (first batch, resume), memory (peak and growth over 100,000
steps), small (state, pickle, a plan for 20 PiB). d = 2304, 2.1 GB decoded, rows with the entropy of activations, warm
page cache, memory reused from an epoch before. Each round measures everything once; ratios are taken within rounds.
Writes loader.json and loader.md, replacing only the parts that ran.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import stores
import torch

import actstore
from actstore.bench import activations_like, machine
from actstore.console import figure
from actstore.store.format import codec
from actstore.store.maintain.copy import copy
from actstore.store.read.store import Store, open_store
from actstore.stream import Settings
from actstore.stream.columns import RAW
from actstore.stream.gather import gather
from actstore.stream.memory import addresses
from actstore.stream.order import Geometry, StreamOrder

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
import servers  # noqa: E402  the tests' servers

SITE, D, ROWS, BATCH = "resid_post.12", 2304, 458_752, 4096
ROUNDS = 7
CHUNKS = 64
THREADS = len(os.sched_getaffinity(0))
FORMATS = {"bf16": ("bf16", "planes"), "fixed": ("fixed:1e-3", "planes"), "none": ("bf16", "none")}


def make(url: Path, encoding: str, chain: codec.CodecName, *, d: int = D, rows: int = ROWS) -> None:
    """A store of `rows` rows, unless it is there."""
    stores.make(url, SITE, encoding, chain, d=d, rows=rows, bucket_rows=1 << 16)


def timed(work: Callable[[], int]) -> float:
    """GB/s of work that returns bytes."""
    began = time.perf_counter()
    moved = work()
    return moved / (time.perf_counter() - began) / 1e9


class Bare:
    """Stages of reading, each alone, on `THREADS` threads and on chunks spread over the store."""

    def __init__(self, store: Store, at_once: int) -> None:
        """Fetch so many chunks at a time."""
        self.store, self.where = store, store.index.arrays[SITE]
        present = np.argwhere(self.where.chunks > 0)
        chosen = present[np.linspace(0, len(present) - 1, CHUNKS).astype(int)]
        self.places = [self.where.locate(int(p), int(store.index.buckets[p]), int(c)) for p, c in chosen]
        self.stored = [self._get(i) for i in range(CHUNKS)]
        self.decoded = np.ones((CHUNKS, self.where.array.chunk_bytes), np.uint8)
        self.addresses = addresses(self.decoded)
        rng = np.random.default_rng(0)
        self.buffer, self.row = rng.integers(0, CHUNKS, BATCH), rng.integers(0, self.where.array.chunk_rows, BATCH)
        self.out = np.ones((4, BATCH, D), RAW[self.where.array.dtype.name])
        self.pool, self.getters = ThreadPoolExecutor(THREADS), ThreadPoolExecutor(at_once)

    def _get(self, i: int) -> bytes:
        at = self.places[i]
        return self.store.storage.get_range(at.key, at.offset, at.length)

    def decode(self) -> int:
        """Decoded bytes."""

        def one(i: int) -> None:
            array = self.where.array
            codec.decode_into(self.stored[i], array.codec, self.decoded[i], "x", committed=self.places[i].crc32c)

        list(self.pool.map(one, [*range(CHUNKS)] * 2))
        return 2 * self.decoded.nbytes

    def gather(self) -> int:
        """Gathered bytes."""

        def one(i: int) -> None:
            part = slice(i % 8 * 512, (i % 8 + 1) * 512)
            array, out = self.where.array, self.out[i // 8 % 4, part]
            steps = self.store.calibration(SITE) if SITE in self.store.index.calibration else None
            gather(self.addresses, self.buffer[part], self.row[part], out, array, steps)

        list(self.pool.map(one, range(64 * 8)))
        return 64 * BATCH * D * self.out.itemsize

    def fetch(self) -> int:
        """Decoded bytes of the chunks that are read, as many at a time as the loader does."""
        list(self.getters.map(self._get, [*range(CHUNKS)] * 2))
        return 2 * self.decoded.nbytes


def dataset(store: Any, **changes: Any) -> actstore.ActivationDataset:
    return actstore.ActivationDataset(
        store, sites=SITE, batch_size=BATCH, settings=Settings(threads=THREADS), **changes
    )


def epoch(ds: actstore.ActivationDataset) -> int:
    return sum(batch.nbytes for batch in ds)


def rounds(jobs: dict[str, Callable[[], int]], n: int = ROUNDS) -> list[dict[str, float]]:
    """GB/s of every job in every round, after one that warms up."""
    found = [{name: timed(job) for name, job in jobs.items()} for _ in range(n + 1)]
    return found[1:]


def median(found: list[dict[str, float]], ratio: Callable[[dict[str, float]], float]) -> float:
    return statistics.median(ratio(r) for r in found)


def together(r: dict[str, float], *stages: str) -> float:
    """The rate of stages that share the same threads."""
    return 1 / sum(1 / r[s] for s in stages)


def rates(folder: Path) -> dict[str, float]:
    stores: dict[str, Store] = {}
    for name, (encoding, chain) in FORMATS.items():
        make(folder / name, encoding, chain)  # type: ignore[arg-type]
        stores[name] = open_store(folder / name)
    bare = Bare(stores["bf16"], THREADS)
    sets = {name: dataset(store) for name, store in stores.items()}
    ordered = dataset(stores["bf16"], shuffle=False)
    raw = folder / "raw.npy"
    if not raw.exists():
        block = activations_like(1 << 15, D)
        whole = np.lib.format.open_memmap(raw, "w+", np.uint16, (ROWS, D))
        for i in range(0, ROWS, len(block)):
            whole[i : i + len(block)] = block[: ROWS - i]
        whole.flush()
        del whole
    mapped = torch.from_numpy(np.load(raw, mmap_mode="c"))
    order = torch.randperm(ROWS)

    def select() -> int:
        return sum(mapped.index_select(0, order[i : i + BATCH]).nbytes for i in range(0, ROWS - BATCH + 1, BATCH))

    jobs = {"decode": bare.decode, "gather": bare.gather, "fetch": bare.fetch, "select": select}
    jobs |= {f"loader {n}": lambda ds=ds: epoch(ds) for n, ds in sets.items()}
    jobs["loader in order"] = lambda: epoch(ordered)
    found = rounds(jobs)
    for ds in (*sets.values(), ordered):
        ds.close()
    return {f"{name}, GB/s": median(found, lambda r, n=name: r[n]) for name in jobs} | {
        "shuffled over decode + gather": median(found, lambda r: r["loader bf16"] / together(r, "decode", "gather")),
        "in stored order over decode + gather": median(
            found, lambda r: r["loader in order"] / together(r, "decode", "gather")
        ),
        "shuffled over read + decode + gather": median(
            found, lambda r: r["loader bf16"] / together(r, "decode", "gather", "fetch")
        ),
        "shuffle on over off": median(found, lambda r: r["loader bf16"] / r["loader in order"]),
        "fixed(1e-3) over lossless": median(found, lambda r: r["loader fixed"] / r["loader bf16"]),
        "uncompressed over index_select of a memory map": median(found, lambda r: r["loader none"] / r["select"]),
    }


def served(folder: Path) -> Any:
    """Both servers in turn: name, URL of a copy of the bf16 store."""
    make(folder / "bf16", "bf16", "planes")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        with servers.gcs(Path(scratch)) as gcs:
            os.environ[gcs.variable] = gcs.url
            url = gcs.fresh()
            copy(str(folder / "bf16"), url)
            yield "fake-gcs-server", url
        with servers.s3(Path(scratch)) as s3:
            os.environ.update(servers.AWS)
            os.environ[s3.variable] = s3.url
            url = s3.fresh()
            copy(str(folder / "bf16"), url)
            yield "SeaweedFS", url


def remote(folder: Path) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, url in served(folder):
        store = open_store(url)
        bare = Bare(store, 16)
        with dataset(store) as ds:
            found = rounds({"decode": bare.decode, "fetch": bare.fetch, "loader": lambda ds=ds: epoch(ds)}, 3)
            out[f"{name}: raw GET, 16 at once, GB/s decoded"] = median(found, lambda r: r["fetch"])
            out[f"{name}: loader, GB/s"] = median(found, lambda r: r["loader"])
            out[f"{name}: over the slower of raw GET and decode"] = median(
                found, lambda r: r["loader"] / min(r["fetch"], r["decode"])
            )
            out[f"{name}: over GET + decode, which share the cores"] = median(
                found, lambda r: r["loader"] / together(r, "fetch", "decode")
            )
            out |= {f"{name}: {k}": v for k, v in waits(ds).items()}
    return out


def waits(ds: actstore.ActivationDataset) -> dict[str, float]:
    """Seconds to the first batch with warm connections, and to the next one after resuming anywhere."""
    epoch(ds)
    first, resumed = [], []
    rng = random.Random(0)  # noqa: S311  which steps are resumed
    for _ in range(5):
        ds.set_epoch(ds.epoch + 1)
        began = time.perf_counter()
        next(iter(ds))
        first.append(time.perf_counter() - began)
        state = ds.state_dict() | {"step": rng.randrange(1, len(ds))}
        ds.load_state_dict(state)
        began = time.perf_counter()
        next(iter(ds))
        resumed.append(time.perf_counter() - began)
    return {"first batch, s, worst of 5": max(first), "batch after resuming, s, worst of 5": max(resumed)}


def latency(folder: Path) -> dict[str, float]:
    make(folder / "bf16", "bf16", "planes")
    with dataset(str(folder / "bf16")) as ds:
        return waits(ds)


SOAK = """
import resource, sys, psutil, actstore, actstore.stream
url, budget, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
me = psutil.Process()
imported = me.memory_info().rss
ds = actstore.ActivationDataset(url, sites="resid_post.12", batch_size=4096 if budget > 5e8 else 64,
                                settings=actstore.stream.Settings(memory_budget=budget))
done, seen = 0, []
while done < steps:
    for batch in ds:
        done += 1
        if done % max(steps // 20, 1) == 0:
            seen.append(me.memory_info().rss)
        if done == steps:
            break
print(imported, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, seen[len(seen) // 4], seen[-1])
"""


def memory(folder: Path) -> dict[str, float]:
    make(folder / "bf16", "bf16", "planes")
    make(folder / "narrow", "bf16", "planes", d=256, rows=1 << 19)
    out: dict[str, float] = {}
    for name, budget, steps in (("bf16", 1_500_000_000, 1000), ("narrow", 200_000_000, 100_000)):
        command = [sys.executable, "-c", SOAK, str(folder / name), str(budget), str(steps)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        imported, peak, early, late = map(int, said)
        what = f"{steps:,} steps, budget {budget / 1e9:g} GB"
        out[f"{what}: imports, GB"] = imported / 1e9
        out[f"{what}: peak RSS less budget, GB"] = (peak - budget) / 1e9
        out[f"{what}: growth from the first quarter to the end, GB"] = (late - early) / 1e9
    return out


def small(folder: Path) -> dict[str, float]:
    make(folder / "bf16", "bf16", "planes")
    ds = dataset(str(folder / "bf16"))
    calls = 10_000
    began = time.perf_counter()
    for _ in range(calls):
        ds.state_dict()
    state_s = (time.perf_counter() - began) / calls
    g = Geometry(chunk_rows=2048, chunks_per_bucket=512, buckets=10**7, short=((10**7 - 1, 1000),))
    plans: list[float] = []
    for i in range(20):
        began = time.perf_counter()
        o = StreamOrder(g, seed=i, epoch=1, streams=8, stream=3, mix=8, shuffle=True)
        t = o.slot_at(o.rows // 3)
        o.slot(t)
        plans.append(time.perf_counter() - began)
    return {
        "state_dict, bytes of JSON": float(len(json.dumps(ds.state_dict()))),
        "state_dict, microseconds": state_s * 1e6,
        "pickled dataset, bytes": float(len(pickle.dumps(ds))),
        "plan for 5 x 10^9 chunks, and a slot in its middle, ms": statistics.median(plans[1:]) * 1e3,
    }


PARTS: dict[str, Callable[[Path], dict[str, float]]] = {
    "rates": rates,
    "remote": remote,
    "latency": latency,
    "memory": memory,
    "small": small,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--dir", type=Path)
    options = parser.parse_args()
    record_file = HERE / "loader.json"
    record = json.loads(record_file.read_text()) if record_file.exists() else {}
    with tempfile.TemporaryDirectory(prefix="actstore-loader-") as scratch:
        folder = options.dir or Path(scratch)
        for name in options.only.split(","):
            figures = PARTS[name](folder)
            record[name] = {"figures": figures, "machine": machine()}
            for what, value in figures.items():
                print(f"{what:75} {value:.4g}", flush=True)
            record_file.write_text(json.dumps(record, indent=1) + "\n")
    lines = ["# loader", "", "`python benchmarks/loader.py`. Do not edit.", ""]
    for name in PARTS:
        if name in record:
            lines += [f"## {name}", "", "| | |", "|---|---|"]
            lines += [f"| {k} | {figure(v)} |" for k, v in record[name]["figures"].items()]
            lines += ["", ", ".join(f"{k} {v}" for k, v in record[name]["machine"].items()), ""]
    (HERE / "loader.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
