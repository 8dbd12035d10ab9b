# pyright: basic
"""What a peer's script runs in its own environment: measure a loader's batches and print the figures as JSON.

Needs numpy and Linux's /proc only. A batch is a tensor or array [B, d] of 2-byte elements; the first two of every row
hold its number (see `peers.py`), so that what arrives is checked against the source, bit for bit.
"""

import argparse
import json
import os
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
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args()
    source = np.load(args.source, mmap_mode="r")
    if args.phase == "prepare":
        prepare(source, args.folder)
        stored = sum(p.stat().st_size for p in args.folder.rglob("*") if p.is_file())
        found: dict[str, Any] = {"raw / stored": source.nbytes / stored}
    else:
        found = read(source, lambda e: batches(Run(args.folder, args.batch_size, args.workers, e)), args.seconds)
    sys.stdout.flush()
    print("\n" + json.dumps(found))


def read(source: np.ndarray, epoch: Callable[[int], Iterator[Any]], seconds: float) -> dict[str, Any]:
    """Rates for so many seconds of epochs on end, after a third of that to warm up: steady at both ends."""
    memory = Memory()
    rows, epochs, used, first_s, batch = 0, 0, 0.0, 0.0, None
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
                began, end, used = now, now + seconds, processor_seconds()
        if batch is before:
            raise RuntimeError("an epoch had no batch")
        epochs += 1
    spent = time.perf_counter() - began
    gb = rows * source.shape[1] * 2 / 1e9
    return {
        "GB/s": gb / spent,
        "rows/s": rows / spent,
        "processor s/GB": (processor_seconds() - used) / gb,
        "first batch s": first_s,
        "peak MB": memory.stop() / 1e6,
        **check(source, batch),
    }


def check(source: np.ndarray, batch: Any) -> dict[str, float]:
    """Check rows of a batch against the source; `spread` is how many blocks it draws from, over those expected."""
    if not isinstance(batch, np.ndarray):
        import torch

        batch = batch.view(torch.int16).numpy()
    bits = batch.view(np.uint16)
    number = bits[:, 0].astype(np.int64) | bits[:, 1].astype(np.int64) << 16
    some = np.linspace(0, len(bits) - 1, min(len(bits), CHECKED_ROWS)).astype(int)
    if number.max() >= len(source) or not all(np.array_equal(bits[i], source[number[i]]) for i in some):
        raise RuntimeError("a batch holds rows that the source does not have")
    blocks = -(-len(source) // BLOCK_ROWS)
    expected = blocks * (1 - (1 - 1 / blocks) ** len(bits))
    return {"spread": len(np.unique(number // BLOCK_ROWS)) / expected}


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
