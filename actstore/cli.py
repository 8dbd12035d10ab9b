"""`actstore`: the command line, derived from the config dataclasses and function signatures.

The top of the house: it alone may import the trainer (for `demo`), and it imports what is heavy only when a command
needs it. Exit codes: 0, 1 (failed), 2 (bad arguments), 130 (interrupted; the same command continues).
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import tyro
from tyro.conf import OmitArgPrefixes, Positional
from tyro.extras import SubcommandApp

from actstore import console
from actstore.capture.config import CaptureConfig, RepairConfig
from actstore.progress import Progress, scaled
from actstore.tokens.config import TokenizeConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Json = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help="Also write the figures to this file, as JSON.")]
Url = Annotated[Positional[str], tyro.conf.arg(help="The store.")]

app = SubcommandApp()
bench = SubcommandApp()
app.command(bench, name="bench")


def _show(title: str, summary: "DataclassInstance", json: Path | None, **shown: str | None) -> None:
    """Print what a command did, and write it where the user asked for that; `shown` replaces what tables can't hold."""
    console.print_table(title, vars(summary) | shown)
    console.write_json(json, summary)


@app.command
def demo(*, out: Path = Path("demo"), json: Json = None) -> None:
    """Run the whole workflow on the built-in model and text: under 4 minutes on 2 cores.

    Text to token table to store to shuffled batches to an evaluated, exported SAE and an HTML report. Run it again to
    continue what was interrupted.

    Args:
        out: directory for everything that it makes.

    """
    from trainer.demo import run_demo

    figures = run_demo(out)
    console.write_json(json, figures)


@app.command
def tokenize(config: OmitArgPrefixes[TokenizeConfig], *, json: Json = None) -> None:
    """Turn documents into a token table: packed sequences in keyed random order."""
    from actstore.tokens import tokenize as run

    with Progress() as progress:
        figures = run(config, progress).summary()
    console.print_table(f"token table {config.out}", figures)
    console.write_json(json, figures)


@app.command
def capture(config: OmitArgPrefixes[CaptureConfig], *, json: Json = None) -> None:
    """Run a model over a token table and store its activations. Run it again to continue."""
    from actstore.capture.run import capture as run

    with Progress() as progress:
        summary = run(config, progress)
    _show(f"store {config.out}", summary, json)


@app.command
def repair(url: Url, config: OmitArgPrefixes[RepairConfig], *, json: Json = None) -> None:
    """Capture again what verify --deep finds damaged, and nothing else. Run it again to continue."""
    from actstore.capture.repair import repair as run

    with Progress() as progress:
        summary = run(url, config, progress)
    _show(f"store {url}", summary, json)


@app.command(name="import")
def import_(
    sources: Positional[tuple[str, ...]],
    *,
    out: str,
    site: str,
    format: Literal["auto", "numpy", "safetensors", "saelens", "activault"] = "auto",  # noqa: A002  the option's name
    tensor: str | None = None,
    encoding: str = "bf16",
    bucket_rows: int = 1 << 18,
    shard_rows: int = 1 << 14,
    chunk_rows: int = 1 << 11,
    threads: int | None = None,
    json: Json = None,
) -> None:
    """Make a store of activations that other tools wrote. Run it again to continue.

    Args:
        sources: files (.npy, .npz, .safetensors, SAELens' .arrow, activault's .pt) and directories of them.
        out: where the store goes: a directory or an fsspec URL.
        site: what the rows are, such as resid_post.12.
        format: what the files are; auto: by their names.
        tensor: the tensor, npz member or data set column, if a file has several.
        encoding: bf16, f32 or fixed:EPS, such as fixed:1e-3.
        bucket_rows: rows of a bucket: shuffle scope and unit of commit; two of them are held in memory.
        shard_rows: rows of a shard: one object on storage.
        chunk_rows: rows of a chunk: the unit of reading.
        threads: encoding threads; default one a core.

    """
    from actstore.exchange.importer import import_activations

    with Progress() as progress:
        summary = import_activations(
            sources,
            out=out,
            site=site,
            format=format,
            tensor=tensor,
            encoding=encoding,
            bucket_rows=bucket_rows,
            shard_rows=shard_rows,
            chunk_rows=chunk_rows,
            threads=threads,
            progress=progress,
        )
    _show(f"store {out}", summary, json)


