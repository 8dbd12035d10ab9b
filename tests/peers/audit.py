"""Run an example and check every batch that actstore delivered: `python audit.py EXAMPLE URL ARGUMENTS...`.

What is checked, for every `ActivationDataset` that the example makes:
- each row of each batch, as it was delivered, is a row of the store, read through zarr;
- each batch is what a second data set delivers at the same epoch and step, whatever the trainer did to earlier ones;
- of every other batch a reference is kept (the memory of the rest may be lent again), and at the end it is what it was
  or, if the trainer divides in place, what it was over one number.

Exit status: the example's, or 3 if the audit found something.
"""

import hashlib
import importlib.util
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import actstore

DIVIDES_IN_PLACE = "train_dictionary_learning.py"


class Audited(actstore.ActivationDataset):
    """Remembers what it delivered."""

    made: list["Audited"] = []  # noqa: RUF012

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[int, int, str]] = []
        self.kept: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
        self.wrong_rows = 0
        self.settings = (args, kwargs)
        self.stored = {site: set(map(bytes, bits(self.store[site][:].astype(np.float32)))) for site in self.sites}
        Audited.made.append(self)

    def __iter__(self) -> Iterator[Any]:
        return self._watched(super().__iter__())

    def _watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._remember(batch if isinstance(batch, dict) else {self.sites[0]: batch})
            yield batch

    def _remember(self, tensors: dict[str, torch.Tensor]) -> None:
        state = self.state_dict()
        self.seen.append((state["epoch"], state["step"], digest(tensors)))
        for site, rows in self.stored.items():
            self.wrong_rows += sum(row not in rows for row in map(bytes, bits(tensors[site].float())))
        if len(self.seen) % 2:
            self.kept.append((tensors, {name: x.clone() for name, x in tensors.items()}))


def bits(rows: Any) -> np.ndarray:
    """Rows [n, d] as bytes [n, d * itemsize]; bfloat16 by its bits."""
    if isinstance(rows, torch.Tensor):
        rows = (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()
    return np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """A hash of the content of a batch."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode() + bits(tensors[name]).tobytes())
    return whole.hexdigest()


def report(data: Audited, *, divided: bool) -> list[str]:
    """What is wrong with the batches of a data set; prints what was counted."""
    args, kwargs = data.settings
    again = ORIGINAL(*args, **kwargs)
    expected: dict[tuple[int, int], str] = {}
    for epoch in range(max(e for e, _, _ in data.seen) + 1):
        again.set_epoch(epoch)
        for batch in again:
            state = again.state_dict()
            expected[state["epoch"], state["step"]] = digest(
                batch if isinstance(batch, dict) else {again.sites[0]: batch}
            )
    different = sum(expected[epoch, step] != seen for epoch, step, seen in data.seen)
    ratios = {ratio(now[site], was[site]) for now, was in data.kept for site in data.sites} - {1.0}
    changed = sum(any(not torch.equal(now[k], was[k]) for k in was) for now, was in data.kept)
    print(
        f"audit {', '.join(data.sites)}: {len(data.seen)} batches, {different} differ from a second reading, "
        f"{data.wrong_rows} rows not of the store; of {len(data.kept)} kept, {changed} changed since"
        + "".join(f", times {r}" for r in ratios)
    )
    wrong = []
    if different:
        wrong.append(f"{different} batches are not what a second reading delivers")
    if data.wrong_rows:
        wrong.append(f"{data.wrong_rows} rows are not of the store")
    if changed and not (divided and len(ratios) == 1 and None not in ratios):
        wrong.append(f"{changed} batches changed after delivery")
    if divided and not changed and data.kept[0][0][data.sites[0]].dtype == torch.float32:
        wrong.append("no batch was divided in place, which is what this trainer was to show")
    return wrong


def ratio(now: torch.Tensor, was: torch.Tensor) -> float | None:
    """The one factor between two tensors, None if there is none."""
    if torch.equal(now, was):
        return 1.0
    factor = (now.double().norm() / was.double().norm()).item()
    close = torch.allclose(now.double(), was.double() * factor, rtol=1e-5, atol=1e-12)
    return round(factor, 7) if close else None


def load_torchvision() -> None:
    """Let PyPI's torchvision load beside a CPU build of torch, where its C++ operators can't.

    overcomplete imports it for image transforms; what stops it is declarations about two operators that are not there.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", schema)


ORIGINAL = actstore.ActivationDataset


def main() -> int:
    load_torchvision()
    example, *arguments = sys.argv[1:]
    actstore.ActivationDataset = Audited  # what the example looks up by name
    sys.argv = [example, *arguments]
    status = 0
    try:
        runpy.run_path(example, run_name="__main__")
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1
    if status:
        return status
    wrong = [w for data in Audited.made for w in report(data, divided=Path(example).name == DIVIDES_IN_PLACE)]
    if not Audited.made or not all(data.seen for data in Audited.made):
        wrong.append("no batch was audited")
    print("\n".join(f"audit: {w}" for w in wrong))
    return 3 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
