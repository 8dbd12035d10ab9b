"""What one process holds of an SAE that several share: python benchmarks/trainer_sharded.py [--width W].

`trainer train` on a store of random rows, alone and by torchrun with 2 and 4 gloo processes, a few steps each.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import psutil
import record
import stores
from record import Row

D, ROWS, BATCH, STEPS = 512, 8192, 256, 12
MB = 1e6


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


def sharded(args: argparse.Namespace) -> list[Row]:
    """JumpReLU, d = 512. A process' own memory is sampled; what it has at most, beyond an SAE of 64 latents, is set
    against its share of weights, moments and gradients. Of several, the largest is the lead, which at the end has the
    whole SAE once, to write it. How fast it is can't be told on two cores.
    """
    store, width = args.dir / "store", 1024 if args.quick else args.width
    stores.make(store, "resid_post.0", "f32", "planes", d=D, rows=ROWS, bucket_rows=ROWS)
    idle = peaks(store, args.dir / "idle", 64, 1)[0]
    found: list[Row] = []
    for processes in (1, 2) if args.quick else (1, 2, 4):
        each = peaks(store, args.dir / str(processes), width, processes)
        row: Row = {"processes": processes, "d_sae": width, "matrices, MB each": 2 * D * width * 4 * 3 / MB / processes}
        row |= {"least, MB": min(each) - idle, "most, MB": max(each) - idle}
        found.append({**row, "each": [mb - idle for mb in each], "MB with 64 latents": idle})
    return found


if __name__ == "__main__":
    arguments = record.parser(__doc__)
    arguments.add_argument("--width", type=int, default=1 << 16)
    record.main(__file__, {"sharded": sharded}, arguments)
