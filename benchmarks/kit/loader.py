"""Decoded GB/s on the host and on the device, the cores that takes, and how long a consumer waits."""

import sys
import time
from collections.abc import Iterator
from typing import Any

import stores
import torch

import actstore
from kit.record import GIB, Kit

SAE_BYTES_PER_S = 9 * GIB
"""What one 16k-wide SAE reads at Gemma Scope's batch of 4,096 rows of 2,304 bfloat16 and 2 ms a step."""


def loader(kit: Kit) -> None:
    """Decoded GB/s on the host and on the device, the processor cores that takes, and how long a consumer waits."""
    size, copy = kit.size, _bare_copy(kit)
    bucket_rows = min(1 << 16, size.store_rows // 2)
    for encoding in ("bf16", "fixed:1e-3"):
        url = kit.folder / f"loader-{encoding}".replace(":", "-")
        began = time.perf_counter()
        stores.make(url, "resid_post.12", encoding, "planes", d=size.d, rows=size.store_rows, bucket_rows=bucket_rows)
        print(f"loader: wrote {url.name} in {time.perf_counter() - began:.1f} s", file=sys.stderr)
        for device in dict.fromkeys((None, kit.device)):
            name = f"{encoding}, on {device or 'the host'}"
            with actstore.ActivationDataset(
                url, sites="resid_post.12", batch_size=size.batch_rows, device=device
            ) as data:
                rate, cores = _rate(kit, data)
                kit.figure("loader", f"{name}, whole epochs", rate / 1e9, "GB/s", rate / copy, "a bare pinned copy")
                kit.figure("loader", f"{name}, processor", cores, "cores")
                if device is not None:
                    stall = _stall(kit, data)
                    kit.figure("loader", f"{name}, consumer of 9 GiB/s waits", 100 * stall, "% of its time")


def _bare_copy(kit: Kit) -> float:
    """Bytes per second from pinned memory to the device, in pieces of a chunk."""
    nbytes = 2048 * kit.size.d * 2
    host = torch.ones(nbytes, dtype=torch.uint8, pin_memory=kit.device == "cuda")
    target = torch.empty(nbytes, dtype=torch.uint8, device=kit.device)

    def copies() -> None:
        for _ in range(64):
            target.copy_(host, non_blocking=True)

    rate = 64 * nbytes / kit.seconds(copies)
    kit.figure("loader", "bare pinned copy", rate / 1e9, "GB/s")
    return rate


def _epochs(data: Any) -> Iterator[torch.Tensor]:
    while True:
        yield from data


def _rate(kit: Kit, data: Any) -> tuple[float, float]:
    """Bytes per second over whole epochs, filling of the pool included, and processor cores in use; one warms up."""
    for _ in data:
        pass
    kit.wait()
    moved, began, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < kit.size.seconds:
        for batch in data:
            moved += batch.nbytes
        kit.wait()
    elapsed = time.perf_counter() - began
    return moved / elapsed, (time.process_time() - used) / elapsed


def _stall(kit: Kit, data: Any) -> float:
    """Share of its time that a consumer waits which takes a batch whenever an SAE at full speed would."""
    batches = _epochs(data)
    first = next(batches)
    every = first.nbytes / SAE_BYTES_PER_S
    began = due = time.perf_counter()
    waited = 0.0
    while due - began < kit.size.seconds:
        while (now := time.perf_counter()) < due:
            time.sleep(max(0.0, due - now - 1e-4) / 2)
        next(batches)
        kit.wait()
        late = time.perf_counter() - due
        waited += late
        due = due + late + every
    return waited / (time.perf_counter() - began)
