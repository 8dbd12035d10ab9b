"""Train every peer's SAE for 50 steps on a store: `python tests/peers/run.py [NAME...]`, or `make test-peers`.

Each peer has an environment of its own below .peers/, made of the pinned packages in requirements-NAME.txt. A store of
two structured sites is written, and each example runs under `audit.py`, which checks every batch that was delivered.
Passes if every loss falls, no batch was wrong and none changed but by the trainer that is known to.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PEERS = ROOT / ".peers"
TORCH = "torch==2.13.0"
STEPS = 50
ROWS = 32768
SITES = {"resid_post.3": 128, "mlp_out.3": 64}
ONE = ["--site", "resid_post.3"]
EXPORTS = "tests/peers/exports.py"
CASES: dict[str, list[tuple[str, str, list[str]]]] = {
    "saelens": [
        ("examples/train_saelens.py", "bf16", [*ONE, "--checkpoints", "CHECKPOINTS"]),
        ("examples/train_saelens.py", "bf16", [*ONE, "--resume", "CHECKPOINTS/HALF"]),
        ("examples/train_saelens_multi.py", "bf16", ["--sites", *SITES]),
        ("tests/peers/scaler.py", "bf16", ["--sites", *SITES]),
        (EXPORTS, "f32", ["--as", "saelens"]),
    ],
    "dictionary_learning": [
        ("examples/train_dictionary_learning.py", "bf16", ONE),
        ("examples/train_dictionary_learning.py", "f32", [*ONE, "--out", "OUT"]),
        (EXPORTS, "f32", ["--as", "dictionary_learning"]),
    ],
    "llamascopium": [("examples/train_llamascopium.py", "bf16", ONE)],
    "sparsify": [("examples/train_sparsify.py", "bf16", [*ONE, "--out", "OUT"])],
    "openai_style": [("examples/train_openai_style.py", "f32", ONE)],
    "overcomplete": [("examples/train_overcomplete.py", "f32", ONE)],
}
"""By environment: script, encoding of the store, arguments; capitals are folders of the run."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}; default all")
    names = parser.parse_args().names or list(CASES)
    if unknown := set(names) - set(CASES):
        parser.error(f"no peer {sorted(unknown)}; there are {', '.join(CASES)}")
    work = PEERS / "runs"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for encoding in ("bf16", "f32"):
        write_store(work / encoding, encoding)
    passed = failed = 0
    if any(script == EXPORTS for name in names for script, *_ in CASES[name]):
        failed += run(Path(sys.executable), EXPORTS, work / "f32", ["--as", "make"], work) is None
        passed += not failed
    for name in names:
        try:
            python = environment(name)
        except subprocess.CalledProcessError as e:
            print(f"FAILED {name}: no environment ({e})", flush=True)
            failed += len(CASES[name])
            continue
        before = None
        for script, encoding, arguments in CASES[name]:
            end = run(python, script, work / encoding, arguments, work)
            if end and "--resume" in arguments and end != before:
                print(f"FAILED {script}: resumed, it ends at loss {end}; uninterrupted, at {before}")
                end = None
            before = end
            passed, failed = passed + (end is not None), failed + (end is None)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


def environment(name: str) -> Path:
    """The Python of a peer's environment, which is made if it isn't there or its requirements changed."""
    requirements, folder = HERE / f"requirements-{name}.txt", PEERS / name
    if not requirements.exists():  # an example of ours that needs no package
        return Path(sys.executable)
    python, done = folder / "bin" / "python", folder / "requirements.txt"
    if not done.exists() or done.read_bytes() != requirements.read_bytes():
        print(f"making {folder.relative_to(ROOT)}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # torch first, so that the build at hand serves, with what that build needs; then exactly what is listed.
        subprocess.run([*pip, TORCH], check=True, stderr=subprocess.DEVNULL)
        subprocess.run([*pip, "--no-deps", "-r", requirements], check=True)
        subprocess.run([*pip, "--no-deps", "-e", ROOT], check=True)
        shutil.copyfile(requirements, done)
    return python


def write_store(path: Path, encoding: str) -> None:
    """32,768 rows of two sites: sparse mixtures of fixed directions about a mean, their lengths far from 1."""
    import actstore

    rng = np.random.default_rng(0)
    with actstore.create(
        path, sites=SITES, encoding=encoding, bucket_rows=8192, shard_rows=4096, chunk_rows=512
    ) as writer:
        directions = {site: rng.standard_normal((2 * d, d)) for site, d in SITES.items()}
        for first in range(0, ROWS, 4096):
            row = np.arange(first, first + 4096)
            x = {}
            for site, d in SITES.items():
                used = rng.exponential(1.0, (len(row), 2 * d)) * (rng.random((len(row), 2 * d)) < 8 / (2 * d))
                x[site] = (3 * used @ directions[site] + 2 * directions[site].mean(0) + 0.5).astype(np.float32)
            writer.append(x, token_id=row % 997, sequence=row // 128, position=row % 128 + 1)


def resolved(argument: str, work: Path) -> str:
    """An argument with folders of this run in place of the words in capitals."""
    if argument == "CHECKPOINTS/HALF":
        return str(max((work / "checkpoints").iterdir()))
    return str(work / argument.lower()) if argument.isupper() else argument


def run(python: Path, script: str, store: Path, arguments: list[str], work: Path) -> str | None:
    """Run a script, an example under the audit; the loss it ended at, if any, or None if something was wrong."""
    environ = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "MPLBACKEND": "agg",
        "TOKENIZERS_PARALLELISM": "false",
    }
    given = [resolved(a, work) for a in arguments]
    trains = script.startswith("examples/")
    audit = [HERE / "audit.py"] if trains else []
    command = [python, *audit, ROOT / script, store, *given, "--steps", str(STEPS)]
    done = subprocess.run(command, env=environ, cwd=work, capture_output=True, text=True, timeout=600, check=False)
    said = [line for line in done.stdout.splitlines() if re.search(r"loss first|^audit ", line)]
    ends = re.findall(r"loss first \S+ last (\S+)", done.stdout)
    ok = done.returncode == 0 and (bool(ends) or not trains)
    print(
        f"{'passed' if ok else 'FAILED'} {script} on {store.name} {' '.join(arguments)}",
        *said,
        sep="\n    ",
        flush=True,
    )
    if not ok:
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", flush=True)
        return None
    return ends[-1] if ends else ""


if __name__ == "__main__":
    sys.exit(main())
