"""The pool's decisions on simulated clusters: hundreds of runs a second, each with other nodes, faults and orders."""

import random
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.capture import pool as pool_module
from actstore.capture.cluster import request_for
from actstore.capture.config import WorkersConfig
from actstore.capture.events import EventLog, without_secrets
from actstore.capture.pool import ATTEMPTS, JOIN_S, NODE_FAILURES, TASK_NODES, WAITING_S, Pool, Task
from actstore.capture.replicas import LocalReplicas, LostError, Request, may_grow
from actstore.capture.worker import CALLS_IN_FLIGHT, Again, Failure
from actstore.errors import CaptureError, EncodingError, MismatchError, StoreError
from actstore.store.storage import open_storage

REFUSAL = "the model on this worker differs: transformers is '5.0', asked for '5.1'"


@dataclass(eq=False)
class Replica:
    node: str
    alive: bool = True


@dataclass(eq=False)
class Call:
    replica: Replica
    method: str
    argument: object


class SimulatedCluster(LocalReplicas):
    """Nodes with room for so many replicas, and what is wrong with each; time passes only in `wait`."""

    needs, cluster = "1 CPU", True

    def __init__(self, nodes, tasks, seed, grows=False):
        self.nodes, self.tasks, self.random, self.grows = nodes, tasks, random.Random(seed), grows
        self.now, self.replicas, self.unplaced = 0.0, [], {}
        self.started = Counter()
        self.assigned = []

    def create(self, avoid):
        replica = Replica("")
        self.unplaced[replica] = frozenset(avoid)
        return replica

    def _placed(self, replica):
        if replica in self.unplaced:
            used = Counter(r.node for r in self.replicas if r.alive)
            room = [n for n, (size, _) in self.nodes.items() if used[n] < size and n not in self.unplaced[replica]]
            if not room:
                return False
            replica.node = self.random.choice(room)
            self.replicas.append(replica)
            del self.unplaced[replica]
        return True

    def call(self, handle, method, *arguments):
        if method == "call":
            method, *arguments = arguments
        self.assigned.append((handle, method))
        return Call(handle, method, arguments[0] if arguments else None)

    def start(self, handle, node):
        return self.call(handle, "call", "start")

    def wait(self, references, timeout):
        self.now += timeout
        ready = [c for c in references if not c.replica.alive or self._placed(c.replica)]
        return self.random.sample(ready, self.random.randint(0, len(ready)))

    def result(self, call):
        replica = call.replica
        if not replica.alive:
            raise LostError("killed")
        fault = self.nodes[replica.node][1]
        if call.method == "place" and fault == "no process":
            replica.alive = False
            raise LostError("ModuleNotFoundError: No module named 'actstore'")
        if call.method == "place":
            return {"node": replica.node}
        if fault == "dies" and call.method != "rows_done":
            replica.alive = False
            raise LostError("the worker's process ended")
        if call.method == "start":
            self.started[replica.node] += 1
            if fault == "refuses":
                return Failure(error=MismatchError(REFUSAL), text=REFUSAL, traceback="", everywhere=False)
            return {"pid": 1}
        if call.method == "rows_done":
            return {}
        if fault == "fails" or (fault == "flaky" and self.random.random() < 0.05):
            return Failure(error=None, text="RuntimeError: ECC", traceback="", everywhere=False)
        return self.tasks[call.argument]() if call.argument in self.tasks else call.argument

    def discard(self, handle):
        handle.alive = False
        self.unplaced.pop(handle, None)

    def hosts(self):
        return {n for n, (size, _) in self.nodes.items() if size}

    def name(self, node):
        return node

    def shortage(self):
        return None if self.grows or self.hosts() else "no node of the Ray cluster has 1 CPU"


class Said(list):
    def show(self, rows_in_work, pool):
        for number, worker in enumerate(pool._workers):
            assert sum(c.worker == number and c.task is not None for c in pool._calls.values()) <= 2 * CALLS_IN_FLIGHT
            assert worker.state != "live" or worker.node

    def say(self, line):
        assert "\n" not in line
        self.append(line)


def run(nodes, num_tasks, *, workers=3, seed=0, tasks=(), grows=False):
    """Run tasks on a simulated cluster; gives it, the results in order, what was said, and the pool."""
    cluster, done, said = SimulatedCluster(nodes, dict(tasks), seed, grows), [], Said()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "time", SimpleNamespace(monotonic=lambda: cluster.now))
        pool = Pool(
            cluster, EventLog(open_storage("memory://pool"), said.say), workers=workers, show=said.show, say=said.say
        )
        todo = [Task("capture", i, key=i, name=f"bucket {i}") for i in range(num_tasks)]
        try:
            pool.run(todo, lambda result, _: done.append(result))
        finally:
            pool.close()
    return cluster, done, said, pool


FAULTS = st.sampled_from(["fails", "dies", "refuses", "flaky", "none"])


