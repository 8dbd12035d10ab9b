"""`actstore`: the command line, derived from the config dataclasses and function signatures.

The top of the house: it alone may import the trainer (for `demo`), and it imports what is heavy only when a command
needs it. Exit codes: 0, 1 (failed), 2 (bad arguments), 130 (interrupted; the same command continues).
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional
from tyro.extras import SubcommandApp

from actstore import console
from actstore.capture.config import CaptureConfig
from actstore.progress import Progress
from actstore.tokens.config import TokenizeConfig

if TYPE_CHECKING:
    from actstore.bench import Report

Json = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help="Also write the figures to this file, as JSON.")]

app = SubcommandApp()
bench = SubcommandApp()
app.command(bench, name="bench")


@app.command
def demo(*, out: Path = Path("demo"), json: Json = None) -> None:
    """Run the whole workflow on the built-in model and text: under 4 minutes on 2 cores.

    Text to token table to store to shuffled batches to an evaluated, exported SAE and an HTML report. Run it again to
    continue what was interrupted.

    Args:
        out: directory for everything that it makes.
        json: also write the figures to this file, as JSON.

    """
    from trainer.demo import run_demo

    figures = run_demo(out)
    console.write_json(json, figures)


@app.command
def tokenize(config: OmitArgPrefixes[TokenizeConfig], *, json: Json = None) -> None:
    """Turn documents into a token table: packed sequences in keyed random order."""
    from actstore.tokens import tokenize as run

    with Progress() as progress:
        table = run(config, progress)
    figures = {
        "sequences": table.sequences,
        "seq_len": table.seq_len,
        "tokens": table.tokens,
        "fingerprint": table.fingerprint,
    }
    console.print_table(f"token table {config.out}", figures)
    console.write_json(json, figures)


@app.command
def capture(config: OmitArgPrefixes[CaptureConfig], *, json: Json = None) -> None:
    """Run a model over a token table and store its activations. Run it again to continue."""
    from actstore.capture.run import capture as run

    with Progress() as progress:
        summary = run(config, progress)
    console.print_table(f"store {config.out}", vars(summary))
    console.write_json(json, summary)


@app.command
def info(url: Positional[str], *, json: Json = None) -> None:
    """Say what a store holds.

    Args:
        url: the store.
        json: also write the figures to this file, as JSON.

    """
    from actstore.store import open_store

    store = open_store(url)
    figures = {
        "rows": store.rows,
        "planned_rows": store.spec.rows,
        "complete": store.complete,
        "buckets": len(store.index.buckets),
        "planned_buckets": store.spec.buckets,
        "bytes_stored": store.stored_bytes,
        "bytes_raw": store.raw_bytes,
        "ratio": store.raw_bytes / max(store.stored_bytes, 1),
        "fingerprint": store.fingerprint,
    }
    console.print_table(f"store {url}", figures)
    sites = []
    for name, site in sorted(store.sites.items()):
        s = store.stats(name) if store.index.stats else None
        sites.append((name, site.d, site.encoding, s and s.mean_sq_norm**0.5, s and s.max_abs))
    console.print_table("sites", sites, header=("site", "d", "encoding", "root mean square norm", "max |x|"))
    console.print_table("provenance", {k: str(v) for k, v in sorted(store.provenance.items())})
    stats = {n: {"d": d, "encoding": e, "rms_norm": r, "max_abs": m} for n, d, e, r, m in sites}
    console.write_json(json, figures | {"sites": stats, "provenance": store.provenance})


@app.command
def verify(url: Positional[str], *, deep: bool = False, json: Json = None) -> None:
    """Check every committed object; exit code 1 and one line for each damaged one.

    Args:
        url: the store.
        deep: also read, checksum and decode everything.
        json: also write the damage to this file, as JSON.

    """
    from actstore.store import open_store
    from actstore.store.verify import verify as check

    store = open_store(url)
    with Progress() as progress:
        step = progress.step("verify", total=store.rows, unit="rows")
        damage = check(store, deep=deep, advance=step.advance)
    for d in damage:
        print(f"{d.key}: {d.problem}")
    console.write_json(json, {"buckets": len(store.index.buckets), "damaged": [vars(d) for d in damage]})
    if damage:
        sys.exit(1)
    print(
        f"{len(store.index.buckets)} committed buckets are intact{'' if deep else ' (sizes only; --deep reads them)'}"
    )


def _show(report: "Report", json: Path | None) -> None:
    rows = [(r.what, r.gb_s, r.of_ceiling, r.ceiling) for r in report.rates]
    console.print_table(report.command, rows, header=("", "GB/s", "ratio", "to"))
    print(f"bound: {report.bound}")
    console.write_json(json, report)


@bench.command
def read(
    url: Positional[str],
    *,
    site: str | None = None,
    batch_size: int = 4096,
    seconds: float = 5.0,
    threads: int | None = None,
    json: Json = None,
) -> None:
    """Read a store as a trainer does; compare with memory copy, bare fetch, decode and gather in the same run.

    Args:
        url: the store.
        site: the site to read; default the first.
        batch_size: rows a batch.
        seconds: how long each loader run takes.
        threads: fetch-and-decode threads; default one a core.
        json: also write the figures to this file, as JSON.

    """
    from actstore.bench import bench_read

    _show(bench_read(url, site=site, batch_size=batch_size, seconds=seconds, threads=threads), json)


@bench.command
def write(
    url: Positional[str | None] = None,
    *,
    d: int = 2304,
    rows: int = 1 << 16,
    threads: int | None = None,
    json: Json = None,
) -> None:
    """Write synthetic activations; compare with bare encoding and bare puts in the same run.

    Args:
        url: where to write; stores named bench-* are left there. Default: a temporary directory.
        d: width of the rows.
        rows: number of rows.
        threads: encoding threads; default one a core.
        json: also write the figures to this file, as JSON.

    """
    from actstore.bench import bench_write

    _show(bench_write(url, d=d, rows=rows, threads=threads), json)


def main() -> None:
    """Run one command and exit with its code."""
    description = "The open activation store: cache activations, stream them shuffled, benchmark both."
    sys.exit(console.run(lambda: app.cli(prog="actstore", description=description)))
