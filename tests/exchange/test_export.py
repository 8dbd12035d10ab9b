"""Exports, read back with the formats' own libraries and compared with what was written, row by row."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from commands import run_actstore
from conftest import SPEC, Known, write_known, write_rows

from actstore.errors import StoreError
from actstore.exchange.exporter import FORMATS, Format, export, parse_rows
from actstore.store import SiteSpec, StoreSpec, create_store, open_store
from actstore.store.format import fixed
from actstore.store.read.store import Store

Columns = dict[str, np.ndarray]


def load(out: Path, chosen: Format) -> Columns:
    """The columns of an export; bf16 widened to float32, which is exact."""
    if chosen == "safetensors":
        found = safetensors.numpy.load_file(out)
        return {k: v.astype(np.float32) if v.dtype == ml_dtypes.bfloat16 else v for k, v in found.items()}
    if chosen == "npy":
        return {p.stem: np.load(p) for p in out.glob("*.npy")}
    table = pq.read_table(out)
    return {k: np.stack(table[k].to_numpy()) if k in ("resid_post.3", "mlp_out.3") else table[k].to_numpy()
            for k in table.column_names}  # fmt: skip


def expected(known: Known, rows: np.ndarray) -> Columns:
    """What `write_known` wrote in these rows."""
    wide = known.sites["resid_post.3"][rows].astype(np.uint32) << 16
    return {
        "row": rows.astype(np.int64),
        "sequence": rows.astype(np.int32),
        "position": (rows % 7).astype(np.int32),
        "token_id": np.zeros(len(rows), np.int32),
        "resid_post.3": wide.view(np.float32),
        "mlp_out.3": known.sites["mlp_out.3"][rows],
    }


def assert_same(found: Columns, wanted: Columns) -> None:
    """The same columns, types and bits, but for the payload of NaNs."""
    assert found.keys() == wanted.keys()
    for name, column in wanted.items():
        assert found[name].dtype == column.dtype, name
        assert np.array_equal(found[name], column, equal_nan=column.dtype.kind == "f"), name


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """Like `known`, for tests that only read."""
    return write_known(tmp_path_factory.mktemp("stored") / "s")


@pytest.mark.parametrize("chosen", FORMATS)
@pytest.mark.parametrize("codec", ["planes", "blosc", "none"])
def test_every_row_comes_back(tmp_path: Path, chosen: Format, codec: Any) -> None:
    known = write_known(tmp_path / "s", replace(SPEC, codec=codec))
    out = tmp_path / f"new/out.{chosen}"
    summary = export(known.url, out)
    assert_same(load(out, chosen), expected(known, np.arange(1000)))
    assert (summary.rows, summary.sites, summary.format) == (1000, ["mlp_out.3", "resid_post.3"], chosen)
    files = list(out.iterdir()) if out.is_dir() else [out]
    assert summary.bytes == sum(f.stat().st_size for f in files)
    assert summary.fingerprint == open_store(known.url).fingerprint


def test_bits_of_bf16_are_kept_in_safetensors(stored: Known, tmp_path: Path) -> None:
    """Every bit pattern, NaN too, through both of the format's readers."""
    export(stored.url, tmp_path / "o.safetensors")
    bits = stored.sites["resid_post.3"]
    there = safetensors.torch.load_file(tmp_path / "o.safetensors")["resid_post.3"]
    assert there.dtype == torch.bfloat16
    assert np.array_equal(there.view(torch.int16).numpy().view(np.uint16), bits)
    there = safetensors.numpy.load_file(tmp_path / "o.safetensors")
    assert np.array_equal(there["resid_post.3"].view(np.uint16), bits)
    assert np.array_equal(there["mlp_out.3"].view(np.uint32), stored.sites["mlp_out.3"].view(np.uint32))


