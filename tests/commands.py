"""Command lines and functions in processes of their own that need not import anything first.

Multiprocessing's fork server imports what is heavy once for each test process, and every process that starts here is a
fork of it. A command then costs its work, without three seconds of imports.
"""

import faulthandler
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import psutil

HEAVY = [
    "actstore.bench",
    "actstore.cli",
    "actstore.exchange.exporter",
    "actstore.stream",
    "trainer.cli",
    "trainer.sweep",
]
HEAVY += ["accelerate", "gcsfs", "obstore", "hypothesis", "pytest"]
HEAVY += ["tests.warm"]  # found from the repository's root; elsewhere it is left out

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
    """Call a function of a module in a process of its own, and wait for its end.

    One that takes longer than `timeout` seconds is killed with all that it started; the error has their tracebacks.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start_fork(_redirected, out, err, function, args)
        process.join(timeout)
        if process.exitcode is None:
            assert process.pid is not None
            every = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for one in every:
                if "python" in one.name():  # the others would die of the signal
                    one.send_signal(signal.SIGUSR1)
            time.sleep(1)
            for one in every:
                one.kill()
            process.join()
            raise TimeoutError(f"{function.__name__}: more than {timeout} s\n{out.read_text()}{err.read_text()}")
        return CompletedProcess(function.__name__, process.exitcode, out.read_text(), err.read_text())


def _redirected(out: Path, err: Path, function: Callable[..., object], args: tuple[Any, ...]) -> None:
    for file, descriptor in ((out, 1), (err, 2)):
        with file.open("wb") as opened:
            os.dup2(opened.fileno(), descriptor)
    faulthandler.register(signal.SIGUSR1)
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
