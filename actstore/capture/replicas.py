"""Where replicas run: one in this process, or many as Ray actors on one machine or a cluster.

`Pool` decides what happens; these classes only carry it out. Both answer a call with a reference that `wait` and
`result` understand: a future here, an object reference of Ray there.
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from actstore.capture.worker import CALLS_IN_FLIGHT, Replica, ReplicaConfig
from actstore.tokens.tokenizer import one_line

PASSED_ON = re.compile(r"(ACTSTORE|AWS|GOOGLE|HF|HUGGING_FACE)_.*|STORAGE_EMULATOR_HOST")
"""Environment variables of the command that its workers get, whichever machine they run on."""


class LostError(Exception):
    """The process of a replica, or its machine, is gone."""


class LocalReplicas:
    """One replica in this process: it starts as fast as its model loads. `RayReplicas` says what each method does."""

    cluster = False

    def __init__(self, config: ReplicaConfig) -> None:
        """Make the replica; its model is loaded by `start`."""
        import torch

        self._torch_threads = torch.get_num_threads()
        self.config, self.needs = config, "this process"
        self._replica = Replica(config)
        self._calls = ThreadPoolExecutor(CALLS_IN_FLIGHT + 1, "actstore-call")

    def create(self, avoid: Collection[str]) -> Replica:  # noqa: D102, ARG002
        return self._replica  # this process can't be replaced

    def call(self, handle: Replica, method: str, *arguments: object) -> "Future[Any]":  # noqa: D102
        return self._calls.submit(getattr(handle, method), *arguments)

    def start(self, handle: Replica, node: str) -> "Future[Any]":  # noqa: D102, ARG002
        return self.call(handle, "call", "start")

    def wait(self, references: "Sequence[Future[Any]]", timeout: float) -> "Sequence[Future[Any]]":  # noqa: D102
        return list(wait(references, timeout, FIRST_COMPLETED).done)

    def result(self, reference: "Future[Any]") -> Any:  # noqa: D102
        return reference.result()

    def discard(self, handle: Replica) -> None:  # noqa: D102
        pass

    def hosts(self) -> set[str]:  # noqa: D102
        return {self._replica.place()["node"]}

    def name(self, node: str) -> str:  # noqa: D102
        return node

    def shortage(self) -> None:  # noqa: D102
        pass

    def close(self) -> None:
        """End after the forward pass that runs now, and after the bucket that is being written."""
        import torch

        self._replica.stop()
        self._calls.shutdown(cancel_futures=True)
        torch.set_num_threads(self._torch_threads)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one replica asks of Ray."""

    cpus: int
    gpus: float = 0.0
    memory: int = 0
    """Bytes; 0 where the command has compared the memory of all replicas with this machine's."""

    def threads_on(self, has: Mapping[str, float]) -> int:
        """CPU threads of a replica on a node: its GPUs' share of the node's CPUs, or the CPUs that it asks for."""
        if not self.gpus:
            return self.cpus
        return max(1, int(has.get("CPU", 1) * min(1.0, self.gpus / (has.get("GPU") or self.gpus))))

    def resources(self) -> dict[str, float]:
        """By Ray's names, without zeros."""
        all_of_it = {"CPU": float(self.cpus), "GPU": self.gpus, "memory": float(self.memory)}
        return {name: amount for name, amount in all_of_it.items() if amount}

    def __str__(self) -> str:
        """In words."""
        return ", ".join(_in_words(name, amount) for name, amount in self.resources().items())


def _in_words(resource: str, amount: float) -> str:
    if resource == "memory":
        return f"{amount / 1e9:.3g} GB of memory"
    return f"{amount:g} {resource}{'s' * (amount != 1)}"


