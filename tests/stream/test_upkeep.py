"""What a loader holds, checks and leaves behind: memory, maps, threads, locks, figures."""

import gc
import math
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SPEC, Known, with_settings, write_known

import actstore
from actstore.errors import IntegrityError, StreamError
from actstore.store.format import codec
from actstore.store.format.spec import SiteSpec
from actstore.stream import columns, maps, plan
from actstore.stream import filter as filters

SITE = "resid_post.3"
QUOTA, PERIOD = "cpu.cfs_quota_us", "cpu.cfs_period_us"


def dataset(url: Any, **changes: Any) -> actstore.ActivationDataset:
    asked = {"sites": [SITE], "with_rows": True, "batch_size": 16, "shuffle_chunks": 16}
    return actstore.ActivationDataset(url, **with_settings(asked | changes))


def rows(batches: Any) -> list[int]:
    return [int(i) for batch in batches for i in batch["sequence"]]


def shards(known: Known) -> list[Path]:
    return sorted(p for p in (Path(known.url) / SITE / "c").rglob("0") if p.is_file())


def test_batches_that_a_consumer_collects_go_when_it_lets_go(known: Known) -> None:
    with dataset(known.url) as ds:
        held = list(ds)
        before = sum(a.nbytes for owned in ds.recycler._arrays.values() for a in owned)
        assert len(held) == 62
        assert len(ds.recycler._arrays[SITE]) <= ds.settings.prefetch + 2
        del held
        list(ds)
        assert sum(a.nbytes for owned in ds.recycler._arrays.values() for a in owned) == before


def test_a_loop_that_was_never_begun_leaves_nothing(known: Known) -> None:
    before = threading.active_count()
    iterator = iter(dataset(known.url))
    assert threading.active_count() == before
    del iterator
    gc.collect()
    assert threading.active_count() == before


def test_figures_of_a_process_of_its_own_add_up_over_epochs(known: Known) -> None:
    with dataset(known.url, isolate=True) as ds:
        figures = []
        for _ in range(2):
            list(ds)
            figures.append(ds.stats())
        ds.close()
        list(ds)
        figures.append(ds.stats())
    for name in ("chunks", "batches", "requests"):
        assert [f[name] for f in figures] == [figures[0][name] * n for n in (1, 2, 3)], name


def test_a_store_that_changed_is_no_chunk_to_skip(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    with dataset(known.url, drop_positions=[0], on_error="skip") as ds:
        monkeypatch.setattr(filters, "kept", lambda _, columns, *__: np.zeros(len(columns["position"]), bool))
        with pytest.raises(StreamError, match="the store changed, open it again"):
            list(ds)


@pytest.mark.parametrize("chain", codec.CODECS)
def test_a_file_that_is_cut_short_is_an_error_and_kills_nobody(tmp_path: Path, chain: codec.CodecName) -> None:
    sites = {SITE: SiteSpec(d=512)}
    known = write_known(tmp_path / "s", replace(SPEC, sites=sites, codec=chain, chunk_rows=64, shard_rows=256))
    with dataset(known.url) as ds:
        list(ds)
        for shard in shards(known):
            os.truncate(shard, 100)
        with pytest.raises(StreamError, match=r"reading failed \(.*Bad address"):
            list(ds)
    with dataset(known.url) as ds, pytest.raises(StreamError, match=r"has 100 bytes, expected at least .*cut short"):
        list(ds)


@pytest.mark.parametrize("chain", ["planes", "none"])
def test_a_chunk_of_a_map_is_checked_once_or_every_time(tmp_path: Path, chain: Any) -> None:
    known = write_known(tmp_path / "s", replace(SPEC, codec=chain))
    once, every = dataset(known.url), dataset(known.url, verify="every")
    list(once)
    list(every)
    with shards(known)[1].open("r+b") as f:
        f.seek(40)
        f.write(b"\xff\xff\xff\xff")
    with pytest.raises(IntegrityError, match="crc32c"):
        list(every)
    if chain == "none":
        list(once)
    once.close()  # its maps go, and with them what was checked
    with pytest.raises(IntegrityError, match="crc32c"):
        list(once)
    for ds in (once, every):
        ds.close()


def test_a_map_that_had_to_go_is_checked_anew(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "MAPS", 2)
    checks: list[str] = []
    plain = codec.check_chunk
    monkeypatch.setattr(codec, "check_chunk", lambda *a, **k: (checks.append(a[3]), plain(*a, **k))[1])
    with dataset(known.url) as ds:
        want = rows(ds)
        first = len(checks)
        assert rows(ds) != want
        assert len(checks) > first
        assert len(ds._maps._maps) <= 2
    with dataset(known.url) as ds:
        assert rows(ds) == want


def test_without_maps_files_are_read(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    with dataset(known.url) as ds:
        want = [b[SITE].view(ds.columns["sequence"].dtype) for b in ds]
    monkeypatch.setattr(columns, "mappable", lambda _: False)
    with dataset(known.url) as ds:
        assert not any(c.mapped for c in ds.columns.values())
        got = [b[SITE].view(ds.columns["sequence"].dtype) for b in ds]
    assert all((a == b).all() for a, b in zip(want, got, strict=True))


def test_only_local_file_systems_are_mapped(tmp_path: Path) -> None:
    assert maps.is_local(tmp_path)
    assert not maps.is_local(Path("/proc/self"))


def test_a_child_does_not_wait_for_a_lock_of_its_parent(known: Known) -> None:
    ds = dataset(known.url)
    batches = iter(ds)
    next(batches)
    pipeline = ds._pipeline
    with pipeline._lock:  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue, reportUnknownMemberType]
        child = os.fork()
        if not child:
            signal = 1
            try:
                threading.Timer(60, os._exit, (2,)).start()
                ds.stats()
                ds.close()
                signal = 0 if len(rows(ds)) == 992 else 3
            finally:
                sys.stdout.flush()
                os._exit(signal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ds.close()


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "max 100000"}, math.inf),
        ("3:cpu,cpuacct:/x\n4:memory:/y\n", {f"cpu/x/{QUOTA}": "50000", f"cpu/x/{PERIOD}": "100000"}, 0.5),
        ("3:cpu:/x\n", {f"cpu/x/{QUOTA}": "-1", f"cpu/x/{PERIOD}": "100000"}, math.inf),
        ("", {}, math.inf),
    ],
)  # fmt: skip
def test_a_container_s_cores_count(tmp_path: Path, groups: str, files: dict[str, str], cores: float) -> None:
    (tmp_path / "own").write_text(groups)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text + "\n")
    assert plan.cpu_quota(tmp_path / "fs", tmp_path / "own") == cores


def test_counts_of_a_filter_are_kept(known: Known, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from actstore.stream import counts

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls: list[int] = []
    plain = counts._count
    monkeypatch.setattr(counts, "_count", lambda *a: (calls.append(1), plain(*a))[1])
    want = rows(dataset(known.url, drop_positions=[0, 2]))
    assert rows(dataset(known.url, drop_positions=[0, 2])) == want
    assert len(calls) == 1
    (file,) = (tmp_path / "cache").rglob("*.npy")
    file.write_bytes(file.read_bytes()[:50])  # cut short, by a full disk for instance
    assert rows(dataset(known.url, drop_positions=[0, 2])) == want
    assert rows(dataset(known.url, drop_positions=[0])) != want
    assert len(calls) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert rows(dataset(known.url, drop_positions=[0, 2])) == want
