"""How batches are delivered: types, normalisation, devices, another process; and what happens at every kind of end."""

import gc
import logging
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from commands import run_in_fork
from conftest import SPEC, Known, fill, replace, with_settings, write_known

import actstore
from actstore.errors import StreamError
from actstore.store import SiteSpec, create_store
from actstore.store.format import codec
from actstore.store.storage import LocalStorage
from actstore.stream import Settings, maps, memory
from actstore.stream import dataset as dataset_module
from actstore.stream.device import DeviceMemory

SITE = "resid_post.3"
SETTINGS: dict[str, Any] = {"sites": [SITE], "with_rows": True, "batch_size": 16, "shuffle_chunks": 16}


def dataset(url: str, **changes: Any) -> actstore.ActivationDataset:
    return actstore.ActivationDataset(url, **with_settings(SETTINGS | changes))


def by_row(batches: Any, site: str = SITE) -> dict[int, torch.Tensor]:
    return {int(s): x for b in batches for s, x in zip(b["sequence"], b[site], strict=True)}


def rows(batches: Any) -> list[int]:
    return [int(i) for batch in batches for i in batch["sequence"]]


def finite(url: str, encoding: str, chain: codec.CodecName) -> str:
    """A store of normal values, of which a few are special."""
    spec = replace(SPEC, sites={SITE: SiteSpec(d=24, encoding=encoding)}, codec=chain)
    x = np.random.default_rng(1).standard_normal((spec.rows, 24)).astype(np.float32) * 3
    if encoding == "f32":
        x[5, :5] = [np.nan, np.inf, -np.inf, 1e-42, -0.0]
    given = x if encoding == "f32" else torch.from_numpy(x).bfloat16().view(torch.uint16).numpy()
    writer = create_store(url, spec, threads=1)
    for b in range(spec.buckets):
        assert fill(writer, b, {SITE: given}) is not None
    writer.finalise()
    return url


def exact(url: str) -> dict[int, torch.Tensor]:
    """Every row in float64, through zarr."""
    store = actstore.open(url)
    stored = np.asarray(store[SITE])
    sequence = np.asarray(store["sequence"])
    if store.sites[SITE].kind == "fixed":
        steps = store.calibration(SITE)
        wide = (stored.astype(np.float64) * steps.scale + steps.offset).astype(np.float32).astype(np.float64)
    else:
        wide = stored.astype(np.float64)
    return {int(s): torch.from_numpy(x) for s, x in zip(sequence, wide, strict=True)}


@pytest.mark.parametrize("chain", codec.CODECS)
@pytest.mark.parametrize("encoding", ["bf16", "f32", "fixed:1e-3"])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_types_and_normalisation_against_float64(
    tmp_path: Path, encoding: str, chain: codec.CodecName, device: str | None
) -> None:
    url = finite(str(tmp_path / "s"), encoding, chain)
    want = exact(url)
    plain = {r: x for r, x in want.items() if torch.isfinite(x).all()}
    scale = actstore.open(url).stats(SITE).mean_sq_norm
    if not np.isfinite(scale):
        with pytest.raises(StreamError, match="mean squared norm"):
            dataset(url, normalize="unit_mean_square")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for normalize in (None, "unit_mean_square") if np.isfinite(scale) else (None,):
            ds = dataset(url, dtype=dtype, normalize=normalize, device=device, drop_last=False)
            got = by_row(ds)
            assert got.keys() == want.keys()
            factor = 1.0 if normalize is None else 1 / np.sqrt(scale)
            for r, x in plain.items():
                assert got[r].dtype == dtype
                assert torch.equal(got[r], (x * factor).float().to(dtype)), (dtype, normalize, r)
            if normalize is not None:
                mean_sq = torch.stack([got[r] for r in plain]).double().square().sum(1).mean()
                assert abs(float(mean_sq) - 1) < 0.01


def test_special_values_survive_a_change_of_type(tmp_path: Path) -> None:
    url = finite(str(tmp_path / "s"), "f32", "planes")
    for device in (None, "cpu"):
        got = by_row(dataset(url, dtype="bfloat16", device=device, drop_last=False))[5][:5]
        assert torch.isnan(got[0])
        assert got[1:3].tolist() == [float("inf"), float("-inf")]
        assert torch.equal(got[3:].view(torch.int16), torch.tensor([1e-42, -0.0]).bfloat16().view(torch.int16))