_ALWAYS = ("d", "encoding", "bytes_stored", "ratio", "rms_norm", "max_abs")


@app.command
def info(url: Url, *, json: Json = None) -> None:
    """Say what a store holds."""
    from actstore.store import open_store
    from actstore.store.maintain.info import describe

    figures = describe(open_store(url))
    sites, provenance = figures["sites"], figures["provenance"]
    shown = {k: v for k, v in figures.items() if k not in ("sites", "provenance", "open_ended", "remarks")}
    if figures["open_ended"]:
        shown |= {"planned_rows": "open-ended", "planned_buckets": "open-ended"}
    elif not figures["complete"]:
        shown["complete"] = f"{figures['buckets'] / figures['planned_buckets']:.1%}"
    console.print_table(f"store {url}", shown)
    titles = {"d": "d", "encoding": "encoding", "bytes_stored": "bytes", "ratio": "ratio", "rms_norm": "rms\nnorm"}
    titles |= {"max_abs": "max\n|x|", "saturated": "satu-\nrated", "nonfinite": "NaN\nor inf"}
    titles = {k: v for k, v in titles.items() if k in _ALWAYS or any(site[k] for site in sites.values())}
    lines = [(n, *(scaled(s[k]) if k == "bytes_stored" else s[k] for k in titles)) for n, s in sites.items()]
    console.print_table("sites", lines, header=("site", *titles.values()))
    for line in figures["remarks"]:
        print(line)
    console.print_table("provenance", {k: str(v) for k, v in sorted(provenance.items())})
    console.write_json(json, figures)


@app.command
def cp(
    src: Positional[str],
    dst: Positional[str],
    *,
    encoding: str | None = None,
    codec: Literal["planes", "blosc", "none"] | None = None,
    move: bool = False,
    json: Json = None,
) -> None:
    """Copy a store to another place, checking every chunk on the way. Run it again to continue.

    Args:
        src: the store.
        dst: where the copy goes: a directory or an fsspec URL.
        encoding: store the values anew as bf16, f32 or fixed:EPS; default: as they are.
        codec: compress the chunks anew; default: as they are.
        move: delete the source when the whole copy has been read back.

    """
    from actstore.store.maintain.copy import copy

    with Progress() as progress:
        summary = copy(src, dst, encoding=encoding, codec=codec, move=move, progress=progress)
    _show(f"store {dst}", summary, json, left=", ".join(summary.left) or None)
    if summary.buckets != summary.planned_buckets:
        print("the source is unfinished; run the same command again when more of it is committed")


@app.command
def export(
    url: Url,
    *,
    out: Path,
    sites: str | None = None,
    rows: str | None = None,
    sample: int | None = None,
    seed: int = 0,
    format: Literal["safetensors", "npy", "parquet"] | None = None,  # noqa: A002  the option's name
    json: Json = None,
) -> None:
    """Write rows of a store, in row order and with their provenance, to a file that other tools read.

    Args:
        out: the file; with --format npy a directory.
        sites: names, separated by commas; default all.
        rows: first row and the row after the last, such as 0:4096; default all.
        sample: instead of rows: so many rows, drawn uniformly without replacement.
        seed: which sample.
        format: default: by the suffix of out. bf16 is exact float32 in npy and parquet, which have no bfloat16.

    """
    from actstore.exchange.exporter import export as run
    from actstore.exchange.exporter import parse_rows

    with Progress() as progress:
        summary = run(
            url,
            out,
            sites=[s.strip() for s in sites.split(",")] if sites is not None else None,
            rows=parse_rows(rows) if rows is not None else None,
            sample=sample,
            seed=seed,
            format=format,
            progress=progress,
        )
    _show(str(out), summary, json, sites=", ".join(summary.sites))


@app.command
def gc(url: Url, *, older_than: float = 24.0, delete: bool = False, json: Json = None) -> None:
    """List what dead attempts left in a store; with --delete, free it.

    Leftover shards of a bucket that may yet be written are replaced by empty ones, all else is deleted.

    Args:
        older_than: hours for which nobody may have been at it.
        delete: free what is listed.

    """
    from actstore.store.maintain.gc import collect

    found = collect(url, older_than=older_than, delete=delete)
    for g in found.garbage:
        print(f"{g.size:>14,}  {console.figure(g.key)}  ({g.why})")
    for reason in found.kept:
        print(f"left alone: {reason}")
    for key, size in found.unknown.items():
        print(f"unknown, left alone: {console.figure(key)} ({size:,} bytes)")
    hint = "freed" if delete else "to free; do it with --delete"
    print(f"{len(found.garbage):,} objects, {found.bytes:,} bytes {hint}" if found.garbage else "nothing to free")
    console.write_json(json, asdict(found) | {"bytes": found.bytes})


