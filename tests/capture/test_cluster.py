"""Capture on a cluster of a head and two nodes: whatever dies, the store ends as if nothing had.

Every test compares with the store of one quiet replica in this process, object by object.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import StringIO
from pathlib import Path

import psutil
import pytest
import torch
from conftest import without_ray
from faults import FaultyProxy
from rich.console import Console
from tiny import save

from actstore.capture import CaptureConfig, capture
from actstore.capture.cluster import Device, choose_device
from actstore.capture.pool import CALLS_IN_FLIGHT
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
    )


@pytest.fixture(scope="module")
def undisturbed(folder):
    """Objects of the store that one quiet replica in this process makes, by key."""
    fields = {"model": str(folder / "gemma"), "tokens": str(folder / "tokens"), "sites": ("resid_post.1,mlp_out.0",)}
    sizes = {"threads": 1, "batch_size": 1, "bucket_rows": 64, "shard_rows": 64, "chunk_rows": 32, "device": "cpu"}
    config = CaptureConfig(**fields, **sizes, out=str(folder / "undisturbed"))
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
            found[key] = storage.get(key)
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


SCRIPT = """
from pathlib import PosixPath
import sys
from actstore.capture import CaptureConfig, capture
from actstore.progress import Progress
if __name__ == "__main__":
    with Progress() as progress:
        print(capture(CaptureConfig(**eval(sys.argv[1])), progress))
"""


def start(config: CaptureConfig) -> subprocess.Popen:
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    command = [sys.executable, "-c", SCRIPT, repr(fields)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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


def test_a_worker_and_a_node_die(cluster, config, undisturbed):
    with ThreadPoolExecutor(1) as other:
        running = other.submit(capture, config, QUIET)
        wait_for(lambda: len(commits(config.out)) >= 3, "three commits")
        replicas()[0].kill()
        wait_for(lambda: len(commits(config.out)) >= 20, "twenty commits")
        cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
        cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
        summary = running.result(timeout=400)
    check(config, undisturbed)
    assert summary.buckets == open_store(config.out).spec.buckets
    lost = [e for e in events(config.out) if e["event"] == "lost"]
    assert summary.workers_lost == len(lost)
    assert 1 <= len(lost) <= 2 * CALLS_IN_FLIGHT


def test_the_driver_dies_and_is_started_again(cluster, config, undisturbed):
    run = start(replace(config, address=cluster.address))
    wait_for(lambda: len(commits(config.out)) >= 5 or run.poll() is not None, "five commits")
    assert run.poll() is None, run.communicate()[0]
    run.send_signal(signal.SIGKILL)
    run.wait()
    wait_for(lambda: not replicas(), "end of the workers")
    done = commits(config.out)
    assert 5 <= len(done) < len([k for k in undisturbed if k.startswith("commits/")])
    again = start(replace(config, address=cluster.address))
    output, _ = again.communicate(timeout=400)
    assert again.returncode == 0, output
    check(config, undisturbed, kept=done)


@pytest.mark.parametrize("backend", ["gs", pytest.param("s3", marks=pytest.mark.slow)])
def test_the_object_store_fails_for_a_while(cluster, config, undisturbed, backend, request, tmp_path, monkeypatch):
    server = request.getfixturevalue("gcs_server" if backend == "gs" else "s3_server")
    with FaultyProxy(server.url, kinds=["503"], seed=1) as proxy:
        monkeypatch.setenv(server.variable, proxy.url)
        names = [n for n in os.environ if n.startswith(("AWS_", "STORAGE_"))]
        environment = tmp_path / "env.json"
        environment.write_text(json.dumps({"env_vars": {n: os.environ[n] for n in names}}))
        config = replace(config, out=server.fresh(), address=cluster.address, runtime_env=environment)

        run = start(config)
        wait_for(lambda: len([r for r in proxy.requests if "commits" in r]) >= 40 or run.poll() is not None, "requests")
        proxy.rate = 1.0
        time.sleep(4)
        proxy.rate = 0.1
        output, _ = run.communicate(timeout=400)
        assert run.returncode == 0, output
        proxy.rate = 0.0
        check(config, undisturbed)
        assert int(re.search(r"retries=(\d+)", output)[1]) >= 1


def test_a_cluster_s_gpus_decide_on_device_and_precision(cluster, config):
    """Ray believes a node that says it has GPUs, as it believes one that has them."""
    import ray

    asked = replace(config, device="auto")
    assert choose_device(asked) == Device("cpu", bfloat16=False)
    for kind, bfloat16 in (("H100", True), ("V100", False)):
        node = cluster.add_node(num_cpus=0, num_gpus=1, resources={f"accelerator_type:{kind}": 1})
        while not ray.cluster_resources().get("GPU"):
            time.sleep(0.1)
        assert choose_device(asked) == Device("cuda", bfloat16=bfloat16)
        assert choose_device(config) == Device("cpu", bfloat16=False)
        cluster.remove_node(node)
        while ray.cluster_resources().get("GPU"):
            time.sleep(0.1)


def test_an_address_where_nobody_listens_is_told_at_once(config):
    run = start(replace(config, address="127.0.0.1:1"))
    output, _ = run.communicate(timeout=400)
    assert run.returncode != 0
    assert "CaptureError: no Ray cluster answers at 127.0.0.1:1: [Errno 111] Connection refused" in output
    assert not Path(config.out, "commits").exists()