@pytest.mark.parametrize("chain", codec.CODECS)
def test_the_device_path_delivers_the_same_bits(tmp_path: Path, chain: codec.CodecName) -> None:
    known = write_known(tmp_path / "s", replace(SPEC, codec=chain))
    sites = ["resid_post.3", "mlp_out.3"]
    for host, device in zip(
        dataset(known.url, sites=sites), dataset(known.url, sites=sites, device="cpu"), strict=True
    ):
        assert host.keys() == device.keys()
        assert torch.equal(host["resid_post.3"].view(torch.int16), device["resid_post.3"].view(torch.int16))
        assert torch.equal(host["mlp_out.3"].view(torch.int32), device["mlp_out.3"].view(torch.int32))
        for name in ("sequence", "position", "token_id"):
            assert torch.equal(host[name], device[name])


def test_the_device_path_filters_too(known: Known) -> None:
    which = {"drop_positions": [1, 2], "held_out": 0.2}
    assert rows(dataset(known.url, device="cpu", **which)) == rows(dataset(known.url, **which))
    assert DeviceMemory.parallel is False


def test_another_process_delivers_the_same(known: Known) -> None:
    sites = ["resid_post.3", "mlp_out.3"]
    alone = list(dataset(known.url, sites=sites, drop_last=False))
    with dataset(known.url, sites=sites, drop_last=False, isolate=True) as ds:
        for a, b in zip(alone, ds, strict=True):
            assert torch.equal(a["sequence"], b["sequence"])
            assert torch.equal(a["resid_post.3"].view(torch.int16), b["resid_post.3"].view(torch.int16))
            assert torch.equal(a["mlp_out.3"].view(torch.int32), b["mlp_out.3"].view(torch.int32))
            b["resid_post.3"].zero_()
        stats = ds.stats()
        assert stats["batches"] == len(ds)
        assert stats["chunks"] > 0
        assert stats["delivered_bytes"] == sum(t.nbytes for b in alone for t in b.values())


def test_another_process_resumes_exactly_and_can_be_pickled(known: Known) -> None:
    whole = rows(dataset(known.url))
    with dataset(known.url, isolate=True) as ds:
        batches = iter(ds)
        got = rows([next(batches) for _ in range(17)])
        state = ds.state_dict()
    with pickle.loads(pickle.dumps(dataset(known.url, isolate=True))) as ds:
        ds.load_state_dict(state)
        assert got + rows(ds) == whole


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "actstore.stream.isolate" in " ".join(p.cmdline())]


def test_the_process_ends_however_the_loop_ends(known: Known) -> None:
    with pytest.raises(RuntimeError, match="trainer failed"), dataset(known.url, isolate=True) as ds:
        for _ in ds:
            assert len(children()) == 1
            raise RuntimeError("trainer failed")
    assert not children()
    iterator = iter(ds)
    next(iterator)
    (child,) = children()
    child.send_signal(signal.SIGKILL)
    with pytest.raises(StreamError, match=r"process ended \(signal SIGKILL\)"):
        list(iterator)
    ds.close()
    assert not children()
    assert not [p for p in Path("/dev/shm").iterdir() if "actstore" in p.name]


def test_the_process_reports_errors_of_its_pipeline(known: Known) -> None:
    path = sorted(p for p in (Path(known.url) / SITE / "c").rglob("0") if p.is_file())[2]
    path.unlink()
    with dataset(known.url, isolate=True) as ds, pytest.raises(actstore.ActstoreError, match="is missing"):
        list(ds)
    assert not children()


def run(code: str, *args: str, timeout: float = 120, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **kwargs)


