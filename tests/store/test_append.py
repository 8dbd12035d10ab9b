"""`actstore.create`: whatever the portions, interruptions and writers, the same rows make the same store."""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import clear_memory
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore.errors import MismatchError, StoreError
from actstore.store import open_storage, open_store
from actstore.store.maintain.verify import verify
from actstore.store.write.bucket import StoreWriter

SITES = {"resid_post.3": 5, "mlp_out.3": 3}
SETTINGS: dict[str, Any] = {"sites": SITES, "bucket_rows": 64, "shard_rows": 32, "chunk_rows": 16, "threads": 1}
numbers = itertools.count()


def values(rows: int) -> dict[str, np.ndarray]:
    """Random bits, so every kind of float32, by site."""
    rng = np.random.default_rng(rows)
    bits = {name: rng.integers(0, 1 << 32, (rows, d), dtype=np.uint32) for name, d in SITES.items()}
    return {name: b.view(np.float32) for name, b in bits.items()}


def part_of(x: dict[str, np.ndarray], start: int, stop: int) -> dict[str, np.ndarray]:
    return {name: a[start:stop] for name, a in x.items()}


def feed(writer: Any, x: dict[str, np.ndarray], cuts: list[int], stop: int | None = None) -> None:
    """Append what the writer still needs, cut into portions."""
    stop = len(x["mlp_out.3"]) if stop is None else stop
    edges = sorted({writer.next_row, stop, *(c for c in cuts if writer.next_row < c < stop)})
    for a, b in itertools.pairwise(edges):
        assert writer.next_row == a
        writer.append(part_of(x, a, b), sequence=np.arange(a, b), position=np.arange(a, b) % 7)


def same_values(url: str, x: dict[str, np.ndarray], dtype: Any) -> None:
    store = open_store(url)
    assert store.complete
    assert store.rows == len(x["mlp_out.3"])
    row = store["sequence"][:]
    assert sorted(row) == list(range(store.rows))
    assert (store["position"][:] == row % 7).all()
    assert (store["token_id"][:] == -1).all()
    for name, a in x.items():
        with np.errstate(all="ignore"):
            expected = a.astype(dtype)[row]
        bits = np.uint16 if dtype is ml_dtypes.bfloat16 else np.uint32
        assert np.array_equal(store[name][:].view(bits), expected.view(bits))


@pytest.fixture
def url() -> Iterator[str]:
    yield f"memory://append/{next(numbers)}"
    clear_memory("memory://append")


@given(
    rows=st.integers(1, 300),
    cuts=st.lists(st.integers(1, 299), max_size=20),
    known=st.booleans(),
    encoding=st.sampled_from(["bf16", "f32"]),
)
@settings(max_examples=25, deadline=None)
def test_any_portions_make_the_same_store(rows: int, cuts: list[int], known: bool, encoding: str) -> None:
    x = values(rows)
    urls = [f"memory://append/{next(numbers)}" for _ in range(2)]
    with actstore.create(urls[0], rows=rows, encoding=encoding, **SETTINGS) as w:
        feed(w, x, [])
    with actstore.create(urls[1], rows=rows if known else None, encoding=encoding, **SETTINGS) as w:
        feed(w, x, cuts)
    assert open_store(urls[0]).fingerprint == open_store(urls[1]).fingerprint
    same_values(urls[1], x, ml_dtypes.bfloat16 if encoding == "bf16" else np.float32)
    assert verify(open_storage(urls[1]), deep=True).damage == []
    clear_memory("memory://append")


@given(rows=st.integers(1, 300), stops=st.lists(st.integers(0, 299), max_size=4), known=st.booleans())
@settings(max_examples=30, deadline=None)
def test_resuming_after_exceptions_leaves_no_trace(rows: int, stops: list[int], known: bool) -> None:
    x = values(rows)
    urls = [f"memory://append/{next(numbers)}" for _ in range(2)]
    with actstore.create(urls[0], rows=rows, **SETTINGS) as w:
        feed(w, x, [])
    for stop in stops:
        with pytest.raises(ZeroDivisionError), actstore.create(urls[1], rows=rows if known else None, **SETTINGS) as w:
            assert w.next_row % 64 == 0 or w.next_row == rows
            feed(w, x, [], stop=max(w.next_row, min(stop, rows)))
            raise ZeroDivisionError
    with actstore.create(urls[1], rows=rows if known else None, **SETTINGS) as w:
        feed(w, x, stops)
    assert open_store(urls[0]).fingerprint == open_store(urls[1]).fingerprint
    clear_memory("memory://append")


