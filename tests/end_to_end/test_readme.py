"""The README's commands and code, run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.timeout(1800)
def test_every_block_of_the_readme_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert [kind for kind, _ in blocks] == ["bash", "python", "bash", "python", "bash", "bash"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for kind, text in blocks:
        program = ["bash", "-euc", text] if kind == "bash" else [sys.executable, "-W", "error", "-c", text]
        done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "runs" / "export" / "params.npz").is_file()


def test_the_table_of_the_demo_is_the_recorded_one() -> None:
    """The README quotes benchmarks/demo.json; `python benchmarks/record_demo.py` renews both."""
    import json

    figures = json.loads((ROOT / "benchmarks" / "demo.json").read_text())["figures"]
    readme = (ROOT / "README.md").read_text()
    for key in ("l0", "fvu", "delta_loss", "loss_recovered", "ratio"):
        assert f"{figures[key]:.3g}" in readme, key
