"""The plan of a reading: what fixes its order, what it needs in memory, and how both are checked beforehand."""

import contextlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actstore.errors import StreamError
from actstore.store.read.store import Store
from actstore.store.storage import LocalStorage
from actstore.stream.filter import RowFilter
from actstore.stream.order import ORDER_VERSION, Geometry
from actstore.stream.residency import peak
from actstore.stream.settings import Settings

REMOTE_REQUESTS = 16
"""Concurrent requests to an object store; in-region S3 saturates at about 32 (insitubatch's measurements)."""
WEIGHT_ERROR = 1e-3
"""By which weights may miss 1: three digits are what one writes."""
WORTH_KEEPING = 0.05
"""Share of an epoch's reads that must be saved for the chunks that an epoch needs at both ends to stay in memory."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that fixes a reading order, epoch and position aside."""

    store: str
    """Fingerprint of the store's committed content."""
    sites: tuple[str, ...]
    seed: int
    batch_size: int
    streams: int
    shuffle_chunks: int
    shuffle: bool
    drop_last: bool
    where: RowFilter
    order_version: int = ORDER_VERSION

    @property
    def mix(self) -> int:
        """Chunks that each stream mixes (K / S)."""
        return self.shuffle_chunks // self.streams if self.shuffle else 1

    def to_json(self) -> dict[str, Any]:
        """JSON values; filters only where there are any."""
        found = json.loads(json.dumps(asdict(self)))
        if not self.where:
            del found["where"]
        return found


