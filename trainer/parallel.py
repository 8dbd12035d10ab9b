"""Several processes, as torchrun starts them: the latents of one SAE dealt to them, or the SAEs of a sweep.

`trainer train` shards: rank r of R holds the r-th contiguous part of the latents, which is its columns of W_enc, its
rows of W_dec, b_enc and threshold, their moments and counters. b_dec and W_skip are on every rank, and since their
gradients come out of an all-reduce they stay bitwise equal. One step communicates

- an all-gather of the rows, as the store delivers them: each rank reads its share, the store is read once;
- an all-reduce of batch * (d_out + 1) float32: the residuals, to which every rank adds what its latents reconstruct,
  and how many of its latents fired on each token;
- an all-reduce of d_out + 4 float32: the gradient of b_dec (the pre-encoder bias gets -(sum of dz) W_enc^T, a sum over
  all latents) and four sums that the loss is made of; d_model * d_out more for the gradient of a skip connection;
- with `clip_norm`, an all-reduce of one float32 for each parameter tensor: squared norms.

A line of metrics takes two floats more, a checkpoint a few flags and barriers. All ranks see the same loss, so all
stop where it is not finite.

`trainer sweep` deals whole SAEs: only the all-gather each step, and each SAE is bitwise what one process makes of it.
"""

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float64, Shaped
from torch import Tensor

from actstore.stream.ranks import distributed
from trainer.config import SAESpec

T = TypeVar("T")

LATENT_AXIS = {"W_enc": 1, "W_dec": 0, "b_enc": 0, "threshold": 0, "updates": 0, "idle": 0}
"""The axis along which the tensors of a JumpReLU SAE in training are dealt; others are on every rank."""


@dataclass(frozen=True)
class Ranks:
    """One of `world` processes that do the same at the same time; alone, nothing is communicated."""

    rank: int = 0
    world: int = 1

    @property
    def lead(self) -> bool:
        """Whether this process is the one that writes, shows and adds what must be counted once."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """Its share of rows that every process has."""
        return slice(self.rank, None, self.world)

    def latents(self, d_sae: int) -> slice:
        """Its part of the latents."""
        each = d_sae // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum(self, tensor: Shaped[Tensor, "*any"]) -> Shaped[Tensor, "*any"]:
        """Add up the (contiguous) tensors of all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    @property
    def gathers_on_gpu(self) -> bool:
        """Whether `gather` leaves rows on a GPU where they are; gloo's all-gather works in host memory."""
        return self.world == 1 or _device().type == "cuda"

    def gather(self, rows: Shaped[Tensor, "rows d"]) -> Shaped[Tensor, "world rows d"]:
        """The rows of all ranks, in the order of ranks."""
        if self.world == 1:
            return rows[None]
        sent = rows.to(_device(), non_blocking=True).contiguous()
        found = torch.empty(self.world, *sent.shape, dtype=sent.dtype, device=sent.device)
        dist.all_gather(list(found.view(torch.uint8)), sent.view(torch.uint8))  # bytes, which every backend takes
        return found

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.world > 1:
            self.sum(torch.zeros((), device=_device())).item()

    def same(self, number: int) -> bool:
        """Whether the number is the same on all ranks."""
        mine = torch.tensor([[number]])
        return bool((self.gather(mine).cpu() == mine).all())


ALONE = Ranks()


@dataclass(frozen=True)
class Deal:
    """SAEs of one stream, dealt to the ranks in turn."""

    names: tuple[str, ...]
    ranks: Ranks = ALONE

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """Those of `items`, one an SAE, that are this rank's."""
        return items[self.ranks.share]

    def all(self, rows: Float64[Tensor, "mine n"]) -> Float64[Tensor, "saes n"]:
        """One row for every SAE, from each rank's rows for its own, on the CPU."""
        if self.ranks.world == 1:
            return rows.cpu()
        table = torch.zeros(len(self.names), rows.shape[1], dtype=torch.float64, device=_device())
        table[self.ranks.share] = rows.to(table.device)
        return self.ranks.sum(table).cpu()


def current() -> Ranks:
    """This process' place in torch.distributed, from which the loader takes it too; alone without a process group."""
    return Ranks(*distributed(None, None))


@contextmanager
def joined(device: str) -> Generator[Ranks]:
    """Join the processes of torchrun, if it started this one: gloo for training on CPUs, NCCL for GPUs.

    With NCCL the process takes GPU LOCAL_RANK as "cuda". Raises ValueError for another device, and if there is no such
    GPU.
    """
    environment = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))
    if not environment or int(os.environ["WORLD_SIZE"]) == 1 or dist.is_initialized():
        yield current()
        return
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is {device}; under torchrun give cpu, or cuda for one GPU a process (LOCAL_RANK)")
    if device == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"LOCAL_RANK is {local}, but this machine has {gpus} GPUs: one a process, or --device cpu")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    yield current()
    dist.destroy_process_group()  # after an error the others may be waiting; the end of the process lets go of them


def check_sharding(ranks: Ranks, spec: SAESpec) -> None:
    """Raise ValueError if the latents of this SAE can't be dealt to the ranks."""
    if ranks.world == 1:
        return
    recipe, to_shard = spec.recipe, f"to shard it over {ranks.world} processes"
    reasons = {
        "topk": "TopK chooses among all latents of a token",
        "batchtopk": "BatchTopK chooses among all latents of a batch",
        "gated": "a gated SAE has a second reconstruction to add up",
    }
    if recipe.architecture in reasons:
        raise ValueError(f"{reasons[recipe.architecture]}, which is not implemented; {to_shard} take jumprelu")
    if recipe.kernels == "triton":
        raise ValueError(f"Triton's kernels see all latents of an SAE; {to_shard} take kernels torch")
    if recipe.prefixes > 1:
        raise ValueError(
            f"the recipe has {recipe.prefixes} Matryoshka prefixes, each with a residual of its own to add up; "
            f"{to_shard} take a recipe with prefixes = 1"
        )
    if spec.d_sae % ranks.world:
        up = -(-spec.d_sae // ranks.world) * ranks.world
        raise ValueError(f"d_sae {spec.d_sae} is not a multiple of the {ranks.world} processes; the next is {up}")


def check_deal(ranks: Ranks, saes: int) -> None:
    """Raise ValueError if there is not an SAE for each rank."""
    if saes < ranks.world:
        raise ValueError(
            f"{ranks.world} processes for a sweep of {saes} SAEs a site; start at most {saes}, "
            "or shard one SAE with `trainer train`"
        )


def _device() -> torch.device:
    """Where the process group's tensors have to be."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
