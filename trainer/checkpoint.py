"""Checkpoints of the SAEs on one stream: `step_N/`, with a safetensors file per SAE and `checkpoint.json`.

A checkpoint holds everything that the next step depends on, so that a resumed run is bitwise the undisturbed one (on
a CPU with as many threads; a GPU adds up in its own order). It is written into a hidden directory, forced to the
disk, and renamed; a kill at any time leaves the one before. Tensors are copied into those of a freshly made run,
which keeps their alignment, and with it the order in which vector units add.

Where processes share an SAE each writes its latents into a file of its own, NAME.0-of-4.state.safetensors, and any
number of processes goes on from them. Where they share out the SAEs of a stream each writes those it has. The lead
writes the index, when all are done.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from actstore.errors import ActstoreError, mismatch
from trainer.files import write_tensors
from trainer.parallel import ALONE, LATENT_AXIS, Ranks

FORMAT_VERSION, SHARDED_VERSION = 1, 2
"""Without and with shards."""
INDEX, STATE, LOCK = "checkpoint.json", ".state.safetensors", ".lock"


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
    shards: int = 1
    """Files of each SAE, one for each of the processes that shared it."""


def place(folder: Path, step: int) -> Path:
    """The directory of a checkpoint."""
    return folder / f"step_{step:09}"


@contextmanager
def locked(folder: Path, ranks: Ranks = ALONE) -> Generator[None]:
    """While open, nobody else trains into `folder`: ActstoreError if someone does. It ends with the process, too."""
    if not ranks.lead:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = f"another process is training into {folder.parent}; wait until it has ended, or take another --out"
            raise ActstoreError(text) from None
        yield


def clear(folder: Path) -> None:
    """Delete all checkpoints, whole ones and parts."""
    for path in (*folder.glob("step_*"), *folder.glob(".step_*")):
        shutil.rmtree(path)


def save(
    folder: Path,
    checkpoint: Checkpoint,
    states: Mapping[str, Mapping[str, Tensor]],
    *,
    keep: int,
    ranks: Ranks = ALONE,
) -> Path:
    """Write a checkpoint with the tensors of each SAE, delete all but the last `keep`, and return its directory.

    All `ranks` call it, each with the SAEs or the parts of SAEs that it has.
    """
    path = place(folder, checkpoint.step)
    hidden = folder / f".{path.name}"
    if ranks.lead:
        for left in (*folder.glob(".step_*"), *folder.glob(path.name)):
            shutil.rmtree(left)
        hidden.mkdir(parents=True)
    ranks.barrier()
    for name, state in states.items():
        file = hidden / _file(name, ranks.rank if checkpoint.shards > 1 else 0, checkpoint.shards)
        write_tensors(file, dict(state))
        _sync(file)
    ranks.barrier()
    if ranks.lead:
        _publish(folder, checkpoint, hidden, path)
        for old in _complete(folder)[:-keep]:
            (old / INDEX).unlink()
            shutil.rmtree(old)
    return path


def _publish(folder: Path, checkpoint: Checkpoint, hidden: Path, path: Path) -> None:
    """Write the index of the checkpoint in `hidden` and give it its name."""
    index, fields = hidden / INDEX, dict(vars(checkpoint))
    version = FORMAT_VERSION if fields["shards"] == 1 else SHARDED_VERSION
    if version == FORMAT_VERSION:
        del fields["shards"]
    index.write_text(json.dumps({"format_version": version, **fields}, allow_nan=False) + "\n")
    _sync(index)
    _sync(hidden)
    hidden.replace(path)
    _sync(folder)


def _file(name: str, shard: int, shards: int) -> str:
    return f"{name}{STATE}" if shards == 1 else f"{name}.{shard}-of-{shards}{STATE}"


def latest(folder: Path, settings: dict[str, Any], ranks: Ranks = ALONE) -> Checkpoint | None:
    """The newest checkpoint in `folder`, if there is one.

    Raises MismatchError that names each of `settings` that differs, and ActstoreError if it can't be read or if not all
    of `ranks` find the same.
    """
    found = _newest(folder, settings)
    if not ranks.same(found.step if found else -1):
        mine = f"step {found.step}" if found else "none"
        raise ActstoreError(
            f"the {ranks.world} processes do not see the same checkpoints in {folder}: rank {ranks.rank} finds {mine}. "
            "Take an --out on a file system that all share."
        )
    return found


def recorded(folder: Path) -> dict[str, Any] | None:
    """The settings of the newest checkpoint in `folder`, if there is one; ActstoreError if it can't be read."""
    paths = _complete(folder)
    return _index(paths[-1]).settings if paths else None


def _newest(folder: Path, settings: dict[str, Any]) -> Checkpoint | None:
    paths = _complete(folder)
    if not paths:
        return None
    found = _index(paths[-1])
    if found.settings != (asked := json.loads(json.dumps(settings))):
        remedy = "Ask for the same to go on from it, or take another --out, or --no-resume to delete it and start over."
        raise mismatch(f"the run in {paths[-1]}", found.settings, asked, remedy)
    return found


def _index(path: Path) -> Checkpoint:
    """The index of the checkpoint in directory `path`."""
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        version = index.pop("format_version")
        found = Checkpoint(**index) if version in (FORMAT_VERSION, SHARDED_VERSION) else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, error) from None
    if found is None:
        raise ActstoreError(f"{path} has format version {version}, this trainer reads up to {SHARDED_VERSION}.")
    return found


def restore(
    path: Path, name: str, state: Mapping[str, Tensor], *, shards: int = 1, ranks: Ranks = ALONE, whole: bool = True
) -> None:
    """Copy the tensors of SAE `name` in checkpoint directory `path` into those of `state`.

    `state` has this rank's part of them; whatever of the `shards` files has some of it is read. Unless it is the
    `whole` state, the files may hold more tensors.
    """
    try:
        with ExitStack() as stack:
            paths = [path / _file(name, shard, shards) for shard in range(shards)]
            files = [stack.enter_context(safe_open(p, framework="pt")) for p in paths]
            for file in files:
                if (found := set(file.keys())) != set(state) and (whole or not found >= set(state)):
                    raise ActstoreError(f"{path} holds {sorted(found)} of {name}, expected {sorted(state)}.")
            for key, tensor in state.items():
                axis = _latent_axis(key) if shards > 1 or ranks.world > 1 else None
                stored = files[0].get_tensor(key) if axis is None else _part(files, key, tensor, axis, ranks)
                if (stored.shape, stored.dtype) != (tensor.shape, tensor.dtype):
                    found, expected = (f"{t.dtype} {tuple(t.shape)}" for t in (stored, tensor))
                    raise ActstoreError(f"{path}: {key} of {name} is {found}, expected {expected}.")
                tensor.copy_(stored)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def _latent_axis(key: str) -> int | None:
    """The axis of the latents of a tensor of `Run.state`, if they are dealt to the processes."""
    return LATENT_AXIS.get(key.rsplit("/", 1)[-1].removeprefix("first."))


def _part(files: Sequence[Any], key: str, like: Tensor, axis: int, ranks: Ranks) -> Tensor:
    """This rank's latents of a tensor whose parts, of equal size, lie in `files`."""
    own, parts = ranks.latents(like.shape[axis] * ranks.world), []
    each = like.shape[axis] * ranks.world // len(files)
    for i, file in enumerate(files):
        first, end = max(own.start - i * each, 0), min(own.stop - i * each, each)
        if first < end:
            rows = slice(first, end)
            parts.append(file.get_slice(key)[:, rows] if axis else file.get_slice(key)[rows])
    return torch.cat(parts, axis)


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
