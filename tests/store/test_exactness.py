"""One global sequence of rows: for any world size, way of running, and number of kills."""

import json
import random
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import CONTEXT, start_fork
from conftest import SPEC, Known, replace, with_settings, write_known
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import actstore
from actstore.store import SiteSpec
from actstore.stream.order import Geometry, StreamOrder

SITE = "resid_post.3"


def dataset(url: str, **changes: Any) -> actstore.ActivationDataset:
    defaults: dict[str, Any] = {"sites": [SITE], "with_rows": True, "batch_size": 16, "shuffle_chunks": 16}
    return actstore.ActivationDataset(url, **with_settings(defaults | changes))


def steps_of(batches: Any) -> list[list[int]]:
    return [b["sequence"].tolist() for b in batches]


def merged(ranks: list[list[list[int]]], streams: int = 8) -> list[int]:
    """The global sequence of what all ranks got: stream s is on rank s mod w, in the order of streams there."""
    world = len(ranks)
    out: list[int] = []
    for step in range(len(ranks[0])):
        share = len(ranks[0][step]) // (streams // world)
        for s in range(streams):
            out.extend(ranks[s % world][step][(s // world) * share : (s // world + 1) * share])
    return out


@pytest.fixture(scope="module")
def known_(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return write_known(tmp_path_factory.mktemp("exact") / "s")


@pytest.fixture(scope="module")
def whole(known_: Known) -> list[int]:
    """The sequence of two epochs."""
    with dataset(known_.url) as ds:
        return [i for _ in range(2) for step in steps_of(ds) for i in step]


@pytest.mark.parametrize(
    ("world", "isolate"),
    [(1, False), (2, False), (4, False), (8, False), (1, True), pytest.param(2, True, marks=pytest.mark.slow)],
)
def test_any_world_size_in_threads_or_isolated(known_: Known, whole: list[int], world: int, isolate: bool) -> None:
    ranks = []
    for r in range(world):
        with dataset(known_.url, rank=r, world_size=world, isolate=isolate) as ds:
            ranks.append(steps_of(ds))
    assert merged(ranks) == whole[: len(whole) // 2]


@pytest.mark.parametrize("world", [1, 2])
def test_in_a_dataloader(known_: Known, whole: list[int], world: int) -> None:
    ranks = [steps_of(DataLoader(dataset(known_.url, rank=r, world_size=world), batch_size=None)) for r in range(world)]
    assert merged(ranks) == whole[: len(whole) // 2]


@pytest.mark.parametrize("seed", range(5))
def test_many_stops_with_changing_world_sizes(known_: Known, whole: list[int], seed: int) -> None:
    """Ten stops at random steps over two epochs, each with a world size of its own; edges of epochs among them."""
    rng = random.Random(seed)
    per_epoch = len(whole) // 2 // 16
    stops = sorted([*rng.sample(range(1, 2 * per_epoch), 9), per_epoch])
    got: list[int] = []
    state: dict[str, Any] | None = None
    for start, stop in zip([0, *stops], [*stops, 2 * per_epoch], strict=True):
        world = rng.choice([1, 2, 4, 8])
        ranks, states = [], []
        for r in range(world):
            with dataset(known_.url, rank=r, world_size=world) as ds:
                for _ in range(rng.choice([1, 2])):  # loading twice is loading once
                    if state is not None:
                        ds.load_state_dict(json.loads(json.dumps(state)))
                        assert ds.state_dict() == state
                mine: list[list[int]] = []
                while len(mine) < stop - start:
                    for batch in ds:
                        mine += steps_of([batch])
                        if len(mine) == stop - start:
                            break
                ranks.append(mine)
                states.append(ds.state_dict())
        assert all(s == states[0] for s in states)
        state = states[0]
        got += merged(ranks)
    assert got == whole


def consume(url: str, log: Path, isolate: bool, each: Connection) -> None:
    """Log rows and state of batch after batch, from the last state in the log on, and say so through `each`."""
    ds = dataset(url, isolate=isolate)
    if lines := log.read_text().splitlines():
        ds.load_state_dict(json.loads(lines[-1])["state"])
    with log.open("a", buffering=1) as out:
        while True:
            for batch in ds:
                print(json.dumps({"rows": batch["sequence"].tolist(), "state": ds.state_dict()}), file=out)
                each.send_bytes(b"batch")


def consume_and_kill(url: str, log: Path, isolate: bool, stops: list[int]) -> list[int]:
    """Rows of a consumer that is killed (SIGKILL) about so many batches after each start."""
    log.touch()
    for stop in stops:
        each, theirs = CONTEXT.Pipe()
        process = start_fork(consume, url, log, isolate, theirs)
        for _ in range(stop):
            assert each.recv_bytes() == b"batch"
        process.kill()
        process.join()
        text = log.read_text()
        log.write_text(text[: text.rfind("\n") + 1])
    return [i for line in log.read_text().splitlines() for i in json.loads(line)["rows"]]


@pytest.mark.parametrize("isolate", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kill_and_resume(known_: Known, whole: list[int], tmp_path: Path, isolate: bool) -> None:
    stops = [3, 62] if isolate else [1, 62, 5]
    got = consume_and_kill(known_.url, tmp_path / "log", isolate, stops)
    assert got[: len(whole)] == whole[: len(got)]
    assert len(got) >= 16 * sum(stops)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_and_resume_fifty_times(known_: Known, whole: list[int], tmp_path: Path) -> None:
    rng = random.Random(11)
    got = consume_and_kill(known_.url, tmp_path / "log", False, [rng.randint(1, 3) for _ in range(50)])
    assert got[: len(whole)] == whole[: len(got)]


@st.composite
def plans(draw: st.DrawFn) -> tuple[Any, list[int], dict[str, Any]]:
    """A small store's spec, its committed buckets, and settings of a reading."""
    chunk = draw(st.integers(1, 7))
    shard = chunk * draw(st.integers(1, 3))
    bucket = shard * draw(st.integers(1, 3))
    rows = draw(st.integers(1, 4 * bucket))
    spec = replace(SPEC, sites={SITE: SiteSpec(d=3)}, rows=rows, bucket_rows=bucket, shard_rows=shard, chunk_rows=chunk)
    buckets = draw(st.sets(st.integers(0, spec.buckets - 1), min_size=1))
    streams = draw(st.integers(1, 4))
    settings_ = {
        "streams": streams,
        "batch_size": streams * draw(st.integers(1, 5)),
        "shuffle_chunks": streams * draw(st.integers(1, 6)),
        "seed": draw(st.integers(0, 3)),
        "epoch": draw(st.integers(0, 3)),
        "threads": draw(st.integers(1, 3)),
        "shuffle": draw(st.booleans()),
        "prefetch": draw(st.integers(1, 3)),
    }
    return spec, sorted(buckets), settings_


@given(plan=plans(), data=st.data())
@settings(max_examples=50, deadline=None)
def test_any_plan_delivers_every_row_once_and_resumes(
    plan: Any, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    spec, buckets, chosen = plan
    known = write_known(tmp_path_factory.mktemp("plan") / "s", spec, buckets=buckets)
    want = [i for b in buckets for i in range(*spec.bucket_range(b))]
    if chosen["batch_size"] > len(want) // chosen["streams"] * chosen["streams"]:
        with pytest.raises(ValueError, match="more than the"):
            dataset(known.url, **chosen)
        return
    with dataset(known.url, drop_last=False, **chosen) as ds:
        steps = steps_of(ds)
        assert len(steps) == len(ds)
        assert sorted(i for s in steps for i in s) == want
        tight = ds.explain(probe=False)["memory_bytes"]
    with dataset(known.url, **chosen) as ds:
        full = steps_of(ds)
        assert len(full) == len(ds)
        assert {len(s) for s in full} <= {chosen["batch_size"]}
    stop = data.draw(st.integers(1, len(steps)))
    with dataset(known.url, drop_last=False, **chosen) as ds:
        batches = iter(ds)
        head = steps_of(next(batches) for _ in range(stop))
        state = ds.state_dict()
    with dataset(known.url, drop_last=False, memory_budget=tight, **chosen) as ds:
        ds.load_state_dict(state)
        rest = steps_of(ds) if stop < len(steps) else []
    assert head + rest == steps


def order_of(seed: int, epoch: int) -> np.ndarray:
    """Row numbers of a middle-sized store in the order of batches of one row a stream."""
    g = Geometry(chunk_rows=64, chunks_per_bucket=16, buckets=16)
    streams: list[list[int]] = []
    for s in range(4):
        o = StreamOrder(g, seed=seed, epoch=epoch, streams=4, stream=s, mix=4, shuffle=True)
        out: list[int] = []
        for t in range(o.pieces):
            slot = o.slot(t)
            slices, row = o.rows_of(t, slot, np.arange(len(slot.pieces)))
            p = [o.piece(i) for i in slot.pieces]
            out += [(p[j].place * 16 + p[j].chunk) * 64 + int(r) for j, r in zip(slices, row, strict=True)]
        streams.append(out)
    return np.array(streams).T.reshape(-1)


def test_epochs_and_seeds_are_independent() -> None:
    """Places of rows correlate no more than chance allows, chunk by chunk, nor do neighbours stay neighbours."""
    first = order_of(0, 0)
    for other in (order_of(0, 1), order_of(1, 0), order_of(1, 1)):
        i, j = np.argsort(first), np.argsort(other)
        assert np.array_equal(np.sort(first), np.arange(16 * 16 * 64))
        by_chunk = [p.reshape(256, 64).mean(1) for p in (i, j)]
        r = np.corrcoef(*by_chunk)[0, 1]
        assert abs(r) < 4 / np.sqrt(256), r
        after = set(zip(first[:-1].tolist(), first[1:].tolist(), strict=True))
        kept = sum(pair in after for pair in zip(other[:-1].tolist(), other[1:].tolist(), strict=True))
        assert kept < 20  # chance keeps about one
    same = [p.reshape(256, 64).mean(1) for p in (np.argsort(first), np.argsort(order_of(0, 0)))]
    assert np.corrcoef(*same)[0, 1] > 0.99


def sequences(order: StreamOrder, sequence: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The sequence that each row of a stream comes from; `sequence` [places, chunks, rows] has it by place."""
    found: list[np.ndarray] = []
    while start < stop:
        t = order.slot_at(start)
        slot, at = order.slot(t), start - order.first_row(t)
        end = min(slot.rows, at + stop - start)
        slices, row = (a[at:end] for a in order.rows_of(t, slot, np.arange(len(slot.pieces))))
        pieces = [order.piece(i) for i in slot.pieces]
        place, chunk = (np.array([getattr(p, name) for p in pieces])[slices] for name in ("place", "chunk"))
        found.append(sequence[place, chunk, row])
        start += end - at
    return np.concatenate(found)


def test_the_ends_of_an_epoch_are_as_well_mixed_as_the_rest() -> None:
    """Same-sequence pairs in the first and the last 2% of an epoch against the design effect."""
    length, chunk_rows, bucket_chunks, buckets, streams, mix, batch = 64, 256, 16, 64, 4, 4, 256
    g = Geometry(chunk_rows=chunk_rows, chunks_per_bucket=bucket_chunks, buckets=buckets)
    bucket_rows = bucket_chunks * chunk_rows
    expected = (batch - 1) * (length - 1) / (bucket_rows * streams * mix)
    share = batch // streams
    steps = g.rows // batch
    edge = steps // 50
    found: dict[str, list[float]] = {"first": [], "last": [], "middle": []}
    for seed in range(12):
        rng = np.random.default_rng(seed)
        sequence = np.stack([rng.permutation(bucket_rows) // length + b * 1000 for b in range(buckets)])
        sequence = sequence.reshape(buckets, bucket_chunks, chunk_rows)
        orders = [
            StreamOrder(g, seed=seed, epoch=0, streams=streams, stream=s, mix=mix, shuffle=True) for s in range(streams)
        ]
        for name, start in (("first", 0), ("middle", steps // 2), ("last", steps - edge)):
            streamed = [sequences(o, sequence, start * share, (start + edge) * share) for o in orders]
            for batch_ids in np.stack(streamed, 1).reshape(edge, share * streams):
                counts = np.unique(batch_ids, return_counts=True)[1]
                found[name].append(float((counts * (counts - 1)).sum()) / batch)
    for name, pairs in found.items():
        error = np.std(pairs) / np.sqrt(len(pairs))
        assert abs(np.mean(pairs) - expected) < 4 * error + 0.03 * expected, (name, np.mean(pairs), expected)
