"""The GPU kit on a CPU: every part runs to its end, and its checks pass."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KIT = Path(__file__).parent.parent.parent / "benchmarks" / "gpu.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(KIT), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.timeout(600)
def test_every_part_runs_and_is_recorded(tmp_path: Path) -> None:
    done = run("--device", "cpu", "--quick", "--json", str(tmp_path / "kit.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "kit.json").read_text())
    assert list(record["seconds"]) == ["values", "capture", "loader", "trainer"]
    assert {line["part"] for line in record["lines"]} == set(record["seconds"])
    assert not record["failed"]
    checks = [line for line in record["lines"] if line["passed"] is not None]
    assert len(checks) >= 22
    assert all(line["passed"] for line in checks)
    assert record["machine"]["processor"]
    for line in record["lines"]:
        assert line["what"] in done.stdout
    for name in record["not_measured"]:
        assert f"not measured: {name}" in done.stdout


def test_a_wrong_value_a_nan_and_an_error_fail_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(KIT.parent))
    from kit.record import QUICK, Kit, Record

    for value, expected in ((1e-4, True), (2e-3, False), (float("nan"), False)):
        record = Record(device="cpu", quick=True, machine={})
        Kit(device="cpu", size=QUICK, folder=Path(), record=record).check("values", "x", value, 1e-3)
        assert record.ok == expected
    assert not Record(device="cpu", quick=True, machine={}, failed={"loader": "OSError"}).ok


def test_without_a_gpu_the_command_says_what_runs_instead() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run()
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: torch finds no GPU here; --device cpu --quick runs")
