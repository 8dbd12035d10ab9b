"""Capture on a cluster of a head and two nodes: whatever dies, the store ends as if nothing had.

Every test compares with the store of one quiet replica in this process, object by object.
"""

import json
import os
import re
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import StringIO
from pathlib import Path

import psutil
import pytest
import torch
from commands import start_fork
from conftest import without_mark, without_ray
from faults import FaultyProxy
from rich.console import Console
from tiny import save

from actstore.capture import CaptureConfig, capture, pool
from actstore.capture.cluster import Device, choose_device
from actstore.capture.events import EventLog
from actstore.capture.replicas import RayReplicas, Request
from actstore.capture.worker import CALLS_IN_FLIGHT, Replica, ReplicaConfig
from actstore.errors import CaptureError
from actstore.progress import Progress
from actstore.store import open_store
from actstore.store.maintain.verify import verify
from actstore.store.storage import open_storage
from actstore.tokens import TokenizeConfig, tokenize

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
TEXTS = [f"Document {i}: the quick brown fox, {'jumps over ' * (i % 13)}the lazy dog.\n\nEnd {i}." for i in range(240)]
QUIET = Progress(Console(file=StringIO()))


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs and two nodes with one each; this process is its driver."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80_000_000})
    for _ in range(2):
        made.add_node(num_cpus=1, object_store_memory=80_000_000)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    save(folder / "gemma", "gemma2", torch.float32, TEXTS)
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    source = {"sources": (str(text),), "tokenizer": str(folder / "gemma")}
    tokenize(TokenizeConfig(**source, seq_len=32, out=str(folder / "tokens")), QUIET)
    return folder


@pytest.fixture
def config(folder, tmp_path):
    return CaptureConfig(
        model=str(folder / "gemma"),
        tokens=str(folder / "tokens"),
        sites=("resid_post.1,mlp_out.0",),
        out=str(tmp_path / "store"),
        workers=2,
        threads=1,
        batch_size=1,
        bucket_rows=64,
        shard_rows=64,
        chunk_rows=32,
        device="cpu",
        shared_directory=True,
    )


