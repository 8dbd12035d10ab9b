"""What a loader's stages cost alone: fetch, decode and gather of a few chunks, without the pipeline.

`explain` expects a rate from them, and `actstore bench read` and `benchmarks/loader.py` compare the loader with them.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from actstore.store.format import codec
from actstore.store.read.index import Location
from actstore.stream.columns import Column
from actstore.stream.maps import Maps
from actstore.stream.memory import HostMemory, Recycler

_TARGETS = 4
"""Batches that are gathered into in turn, so that one does not stay in a cache."""


class Stages:
    """Chunks spread evenly over a store. Every stage returns the bytes that it stands for, see `gb_per_s`.

    Bytes of `fetch` and `decode` are those of decoded chunks, bytes of `gather` those of delivered rows.
    """

    def __init__(
        self, columns: Mapping[str, Column], *, num_chunks: int, batch_rows: int, threads: int, fetchers: int
    ) -> None:
        """Fetch and decode at most `num_chunks` chunks of each column.

        `threads` decode and gather, `fetchers` fetch; batches that are gathered have `batch_rows` rows.
        """
        self._threads, self._fetchers, self._maps = threads, fetchers, Maps("once")
        array = next(iter(columns.values())).index
        present = np.argwhere(array.chunks > 0)
        chosen = present[np.linspace(0, len(present) - 1, min(num_chunks, len(present))).astype(int)]
        self._memory = HostMemory(columns, len(chosen), Recycler(_TARGETS))
        self._chunks: list[tuple[Column, int, Location]] = [
            (c, buffer, c.index.locate(int(place), int(c.store.index.buckets[place]), int(chunk)))
            for buffer, (place, chunk) in enumerate(chosen)
            for c in columns.values()
        ]
        self._decoded_bytes = sum(c.chunk_bytes for c, _, _ in self._chunks)
        self._stored: list[Any] = [None] * len(self._chunks)
        self.fetch()
        self.decode()
        rng = np.random.default_rng(0)
        self._buffer = rng.integers(0, len(chosen), batch_rows)
        self._row = rng.integers(0, array.array.chunk_rows, batch_rows)
        self._targets = [self._memory.batch(batch_rows) for _ in range(_TARGETS)]
        self._batch_bytes = batch_rows * sum(c.row_bytes for c in columns.values() if c.deliver)

    def fetch(self) -> int:
        """Get stored bytes as the loader does: by a request, or brought in where they are mapped."""

        def one(i: int) -> None:
            c, _, at = self._chunks[i]
            storage = c.store.storage
            mapped = self._maps.chunk(storage, at)[0] if c.mapped else None
            self._stored[i] = storage.get_range(at.key, at.offset, at.length) if mapped is None else mapped

        _share(one, len(self._chunks), self._fetchers)
        return self._decoded_bytes

    def decode(self) -> int:
        """Decode without the checksum, which a map's chunk has in the first epoch only."""

        def one(i: int) -> None:
            c, buffer, at = self._chunks[i]
            if c.in_place:
                self._memory.take(c.name, buffer, self._stored[i][: -codec.CRC_BYTES])
            else:
                payload = memoryview(self._stored[i])[: -codec.CRC_BYTES]
                codec.decode_payload(payload, c.index.array.codec, self._memory.chunk(c.name, buffer), at.key)

        _share(one, len(self._chunks), self._threads)
        return self._decoded_bytes

    def gather(self, *, threads: int | None = None) -> int:
        """Gather random rows of the decoded chunks: as many bytes as the chunks have."""
        threads = threads or self._threads
        edges = np.linspace(0, len(self._row), threads + 1).astype(int)
        count = max(1, self._decoded_bytes // self._batch_bytes)

        def one(i: int) -> None:
            batch, part = divmod(i, threads)
            rows = slice(edges[part], edges[part + 1])
            target = self._targets[batch % _TARGETS]
            self._memory.gather(target, rows.start, self._buffer[rows], self._row[rows])

        _share(one, count * threads, threads)
        return count * self._batch_bytes


def gb_per_s(work: Callable[[], int]) -> float:
    """GB/s (1e9 bytes) of work that returns the bytes it stands for."""
    began = time.perf_counter()
    nbytes = work()
    return nbytes / max(time.perf_counter() - began, 1e-9) / 1e9


def in_turn(*rates: float) -> float:
    """The rate of stages that the same threads carry out one after the other."""
    return 1 / sum(1 / rate for rate in rates)


def _share(work: Callable[[int], None], count: int, threads: int) -> None:
    """`work` for every number below `count`; a thread that is free takes the next one."""
    numbers = iter(range(count))

    def some(_: int) -> None:
        for i in numbers:
            work(i)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(some, range(min(threads, count))))
