"""Shared fixtures: a small store with known content."""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before torch imports Triton, which looks at it then
os.environ["OMP_NUM_THREADS"] = "1"  # of child processes: threads that wait for each other are slow beside other tests

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from servers import az_server, backend_url, gcs_server, s3_server

from actstore.capture import execute
from actstore.store import SiteSpec, StoreSpec, StoreWriter, create_store
from actstore.store.format.record import CommitRecord
from actstore.store.format.spec import arrays
from actstore.store.storage import Storage, open_storage
from actstore.store.write import protocol
from actstore.store.write.protocol import Attempt, NotWritten
from actstore.stream import Settings

LONGEST = (
    "test_cluster.py",
    "test_readme.py",
    "test_trainer_parallel.py",
    "test_storage.py",
    "test_capture.py",
    "test_demo.py",
    "test_trainer_synthetic.py",
)
"""Files that start first, so that no process is left alone with one of them at the end."""

torch.set_num_threads(1)  # the models here are so small that threads only get in each other's way


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is kept in the user's cache is of this run alone."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def with_settings(changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a dataset, those of its `Settings` together."""
    names = {f.name for f in fields(Settings)}
    found = {k: v for k, v in changes.items() if k not in names}
    return found | {"settings": Settings(**{k: v for k, v in changes.items() if k in names})}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@dataclass(frozen=True)
class Known:
    """A store and what must be in it, by row before the shuffle inside buckets."""

    url: str
    spec: StoreSpec
    sites: dict[str, np.ndarray]

    @property
    def stored(self) -> dict[str, np.ndarray]:
        """The sites in stored order."""
        out = {k: np.empty_like(v) for k, v in self.sites.items()}
        for b in range(self.spec.buckets):
            first, stop = self.spec.bucket_range(b)
            place = first + self.spec.permutation(b)
            for k, v in self.sites.items():
                out[k][place] = v[first:stop]
        return out


SPEC = StoreSpec(
    sites={"resid_post.3": SiteSpec(d=24), "mlp_out.3": SiteSpec(d=7, encoding="f32")},
    rows=1000,
    bucket_rows=256,
    shard_rows=64,
    chunk_rows=16,
)


def random_sites(spec: StoreSpec, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    out: dict[str, np.ndarray] = {}
    for name, site in spec.sites.items():
        bits = rng.integers(0, 1 << 32, (spec.rows, site.d), dtype=np.uint32)  # every bit pattern, NaN too
        out[name] = (bits >> 16).astype(np.uint16) if site.encoding == "bf16" else bits.view(np.float32)
    return out


def fill(writer: StoreWriter, bucket: int, sites: dict[str, np.ndarray]) -> CommitRecord | NotWritten:
    """Write a bucket of rows given in row order; `sequence` holds the row number, so each stored row can be checked."""
    first, stop = writer.bucket_range(bucket)
    n = stop - first
    order = np.argsort(writer.permutation(bucket))
    row = np.arange(first, stop, dtype=np.int32)[order]
    data = {k: v[first:stop][order] for k, v in sites.items()}
    provenance = {"sequence": row, "position": row % 7, "token_id": np.zeros(n, np.int32)}
    return writer.write_arrays(bucket, {**data, **provenance})


def begin(storage: Storage, bucket: int) -> Attempt | NotWritten:
    """Announce an attempt at a bucket."""
    return protocol.run(storage, protocol.begin(bucket, protocol.new_id()))


def put(storage: Storage, attempt: Attempt | NotWritten, key: str, data: bytes) -> bool:
    """Put a shard of an attempt that has begun."""
    assert isinstance(attempt, Attempt)
    return protocol.run(storage, protocol.put(attempt, key, data))


def without_mark(spec: StoreSpec, key: str, data: bytes) -> bytes:
    """An object as every attempt writes it: a shard without its mark, the 16 bytes before its index."""
    name, _, shard = key.partition("/c/")
    if not shard or name not in arrays(spec):
        return data
    at = len(data) - 4 - 16 * arrays(spec)[name].chunks_per_shard
    return data[: at - 16] + data[at:]


def write_rows(writer: StoreWriter, bucket: int, sites: Any, *, sequence: Any, position: Any, token_id: Any) -> Any:
    """Write a bucket of rows in stored order that nobody else writes."""
    made = writer.write_arrays(bucket, {**sites, "sequence": sequence, "position": position, "token_id": token_id})
    assert isinstance(made, CommitRecord)
    return made


def write_known(url: str | Path, spec: StoreSpec = SPEC, *, buckets: Any = None, finalise: bool = True) -> Known:
    """Write random bits, see `fill`."""
    known = Known(str(url), spec, random_sites(spec))
    writer = create_store(url, spec, threads=2)
    for b in range(spec.buckets) if buckets is None else buckets:
        assert isinstance(fill(writer, b, known.sites), CommitRecord)
    if finalise:
        writer.finalise()
    return known


def clear_memory(url: str) -> None:
    """Drop everything below a `memory://` URL."""
    storage = open_storage(url)
    for key in storage.list(""):
        storage.delete(key)


@pytest.fixture(autouse=True)
def empty_memory() -> Iterator[None]:
    """No test sees what another one left at a `memory://` URL."""
    yield
    if "actstore.store.storage.obstore_driver" in sys.modules:
        clear_memory("memory://")


@pytest.fixture
def known(tmp_path: Path) -> Known:
    """A finished store of 1000 rows: four buckets, the last one short, its last chunk too."""
    return write_known(tmp_path / "store")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture with one replica of one thread in this process, whatever the settings say."""
    without_ray(monkeypatch)


def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture with one replica of one thread in this process, whatever the settings say."""
    monkeypatch.setattr(execute, "runs_here", lambda _: True)
    monkeypatch.setattr(execute.Plan, "threads", 1)


__all__ = [
    "SPEC",
    "Known",
    "az_server",
    "backend_url",
    "begin",
    "clear_memory",
    "empty_memory",
    "fill",
    "gcs_server",
    "put",
    "random_sites",
    "replace",
    "s3_server",
    "without_mark",
    "write_known",
    "write_rows",
]