@pytest.mark.parametrize("chosen", FORMATS)
@pytest.mark.parametrize(
    "rows",
    [(0, 1), (17, 19), (15, 17), (250, 260), (255, 257), (100, 900), (768, 1000), (999, 1000), (256, 512)],
    ids=lambda r: f"{r[0]}-{r[1]}",
)
def test_ranges(stored: Known, tmp_path: Path, chosen: Format, rows: tuple[int, int]) -> None:
    summary = export(stored.url, tmp_path / "o", rows=rows, format=chosen)
    assert summary.rows == rows[1] - rows[0]
    assert_same(load(tmp_path / "o", chosen), expected(stored, np.arange(*rows)))


@pytest.mark.parametrize("chosen", FORMATS)
def test_samples(stored: Known, tmp_path: Path, chosen: Format) -> None:
    drawn: list[np.ndarray] = []
    for i, (count, seed) in enumerate([(300, 1), (300, 1), (300, 2), (1000, 3)]):
        export(stored.url, tmp_path / str(i), sample=count, seed=seed, format=chosen)
        found = load(tmp_path / str(i), chosen)
        assert np.array_equal(found["row"], np.unique(found["row"]))
        assert len(found["row"]) == count
        assert_same(found, expected(stored, found["row"]))
        drawn.append(found["row"])
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert np.array_equal(drawn[3], np.arange(1000))


def test_samples_are_uniform(stored: Known, tmp_path: Path) -> None:
    hits = np.zeros(1000)
    for seed in range(20):
        export(stored.url, tmp_path / str(seed), sample=250, seed=seed, sites=["mlp_out.3"], format="npy")
        hits[np.load(tmp_path / str(seed) / "row.npy")] += 1
    assert abs(hits.mean() - 5) < 1e-9
    by_bucket = hits.reshape(4, 250).mean(1)
    assert np.all(abs(by_bucket - 5) < 6 * np.sqrt(3.75 / 250))
    assert 2.8 < hits.var() < 4.7  # 3.75 by the binomial


