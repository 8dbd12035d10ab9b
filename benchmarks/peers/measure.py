# pyright: basic
"""What a peer's script runs in its own environment: measure a loader's batches and print the figures as JSON.

Needs numpy and Linux's /proc only. A batch is a tensor or array [B, d] of 2-byte elements; the first two of every row
hold its number (see `source.py`), so that what arrives is checked against the source, bit for bit.
"""

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CHECKED_ROWS = 256
BLOCK_ROWS = 2048
MEMORY_PERIOD_S = 0.5


@dataclass(frozen=True)
class Run:
    """One epoch to read."""

    folder: Path
    batch_size: int
    workers: int
    epoch: int


def main(prepare: Callable[[Any, Path], None], batches: Callable[[Run], Iterator[Any]]) -> None:
    """`prepare SOURCE FOLDER` once, then `read SOURCE FOLDER` as often as wanted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("phase", choices=("prepare", "read"))
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    source = np.load(args.source, mmap_mode="r")
    if args.phase == "prepare":
        began = time.perf_counter()
        prepare(source, args.folder)
        found: dict[str, Any] = {"prepare s": time.perf_counter() - began, "stored bytes": size(args.folder)}
    else:
        found = read(source, lambda e: batches(Run(args.folder, args.batch_size, args.workers, e)), args.seconds)
    sys.stdout.flush()
    print("\n" + json.dumps(found))


def read(source: np.ndarray, epoch: Callable[[int], Iterator[Any]], seconds: float) -> dict[str, Any]:
    """Rates for so many seconds of epochs on end, after a third of that to warm up: steady at both ends."""
    copy, memory = memory_copy(), Memory()
    rows, epochs, used, idle, first_s, batch = 0, 0, 0.0, 0.0, 0.0, None
    created = time.perf_counter()
    began = end = 0.0
    while not end or time.perf_counter() < end:
        before = batch
        for batch in epoch(epochs):
            now = time.perf_counter()
            if not first_s:
                first_s = now - created
            if end:
                rows += len(batch)
                if now >= end:
                    break
            elif now - created - first_s >= seconds / 3:
                began, end, used, idle = now, now + seconds, processor_seconds(), idle_seconds()
        if batch is before:
            raise RuntimeError("an epoch had no batch")
        epochs += 1
    spent, used = time.perf_counter() - began, processor_seconds() - used
    idle = idle_seconds() - idle
    return {
        "rows/s": rows / spent,
        "GB/s": rows * source.shape[1] * 2 / spent / 1e9,
        "memory copy GB/s": copy,
        "first batch s": first_s,
        "peak MiB": memory.stop() / 2**20,
        "processor s": used,
        "idle s": idle,
        "wall s": spent,
        "rows": rows,
        "epochs": epochs,
        **check(source, batch),
    }


def check(source: np.ndarray, batch: Any) -> dict[str, Any]:
    """Whether a batch is of rows of the source, and how widely they are drawn: blocks met over those expected."""
    bits = as_bits(batch)
    number = bits[:, 0].astype(np.int64) | bits[:, 1].astype(np.int64) << 16
    some = np.linspace(0, len(bits) - 1, min(len(bits), CHECKED_ROWS)).astype(int)
    if number.max() >= len(source) or not all(np.array_equal(bits[i], source[number[i]]) for i in some):
        raise RuntimeError("a batch holds rows that the source does not have")
    blocks = -(-len(source) // BLOCK_ROWS)
    met, expected = len(np.unique(number // BLOCK_ROWS)), blocks * (1 - (1 - 1 / blocks) ** len(bits))
    return {"batch rows": len(bits), "rows twice": len(bits) - len(np.unique(number)), "spread": met / expected}


def as_bits(batch: Any) -> np.ndarray:
    """A batch as uint16 [B, d]."""
    if not isinstance(batch, np.ndarray):
        import torch

        batch = batch.view(torch.int16).numpy()
    return batch.view(np.uint16)


def memory_copy() -> float:
    """GB/s of copying warm memory on one core, median of five."""
    source, target = np.ones(1 << 24, np.uint8), np.empty(1 << 24, np.uint8)
    found = []
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(8):
            np.copyto(target, source)
        found.append(8 * source.nbytes / (time.perf_counter() - began) / 1e9)
    return statistics.median(found[1:])


def session() -> Iterator[tuple[Path, list[str]]]:
    """Folder in /proc and the fields of `stat` from the third on (proc_pid_stat(5)), of this session's processes."""
    mine = os.getsid(0)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended
        if int(fields[3]) == mine:
            yield folder, fields


def processor_seconds() -> float:
    """User and system time of this session, ended children included."""
    ticks = sum(sum(map(int, fields[11:15])) for _, fields in session())
    return ticks / os.sysconf("SC_CLK_TCK")


def idle_seconds() -> float:
    """Time that all cores of the machine were idle or waited for a disk (proc_stat(5))."""
    fields = Path("/proc/stat").read_text().split(maxsplit=6)
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")


def memory_bytes() -> int:
    """Anonymous and shared memory of this session, each page once: what the kernel can't drop, unlike mapped files."""
    total = 0
    for folder, _ in session():
        try:
            lines = (folder / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))
    return total


class Memory:
    """The most memory that this session took, looked at twice a second."""

    def __init__(self) -> None:
        """Begin to look."""
        self._peak, self._done = memory_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(MEMORY_PERIOD_S):
            self._peak = max(self._peak, memory_bytes())

    def stop(self) -> int:
        """Bytes."""
        self._done.set()
        self._thread.join()
        return self._peak


def size(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
