"""Ray for one run: a cluster's, the caller's own, or one on this machine, quiet and without uploads."""

import json
import logging
import os
import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from actstore.capture.config import WorkersConfig
from actstore.errors import CaptureError
from actstore.tokens.tokenizer import one_line

_OBJECT_STORE_BYTES = 100_000_000
"""Ray's own memory; no activation goes through it."""
_OURS = "ACTSTORE_"
"""Environment variables of this beginning go to the workers of a running cluster."""
_NO_BFLOAT16 = {f"accelerator_type:{name}" for name in ("V100", "P100", "T4", "P4", "K80")}
"""Ray's resources for NVIDIA GPUs without bfloat16 products: those before compute capability 8.0."""


@contextmanager
def ray_for(config: WorkersConfig, threads: int) -> Generator[Any]:
    """The `ray` module, initialised; `CaptureError` if the cluster can't be reached or has too few GPUs."""
    for name, value in (
        ("RAY_USAGE_STATS_ENABLED", "0"),
        ("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0"),
        ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"),
        ("RAY_worker_niceness", "0"),  # else 15, and whatever else the machine does comes first
    ):
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    environment = runtime_environment(config)
    if config.address:
        ours = {k: v for k, v in os.environ.items() if k.startswith(_OURS)}
        environment["env_vars"] = ours | environment.get("env_vars", {})
        try:
            _knock(config.address)
            ray.init(address=config.address, runtime_env=environment, **quiet)
        except (OSError, ValueError, RuntimeError) as e:
            raise CaptureError(f"no Ray cluster answers at {config.address}: {one_line(e)}") from e
    else:
        ray.init(
            address="local",
            num_cpus=threads * config.workers,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            runtime_env=environment,
            **quiet,
        )
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Ray itself takes minutes to find out that nobody listens."""
    host, _, port = address.rpartition(":")
    if port.isascii() and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def runtime_environment(config: WorkersConfig) -> dict[str, Any]:
    """What the user's file says; `ValueError` if it is no runtime environment."""
    if config.runtime_env is None:
        return {}
    try:
        found = json.loads(config.runtime_env.read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"runtime_env {config.runtime_env}: not a JSON file that can be read: {e}") from e
    if not isinstance(found, dict) or not isinstance(found.get("env_vars", {}), dict):
        raise ValueError(f"runtime_env {config.runtime_env}: expected an object such as {{'env_vars': {{...}}}}")
    return found


@dataclass(frozen=True)
class Device:
    """What the replicas of a run compute on."""

    kind: Literal["cpu", "cuda"]
    bfloat16: bool
    """Whether its GPUs have bfloat16 products; False for a CPU."""


def choose_device(config: WorkersConfig) -> Device:
    """What replicas will run on: what was asked, else GPUs where the machine or the cluster has any.

    The command asks once, before the store's spec is made, because precision follows from it.
    """
    if config.device == "cpu":
        return Device("cpu", bfloat16=False)
    if config.address is None and not _joined():
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus < config.devices_per_worker and (config.device == "cuda" or config.devices_per_worker > 1):
            raise CaptureError(
                f"{config.devices_per_worker} GPUs per worker: torch finds {gpus} on this machine; use --device cpu, "
                "fewer --devices-per-worker, or a torch with CUDA"
            )
        has = gpus > 0
        bfloat16 = has and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        with ray_for(config, 1) as ray:
            resources = ray.cluster_resources()
        has, bfloat16 = resources.get("GPU", 0) > 0, not _NO_BFLOAT16 & resources.keys()
    gpu = has or config.device == "cuda" or config.devices_per_worker > 1
    return Device("cuda", bfloat16) if gpu else Device("cpu", bfloat16=False)


def _joined() -> bool:
    """Whether the caller has started Ray or joined a cluster already."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def placement(ray: Any, config: WorkersConfig, device: str) -> tuple[str, int]:
    """Torch device of every replica, and GPUs to reserve for it; `CaptureError` if Ray has too few."""
    if device == "cpu":
        return "cpu", 0
    gpus = ray.cluster_resources().get("GPU", 0.0)
    if gpus < config.devices_per_worker:
        raise CaptureError(
            f"device {device} with {config.devices_per_worker} GPUs per worker: Ray has {gpus:g} GPUs; use fewer "
            "devices_per_worker, --device cpu, or a cluster with GPUs"
        )
    return ("balanced" if config.devices_per_worker > 1 else device), config.devices_per_worker