@pytest.mark.parametrize("chosen", FORMATS)
def test_fixed_sites_are_dequantised(tmp_path: Path, chosen: Format) -> None:
    spec = replace(SPEC, sites={"resid_post.3": SiteSpec(d=24, encoding="fixed:1e-3")}, rows=300)
    x = (np.random.default_rng(0).normal(size=(300, 24)) * 5 + 2).astype(np.float32)
    writer = create_store(tmp_path / "s", spec)
    for b in range(spec.buckets):
        first, stop = spec.bucket_range(b)
        row = np.arange(first, stop, dtype=np.int32)[np.argsort(spec.permutation(b))]
        assert write_rows(writer, b, {"resid_post.3": x[row]}, sequence=row, position=row, token_id=row)
    export(tmp_path / "s", tmp_path / "o", format=chosen)
    found = load(tmp_path / "o", chosen)
    store = open_store(tmp_path / "s")
    stored: Any = {name: store[name][:] for name in ("sequence", "resid_post.3")}
    exact = np.empty_like(x)
    exact[stored["sequence"]] = fixed.dequantise(stored["resid_post.3"], store.calibration("resid_post.3"))
    assert np.array_equal(found["resid_post.3"], exact)
    fvu = ((exact - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert 0.5e-3 < fvu < 2e-3
    assert np.array_equal(found["token_id"], found["row"])


@pytest.mark.parametrize("chosen", FORMATS)
def test_the_output_says_where_it_is_from(tmp_path: Path, chosen: Format) -> None:
    said = {"model": "m/x", "nested": {"n": [1, None, "\u00e9"]}}
    known = write_known(tmp_path / "s", replace(SPEC, provenance=said))
    out = tmp_path / "o"
    export(known.url, out, sites=["mlp_out.3"], rows=(3, 9), format=chosen)
    if chosen == "safetensors":
        with safetensors.safe_open(out, "np") as f:
            about = f.metadata()
    elif chosen == "npy":
        about = json.loads((out / "about.json").read_text())
    else:
        about = {k.decode(): v.decode() for k, v in pq.read_schema(out).metadata.items()}
    assert about["actstore_fingerprint"] == open_store(known.url).fingerprint
    assert json.loads(about["actstore_encoding"]) == {"mlp_out.3": "f32"}
    assert json.loads(about["actstore_provenance"]) == said
    assert set(load(out, chosen)) == {"row", "sequence", "position", "token_id", "mlp_out.3"}


def test_parquet_types(stored: Known, tmp_path: Path) -> None:
    export(stored.url, tmp_path / "o.parquet")
    schema = pq.read_schema(tmp_path / "o.parquet")
    assert str(schema.field("resid_post.3").type).startswith("fixed_size_list<")
    assert schema.field("resid_post.3").type.list_size == 24
    assert not any(field.nullable for field in schema)


def test_an_unfinished_store_gives_what_is_committed(tmp_path: Path) -> None:
    known = write_known(tmp_path / "s", buckets=[0, 1, 3])
    export(known.url, tmp_path / "o.safetensors", rows=(100, 512))
    assert_same(load(tmp_path / "o.safetensors", "safetensors"), expected(known, np.arange(100, 512)))
    export(known.url, tmp_path / "last.npy", rows=(900, 1000), format="npy")
    assert_same(load(tmp_path / "last.npy", "npy"), expected(known, np.arange(900, 1000)))
    export(known.url, tmp_path / "sample.npy", sample=744)
    drawn = np.load(tmp_path / "sample.npy" / "row.npy")
    assert np.array_equal(drawn, np.r_[0:512, 768:1000])
    for rows in (None, (500, 513), (767, 800)):
        with pytest.raises(StoreError, match=r"bucket 2 \(rows from 512\) is not committed yet"):
            export(known.url, tmp_path / "no.npy", rows=rows)
    with pytest.raises(ValueError, match="sample is 745, expected 1 to 744"):
        export(known.url, tmp_path / "no.npy", sample=745)
    assert not (tmp_path / "no.npy").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rows": (5, 5)}, "expected a range within 0:1000"),
        ({"rows": (-1, 5)}, "expected a range within 0:1000"),
        ({"rows": (0, 1001)}, "expected a range within 0:1000"),
        ({"sample": 0}, "expected 1 to 1000"),
        ({"sample": 1001}, "expected 1 to 1000"),
        ({"sample": 5, "rows": (0, 5)}, "exclude each other"),
        ({"sites": []}, "expected one or more"),
        ({"sites": ["nope"]}, "has no site 'nope'"),
        ({"sites": ["token_id"]}, "has no site 'token_id'"),
        ({"format": None}, "does not say the format"),
    ],
    ids=str,
)
def test_bad_arguments(stored: Known, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    given: Any = {"format": "npy", **options}
    with pytest.raises(ValueError, match=words):
        export(stored.url, tmp_path / "o", **given)
    assert not list(tmp_path.glob("o*"))


@pytest.mark.parametrize("text", ["", "7", ":", "5:", ":5", "1-3", "a:b", "-1:3", "1:2:3", "\u0661:\u0662", "1.0:2"])
def test_bad_ranges(text: str) -> None:
    with pytest.raises(ValueError, match="expected START:STOP"):
        parse_rows(text)
    assert parse_rows("3:10") == (3, 10)


@pytest.mark.parametrize("chosen", FORMATS)
@pytest.mark.parametrize("there", [Path.mkdir, Path.touch], ids=["directory", "file"])
def test_an_existing_output_is_refused(
    stored: Known, tmp_path: Path, chosen: Format, there: Callable[[Path], None]
) -> None:
    there(tmp_path / "o")
    with pytest.raises(StoreError, match="exists already"):
        export(stored.url, tmp_path / "o", format=chosen)
    assert sorted(p.name for p in tmp_path.glob("o*")) == ["o"]
    assert list((tmp_path / "o").iterdir()) == [] if (tmp_path / "o").is_dir() else (tmp_path / "o").stat().st_size == 0


@pytest.mark.parametrize("chosen", FORMATS)
def test_an_interrupted_export_can_be_repeated(
    stored: Known, tmp_path: Path, chosen: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Store.read_chunk, []

    def failing(self: Store, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 100:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Store, "read_chunk", failing)
    with pytest.raises(KeyboardInterrupt):
        export(stored.url, tmp_path / "o", format=chosen)
    assert not (tmp_path / "o").exists()
    monkeypatch.undo()
    export(stored.url, tmp_path / "o", rows=(3, 700), format=chosen)  # less than the interrupted one would have been
    assert_same(load(tmp_path / "o", chosen), expected(stored, np.arange(3, 700)))
    assert [p.name for p in tmp_path.glob("o*")] == ["o"]


@pytest.mark.parametrize("chosen", FORMATS)
def test_a_damaged_chunk_ends_in_one_line_and_no_output(known: Known, tmp_path: Path, chosen: Format) -> None:
    victim = Path(known.url) / "resid_post.3" / "c" / "6" / "0"
    data = bytearray(victim.read_bytes())
    data[3] ^= 1
    victim.write_bytes(data)
    done = run_actstore("export", known.url, "--out", str(tmp_path / "o"), "--format", chosen, code=1)
    assert "resid_post.3/c/6/0" in done.stderr
    assert not (tmp_path / "o").exists()


def test_exports_from_every_backend(backend_url: str, tmp_path: Path) -> None:
    known = write_known(backend_url)
    for i, chosen in enumerate(FORMATS):
        export(backend_url, tmp_path / str(i), rows=(200, 900), format=chosen)
        assert_same(load(tmp_path / str(i), chosen), expected(known, np.arange(200, 900)))


@pytest.mark.parametrize("chosen", FORMATS)
def test_what_a_killed_export_left_is_replaced(stored: Known, tmp_path: Path, chosen: Format) -> None:
    """Of whatever format it was; but nothing of the user's is deleted."""
    for i, there in enumerate(FORMATS):
        out = tmp_path / f"o{i}"
        export(stored.url, out, rows=(0, 900), format=there)
        out.rename(f"{out}.partial")
        export(stored.url, out, rows=(3, 70), format=chosen)
        assert_same(load(out, chosen), expected(stored, np.arange(3, 70)))
        assert not Path(f"{out}.partial").exists()
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "row.npy").touch()
    (tmp_path / "mine.partial" / "thesis.txt").touch()
    with pytest.raises(StoreError, match=r"holds thesis\.txt, which is not of this store"):
        export(stored.url, tmp_path / "mine", format=chosen)
    assert len(list((tmp_path / "mine.partial").iterdir())) == 2
    (tmp_path / "link.partial").symlink_to(tmp_path / "o0.partial")
    export(stored.url, tmp_path / "link", rows=(0, 9), format=chosen)
    assert not (tmp_path / "link.partial").is_symlink()


@pytest.mark.parametrize("chosen", FORMATS)
@pytest.mark.parametrize("limited", [False, True], ids=["disk", "file-size"])
def test_a_full_disk_is_one_line(stored: Known, tmp_path: Path, chosen: Format, limited: bool) -> None:
    """A file system of 64 KiB where the system allows that, and a limit on the size of files."""
    mount = tmp_path / "disk"
    mount.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(mount)]
    if not limited and subprocess.run(mounted, check=False, capture_output=True).returncode:
        pytest.skip("not allowed to mount")
    args = ("export", stored.url, "--out", str(mount / "o"), "--format", chosen)
    try:
        done = run_actstore(*args, code=1, file_bytes=50_000 if limited else None)
        left = list(mount.iterdir())
    finally:
        subprocess.run(["umount", mount], check=False, capture_output=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert ("File too large" if limited else "no space left on the device") in last
    assert left == []


def test_the_command(stored: Known, tmp_path: Path) -> None:
    out, figures = tmp_path / "o.parquet", tmp_path / "e.json"
    which = ("--sites", "mlp_out.3, resid_post.3", "--rows", "5:700")
    done = run_actstore("export", stored.url, "--out", str(out), *which, "--json", str(figures))
    assert_same(load(out, "parquet"), expected(stored, np.arange(5, 700)))
    said = json.loads(figures.read_text())
    assert (said["rows"], said["format"], said["bytes"]) == (695, "parquet", out.stat().st_size)
    assert "695" in done.stdout
    drawn = [tmp_path / "a.npy", tmp_path / "b.npy"]
    for path in drawn:
        run_actstore("export", stored.url, "--out", str(path), "--sample", "50", "--seed", "3")
    assert np.array_equal(*(np.load(path / "row.npy") for path in drawn))
    for more, code, words in (
        (["--out", str(out)], 1, "exists already"),
        (["--out", f"{stored.url}/mlp_out.3/x.npy"], 2, "lies in the store; choose another --out"),
        (["--out", str(tmp_path / "o.txt")], 2, "does not say the format"),
        (["--out", str(tmp_path / "x.npy"), "--rows", "5"], 2, "expected START:STOP"),
        (["--out", str(tmp_path / "x.npy"), "--sites", "nope"], 2, "it has mlp_out.3, resid_post.3"),
    ):
        assert words in run_actstore("export", stored.url, *more, code=code).stderr


def test_a_store_without_rows_has_no_sample(tmp_path: Path) -> None:
    create_store(tmp_path / "s", SPEC)
    for options in ({"sample": 1}, {"rows": (0, 1)}, {}):
        with pytest.raises(StoreError, match="committed yet"):
            export(tmp_path / "s", tmp_path / "o.npy", **options)


_MEASURE = """
import sys, threading
from pathlib import Path
from actstore.exchange.exporter import export

used, done = [], threading.Event()

def look():
    status = Path("/proc/self/status").read_text()
    used.append([int(status.partition(f"{name}:")[2].split()[0]) for name in ("VmRSS", "RssAnon")])

def watch():
    while not done.wait(0.005):
        look()

look()
thread = threading.Thread(target=watch)
thread.start()
export(sys.argv[1], Path(sys.argv[2]), rows=(int(sys.argv[3]), int(sys.argv[4])), format=sys.argv[5])
look()
done.set()
thread.join()
print(*(max(column) - column[0] for column in zip(*used)))
"""
"""Prints by how many KiB an export raised all memory, and memory that no file backs. A child's ru_maxrss starts at its
parent's, so this looks every few milliseconds instead."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """131,072 zero rows of 2 KiB: 268 MB decoded, little on the disk."""
    url = tmp_path_factory.mktemp("large") / "s"
    spec = StoreSpec(
        sites={"x": SiteSpec(d=1024)}, rows=1 << 17, bucket_rows=1 << 14, shard_rows=1 << 13, chunk_rows=256
    )
    writer, none = create_store(url, spec), np.zeros(1 << 14, np.int32)
    rows = np.zeros((1 << 14, 1024), np.uint16)
    for b in range(spec.buckets):
        assert write_rows(writer, b, {"x": rows}, sequence=none, position=none, token_id=none)
    writer.finalise()
    return str(url)


def peaks(large: str, out: Path, rows: tuple[int, int], chosen: Format) -> tuple[float, float]:
    """MB that `_MEASURE` prints as KiB."""
    args = [sys.executable, "-c", _MEASURE, large, str(out), *map(str, rows), chosen]
    done = subprocess.run(args, capture_output=True, text=True, check=True, timeout=120)
    every, anonymous = (int(n) * 1024 / 1e6 for n in done.stdout.split())
    print(f"{chosen}, rows {rows}: {every:.0f} MB, {anonymous:.0f} MB of them in no file")
    return every, anonymous


@pytest.mark.parametrize("chosen", FORMATS)
def test_a_small_export_of_a_large_store_needs_little(large: str, tmp_path: Path, chosen: Format) -> None:
    """Less than the store by far; libraries that are loaded on the way are in it (50 MB of parquet's)."""
    assert peaks(large, tmp_path / "o", (100, 1000), chosen)[0] < 180


@pytest.mark.parametrize("chosen", FORMATS)
def test_a_large_export_is_written_out_not_held(large: str, tmp_path: Path, chosen: Format) -> None:
    """All of 268 MB (537 as float32): the pages of one bucket of 34 (67) MB, a few chunks, parquet's row groups."""
    every, anonymous = peaks(large, tmp_path / "o", (0, 1 << 17), chosen)
    assert every < (300 if chosen == "parquet" else 200)
    assert anonymous < (180 if chosen == "parquet" else 60)
