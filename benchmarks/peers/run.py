"""The run of `actstore bench peers`: make the rows, let every loader store them its way, then read in turns.

Each loader reads in a process of its own, session and environment too, with as many workers as there are cores; the
turns go round so that a drifting machine drifts for all. A ratio is to the memory copy that the same process measured
just before. A loader that can't be installed or fails keeps its line, with the reason.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actstore.bench.report import GB, NOTE, Rate, Report, machine, memory_copy
from actstore.errors import ActstoreError
from actstore.progress import Progress
from peers.environments import PEERS, NotInstalledError, Peer, python_of
from peers.source import write_source

ROWS = 458_752
"""2.1 GB at d = 2304: seven buckets of 65,536 rows."""
PHASE_SECONDS = 900
"""After which a loader is given up."""
IDLE = 0.15
"""Share of all cores that may be idle while a loader is bound by the processor; neighbours may have the rest."""
OURS = Peer(name="actstore", title="actstore", pins=())
Figures = dict[str, Any]


class FailedError(Exception):
    """How a loader's process ended."""


def bench_peers(
    *,
    rows: int = ROWS,
    d: int = 2304,
    batch_size: int = 4096,
    seconds: float = 5.0,
    rounds: int = 3,
    only: Sequence[str] = (),
    environments: Path = Path(".peers"),
    folder: Path | None = None,
    install: bool = True,
) -> Report:
    """Rows per second of actstore and of its peers on the same rows [rows, d], stored below `folder` meanwhile."""
    unknown = set(only) - {p.name for p in PEERS}
    if unknown:
        raise ValueError(
            f"no peer is called {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in PEERS)}"
        )
    if batch_size * 2 > rows:
        raise ValueError(f"{rows} rows are too few for batches of {batch_size}; use at least {2 * batch_size}")
    peers = [OURS, *(p for p in PEERS if not only or p.name in only)]
    failed: dict[str, str] = {}
    with Progress() as progress, tempfile.TemporaryDirectory(prefix="actstore-bench-", dir=folder) as name:
        step = progress.step("peers", total=1 + len(peers) * (1 + rounds), unit="runs")
        run = _Run(Path(name), environments, batch_size, seconds, install=install)
        write_source(run.source, rows, d)
        step.advance(1)
        prepared: dict[str, Figures] = {}
        found: dict[str, list[Figures]] = {p.name: [] for p in peers}
        for number in range(rounds + 1):
            for peer in peers:
                step.note(peer.title)
                if peer.name not in failed:
                    try:
                        if number == 0:
                            prepared[peer.name] = run.phase(peer, "prepare")
                        else:
                            found[peer.name].append(run.phase(peer, "read"))
                    except (NotInstalledError, FailedError) as e:
                        failed[peer.name] = str(e)
                step.advance(1)
    raw = rows * d * 2
    if OURS.name in failed:
        raise ActstoreError(f"actstore itself {failed[OURS.name]}")
    lines = [_line(p, found[p.name], prepared.get(p.name), failed.get(p.name), raw) for p in peers]
    return _report(lines, rows, d, batch_size, found[OURS.name])


def _report(lines: list[Rate], rows: int, d: int, batch_size: int, ours: list[Figures]) -> Report:
    copy = statistics.median(f["memory copy GB/s"] for f in ours)
    own = lines[0].more
    return Report(
        command=f"actstore bench peers --rows {rows} --d {d} --batch-size {batch_size}",
        rates=[memory_copy(copy), *lines],
        bound=own["bound"],
        why=f"actstore keeps {own['cores busy']:.0%} of {os.cpu_count()} cores busy, "
        f"{own['cores idle']:.0%} of them are idle",
        machine=machine(),
        figures={"GB of rows": rows * d * 2 / GB, "packages": {p.title: ", ".join(p.pins) for p in PEERS}},
    )


def _line(peer: Peer, found: list[Figures], prepared: Figures | None, why: str | None, raw: int) -> Rate:
    """Medians over the rounds; without figures, why there are none."""
    if why is not None or not found or prepared is None:
        more = {NOTE: why}
        return Rate(what=peer.title, gb_s=None, of_ceiling=None, ceiling="memory copy", more=more)

    def median(name: str) -> float:
        return statistics.median(f[name] for f in found)

    cores = os.cpu_count() or 1
    busy = statistics.median(f["processor s"] / f["wall s"] for f in found) / cores
    idle = statistics.median(f["idle s"] / f["wall s"] for f in found) / cores
    more = {
        "rows/s": round(median("rows/s")),
        "first batch s": median("first batch s"),
        "peak MiB": round(median("peak MiB")),
        "cores busy": busy,
        "cores idle": idle,
        "bound": "processor" if idle <= IDLE else "waiting",
        "spread": median("spread"),
        "bytes / stored": raw / prepared["stored bytes"],
    }
    ratio = statistics.median(f["GB/s"] / f["memory copy GB/s"] for f in found)
    return Rate(what=peer.title, gb_s=median("GB/s"), of_ceiling=ratio, ceiling="memory copy", more=more)


class _Run:
    """What the phases share."""

    def __init__(self, folder: Path, environments: Path, batch_size: int, seconds: float, *, install: bool) -> None:
        self.source = folder / "rows.npy"
        self._folder, self._environments, self._install = folder, environments, install
        workers = os.cpu_count() or 1
        self._options = ["--batch-size", batch_size, "--workers", workers, "--seconds", seconds]

    def phase(self, peer: Peer, phase: str) -> Figures:
        """Run a peer's script; its last line of output is JSON."""
        python: Path | str = sys.executable
        if peer is not OURS:
            python = python_of(peer, self._environments.resolve(), install=self._install)
        command = [python, peer.script, phase, self.source, self._folder / peer.name, *self._options]
        out = _output([str(c) for c in command], self._folder)
        return json.loads(out.strip().rsplit("\n", 1)[-1])


def _output(command: list[str], folder: Path) -> str:
    """Standard output of a command in a session of its own, which ends with it."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "TMPDIR": str(folder)}
    if command[0] != sys.executable:
        environment.pop("PYTHONPATH", None)  # ours is not for their environment
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=PHASE_SECONDS)
    except subprocess.TimeoutExpired as e:
        raise FailedError(f"took more than {PHASE_SECONDS} s") from e
    finally:
        if process.poll() is None:  # a time-out or Ctrl-C: its workers go too
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        lines = [line for line in err.splitlines() if line.strip()]
        raise FailedError(f"failed: {lines[-1][:200] if lines else process.returncode}")
    return out
