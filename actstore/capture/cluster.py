"""Ray for one run: a cluster's, the caller's own, or one on this machine, quiet and without uploads."""

import json
import logging
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from actstore.capture.config import WorkersConfig
from actstore.errors import CaptureError
from actstore.tokens.tokenizer import one_line

_OBJECT_STORE_BYTES = 100_000_000
"""Ray's own memory; no activation goes through it."""
_OURS = "ACTSTORE_"
"""Environment variables of this beginning go to the workers of a running cluster."""


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


def placement(ray: Any, config: WorkersConfig) -> tuple[str, int]:
    """Torch device of every replica, and GPUs to reserve for it; `CaptureError` if there can be none."""
    gpus = ray.cluster_resources().get("GPU", 0.0)
    device = config.device
    if device == "auto":
        device = "cuda" if gpus or config.devices_per_worker > 1 else "cpu"
    if device == "cpu":
        return "cpu", 0
    if gpus < config.devices_per_worker:
        raise CaptureError(
            f"device {device} with {config.devices_per_worker} GPUs per worker: Ray has {gpus:g} GPUs; use fewer "
            "devices_per_worker, --device cpu, or a cluster with GPUs"
        )
    return ("balanced" if config.devices_per_worker > 1 else device), config.devices_per_worker