@settings(max_examples=200, deadline=None)
@given(
    faults=st.lists(FAULTS, max_size=4),
    workers=st.integers(1, 6),
    num_tasks=st.integers(1, 30),
    seed=st.integers(0, 1 << 16),
)
def test_whatever_nodes_do_every_task_is_done_if_a_good_node_is_there(faults, workers, num_tasks, seed):
    nodes = {f"node{i}": (2, fault) for i, fault in enumerate(faults)} | {"good": (2, "none")}
    try:
        _, done, _, pool = run(nodes, num_tasks, workers=workers, seed=seed)
    except CaptureError as e:  # a few tasks may fail on three bad nodes before a good one gets them
        assert str(e).startswith("bucket ")
        assert sum(fault in ("fails", "dies", "flaky") for fault in faults) >= TASK_NODES - 1
        return
    assert sorted(done) == list(range(num_tasks))
    assert all(nodes[n][1] != "none" for n in pool.quarantined)


def test_a_node_on_which_calls_fail_is_left_and_its_tasks_are_done_elsewhere():
    cluster, done, said, pool = run({"bad": (1, "fails"), "good": (1, "none")}, 40, workers=2, seed=1)
    assert sorted(done) == list(range(40))
    assert pool.quarantined == {"bad"}
    assert cluster.started["bad"] == NODE_FAILURES
    assert [line for line in said if line.startswith("no more tasks for bad after 3 failures: RuntimeError: ECC")]


def test_a_node_that_refuses_the_model_is_asked_once():
    cluster, done, _, pool = run({"bad": (1, "refuses"), "good": (1, "none")}, 5, workers=2)
    assert sorted(done) == list(range(5))
    assert (cluster.started["bad"], pool.quarantined, pool.losses) == (1, {"bad"}, 0)


def test_a_rare_fault_quarantines_nobody():
    _, done, _, pool = run({"a": (4, "flaky")}, 400, workers=4)
    assert sorted(done) == list(range(400))
    assert pool.losses > NODE_FAILURES
    assert not pool.quarantined


def test_where_every_node_fails_one_error_says_what_each_failed_with():
    nodes = {"a": (1, "refuses"), "b": (1, "refuses"), "c": (1, "fails")}
    with pytest.raises(CaptureError, match="no worker can go on") as error:
        run(nodes, 40, workers=3)
    lines = str(error.value).splitlines()
    assert len(lines) == 3, lines
    assert [line for line in lines if "a, 1 failure" in line and "b, 1 failure" in line and REFUSAL in line]
    assert [line for line in lines if "c, 3 failures: RuntimeError: ECC" in line]


def test_a_task_that_fails_everywhere_ends_the_run():
    failure = Failure(error=None, text="RuntimeError: boom", traceback="", everywhere=False)
    with pytest.raises(CaptureError, match="bucket 7 failed 3 times on 3 nodes, the last time with RuntimeError: boom"):
        run(dict.fromkeys("abcd", (1, "none")), 400, workers=4, tasks={7: lambda: failure})
    with pytest.raises(CaptureError, match=r"bucket 7 failed 6 times on 1 node, .*|no worker can go on"):
        run({"a": (1, "none")}, 400, workers=1, tasks={7: lambda: failure})


def test_what_is_certain_to_repeat_ends_the_run_at_once():
    nan = EncodingError("row 3 of resid_post.0 holds NaN")
    failure = Failure(error=nan, text=str(nan), traceback="", everywhere=True)
    with pytest.raises(EncodingError, match="row 3 of"):
        run({"a": (1, "none"), "b": (1, "none")}, 9, tasks={0: lambda: failure})


def test_a_task_that_another_run_took_over_is_left_to_it_for_longer_each_time():
    times, asked = [], iter([True] * 4 + [False])
    cluster = SimulatedCluster({"a": (1, "none")}, {}, 0)

    def again():
        times.append(cluster.now)
        return Again() if next(asked) else 0

    cluster.tasks[0] = again
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "time", SimpleNamespace(monotonic=lambda: cluster.now))
        pool, done = (
            Pool(cluster, EventLog(open_storage("memory://pool"), print), workers=1, show=Said().show, say=print),
            [],
        )
        pool.run([Task("capture", i, key=i, name=f"bucket {i}") for i in range(3)], lambda r, _: done.append(r))
    assert sorted(done) == [0, 1, 2]
    assert pool.taken_over == 4
    waits = [b - a for a, b in pairwise(times)]
    assert all(wait >= 0.5 * 2**i for i, wait in enumerate(waits))


