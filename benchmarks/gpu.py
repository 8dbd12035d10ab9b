"""The GPU kit: what actstore's GPU code computes and how fast it is, in one command.

    python benchmarks/gpu.py                        on a machine with a CUDA GPU, under 8 minutes on an H100
    python benchmarks/gpu.py --device cpu --quick   everywhere: the same code with small numbers

Parts, in the order in which data flows; `--only` picks some:

    values    sites, store, batches and one training step on the device against the CPU
    capture   Gemma 2 2B's first 13 layers with random weights: bare forward pass, with hooks, with storing
    loader    a pinned copy; batches on the device; the stall of a consumer at the rate of a 16k-wide SAE
    trainer   one JumpReLU step at d = 2304, batch 4096: against the products alone, by kind of kernel, against SAELens

Prints a table and writes JSON with hardware and versions after every part, so that a run that is cut off leaves what
it measured. Exit code 1 if a check fails or a part ends in an error. `docs/playbooks/gpu.md` says what a bare machine
needs.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]  # a bare machine has actstore as a checkout only

import torch  # noqa: E402
from kit.capture import capture  # noqa: E402
from kit.loader import loader  # noqa: E402
from kit.record import FULL, GIB, QUICK, Kit, Record  # noqa: E402
from kit.trainer import trainer  # noqa: E402
from kit.values import values  # noqa: E402

from actstore.bench import machine  # noqa: E402
from actstore.console import print_table, write_json  # noqa: E402

PARTS: dict[str, Callable[[Kit], None]] = {
    "values": values,
    "capture": capture,
    "loader": loader,
    "trainer": trainer,
}


def hardware(device: str) -> dict[str, Any]:
    """The machine, and its GPU."""
    found = machine()
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found |= {"gpu": gpu.name, "gpu memory GiB": round(gpu.total_memory / GIB), "cuda": torch.version.cuda}
    return found


def main() -> int:
    """Run the parts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes, under a minute on two cores")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--json", type=Path, help="default: gpu.json beside this script, on a GPU without --quick")
    parser.add_argument("--folder", type=Path, help="for stores and models, up to 20 GB; default: a temporary one")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no GPU here; --device cpu --quick runs the same code", file=sys.stderr)
        return 1
    recorded = arguments.device == "cuda" and not arguments.quick
    file = arguments.json or (HERE / "gpu.json" if recorded else None)
    record = Record(device=arguments.device, quick=arguments.quick, machine=hardware(arguments.device))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        kit = Kit(
            device=arguments.device,
            size=QUICK if arguments.quick else FULL,
            folder=Path(folder),
            record=record,
        )
        for name in arguments.only:
            began = time.perf_counter()
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                PARTS[name](kit)
            except Exception as e:  # noqa: BLE001  the other parts still tell something
                traceback.print_exc()
                record.failed[name] = f"{type(e).__name__}: {e}"
            record.seconds[name] = time.perf_counter() - began
            write_json(file, asdict(record))
    show(record)
    return 0 if record.ok else 1


def show(record: Record) -> None:
    """Print every figure on a line, and what is missing."""
    print_table("machine", record.machine)
    for line in record.lines:
        share = "" if line.share is None else f"{line.share:.2f} of {line.of}"
        check = {None: share, True: f"ok ({line.of})", False: f"FAILED ({line.of})"}[line.passed]
        print(f"{line.part:8} {line.what:66} {line.value:>11.4g} {line.unit:15} {check}".rstrip())
    for name, error in record.failed.items():
        print(f"{name} ended in an error: {error}")
    for name, why in record.not_measured.items():
        print(f"not measured: {name}: {why}")
    print(json.dumps({"ok": record.ok, "seconds": {k: round(v, 1) for k, v in record.seconds.items()}}))


if __name__ == "__main__":
    sys.exit(main())
