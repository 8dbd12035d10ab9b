"""What both command lines share: exit codes, figures, progress without a terminal."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from actstore import console
from actstore.errors import StoreError, mismatch
from actstore.progress import Progress, clock, scaled


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (StoreError("the store is gone"), 1, "error: the store is gone"),
        (ValueError("batch_size is 3"), 2, "error: batch_size is 3"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "no space left on the device"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (None, 0, ""),
    ],
)
def test_exit_codes(error: BaseException | None, code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        if error:
            raise error

    assert console.run(command) == code
    printed = capsys.readouterr().err
    assert words in printed
    assert "Traceback" not in printed


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        console.run(lambda: print(1 / 0))
    monkeypatch.setenv(console.DEBUG, "1")
    with pytest.raises(StoreError):
        console.run(lambda: (_ for _ in ()).throw(StoreError("x")))


LEAVING = """
import atexit, sys, threading, time
import numpy as np
import actstore
from actstore import console
atexit.register(lambda: print("registered", flush=True))
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
writer = actstore.create(sys.argv[1], sites={"a": 4}, bucket_rows=64, shard_rows=64, chunk_rows=64)
writer.append({"a": np.zeros((100, 4), np.float32)})
sys.stdout.write("unflushed")
console.leave(7)
"""


def test_leaving_waits_for_threads_runs_what_is_registered_and_flushes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVING, str(tmp_path / "store")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 7
    assert sorted(done.stdout.replace("unflushed", "unflushed\n").split()) == ["registered", "thread", "unflushed"]
    assert "was never closed" in done.stderr


def test_leaving_with_nobody_to_read_the_output_is_quiet() -> None:
    program = "import os; from actstore import console; r, w = os.pipe(); os.dup2(w, 1); os.close(w); os.close(r); "
    program += "print('figures'); console.leave(0)"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, env=buffered, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_command_line_starts_without_what_its_commands_need() -> None:
    heavy = {"torch", "transformers", "zarr", "numba", "pyarrow", "ray", "fsspec"}
    program = f"import sys, actstore.cli; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n"


def test_json_is_strict(tmp_path: Path) -> None:
    console.write_json(tmp_path / "a" / "f.json", {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": True}})
    assert json.loads((tmp_path / "a" / "f.json").read_text()) == {"a": None, "b": [1.5, None], "c": {"d": True}}


def test_a_mismatch_names_what_differs_and_nothing_else() -> None:
    text = str(mismatch("the store", {"a": 1, "b": 2, "c": None}, {"a": 1, "b": 3, "d": None}, "Do this."))
    fields = "b is 2, asked for 3; c is None, not asked for; d is absent, asked for None"
    assert text == f"the store differs: {fields}. Do this."


def test_plain_progress_has_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("actstore.progress.time.monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=False, width=200)) as progress:
        step = progress.step("capture", total=1000, unit="rows")
        step.skip(200)
        for _ in range(8):
            now[0] += 4
            step.note("ratio 1.45")
            step.advance(100)
    lines = out.getvalue().splitlines()
    assert lines[0] == "capture: 40% (400 of 1k rows), 25 rows/s, 0:24 left  ratio 1.45"
    assert lines[-1].startswith("capture: 100% (1k of 1k rows), 25 rows/s, 0:00 left")
    assert len(lines) == 4  # one in 5 seconds, and the last


def test_numbers_for_people() -> None:
    numbers = (0, 7, 0.5, 999, 12345, 2_000_000, 3.21e12)
    assert [scaled(v) for v in numbers] == ["0", "7", "0.5", "999", "12.3k", "2M", "3.21T"]
    assert [clock(s) for s in (0, 65, 3600)] == ["0:00", "1:05", "1:00:00"]
    assert [console.figure(v) for v in (True, None, 1234567, 0.123456, "x")] == ["yes", "-", "1,234,567", "0.1235", "x"]
