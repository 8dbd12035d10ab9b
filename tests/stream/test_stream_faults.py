"""Streaming from object stores that fail: never a wrong row, never a hang, errors that say what to do."""

import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Known, with_settings, write_known
from faults import WRONG, FaultyProxy
from servers import Server

import actstore
from actstore.errors import ActstoreError, IntegrityError
from actstore.store.maintain.copy import copy

SITE = "resid_post.3"


@pytest.fixture(params=["gcs_server", "s3_server"])
def server(request: pytest.FixtureRequest) -> Server:
    return request.getfixturevalue(request.param)


@pytest.fixture
def remote(server: Server, tmp_path: Path) -> Known:
    """The known store on the server, see `conftest.known`."""
    known = write_known(tmp_path / "local")
    url = server.fresh()
    copy(known.url, url)
    return Known(url, known.spec, known.sites)


def dataset(url: str, **changes: Any) -> actstore.ActivationDataset:
    settings: dict[str, Any] = {
        "sites": [SITE],
        "with_rows": True,
        "batch_size": 16,
        "shuffle_chunks": 16,
        "drop_last": False,
        "max_inflight": 4,
    }
    return actstore.ActivationDataset(url, **with_settings(settings | changes))


def check(known: Known, batches: Any) -> None:
    """Every row once, with its values."""
    seen: list[int] = []
    for batch in batches:
        i = batch["sequence"].numpy()
        assert np.array_equal(batch[SITE].view(torch.uint16).numpy(), known.sites[SITE][i])
        seen.extend(i)
    assert sorted(seen) == list(range(known.spec.rows))


def loader_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("actstore-work", "actstore-fetch"))]


def test_streaming_from_a_sound_server(remote: Known) -> None:
    with dataset(remote.url) as ds:
        check(remote, ds)
        assert ds.stats()["retries"] == 0
        assert ds.stats()["requests"] >= 4 * 63
    assert not loader_threads()


def test_the_order_does_not_depend_on_where_the_store_is(remote: Known, tmp_path: Path) -> None:
    near = [b["sequence"].tolist() for b in dataset(str(tmp_path / "local"))]
    assert [b["sequence"].tolist() for b in dataset(remote.url)] == near
    assert [b["sequence"].tolist() for b in dataset(remote.url, isolate=True)] == near


def test_faults_are_overcome_without_a_wrong_row(
    remote: Known, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ["500", "503", "429", "drop", "lost", "cut", WRONG]
    with FaultyProxy(server.url, kinds=kinds, seed=3) as proxy:
        monkeypatch.setenv(server.variable, proxy.url)
        ds = dataset(remote.url)
        proxy.rate = 0.15
        check(remote, ds)
        check(remote, ds)
        stats = ds.stats()
        ds.close()
    assert stats["retries"] > 20
    assert not loader_threads()


def test_wrong_bytes_every_time_are_an_error(remote: Known, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyProxy(server.url, kinds=[WRONG]) as proxy:
        monkeypatch.setenv(server.variable, proxy.url)
        with dataset(remote.url) as ds:
            proxy.rate = 1.0
            with pytest.raises(IntegrityError, match=r"chunk at byte \d+.*\(read 3 times\)"):
                list(ds)
    assert not loader_threads()


def test_a_request_that_stalls_is_overtaken(remote: Known, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actstore.stream.hedge.UNKNOWN_S", 0.5)
    with FaultyProxy(server.url) as proxy:
        monkeypatch.setenv(server.variable, proxy.url)
        with dataset(remote.url) as ds:
            next(iter(ds))
            ds.close()
            proxy.script([None] * 40 + ["silence"])
            began = time.monotonic()
            check(remote, ds)
            assert time.monotonic() - began < 15
            assert ds.stats()["hedges_won"] >= 1
        assert time.monotonic() - began < 20


def test_a_server_that_goes_silent_ends_in_an_error_within_the_deadline(
    remote: Known, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACTSTORE_RETRY_DEADLINE", "4")
    with FaultyProxy(server.url, kinds=["silence"]) as proxy:
        monkeypatch.setenv(server.variable, proxy.url)
        with dataset(remote.url) as ds:
            batches = iter(ds)
            next(batches)
            proxy.rate = 1.0
            began = time.monotonic()
            with pytest.raises(ActstoreError) as caught:
                list(batches)
            assert time.monotonic() - began < 30
    assert re.search(r"could not read \S+/c/\d+.*tries within 4 s.*ACTSTORE_RETRY_DEADLINE", str(caught.value))


def test_closing_does_not_wait_for_a_silent_server(
    remote: Known, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyProxy(server.url, kinds=["silence"]) as proxy:
        monkeypatch.setenv(server.variable, proxy.url)
        ds = dataset(remote.url)
        batches = iter(ds)
        next(batches)
        proxy.rate = 1.0
        time.sleep(0.2)
        began = time.monotonic()
        ds.close()
        assert time.monotonic() - began < 4
        proxy.rate = 0.0
        check(remote, ds)
        ds.close()
    end = time.monotonic() + 40
    while loader_threads():  # the proxy is closed, so what was abandoned fails now
        assert time.monotonic() < end
        time.sleep(0.1)
