"""What a command computes on and multiplies in: decided once, before anything is written, and printed with the reason.

`train` and `sweep` call `settle`; `eval` calls `choose_device`, and chooses its model's precision itself.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from warnings import catch_warnings, simplefilter

import torch

from actstore.progress import Progress
from trainer import checkpoint
from trainer.config import COMPUTE, Compute, RunConfig
from trainer.recipe import PRESETS

Run = TypeVar("Run", bound=RunConfig)

AMPERE = (8, 0)
"""NVIDIA's compute capability from which on GPUs multiply bfloat16 and TF32."""


def choose_device(device: str) -> tuple[str, str]:
    """The device to compute on, and why; `auto` takes a GPU if PyTorch sees one, else the CPU.

    Raises ValueError for a name that is no CPU or CUDA device, and for a GPU that PyTorch does not see.
    """
    if device == "auto":
        seen = torch.cuda.is_available()
        return ("cuda", "auto: PyTorch sees a GPU") if seen else ("cpu", "auto: PyTorch sees no GPU")
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device}, expected auto, cpu, cuda or cuda:N")
    if found.type == "cpu":
        return "cpu", "as asked"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (found.index or 0) >= gpus:
        seen = f"cuda:0 to cuda:{gpus - 1}" if gpus else "no GPU"
        raise ValueError(f"device is {device}, but PyTorch {torch.__version__} sees {seen}; give auto or cpu")
    return device, "as asked"


def settle(config: Run, checkpoints: Sequence[Path], progress: Progress) -> Run:
    """The config with a concrete device and precision of matrix products; prints each with its reason.

    A run that goes on from one of `checkpoints` keeps the precision that it was begun with, unless the user asks for
    another one; `checkpoint.latest` then refuses. Raises ValueError as `choose_device` does, and ActstoreError for a
    checkpoint that can't be read.
    """
    device, reason = choose_device(config.device)
    progress.say(f"device {device} ({reason})")
    compute, reason = _choose_compute(config, device, checkpoints if config.resume else ())
    if device != "cpu" and compute == "float32":
        reason += "; on a GPU its products are TF32, where the GPU has that"
    progress.say(f"compute {compute} ({reason})")
    return replace(config, device=device, compute=compute)


def _choose_compute(config: RunConfig, device: str, checkpoints: Sequence[Path]) -> tuple[Compute, str]:
    if config.compute is not None:
        return config.compute, "as asked"
    for folder in checkpoints:
        begun = (checkpoint.recorded(folder) or {}).get("compute")
        for compute in COMPUTE:
            if compute == begun:
                return compute, f"as the run in {folder} was begun"
    if device == "cpu":
        return PRESETS[config.preset].compute, "the preset's"
    if torch.cuda.get_device_capability(device) < AMPERE:
        return "float32", "this GPU is too old for fast bfloat16 products"
    return "bfloat16", "the default on a GPU: bfloat16 factors, float32 sums and results"


@contextmanager
def tf32_products(device: str) -> Generator[None]:
    """While open, a GPU multiplies float32 matrices as TF32 and adds up in float32; a CPU is left alone.

    This is the older of PyTorch's two settings: torch 2.9 to 2.13 refuse to profile after the newer one. Some of those
    versions warn that the older one will go.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    with catch_warnings():
        simplefilter("ignore")
        before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        yield
    finally:
        with catch_warnings():
            simplefilter("ignore")
            matmul.allow_tf32 = before
