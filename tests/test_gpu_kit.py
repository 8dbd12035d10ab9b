"""The GPU kit on a CPU: every part runs to its end, and its checks pass."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KIT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


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


def test_a_wrong_value_fails_the_run(tmp_path: Path) -> None:
    """A check that can't fail would prove nothing: with a tolerance of 0 bfloat16 rounding fails it."""
    code = f"import sys; sys.path.insert(0, {str(KIT.parent)!r}); import gpu; gpu.TOLERANCE['bfloat16'] = 0.0; "
    code += "sys.argv = ['gpu.py', '--device', 'cpu', '--quick', '--only', 'values']; sys.exit(gpu.main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FAILED (at most 0)" in done.stdout


def test_without_a_gpu_the_command_says_what_runs_instead() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run()
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: torch finds no GPU here; --device cpu --quick runs")