@pytest.mark.parametrize("known", [True, False])
def test_kill_9_leaves_whole_buckets_and_a_rerun_completes(tmp_path: Path, known: bool) -> None:
    rows = 64 * 60 + 10
    x = values(rows)
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    with actstore.create(whole, rows=rows, **SETTINGS) as w:
        feed(w, x, [])

    def run() -> None:
        with actstore.create(killed, rows=rows if known else None, **SETTINGS) as w:
            feed(w, x, list(range(0, rows, 37)))

    rng = np.random.default_rng(0)
    for _ in range(6):
        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        time.sleep(float(rng.uniform(0.01, 0.2)))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if (tmp_path / "killed" / "zarr.json").exists():
            assert verify(open_storage(killed), deep=True).damage == []
    run()
    assert open_store(killed).fingerprint == open_store(whole).fingerprint
    assert verify(open_storage(killed), deep=True).damage == []


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_are_disjoint_and_make_one_store(parts: int) -> None:
    x = values(300)
    urls = [f"memory://append/{next(numbers)}" for _ in range(2)]
    with actstore.create(urls[0], rows=300, **SETTINGS) as w:
        feed(w, x, [])
    writers = [actstore.create(urls[1], rows=300, part=(i, parts), **SETTINGS) for i in range(parts)]
    edges = [(w.first_row, w.stop_row) for w in writers]
    assert [edges[0][0], *(b for _, b in edges)] == [*(a for a, _ in edges), 300]
    for writer in reversed(writers):
        feed(writer, x, [writer.first_row + 50], stop=writer.stop_row)
        with pytest.raises(ValueError, match=rf"go beyond row {writer.stop_row}: .* has \d+ rows"):
            writer.append(part_of(x, 0, 1))
        writer.close()
        writer.close()
    assert open_store(urls[0]).fingerprint == open_store(urls[1]).fingerprint
    assert open_storage(urls[1]).exists("manifest.json")
    clear_memory("memory://append")


def test_committed_buckets_in_the_middle_are_passed_over(url: str) -> None:
    x = values(300)
    with actstore.create(url, rows=300, part=(1, 2), **SETTINGS) as w:
        assert (w.first_row, w.stop_row) == (128, 300)
        feed(w, x, [])
    garbage = {name: a.copy() for name, a in x.items()}
    for a in garbage.values():
        a[128:] = 0
    with actstore.create(url, rows=300, **SETTINGS) as w:
        assert w.next_row == 0
        feed(w, garbage, [100, 150])
    same_values(url, x, ml_dtypes.bfloat16)


def test_missing_rows_are_an_error_and_the_same_settings_continue(url: str) -> None:
    x = values(200)
    with (
        pytest.raises(StoreError, match=r"100 of the 200 rows of the store are missing; .*same command continues"),
        actstore.create(url, rows=200, **SETTINGS) as w,
    ):
        feed(w, x, [], stop=100)
    assert (open_store(url).rows, open_store(url).complete) == (64, False)
    with actstore.create(url, rows=200, **SETTINGS) as w:
        assert w.next_row == 64
        feed(w, x, [])
    same_values(url, x, ml_dtypes.bfloat16)
    with pytest.raises(ValueError, match="this writer is closed"):
        w.append(part_of(x, 0, 1))


def test_open_ended_stores(url: str) -> None:
    x = values(150)
    with pytest.raises(StoreError, match="no rows were appended"), actstore.create(url, **SETTINGS):
        pass
    with actstore.create(url, **SETTINGS) as w:
        feed(w, x, [])
    same_values(url, x, ml_dtypes.bfloat16)
    with actstore.create(url, **SETTINGS) as w:  # closed: nothing to do, and no more to take
        assert w.next_row == 150
        with pytest.raises(ValueError, match="go beyond row 150: the store has 150 rows"):
            w.append(part_of(x, 0, 1))
    with pytest.raises(MismatchError, match="seed is 0, asked for 1"):
        actstore.create(url, seed=1, **SETTINGS)


