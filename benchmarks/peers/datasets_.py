# pyright: basic, reportMissingImports=false
"""Hugging Face `datasets`: an Arrow data set of fixed-size int16 lists in torch format, in a shuffling DataLoader.

Its guide (differences between Dataset and IterableDataset) prefers `to_iterable_dataset` with a shuffle buffer; on
these rows that is ten times slower (0.03 against 0.30 GB/s at d = 2304), since its torch format makes int64 of every
row, and it shuffles less.
https://huggingface.co/docs/datasets/about_mapstyle_vs_iterable
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import measure
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader

SHARD_ROWS = 1 << 15


def prepare(source: np.ndarray, folder: Path) -> None:
    """Store the rows."""
    for i, start in enumerate(range(0, len(source), SHARD_ROWS)):
        flat = np.ascontiguousarray(source[start : start + SHARD_ROWS]).view(np.int16).reshape(-1)
        table = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(flat), source.shape[1])})
        datasets.Dataset(table).save_to_disk(folder / f"{i:05d}", num_shards=1)


def batches(run: measure.Run) -> Iterator[Any]:
    """One epoch."""
    shards = [datasets.load_from_disk(str(p)) for p in sorted(run.folder.iterdir())]
    data: Any = datasets.concatenate_datasets(shards).with_format("torch", dtype=torch.int16)
    torch.manual_seed(run.epoch)
    for sample in DataLoader(data, batch_size=run.batch_size, shuffle=True, num_workers=run.workers, drop_last=True):
        yield sample["x"]


if __name__ == "__main__":
    measure.main(prepare, batches)
