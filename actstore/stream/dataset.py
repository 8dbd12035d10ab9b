"""`ActivationDataset`: shuffled batches of a store for any trainer.

Every batch is a pure function of (store, sites, seed, epoch, step): the same for any number of ranks that divides
`streams`, for any kill and resume, with or without a DataLoader. State is a few integers. Threads do the work; use it
bare or in `DataLoader(ds, batch_size=None)`, never with several worker processes.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from actstore.errors import StreamError, mismatch
from actstore.store.reader import Store, open_store
from actstore.store.spec import PROVENANCE_ARRAYS
from actstore.store.storage import LocalStorage
from actstore.stream.order import ORDER_VERSION, Geometry, StreamOrder
from actstore.stream.pipeline import Batch, Meter, Pipeline, Recycler

STATE_VERSION = 1
REMOTE_THREADS = 16
"""Concurrent requests to an object store; in-region S3 saturates at about 32 (insitubatch's measurements)."""


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
    order_version: int = ORDER_VERSION


class ActivationDataset(IterableDataset[Any]):
    """Batches of activations, shuffled, from a store.

    Yields `Tensor [B, d]` for one site, `dict[str, Tensor]` for several or with `with_rows`. bf16 and fixed sites come
    as bfloat16, f32 sites as float32; provenance as int32. Every tensor is fresh: change it as you like.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | Store,
        *,
        sites: str | Sequence[str],
        batch_size: int = 4096,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        with_rows: bool = False,
        streams: int = 8,
        shuffle_chunks: int = 64,
        rank: int | None = None,
        world_size: int | None = None,
        threads: int | None = None,
        memory_budget: int | None = None,
        prefetch: int = 4,
    ) -> None:
        """Plan the reading of a store; nothing but metadata is read yet.

        Args:
            url: the store, or an open one.
            sites: one site name or several (row-aligned).
            batch_size: rows of the global batch; each rank yields batch_size / world_size of them.
            seed: key of the order.
            epoch: first epoch; after the end of one iteration the next begins the next epoch.
            shuffle: False reads in stored order (which is itself shuffled within buckets).
            drop_last: leave out the last, short batch.
            with_rows: also yield `sequence`, `position` and `token_id` [B].
            streams: canonical streams S; world sizes that divide S see the same global order.
            shuffle_chunks: chunks mixed at any time, over all streams.
            rank, world_size: default from torch.distributed, else 0 of 1.
            threads: fetch-and-decode threads; default one a core for local stores, 16 for object stores.
            memory_budget: bytes for chunks and batches in memory; default what the plan needs plus read-ahead.
            prefetch: batches ready in advance.

        """
        super().__init__()
        self.store = url if isinstance(url, Store) else open_store(url)
        self.sites = (sites,) if isinstance(sites, str) else tuple(sites)
        self._single = isinstance(sites, str) and not with_rows
        self._rank, self._world = _distributed(rank, world_size)
        self._plan = Plan(
            store=self.store.fingerprint,
            sites=self.sites,
            seed=seed,
            batch_size=batch_size,
            streams=streams,
            shuffle_chunks=shuffle_chunks,
            shuffle=shuffle,
            drop_last=drop_last,
        )
        self._geometry = _geometry(self.store)
        self._check()
        self._mix = max(1, shuffle_chunks // streams) if shuffle else 1
        self._names = self.sites + (PROVENANCE_ARRAYS if with_rows else ())
        cores = os.cpu_count() or 1
        self._threads = threads or (cores if isinstance(self.store.storage, LocalStorage) else REMOTE_THREADS)
        self._prefetch = prefetch
        self._buffers = self._fit(memory_budget)
        self._epoch, self._step, self._resume = epoch, 0, False
        self._meter, self._recycler = Meter(), Recycler()
        self._pipeline: Pipeline | None = None
        self._pid = os.getpid()

    def _check(self) -> None:
        p = self._plan
        for site in p.sites:
            self.store.check_site(site)
        if not p.sites or len(set(p.sites)) != len(p.sites):
            raise ValueError(f"sites are {p.sites}, expected one or more different ones")
        if p.streams < 1 or p.streams % self._world:
            divisors = [w for w in range(1, p.streams + 1) if p.streams % w == 0]
            raise ValueError(f"world size {self._world} does not divide streams={p.streams}; use one of {divisors}")
        if p.batch_size < 1 or p.batch_size % p.streams:
            up = max(1, -(-p.batch_size // p.streams)) * p.streams
            raise ValueError(f"batch_size {p.batch_size} is not a multiple of streams={p.streams}; the next is {up}")
        if p.shuffle_chunks < 1:
            raise ValueError(f"shuffle_chunks is {p.shuffle_chunks}, expected at least 1")
        rows = self._geometry.rows
        if p.batch_size > rows // p.streams * p.streams:
            most = rows // p.streams * p.streams
            raise ValueError(f"batch_size {p.batch_size} is more than the {rows} committed rows; use at most {most}")

    def _fit(self, budget: int | None) -> int:
        """Chunks that the pool holds, within the memory budget."""
        chunk = sum(self.store.index.arrays[n].array.chunk_bytes for n in self._names)
        row = sum(self.store.index.arrays[n].array.row_bytes for n in self._names)
        needed = self._mix * (self._plan.streams // self._world)
        batches = (self._prefetch + 2) * row * (self._plan.batch_size // self._world)
        if budget is None:
            return needed + 2 * self._threads
        fixed = batches + self._threads * chunk
        if budget < fixed + (needed + 1) * chunk:
            raise ValueError(
                f"memory_budget {budget} is too small: {needed + 1} chunks of {chunk} bytes and {fixed} bytes of "
                f"batches and reads need {fixed + (needed + 1) * chunk}; lower shuffle_chunks, prefetch or batch_size"
            )
        return min((budget - fixed) // chunk, 2 * needed + 4 * self._threads)

    def __len__(self) -> int:
        """Batches of an epoch, the same on every rank."""
        p, rows = self._plan, self._geometry.rows
        share = p.batch_size // p.streams
        if p.drop_last:
            return rows // p.streams // share
        longest = -(-rows // p.streams)
        return (longest + share - 1) // share

    def _orders(self) -> dict[int, StreamOrder]:
        p = self._plan
        return {
            s: StreamOrder(
                self._geometry,
                seed=p.seed,
                epoch=self._epoch,
                streams=p.streams,
                stream=s,
                mix=self._mix,
                shuffle=p.shuffle,
            )
            for s in range(self._rank, p.streams, self._world)
        }

    def __iter__(self) -> Iterator[Any]:
        """One epoch, or the rest of one after `load_state_dict`; the epoch then advances."""
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise StreamError(
                f"num_workers is {worker.num_workers}; the loader has threads of its own, use num_workers=0"
            )
        if os.getpid() != self._pid:
            # Threads and most object-store clients do not survive a fork; start afresh in the child.
            self._pipeline, self._meter, self._recycler, self._pid = None, Meter(), Recycler(), os.getpid()
            self.store = open_store(self.store.url)
        self._stop()
        if not self._resume:
            self._step = 0
        self._resume = False
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        steps = len(self)
        pipeline = Pipeline(
            self.store,
            self._names,
            self._orders(),
            step=self._step,
            steps=steps,
            rows_per_step=self._plan.batch_size // self._plan.streams,
            threads=self._threads,
            buffers=self._buffers,
            prefetch=self._prefetch,
            meter=self._meter,
            recycler=self._recycler,
        )
        self._pipeline = pipeline
        try:
            while (batch := pipeline.next()) is not None:
                self._step += 1
                if self._step == steps:
                    self._epoch, self._step = self._epoch + 1, 0
                yield self._deliver(batch)
        finally:
            pipeline.close()

    def _deliver(self, batch: Batch) -> Any:
        tensors = {name: _tensor(batch[name], self._dtype(name)) for name in self._names}
        return tensors[self.sites[0]] if self._single else tensors

    def _dtype(self, name: str) -> str:
        return self.store.index.arrays[name].array.dtype.name

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration at the beginning of `epoch`; a no-op for the epoch that a loaded state is in."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}, expected 0 or more")
        if epoch != self._epoch:
            self._epoch, self._step, self._resume = epoch, 0, False

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self._epoch

    def state_dict(self) -> dict[str, Any]:
        """Position and plan, counted at yield: JSON values, under 1 kB."""
        return {
            "version": STATE_VERSION,
            "epoch": self._epoch,
            "step": self._step,
            "plan": {**asdict(self._plan), "sites": list(self.sites)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; `MismatchError` names every field of the plan that differs."""
        if state.get("version") != STATE_VERSION:
            raise StreamError(f"state version is {state.get('version')!r}, expected {STATE_VERSION}")
        here = self.state_dict()["plan"]
        if state["plan"] != here:
            remedy = "Open the dataset with the settings of the state, or start without it."
            raise mismatch("the reading plan of this state", state["plan"], here, remedy)
        epoch, step = state["epoch"], state["step"]
        if not isinstance(epoch, int) or not isinstance(step, int) or epoch < 0 or not 0 <= step < max(1, len(self)):
            raise StreamError(f"state is at epoch {epoch!r}, step {step!r}; an epoch has {len(self)} steps")
        self._stop()
        self._epoch, self._step, self._resume = epoch, step, True

    def stats(self) -> dict[str, float]:
        """Seconds by stage (summed over threads), bytes, chunks and batches since the dataset was made."""
        m = self._meter
        with m.lock:
            return {k: v for k, v in vars(m).items() if k != "lock"}

    def explain(self) -> dict[str, float | int | str]:
        """The plan in figures: steps, memory, and the design effect's factor.

        `pairs` is D - 1 over rho: how much correlation within a sequence inflates the variance of a batch gradient,
        (B - 1)(L - 1) / (W K) for B rows a batch, L kept rows a sequence, W rows a bucket, K chunks mixed
        (`docs/streaming.md`); L is the sequence length less BOS, where the store's provenance has it.
        """
        p, spec = self._plan, self.store.spec
        chunk = sum(self.store.index.arrays[n].array.chunk_bytes for n in self._names)
        mixed = self._mix * p.streams
        tokens = self.store.provenance.get("tokens")
        length = tokens.get("seq_len", 0) if isinstance(tokens, dict) else 0
        found: dict[str, float | int | str] = {
            "steps": len(self),
            "rows": self._geometry.rows,
            "chunks_mixed": mixed,
            "pool_bytes": self._buffers * chunk,
            "threads": self._threads,
        }
        if isinstance(length, int) and length > 1:
            found["pairs"] = (p.batch_size - 1) * (length - 2) / (min(spec.bucket_rows, spec.rows) * mixed)
        return found

    def close(self) -> None:
        """Stop all threads and let go of the memory; iterating again takes new ones."""
        self._stop()
        self._recycler = Recycler()

    def _stop(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None

    def __enter__(self) -> "ActivationDataset":  # noqa: PYI034  beartype knows Self in decorated classes only
        """Use as a context manager to close at the end."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Settings and position; the receiving process opens the store itself."""
        state = self.__dict__.copy()
        state.update(store=self.store.url, _pipeline=None, _meter=None, _recycler=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Reopen the store."""
        self.__dict__.update(state)
        self.store = open_store(state["store"])
        self._meter, self._recycler = Meter(), Recycler()
        self._pid = os.getpid()
        if self.store.fingerprint != self._plan.store:
            raise StreamError(f"the store at {self.store.url} changed while the dataset was sent to another process")


def _distributed(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError("give both rank and world_size, or neither")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, expected 0 to {world_size - 1}")
    return rank, world_size


def _geometry(store: Store) -> Geometry:
    spec = store.spec
    if not len(store.index.buckets):
        raise StreamError(f"{store.url} has no committed bucket yet; let a capture finish one")
    sizes = spec.bucket_sizes(store.index.buckets)
    short = [(int(place), int(sizes[place])) for place in np.flatnonzero(sizes < spec.bucket_rows)]
    return Geometry(
        chunk_rows=spec.chunk_rows,
        chunks_per_bucket=spec.bucket_rows // spec.chunk_rows,
        buckets=len(store.index.buckets),
        short=tuple(short),
    )


def _tensor(array: Any, dtype: str) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype in ("bfloat16", "int16") else tensor
