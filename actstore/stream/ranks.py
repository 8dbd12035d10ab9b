"""Which rank this is, under torch.distributed and what builds on it."""

import inspect
import sys

import torch
from jaxtyping import Shaped
from torch import Tensor

from actstore.errors import StreamError


def distributed(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and world size: as given, else of torch.distributed, else 0 of 1."""
    if (rank is None) != (world_size is None):
        raise ValueError("give both rank and world_size, or neither")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, expected 0 to {world_size - 1}")
    return rank, world_size


def refuse_accelerate(world: int) -> None:
    """StreamError if a loader that Accelerate prepared is iterating over several ranks.

    It would read on the first rank only, or deal out each rank's batches once more: the other ranks' rows were lost.
    """
    if world == 1 or "accelerate.data_loader" not in sys.modules:
        return
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "accelerate.data_loader":
            raise StreamError(
                f"Accelerate would deal out one rank's batches, but this dataset gives each of {world} ranks its own; "
                "prepare model and optimizer only, and loop over the dataset or over a DataLoader that is not prepared"
            )
        frame = frame.f_back


def in_order(parts: Shaped[Tensor, "world rows d"], streams: int) -> Shaped[Tensor, "batch d"]:
    """The rows of a batch as one rank of 1 gets them, from what each rank got: rank r has streams r, r + world, ..."""
    world, rows, d = parts.shape
    return parts.view(world, streams // world, -1, d).transpose(0, 1).reshape(world * rows, d)