def test_killed_between_the_number_of_rows_and_the_last_bucket(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = values(150)

    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    w = actstore.create(url, **SETTINGS)
    feed(w, x, [])
    w._settle()
    with monkeypatch.context() as m:
        m.setattr(StoreWriter, "write_arrays", dies)
        with pytest.raises(KeyboardInterrupt):
            w.close()
    assert (open_store(url).spec.rows, open_store(url).rows) == (150, 128)
    with actstore.create(url, **SETTINGS) as w:
        assert (w.next_row, w.stop_row) == (128, 150)
        feed(w, x, [140])
    same_values(url, x, ml_dtypes.bfloat16)


def test_errors_of_the_background_thread_surface(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = values(200)
    with monkeypatch.context() as m:
        m.setattr(StoreWriter, "write_arrays", lambda *_, **__: 1 / 0)
        w = actstore.create(url, rows=200, **SETTINGS)
        w.append(part_of(x, 0, 70))
        while not w._flight[1].done():
            time.sleep(0.001)
        with pytest.raises(ZeroDivisionError):
            w.append(part_of(x, 70, 71))
        with pytest.raises(ValueError, match="failed before"):
            w.append(part_of(x, 70, 71))
        with pytest.raises(StoreError, match=r"an earlier append failed; .*continues"):
            w.close()
        with pytest.raises(ZeroDivisionError), actstore.create(url, rows=200, **SETTINGS) as w:
            w.append(part_of(x, 0, 64))
        with pytest.raises(KeyError) as e, actstore.create(url, rows=200, **SETTINGS) as w:
            w.append(part_of(x, 0, 64))
            raise KeyError
        assert "the full bucket before it failed too: ZeroDivisionError" in e.value.__notes__[0]
    with actstore.create(url, rows=200, **SETTINGS) as w:
        feed(w, x, [])
    same_values(url, x, ml_dtypes.bfloat16)


def test_two_buckets_at_most_are_in_memory(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer is slow, the rows are many, and no more than two sets of buffers are ever made."""
    made: list[int] = []
    buffers = actstore.create.__globals__["ActivationWriter"]._buffers
    monkeypatch.setattr(
        actstore.create.__globals__["ActivationWriter"], "_buffers", lambda w, n: made.append(n) or buffers(w, n)
    )
    x = values(64 * 8 + 3)
    with actstore.create(url, **SETTINGS) as w:
        feed(w, x, [])
        assert threading.active_count() < 20
    assert made == [64, 64]
    same_values(url, x, ml_dtypes.bfloat16)


@pytest.mark.parametrize("encoding", ["bf16", "f32", "fixed:0.001"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_tensors_and_arrays_of_every_precision(url: str, encoding: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(4, 50, 5))).to(getattr(torch, dtype)).requires_grad_()
    y = torch.from_numpy(rng.normal(size=(4, 50, 3))).to(getattr(torch, dtype))
    ids = torch.arange(200).reshape(4, 50)
    with actstore.create(url, rows=200, encoding=encoding, **SETTINGS) as w:
        w.append({"resid_post.3": x, "mlp_out.3": y}, token_id=ids, sequence=ids, position=list(range(200)))
    arrays = {"resid_post.3": x.detach().float().numpy().reshape(-1, 5), "mlp_out.3": y.float().numpy().reshape(-1, 3)}
    if dtype != "bfloat16":
        arrays = {"resid_post.3": x.detach().numpy().reshape(-1, 5), "mlp_out.3": y.numpy().reshape(-1, 3)}
    native = {n: a.astype(ml_dtypes.bfloat16) if dtype == "bfloat16" else a for n, a in arrays.items()}
    with actstore.create(f"{url}-arrays", rows=200, encoding=encoding, **SETTINGS) as w:
        w.append(native, token_id=np.arange(200), sequence=np.arange(200), position=np.arange(200))
    store = open_store(url)
    assert store.fingerprint == open_store(f"{url}-arrays").fingerprint
    row = store["token_id"][:]
    for name, a in arrays.items():
        if encoding.startswith("fixed"):
            continue
        to = ml_dtypes.bfloat16 if encoding == "bf16" else np.float32
        assert np.array_equal(store[name][:].astype(np.float32), a.astype(to).astype(np.float32)[row])


def test_values_out_of_range_become_infinite_as_numpy_has_it(url: str) -> None:
    x = np.array([[1e300, -1e300, np.nan, 3.39e38, 1.00390625]])
    with actstore.create(url, rows=1, **SETTINGS) as w:
        w.append({"resid_post.3": x, "mlp_out.3": np.zeros((1, 3))})
    got = open_store(url)["resid_post.3"][:].astype(np.float64)
    assert np.array_equal(got, [[np.inf, -np.inf, np.nan, 3.3895313892515355e38, 1.0]], equal_nan=True)


GOOD: dict[str, Any] = {"resid_post.3": np.zeros((4, 5)), "mlp_out.3": np.zeros((4, 3))}


@pytest.mark.parametrize(
    ("change", "columns", "message"),
    [
        ({"mlp_out.3": None}, {}, r"site mlp_out\.3 is object, expected floating-point"),
        ({"mlp_out.3": np.zeros((4, 3), np.int32)}, {}, "is int32, expected floating-point"),
        ({"mlp_out.3": np.zeros((4, 3), np.bool_)}, {}, "is bool, expected floating-point"),
        ({"mlp_out.3": np.zeros((4, 3), np.complex64)}, {}, "is complex64, expected floating-point"),
        ({"mlp_out.3": torch.zeros(4, 3, dtype=torch.int64)}, {}, "is int64, expected floating-point"),
        ({"mlp_out.3": np.ma.masked_array(np.zeros((4, 3)), mask=True)}, {}, r"site mlp_out\.3 is a masked array"),
        ({}, {"token_id": np.ma.masked_array(range(4), mask=True)}, "token_id is a masked array"),
        ({"mlp_out.3": np.zeros((4, 4))}, {}, r"has shape \[4, 4\], expected \[n, 3\]"),
        ({"mlp_out.3": np.float32(1)}, {}, r"has shape \[\], expected \[n, 3\]"),
        ({"mlp_out.3": np.zeros((5, 3))}, {}, "leading dimensions by site are .* expected the same"),
        ({"resid_post.9": np.zeros((4, 5))}, {}, "sites are .* the store has .*; append all of them"),
        ({}, {"token_id": np.zeros(4)}, "token_id is float64, expected whole numbers"),
        ({}, {"token_id": np.zeros(4, np.bool_)}, "token_id is bool"),
        ({}, {"token_id": np.zeros(5, np.int32)}, r"token_id has shape \[5\], expected \[4\]"),
        ({}, {"token_id": np.zeros((2, 2), np.int32)}, r"token_id has shape \[2, 2\]"),
        ({}, {"sequence": np.full(4, 1 << 31)}, "sequence has values from 2147483648 .* fit int32"),
        ({}, {"position": torch.full((4,), -(1 << 40))}, "position has values .* fit int32"),
        ({n: np.zeros((11, d)) for n, d in SITES.items()}, {}, "11 rows from row 0 on go beyond row 10"),
    ],
)
def test_bad_rows_are_refused_and_change_nothing(url: str, change: dict, columns: dict, message: str) -> None:
    with actstore.create(url, rows=10, **SETTINGS) as w:
        with pytest.raises(ValueError, match=message):
            w.append(GOOD | change, **columns)
        assert w.next_row == 0
        w.append({n: np.zeros((0, d)) for n, d in SITES.items()}, token_id=[])
        w.append({n: np.ones((2, 5, d)) for n, d in SITES.items()}, token_id=np.zeros((2, 5), np.uint64))
    assert open_store(url).complete


def test_missing_site_is_refused(url: str) -> None:
    with actstore.create(url, rows=4, **SETTINGS) as w:
        with pytest.raises(ValueError, match="append all of them"):
            w.append({"mlp_out.3": np.zeros((4, 3))})
        w.append(GOOD)


def test_fixed_takes_one_kind_of_rows(url: str) -> None:
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    with actstore.create(url, **SETTINGS | {"sites": {"mlp_out.3": 3}}, encoding="fixed:1e-3") as w:
        w.append({"mlp_out.3": x})
        with pytest.raises(ValueError, match="got bfloat16 rows after other ones, expected one kind"):
            w.append({"mlp_out.3": x.astype(ml_dtypes.bfloat16)})
        w.append({"mlp_out.3": x})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"part": (2, 2)}, "expected .i, n. with 0 <= i < n"),
        ({"part": (0, 2)}, "needs rows=N"),
        ({"encoding": "f16"}, "encoding is 'f16'"),
        ({"rows": 0}, "rows is 0"),
        ({"sites": {}}, "at least one site"),
        ({"provenance": {"when": object()}}, "provenance must be JSON"),
        ({"chunk_rows": 15}, "multiple of chunk_rows"),
    ],
)
def test_impossible_settings(url: str, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        actstore.create(url, **SETTINGS | change)


def test_provenance_compares_as_json(url: str) -> None:
    for _ in range(2):
        actstore.create(url, rows=4, provenance={"layers": (1, 2), 3: "x"}, **SETTINGS)
    assert open_store(url).provenance == {"layers": [1, 2], "3": "x"}
