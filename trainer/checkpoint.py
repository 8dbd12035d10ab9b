"""Checkpoints of the SAEs on one stream: `step_N/`, with a safetensors file per SAE and `checkpoint.json`.

A checkpoint holds everything that the next step depends on, so that a resumed run is bitwise the undisturbed one (on
a CPU with as many threads; a GPU adds up in its own order). It is written into a hidden directory, forced to the
disk, and renamed; a kill at any time leaves the one before. Tensors are copied into those of a freshly made run,
which keeps their alignment, and with it the order in which vector units add.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from actstore.errors import ActstoreError, mismatch

FORMAT_VERSION = 1
INDEX, STATE = "checkpoint.json", ".state.safetensors"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The index of a checkpoint: where the run stood."""

    step: int
    """Steps that were done."""
    rows: int
    seconds: float
    """Wall time that they took."""
    settings: dict[str, Any]
    """JSON values that a run must share to go on from here."""
    loader: dict[str, Any]
    """`ActivationDataset.state_dict()` after the last batch."""
    metrics: dict[str, int]
    """Bytes of metrics.jsonl by SAE."""


def place(folder: Path, step: int) -> Path:
    """The directory of a checkpoint."""
    return folder / f"step_{step:09}"


def save(folder: Path, checkpoint: Checkpoint, states: Mapping[str, Mapping[str, Tensor]], *, keep: int) -> Path:
    """Write a checkpoint with the tensors of each SAE, delete all but the last `keep`, and return its directory."""
    path = place(folder, checkpoint.step)
    hidden = folder / f".{path.name}"
    for left in (*folder.glob(".step_*"), *folder.glob(path.name)):
        shutil.rmtree(left)
    hidden.mkdir(parents=True)
    for name, state in states.items():
        file = hidden / f"{name}{STATE}"
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}, file)
        _sync(file)
    index = hidden / INDEX
    index.write_text(json.dumps({"format_version": FORMAT_VERSION, **vars(checkpoint)}, allow_nan=False) + "\n")
    _sync(index)
    _sync(hidden)
    hidden.replace(path)
    _sync(folder)
    for old in _complete(folder)[:-keep]:
        (old / INDEX).unlink()
        shutil.rmtree(old)
    return path


def latest(folder: Path, settings: dict[str, Any]) -> Checkpoint | None:
    """The newest checkpoint in `folder`, if there is one.

    Raises MismatchError that names each of `settings` that differs, and ActstoreError if it can't be read.
    """
    paths = _complete(folder)
    if not paths:
        return None
    try:
        index = json.loads((paths[-1] / INDEX).read_text(encoding="utf-8"))
        version = index.pop("format_version")
        found = Checkpoint(**index) if version == FORMAT_VERSION else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(paths[-1], error) from None
    if found is None:
        raise ActstoreError(f"{paths[-1]} has format version {version}, this trainer reads {FORMAT_VERSION}.")
    if found.settings != (asked := json.loads(json.dumps(settings))):
        remedy = "Ask for the same to go on from it, or take another --out, or --no-resume to delete it and start over."
        raise mismatch(f"the run in {paths[-1]}", found.settings, asked, remedy)
    return found


def restore(path: Path, name: str, state: Mapping[str, Tensor]) -> None:
    """Copy the tensors of SAE `name` in checkpoint directory `path` into those of `state`."""
    try:
        with safe_open(path / f"{name}{STATE}", framework="pt") as file:
            if set(file.keys()) != set(state):
                raise ActstoreError(f"{path} holds {sorted(file.keys())} of {name}, expected {sorted(state)}.")
            for key, tensor in state.items():
                stored = file.get_tensor(key)
                if (stored.shape, stored.dtype) != (tensor.shape, tensor.dtype):
                    found, expected = (f"{t.dtype} {tuple(t.shape)}" for t in (stored, tensor))
                    raise ActstoreError(f"{path}: {key} of {name} is {found}, expected {expected}.")
                tensor.copy_(stored)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> ActstoreError:
    return ActstoreError(
        f"the checkpoint {path} can't be read: {type(error).__name__}: {error}. Delete it to go on from the one before."
    )


def _complete(folder: Path) -> list[Path]:
    """The directories of whole checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step_*/{INDEX}"))


def _sync(path: Path) -> None:
    """Force a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
