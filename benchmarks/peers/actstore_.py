# pyright: basic
"""actstore itself, in a process of its own like the others: bf16 in planes, buckets of 65,536 rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch

import actstore
from actstore.stream import Settings

SITE = "bench.0"
STEP = 1 << 14


def prepare(source: np.ndarray, folder: Path) -> None:
    """Store the rows."""
    rows, d = source.shape
    with actstore.create(folder, sites={SITE: d}, rows=rows, bucket_rows=1 << 16) as writer:
        for start in range(0, rows, STEP):
            bits = torch.from_numpy(source[start : start + STEP].astype(np.int16))
            writer.append({SITE: bits.view(torch.bfloat16)})


_datasets: list[actstore.ActivationDataset] = []


def batches(run: measure.Run) -> Iterator[Any]:
    """One epoch."""
    if not _datasets:
        options: dict[str, Any] = {"batch_size": run.batch_size, "settings": Settings(threads=run.workers)}
        _datasets.append(actstore.ActivationDataset(run.folder, sites=SITE, **options))
    yield from _datasets[0]


if __name__ == "__main__":
    measure.main(prepare, batches)
