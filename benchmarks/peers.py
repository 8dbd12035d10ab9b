"""actstore beside other loaders on the same rows: python benchmarks/peers.py [--peers NAME ...] [--environments DIR].

MosaicML Streaming, LitData, WebDataset, SAELens' cache, HF datasets, and zarr-python with a DataLoader. Each is set up
as its own documentation says; `peers/NAME_.py` states how, and where that is written. Each runs in a process and an
environment of its own, made of `peers/requirements-NAME.txt` on first use (up to 2 GB each), with as many workers as
there are cores, and reads in turns. What a loader delivers is checked against the rows. One that can't be installed or
that fails keeps its line, with the reason.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import record
from record import HERE, Row

from actstore.bench import activations_like

OURS = "actstore"
NAMES = ("mosaic", "litdata", "webdataset", "zarr", "saelens", "datasets")
SCRIPTS = HERE / "peers"
PHASE_S, INSTALL_S = 900, 1800
"""After which a loader, or its installation, is given up."""


class FailedError(Exception):
    """Why a peer has no figures."""


def peers(args: argparse.Namespace) -> list[Row]:
    """Ratios to actstore are taken within rounds. `spread` is how many blocks of 2,048 rows a batch draws from."""
    rows, d = (1 << 13, 64) if args.quick else (458_752, 2304)
    source = args.dir / "rows.npy"
    write_source(source, rows, d)
    options = ["--batch-size", 512 if args.quick else 4096, "--workers", os.cpu_count() or 1]
    options += ["--seconds", 0.5 if args.quick else 5.0]
    lines: dict[str, Row] = {}
    found: dict[str, list[Row]] = {name: [] for name in (OURS, *args.peers)}
    for number in range(args.rounds + 1):
        for name, measured in found.items():
            if "note" in lines.get(name, {}):
                continue
            phase = "read" if number else "prepare"
            try:
                python = sys.executable if name == OURS else python_of(name, args)
                done = output([python, SCRIPTS / f"{name}_.py", phase, source, args.dir / name, *options], args.dir)
            except FailedError as e:
                lines[name] = {"loader": name, "note": str(e)}
                continue
            if number:
                measured.append(done)
            else:
                lines[name] = {"loader": name, **done}
    for name, measured in found.items():
        if "note" not in lines[name]:
            lines[name] |= {k: statistics.median(m[k] for m in measured) for k in measured[0]}
            pairs = zip(measured, found[OURS], strict=True)
            lines[name]["over actstore"] = statistics.median(m["GB/s"] / ours["GB/s"] for m, ours in pairs)
    return list(lines.values())


def write_source(file: Path, rows: int, d: int) -> None:
    """bf16 bits [rows, d] of a block, again and again; a row's first two values are its number, low 16 bits first.

    No format here compresses across rows, so repetition makes none smaller; the numbers tell what a loader gave.
    """
    block = activations_like(min(1 << 14, rows), d)
    out = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint16, shape=(rows, d))
    for start in range(0, rows, len(block)):
        number = np.arange(start, min(start + len(block), rows))
        out[number] = block[: len(number)]
        out[number, 0], out[number, 1] = number & 0xFFFF, number >> 16
    out.flush()


def python_of(name: str, args: argparse.Namespace) -> Path:
    """The interpreter of a peer's environment, which is made unless it is there or this is a quick run."""
    requirements = SCRIPTS / f"requirements-{name}.txt"
    folder = args.environments.resolve() / f"bench-{name}"
    python, made = folder / "bin" / "python", folder / requirements.name
    if made.is_file() and made.read_text() == requirements.read_text():
        return python
    if args.quick:
        raise FailedError("not installed; a run without --quick does it")
    print(f"{name}: making {folder}, once", file=sys.stderr)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    for command in ([sys.executable, "-m", "venv", "--clear", folder], [*pip, "-r", requirements]):
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_S)
        except subprocess.TimeoutExpired as e:
            raise FailedError(f"installing took more than {INSTALL_S} s") from e
        except subprocess.CalledProcessError as e:
            errors = [line for line in e.stderr.splitlines() if line.startswith("ERROR")] or e.stderr.splitlines()
            raise FailedError(f"could not be installed: {errors[-1][:200] if errors else e.returncode}") from e
    made.write_text(requirements.read_text())
    return python


def output(command: list[object], folder: Path) -> Row:
    """The JSON that a command in a session of its own prints last; whatever it started ends with it."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "TMPDIR": str(folder)}
    if command[0] != sys.executable:
        environment.pop("PYTHONPATH", None)  # ours is not for their environment
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(list(map(str, command)), text=True, env=environment, start_new_session=True, **streams)
    try:
        out, err = process.communicate(timeout=PHASE_S)
    except subprocess.TimeoutExpired as e:
        raise FailedError(f"took more than {PHASE_S} s") from e
    finally:
        if process.poll() is None:  # a time-out or Ctrl-C: its workers go too
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        lines = [line for line in err.splitlines() if line.strip()]
        raise FailedError(f"failed: {lines[-1][:200] if lines else process.returncode}")
    return json.loads(out.strip().rsplit("\n", 1)[-1])


if __name__ == "__main__":
    arguments = record.parser(__doc__, rounds=3)
    arguments.add_argument("--peers", nargs="*", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    arguments.add_argument("--environments", type=Path, default=HERE.parent / ".peers", help="where they are or go")
    record.main(__file__, {"peers": peers}, arguments)
