"""Filters: exactly the rows that pass, once each, in full batches, in one order for any world size and kill."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SPEC, fill, replace, with_settings
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore.errors import MismatchError, StreamError
from actstore.store import SiteSpec, create_store
from actstore.stream.filter import RowFilter, held_out
from actstore.stream.filtered import filtered_orders
from actstore.stream.order import Geometry

ROWS = 1000
SITE = "resid_post.3"


def values(n: int, d: int) -> np.ndarray:
    """bf16 bits [n, d] of finite values, some rows far longer than the rest."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((n, d)).astype(np.float32)
    x[rng.random(n) < 0.1] *= 50
    return torch.from_numpy(x).bfloat16().view(torch.uint16).numpy()


@pytest.fixture(scope="module", params=["bf16", "f32", "fixed:1e-3"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """1,000 rows: sequence is the row number, position the row number modulo 7; see `conftest.fill`."""
    spec = replace(SPEC, sites={SITE: SiteSpec(d=24, encoding=request.param)})
    url = str(tmp_path_factory.mktemp("filter") / "s")
    bits = values(ROWS, 24)
    rows = bits if request.param == "bf16" else torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
    writer = create_store(url, spec, threads=1)
    for b in range(spec.buckets):
        assert fill(writer, b, {SITE: rows}) is not None
    writer.finalise()
    return url


def read(url: str, **changes: Any) -> list[dict[str, torch.Tensor]]:
    with actstore.ActivationDataset(url, **settings_of(changes)) as ds:
        return list(ds)


def settings_of(changes: dict[str, Any]) -> dict[str, Any]:
    return {"sites": [SITE], "with_rows": True, "batch_size": 16, "shuffle_chunks": 16, "drop_last": False} | changes


def rows(batches: Any) -> list[int]:
    return [int(i) for b in batches for i in b["sequence"]]


def all_norms(url: str) -> np.ndarray:
    """Norm of every row, by row number, from an unfiltered reading in float64."""
    out = np.empty(ROWS)
    for batch in read(url, dtype="float32"):
        out[batch["sequence"].numpy()] = batch[SITE].double().norm(dim=1).numpy()
    return out


def test_positions_are_left_out(store: str) -> None:
    got = rows(read(store, drop_positions=[0, 3]))
    assert sorted(got) == [i for i in range(ROWS) if i % 7 not in (0, 3)]


def test_long_rows_are_left_out(store: str) -> None:
    norms = all_norms(store)
    most = float(np.quantile(norms, 0.9)) * 1.001
    got = rows(read(store, max_norm=most))
    assert sorted(got) == np.flatnonzero(norms <= most).tolist()
    assert 0 < len(got) < ROWS
    assert rows(read(store, max_norm={SITE: most})) == got


def test_values_are_those_of_their_rows(store: str) -> None:
    plain = {int(s): x for b in read(store) for s, x in zip(b["sequence"], b[SITE], strict=True)}
    for batch in read(store, drop_positions=[1], held_out=0.3):
        for s, x in zip(batch["sequence"], batch[SITE], strict=True):
            assert torch.equal(x, plain[int(s)])


def test_the_split_parts_the_sequences(store: str) -> None:
    train, out = (rows(read(store, held_out=0.2, split=s)) for s in ("train", "held_out"))
    assert sorted(train + out) == list(range(ROWS))
    assert 150 < len(out) < 250
    assert set(out) == set(rows(read(store, held_out=0.2, split="held_out", seed=9)))
    assert set(out) > set(rows(read(store, held_out=0.1, split="held_out")))


def test_all_at_once_in_full_batches(store: str) -> None:
    norms = all_norms(store)
    most = float(np.quantile(norms, 0.95))
    which = {"drop_positions": [2], "held_out": 0.25, "max_norm": most}
    batches = read(store, drop_last=True, **which)
    want = {i for i in set(rows(read(store, held_out=0.25))) if i % 7 != 2 and norms[i] <= most}
    with actstore.ActivationDataset(store, **settings_of({"drop_last": True, **which})) as ds:
        assert ds.rows == len(want)
        assert len(ds) == len(batches)
    assert {len(b["sequence"]) for b in batches} == {16}
    assert set(rows(batches)) <= want
    assert sorted(rows(read(store, **which))) == sorted(want)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_one_global_sequence_for_any_world_size(store: str, world: int) -> None:
    which = {"held_out": 0.3, "drop_positions": [0], "drop_last": True}
    alone = rows(read(store, **which))
    ranks = [read(store, rank=r, world_size=world, **which) for r in range(world)]
    merged: list[int] = []
    for step in range(len(ranks[0])):
        for s in range(8):
            merged.extend(ranks[s % world][step]["sequence"][(s // world) * 2 : (s // world + 1) * 2].tolist())
    assert merged == alone


@pytest.mark.parametrize("step", [1, 5, 30])
def test_resume_goes_on_exactly(store: str, step: int) -> None:
    changes = settings_of({"held_out": 0.3, "drop_positions": [0]})
    whole = rows(read(store, **changes))
    with actstore.ActivationDataset(store, **changes) as ds:
        batches: Iterator[Any] = iter(ds)
        got = rows([next(batches) for _ in range(step)])
        state = ds.state_dict()
    with actstore.ActivationDataset(store, **changes) as ds:
        ds.load_state_dict(state)
        assert got + rows(ds) == whole
    with (
        actstore.ActivationDataset(store, **with_settings(changes | {"held_out": 0.2})) as ds,
        pytest.raises(MismatchError, match="where is"),
    ):
        ds.load_state_dict(state)


def test_tokens_are_left_out(tmp_path: Path) -> None:
    url = str(tmp_path / "s")
    x, token = torch.arange(300.0)[:, None].repeat(1, 8), torch.arange(300) % 10
    with actstore.create(url, sites={"a.0": 8}, bucket_rows=128, shard_rows=64, chunk_rows=32) as w:
        w.append({"a.0": x}, token_id=token)
    batches = list(actstore.ActivationDataset(url, sites="a.0", batch_size=8, drop_tokens=[3, 4], drop_last=False))
    assert sum(len(b) for b in batches) == 240
    kept = x[(token != 3) & (token != 4)].bfloat16()
    assert torch.equal(torch.cat(batches).sort(dim=0).values, kept.sort(dim=0).values)


def test_rows_without_a_sequence_are_split_by_their_place(tmp_path: Path) -> None:
    url = str(tmp_path / "s")
    with actstore.create(url, sites={"a.0": 8}, bucket_rows=512, shard_rows=64, chunk_rows=32) as w:
        w.append({"a.0": torch.arange(1000)[:, None].repeat(1, 8).float()})
    parts = [
        actstore.ActivationDataset(url, sites="a.0", batch_size=8, held_out=0.5, split=s, drop_last=False)
        for s in ("train", "held_out")
    ]
    assert sum(p.rows for p in parts) == 1000
    assert all(400 < p.rows < 600 for p in parts)


def test_the_share_is_right_and_independent_of_order() -> None:
    sequence = np.arange(200_000)
    for share in (0.001, 0.01, 0.5):
        out = held_out(sequence, sequence, share)
        assert abs(out.mean() - share) < 5 * np.sqrt(share * (1 - share) / len(sequence))
        backwards = held_out(sequence[::-1], sequence, share)
        assert np.array_equal(backwards[::-1], out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"split": "held_out"}, "needs a share"),
        ({"max_norm": 0.0}, "expected a number above 0"),
        ({"max_norm": float("nan")}, "expected numbers above 0"),
        ({"max_norm": {"resid_post.9": 1.0}}, "max_norm names resid_post.9, which is not read here"),
        ({"drop_positions": [0, 1, 2, 3, 4], "batch_size": 512}, r"more than the \d+ rows that pass the filter"),
    ],
)
def test_bad_filters_are_refused_at_construction(store: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        actstore.ActivationDataset(store, **settings_of(change))


def test_a_filter_that_nothing_passes(store: str) -> None:
    with pytest.raises(StreamError, match="none of the 1,000 rows"):
        actstore.ActivationDataset(store, **settings_of({"drop_positions": range(7)}))


def test_damaged_provenance_is_noticed(store: str, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "s")
    path = next(p for p in sorted((tmp_path / "s" / "position" / "c").rglob("*")) if p.is_file())
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(actstore.ActstoreError, match="position/c/"):
        actstore.ActivationDataset(str(tmp_path / "s"), **settings_of({"drop_positions": [0]}))


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_every_row_that_passes_exactly_once_in_equal_streams(data: st.DataObject) -> None:
    chunk_rows, chunks, buckets = (data.draw(st.integers(1, n)) for n in (9, 6, 5))
    g = Geometry(chunk_rows=chunk_rows, chunks_per_bucket=chunks, buckets=buckets)
    counts = np.array(
        data.draw(st.lists(st.integers(0, chunk_rows), min_size=chunks * buckets, max_size=chunks * buckets))
    ).reshape(buckets, chunks)
    streams, mix = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 9))
    shuffle = data.draw(st.booleans())
    orders = filtered_orders(
        g,
        counts,
        tuple(range(streams)),
        seed=data.draw(st.integers(0, 9)),
        epoch=1,
        streams=streams,
        mix=mix,
        shuffle=shuffle,
    )
    seen: list[tuple[int, int, int]] = []
    for o in orders.values():
        n = 0
        for t in range(o.pieces):
            assert o.first_row(t) == n
            slot = o.slot(t)
            slices, row = o.rows_of(t, slot, np.arange(len(slot.pieces)))
            pieces = [o.piece(i) for i in slot.pieces]
            seen.extend((pieces[j].place, pieces[j].chunk, int(r)) for j, r in zip(slices, row, strict=True))
            if slot.rows:
                assert o.slot_at(n) == t
                assert o.slot_at(n + slot.rows - 1) == t
            n += slot.rows
        assert n == o.rows
    total = int(counts.sum())
    assert min(o.rows for o in orders.values()) >= total // streams
    assert max(o.rows for o in orders.values()) <= -(-total // streams)
    assert sorted(seen) == [(p, c, r) for p in range(buckets) for c in range(chunks) for r in range(counts[p, c])]


def test_a_filter_knows_whether_it_leaves_out_anything() -> None:
    assert not RowFilter()
    assert RowFilter(drop_tokens=(0,))
    with pytest.raises(ValueError, match="split is 'test'"):
        RowFilter(held_out=0.1, split="test")  # type: ignore[arg-type]


GOLDEN = [1, 110, 0, 3, 10, 2, 11]


def test_golden_filtered_order() -> None:
    """Version 1, frozen: if this fails, the order changed and needs a new version."""
    g = Geometry(chunk_rows=4, chunks_per_bucket=3, buckets=2)
    counts = np.array([[4, 2, 0], [3, 1, 4]])
    order = filtered_orders(g, counts, (1,), seed=7, epoch=3, streams=2, mix=2, shuffle=True)[1]
    got: list[int] = []
    for t in range(order.pieces):
        slot = order.slot(t)
        slices, row = order.rows_of(t, slot, np.arange(len(slot.pieces)))
        pieces = [order.piece(i) for i in slot.pieces]
        got += [pieces[j].place * 100 + pieces[j].chunk * 10 + int(r) for j, r in zip(slices, row, strict=True)]
    assert got == GOLDEN


def test_rows_with_nan_are_left_out_on_request(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(1024, 8)).astype(np.float32)
    bad = [3, 77, 500]
    x[bad, [0, 5, 7]] = [np.nan, np.inf, -np.inf]
    with actstore.create(
        tmp_path, sites={"a.0": 8}, encoding="f32", bucket_rows=256, shard_rows=128, chunk_rows=64
    ) as w:
        w.append({"a.0": x}, sequence=np.arange(1024))
    options: dict[str, Any] = {"sites": "a.0", "batch_size": 32, "drop_last": False}
    with pytest.warns(actstore.errors.ActstoreWarning, match="a.0: 3 rows hold NaN or infinity: row 3, 77, 500"):
        clean = actstore.ActivationDataset(tmp_path, **options, drop_nonfinite=True)
    assert clean.rows == 1021
    assert all(batch.isfinite().all() for batch in clean)
    assert actstore.ActivationDataset(tmp_path, **options).rows == 1024
    tighter = actstore.ActivationDataset(tmp_path, **options, drop_nonfinite=True, max_norm=2.0)
    assert tighter.rows == int((np.linalg.norm(x, axis=1) <= 2.0).sum())
