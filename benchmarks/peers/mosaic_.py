# pyright: basic, reportMissingImports=false
"""MosaicML Streaming as its documentation sets it up: MDS shards and its own DataLoader.

One ndarray a sample; `shuffle=True` with the default algorithm (py1e) and block size, `batch_size` given to the data
set as well, so that it partitions samples as the loader batches them.
https://docs.mosaicml.com/projects/streaming/en/latest/api_reference/generated/streaming.StreamingDataset.html
"""

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import measure
import numpy as np

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # PyPI's build for CUDA fails beside a CPU build of torch; `streaming` imports it for vision data sets, unused here
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        module: Any = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.VisionDataset, module.to_tensor = type("VisionDataset", (), {}), None
        sys.modules[name] = module

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset


def prepare(source: np.ndarray, folder: Path) -> None:
    """Store the rows."""
    with MDSWriter(out=str(folder), columns={"x": f"ndarray:int16:{source.shape[1]}"}) as writer:
        for row in source:
            writer.write({"x": row.view(np.int16)})


_loaders: list[StreamingDataLoader] = []


def batches(run: measure.Run) -> Iterator[Any]:
    """One epoch."""
    if not _loaders:
        data = StreamingDataset(local=str(run.folder), batch_size=run.batch_size, shuffle=True)
        options: dict[str, Any] = {"num_workers": run.workers, "persistent_workers": True, "drop_last": True}
        _loaders.append(StreamingDataLoader(data, batch_size=run.batch_size, **options))
    for sample in _loaders[0]:
        yield sample["x"]


if __name__ == "__main__":
    measure.main(prepare, batches)
