"""`ActivationDataset`: shuffled batches of stores for any trainer.

Every batch is a pure function of (stores, sites, filter, seed, epoch, step): the same for any number of ranks that
divides `streams`, for any kill and resume, with or without a DataLoader. State is a few integers. Threads do the work;
use it bare or in `DataLoader(ds, batch_size=None)`, never with worker processes.
"""

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Literal, TypeAlias

import torch
from torch.utils.data import IterableDataset, get_worker_info

from actstore.errors import StreamError, mismatch, warn
from actstore.store.read.join import reopen
from actstore.store.read.store import Store
from actstore.stream import explain, plan, ranks
from actstore.stream.columns import STACK, Column, parse_device, parse_dtype
from actstore.stream.device import DeviceMemory, hand_over
from actstore.stream.filter import Split, whole_numbers
from actstore.stream.isolate import IsolatedPipeline, IsolatedProcess
from actstore.stream.maps import Maps
from actstore.stream.memory import HostMemory, Memory, Recycler
from actstore.stream.meter import STALL, Meter
from actstore.stream.part import (
    Exhausted,
    Opened,
    Wanted,
    global_batch_size,
    mean_sq_norm,
    opened,
    parts_of,
    plan_json,
    steps_of,
)
from actstore.stream.pipeline import Pipeline, Reading
from actstore.stream.settings import Settings
from actstore.stream.source import Source

log = logging.getLogger("actstore.stream")

STATE_VERSION = 1
WARN_AFTER_S = 10.0
"""Seconds of loops before their consumer is told that it waits."""
WARN_AFTER_BATCHES = 20
"""And batches: the first one always takes a while."""
Dtype = Literal["bfloat16", "float16", "float32"]
MakeMemory: TypeAlias = Callable[[str, Mapping[str, Column], int], Memory]
_LIVE: "weakref.WeakSet[ActivationDataset]" = weakref.WeakSet()


