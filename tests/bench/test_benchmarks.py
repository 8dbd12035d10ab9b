"""Scripts of benchmarks/: what they record and refuse to record, and how peers are measured."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "peers")]

import codec as codec_script  # noqa: E402
import collect  # noqa: E402
import loader  # noqa: E402
import measure  # noqa: E402
import peers  # noqa: E402
import record  # noqa: E402


class Times(NamedTuple):
    user: float = 0.0
    idle: float = 0.0
    iowait: float = 0.0
    steal: float = 0.0
    guest: float = 0.0


@pytest.mark.parametrize(
    ("times", "own", "refused"),
    [
        (Times(user=50, idle=50, guest=40), 50, ""),
        (Times(user=55, idle=40, iowait=5), 50, ""),
        (Times(user=70, idle=30), 50, "other processes took 20%"),
        (Times(user=50, idle=30, steal=20), 50, "other virtual machines took 20%"),
    ],
)
def test_what_others_slowed_is_refused(times: Times, own: float, refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, owns = iter([Times(), times]), iter([0.0, own])
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 3.0)
    monkeypatch.setattr("psutil.cpu_times", lambda: next(looks))
    monkeypatch.setattr(record, "_own_seconds", lambda: next(owns))
    if not refused:
        with record.cores():
            pass
        return
    with pytest.raises(SystemExit, match=refused), record.cores():
        pass


def test_a_busy_machine_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 40.0)
    with pytest.raises(SystemExit, match="40% of the processor is in use"), record.cores():
        pytest.fail("it ran")


def run(parts: dict[str, Any], *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["speed.py", *arguments])
    monkeypatch.setattr(record, "cores", lambda daemons: record.nullcontext())
    record.main("speed.py", parts, record.parser("Speed."))


def test_parts_are_recorded_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "HERE", tmp_path)

    def one(args: argparse.Namespace) -> list[record.Row]:
        """Of one."""
        return [{"what": "a", "ratio": 0.5}, {"what": "b", "all": [1, 2]}]

    def two(args: argparse.Namespace) -> list[record.Row]:
        return [{"what": "c", "GB/s": float(args.rounds)}]

    (tmp_path / "speed.json").write_text('{"rates": {"figures": {}}}')  # of an older form
    run({"one": one, "two": two}, monkeypatch=monkeypatch)
    run({"one": one, "two": two}, "--only", "two", "--rounds", "9", monkeypatch=monkeypatch)
    data = json.loads((tmp_path / "speed.json").read_text())
    assert data.keys() == {"one", "two"}
    assert data["one"].keys() == {"words", "command", "rows", "machine", "commit", "date"}
    assert data["two"]["rows"] == [{"what": "c", "GB/s": 9.0}]
    page = (tmp_path / "speed.md").read_text()
    assert "| what | ratio |\n| --- | --- |\n| a | 0.5 |\n| b |  |" in page
    assert "`python benchmarks/speed.py --only two --rounds 9`: processor " in page
    before = page
    run({"one": two, "two": two}, "--quick", monkeypatch=monkeypatch)
    assert (tmp_path / "speed.md").read_text() == before
    with pytest.raises(SystemExit):
        run({"one": one}, "--only", "nobody", monkeypatch=monkeypatch)


def test_reports_of_commands_are_rates_and_figures() -> None:
    rate = {"what": "loader", "gb_s": 2.0, "more": {"at once": 3}}
    data = {"command": "x", "rates": [rate], "bound": "decode", "machine": {"cores": 2}, "figures": {"a": {"b": 1}}}
    assert collect.rows(data) == [
        {"what": "loader", "gb_s": 2.0, "at once": 3},
        {"what": "bound", "value": "decode"},
        {"what": "figures.a.b", "value": 1},
    ]


def test_every_form_is_measured() -> None:
    copy, *forms = codec_script.forms(argparse.Namespace(quick=True, like=None, rounds=1))
    assert copy["form"] == "memory copy"
    assert len(forms) == 9
    ratio = {row["form"]: row["bf16 bytes / stored"] for row in forms}
    assert ratio["bf16 planes"] > 1.2
    assert ratio["fixed planes"] > 2
    assert all(row[stage] > 0 for row in forms for stage in codec_script.STAGES)


def peer_arguments(folder: Path, *, quick: bool) -> argparse.Namespace:
    return argparse.Namespace(quick=quick, dir=folder, rounds=1, peers=peers.NAMES, environments=folder / "none")


def test_a_peer_that_is_not_installed_keeps_its_line(tmp_path: Path) -> None:
    ours, *others = peers.peers(peer_arguments(tmp_path, quick=True))
    assert ours["loader"] == "actstore"
    assert ours["rows/s"] > 0
    assert ours["spread"] > 0.5
    assert ours["over actstore"] == 1.0
    assert [row["loader"] for row in others] == list(peers.NAMES)
    assert all("not installed" in row["note"] for row in others)


def test_a_peer_that_cannot_be_installed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise subprocess.CalledProcessError(1, "pip", stderr="noise\nERROR: no such thing\nmore")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(peers.FailedError, match="ERROR: no such thing"):
        peers.python_of("zarr", peer_arguments(tmp_path, quick=False))


def test_every_peer_has_a_script_and_pinned_requirements() -> None:
    for name in peers.NAMES:
        assert (peers.SCRIPTS / f"{name}_.py").is_file()
        pins = (peers.SCRIPTS / f"requirements-{name}.txt").read_text().split()
        assert all("==" in pin for pin in pins)


def test_what_a_peer_delivers_is_checked_against_the_source(tmp_path: Path) -> None:
    peers.write_source(tmp_path / "rows.npy", 70_000, 4)
    source = np.load(tmp_path / "rows.npy")
    order = np.random.default_rng(0).permutation(len(source))[:512]
    assert measure.check(source, source[order])["spread"] > 0.8
    assert measure.check(source, source[:512])["spread"] < 0.1
    wrong = source[order].copy()
    wrong[0, 3] ^= 1
    with pytest.raises(RuntimeError, match="rows that the source does not have"):
        measure.check(source, wrong)


def test_a_loader_is_timed_between_steady_states() -> None:
    source = np.zeros((64, 4), np.uint16)
    source[:, 0] = np.arange(64)
    began: list[int] = []

    def epoch(number: int) -> Any:
        began.append(number)
        for start in range(0, 64, 8):
            time.sleep(0.002)
            yield source[start : start + 8]

    found = measure.read(source, epoch, 0.2)
    assert began == list(range(len(began)))
    assert 0 < found["rows/s"] < 4000  # 8 rows in 2 ms at most
    assert found["GB/s"] == pytest.approx(found["rows/s"] * 4 * 2 / 1e9)


@pytest.mark.parametrize(("part", "compared"), [("planes", 4), ("none", 1), ("filter", 1)])
def test_the_loader_is_compared_with_its_limits(part: str, compared: int, tmp_path: Path) -> None:
    rows = loader.PARTS[part](argparse.Namespace(quick=True, dir=tmp_path, rounds=1))
    assert len(rows) == compared
    assert all(row["ratio"] > 0 and row["ratio in processor time"] > 0 for row in rows)
    if part == "filter":
        assert rows[0]["batches over batches without"] == pytest.approx(0.9, abs=0.06)


def test_python_alone_decodes_and_gathers_nothing(tmp_path: Path) -> None:
    rows = loader.python(argparse.Namespace(quick=True, dir=tmp_path, rounds=1))
    assert [row["what"] for row in rows] == ["site alone", "with_rows"]
    assert all(0 < row["processor ms per chunk"] < 100 for row in rows)
