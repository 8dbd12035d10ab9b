"""The command line as a user meets it: figures, JSON, exit codes, one-line errors."""

import json
from pathlib import Path

import pytest
from commands import run_actstore
from conftest import Known, write_known


def test_info(known: Known, tmp_path: Path) -> None:
    done = run_actstore("info", known.url, "--json", str(tmp_path / "info.json"))
    figures = json.loads((tmp_path / "info.json").read_text())
    assert (figures["rows"], figures["planned_rows"], figures["buckets"]) == (1000, 1000, 4)
    assert figures["bytes_raw"] == 1000 * (24 * 2 + 7 * 4)
    assert "resid_post.3" in done.stdout


def test_verify(known: Known) -> None:
    assert "4 committed buckets are intact" in run_actstore("verify", known.url, "--deep").stdout
    victim = next(p for p in (Path(known.url) / "mlp_out.3" / "c").rglob("0") if p.is_file())
    victim.write_bytes(victim.read_bytes()[:-1])
    lines = run_actstore("verify", known.url, code=1).stdout.splitlines()
    assert lines[0].startswith("mlp_out.3/c/")
    assert all(line.startswith("note: ") for line in lines[1:])  # random bits hold NaN


def test_an_unfinished_store_says_how_far_it_is(tmp_path: Path) -> None:
    write_known(tmp_path / "s", buckets=[1])
    run_actstore("info", str(tmp_path / "s"), "--json", str(tmp_path / "i.json"))
    figures = json.loads((tmp_path / "i.json").read_text())
    assert (figures["rows"], figures["planned_rows"], figures["planned_buckets"]) == (256, 1000, 4)
    assert figures["complete"] is False
    write_known(tmp_path / "e", buckets=[])
    run_actstore("info", str(tmp_path / "e"))


def test_bench_read_and_write(known: Known, tmp_path: Path) -> None:
    run_actstore(
        "bench", "read", known.url, "--batch-size", "64", "--seconds", "0.3", "--json", str(tmp_path / "r.json")
    )
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["bound"] in ("fetch", "decode", "gather")
    assert {r["what"] for r in report["rates"]} >= {"loader, shuffled", "memory copy, 1 core"}
    assert all(r["gb_s"] > 0 for r in report["rates"])
    run_actstore("bench", "write", str(tmp_path / "w"), "--d", "64", "--gb", "0.01", "--json", str(tmp_path / "w.json"))
    assert json.loads((tmp_path / "w.json").read_text())["bound"] in ("encode", "put")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["info", "nowhere"], 1, "/nowhere: it has no zarr.json"),
        (["info", "nope://x"], 2, "unknown URL scheme 'nope'"),
        (["verify", "."], 1, "no activation store"),
        (["bench", "read", "nowhere"], 1, "no activation store"),
        (["capture", "--model", "m"], 2, "--tokens"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_errors_are_short_and_have_a_code(args: list[str], code: int, words: str) -> None:
    done = run_actstore(*args, code=code)
    assert words in done.stderr + done.stdout
    if words.startswith("no "):
        assert len(done.stderr.splitlines()) <= 2


def test_unknown_site_is_a_usage_error(known: Known) -> None:
    done = run_actstore("bench", "read", known.url, "--site", "resid_post.9", code=2)
    assert "it has mlp_out.3, resid_post.3" in done.stderr
