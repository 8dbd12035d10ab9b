"""PUT and GET of whole objects per backend and engine: python benchmarks/storage.py [SECONDS].

The servers run on this machine and share its cores with the client, so rates say little about a cloud; the ratio
between engines on one server, and the client's own processor time per GB, carry over.
"""

import json
import os
import resource
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from actstore.bench import machine, memcpy
from actstore.console import figure, print_table
from actstore.store.storage import Storage, open_storage

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
import servers  # noqa: E402  the tests' servers

MIB = 1 << 20
SIZES = (8, 48)
CONCURRENCY = (1, 4, 16)
HEADER = ("backend", "engine", "MiB", "at once", "PUT GB/s", "GET GB/s", "PUT s/GB", "GET s/GB")
WORDS = (
    "`gs` is fake-gcs-server (objects in memory), `s3` SeaweedFS (on disk), both on loopback and on the client's "
    "cores. s/GB is the client's processor time. A directory's GET reads the page cache. One core copies memory at "
    "{} GB/s."
)


def measure(job: Callable[[int], int], workers: int, seconds: float) -> tuple[float, float]:
    """GB/s of `job` in so many threads, and processor seconds of this process per GB; one warm-up each."""
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(job, range(workers)))
        stop = threading.Event()

        def work(i: int) -> int:
            done = 0
            while not stop.is_set():
                done += job(i)
            return done

        started, cpu = time.perf_counter(), processor()
        jobs = [pool.submit(work, i) for i in range(workers)]
        time.sleep(seconds)
        stop.set()
        done = sum(j.result() for j in jobs) / 1e9
        return done / (time.perf_counter() - started), (processor() - cpu) / done


def processor() -> float:
    """User and system seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def rows(name: str, engine: str, storage: Storage, seconds: float) -> list[dict[str, Any]]:
    """All sizes and concurrencies of one backend."""
    out: list[dict[str, Any]] = []
    for mib in SIZES:
        data = secrets.token_bytes(mib * MIB)

        def put(i: int, data: bytes = data) -> int:
            storage.put(f"{len(data)}/{i}", data)
            return len(data)

        def get(i: int, data: bytes = data) -> int:
            return len(storage.get(f"{len(data)}/{i}"))

        for n in CONCURRENCY:
            written, write_cpu = measure(put, n, seconds)
            read, read_cpu = measure(get, n, seconds)
            values = (name, engine, mib, n, written, read, write_cpu, read_cpu)
            out.append(dict(zip(HEADER, values, strict=True)))
            print(*values, file=sys.stderr)
    return out


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found += rows("directory", "-", open_storage(folder / "local"), seconds)
        with servers.gcs(folder) as gcs:
            os.environ[gcs.variable] = gcs.url
            found += rows("gs", "gcsfs", open_storage(gcs.fresh()), seconds)
        with servers.s3(folder) as s3:
            os.environ.update(servers.AWS)
            os.environ[s3.variable] = s3.url
            found += rows("s3", "obstore", open_storage(s3.fresh()), seconds)
    copy = memcpy()
    command = f"python benchmarks/storage.py {seconds:g}"
    record = {"command": command, "memory copy GB/s": copy, "rows": found, "machine": machine()}
    (HERE / "storage.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [tuple(r.values()) for r in found]
    print_table(
        "Object storage on loopback: gs is fake-gcs-server, s3 SeaweedFS; s/GB is the client's processor time; "
        f"one core copies memory at {figure(copy)} GB/s",
        lines,
        header=HEADER,
    )
    text = ["# storage", "", f"`{command}`. Do not edit.", "", WORDS.format(figure(copy)), ""]
    text += [f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
    text += [f"| {' | '.join(figure(v) for v in line)} |" for line in lines]
    text += ["", ", ".join(f"{k} {v}" for k, v in record["machine"].items()), ""]
    (HERE / "storage.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
