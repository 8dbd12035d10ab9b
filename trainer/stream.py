"""What SAEs are trained on: whole batches of a store's site, and the scale that they are divided by."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

import actstore
from actstore.errors import ActstoreError
from actstore.store import Store
from actstore.stream.adapters import endless
from actstore.stream.ranks import in_order
from trainer.parallel import current
from trainer.recipe import Recipe

Batch = Tensor | tuple[Tensor, Tensor]
"""Activations [batch, d_model], for a transcoder with what it is to reconstruct [batch, d_out]."""


STREAMS = 8
"""Canonical streams of a batch, a multiple of any number of processes (the loader's default)."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What SAEs are trained on: a site of a store, for transcoders with the site that they reconstruct."""

    store: Store
    site: str
    target: str | None
    batch_size: int
    seed: int
    """Of the order of the batches."""
    device: str = "cpu"
    """Where the SAEs are trained."""

    @property
    def delivery(self) -> str | None:
        """The GPU that the loader delivers batches on, which is the one that trains; None: in host memory.

        Ranks that talk through gloo exchange rows in host memory, so batches stay there, and `train_many` copies each
        whole batch to the GPU.
        """
        on_gpu = torch.device(self.device).type == "cuda"
        return self.device if on_gpu and current().gathers_on_gpu else None

    def open(self) -> Any:
        """Its `ActivationDataset`; ValueError for sites or a batch size that the store can't serve."""
        sites = self.site if self.target is None else (self.site, self.target)
        return actstore.ActivationDataset(
            self.store,
            sites=sites,
            batch_size=self.batch_size,
            seed=self.seed,
            streams=STREAMS,
            drop_nonfinite=True,
            device=self.delivery,
        )

    def batches(self, data: Iterable[Any]) -> Iterator[Batch]:
        """Batch after batch and epoch after epoch; each rank reads its share of a batch and gets all of it."""
        ranks = current()

        def whole(rows: Tensor) -> Tensor:
            return in_order(ranks.gather(rows), STREAMS)

        for batch in endless(data):
            yield whole(batch) if self.target is None else (whole(batch[self.site]), whole(batch[self.target]))

    def first_rows(self) -> Float[Tensor, "batch d_model"]:
        """The rows of the first batch, of the site that is read, on the CPU, where SAEs are made."""
        with self.open() as data:
            batch = next(self.batches(data))
            return (batch[0] if isinstance(batch, tuple) else batch).cpu()


def normalisation(store: Store, site: str, recipe: Recipe) -> tuple[float, Float64[Tensor, " d_model"]]:
    """C, by which the recipe has activations divided, and the mean of x / C over the store.

    Raises ValueError if the store has no such site, ActstoreError if its statistics are missing or of no use.
    """
    stats = store.stats(site)
    if not (stats.mean_sq_norm > 0 and math.isfinite(stats.mean_sq_norm)):
        raise ActstoreError(
            f"the mean squared norm of {site} is {stats.mean_sq_norm}, expected a positive number. "
            "Look for NaN or infinite activations with `actstore info`."
        )
    scale = recipe.scale(stats.mean_sq_norm, len(stats.mean))
    return scale, torch.from_numpy(stats.mean / scale)
