"""What one process holds of an SAE that several share: python benchmarks/trainer_sharded.py [--width W].

JumpReLU, d = 512, `trainer train` on a store of random rows, alone and by torchrun with 2 and 4 gloo processes, a few
steps each. Every process' own memory is sampled: what it has at most, beyond what an SAE of 64 latents takes, is set
against its share of weights, moments and gradients. Where there are several, the largest is the lead, which at the end
has the whole SAE once, to write it. How fast it is can't be told on two cores. Writes trainer_sharded.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from actstore.bench import machine
from actstore.store import SiteSpec, StoreSpec, create_store

FILE = Path(__file__).with_suffix(".json")
D, ROWS, BATCH, STEPS = 512, 8192, 256, 12
MB = 1e6


def random_store(path: Path) -> None:
    spec = StoreSpec(
        sites={"resid_post.0": SiteSpec(d=D, encoding="f32")},
        rows=ROWS,
        bucket_rows=ROWS,
        shard_rows=2048,
        chunk_rows=64,
    )
    writer, rng = create_store(str(path), spec), np.random.default_rng(0)
    ids: dict[str, Any] = {name: np.zeros(ROWS, np.int32) for name in ("sequence", "position", "token_id")}
    writer.write_arrays(0, {"resid_post.0": rng.standard_normal((ROWS, D), np.float32), **ids})
    writer.finalise()


def peaks(store: Path, out: Path, width: int, processes: int) -> list[float]:
    """The most memory of each process, in MB, from its own pages alone."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    what = ["train", "--store", store, "--site", "resid_post.0", "--out", out, "--d-sae", width, "--steps", STEPS]
    how = ["--batch-size", BATCH, "--checkpoint-every", 0, "--log-every", 1, "--preset", "gemma_scope"]
    command = [sys.executable, *start, "-m", "trainer.cli", *map(str, [*what, *how])]
    job, most = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), dict[int, float]()
    while job.poll() is None:
        for process in [job, *job.children(recursive=True)]:
            try:
                if "trainer.cli" in process.cmdline() and "torch.distributed.run" not in process.cmdline():
                    most[process.pid] = max(most.get(process.pid, 0), process.memory_full_info().uss / MB)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        time.sleep(0.02)
    assert job.returncode == 0, command
    return sorted(most.values())[-processes:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1 << 16)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        random_store(store)
        idle = peaks(store, Path(folder) / "idle", 64, 1)[0]
        for processes in (1, 2, 4):
            each = peaks(store, Path(folder) / str(processes), args.width, processes)
            matrices = 2 * D * args.width * 4 * 3 / MB / processes
            beyond = [mb - idle for mb in each]
            found[str(processes)] = {"MB beyond 64 latents": beyond, "share of matrices": matrices}
            line = ", ".join(f"{mb:.0f}" for mb in beyond)
            print(f"{processes} processes: {line} MB more; weights, moments, gradients {matrices:.0f}", flush=True)
    about = {"d_model": D, "d_sae": args.width, "batch": BATCH, "MB with 64 latents": idle, "machine": machine()}
    FILE.write_text(json.dumps({**about, "processes": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