@pytest.fixture(scope="module")
def undisturbed(folder):
    """Objects of the store that one quiet replica in this process makes, by key."""
    fields = {"model": str(folder / "gemma"), "tokens": str(folder / "tokens"), "sites": ("resid_post.1,mlp_out.0",)}
    sizes = {"threads": 1, "batch_size": 1, "bucket_rows": 64, "shard_rows": 64, "chunk_rows": 32, "device": "cpu"}
    config = CaptureConfig(**fields, **sizes, out=str(folder / "undisturbed"), shared_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        capture(config, QUIET)
    return objects(config.out)


def objects(url: str) -> dict[str, bytes]:
    """All data of a store, and its records without the ids of attempts."""
    storage = open_storage(url)
    found = {}
    for key in storage.list(""):
        if "/c/" in key and not key.startswith("tokens/"):
            found[key] = without_mark(open_store(url).spec, key, storage.get(key))
        elif key.startswith("commits/"):
            record = json.loads(storage.get(key))
            found[key] = {k: v for k, v in record.items() if k not in ("attempt", "object_crc32c")}
    return found


def events(url: str) -> list[dict]:
    storage = open_storage(url)
    return [json.loads(line) for key in sorted(storage.list("events")) for line in storage.get(key).splitlines()]


def check(config, undisturbed, kept=frozenset()):
    """Complete, the same to the bit, every bucket committed once, and nothing done again but what was in flight."""
    store = open_store(config.out)
    assert store.complete
    assert not verify(open_storage(config.out), deep=True).damage
    found = objects(config.out)
    assert sorted(found) == sorted(undisturbed)
    assert not [k for k in found if found[k] != undisturbed[k]]
    stored = Counter(e["bucket"] for e in events(config.out) if e["event"] == "bucket" and e["bytes_stored"])
    assert max(stored.values()) == 1
    assert not kept & stored.keys()


def drive(config: CaptureConfig, log: Path) -> None:
    """Capture as a command does; all that it says goes into the file."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with Progress() as progress:
        print(capture(config, progress), flush=True)


class Driver:
    """A capture in a process of its own."""

    def __init__(self, config: CaptureConfig, log: Path):
        self.log = log
        self.process = start_fork(drive, config, log)

    def ended(self) -> bool:
        return self.process.exitcode is not None

    def output(self) -> str:
        """What it said until its end."""
        self.process.join(400)
        assert self.ended(), self.log.read_text()
        return self.log.read_text()


def commits(url: str) -> set[int]:
    return {int(p.stem) for p in (Path(url) / "commits").glob("*.json") if b'"committed"' in p.read_bytes()}


def is_replica(process: psutil.Process) -> bool:
    try:
        return process.name().startswith("ray::Replica")
    except psutil.NoSuchProcess:
        return False


def replicas() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if is_replica(p)]


def wait_for(condition, what, seconds=400):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.005)


@pytest.fixture
def ready(monkeypatch):
    """The `worker` events of the run, as they happen: a replica that is ready has buckets until there are none left."""
    found, write = [], EventLog.write

    def writing(self, event, **fields):
        write(self, event, **fields)
        if event == "worker":
            found.append(fields)

    monkeypatch.setattr(EventLog, "write", writing)
    return found


def test_a_worker_and_a_node_die(cluster, config, undisturbed, ready):
    with ThreadPoolExecutor(1) as other:
        running = other.submit(capture, config, QUIET)
        wait_for(lambda: len(commits(config.out)) >= 3, "three commits")
        os.kill(ready[-1]["pid"], signal.SIGKILL)
        number, done = len(ready), len(commits(config.out))
        wait_for(lambda: len(ready) > number or len(commits(config.out)) > done + 10, "a worker that goes on")
        node = next(n for n in cluster.list_all_nodes() if n.node_id[:8] in ready[-1]["node"])
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
        summary = running.result(timeout=400)
    check(config, undisturbed)
    assert summary.buckets + summary.buckets_by_others == open_store(config.out).spec.buckets
    lost = [e for e in events(config.out) if e["event"] == "failure" and e["task"].startswith("bucket")]
    assert summary.workers_lost == len(lost)
    assert 1 <= len(lost) <= 2 * CALLS_IN_FLIGHT


def test_the_driver_dies_and_is_started_again(cluster, config, undisturbed, monkeypatch, tmp_path):
    run = Driver(replace(config, address=cluster.address), tmp_path / "log")
    wait_for(lambda: len(commits(config.out)) >= 5 or run.ended(), "five commits")
    assert not run.ended(), run.output()
    run.process.kill()
    run.process.join()
    wait_for(lambda: not replicas(), "end of the workers")
    done = commits(config.out)
    assert 5 <= len(done) < len([k for k in undisturbed if k.startswith("commits/")])
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)  # as in a job that was submitted
    again = Driver(config, tmp_path / "again")
    output = again.output()
    assert again.process.exitcode == 0, output
    check(config, undisturbed, kept=done)


@pytest.mark.parametrize("backend", ["gs", pytest.param("s3", marks=pytest.mark.slow)])
def test_the_object_store_fails_for_a_while(cluster, config, undisturbed, backend, request, monkeypatch, tmp_path):
    server = request.getfixturevalue("gcs_server" if backend == "gs" else "s3_server")
    with FaultyProxy(server.url, kinds=["503"], seed=1) as proxy:
        monkeypatch.setenv(server.variable, proxy.url)
        monkeypatch.setenv("HF_TOKEN", "hf_a_token_that_no_log_holds")
        config = replace(config, out=server.fresh(), address=cluster.address, shared_directory=False)

        run = Driver(config, tmp_path / "log")
        wait_for(lambda: len([r for r in proxy.requests if "commits" in r]) >= 40 or run.ended(), "requests")
        proxy.rate = 1.0
        time.sleep(4)
        proxy.rate = 0.1
        output = run.output()
        assert run.process.exitcode == 0, output
        proxy.rate = 0.0
        check(config, undisturbed)
        assert int(re.search(r"retries=(\d+)", output)[1]) >= 1
    logs = [p for p in Path(cluster.head_node.get_session_dir_path()).rglob("*") if p.is_file()]
    assert logs
    assert not [p for p in logs if b"hf_a_token_that_no_log_holds" in p.read_bytes()]


FAULT = """
import os
if os.environ.get("FAULT") == "disk":
    real = os.link
    def link(a, b, **options):
        if "/c/" in str(b):
            raise OSError(5, "Input/output error")
        return real(a, b, **options)
    os.link = link
if os.environ.get("FAULT") == "versions":
    import importlib.metadata
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: "4.0.0" if name == "transformers" else version(name)
"""


@pytest.fixture
def bad_node(cluster, tmp_path):
    """Adds a node on which something is wrong; gives how many there are."""
    (tmp_path / "inject").mkdir()
    (tmp_path / "inject" / "sitecustomize.py").write_text(FAULT)
    path = f"{tmp_path / 'inject'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    nodes = []

    def add(fault, **resources):
        environment = {"PYTHONPATH": path, "FAULT": fault}
        nodes.append(cluster.add_node(object_store_memory=80_000_000, env_vars=environment, **resources))

    yield add
    for node in nodes:
        cluster.remove_node(node)


@pytest.mark.slow
def test_nodes_that_fail_and_refuse_are_quarantined_and_the_others_do_their_buckets(
    cluster, config, undisturbed, bad_node
):
    import ray

    good = [ray.remote(Replica).options(num_cpus=1).remote(None) for _ in range(2)]  # good nodes are busy at first
    ray.get([actor.rows_done.remote() for actor in good])
    bad_node("disk", num_cpus=1)
    bad_node("versions", num_cpus=1)
    screen = Console(file=StringIO(), width=200)
    with ThreadPoolExecutor(1) as other:
        running = other.submit(capture, config, Progress(screen))
        wait_for(lambda: screen.file.getvalue().count("no more tasks for") == 2 or running.done(), "quarantine")
        for actor in good:
            ray.kill(actor)
        summary = running.result(timeout=400)
    check(config, undisturbed)
    assert summary.nodes_quarantined == 2
    assert summary.workers_lost >= 3
    said = screen.file.getvalue()
    assert "after 3 failures: OSError: [Errno 5] Input/output error" in said
    assert "after 1 failure: the model on this worker differs: transformers is '4.0.0'" in said
    failed = [e for e in events(config.out) if e["event"] == "failure"]
    traces = [e["traceback"] for e in failed if "Errno 5" in e["error"]]
    assert traces
    assert all("Traceback" in t and 'File "actstore/capture/worker.py"' in t for t in traces)
    assert str(Path(__file__).parents[2]) not in json.dumps(failed).replace(config.out, "")


def test_where_all_nodes_refuse_the_run_ends_and_names_them(cluster, config, bad_node):
    bad_node("versions", num_cpus=4)
    with pytest.raises(CaptureError, match=r"no worker can go on.*1 failure: .*transformers is '4.0.0'"):
        capture(replace(config, workers=1, threads=4), QUIET)  # no other node has 4 CPUs


def wait_for_gpus(number):
    import ray

    wait_for(lambda: ray.cluster_resources().get("GPU", 0) == number, f"{number} GPUs", 60)


def test_a_cluster_s_gpus_decide_on_precision_and_are_waited_for(cluster, config, monkeypatch):
    """Ray believes a node that says it has GPUs, as it believes one that has them."""
    asked = replace(config, device="auto")
    assert choose_device(asked) == Device("cuda", bfloat16=True)
    nodes = []
    for i, (kind, bfloat16) in enumerate([("V100", False), ("H100", True)]):
        nodes.append(cluster.add_node(num_cpus=0, num_gpus=1, resources={f"accelerator_type:{kind}": 1}))
        wait_for_gpus(i + 1)
        assert choose_device(asked) == Device("cuda", bfloat16=bfloat16)
        assert choose_device(config) == Device("cpu", bfloat16=False)
    for node in nodes:
        cluster.remove_node(node)
    wait_for_gpus(0)
    monkeypatch.setattr(pool, "JOIN_S", 3.0)
    monkeypatch.setattr(pool, "WAITING_S", 1.0)
    screen = Console(file=StringIO(), width=200)
    with pytest.raises(CaptureError, match=r"no node of the Ray cluster has 1 CPU, 1 GPU, 0.*0 GPUs.*use --device cpu"):
        capture(asked, Progress(screen))
    assert "waiting for a machine with 1 CPU, 1 GPU, 0." in screen.file.getvalue()


@pytest.mark.slow
def test_replicas_are_placed_by_memory_and_parts_of_gpus(cluster, config):
    import ray

    node = cluster.add_node(num_cpus=8, num_gpus=1, memory=2_500_000_000, object_store_memory=80_000_000)
    wait_for_gpus(1)
    others = {n["NodeID"] for n in ray.nodes() if n["NodeID"] != node.node_id}
    replica = ReplicaConfig(config.model, None, "float32", "eager", "cpu", config.out, 1, 1)
    for request in (Request(cpus=1, gpus=0.5), Request(cpus=1, memory=1_000_000_000)):
        replicas = RayReplicas(ray, replica, request, threads=None, cluster=True)
        assert replicas.hosts() >= {node.node_id}
        handles = [replicas.create(others) for _ in range(3)]
        calls = [replicas.call(handle, "place") for handle in handles]
        placed, waiting = ray.wait(calls, num_returns=2, timeout=120)
        assert [replicas.result(call) for call in placed] == [{"node": node.node_id}] * 2
        assert not replicas.wait(waiting, 2.0)
        for handle in handles:
            replicas.discard(handle)
    assert Request(cpus=1, gpus=0.5).threads_on({"CPU": 8.0, "GPU": 1.0}) == 4
    huge = RayReplicas(ray, replica, Request(cpus=1, memory=10**15), threads=None, cluster=True)
    assert "1e+06 GB of memory" in huge.shortage()
    assert "lower --bucket-rows" in huge.shortage()
    cluster.remove_node(node)
    wait_for_gpus(0)


def test_a_directory_of_one_machine_is_refused_where_workers_run_on_several(cluster, config):
    with pytest.raises(CaptureError, match=r"is a directory, but the Ray cluster has several machines.*--shared"):
        capture(replace(config, shared_directory=False), QUIET)
    assert not Path(config.out).exists()


def test_an_address_where_nobody_listens_is_told_at_once(config, tmp_path):
    run = Driver(replace(config, address="127.0.0.1:1"), tmp_path / "log")
    output = run.output()
    assert run.process.exitcode != 0
    assert "CaptureError: no Ray cluster answers at 127.0.0.1:1: [Errno 111] Connection refused" in output
    assert not Path(config.out, "commits").exists()
