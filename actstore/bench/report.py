"""What every benchmark shares: rates and their ceilings, how they are measured and shown.

Figures are GB (1e9 bytes) of decoded activations per second. Machines are shared and drift, so whatever is compared is
measured in alternating rounds of one run: ratios are taken inside a round, and medians over rounds are reported.
"""

import contextlib
import os
import platform
import secrets
import shutil
import statistics
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from actstore import console
from actstore.store.storage import LocalStorage, Storage, open_storage
from actstore.stream.stages import gb_per_s

GB = 1e9
PASSES = 5
SCRATCH = "actstore-bench-"
"""How the names of everything that a benchmark writes begin."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """One line of a benchmark."""

    what: str
    gb_s: float
    of_ceiling: float
    """Ratio to the ceiling that the line names."""
    ceiling: str
    more: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further figures of the line, by column."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """One benchmark run."""

    command: str
    rates: list[Rate]
    bound: str
    """The stage that limits the whole."""
    why: str
    """The figures behind `bound`, in a few words."""
    machine: dict[str, Any]
    figures: dict[str, Any] = field(default_factory=dict[str, Any])
    """Figures that are no rates, by name."""
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


PACKAGES = ("actstore", "numpy", "numcodecs", "zstandard", "numba", "torch", "transformers", "zarr", "gcsfs", "obstore")


def machine() -> dict[str, Any]:
    """Processor, cores, memory (GiB) and the versions that matter; a checkout that is not installed has none."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory GiB": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def processor() -> str:
    """The processor's name and its widest instructions, with the environment's limits on them."""
    found = Path("/proc/cpuinfo")
    lines = dict(line.split("\t")[:1] + line.split(": ")[1:2] for line in _lines(found) if ": " in line)
    flags = lines.get("flags", lines.get("Features", "")).split()
    widest = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve", "asimd") if f in flags), None)
    limits = [f"{n}={os.environ[n]}" for n in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY") if n in os.environ]
    return ", ".join(filter(None, [lines.get("model name", platform.machine()), widest, *limits]))


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def alternate(stages: Mapping[str, Callable[[], float]], rounds: int = PASSES) -> list[dict[str, float]]:
    """What every stage returns, its GB/s, in every round, one stage after the other; one more round warms up."""
    return [{name: stage() for name, stage in stages.items()} for _ in range(rounds + 1)][1:]


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Median of every figure over the rounds."""
    return {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}


def copying(nbytes: int = 1 << 24) -> Callable[[], int]:
    """Copies of warm memory on one core, as a stage."""
    source, target = np.ones(nbytes, np.uint8), np.empty(nbytes, np.uint8)

    def work() -> int:
        for _ in range(8):
            np.copyto(target, source)
        return 8 * nbytes

    return work


def memcpy(nbytes: int = 1 << 24) -> float:
    """GB/s of copying warm memory on one core: the median of some passes; one more warms up."""
    work = copying(nbytes)
    return medians(alternate({"copy": partial(gb_per_s, work)}))["copy"]


def memory_copy(gb_s: float) -> Rate:
    """The line of the ceiling that all others are compared with."""
    return Rate(what="memory copy, 1 core", gb_s=gb_s, of_ceiling=1.0, ceiling="itself")


def activations_like(rows: int, d: int, seed: int = 0) -> NDArray[np.uint16]:
    """bf16 bits [rows, d] with the entropy of real activations.

    Student-t noise (5 degrees of freedom) times a lognormal scale per dimension: exponents of about 2.9 bits, as
    measured on mid-layer residual streams, so that compression ratio and speed carry over.
    """
    bits = float_activations_like(rows, d, seed).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def float_activations_like(rows: int, d: int, seed: int = 0) -> NDArray[np.float32]:
    """What `activations_like` rounds to bf16 [rows, d]."""
    rng = np.random.default_rng(seed)
    return rng.standard_t(5, (rows, d)).astype(np.float32) * np.exp(rng.normal(0, 0.6, d)).astype(np.float32)


@contextlib.contextmanager
def scratch(url: str) -> Generator[Storage]:
    """A storage of a new name below `url`; whatever is in it is deleted at the end, after Ctrl-C too."""
    storage = open_storage(f"{url.rstrip('/')}/{SCRATCH}{secrets.token_hex(4)}")
    try:
        yield storage
    finally:
        if isinstance(storage, LocalStorage):
            shutil.rmtree(storage.root, ignore_errors=True)
        else:
            for key in storage.list(""):
                storage.delete(key)


def table(report: Report) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Header and lines of a report's rates, with the further columns that any line has."""
    if is_grid(report):
        return _grid(report)
    more = list(dict.fromkeys(name for r in report.rates for name in r.more))
    ceilings = {r.ceiling for r in report.rates[1:]}
    several = len(ceilings) > 1
    lines = [
        (r.what, r.gb_s, r.of_ceiling, *((r.ceiling,) if several else ()), *(r.more.get(n, "") for n in more))
        for r in report.rates
    ]
    return ("", "GB/s", *(("ratio", "to") if several else (f"of {next(iter(ceilings))}",)), *more), lines


def is_grid(report: Report) -> bool:
    """Whether the rates are by verb, object size and concurrency."""
    return all("at once" in r.more for r in report.rates[1:])


def _grid(report: Report) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """A line for each verb and size, a column for each concurrency."""
    cells = {(r.more["verb"], r.more["MiB"], r.more["at once"]): r for r in report.rates[1:]}
    columns = sorted({n for _, _, n in cells})
    lines: list[tuple[Any, ...]] = []
    for verb, mib in sorted({(verb, mib) for verb, mib, _ in cells}):
        found = [cells.get((verb, mib, n)) for n in columns]
        best = max(r.of_ceiling for r in found if r)
        rates = (r.gb_s if r else None for r in found)
        lines.append((f"{verb} {mib:g} MiB", *rates, best, report.figures["knee"][verb][f"{mib:g} MiB"]))
    return ("GB/s by requests at once", *map(str, columns), "best of memory copy", "knee"), lines


def show(report: Report, json: Path | None = None) -> None:
    """Print a report; write it as JSON where the user asked for that."""
    header, lines = table(report)
    console.print_table(report.command, lines, header=header)
    figures = {k: v for k, v in flat(report.figures).items() if k.partition(",")[0] != "knee"}
    if figures:
        console.print_table("", figures)
    print(f"bound: {report.bound} ({report.why})")
    print(machine_line(report))
    console.write_json(json, report)


def machine_line(report: Report) -> str:
    """Machine, versions and date in one line."""
    return ", ".join(f"{k} {console.figure(v)}" for k, v in report.machine.items()) + f", {report.date}"


def flat(figures: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures by joined name."""
    out: dict[str, Any] = {}
    for name, value in figures.items():
        out |= flat(value, f"{prefix}{name}, ") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return out
