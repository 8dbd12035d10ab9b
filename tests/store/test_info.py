"""info: what it says of finished, unfinished and open-ended stores, and of strange strings in them."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import run_actstore
from conftest import SPEC, Known, begin, write_known, write_rows

from actstore.store import create_store, open_storage, open_store
from actstore.store.format import record
from actstore.store.format.spec import OPEN_ENDED
from actstore.store.maintain.info import describe
from actstore.store.write.protocol import Attempt


def test_a_finished_store(known: Known) -> None:
    figures = describe(open_store(known.url))
    files = {k: n for k, n in open_storage(known.url).list("").items() if "/c/" in k}
    assert figures["bytes_stored"] == sum(files.values())
    assert figures["objects"] == len(files)
    assert figures["ratio"] == figures["bytes_raw"] / figures["bytes_stored"]
    assert (figures["complete"], figures["buckets_in_work"], figures["newest_attempt_s"]) == (True, 0, None)
    for name, site in figures["sites"].items():
        shards = {k: n for k, n in files.items() if k.startswith(f"{name}/")}
        assert site["bytes_stored"] == sum(shards.values())
        assert site["saturated"] is None


def test_statistics_are_those_of_the_rows(tmp_path: Path) -> None:
    spec = replace(SPEC, sites={"mlp_out.3": SPEC.sites["mlp_out.3"]}, rows=256)
    rows = np.random.default_rng(0).normal(size=(256, 7)).astype(np.float32)
    writer = create_store(tmp_path / "s", spec)
    assert write_rows(
        writer, 0, {"mlp_out.3": rows}, **dict.fromkeys(("sequence", "position", "token_id"), _zeros(256))
    )
    site = describe(open_store(tmp_path / "s"))["sites"]["mlp_out.3"]
    assert site["rms_norm"] == pytest.approx(np.sqrt((rows.astype(np.float64) ** 2).sum(1).mean()))
    assert site["max_abs"] == np.abs(rows).max()


def test_buckets_in_work_are_counted_with_their_age(backend_url: str) -> None:
    write_known(backend_url, buckets=[0])
    storage = open_storage(backend_url)
    assert describe(open_store(backend_url))["buckets_in_work"] == 0
    for bucket in (1, 3):
        assert isinstance(begin(storage, bucket), Attempt)
    figures = describe(open_store(backend_url))
    assert (figures["buckets"], figures["planned_buckets"], figures["buckets_in_work"]) == (1, 4, 2)
    assert figures["complete"] is False
    assert 0 <= figures["newest_attempt_s"] < 60


def test_the_age_is_that_of_the_newest(tmp_path: Path) -> None:
    write_known(tmp_path / "s", buckets=[0])
    for bucket, hours in ((1, 5), (2, 3)):
        assert isinstance(begin(open_storage(tmp_path / "s"), bucket), Attempt)
        stamp = time.time() - hours * 3600
        os.utime(tmp_path / "s" / record.commit_key(bucket), (stamp, stamp))
    assert describe(open_store(tmp_path / "s"))["newest_attempt_s"] == pytest.approx(3 * 3600, abs=60)


def test_an_open_ended_store(tmp_path: Path) -> None:
    spec = replace(SPEC, rows=OPEN_ENDED)
    writer = create_store(tmp_path / "s", spec)
    sites = {"resid_post.3": np.zeros((256, 24), np.uint16), "mlp_out.3": np.ones((256, 7), np.float32)}
    assert write_rows(writer, 0, sites, sequence=_zeros(256), position=_zeros(256), token_id=_zeros(256))
    done = run_actstore("info", str(tmp_path / "s"), "--json", str(tmp_path / "i.json"))
    figures = json.loads((tmp_path / "i.json").read_text())
    assert (figures["rows"], figures["planned_rows"], figures["planned_buckets"]) == (256, None, None)
    assert (figures["open_ended"], figures["complete"]) == (True, False)
    assert str(OPEN_ENDED) not in done.stdout.replace(",", "")
    assert "open-ended" in done.stdout


def test_terminal_escapes_are_shown_not_sent(tmp_path: Path) -> None:
    bad = {
        "model\x1b]0;owned\x07": "red\x1b[31m",
        "nested": {"a": ["\x1b[2J", "\u202eright to left", "[bold]markup[/]"]},
    }
    write_known(tmp_path / "s", replace(SPEC, rows=16, provenance=bad))
    done = run_actstore("info", str(tmp_path / "s"), "--json", str(tmp_path / "i.json"))
    for c in "\x1b\x07\u202e":
        assert c not in done.stdout
        assert c not in done.stderr
    assert "red\\x1b[31m" in done.stdout
    assert "[bold]markup[/]" in done.stdout
    assert json.loads((tmp_path / "i.json").read_text())["provenance"] == bad


def _zeros(n: int) -> np.ndarray:
    return np.zeros(n, np.int32)