class ActivationDataset(IterableDataset[Any]):
    """Batches of activations, shuffled, from a store, or mixed from several.

    Yields `Tensor [B, d]` for one site, `dict[str, Tensor]` for several or with `with_rows`, and with `stack`
    `Tensor [B, sites, d]`. bf16 and fixed sites come as bfloat16, f32 sites as float32, unless `dtype` asks for another
    type; provenance as int32. Every tensor is fresh: change it as you like.
    """

    def __init__(
        self,
        url: Opened | Mapping[str, float] | Sequence[tuple[Opened, float]],
        *,
        sites: str | Sequence[str],
        batch_size: int | None = None,
        per_rank_batch_size: int | None = None,
        seed: int = 0,
        epoch: int = 0,
        steps: int | None = None,
        max_rows: int | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        with_rows: bool = False,
        stack: bool = False,
        dtype: Dtype | torch.dtype | None = None,
        normalize: Literal["unit_mean_square"] | None = None,
        drop_positions: Sequence[int] = (),
        drop_tokens: Sequence[int] = (),
        max_norm: float | Mapping[str, float] | None = None,
        drop_nonfinite: bool = False,
        held_out: float = 0.0,
        split: Split = "train",
        streams: int = 8,
        shuffle_chunks: int | None = None,
        exhausted: Exhausted = "stop",
        rank: int | None = None,
        world_size: int | None = None,
        device: str | torch.device | None = None,
        settings: Settings = Settings(),  # noqa: B008  frozen
    ) -> None:
        """Plan the reading; only metadata is read yet, and with a filter the columns that it looks at.

        Args:
            url: the store, or an open one (`actstore.join` reads row-aligned stores as one); or several to be mixed, as
                {url: weight} or [(store, weight), ...] with weights that sum to 1.
            sites: one site name or several (row-aligned).
            batch_size: rows of the global batch, 4096 by default; each rank yields batch_size / world_size of them.
            per_rank_batch_size: instead, the rows that each rank yields.
            seed: key of the order.
            epoch: first epoch; after the end of one iteration the next begins the next epoch.
            steps: end an epoch after so many batches; `max_rows`: or after so many rows.
            max_rows: see `steps`.
            shuffle: False reads in stored order (which is itself shuffled within buckets).
            drop_last: leave out the last, short batch.
            with_rows: also yield `sequence`, `position` and `token_id` [B].
            stack: deliver the sites, which have one width, as one tensor [B, sites, d] (with `with_rows` under
                "activations").
            dtype: type of the activations: bfloat16, float16 or float32; default as stored, see above.
            normalize: "unit_mean_square" divides by sqrt(E||x||^2), so that the mean squared norm is 1 (Gemma Scope,
                arXiv 2408.05147 sec. 3.1). The mean is over all committed rows, whatever the filter, and over mixed
                stores by their weights.
            drop_positions: positions in the sequence to leave out, such as (0, 1).
            drop_tokens: token ids to leave out.
            max_norm: leave out rows with a greater L2 norm than this, of any site or by site, in stored units. Unlike
                the other filters it reads the site once before the first batch.
            drop_nonfinite: leave out rows that hold NaN or infinity at a site that is read; as max_norm it reads such
                a site once, but only if the store's statistics know of such rows.
            held_out: share of sequences that are kept from training; the same ones for every seed.
            split: "train" reads the others, "held_out" reads them.
            streams: canonical streams S; world sizes that divide S see the same global order.
            shuffle_chunks: chunks mixed at any time, over all streams, a multiple of them; about 64 by default.
            exhausted: "stop" ends an epoch of mixed stores with the first one that has no batch left; "repeat" when
                each has been read once, and reads the smaller ones anew, in new order, as often as needed.
            rank, world_size: default from torch.distributed as it is when a loop begins, else 0 of 1.
            device: deliver batches on this device, such as "cuda"; chunks lie and rows are gathered there.
            settings: threads, memory and the like, see `Settings`.

        Raises:
            ValueError: for settings that can't be carried out, with the numbers and the nearest value that works.
            StreamError: if nothing is committed yet, or no row passes the filter.

        """
        super().__init__()
        stores, weights = opened(url)
        self.settings, self._given_rank, self._device = settings, (rank, world_size), parse_device(device)
        self.sites: tuple[str, ...] = (sites,) if isinstance(sites, str) else tuple(sites)
        self._single = isinstance(sites, str) and not with_rows
        self._per_rank = per_rank_batch_size
        if settings.isolate and any("memory://" in store.url for store in stores):
            raise ValueError("isolate needs a store that another process can open; memory:// is in this one")
        self._wanted = Wanted(
            sites=self.sites,
            batch_size=global_batch_size(batch_size, per_rank_batch_size, self._place()[1]),
            seed=seed,
            steps=steps,
            max_rows=max_rows,
            shuffle=shuffle,
            drop_last=drop_last,
            with_rows=with_rows,
            stack=stack,
            dtype=parse_dtype(dtype),
            normalize=normalize is not None,
            drop_positions=whole_numbers("drop_positions", drop_positions),
            drop_tokens=whole_numbers("drop_tokens", drop_tokens),
            max_norm=max_norm,
            drop_nonfinite=drop_nonfinite,
            held_out=held_out,
            split=split,
            streams=streams,
            shuffle_chunks=shuffle_chunks,
            exhausted=exhausted,
        )
        if normalize not in (None, "unit_mean_square"):
            raise ValueError(f"normalize is {normalize!r}, expected 'unit_mean_square' or None")
        self._epoch, self._step, self._resume = epoch, 0, False
        self.set_epoch(epoch)
        self._threads = plan.pool_threads(stores, settings)
        self._make(stores, weights)
        self._steps = steps_of(self._parts, self._wanted)
        self._plan_state = plan_json(self._parts, self._wanted, self._steps)
        self.meter, self.recycler, self._maps = self._fresh()
        self._pipeline: Pipeline | IsolatedPipeline | None = None
        self._process: IsolatedProcess | None = None
        self._process_place = (0, 0)
        self._snapshots: list[dict[str, Any]] | None = None
        self._warned = False
        self._fit()
        _LIVE.add(self)
        for store in stores:
            for line in store.remarks(self.sites):
                warn(f"{store.url}: {line}")

    def _make(self, stores: Sequence[Store], weights: Sequence[float]) -> None:
        rank, world = self._place()
        self._parts = parts_of(self._wanted, stores, weights, world, threads=max(self._threads))
        for part in self._parts:
            part.place(rank, world)
            plan.check_rows(part.plan, part.rows)

    def _fresh(self) -> tuple[Meter, Recycler, Maps]:
        return Meter(), Recycler(self.settings.prefetch + 2), Maps(self.settings.verify)

    def _place(self) -> tuple[int, int]:
        """Rank and world size: as given, else those of torch.distributed by now."""
        return ranks.distributed(*self._given_rank)

    def forget(self) -> None:
        """In a forked child: threads, locks and most clients of object stores are the parent's."""
        self._snapshots = self._snapshots or [part.store.snapshot() for part in self._parts]
        if self._process is not None:
            self._process.abandon()
        self._pipeline = self._process = None
        self.meter, self.recycler, self._maps = self._fresh()

    def _reopen(self) -> None:
        """In a forked child: open the stores as the parent had them."""
        if self._snapshots is not None:
            stores, self._snapshots = [reopen(snapshot) for snapshot in self._snapshots], None
            self._make(stores, self._weights)
        for part in self._parts:
            part.place(*self._place())

    @property
    def stores(self) -> tuple[Store, ...]:
        """The stores, as they were when the dataset was made."""
        self._reopen()
        return tuple(part.store for part in self._parts)

    @property
    def store(self) -> Store:
        """The store, as it was when the dataset was made; ValueError if there are several."""
        if len(self._parts) > 1:
            raise ValueError("the dataset mixes several stores; see ds.stores")
        return self.stores[0]

    @property
    def _weights(self) -> list[float]:
        """Of the stores, as nearly as rows allow."""
        return [part.plan.batch_size / self._wanted.batch_size for part in self._parts]

    @property
    def rows(self) -> int:
        """Rows of an epoch over all ranks, before `drop_last`; of mixed stores, those of its batches."""
        return self._parts[0].rows if len(self._parts) == 1 else len(self) * self._wanted.batch_size

    def _all_rows(self) -> int:
        return sum(part.rows for part in self._parts)

    @property
    def columns(self) -> dict[str, Column]:
        """The arrays that are loaded of the (first) store, and how each is delivered."""
        return self._parts[0].columns

    def mean_sq_norm(self, site: str) -> float:
        """E||x||^2 of a site over all committed rows, in stored units; over mixed stores by their weights."""
        return mean_sq_norm(self.stores, self._weights, site)

    def __len__(self) -> int:
        """Batches of an epoch, the same on every rank."""
        return self._steps

    def __repr__(self) -> str:
        """What it reads, and where it stands."""
        return (
            f"<ActivationDataset {' + '.join(part.store.url for part in self._parts)}: {', '.join(self.sites)}, "
            f"{len(self):,} batches of {self._wanted.batch_size} rows, epoch {self._epoch}, step {self._step}>"
        )

    def _fit(self) -> tuple[list[plan.Fit], int]:
        return plan.fit(
            [part.needs(self._epoch) for part in self._parts],
            workers=self._threads[0],
            fetchers=self._threads[1],
            prefetch=self.settings.prefetch,
            budget=self.settings.budget,
        )

    def pipeline(self, memory: MakeMemory, *, epoch: int, step: int) -> Pipeline:
        """A pipeline for the rest of an epoch; `memory` makes that of a store: its name, columns, number of buffers."""
        fits, _ = self._fit()
        # a store that repeats has several epochs of its own in one of the dataset's
        shares = [p.share(fit, epoch * -(-len(self) // p.steps)) for p, fit in zip(self._parts, fits, strict=True)]
        reading = Reading(
            shares=tuple(shares),
            steps=range(step, len(self)),
            batch_rows=sum(part.batch_rows for part in self._parts),
            workers=self._threads[0],
            fetchers=self._threads[1],
            prefetch=self.settings.prefetch,
            skip_chunks=self.settings.skips,
        )
        stopping = threading.Event()
        owners = {c.store.url: c.store for part in self._parts for c in part.columns.values()}
        memories = [memory(str(i), share.columns, share.buffers) for i, share in enumerate(shares)]
        return Pipeline(Source(owners.values(), self._maps, stopping), reading, memories, self.meter, stopping)

    def __iter__(self) -> Iterator[Any]:
        """One epoch, or the rest of one after `load_state_dict`; the epoch then advances."""
        worker = get_worker_info()
        if worker is not None:
            raise StreamError(
                f"num_workers is {worker.num_workers}; the loader has threads of its own and its state is this "
                "process's: use DataLoader(ds, batch_size=None, num_workers=0), or isolate=True for another process"
            )
        world = self._place()[1]
        ranks.refuse_accelerate(world)
        if self._per_rank is not None and self._per_rank * world != self._wanted.batch_size:
            raise StreamError(
                f"per_rank_batch_size {self._per_rank} was taken for batches of {self._wanted.batch_size} rows, but by "
                f"now there are {world} ranks; make the dataset after torch.distributed's start, or give batch_size"
            )
        self._reopen()
        for part in self._parts:
            plan.check(part.plan, part.store, world)
        return self._replayed() if self.settings.replay else self._batches()

    def _start(self) -> Pipeline | IsolatedPipeline:
        """Begin to read where the dataset stands: only when the first batch is asked for, so nothing is left behind."""
        self._stop()
        if not self._resume:
            self._step = 0
        self._resume = False
        position = {"epoch": self._epoch, "step": self._step}
        if self.settings.isolate:
            self._pipeline = self._isolated().begin(**position)
        else:
            self._pipeline = self.pipeline(self._memory, **position)
        return self._pipeline

    def _memory(self, name: str, columns: Mapping[str, Column], buffers: int) -> Memory:
        if self._device is not None:
            return DeviceMemory(columns, buffers, self._device)
        return HostMemory(columns, buffers, self.recycler, name=name)

    def _isolated(self) -> IsolatedProcess:
        """The process that runs the pipelines, started for the first one."""
        rank, world = self._place()
        if self._process is None or not self._process.alive or self._process_place != (rank, world):
            self._process_place = rank, world
            self._end_process()
            self._process = IsolatedProcess(
                {
                    **self._arguments(),
                    "stores": [(part.store.snapshot(), w) for part, w in zip(self._parts, self._weights, strict=True)],
                    "settings": asdict(self.settings) | {"isolate": False, "replay": False},
                    "rank": rank,
                    "world_size": world,
                },
                self.columns,
                rows=sum(part.batch_rows for part in self._parts),
                prefetch=self.settings.prefetch,
                meter=self.meter,
                recycler=self.recycler,
            )
        return self._process

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None

    def _batches(self) -> Iterator[Any]:
        pipeline, began, before = self._start(), time.perf_counter(), self.meter.elapsed_s
        try:
            while (batch := pipeline.next()) is not None:
                self.meter.elapsed_s = before + time.perf_counter() - began
                self._advance()
                self._watch()
                yield self._deliver(batch)
        finally:
            pipeline.close()

    def _advance(self) -> None:
        self._step += 1
        if self._step == len(self):
            self._epoch, self._step = self._epoch + 1, 0

    def _replayed(self) -> Iterator[Any]:
        """The first batches of the epoch, again and again until its end."""
        pipeline, resident = self._start(), list[Any]()
        try:
            while len(resident) < self.settings.prefetch and (batch := pipeline.next()) is not None:
                resident.append(self._deliver(batch))
        finally:
            pipeline.close()
        for i in range(self._step, len(self)):
            self._advance()
            yield resident[i % len(resident)]

    def _deliver(self, batch: Any) -> Any:
        """A batch of the pipeline as the consumer gets it."""
        if not self.settings.isolate and self._device is not None:
            batch = hand_over(batch)
        elif self._device is not None:
            batch = {n: t.to(self._device, non_blocking=True) for n, t in batch.items()}
        self.meter.delivered_bytes += sum(t.nbytes for t in batch.values())
        if self._wanted.stack and len(batch) == 1:
            return batch[STACK]
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
        return self.meter.bound(fetchers=self._threads[1], workers=self._threads[0])

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
        """Position and plan, counted at yield: JSON values, under 1 kB for one store."""
        return {"version": STATE_VERSION, "epoch": self._epoch, "step": self._step, "plan": dict(self._plan_state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; `MismatchError` names every field of the plan that differs."""
        if state.get("version") != STATE_VERSION:
            raise StreamError(f"state version is {state.get('version')!r}, expected {STATE_VERSION}")
        missing = {"plan", "epoch", "step"} - state.keys()
        if missing:
            raise StreamError(f"the state lacks {', '.join(sorted(missing))}; expected what state_dict() returned")
        if state["plan"] != self._plan_state:
            remedy = "Open the dataset with the settings of the state, or start without it."
            raise mismatch("the reading plan of this state", state["plan"], self._plan_state, remedy)
        epoch, step = state["epoch"], state["step"]
        if not isinstance(epoch, int) or not isinstance(step, int) or epoch < 0 or not 0 <= step < max(1, len(self)):
            raise StreamError(f"state is at epoch {epoch!r}, step {step!r}; an epoch has {len(self)} steps")
        self._stop()
        self._epoch, self._step, self._resume = epoch, step, True

    def _arguments(self) -> dict[str, Any]:
        """The arguments of what is wanted, as JSON values."""
        found = asdict(self._wanted)
        dtype, normalize = found["dtype"], found["normalize"]
        found["dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
        found["normalize"] = "unit_mean_square" if normalize else None
        found["sites"] = self.sites[0] if self._single else self.sites
        return found

    def _like(self, stores: Sequence[tuple[Opened, float]]) -> "ActivationDataset":
        """A dataset of the same settings."""
        rank, world = self._given_rank
        more: dict[str, Any] = {"rank": rank, "world_size": world, "device": self._device, "settings": self.settings}
        return ActivationDataset(stores, **self._arguments(), **more)

    def refresh(self) -> int:
        """Plan anew over the buckets that are committed by now; returns the rows gained.

        For training while capture goes on. If there are any, the next loop begins a new epoch over all of them, and
        states of the old plan are refused. Never happens by itself.
        """
        grown = [reopen(store.snapshot(), grown=True) for store in self.stores]
        fresh = self._like(list(zip(grown, self._weights, strict=True)))
        gained = fresh._all_rows() - self._all_rows()  # noqa: SLF001  of this class
        if fresh.state_dict()["plan"] != self._plan_state:
            self._stop()
            self._end_process()
            epoch = self._epoch + (self._step > 0)
            kept = {"meter": self.meter, "recycler": self.recycler, "_epoch": epoch}
            self.__dict__.update(fresh.__dict__ | kept)
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
        (`docs/streaming.md`); L is the sequence length less BOS, where the store's provenance has it. Of mixed stores
        `stores` has the figures of each.

        Args:
            probe: read a few chunks and time the stages; False leaves rate and bound out.
            price_gets: dollars for 1,000 requests.
            price_gb: dollars for a GB (1e9 bytes) that is read.

        """
        self._reopen()
        fits, memory = self._fit()
        found = [
            explain.explain(
                part,
                fit,
                laps=len(self) / part.steps,
                world=self._place()[1],
                threads=self._threads,
                probe=probe,
                prices=(price_gets, price_gb),
            )
            for part, fit in zip(self._parts, fits, strict=True)
        ]
        whole = explain.together(found) | {"steps": len(self), "memory_bytes": memory}
        on_gpu = self._device is not None and self._device.type == "cuda" and not self.settings.isolate
        return whole | {"rows": self.rows, "gpu_bytes": whole["pool_bytes"] if on_gpu else 0}

    def close(self) -> None:
        """Stop all threads and let go of the memory; iterating again takes new ones."""
        self._stop()
        self._end_process()
        _, self.recycler, self._maps = self._fresh()

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
        """Settings and position; the receiving process opens the stores as they are here."""
        return {
            "wanted": self._wanted,
            "single": self._single,
            "settings": self.settings,
            "rank": self._given_rank,
            "device": self._device,
            "position": (self._epoch, self._step, self._resume),
            "stores": [(part.store.snapshot(), w) for part, w in zip(self._parts, self._weights, strict=True)],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the stores as they were, whatever has been committed since."""
        self._given_rank, self._device, self.settings = state["rank"], state["device"], state["settings"]
        self._per_rank = None
        self._wanted, self._single, self.sites = state["wanted"], state["single"], state["wanted"].sites
        fresh = self._like([(reopen(snapshot), weight) for snapshot, weight in state["stores"]])
        self.__dict__.update(fresh.__dict__)
        _LIVE.add(self)
        self._epoch, self._step, self._resume = state["position"]


def _forget_all() -> None:
    for dataset in list(_LIVE):
        dataset.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
