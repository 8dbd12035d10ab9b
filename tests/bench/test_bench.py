"""Benchmarks: what slows is named, figures have their form, nothing stays behind."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import run_actstore
from conftest import Known
from servers import Server

import actstore.stream.gather as gathering
from actstore.bench import Report, bench_read, bench_storage, bench_write
from actstore.bench.storage import knee
from actstore.store.format import codec
from actstore.store.storage import LocalStorage
from actstore.stream import maps, memory

ROOT = Path(__file__).parent.parent.parent
PAUSE_S = 0.005


def slowed(work: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(PAUSE_S)
        return work(*args, **kwargs)

    return slow


def read(known: Known) -> Report:
    return bench_read(known.url, site="resid_post.3", batch_size=64, seconds=0.2, rounds=1)


def slow_decode(patch: pytest.MonkeyPatch) -> None:
    for name in ("decode_into", "decode_payload"):  # the loader decodes with the second
        patch.setattr(codec, name, slowed(getattr(codec, name)))


def slow_gather(patch: pytest.MonkeyPatch) -> None:
    slow = slowed(gathering.gather)
    patch.setattr(gathering, "gather", slow)
    patch.setattr(memory, "gather", slow)  # where the pipeline calls it


def slow_fetch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalStorage, "get_range", slowed(LocalStorage.get_range))
    patch.setattr(maps.Maps, "chunk", slowed(maps.Maps.chunk))  # how the loader reads a directory


@pytest.mark.parametrize(
    ("slow", "stage"),
    [(slow_decode, "decode"), (slow_gather, "gather"), (slow_fetch, "fetch")],
    ids=["decode", "gather", "fetch"],
)
def test_read_names_the_stage_that_was_slowed(
    known: Known, monkeypatch: pytest.MonkeyPatch, slow: Callable[[pytest.MonkeyPatch], None], stage: str
) -> None:
    slow(monkeypatch)
    report = read(known)
    assert report.bound == stage
    assert stage in report.why


def test_read_compares_the_loader_with_what_its_stages_allow(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_decode(monkeypatch)
    rates = {r.what: r for r in read(known).rates}
    assert {"memory copy, 1 core", "gather, 1 thread", "loader, shuffled", "loader, stored order"} <= rates.keys()
    # the sleep decides both the ceiling and the loader, whatever the machine does
    assert 0.2 < rates["loader, stored order"].of_ceiling < 1.5


def test_read_of_an_object_store_asks_as_often_as_told(known: Known, gcs_server: Server) -> None:
    from actstore.store.maintain.copy import copy

    url = gcs_server.fresh()
    copy(known.url, url)
    report = bench_read(url, site="resid_post.3", batch_size=64, seconds=0.2, rounds=1, inflight=3)
    assert "fetch, 3 at once" in [r.what for r in report.rates]
    assert report.bound == "fetch"


def test_write_names_the_stage_that_was_slowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(codec, "encode_into", slowed(codec.encode_into))
        patch.setattr("os.sync", lambda: None)
        assert bench_write(str(tmp_path), d=16, gb=0.001, rounds=1).bound == "encode"
    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "create", slowed(slowed(slowed(LocalStorage.create))))
        patch.setattr("os.sync", lambda: None)
        assert bench_write(str(tmp_path), d=16, gb=0.001, rounds=1).bound == "put"
    assert not list(tmp_path.iterdir())


def test_storage_names_latency_and_finds_the_knee(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalStorage, "get_range", slowed(slowed(slowed(slowed(LocalStorage.get_range)))))
    report = bench_storage(str(tmp_path), sizes=(0.0625,), concurrency=(1, 8), seconds=0.2)
    assert report.bound == "latency"
    assert report.figures["knee"]["GET"] == {"0.0625 MiB": 8}
    assert not list(tmp_path.iterdir())
    assert knee({1: 1.0, 2: 1.9, 4: 2.0, 8: 2.05}) == 2


def test_storage_leaves_out_what_memory_could_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actstore.bench.storage.WAVE", 1 << 18)
    report = bench_storage(str(tmp_path), sizes=(0.125, 0.25), concurrency=(1, 2), seconds=0.02)
    measured = {(r.more["MiB"], r.more["at once"]) for r in report.rates[1:]}
    assert measured == {(0.125, 1), (0.125, 2), (0.25, 1)}


def test_an_interrupted_storage_benchmark_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalStorage, "get_range", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench_storage(str(tmp_path), sizes=(0.0625,), concurrency=(4,), seconds=5.0)
    assert not list(tmp_path.iterdir())


def check_json(file: Path, bounds: tuple[str, ...]) -> None:
    data = json.loads(file.read_text())
    assert data.keys() == {"command", "rates", "bound", "why", "machine", "figures", "date"}
    assert data["bound"] in bounds
    assert {"cores", "python", "actstore", "numpy"} <= data["machine"].keys()
    for rate in data["rates"]:
        assert rate.keys() == {"what", "gb_s", "of_ceiling", "ceiling", "more"}
        assert rate["gb_s"] > 0
        assert rate["of_ceiling"] > 0


def test_the_command_line_writes_figures(known: Known, tmp_path: Path) -> None:
    commands: dict[str, tuple[str, ...]] = {
        "read": (known.url, "--batch-size", "64", "--seconds", "0.3", "--rounds", "1"),
        "storage": (str(tmp_path / "o"), "--sizes", "0.1", "--concurrency", "1", "2", "--seconds", "0.05"),
    }
    bounds = {
        "read": ("fetch", "decode", "gather"),
        "storage": ("latency", "memory", "processor", "disk"),
    }
    for name, args in commands.items():
        json_file = tmp_path / f"{name}.json"
        done = run_actstore("bench", name, *args, "--json", str(json_file))
        check_json(json_file, bounds[name])
        assert "\nbound: " in done.stdout
        assert "python " in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("read", "nowhere"), 1, "no activation store"),
        (("storage", "nope://x"), 2, "unknown URL scheme"),
        (("storage", ".", "--sizes", "0"), 2, "must be positive"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_errors_are_short_and_have_a_code(args: tuple[str, ...], code: int, words: str) -> None:
    done = run_actstore("bench", *args, code=code)
    assert words in done.stderr + done.stdout
