"""The plan of a reading: what fixes its order, what it needs in memory, and how both are checked beforehand."""

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from actstore.errors import StreamError
from actstore.store.read.store import Store
from actstore.store.storage import LocalStorage
from actstore.stream.filter import RowFilter
from actstore.stream.order import ORDER_VERSION, Geometry

REMOTE_REQUESTS = 16
"""Concurrent requests to an object store; in-region S3 saturates at about 32 (insitubatch's measurements)."""
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
        return max(1, self.shuffle_chunks // self.streams) if self.shuffle else 1

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
    """Batches of an epoch over `rows` rows."""
    share = plan.batch_size // plan.streams
    if plan.drop_last:
        return rows // plan.streams // share
    longest = (rows + plan.streams - 1) // plan.streams
    return (longest + share - 1) // share


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Sizes that decide how much memory a rank's pipeline takes."""

    chunk: int
    """Decoded bytes of a chunk, all arrays."""
    batch: int
    """Bytes of this rank's batch."""
    streams: int
    """Streams of this rank."""
    mixed: int
    """Chunks that must be in memory at a time."""
    wrapped: int
    """Further chunks that an epoch needs at its beginning and at its end."""
    chunks: int
    """Chunks of an epoch on this rank."""


def needs(plan: Plan, geometry: Geometry, world: int, *, chunk: int, row: int) -> Needs:
    """Sizes of a rank's pipeline, for chunks of so many decoded bytes and delivered rows of so many."""
    mine = plan.streams // world
    each = geometry.buckets * geometry.chunks_per_bucket // plan.streams + len(geometry.short) + 1
    mixed = min(plan.mix, each)
    return Needs(
        chunk=chunk,
        batch=row * (plan.batch_size // world),
        streams=mine,
        mixed=mine * mixed,
        wrapped=mine * (min(2 * plan.mix - 1, each) - mixed),
        chunks=mine * each,
    )


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How the memory is used."""

    buffers: int
    keep: bool
    """Whether chunks that are needed at both ends of an epoch stay."""
    memory: int
    """Bytes, with batches and reads under way."""


def fit(needs: Needs, *, workers: int, fetchers: int, prefetch: int, budget: int | None) -> Fit:
    """Buffers for chunks; ValueError if the budget (bytes) can't hold what must be there."""
    n = needs
    # batches: waiting, being made, being used; reads: one a fetcher or worker, and one a worker that waits
    other = (prefetch + 2) * n.batch + (fetchers + workers) * n.chunk
    # streams of equal slots all begin their next chunk in the same step
    ahead = n.streams + 2 * workers + fetchers
    most = n.chunks + 1
    least = min(n.mixed + 1, most)
    if budget is None:
        keep = n.wrapped > WORTH_KEEPING * n.chunks
        buffers = min(n.mixed + keep * n.wrapped + ahead, most)
        return Fit(buffers=buffers, keep=keep, memory=other + buffers * n.chunk)
    room = (budget - other) // n.chunk
    if room < least:
        raise ValueError(
            f"memory_budget {budget} is too small: {least} chunks of {n.chunk} bytes and {other} bytes of batches and "
            f"reads need {other + least * n.chunk}; lower shuffle_chunks, prefetch, max_inflight or batch_size"
        )
    keep = room >= min(n.mixed + n.wrapped + 1, most)
    buffers = min(room, n.mixed + keep * n.wrapped + 2 * ahead, most)
    return Fit(buffers=buffers, keep=keep, memory=other + buffers * n.chunk)


def pool_threads(store: Store, threads: int | None, max_inflight: int | None) -> tuple[int, int]:
    """Workers, and fetchers (0: the workers read; a local directory answers at once)."""
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}, expected at least 1")
    if max_inflight is not None and max_inflight < 1:
        raise ValueError(f"max_inflight is {max_inflight}, expected at least 1")
    local = isinstance(store.storage, LocalStorage)
    return threads or cores(), max_inflight or (0 if local else REMOTE_REQUESTS)


def cores() -> int:
    """Cores that this process may use, shared out among the ranks that torchrun started on this machine."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, mine // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