def check(plan: Plan, store: Store, world: int) -> None:
    """Raise ValueError for what can't be carried out, with the numbers and the nearest value that works."""
    p = plan
    for site in p.sites:
        store.check_site(site)
    if not p.sites or len(set(p.sites)) != len(p.sites):
        raise ValueError(f"sites are {p.sites}, expected one or more different ones")
    if p.streams < 1 or p.streams % world:
        divisors = [w for w in range(1, p.streams + 1) if p.streams % w == 0]
        raise ValueError(f"world size {world} does not divide streams={p.streams}; use one of {divisors}")
    if p.batch_size < 1 or p.batch_size % p.streams:
        up = max(1, -(-p.batch_size // p.streams)) * p.streams
        raise ValueError(f"batch_size {p.batch_size} is not a multiple of streams={p.streams}; the next is {up}")
    if p.shuffle_chunks < 1:
        raise ValueError(f"shuffle_chunks is {p.shuffle_chunks}, expected at least 1")
    if p.shuffle and p.shuffle_chunks % p.streams:
        near = max(1, round(p.shuffle_chunks / p.streams)) * p.streams
        raise ValueError(f"shuffle_chunks {p.shuffle_chunks} is not a multiple of streams={p.streams}; use {near}")


def check_rows(plan: Plan, rows: int) -> None:
    """ValueError if not even one batch can be made of so many rows."""
    most = rows // plan.streams * plan.streams
    if plan.batch_size > most:
        kind = "rows that pass the filter" if plan.where else "committed rows"
        remedy = f"use at most {most}" if most else f"use fewer than streams={plan.streams} streams"
        raise ValueError(f"batch_size {plan.batch_size} is more than the {rows} {kind}; {remedy}")


def geometry_of(store: Store) -> Geometry:
    """The committed rows, as far as their order is concerned."""
    spec = store.spec
    if not len(store.index.buckets):
        raise StreamError(f"{store.url} has no committed bucket yet; let a capture finish one")
    sizes = spec.bucket_sizes(store.index.buckets)
    short = [(int(place), int(sizes[place])) for place in (sizes < spec.bucket_rows).nonzero()[0]]
    return Geometry(
        chunk_rows=spec.chunk_rows,
        chunks_per_bucket=spec.bucket_rows // spec.chunk_rows,
        buckets=len(store.index.buckets),
        short=tuple(short),
    )


def steps(plan: Plan, rows: int) -> int:
    """Batches of an epoch over `rows` rows.

    Without `drop_last` the last one takes what is left. It has rows of every stream, so that no rank's is empty:
    fewer rows than there are streams join the batch before.
    """
    each, share = rows // plan.streams, plan.batch_size // plan.streams
    return each // share if plan.drop_last else -(-each // share)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Sizes that decide how much memory a rank's pipeline takes."""

    chunk: int
    """Decoded bytes of a chunk, all arrays that are not used where they lie."""
    read: int
    """Bytes that a request or read takes until they are decoded."""
    batch: int
    """Bytes of this rank's largest batch."""
    least: int
    """Chunks that must be in memory at a time."""
    kept: int
    """The same, if those that an epoch needs at both ends stay."""
    streams: int
    """Streams of this rank."""
    chunks: int
    """Chunks of an epoch on this rank."""


def chunks_needed(plan: Plan, pieces: Sequence[int], filtered: int | None) -> tuple[int, int]:
    """`least` and `kept` of `Needs`, for streams of so many pieces.

    With a filter an epoch deals the chunks out in its own way, so all `filtered` chunks may count for each stream.
    """
    most = pieces if filtered is None else [filtered] * len(pieces)
    least, kept = (sum(peak(n, plan.mix, keep=keep) for n in most) for keep in (False, True))
    return least, kept


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How the memory of one store's chunks is used."""

    buffers: int
    keep: bool
    """Whether chunks that are needed at both ends of an epoch stay."""


def fit(
    needs: Sequence[Needs], *, workers: int, fetchers: int, prefetch: int, budget: int | None
) -> tuple[list[Fit], int]:
    """Buffers for the chunks of each store of a dataset, and the bytes of everything, batches and reads included.

    ValueError if the budget (bytes) can't hold what must be there.
    """
    # batches: waiting, being made, being used; reads: one a fetcher or worker, and one a worker that waits
    other = (prefetch + 2) * sum(n.batch for n in needs) + (fetchers + workers) * max(n.read for n in needs)
    least = sum(n.least * n.chunk for n in needs)
    if budget is not None and budget < other + least:
        raise ValueError(
            f"memory_budget {budget} is too small: {sum(n.least for n in needs)} chunks ({least} bytes), batches and "
            f"reads ({other} bytes) need {other + least}; lower shuffle_chunks, prefetch, max_inflight or batch_size"
        )
    found: list[Fit] = []
    for n in needs:
        # streams of equal slots all begin their next chunk in the same step
        ahead, most = n.streams + 2 * workers + fetchers, max(n.chunks, n.kept)
        keep = n.kept - n.least > WORTH_KEEPING * n.chunks
        if budget is not None and n.chunk:
            room = n.least + (budget - other - least) * n.least // max(least, 1)
            keep = room >= n.kept
            buffers = min(room, (n.kept if keep else n.least) + 2 * ahead, most)
        else:
            buffers = min((n.kept if keep else n.least) + ahead, most)
        found.append(Fit(buffers=buffers, keep=keep))
    return found, other + sum(f.buffers * n.chunk for f, n in zip(found, needs, strict=True))


def pool_threads(stores: Sequence[Store], settings: Settings) -> tuple[int, int]:
    """Workers, and fetchers (0: the workers read; a local directory answers at once)."""
    local = all(isinstance(store.owner(site).storage, LocalStorage) for store in stores for site in store.sites)
    return settings.threads or cores(), settings.max_inflight or (0 if local else REMOTE_REQUESTS)


def shares(weights: Sequence[float], batch_size: int, streams: int) -> list[int]:
    """Rows of each store in a batch: its weight of them, as nearly as whole rows of each stream allow.

    ValueError for weights that don't sum to 1, or one that no row is left for.
    """
    if not all(math.isfinite(w) and w > 0 for w in weights) or abs(sum(weights) - 1) > WEIGHT_ERROR:
        fitting = ", ".join(f"{w / sum(weights):.4g}" for w in weights) if sum(weights) > 0 else "positive numbers"
        raise ValueError(f"the weights {list(weights)} sum to {sum(weights):.6g}, expected 1: {fitting}")
    each = batch_size // streams
    found = [math.floor(w * each) for w in weights]
    for i in sorted(range(len(weights)), key=lambda i: found[i] - weights[i] * each)[: each - sum(found)]:
        found[i] += 1
    if 0 in found:
        needed = math.ceil(1 / min(weights)) * streams
        raise ValueError(
            f"a batch of {batch_size} rows in streams={streams} has none of the store of weight {min(weights)}; use "
            f"batch_size={needed} or more"
        )
    return [n * streams for n in found]


def cores() -> int:
    """Cores that this process may use, shared out among the ranks that torchrun started on this machine."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    mine = math.ceil(min(mine, cpu_quota()))
    return max(1, mine // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Cores that the control groups of this process allow it (cgroup v2 `cpu.max`, v1 `cpu.cfs_quota_us`)."""
    allowed = math.inf
    try:
        groups = [line.split(":", 2) for line in own.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return allowed
    for _, controllers, name in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "cpu" if controllers else root
        here = top / name.lstrip("/")
        for folder in (here, *here.parents):
            if folder.is_relative_to(top):
                allowed = min(allowed, _quota(folder))
    return allowed


def _quota(folder: Path) -> float:
    """Cores that one control group allows."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return math.inf if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota, period = ((folder / f"cpu.cfs_{n}_us").read_text(encoding="utf-8") for n in ("quota", "period"))
        return math.inf if int(quota) < 0 else int(quota) / int(period)
    return math.inf
