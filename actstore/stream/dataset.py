"""`ActivationDataset`: shuffled batches of a store for any trainer.

Every batch is a pure function of (store, sites, filter, seed, epoch, step): the same for any number of ranks that
divides `streams`, for any kill and resume, with or without a DataLoader. State is a few integers. Threads do the work;
use it bare or in `DataLoader(ds, batch_size=None)`, never with several worker processes.
"""

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from actstore.errors import StreamError, mismatch, warn
from actstore.store.format.spec import PROVENANCE_ARRAYS
from actstore.store.read.store import Store, open_store, reopen
from actstore.stream import explain, plan, ranks
from actstore.stream.columns import Column, columns_of, parse_device, parse_dtype
from actstore.stream.counts import count_rows
from actstore.stream.device import DeviceMemory, hand_over
from actstore.stream.filter import RowFilter, Split, max_norms, whole_numbers
from actstore.stream.filtered import filtered_orders
from actstore.stream.isolate import IsolatedPipeline, IsolatedProcess
from actstore.stream.memory import HostMemory, Memory, Recycler
from actstore.stream.meter import STALL, Meter
from actstore.stream.order import StreamOrder
from actstore.stream.pipeline import Pipeline, Reading
from actstore.stream.plan import Plan
from actstore.stream.residency import Share
from actstore.stream.source import Maps, Source, Verify, maps_for

log = logging.getLogger("actstore.stream")

STATE_VERSION = 1
WARN_AFTER_S = 10.0
"""Seconds of loops before their consumer is told that it waits."""
WARN_AFTER_BATCHES = 20
"""And batches: the first one always takes a while."""
Dtype = Literal["bfloat16", "float16", "float32"]


_LIVE: "weakref.WeakSet[ActivationDataset]" = weakref.WeakSet()


def _forget_all() -> None:
    for dataset in list(_LIVE):
        dataset.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