class RayReplicas:
    """Replicas as Ray actors, placed by what they ask for."""

    def __init__(
        self, ray: Any, config: ReplicaConfig, request: Request, *, threads: int | None, cluster: bool
    ) -> None:
        """Place nothing yet; `threads` per replica, by default what `Request.threads_on` says."""
        self._ray, self.config, self._request, self._threads = ray, config, request, threads
        self._environment = {k: v for k, v in os.environ.items() if PASSED_ON.fullmatch(k)}
        self._actor = ray.remote(Replica)
        self.needs, self.cluster = str(request), cluster

    def create(self, avoid: Collection[str]) -> Any:
        """Begin to place a replica on none of the nodes to avoid; without room Ray asks its autoscaler."""
        asked: dict[str, Any] = {"num_cpus": self._request.cpus, "num_gpus": self._request.gpus}
        if self._request.memory:
            asked["memory"] = self._request.memory
        if avoid:
            asked["label_selector"] = {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"}
        concurrency = CALLS_IN_FLIGHT + 1
        actor = self._actor.options(max_concurrency=concurrency, max_restarts=0, max_task_retries=0, **asked)
        return actor.remote(self.config)

    def call(self, handle: Any, method: str, *arguments: object) -> Any:
        """Call a method of a replica; the reference that comes back at once is for `wait` and `result`."""
        return getattr(handle, method).remote(*arguments)

    def start(self, handle: Any, node: str) -> Any:
        """Call `Replica.start` with what the node gives a replica.

        The environment goes along as an argument of this call, from process to process: Ray writes a runtime
        environment to its logs and shows it in its dashboard.
        """
        has = live_nodes(self._ray).get(node, {}).get("Resources", {})
        return self.call(handle, "call", "start", self._environment, self._threads or self._request.threads_on(has))

    def wait(self, references: Sequence[Any], timeout: float) -> Sequence[Any]:
        """The references whose results are there, after at most `timeout` seconds."""
        self._ray.wait(list(references), num_returns=1, timeout=timeout)
        return self._ray.wait(list(references), num_returns=len(references), timeout=0)[0]

    def result(self, reference: Any) -> Any:
        """The result of a call; `LostError` if the replica is gone."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as e:
            raise LostError(
                f"the worker's process ended; if its memory ran out, lower --bucket-rows or --batch-size: {one_line(e)}"
            ) from e

    def discard(self, handle: Any) -> None:
        """End a replica at once."""
        with suppress(ValueError, self._ray.exceptions.RayError):  # it may be gone already
            self._ray.kill(handle)

    def hosts(self) -> set[str]:
        """Nodes that are up and large enough for a replica."""
        asked = self._request.resources()
        return {
            node
            for node, about in live_nodes(self._ray).items()
            if all(about["Resources"].get(resource, 0) >= amount for resource, amount in asked.items())
        }

    def name(self, node: str) -> str:
        """What messages call a node."""
        about = next((n for n in self._ray.nodes() if n["NodeID"] == node), None)
        return f"{about['NodeManagerHostname']} ({node[:8]})" if about else "an unknown node"

    def shortage(self) -> str | None:
        """Why no node is large enough for a replica, and what to do; None if one is, or may come."""
        if self.hosts() or may_grow(self._ray):
            return None
        asked = self._request.resources()
        nodes = [about["Resources"] for about in live_nodes(self._ray).values()]
        largest = {r: max((has.get(r, 0.0) for has in nodes), default=0.0) for r in asked}
        remedies = {
            "GPU": "use --device cpu, fewer --devices-per-worker or machines with GPUs",
            "memory": "lower --bucket-rows or --batch-size, or start Ray with more --memory",
            "CPU": "lower --threads",
        }
        lacking = [r for r in remedies if r in asked and largest[r] < asked[r]]
        has = ", ".join(_in_words(r, amount) for r, amount in largest.items())
        advice = "; ".join(remedies[r] for r in lacking) or "no node has all of it at once"
        return f"no node of the Ray cluster has {self._request} for a worker, the most on one are {has}: {advice}"


def live_nodes(ray: Any) -> dict[str, Any]:
    """What Ray says about each node that is up, by its id."""
    return {about["NodeID"]: about for about in ray.nodes() if about["Alive"]}


def may_grow(ray: Any) -> bool:
    """Whether an autoscaler may add machines: it labels the nodes of its groups, head included."""
    return any("ray.io/node-group" in about.get("Labels", {}) for about in live_nodes(ray).values())


Replicas = LocalReplicas | RayReplicas