def test_where_no_machine_can_come_the_run_ends_and_where_one_may_it_waits_and_says_so():
    with pytest.raises(CaptureError, match="no node of the Ray cluster has 1 CPU"):
        run({"small": (0, "none")}, 3)
    cluster = SimulatedCluster({"small": (0, "none")}, {}, 0, grows=True)
    said, done = Said(), []

    class Grows(Said):
        def show(self, rows_in_work, pool):
            if cluster.now > 10 * JOIN_S:
                cluster.nodes["large"] = (1, "none")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "time", SimpleNamespace(monotonic=lambda: cluster.now))
        pool = Pool(
            cluster, EventLog(open_storage("memory://pool"), print), workers=1, show=Grows().show, say=said.append
        )
        pool.run([Task("capture", 0, key=0, name="bucket 0")], lambda r, _: done.append(r))
    assert done == [0]
    assert set(said) == {"waiting for a machine with 1 CPU free"}
    assert len(said) >= 10 * JOIN_S / WAITING_S - 2


def test_a_worker_that_never_starts_is_given_up_and_the_others_go_on():
    _, done, said, _ = run({"good": (1, "none"), "bad": (1, "no process")}, 60, workers=2)
    assert sorted(done) == list(range(60))
    assert [line for line in said if f"could not be started {ATTEMPTS} times" in line and "'actstore'" in line]
    with pytest.raises(CaptureError, match=r"no worker can go on.*No module named 'actstore'"):
        run({"bad": (2, "no process")}, 60, workers=2)


def test_a_pool_runs_other_tasks_on_the_replicas_that_it_has():
    cluster, done = SimulatedCluster({"a": (2, "none")}, {}, 0), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "time", SimpleNamespace(monotonic=lambda: cluster.now))
        pool = Pool(cluster, EventLog(open_storage("memory://pool"), print), workers=2, show=Said().show, say=print)
        for method in ("capture", "consolidate"):
            tasks = [Task(method, i, key=i, name=f"{method} {i}") for i in range(30)]
            pool.run(tasks, lambda result, _: done.append(result))
    assert sorted(done) == sorted([*range(30)] * 2)
    assert sum(method == "consolidate" for _, method in cluster.assigned) >= 30
    assert cluster.started["a"] == 2


def cluster_of(*nodes, **labels):
    """What Ray says of a cluster whose nodes have these resources."""
    about = [{"NodeID": f"{i:056}", "Alive": True, "Resources": n, "Labels": labels} for i, n in enumerate(nodes)]
    return SimpleNamespace(nodes=lambda: about)


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus"),
    [([64, 64], 2, 64), ([64, 64], 3, 32), ([8, 64], 2, 32), ([8], 64, 1), ([], 4, 1), ([0, 16], 1, 16)],
)
def test_cpu_workers_share_the_cores_of_the_nodes_that_are_up(nodes, workers, cpus, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 96)  # the command's own machine says nothing about the cluster
    ray = cluster_of(*({"CPU": float(n)} for n in nodes))
    given = []
    request = request_for(ray, WorkersConfig(workers=workers, address="auto"), "cpu", lambda t: given.append(t) or 7)
    assert (request, given) == (Request(cpus=cpus, gpus=0.0, memory=7), [cpus])


def test_gpu_workers_use_their_share_of_the_node_and_ask_for_one_core():
    has = {"CPU": 96.0, "GPU": 8.0}
    for devices, threads in ((1.0, 12), (4.0, 48), (0.5, 6)):
        config, given = WorkersConfig(workers=64, devices_per_worker=devices), []
        request = request_for(cluster_of({"CPU": 8.0}, has), config, "cuda", lambda t, g=given: g.append(t) or 7)
        assert request == Request(cpus=1, gpus=devices, memory=7)
        assert request.threads_on(has) == threads
        assert given == [threads]
    config = WorkersConfig(workers=64, threads=3)
    assert request_for(cluster_of(has), config, "cuda", lambda _: 7).cpus == 3


def test_a_cluster_with_an_autoscaler_may_grow():
    assert not may_grow(cluster_of({"CPU": 8.0}, **{"ray.io/node-id": "1"}))
    assert may_grow(cluster_of({"CPU": 8.0}, **{"ray.io/node-group": "head"}))


def test_a_log_that_cannot_be_written_is_said_once_and_ends_nothing(tmp_path):
    said = []
    storage = open_storage(tmp_path / "store")
    storage.put = lambda *_: (_ for _ in ()).throw(StoreError("503 at s3://user:pass@host/x"))
    log = EventLog(storage, said.append)
    for i in range(3):
        log.write("bucket", bucket=i)
        log._put()
    log.close()
    assert log.failures == 4
    assert said == ["the run's log can't be written, the run goes on: 503 at s3://host/x"]


def test_secrets_are_left_out_of_what_is_logged(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    text = "GET https://me:pw@host/x?X-Amz-Signature=abc&y=1 with hf_abcdefgh and wJalrXUtnFEMI"
    clean = "GET https://host/x?X-Amz-Signature=...&y=1 with $HF_TOKEN and $AWS_SECRET_ACCESS_KEY"
    assert without_secrets(text) == clean