LEAVE = """
    import sys, actstore
    from actstore.stream import Settings
    settings = Settings(isolate=sys.argv[2] == "1")
    ds = actstore.ActivationDataset(sys.argv[1], sites="resid_post.3", batch_size=16, settings=settings)
    batches = iter(ds)
    next(batches)
    print("left")
    if sys.argv[3] == "kill":
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("isolate", "how"), [("0", "exit"), ("1", "exit"), ("1", "kill")])
def test_leaving_in_mid_epoch_neither_hangs_nor_leaves_anything(known: Known, isolate: str, how: str) -> None:
    done = run(LEAVE, known.url, isolate, how)
    assert done.stdout == "left\n"
    assert done.returncode == (0 if how == "exit" else -signal.SIGKILL)
    assert all("ActstoreWarning" in line or line.startswith("  ") for line in done.stderr.splitlines())
    end = time.monotonic() + 60
    while mine := [p for p in psutil.process_iter(["cmdline"]) if "actstore.stream.isolate" in str(p.info["cmdline"])]:
        if not any(p.is_running() and p.ppid() == 1 for p in mine):
            break
        assert time.monotonic() < end, mine
        time.sleep(0.05)


def test_a_second_loop_ends_the_first_one(known: Known) -> None:
    ds = dataset(known.url)
    first = iter(ds)
    next(first)
    assert rows(ds) == rows(dataset(known.url, epoch=0))
    with pytest.raises(StreamError, match="ended by close"):
        list(first)
    ds.close()


def test_memory_comes_back(known: Known) -> None:
    gc.collect()
    before = threading.active_count()
    ds = dataset(known.url)
    pools = set()
    for _ in range(4):
        list(ds)
        pools.add(id(ds.recycler._arrays[f"pool 0/{SITE}"][-1]))
    assert len(pools) == 1
    ds.close()
    assert threading.active_count() == before


def test_damaged_chunks_are_skipped_only_when_asked_and_counted(known: Known, caplog: Any) -> None:
    path = sorted(p for p in (Path(known.url) / SITE / "c").rglob("0") if p.is_file())[2]
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(bytes(data))
    whole = rows(dataset(known.url, sites=["mlp_out.3"], drop_last=False))
    with (
        caplog.at_level(logging.WARNING, "actstore.stream"),
        dataset(known.url, on_error="skip", drop_last=False) as ds,
    ):
        batches = list(ds)
        got = rows(batches)
        stats = ds.stats()
    assert len(batches) == len(ds)
    assert len(got) == 1000 - 16
    assert [r for r in whole if r in set(got)] == got
    assert stats["skipped_rows"] == 16
    assert stats["skipped_chunks"] >= 1
    assert "skipped a chunk" in caplog.text
    assert path.parent.name in caplog.text
    (path.parent.parent / "3" / "0").unlink()
    with (
        dataset(known.url, on_error="skip", skip_chunks=2) as ds,
        pytest.raises(StreamError, match="skip_chunks allows 2"),
    ):
        list(ds)


def test_a_plan_over_what_is_committed_so_far(tmp_path: Path) -> None:
    known = write_known(tmp_path / "s", buckets=[0, 2], finalise=False)
    with dataset(known.url, drop_last=False) as ds:
        first = rows(ds)
        state = ds.state_dict()
        assert ds.refresh() == 0
        assert ds.state_dict() == state
        writer = create_store(known.url, known.spec, threads=1)
        fill(writer, 1, known.sites)
        assert sorted(rows(ds)) == sorted(first)
        assert ds.refresh() == 256
        assert sorted(rows(ds)) == list(range(768))
        with pytest.raises(actstore.errors.MismatchError, match="store is"):
            ds.load_state_dict(state)


def test_replay_repeats_resident_batches(known: Known) -> None:
    with dataset(known.url, replay=True, prefetch=3) as ds:
        batches = list(ds)
        assert len(batches) == len(ds)
        assert [id(b[SITE]) for b in batches[:3]] * 2 == [id(b[SITE]) for b in batches[:6]]
        assert rows(batches[:3]) == rows(list(dataset(known.url))[:3])
        assert ds.epoch == 1
        list(ds)


class OwnClock(threading.local):
    """A clock of each thread, of the time that the thread itself used or slept: other programs don't make it late."""

    slept = 0.0

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        self.slept += seconds

    def now(self) -> float:
        return time.thread_time() + self.slept


def slow(monkeypatch: pytest.MonkeyPatch, clock: OwnClock, target: Any, name: str, seconds: float) -> None:
    plain = getattr(target, name)

    def slowed(*args: Any, **kwargs: Any) -> Any:
        clock.sleep(seconds)
        return plain(*args, **kwargs)

    monkeypatch.setattr(target, name, slowed)


