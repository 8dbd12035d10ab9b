"""Ray for one run: a cluster's, the caller's own, or one on this machine, quiet and without uploads.

Device on a cluster: `auto` means GPUs, also where none is up yet, because a cluster may start them for the run. The run
waits for them and says so; a cluster of CPUs needs `--device cpu`. On this machine `auto` takes the GPU that is there.
"""

import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from actstore.capture.config import CaptureConfig, WorkersConfig
from actstore.capture.replicas import Request, live_nodes, may_grow
from actstore.errors import CaptureError
from actstore.store.storage import LocalStorage, open_storage
from actstore.tokens.tokenizer import one_line

_OBJECT_STORE_BYTES = 100_000_000
"""Ray's own memory; no activation goes through it."""
_NO_BFLOAT16 = {f"accelerator_type:{name}" for name in ("V100", "P100", "T4", "P4", "K80")}
"""Ray's resources for NVIDIA GPUs without bfloat16 products: those before compute capability 8.0."""


def cluster_address(config: WorkersConfig) -> str | None:
    """Address of the running cluster to join, if any."""
    return config.address or os.environ.get("RAY_ADDRESS") or None


def on_cluster(config: WorkersConfig) -> bool:
    """Whether replicas run on a Ray that was there before, not on one of this run's own on this machine."""
    ray = sys.modules.get("ray")
    return cluster_address(config) is not None or (ray is not None and ray.is_initialized())


def runs_here(config: WorkersConfig) -> bool:
    """Whether one replica in this process does: Ray takes seconds to start and brings nothing then."""
    single = config.workers == 1 and config.devices_per_worker <= 1  # more GPUs: Ray hides those of other programs
    return single and config.runtime_env is None and not on_cluster(config)


@contextmanager
def ray_for(config: WorkersConfig, threads: int) -> Generator[Any]:
    """The `ray` module, initialised; `CaptureError` if the cluster can't be reached."""
    for name, value in (
        ("RAY_USAGE_STATS_ENABLED", "0"),
        ("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0"),
        ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"),
        ("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1"),  # a submitted job has a runtime environment already
        ("RAY_worker_niceness", "0"),  # else 15, behind every other process of the machine
    ):
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    environment = runtime_environment(config)
    if address := cluster_address(config):
        try:
            _connect(address)
            ray.init(address=address, runtime_env=environment, **quiet)
        except (OSError, ValueError, RuntimeError) as e:
            raise CaptureError(f"no Ray cluster answers at {address}: {one_line(e)}") from e
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


def _connect(address: str) -> None:
    """Fail at once where nothing listens; Ray itself takes minutes to find out."""
    host, _, port = address.rpartition(":")
    if port.isascii() and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def runtime_environment(config: WorkersConfig) -> dict[str, object]:
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
    """What replicas will run on, see the module; `CaptureError` for a store that the cluster's nodes can't reach.

    The command asks once, before the store's spec is made, because precision follows from it. A cluster whose GPUs are
    not known yet is taken to have bfloat16; only where all that are up are older ones it has not.
    """
    if on_cluster(config):
        with ray_for(config, 1) as ray:
            if isinstance(config, CaptureConfig):
                check_directory(ray, config, config.out)
            if config.device == "cpu":
                return Device("cpu", bfloat16=False)
            kinds = {name for name in ray.cluster_resources() if name.startswith("accelerator_type:")}
        return Device("cuda", bfloat16=not kinds or not kinds <= _NO_BFLOAT16)
    if config.device == "cpu":
        return Device("cpu", bfloat16=False)
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus < config.devices_per_worker and (config.device == "cuda" or config.devices_per_worker > 1):
        raise CaptureError(
            f"{config.devices_per_worker:g} GPUs per worker: torch finds {gpus} on this machine; use --device cpu, "
            "fewer --devices-per-worker, or a torch with CUDA"
        )
    bfloat16 = gpus > 0 and torch.cuda.is_bf16_supported(including_emulation=False)
    return Device("cuda", bfloat16) if gpus else Device("cpu", bfloat16=False)


def check_directory(ray: Any, config: WorkersConfig, store: str) -> None:
    """Refuse a store in a directory of one machine where workers run on several."""
    several = len(live_nodes(ray)) > 1 or may_grow(ray)
    if several and not config.shared_directory and isinstance(open_storage(store), LocalStorage):
        raise CaptureError(
            f"{store} is a directory, but the Ray cluster has several machines: use an object store (gs://, s3://), or "
            "--shared-directory if every machine has this file system mounted at the same path"
        )


def request_for(ray: Any, config: WorkersConfig, device: str, memory: Callable[[int], int]) -> Request:
    """What a replica asks of a cluster; `memory` gives the bytes that one with so many threads needs.

    CPUs: `--threads`; else 1 beside GPUs, where threads follow from the node; else as many as let all workers fit on
    the nodes that are up.
    """
    nodes = [about["Resources"] for about in live_nodes(ray).values()]
    gpus = 0.0 if device == "cpu" else config.devices_per_worker
    cpus = config.threads or 1
    if not config.threads and not gpus:
        sizes = [int(has.get("CPU", 0)) for has in nodes]
        fitting = (n for n in range(max(sizes, default=1), 0, -1) if sum(s // n for s in sizes) >= config.workers)
        cpus = next(fitting, 1)
    request = Request(cpus=cpus, gpus=gpus)
    threads = config.threads or max(
        (request.threads_on(has) for has in nodes if has.get("GPU", 0) >= gpus), default=cpus
    )
    return replace(request, memory=memory(threads))