class ActivationDataset(IterableDataset[Any]):
    """Batches of activations, shuffled, from a store.

    Yields `Tensor [B, d]` for one site, `dict[str, Tensor]` for several or with `with_rows`. bf16 and fixed sites come
    as bfloat16, f32 sites as float32, unless `dtype` asks for another type; provenance as int32. Every tensor is
    fresh: change it as you like.
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
        dtype: Dtype | torch.dtype | None = None,
        normalize: Literal["unit_mean_square"] | None = None,
        drop_positions: Sequence[int] = (),
        drop_tokens: Sequence[int] = (),
        max_norm: float | Mapping[str, float] | None = None,
        drop_nonfinite: bool = False,
        held_out: float = 0.0,
        split: Split = "train",
        streams: int = 8,
        shuffle_chunks: int = 64,
        rank: int | None = None,
        world_size: int | None = None,
        threads: int | None = None,
        max_inflight: int | None = None,
        memory_budget: int | None = None,
        prefetch: int = 4,
        device: str | torch.device | None = None,
        isolate: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
        skip_chunks: int = 16,
        verify: Verify = "once",
        replay: bool = False,
    ) -> None:
        """Plan the reading of a store; only metadata is read yet, and with a filter the columns that it looks at.

        Args:
            url: the store, or an open one.
            sites: one site name or several (row-aligned).
            batch_size: rows of the global batch; each rank yields batch_size / world_size of them.
            seed: key of the order.
            epoch: first epoch; after the end of one iteration the next begins the next epoch.
            shuffle: False reads in stored order (which is itself shuffled within buckets).
            drop_last: leave out the last, short batch.
            with_rows: also yield `sequence`, `position` and `token_id` [B].
            dtype: type of the activations: bfloat16, float16 or float32; default as stored, see above.
            normalize: "unit_mean_square" divides by sqrt(E||x||^2) of the store, so that the mean squared norm is 1
                (Gemma Scope, arXiv 2408.05147 sec. 3.1). The mean is over all committed rows, whatever the filter.
            drop_positions: positions in the sequence to leave out, such as (0, 1).
            drop_tokens: token ids to leave out.
            max_norm: leave out rows with a greater L2 norm than this, of any site or by site, in stored units. Unlike
                the other filters it reads the site once before the first batch.
            drop_nonfinite: leave out rows that hold NaN or infinity at a site that is read; as max_norm it reads such
                a site once, but only if the store's statistics know of such rows.
            held_out: share of sequences that are kept from training; the same ones for every seed.
            split: "train" reads the others, "held_out" reads them.
            streams: canonical streams S; world sizes that divide S see the same global order.
            shuffle_chunks: chunks mixed at any time, over all streams.
            rank, world_size: default from torch.distributed as it is when a loop begins, else 0 of 1.
            threads: threads that decode and gather; default one a core, less under torchrun with several ranks.
            max_inflight: requests under way at a time; default 16 for object stores, and for a directory none but
                those of the decoding threads themselves.
            memory_budget: bytes for chunks, reads and batches in memory; default what the plan needs plus read-ahead.
            prefetch: batches ready in advance.
            device: deliver batches on this device, such as "cuda"; chunks lie and rows are gathered there.
            isolate: run the pipeline in a process of its own, with one more copy of each batch.
            on_error: "skip" goes on without chunks that can't be read, and counts them in `stats()`; their rows are
                missing from their batches.
            skip_chunks: chunks an epoch that "skip" may leave out before it raises.
            verify: "once" checks a chunk of a local file the first time that it is loaded, "every" each time; what
                arrives from an object store is always checked.
            replay: read a few batches once and repeat these very tensors for the rest of the epoch: the rate of a
                trainer that never waits. Don't change them.

        Raises:
            ValueError: for settings that can't be carried out, with the numbers and the nearest value that works.
            StreamError: if nothing is committed yet, or no row passes the filter.

        """
        super().__init__()
        self._store, self._snapshot = url if isinstance(url, Store) else open_store(url), None
        self.sites = (sites,) if isinstance(sites, str) else tuple(sites)
        self._single = isinstance(sites, str) and not with_rows
        self._given_rank = (rank, world_size)
        where = RowFilter(
            drop_positions=whole_numbers("drop_positions", drop_positions),
            drop_tokens=whole_numbers("drop_tokens", drop_tokens),
            max_norm=max_norms(max_norm, self.sites, self._sites_to_clean() if drop_nonfinite else ()),
            held_out=held_out,
            split=split,
        )
        self._plan = Plan(
            store=self.store.fingerprint,
            sites=self.sites,
            seed=seed,
            batch_size=batch_size,
            streams=streams,
            shuffle_chunks=shuffle_chunks,
            shuffle=shuffle,
            drop_last=drop_last,
            where=where,
        )
        plan.check(self._plan, self.store, self._place()[1])
        self._names = self.sites + (PROVENANCE_ARRAYS if with_rows else ())
        self._dtype = parse_dtype(dtype)
        if normalize not in (None, "unit_mean_square"):
            raise ValueError(f"normalize is {normalize!r}, expected 'unit_mean_square' or None")
        self._normalize = normalize
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is {on_error!r}, expected 'raise' or 'skip'")
        self._skip_chunks = max(skip_chunks, 0) if on_error == "skip" else 0
        self._workers, self._fetchers = plan.pool_threads(self.store, threads, max_inflight)
        if prefetch < 1:
            raise ValueError(f"prefetch is {prefetch}, expected at least 1")
        self._prefetch, self._budget, self._replay = prefetch, memory_budget, replay
        if verify not in ("once", "every"):
            raise ValueError(f"verify is {verify!r}, expected 'once' or 'every'")
        self._verify: Verify = verify
        self._orders: tuple[int, Mapping[int, StreamOrder]] | None = None
        self._device = parse_device(device)
        self._isolate = isolate
        if isolate and self.store.url.startswith("memory://"):
            raise ValueError("isolate needs a store that another process can open; memory:// is in this one")
        if isolate and not hasattr(os, "memfd_create"):
            raise ValueError("isolate needs Linux, whose shared memory can do without a name")
        self._epoch, self._step, self._resume = epoch, 0, False
        self.set_epoch(epoch)
        self.meter, self.recycler = Meter(), Recycler(self._prefetch + 2)
        self._pipeline: Pipeline | IsolatedPipeline | None = None
        self._process: IsolatedProcess | None = None
        self._warned = False
        self._fingerprint_state = self._plan.to_json()
        plan.check_rows(self._plan, self.rows)
        self._fit()
        _LIVE.add(self)
        for line in self.store.remarks(self.sites):
            warn(f"{self.store.url}: {line}")

    @property
    def store(self) -> Store:
        """The store, as it was when the dataset was made; a forked child opens it anew."""
        if self._snapshot is not None:
            self._store, self._snapshot = reopen(self._snapshot), None
        return self._store

    def forget(self) -> None:
        """In a forked child: threads, locks and most clients of object stores are the parent's."""
        self._snapshot = self._snapshot or self._store.snapshot()
        if self._process is not None:
            self._process.abandon()
        self._pipeline, self._process = None, None
        self.meter, self.recycler = Meter(), Recycler(self._prefetch + 2)
        self.__dict__.pop("_maps", None)

    def _sites_to_clean(self) -> tuple[str, ...]:
        """Sites that are read and have rows with NaN or infinity."""
        sums = self.store.index.stats
        return tuple(s for s in self.sites if s in sums and sums[s].nonfinite)

    def _place(self) -> tuple[int, int]:
        """Rank and world size: as given, else those of torch.distributed by now."""
        return ranks.distributed(*self._given_rank)

    @cached_property
    def _geometry(self) -> plan.Geometry:
        return plan.geometry_of(self.store)

    @cached_property
    def _counts(self) -> NDArray[np.int64] | None:
        """Rows of every chunk that pass the filter; None without one."""
        if not self._plan.where:
            return None
        return count_rows(self.store, self._plan.where, threads=max(self._workers, self._fetchers))

    @cached_property
    def rows(self) -> int:
        """Rows of an epoch over all ranks, before `drop_last`."""
        return self._geometry.rows if self._counts is None else int(self._counts.sum())

    @cached_property
    def columns(self) -> dict[str, Column]:
        """The arrays that are loaded, and how each is delivered."""
        return columns_of(
            self.store,
            self._names,
            self._plan.where.columns,
            dtype=self._dtype,
            normalize=self._normalize is not None,
        )

    def _needs(self) -> plan.Needs:
        columns, world = self.columns, self._place()[1]
        placed = [c for n, c in columns.items() if n not in self.mapped]
        pieces = [self._order(self._epoch, s).pieces for s in self._streams()]
        filtered = None if self._counts is None else int(np.count_nonzero(self._counts))
        least, kept = plan.chunks_needed(self._plan, pieces, filtered)
        return plan.Needs(
            chunk=sum(c.chunk_bytes for c in placed),
            read=0 if self._maps is not None else sum(c.chunk_bytes for c in columns.values()),
            batch=sum(c.row_bytes for c in columns.values() if c.deliver) * self._batch_rows(),
            least=least,
            kept=kept,
            streams=self._plan.streams // world,
            chunks=sum(pieces),
        )

    @cached_property
    def _maps(self) -> Maps | None:
        return maps_for(self.store, self._verify)

    @cached_property
    def mapped(self) -> frozenset[str]:
        """Columns whose chunks are used where they lie."""
        return frozenset(n for n, c in self.columns.items() if self._maps is not None and c.index.array.codec == "none")

    def _batch_rows(self) -> int:
        """Rows of this rank's largest batch."""
        world = self._place()[1]
        return self._plan.batch_size // world + (0 if self._plan.drop_last else self._plan.streams // world)

    def _streams(self) -> tuple[int, ...]:
        rank, world = self._place()
        return tuple(range(rank, self._plan.streams, world))

    def _fit(self) -> plan.Fit:
        return plan.fit(
            self._needs(),
            workers=self._workers,
            fetchers=self._fetchers,
            prefetch=self._prefetch,
            budget=None if self._budget is None else int(self._budget),
        )

    def __len__(self) -> int:
        """Batches of an epoch, the same on every rank."""
        return plan.steps(self._plan, self.rows)

    def _order(self, epoch: int, stream: int) -> StreamOrder:
        if self._orders is None or self._orders[0] != epoch:
            self._orders = epoch, self._orders_of(epoch)
        return self._orders[1][stream]

    def _orders_of(self, epoch: int) -> Mapping[int, StreamOrder]:
        p = self._plan
        keys: dict[str, Any] = {
            "seed": p.seed,
            "epoch": epoch,
            "streams": p.streams,
            "mix": p.mix,
            "shuffle": p.shuffle,
        }
        if self._counts is None:
            return {s: StreamOrder(self._geometry, stream=s, **keys) for s in self._streams()}
        return filtered_orders(self._geometry, self._counts, self._streams(), **keys)

    def pipeline(self, memory: Callable[[Mapping[str, Column], int], Memory], *, epoch: int, step: int) -> Pipeline:
        """A pipeline for the rest of an epoch; `memory` makes its memory for columns and a number of buffers."""
        columns, fit = self.columns, self._fit()
        share = Share(
            columns=columns,
            where=self._plan.where,
            streams=self._streams(),
            order=lambda lap, stream: self._order(epoch + lap, stream),
            steps=len(self),
            rows=self._plan.batch_size // self._plan.streams,
            whole=not self._plan.drop_last,
            buffers=fit.buffers,
            keep=fit.keep,
        )
        reading = Reading(
            shares=(share,),
            steps=range(step, len(self)),
            batch_rows=self._batch_rows(),
            workers=self._workers,
            fetchers=self._fetchers,
            prefetch=self._prefetch,
            skip_chunks=self._skip_chunks,
        )
        stopping = threading.Event()
        source = Source(self.store, self._maps, stopping)
        return Pipeline((source,), reading, (memory(columns, fit.buffers),), self.meter, stopping)

    def __iter__(self) -> Iterator[Any]:
        """One epoch, or the rest of one after `load_state_dict`; the epoch then advances."""
        worker = get_worker_info()
        if worker is not None:
            raise StreamError(
                f"num_workers is {worker.num_workers}; the loader has threads of its own and its state is this "
                "process's: use DataLoader(ds, batch_size=None, num_workers=0), or isolate=True for another process"
            )
        ranks.refuse_accelerate(self._place()[1])
        plan.check(self._plan, self.store, self._place()[1])
        return self._replayed() if self._replay else self._batches()

    def _start(self) -> Pipeline | IsolatedPipeline:
        """Begin to read where the dataset stands: only when the first batch is asked for, so nothing is left behind."""
        self._stop()
        if not self._resume:
            self._step = 0
        self._resume = False
        self._pipeline = self._begin()
        return self._pipeline

    def _begin(self) -> Pipeline | IsolatedPipeline:
        position = {"epoch": self._epoch, "step": self._step}
        if self._isolate:
            return self._isolated().begin(**position)
        if self._device is not None:
            device = self._device
            return self.pipeline(lambda columns, buffers: DeviceMemory(columns, buffers, device), **position)
        recycler, mapped = self.recycler, self.mapped
        return self.pipeline(lambda columns, buffers: HostMemory(columns, buffers, recycler, mapped=mapped), **position)

    def _isolated(self) -> IsolatedProcess:
        """The process that runs the pipelines, started for the first one."""
        if self._process is None or not self._process.alive:
            rank, world = self._place()
            self._end_process()
            self._process = IsolatedProcess(
                self._settings() | {"store": self.store.snapshot(), "rank": rank, "world_size": world},
                self.columns,
                rows=self._batch_rows(),
                prefetch=self._prefetch,
                meter=self.meter,
                recycler=self.recycler,
            )
        return self._process

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None

    def _batches(self) -> Iterator[Any]:
        pipeline = self._start()
        steps, began, before = len(self), time.perf_counter(), self.meter.elapsed_s
        try:
            while (batch := pipeline.next()) is not None:
                self.meter.elapsed_s = before + time.perf_counter() - began
                self._advance(steps)
                self._watch()
                yield self._deliver(batch)
        finally:
            pipeline.close()

    def _advance(self, steps: int) -> None:
        self._step += 1
        if self._step == steps:
            self._epoch, self._step = self._epoch + 1, 0

    def _replayed(self) -> Iterator[Any]:
        """The first batches of the epoch, again and again until its end."""
        pipeline = self._start()
        steps, resident = len(self), []
        try:
            while len(resident) < self._prefetch and (batch := pipeline.next()) is not None:
                resident.append(self._deliver(batch))
        finally:
            pipeline.close()
        for i in range(self._step, steps):
            self._advance(steps)
            yield resident[i % len(resident)]

    def _deliver(self, batch: Any) -> Any:
        """A batch of the pipeline as the consumer gets it."""
        if not self._isolate and self._device is not None:
            batch = hand_over(batch)
        elif self._device is not None:
            batch = {n: t.to(self._device, non_blocking=True) for n, t in batch.items()}
        self.meter.delivered_bytes += sum(t.nbytes for t in batch.values())
        return batch[self.sites[0]] if self._single else batch

    def _watch(self) -> None:
        """Say once which stage the consumer waits for."""
        if self._warned or self.meter.elapsed_s < WARN_AFTER_S or self.meter.batches < WARN_AFTER_BATCHES:
            return
        self._warned = True
        figures = self.meter.figures()
        if figures["stall"] > STALL:
            log.warning(
                "the consumer waited %.0f%% of %.0f s for batches; the bound is %s (%s). See ds.stats(), ds.explain()",
                100 * figures["stall"],
                figures["elapsed_s"],
                self._bound(),
                explain.REMEDIES[self._bound()],
            )

    def _bound(self) -> str:
        return self.meter.bound(fetchers=self._fetchers, workers=self._workers)

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
            "plan": dict(self._fingerprint_state),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; `MismatchError` names every field of the plan that differs."""
        if state.get("version") != STATE_VERSION:
            raise StreamError(f"state version is {state.get('version')!r}, expected {STATE_VERSION}")
        here = self._fingerprint_state
        missing = {"plan", "epoch", "step"} - state.keys()
        if missing:
            raise StreamError(f"the state lacks {', '.join(sorted(missing))}; expected what state_dict() returned")
        if state["plan"] != here:
            remedy = "Open the dataset with the settings of the state, or start without it."
            raise mismatch("the reading plan of this state", state["plan"], here, remedy)
        epoch, step = state["epoch"], state["step"]
        if not isinstance(epoch, int) or not isinstance(step, int) or epoch < 0 or not 0 <= step < max(1, len(self)):
            raise StreamError(f"state is at epoch {epoch!r}, step {step!r}; an epoch has {len(self)} steps")
        self._stop()
        self._epoch, self._step, self._resume = epoch, step, True

    def refresh(self) -> int:
        """Plan anew over the buckets that are committed by now; returns the rows gained.

        For training while capture goes on. If there are any, the next loop begins a new epoch over all of them, and
        states of the old plan are refused. Never happens by itself.
        """
        settings: dict[str, Any] = self._settings() | {"replay": self._replay, "device": self._device}
        fresh = ActivationDataset(self.store.url, **settings)
        gained = fresh.rows - self.rows
        if fresh.store.fingerprint != self.store.fingerprint:
            self._stop()
            self._end_process()
            epoch = self._epoch + (self._step > 0)
            meter, recycler, isolate = self.meter, self.recycler, self._isolate
            self.__dict__.update(fresh.__dict__)
            self._epoch, self.meter, self.recycler, self._isolate = epoch, meter, recycler, isolate
        return gained

    def stats(self) -> dict[str, Any]:
        """What happened since the dataset was made.

        Seconds by stage (summed over threads), bytes, chunks, batches, requests, retries, hedges, skips; `stall`, the
        share of its time that the consumer waited, and the `bound` that says why; depths of the queues right now.
        """
        waiting: dict[str, int] = {}
        if self._pipeline is not None:
            self._pipeline.count_retries()
            waiting = self._pipeline.waiting
        return {**self.meter.figures(), "bound": self._bound(), **waiting}

    def explain(self, *, probe: bool = True, price_gets: float = 0.0004, price_gb: float = 0.0) -> dict[str, Any]:
        """The plan in figures, before a run: steps, mixing, memory, requests, cost, expected rate and its bound.

        `pairs` is (D - 1) / rho: how much correlation rho within a sequence inflates the variance of a batch gradient,
        (B - 1)(L - 1) / (W K) for B rows a batch, L kept rows a sequence, W rows a bucket, K chunks mixed
        (`docs/streaming.md`); L is the sequence length less BOS, where the store's provenance has it.

        Args:
            probe: read a few chunks and time the stages; False leaves rate and bound out.
            price_gets: dollars for 1,000 requests.
            price_gb: dollars for a GB (1e9 bytes) that is read.

        """
        return explain.explain(
            self.store,
            self._plan,
            self.columns,
            self._fit(),
            steps=len(self),
            rows=self.rows,
            world=self._place()[1],
            threads=(self._workers, self._fetchers),
            probe=probe,
            prices=(price_gets, price_gb),
        )

    def close(self) -> None:
        """Stop all threads and let go of the memory; iterating again takes new ones."""
        self._stop()
        self._end_process()
        self.recycler = Recycler(self._prefetch + 2)
        self.__dict__.pop("_maps", None)

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

    def _settings(self) -> dict[str, Any]:
        """Arguments, as JSON values, that make this dataset again in another process, without device and isolation."""
        p, w = self._plan, self._plan.where
        return {
            "sites": self.sites[0] if len(self.sites) == 1 and self._single else list(self.sites),
            "batch_size": p.batch_size,
            "seed": p.seed,
            "shuffle": p.shuffle,
            "drop_last": p.drop_last,
            "with_rows": len(self._names) > len(self.sites),
            "dtype": str(self._dtype).removeprefix("torch.") if self._dtype is not None else None,
            "normalize": self._normalize,
            "drop_positions": list(w.drop_positions),
            "drop_tokens": list(w.drop_tokens),
            "max_norm": dict(w.max_norm) or None,
            "held_out": w.held_out,
            "split": w.split,
            "streams": p.streams,
            "shuffle_chunks": p.shuffle_chunks,
            "rank": self._given_rank[0],
            "world_size": self._given_rank[1],
            "threads": self._workers,
            "max_inflight": self._fetchers or None,
            "memory_budget": self._budget,
            "prefetch": self._prefetch,
            "on_error": "skip" if self._skip_chunks else "raise",
            "skip_chunks": self._skip_chunks,
            "verify": self._verify,
        }

    def __getstate__(self) -> dict[str, Any]:
        """Settings and position; the receiving process opens the store itself."""
        more = {"replay": self._replay, "device": self._device, "isolate": self._isolate, "epoch": self._epoch}
        return {
            "settings": self._settings() | more,
            "single": self._single,
            "position": (self._step, self._resume),
            "store": self.store.snapshot(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the store as it was, whatever has been committed since."""
        self.__init__(reopen(state["store"]), **state["settings"])
        self._single = state["single"]
        self._step, self._resume = state["position"]