@pytest.mark.parametrize("fetchers", [None, 2])
@pytest.mark.parametrize("stage", ["fetch", "decode", "gather", "consumer"])
def test_the_bound_is_named(known: Known, stage: str, fetchers: int | None, monkeypatch: Any, caplog: Any) -> None:
    list(dataset(known.url))  # loads compiled code
    clock, wall, consumer = OwnClock(), time.perf_counter, threading.current_thread()
    monkeypatch.setattr(time, "perf_counter", lambda: wall() if threading.current_thread() is consumer else clock.now())
    if stage == "fetch":
        slow(monkeypatch, clock, LocalStorage, "get_range", 0.01)
        slow(monkeypatch, clock, maps.Maps, "chunk", 0.01)
    if stage == "decode":
        slow(monkeypatch, clock, codec, "decode_payload", 0.01)
    if stage == "gather":
        slow(monkeypatch, clock, memory, "gather", 0.02)
    monkeypatch.setattr(dataset_module, "WARN_AFTER_S", 0.2)
    with caplog.at_level(logging.WARNING, "actstore.stream"):
        settings = Settings(threads=2, max_inflight=fetchers)
        ds = actstore.ActivationDataset(known.url, sites=SITE, batch_size=16, settings=settings)
        waited = 0.0
        for _ in ds:
            before, waited = waited, ds.meter.wait_s
            if stage == "consumer":
                time.sleep(0.01 + 30 * (waited - before))  # however late its batch was, it is the slower one
        assert ds.stats()["bound"] == stage
    warned = [r.message for r in caplog.records if "the consumer waited" in r.message]
    assert len(warned) == (stage != "consumer")
    assert all(f"the bound is {stage}" in m for m in warned)
    ds.close()


def test_explain_says_what_will_happen(known: Known) -> None:
    with dataset(known.url, drop_last=False) as ds:
        said = ds.explain(price_gets=1000.0)
        list(ds)
        stats = ds.stats()
        # left out: up to one chunk a stream is cut between two and read by both, of four arrays
        assert said["requests"] <= stats["requests"] <= said["requests"] + 8 * 4
        assert said["dollars"] == said["requests"]
        assert said["stored_bytes"] <= stats["stored_bytes"] <= 1.2 * said["stored_bytes"]
        assert said["expected_gb_s"] > 0
        assert said["expected_bound"] in ("fetch", "decode", "gather")
        assert "expected_gb_s" not in ds.explain(probe=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"max_inflight": 0}, "max_inflight is 0"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"dtype": torch.int8}, "dtype is torch.int8, expected one of bfloat16, float16, float32"),
        ({"epoch": -1}, "epoch is -1"),
        ({"device": "meta"}, "device is 'meta', expected 'cuda'"),
        pytest.param(
            {"device": "cuda"}, "sees no CUDA", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has one")
        ),
    ],
)
def test_bad_arguments_are_refused_at_construction(known: Known, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataset(known.url, **change)


def read_as_rank(url: str, rank: int, file: str) -> None:
    """Print rows of all batches that a rank of two gets, and why Accelerate is refused."""
    import torch.distributed as dist
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    ds = dataset(url)
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=2)
    for batch in DataLoader(ds, batch_size=None):
        print(*batch["sequence"].tolist())
    try:
        next(iter(Accelerator(cpu=True).prepare(DataLoader(ds, batch_size=None))))
    except actstore.ActstoreError as e:
        print(e, file=sys.stderr)
    dist.destroy_process_group()


def test_ranks_come_from_torch_distributed_once_it_is_there(known: Known, tmp_path: Path) -> None:
    """The data set is made before the process group, as Lightning does; Accelerate would lose rows and is refused."""
    with ThreadPoolExecutor(2) as pool:
        file = f"file://{tmp_path}/group"
        said = list(pool.map(lambda rank: run_in_fork(read_as_rank, known.url, rank, file), range(2)))
    got = [[[int(i) for i in line.split()] for line in done.stdout.splitlines()] for done in said]
    assert [len(g) for g in got] == [62, 62]
    alone = [b["sequence"].tolist() for b in dataset(known.url)]
    for step, both in enumerate(zip(*got, strict=True)):
        assert sorted(both[0] + both[1]) == sorted(alone[step])
    assert "gives each of 2 ranks its own" in said[0].stderr