@app.command
def verify(url: Url, *, deep: bool = False, json: Json = None) -> None:
    """Check every committed object; one line for each damaged one. Exit code 1 if one is, or the store is unfinished.

    Args:
        deep: also read, checksum and decode everything.

    """
    from actstore.store import open_storage
    from actstore.store.maintain.verify import verify as check

    with Progress() as progress:
        step = progress.step("verify", total=1, unit="rows")
        found = check(open_storage(url), deep=deep, begin=step.expect, advance=step.advance)
    for d in found.damage:
        print(f"{d.key}: {d.problem}")
    for line in found.remarks:
        print(f"note: {line}")
    planned = "an open-ended number of" if found.planned_buckets is None else f"{found.planned_buckets}"
    console.write_json(json, {**vars(found), "complete": found.complete, "damage": [vars(d) for d in found.damage]})
    if not (found.complete or found.damage):
        print(f"the store is unfinished: {found.buckets} of {planned} buckets are committed")
    if found.damage or not found.complete:
        sys.exit(1)
    print(f"{found.buckets} committed buckets are intact{'' if deep else ' (sizes only; --deep reads them)'}")


@bench.command
def write(
    url: Positional[str | None] = None,
    *,
    like: str | None = None,
    d: int = 2304,
    gb: float = 2.4,
    threads: int | None = None,
    rounds: int = 5,
    json: Json = None,
) -> None:
    """Write activations; compare with bare encoding and bare puts in the same run.

    Args:
        url: below which to write, and to delete again; default: a temporary directory.
        like: a store with a bf16 site whose rows are written; default: synthetic ones with the entropy of activations.
        d: width of synthetic rows.
        gb: GB of rows that are written in each round.
        threads: encoding threads; default one a core.
        rounds: how often everything is measured, in turns.

    """
    from actstore.bench import bench_write, show

    show(bench_write(url, like=like, d=d, gb=gb, threads=threads, rounds=rounds), json)


@bench.command
def read(
    url: Url,
    *,
    site: str | None = None,
    batch_size: int = 4096,
    seconds: float = 5.0,
    threads: int | None = None,
    inflight: int | None = None,
    rounds: int = 5,
    json: Json = None,
) -> None:
    """Read a store as a trainer does; compare with memory copy, bare fetch, decode and gather in the same run.

    Args:
        site: the site to read; default the first.
        batch_size: rows a batch.
        seconds: how long each loader runs, over all rounds.
        threads: decoding threads; default one a core.
        inflight: requests at once; default as many as threads for a directory, 16 for an object store.
        rounds: how often everything is measured, in turns.

    """
    from actstore.bench import bench_read, show

    report = bench_read(
        url, site=site, batch_size=batch_size, seconds=seconds, threads=threads, inflight=inflight, rounds=rounds
    )
    show(report, json)


@bench.command
def storage(
    url: Positional[str],
    *,
    sizes: tuple[float, ...] = (0.25, 1.0, 4.0, 8.0, 16.0, 32.0),
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64),
    seconds: float = 1.0,
    gb: float = 1.0,
    json: Json = None,
) -> None:
    """PUT and GET objects of several sizes with several requests at once, to find the knee of a backend.

    Args:
        url: below which to write, and to delete again: a directory or an fsspec URL.
        sizes: MiB an object.
        concurrency: requests at once.
        seconds: how long each combination is measured, over three rounds.
        gb: GB after which a combination ends sooner.

    """
    from actstore.bench import bench_storage, show

    show(bench_storage(url, sizes=sizes, concurrency=concurrency, seconds=seconds, gb=gb), json)


def main() -> NoReturn:
    """Run one command and exit with its code."""
    description = "The open activation store: cache activations, stream them shuffled, benchmark both."
    console.leave(console.run(lambda: app.cli(prog="actstore", description=description)))
