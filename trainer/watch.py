"""What is seen of a run: figures of each logged step, on the screen, in metrics.jsonl and in other people's tools."""

import io
import json
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import torch

from actstore.errors import ActstoreError
from trainer.config import RunConfig
from trainer.parallel import Deal

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """One line of metrics.jsonl: the state after `step` steps."""

    step: int
    rows: int
    """Activations trained on so far."""
    loss: float
    mse: float
    """Mean ||x - xhat||^2 of the batch, where E||x||^2 = 1."""
    fvu: float
    """mse over the batch's own variance (an evaluation uses the data set's)."""
    l0: float
    mean_l0: float
    """Mean L0 of the steps since the previous line."""
    dead: float
    """Share of latents that have not fired for `recipe.dead_after_tokens` tokens."""
    sparsity: float
    """The sparsity coefficient of this step."""
    lr: float
    rows_per_second: float
    """Since the previous line."""
    wait: float
    """Share of that time spent waiting for the next batch."""


class Meter:
    """Rows per second and the share of time spent waiting, since the last lap."""

    def __init__(self) -> None:
        """Begin now."""
        self.rows, self._waited, self._began = 0, 0.0, time.perf_counter()

    def wait(self, take: Callable[[], T]) -> T:
        """What `take` returns, its time counted as waiting."""
        began = time.perf_counter()
        batch = take()
        self._waited += time.perf_counter() - began
        return batch

    def lap(self) -> dict[str, float]:
        """The two figures; begins the next lap."""
        elapsed = max(time.perf_counter() - self._began, 1e-9)
        rates = {"rows_per_second": self.rows / elapsed, "wait": self._waited / elapsed}
        self.__init__()
        return rates


def open_metrics(path: Path, size: int) -> io.FileIO:
    """Open a file of metrics to append to its first `size` bytes; whatever follows them is cut off."""
    file = io.FileIO(path, "r+" if size else "w")
    if (found := file.seek(0, os.SEEK_END)) < size:
        file.close()
        raise ActstoreError(f"{path} has {found} bytes, its checkpoint knew {size}. Put it back, or use --no-resume.")
    file.truncate(size)
    file.seek(size)
    return file


def last_metrics(path: Path) -> dict[str, Any]:
    """The last line of a file of metrics."""
    return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])


def of_all(metrics: Sequence[Metrics], deal: Deal) -> list[Metrics]:
    """The metrics of all SAEs on the stream, from those of each process."""
    table = deal.all(torch.tensor([astuple(m) for m in metrics], dtype=torch.float64))
    names = [field.name for field in fields(Metrics)]
    rows = [dict(zip(names, row, strict=True)) for row in table.tolist()]
    return [Metrics(**{**row, "step": int(row["step"]), "rows": int(row["rows"])}) for row in rows]


def note(metrics: Sequence[Metrics]) -> str:
    """What the progress shows beside the rate: figures, from least to greatest where there are several SAEs."""

    def span(name: str, form: str) -> str:
        low, high = (format(f(getattr(m, name) for m in metrics), form) for f in (min, max))
        return low if low == high else f"{low}..{high}"

    forms = {"loss": ".3g", "fvu": ".3f", "l0": ".1f", "dead": ".0%", "wait": ".0%"}
    return "  ".join(f"{name} {span(name, form)}" for name, form in forms.items())


@contextmanager
def watching(
    config: RunConfig, site: str, names: Sequence[str], settings: dict[str, Any], step: int
) -> Generator[Callable[[str, Metrics], object]]:
    """Where metrics of the SAEs `names` go besides metrics.jsonl: Weights & Biases and TensorBoard, if asked for.

    A resumed run goes on in the same place from `step` on. Raises ActstoreError if a package is missing.
    """
    with ExitStack() as stack:
        sinks: list[Callable[[str, Metrics], object]] = []
        if config.wandb is not None:
            try:
                import wandb  # pyright: ignore[reportMissingImports]
            except ImportError:
                raise _missing("wandb") from None
            place = str(config.out.resolve())
            key = blake2b(json.dumps([place, settings]).encode(), digest_size=8).hexdigest()
            about = {"project": config.wandb, "name": f"{config.out.name} {site}", "id": key, "resume": "allow"}
            run: Any = stack.enter_context(wandb.init(config=settings, **about))
            sinks.append(
                lambda name, m: run.log(
                    {f"{name}/{k}" if len(names) > 1 else k: v for k, v in asdict(m).items()}, step=m.step
                )
            )
        if config.tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter  # pyright: ignore[reportPrivateImportUsage]
            except ImportError:
                raise _missing("tensorboard") from None
            writers: dict[str, Any] = {}
            for name in names:
                writers[name] = SummaryWriter(str(config.tensorboard / site / name), purge_step=step + 1)
                stack.callback(writers[name].close)

            def write(name: str, m: Metrics) -> None:
                for key, value in asdict(m).items():
                    writers[name].add_scalar(key, value, m.step)

            sinks.append(write)
        yield lambda name, m: [sink(name, m) for sink in sinks]


def _missing(package: str) -> ActstoreError:
    return ActstoreError(f"--{package} needs {package}, which is not installed: pip install 'actstore[{package}]'")
