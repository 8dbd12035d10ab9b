# pyright: basic, reportMissingImports=false
"""SAELens' cache path: its `ActivationsStore` over a cached Arrow data set, with its mixing buffer, one process.

The data set has the columns that its `CacheActivationsRunner` writes, sequences of 256 tokens, but int16 bits of bf16
in place of its default float32: Arrow has no bf16, and float32 would be twice the bytes. The mixing buffer has the 64
batches of its tutorial.
https://decoderesearch.github.io/SAELens/latest/training_saes/
"""

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import measure
import numpy as np
import torch
from sae_lens.training.activations_store import ActivationsStore

HOOK, CONTEXT = "bench.0", 256
BUFFER, PROMPTS = 64, 32
"""Sequences that are mixed, and that are read at a time."""


def prepare(source: np.ndarray, folder: Path) -> None:
    """Store the rows."""
    rows, d = source.shape
    columns: dict[str, Any] = {
        HOOK: datasets.Array2D((CONTEXT, d), "int16"),
        "token_ids": datasets.Sequence(datasets.Value("int32"), length=CONTEXT),
    }

    def sequences() -> Iterator[dict[str, Any]]:
        for start in range(0, rows - CONTEXT + 1, CONTEXT):
            yield {HOOK: source[start : start + CONTEXT].view(np.int16), "token_ids": np.zeros(CONTEXT, np.int32)}

    cache = str(folder / "cache")
    made = datasets.Dataset.from_generator(
        sequences, features=datasets.Features(columns), cache_dir=cache, writer_batch_size=PROMPTS
    )
    made.save_to_disk(folder / "data", max_shard_size="500MB")
    shutil.rmtree(cache)


def batches(run: measure.Run) -> Iterator[Any]:
    """One epoch."""
    warnings.filterwarnings("ignore", message="All samples in the training dataset")
    d = datasets.load_from_disk(str(run.folder / "data")).features[HOOK].shape[1]
    none: Any = None
    store: Any = ActivationsStore(
        model=none,
        dataset=None,
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=CONTEXT,
        d_in=d,
        n_batches_in_buffer=max(BUFFER, 2 * run.batch_size // CONTEXT),
        total_training_tokens=0,
        store_batch_size_prompts=PROMPTS,
        train_batch_size_tokens=run.batch_size,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype=torch.int16,  # pyright: ignore[reportArgumentType]
        cached_activations_path=str(run.folder / "data"),
    )
    yield from store


if __name__ == "__main__":
    measure.main(prepare, batches)
