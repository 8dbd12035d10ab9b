"""What both command lines share: error messages and exit codes, tables, JSON results."""

import atexit
import dataclasses
import errno
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actstore.errors import ActstoreError

DEBUG = "ACTSTORE_DEBUG"
"""Environment variable; set it to see the traceback behind an error message."""


def run(command: Callable[[], None]) -> int:
    """Run a command; returns its exit code: 0, 1 (it failed), 2 (bad arguments) or 130 (interrupted)."""
    try:
        command()
    except KeyboardInterrupt:
        print("interrupted; what is committed stays, the same command continues", file=sys.stderr)
        return 130
    except ActstoreError as e:
        return _fail(str(e), 1)
    except ValueError as e:
        return _fail(str(e), 2)
    except OSError as e:
        if e.errno == errno.ENOSPC:
            where = f" ({e.filename})" if e.filename else ""
            return _fail(f"no space left on the device{where}; free some and run the same command again", 1)
        return _fail(str(e), 1)
    return 0


def leave(code: int) -> NoReturn:
    """End the process with what Python does at its end, but for taking its modules apart: a second with torch loaded.

    Threads are waited for, and everything that was registered for the exit runs: a writer that was never closed says
    so, Ray ends, temporary directories go. The two private functions are the ones that Python 3.11 to 3.14 calls then.
    """
    if os.environ.get(DEBUG):
        sys.exit(code)  # profilers write their figures later
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue] # noqa: SLF001
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage] # noqa: SLF001
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # nobody reads it any more
        code = code or 1
    os._exit(code)


def _fail(message: str, code: int) -> int:
    if os.environ.get(DEBUG):
        raise  # noqa: PLE0704  always called from an except block
    print(f"error: {message}", file=sys.stderr)
    return code


def write_json(file: Path | None, figures: object) -> None:
    """Write a command's figures, if the user asked for the file."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        data = dataclasses.asdict(figures) if dataclasses.is_dataclass(figures) else figures  # pyright: ignore[reportArgumentType]
        file.write_text(json.dumps(_strict(data), indent=1, allow_nan=False, default=str) + "\n")


def _strict(value: object) -> object:
    """JSON has no NaN and no infinities: they become null."""
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_WHOLE = 32
"""Characters up to which the first column of a table with a header, which holds names, is not broken."""


def print_table(
    title: str, rows: Mapping[str, object] | Sequence[tuple[object, ...]], *, header: tuple[str, ...] = ()
) -> None:
    """Print figures on standard output: a mapping as two columns, a list of tuples under `header`."""
    table = Table(title=title, title_justify="left", show_header=bool(header), header_style="bold")
    lines = list(rows.items()) if isinstance(rows, Mapping) else rows
    cells = [[figure(v) for v in line] for line in lines]
    for i in range(len(lines[0]) if lines else len(header)):
        whole = max((len(line[i]) for line in cells), default=0) <= _WHOLE and bool(header)
        justify = "left" if i == 0 else "right"
        table.add_column(header[i] if header else "", justify=justify, overflow="fold", no_wrap=i == 0 and whole)
    for line in cells:
        table.add_row(*map(escape, line))
    Console(soft_wrap=True, emoji=False).print(table)


def figure(value: object) -> str:
    """A value as tables show it: thousands separated, four significant digits, nothing that a terminal would act on."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
