"""The house rules that a machine can check."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "tokens": ["torch", "actstore.capture", "actstore.stream", "trainer"],
    "capture": ["actstore.stream", "trainer"],
    "store": [
        "torch",
        "transformers",
        "ray",
        "actstore.exchange",
        "actstore.tokens",
        "actstore.capture",
        "actstore.stream",
        "trainer",
    ],
    "store/format": [f"actstore.store.{room}" for room in ("storage", "write", "read", "maintain")],
    "store/storage": [f"actstore.store.{room}" for room in ("format", "write", "read", "maintain")],
    "store/read": ["actstore.store.write", "actstore.store.maintain"],
    "store/write": ["actstore.store.maintain"],
    "exchange": ["actstore.tokens", "actstore.capture", "actstore.stream", "trainer"],
    "stream": ["transformers", "ray", "torch.nn", "actstore.tokens", "actstore.capture", "trainer"],
    "trainer": ["zarr", "ray", "actstore.store.write.bucket", "actstore.capture.run", "actstore.capture.worker"],
}
DEMO = {"trainer/demo.py"}


def sources() -> list[Path]:
    return sorted(p for d in ("actstore", "trainer") for p in (ROOT / d).rglob("*.py"))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{a.name}" for a in node.names)
    return found


@pytest.mark.parametrize("part", FORBIDDEN)
def test_nothing_imports_backwards(part: str) -> None:
    root = ROOT / ("trainer" if part == "trainer" else f"actstore/{part}")
    for path in root.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if name in DEMO:
            continue
        bad = {i for i in imports(path) for f in FORBIDDEN[part] if i == f or i.startswith(f + ".")}
        assert not bad, f"{name} imports {bad}"


def test_only_the_command_line_knows_the_trainer() -> None:
    for path in (ROOT / "actstore").rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        found = {i for i in imports(path) if i.split(".")[0] == "trainer"}
        assert not found or name == "actstore/cli.py", f"{name} imports {found}"


def test_nothing_executable_is_read() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                {getattr(node, "id", None), getattr(node, "attr", None)}
                if isinstance(node, (ast.Name, ast.Attribute))
                else set()
            )
            if path.parts[-2:] != ("builtin", "make.py"):
                assert not names & {"pickle", "exec"}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "pickle.load", "pickle.loads"), f"{path}: {called}"
                if called == "torch.load":
                    assert "weights_only=True" in map(ast.unparse, node.keywords), f"{path}: {called}"
                for keyword in node.keywords:
                    if keyword.arg in ("allow_pickle", "trust_remote_code"):
                        assert ast.unparse(keyword.value) == "False", f"{path}: {keyword.arg}"


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, actstore, actstore.cli, actstore.capture.config, trainer.config; "
    code += "print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_pins_cover_every_dependency() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    for requirement in wanted:
        name = (
            requirement.split(";")[0]
            .split("[")[0]
            .split(">")[0]
            .split("=")[0]
            .split("<")[0]
            .strip()
            .lower()
            .replace("_", "-")
        )
        assert name in pins, name
    assert all("==" in line or line.startswith("#") or not line for line in lines)


def test_binary_fixtures_stay_small() -> None:
    out = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    files = [ROOT / f.decode() for f in out.split(b"\0") if f]
    binary = sum(
        f.stat().st_size for f in files if f.suffix in (".safetensors", ".parquet", ".npz", ".png") and f.exists()
    )
    assert binary < 16_000_000


def test_pyproject_and_package_agree_on_the_version() -> None:
    import tomllib

    import actstore

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == actstore.__version__


def test_json_files_are_json() -> None:
    for path in (ROOT / "benchmarks").glob("*.json"):
        json.loads(path.read_text())


def test_a_read_only_installation_without_a_home_has_a_private_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    import actstore

    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", "/proc/nonexistent")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    actstore._give_numba_a_cache(ROOT)
    assert "NUMBA_CACHE_DIR" not in os.environ
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    actstore._give_numba_a_cache(ROOT)
    cache = Path(os.environ.pop("NUMBA_CACHE_DIR"))
    assert cache.stat().st_mode & 0o777 == 0o700
