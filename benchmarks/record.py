"""How every benchmark here runs: arguments, rounds, the quiet machine, the record and its page.

A script names its parts and hands them to `main`. A part is a function of the arguments that returns rows: figures by
column. `SCRIPT.json` keeps the rows of each part with the command, commit, machine and date that they are of, and
`SCRIPT.md` is a table of each. A part that runs again replaces its own rows only.

What was measured beside other work is not recorded: a part whose cores others used for more than 10% of its time, be it
processes of this machine or other virtual machines, ends the script with a message. `--quick` takes the smallest sizes
that run, on a busy machine too, and records nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from actstore.bench import machine
from actstore.console import figure

HERE = Path(__file__).parent
MOST = 0.1
"""Share of the processor's time that others may take before and during a part."""
WATCH_S = 3.0
"""How long the machine is watched before a part."""
Row = dict[str, Any]
Part = Callable[[argparse.Namespace], list[Row]]


def _without_place(argument: str) -> str:
    """An argument of the command, without where things lie on this machine."""
    return "DIR" if argument.startswith(("/", "~")) else argument


def parser(doc: str | None, *, rounds: int = 5) -> argparse.ArgumentParser:
    """The arguments that every script takes; it may add its own."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--only", nargs="+", metavar="PART", help="parts to run; the others' figures stay")
    found.add_argument("--rounds", type=int, default=rounds, help="how often each is measured, in turns")
    found.add_argument("--dir", type=Path, help="for stores, which stay; default: a temporary directory")
    found.add_argument("--quick", action="store_true", help="the smallest sizes; nothing is recorded")
    return found


def main(script: str, parts: Mapping[str, Part], arguments: argparse.ArgumentParser, *, daemons: bool = False) -> None:
    """Run parts of the script file `script`, print their rows, and record them unless `--quick`.

    `daemons`: the parts start processes whose time isn't counted as theirs, so only what runs before them is others'.
    """
    args = arguments.parse_args()
    if unknown := set(args.only or ()) - set(parts):
        arguments.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    args.rounds = 1 if args.quick else args.rounds
    with tempfile.TemporaryDirectory(prefix="actstore-benchmark-") as scratch:
        args.dir = args.dir or Path(scratch)
        args.dir.mkdir(parents=True, exist_ok=True)
        for name in args.only or parts:
            with nullcontext() if args.quick else cores(daemons=daemons):
                rows = parts[name](args)
            print(name, *table(rows), sep="\n", flush=True)
            if not args.quick:
                keep(script, name, rows, parts[name].__doc__ or "")


def keep(script: str, part: str, rows: list[Row], words: str = "") -> None:
    """Write the rows of a part to the script's JSON file, and its page anew."""
    name = Path(script).stem
    file = HERE / f"{name}.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    record = {n: r for n, r in known.items() if isinstance(r, dict) and "rows" in r}
    record[part] = {
        "words": " ".join(words.split()),
        "command": " ".join(["python", f"benchmarks/{name}.py", *map(_without_place, sys.argv[1:])]),
        "rows": rows,
        "machine": machine(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    file.write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(name, record))


def page(title: str, record: Mapping[str, Any]) -> str:
    """The Markdown page of a record."""
    lines = [f"# {title}", "", f"Written by `benchmarks/{title}.py`; do not edit.", ""]
    for part, found in record.items():
        facts = {**found["machine"], "commit": found["commit"], "date": found["date"]}
        lines += [f"## {part}", "", found["words"], "", *table(found["rows"]), ""]
        lines += [f"`{found['command']}`: " + ", ".join(f"{k} {figure(v)}" for k, v in facts.items()), ""]
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> list[str]:
    """Rows in Markdown; a column is there that any row has, unless it holds a structure."""
    flat = [{k: v for k, v in row.items() if not isinstance(v, (list, dict))} for row in rows]
    header = tuple(dict.fromkeys(name for row in flat for name in row))
    lines = [" | ".join(figure(row.get(name, "")) for name in header) for row in flat]
    return [f"| {line} |" for line in (" | ".join(header), " | ".join(["---"] * len(header)), *lines)]


def commit() -> str:
    """The commit that is checked out, with "+" where files differ from it; "" without git."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--exclude", "*", "--abbrev=12", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


@contextmanager
def cores(*, daemons: bool = False) -> Generator[None]:
    """Exit with a message if others use the cores before the block, or used them during it."""
    if (busy := psutil.cpu_percent(interval=WATCH_S) / 100) > MOST:
        raise SystemExit(f"not recorded: {busy:.0%} of the processor is in use by something else")
    before, own = psutil.cpu_times(), _own_seconds()
    yield
    after, own = psutil.cpu_times(), _own_seconds() - own
    spent = {name: getattr(after, name) - getattr(before, name) for name in after._fields}
    # Linux counts the time of guests in `user` too
    total = sum(s for name, s in spent.items() if not name.startswith("guest"))
    idle, stolen = spent["idle"] + spent.get("iowait", 0.0), spent.get("steal", 0.0)
    foreign = 0.0 if daemons else total - idle - stolen - own
    for who, seconds in (("other virtual machines", stolen), ("other processes", foreign)):
        if seconds > MOST * total:
            raise SystemExit(f"not recorded: {who} took {seconds / total:.0%} of the processor")


def _own_seconds() -> float:
    """Processor seconds of this process, and of its children that have ended."""
    return sum(os.times()[:4])
