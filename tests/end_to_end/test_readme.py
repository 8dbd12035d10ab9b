"""The README's commands and code, run as they stand."""

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from commands import run_in_fork

ROOT = Path(__file__).parent.parent.parent


def command(folder: Path, name: str, *args: str) -> None:
    """What the installed command of this name does, in the folder."""
    os.chdir(folder)
    sys.argv = [name, *args]
    (script,) = entry_points(group="console_scripts", name=name)
    script.load()()


@pytest.mark.timeout(1800)
def test_every_block_of_the_readme_runs(tmp_path: Path) -> None:
    """One block by bash and as installed commands; the others' commands without their start."""
    blocks = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert [kind for kind, _ in blocks] == ["bash", "python", "bash", "python", "bash", "bash"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for number, (kind, text) in enumerate(blocks):
        if kind == "bash" and number != 2:
            lines = text.replace("\\\n", " ").splitlines()
            runs = [run_in_fork(command, tmp_path, *shlex.split(line), timeout=300) for line in lines]
        else:
            program = ["bash", "-euc", text] if kind == "bash" else [sys.executable, "-W", "error", "-c", text]
            runs = [subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)]
        for done in runs:
            assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "runs" / "export" / "params.npz").is_file()


def test_the_table_of_the_demo_is_the_recorded_one() -> None:
    """The README quotes benchmarks/demo.json; `python benchmarks/record_demo.py` renews both."""
    import json

    figures = json.loads((ROOT / "benchmarks" / "demo.json").read_text())["figures"]
    readme = (ROOT / "README.md").read_text()
    for key in ("l0", "fvu", "delta_loss", "loss_recovered", "ratio"):
        assert f"{figures[key]:.3g}" in readme, key
