"""Command lines and functions in processes of their own that need not import anything first.

Multiprocessing's fork server imports what is heavy once for each test process, and every process that starts here is a
fork of it. A command then costs its work, without three seconds of imports.
"""

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

HEAVY = [
    "actstore.bench",
    "actstore.cli",
    "actstore.exchange.exporter",
    "actstore.stream",
    "trainer.cli",
    "trainer.sweep",
]
HEAVY += ["accelerate", "gcsfs", "obstore", "hypothesis", "pytest"]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(HEAVY)


def run_actstore(*args: str, code: int = 0, file_bytes: int | None = None) -> CompletedProcess[str]:
    """Run `actstore` with arguments; it must end with the exit code and without a traceback.

    Where `file_bytes` is given, no file that it writes may grow beyond that size.
    """
    done = run_in_fork(_actstore, file_bytes, args, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def _actstore(file_bytes: int | None, args: tuple[str, ...]) -> None:
    from actstore.cli import main

    if file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    sys.argv = ["actstore", *args]
    main()


def run_in_fork(function: Callable[..., object], *args: Any, timeout: float = 120) -> CompletedProcess[str]:
    """Call a function of a module in a process of its own, and wait for its end."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start_fork(_redirected, out, err, function, args)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutExpired(function.__name__, timeout, out.read_text(), err.read_text())
        return CompletedProcess(function.__name__, process.exitcode, out.read_text(), err.read_text())


def _redirected(out: Path, err: Path, function: Callable[..., object], args: tuple[Any, ...]) -> None:
    for file, descriptor in ((out, 1), (err, 2)):
        with file.open("wb") as opened:
            os.dup2(opened.fileno(), descriptor)
    function(*args)


def start_fork(function: Callable[..., object], *args: Any) -> ForkServerProcess:
    """Start a function of a module in a process of its own, with this one's environment and directory."""
    process = CONTEXT.Process(target=_in_environment, args=(dict(os.environ), function, args))
    process.start()
    return process


def _in_environment(environment: Mapping[str, str], function: Callable[..., object], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    function(*args)
