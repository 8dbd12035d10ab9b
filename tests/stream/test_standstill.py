"""A pipeline never comes to a standstill, whatever the store, the plan and the budget; and else it would say so."""

import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from conftest import SPEC, with_settings, write_known
from hypothesis import given, settings

import actstore
from actstore.errors import StreamError
from actstore.store.format.spec import SiteSpec
from actstore.stream import Settings
from actstore.stream.plan import Fit
from actstore.stream.residency import first_use_order, peak

SITE = "resid_post.3"
DEADLINE_S = 60.0


def rows_within_deadline(ds: actstore.ActivationDataset) -> list[int]:
    """The rows of an epoch; fails where it takes for ever."""
    found: list[int] = []
    errors: list[BaseException] = []

    def read() -> None:
        try:
            found.extend(int(i) for batch in ds for i in batch["sequence"])
        except BaseException as e:  # noqa: BLE001
            errors.append(e)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    assert not thread.is_alive(), f"stands still: {ds.stats()}"
    if errors:
        raise errors[0]
    return found


@st.composite
def cases(draw: Any) -> tuple[Any, dict[str, Any], int]:
    """A store of 1 to 300 chunks in 1 to 9 buckets, full and short; a plan of it; and a world size."""
    chunk_rows, buckets = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    bucket_rows = chunk_rows * draw(st.integers(1, max(1, 300 // buckets)))
    rows = bucket_rows * (buckets - 1) + draw(st.integers(1, bucket_rows))
    sites = {SITE: SiteSpec(d=2)}
    spec = replace(
        SPEC, sites=sites, rows=rows, bucket_rows=bucket_rows, shard_rows=chunk_rows, chunk_rows=chunk_rows,
        codec=draw(st.sampled_from(["planes", "none"])),
    )  # fmt: skip
    streams = draw(st.integers(1, min(8, rows)))
    world = draw(st.sampled_from([w for w in range(1, streams + 1) if streams % w == 0]))
    most = rows // streams
    chosen = {
        "streams": streams,
        "batch_size": streams * draw(st.integers(1, min(most, 2 * bucket_rows))),
        "shuffle_chunks": streams * draw(st.integers(1, 9)),
        "threads": draw(st.integers(1, 3)),
        "max_inflight": draw(st.sampled_from([None, 1, 3])),
        "prefetch": draw(st.integers(1, 3)),
        "shuffle": draw(st.booleans()),
        "seed": draw(st.integers(0, 3)),
        "drop_positions": draw(st.sampled_from([(), (0, 3)])),
    }
    return spec, chosen, world


@given(case=cases(), tight=st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_row_comes_exactly_once(case: Any, tight: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    spec, chosen, world = case
    known = write_known(tmp_path_factory.mktemp("store") / "s", spec)

    def open_rank(rank: int, **more: Any) -> actstore.ActivationDataset:
        asked = {"sites": [SITE], "with_rows": True, "drop_last": False, "rank": rank, "world_size": world}
        return actstore.ActivationDataset(known.url, **with_settings(chosen | asked | more))

    got: list[int] = []
    try:
        open_rank(0)
    except (ValueError, StreamError) as e:  # too few rows pass the filter, or it leaves none or all
        assert re.search("rows that pass the filter|leaves out nothing|passes the filter", str(e))
        return
    for rank in range(world):
        more = {"memory_budget": least_budget(open_rank, rank)} if tight else {}
        with open_rank(rank, **more) as ds:
            got += rows_within_deadline(ds)
    where = set(chosen["drop_positions"])
    assert sorted(got) == [i for i in range(spec.rows) if i % 7 not in where]


def least_budget(open_rank: Any, rank: int) -> int:
    """The smallest budget that is accepted, which the refusal of a smaller one names."""
    with pytest.raises(ValueError, match="need") as caught:
        open_rank(rank, memory_budget=1)
    (found,) = re.findall(r"need (\d+);", str(caught.value))
    with pytest.raises(ValueError, match="too small"):
        open_rank(rank, memory_budget=int(found) - 1)
    return int(found)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("chunks", [3, 11, 15, 31, 55, 200])
def test_the_pool_is_as_large_as_the_order_needs(tmp_path: Path, chunks: int, keep: bool) -> None:
    """Brute force: walk through the epoch and count what must be there."""
    spec = replace(
        SPEC, sites={SITE: SiteSpec(d=2)}, rows=16 * chunks, bucket_rows=16 * chunks, shard_rows=16, chunk_rows=16
    )
    known = write_known(tmp_path / "s", spec)
    with actstore.ActivationDataset(known.url, sites=SITE, batch_size=16) as ds:
        pipeline = ds.pipeline(lambda *_: None, epoch=0, step=0)  # pyright: ignore[reportArgumentType]
        share = replace(pipeline._r.shares[0], keep=keep)
        pipeline.close()
        live, most = dict.fromkeys(share.streams, 0), dict.fromkeys(share.streams, 0)
        for task in first_use_order((share,), range(share.steps)):
            live[task.stream] += len(task.loads)
            most[task.stream] = max(most[task.stream], live[task.stream])
            live[task.stream] -= len(task.frees)
        assert not any(live.values())
        assert most == {s: peak(share.order(0, s).pieces, share.order(0, s).mix, keep=keep) for s in share.streams}


@pytest.mark.parametrize("fetchers", [None, 2])
def test_a_standstill_raises_at_once_and_says_in_which_state(
    tmp_path: Path, fetchers: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = write_known(tmp_path / "s")
    ds = actstore.ActivationDataset(
        known.url, sites=[SITE], batch_size=16, with_rows=True, settings=Settings(max_inflight=fetchers)
    )
    least = ds._parts[0].needs(0).least
    monkeypatch.setattr(ds, "_fit", lambda: ([Fit(buffers=least - 1, keep=False)], 0))
    with pytest.raises(StreamError, match=r"standstill.*step \d+ of range.*buffers_free"):
        rows_within_deadline(ds)
    monkeypatch.setattr(ds, "_fit", lambda: ([Fit(buffers=least, keep=False)], 0))
    assert len(rows_within_deadline(ds)) == 992
    ds.close()
