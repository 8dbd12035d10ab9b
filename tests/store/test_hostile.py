"""Stores made by an enemy: sealed metadata that lies, payloads with the right checksum, objects that are no files.

Whatever a store says, opening, reading, checking and streaming it end in success or in an `ActstoreError` of one short
line: no crash, no hang, no gigabytes, nothing outside the store.
"""

import base64
import contextlib
import copy
import io
import json
import os
import re
import resource
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from commands import run_in_fork
from conftest import fill, random_sites
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import actstore
from actstore.errors import ActstoreError, IntegrityError, StoreError
from actstore.store import SiteSpec, StoreSpec, create_store, open_storage, open_store
from actstore.store.format import codec
from actstore.store.format.manifest import HEAD_KEY, part_key, table_key
from actstore.store.format.record import commit_key
from actstore.store.format.sealed import SEAL, UNSEALED, decode, seal
from actstore.store.format.shard import tail
from actstore.store.format.spec import ATTRIBUTE, GROUP_KEY, OPEN_ENDED, calibration_key
from actstore.store.maintain.verify import verify
from actstore.stream import Settings

SPEC = StoreSpec(
    sites={
        "resid_post.3": SiteSpec(d=6),
        "mlp_out.3": SiteSpec(d=3, encoding="f32"),
        "attn_out.3": SiteSpec(d=4, encoding="fixed:1e-3"),
    },
    rows=40,
    bucket_rows=32,
    shard_rows=16,
    chunk_rows=8,
)
NO_MANIFEST = {HEAD_KEY: None, part_key(SPEC, 0): None}
HUGE = [0, -1, 1, 2, 1 << 16, 1 << 31, 1 << 40, 1 << 56, 1 << 63, 1 << 64, 1 << 200, -(1 << 63), -(1 << 200)]
WORDS = ["", "../x", "/etc", "/etc/passwd", "a/b", ".", "..", "a\0b", "x" * 5000, "c", "zarr", "sequence", "commits",
         "fixed:1e-3", "fixed:nan", "fixed:1e-300", "bf16", "f32", "none", "blosc", "0" * 8, "f" * 8, "0x1p+2000",
         "nan", "inf", "AAAA", "\ud800", "é"]  # fmt: skip
JUNK = st.one_of(
    st.none(), st.booleans(), st.sampled_from(HUGE), st.integers(-5, 70), st.floats(), st.sampled_from(WORDS),
    st.text(max_size=5), st.lists(st.integers(-5, 5), max_size=3),
    st.dictionaries(st.sampled_from(WORDS), st.integers(0, 9), max_size=2),
)  # fmt: skip
quick = settings(max_examples=40, deadline=timedelta(seconds=20), suppress_health_check=list(HealthCheck))
many = settings(quick, max_examples=1000)
slow = [pytest.mark.slow, pytest.mark.timeout(1200)]

ONE = Settings(threads=1)


@pytest.fixture(scope="module", params=["planes"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("hostile") / "s", request.param)


def build(root: Path, chain: codec.CodecName) -> Path:
    spec = replace(SPEC, codec=chain)
    sites = random_sites(spec)
    sites["attn_out.3"] = np.random.default_rng(0).normal(size=(spec.rows, 4)).astype(np.float32)
    writer = create_store(root, spec, threads=1)
    for b in range(spec.buckets):
        assert fill(writer, b, sites) is not None
    writer.finalise()
    return root


@contextlib.contextmanager
def instead(root: Path, contents: dict[str, bytes | None]) -> Iterator[None]:
    """The store with other contents of these objects, None for missing; afterwards as it was, and nothing beside it."""
    before = {key: (root / key).read_bytes() if (root / key).exists() else None for key in contents}
    files = {p for p in root.parent.rglob("*") if p.is_file()}

    def put(contents: dict[str, bytes | None]) -> None:
        for key, content in contents.items():
            (root / key).unlink() if content is None else (root / key).write_bytes(content)

    try:
        put(contents)
        yield
        gone = {root / key for key, content in contents.items() if content is None}
        added = {root / key for key, content in before.items() if content is None}
        assert {p for p in root.parent.rglob("*") if p.is_file()} == (files | added) - gone
    finally:
        put(before)


def read(root: Path) -> None:
    store = open_store(root)
    assert store.rows >= 0
    assert store.stored_bytes >= 0
    for name, index in store.index.arrays.items():
        for place in range(len(store.index.buckets)):
            for c in range(np.count_nonzero(index.chunks[place])):
                store.read_chunk(name, place, c)
    for name in store.index.calibration:
        store.calibration(name)
    for name in store.sites if len(store.index.buckets) else ():
        store.stats(name)
    assert len(store.fingerprint) == 32


def through_zarr(root: Path) -> None:
    store = open_store(root)
    for name in store.index.arrays:
        store[name][:]


def stream(root: Path) -> None:
    store = open_store(root)
    try:
        for _ in actstore.ActivationDataset(store, sites=list(store.sites), batch_size=8, with_rows=True, settings=ONE):
            pass
    except ValueError as e:
        assert "committed rows" in str(e)


def check(root: Path) -> None:
    found = verify(open_storage(root), deep=True)
    if found.damage:
        raise StoreError("; ".join(f"{d.key}: {d.problem}"[:1500] for d in found.damage[:3]))


def use(root: Path, *ways: Callable[[Path], None]) -> list[str]:
    """What is wrong with the store, in the words of each way to use it; anything but an `ActstoreError` fails."""
    said: list[str] = []
    for way in ways or (read, check):
        start = time.monotonic()
        try:
            way(root)
        except ActstoreError as e:
            assert len(str(e)) < 6000, str(e)[:300]
            assert str(e).isprintable(), repr(str(e))  # a name may hold what moves the cursor
            said.append(str(e))
        assert time.monotonic() - start < 20
    return said


def sealed(document: Any) -> bytes:
    """JSON as an enemy writes it: NaN and infinity too, with the seal that actstore would give it."""
    return seal(json.dumps(document, indent=1, sort_keys=True).encode())


def unsealed(data: bytes) -> bytes:
    return re.sub(rb'("object_crc32c": ")[0-9a-f]{8}', rb"\g<1>" + UNSEALED.encode(), data, count=1)


def resealed(data: bytes) -> bytes:
    return seal(unsealed(data))


def document(root: Path, key: str) -> Any:
    return json.loads(unsealed((root / key).read_bytes()))


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all values inside a JSON document, but not to its seal."""
    for k, v in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if k != SEAL:
            yield (*at, k)
            yield from places(v, (*at, k))


def lie(draw: st.DrawFn, told: Any) -> Any:
    """The document with one value, anywhere, replaced, missing, or joined by another."""
    told = copy.deepcopy(told)
    *path, last = draw(st.sampled_from(sorted(places(told), key=str)))
    inner = told
    for k in path:
        inner = inner[k]
    act = draw(st.sampled_from(["replace", "replace", "replace", "delete", "add", "rename"]))
    if act == "replace" or isinstance(inner, list):
        inner[last] = draw(JUNK)
    elif act == "add":
        inner[draw(st.sampled_from(WORDS))] = draw(JUNK)
    else:
        value = inner.pop(last)
        if act == "rename":
            inner[draw(st.sampled_from(WORDS))] = value
    return told


def fuzz_json(root: Path, key: str, ways: tuple[Callable[[Path], None], ...], budget: settings) -> None:
    """Lies in one sealed JSON object, with the manifest and without it."""
    told = document(root, key)

    @given(data=st.data(), alone=st.booleans())
    @budget
    def one(data: st.DataObject, alone: bool) -> None:
        content = sealed(lie(data.draw, told))
        with instead(root, {**(NO_MANIFEST if alone else {}), key: content}):
            use(root, *ways)

    one()


@pytest.mark.parametrize("budget", [quick, pytest.param(many, marks=slow)], ids=["some", "many"])
@pytest.mark.parametrize("key", [GROUP_KEY, commit_key(0), commit_key(1)])
def test_sealed_json_that_lies(root: Path, key: str, budget: settings) -> None:
    fuzz_json(root, key, (read, check), budget)


@pytest.mark.parametrize("key", [GROUP_KEY, commit_key(0)])
def test_the_loader_on_sealed_json_that_lies(root: Path, key: str) -> None:
    fuzz_json(root, key, (stream,), settings(quick, max_examples=8))


def put(told: Any, path: str, value: Any) -> Any:
    told = copy.deepcopy(told)
    *outer, last = path.split("/")
    inner = told
    for k in outer:
        inner = inner[int(k) if isinstance(inner, list) else k]
    inner[int(last) if isinstance(inner, list) else last] = value
    return told


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("rows", 1 << 60, "rows is 1152921504606846976"),
        ("rows", 1 << 30, "33554432 buckets, at most"),
        ("rows", 40.0, "actstore.rows"),
        ("rows", True, "actstore.rows"),
        ("seed", 1 << 70, "seed"),
        ("bucket_rows", -32, "bucket_rows"),
        ("bucket_rows", 1 << 31, "chunks"),
        ("shard_rows", 0, "shard_rows"),
        ("chunk_rows", "8", "actstore.chunk_rows"),
        ("chunk_rows", None, "actstore.chunk_rows"),
        ("codec", "lzma", "codec is 'lzma'"),
        ("sites", {}, "at least one site"),
        ("sites", {"../x": {"d": 3, "encoding": "bf16"}}, "site name"),
        ("sites", {"/etc": {"d": 3, "encoding": "bf16"}}, "site name"),
        ("sites", {"a/b": {"d": 3, "encoding": "bf16"}}, "site name"),
        ("sites", {"": {"d": 3, "encoding": "bf16"}}, "site name"),
        ("sites", {"x" * 300: {"d": 3, "encoding": "bf16"}}, "site name"),
        ("sites", {"object_crc32c": {"d": 3, "encoding": "bf16"}}, "site name"),
        ("sites", {f"x.{i}": {"d": 1 << 20, "encoding": "bf16"} for i in range(4096)}, "wide together"),
        ("sites", {"x": {"d": 1 << 40, "encoding": "bf16"}}, "d is"),
        ("sites", {"x": {"d": 3.0, "encoding": "bf16"}}, "Expected `int`"),
        ("sites", {"x": {"d": 3, "encoding": "pickle"}}, "encoding is 'pickle'"),
        ("sites", {"x": {"d": 3, "encoding": "bf16", "more": 1}}, "unknown field `more`"),
        ("provenance", [], "provenance"),
        ("provenance", {"x": float("nan")}, "JSON is malformed"),
        ("provenance", {"x": float("inf")}, "JSON is malformed"),
        ("provenance", {"x": json.loads("[" * 70 + "]" * 70)}, "more than 64"),
        ("provenance", {"x": json.loads("[" * 900 + "]" * 900)}, "more than 64"),
        ("format_version", 2, "format version is 2"),
        ("more", 1, "unknown field `more`"),
        ("\x1b[2J\n\u202e", 1, "unknown field"),
        ("short_buckets", [[0, 31], [0, 30]], "short_buckets"),
        ("short_buckets", [[1, 3]], "short_buckets"),
        ("short_buckets", [[-1, 3]], "short_buckets"),
    ],
)
def test_groups_that_lie_are_refused_by_field(root: Path, path: str, value: Any, words: str) -> None:
    lying = put(document(root, GROUP_KEY), f"attributes/{ATTRIBUTE}/{path}", value)
    with instead(root, {GROUP_KEY: sealed(lying), **NO_MANIFEST}):
        said = use(root)
        assert len(said) == 2
        assert all(words in s and GROUP_KEY in s for s in said), said


def test_what_repeats_or_lacks_a_field_is_one_store_or_refused(root: Path) -> None:
    """JSON may name a field twice, which readers take differently; actstore takes the last."""
    group = unsealed((root / GROUP_KEY).read_bytes())
    twice = seal(group.replace(b'"rows": 40', b'"rows": 7, "rows": 40'))
    with instead(root, {GROUP_KEY: twice}):
        assert use(root) == []
    other = seal(group.replace(b'"rows": 40', b'"rows": 40, "rows": 7'))
    with instead(root, {GROUP_KEY: other, **NO_MANIFEST}):
        assert "rows is 32, expected 7" in use(root)[0]
    for field in (b' "format_version": 1,\n', b' "attempt": ', b' "versions": {}\n'):
        told = unsealed((root / commit_key(0)).read_bytes())
        assert field in told
        lacking = seal(told.replace(field, b' "x": ' if field.endswith(b": ") else b"").replace(b"},\n}", b"}\n}"))
        with instead(root, {commit_key(0): lacking, **NO_MANIFEST}):
            assert commit_key(0) in use(root)[0]


def test_the_head_of_an_open_ended_store_is_refused(root: Path) -> None:
    told = document(root, HEAD_KEY)
    told["spec"] |= {"rows": OPEN_ENDED, "bucket_rows": 1 << 12, "shard_rows": 1 << 12, "chunk_rows": 1 << 12}
    with instead(root, {HEAD_KEY: sealed(told)}):
        assert "open-ended" in use(root)[0]


@pytest.mark.parametrize(
    "value", [float("nan"), "\ud800", {"\ud800": 1}, {1, 2}, b"x", json.loads("[" * 70 + "]" * 70), "x" * (1 << 27)],
    ids=["nan", "surrogate", "surrogate name", "set", "bytes", "deep", "long"],
)  # fmt: skip
def test_provenance_that_no_reader_would_take_is_not_written(value: object) -> None:
    with pytest.raises(ValueError, match="provenance"):
        replace(SPEC, provenance={"x": value})


def test_provenance_is_held_as_it_is_read(tmp_path: Path) -> None:
    given = {"x": (1, 2), 3: -0.0, "big": 1 << 200, "object_crc32c": UNSEALED, "é\u2028\0": [None, True, 1e-320]}
    spec = replace(SPEC, provenance=given)
    create_store(tmp_path / "s", spec)
    create_store(tmp_path / "s", spec)
    assert open_store(tmp_path / "s").spec == spec
    assert spec.provenance["x"] == [1, 2]


BIG = base64.b64encode(np.full(6, 1.7e308).tobytes()).decode()
NANS = base64.b64encode(np.full(6, np.nan).tobytes()).decode()


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("arrays", {"../x": {"stored": [], "crc32c": ""}}, "arrays is"),
        ("rows", 31, "rows is 31"),
        ("bucket", 1, "bucket is 1"),
        ("bucket", True, "$.bucket"),
        ("attempt", "", "attempt is"),
        ("attempt", "x" * 65, "attempt is"),
        ("attempt", "\ud800", "hex escape"),
        ("attempt", "a\n", "attempt is"),
        ("format_version", 0, "format_version is 0"),
        ("state", "done", "state"),
        ("state", "writing", "unknown field"),
        ("arrays/resid_post.3/stored/0", 0, "stored"),
        ("arrays/resid_post.3/stored/0", -1, "stored"),
        ("arrays/resid_post.3/stored/0", 1 << 40, "stored"),
        ("arrays/resid_post.3/stored/0", 100.0, "stored"),
        ("arrays/resid_post.3/stored", [50], "stored"),
        ("arrays/resid_post.3", [], "Expected `object`"),
        ("arrays/resid_post.3/crc32c", "0" * 8, "crc32c"),
        ("arrays/resid_post.3/crc32c", "0" * 31 + "g", "crc32c"),
        ("calibration/attn_out.3", 7, "calibration"),
        ("stats/resid_post.3/rows", 31, "statistics are of 31 rows"),
        ("stats/resid_post.3/sum", BIG[:-12], "stats[...].sum`"),
        ("stats/resid_post.3/max_abs", "0x1p+5000", "stats[...].max_abs`"),
        ("stats/resid_post.3/saturated", -1, "saturated"),
        ("stats/resid_post.3/sum", BIG, "stats[...].sum`"),
        ("stats/resid_post.3/sum_sq", BIG, "stats[...].sum_sq`"),
        ("stats/resid_post.3/sum", NANS, "stats[...].sum`"),
        ("stats/resid_post.3/max_abs", "nan", "stats[...].max_abs`"),
        ("stats/resid_post.3/saturated", 1 << 300, "saturated"),
        ("stats/resid_post.3/nonfinite", 99, "statistics"),
        ("stats/resid_post.3/nonfinite_rows", [99], "nonfinite_rows"),
        ("stats/resid_post.3/saturated", 5, None),
    ],
)
def test_records_that_lie_are_refused_by_field(root: Path, path: str, value: Any, words: str | None) -> None:
    """Without `words`: what can't be seen to be false; it must not stop a reader."""
    keys = [commit_key(0), commit_key(1)] if words is None else [commit_key(0)]
    lying = {key: sealed(put(document(root, key), path, value)) for key in keys}
    with instead(root, {**lying, **NO_MANIFEST}):
        said = use(root)
        if words is None:
            assert said == []
        else:
            assert len(said) == 2
            assert all(words in s and commit_key(0) in s for s in said), said


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "1" * 10_000, "-" * 9, "NaN", "-Infinity", "1e999999"]
)
def test_json_that_no_parser_should_take(text: str) -> None:
    content = seal(f'{{"{SEAL}": "{UNSEALED}", "x": {text}}}'.encode())
    with pytest.raises(StoreError, match="here"):
        decode(content, dict, "here")


@pytest.mark.parametrize("budget", [quick, pytest.param(many, marks=slow)], ids=["some", "many"])
@pytest.mark.parametrize("key", [HEAD_KEY, part_key(SPEC, 0)])
def test_manifests_that_lie(root: Path, key: str, budget: settings) -> None:
    told = document(root, key)

    @given(data=st.data())
    @budget
    def one(data: st.DataObject) -> None:
        with instead(root, {key: sealed(lie(data.draw, told))}):
            use(root)

    one()


def with_table(root: Path, array: str, data: bytes) -> dict[str, bytes | None]:
    """A manifest that names this content as the table of an array."""
    crc = codec.crc32c(data)
    head, part = document(root, HEAD_KEY), document(root, part_key(SPEC, 0))
    for told in (head, part):
        told["tables"][array] = f"{crc:08x}"
    return {
        table_key(array, 0, crc): data, HEAD_KEY: sealed(head), part_key(SPEC, 0): sealed(part),
    }  # fmt: skip


def table_of(columns: dict[str, Any], **options: Any) -> bytes:
    out = io.BytesIO()
    given = {"compression": "none", "use_dictionary": False, "store_schema": False, **options}
    fields = [pa.field(name, c.type, nullable=c.null_count > 0) for name, c in columns.items()]
    pq.write_table(pa.table(list(columns.values()), schema=pa.schema(fields)), out, **given)
    return out.getvalue()


U32 = pa.uint32()
GOOD = {"stored": pa.array([50, 60, 70, 80, 90], U32), "crc32c": pa.array([1, 2, 3, 4, 5], U32)}
TABLES: list[dict[str, Any]] = [
    {"stored": GOOD["stored"]}, {}, {"crc32c": GOOD["crc32c"], "stored": GOOD["stored"]}, {**GOOD, "x": GOOD["stored"]},
    *({**GOOD, "stored": pa.array(values, kind)} for values, kind in (
        ([1.5] * 5, pa.float64()), ([1] * 5, pa.int64()), ([1, 2, 3, 4, None], U32), (["1"] * 5, pa.string()),
        ([[1]] * 5, pa.list_(U32)), ([0] * 5, U32), ([1 << 31] * 5, U32), ([{"a": 1}] * 5, pa.struct({"a": U32})),
    )),
    {name: column.slice(0, 4) for name, column in GOOD.items()},
    {name: pa.concat_arrays([column, column]) for name, column in GOOD.items()},
]  # fmt: skip


@pytest.mark.parametrize("columns", TABLES, ids=range(len(TABLES)))
def test_tables_that_lie(root: Path, columns: dict[str, Any]) -> None:
    with instead(root, with_table(root, "resid_post.3", table_of(columns))):
        said = use(root)
        assert len(said) == 2
        assert "manifest/resid_post.3/000000-" in said[0]
        assert "manifest" in said[1]


def test_a_compressed_table_is_refused_before_it_unpacks(root: Path) -> None:
    rows = 1 << 20
    columns = {name: pa.array(np.ones(rows, np.uint32)) for name in GOOD}
    for options in ({"compression": "zstd"}, {"use_dictionary": True}):
        data = table_of(columns, **options)
        with instead(root, with_table(root, "resid_post.3", data)):
            assert "manifest/resid_post.3/000000-" in use(root)[0]


def in_child(make: Callable[..., Callable[[], object]], *args: Any, timeout: float = 120) -> str:
    """Output of the work that a function makes, in its own process, where a crash shows and memory is counted."""
    done = run_in_fork(frugal, make, args, timeout=timeout)
    assert done.returncode == 0, (done.returncode, done.stdout[-500:], done.stderr[-3000:])
    return done.stdout


def frugal(make: Callable[..., Callable[[], object]], args: tuple[Any, ...]) -> None:
    """Do it and print what it says; fails if memory grew by more than 768 MiB on the way."""
    work = make(*args)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(work())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 768 << 10


def flip_table(root: str, count: int) -> Callable[[], dict[str, int]]:
    """Tables with wrong bytes and the right name: what pyarrow meets behind the checksum."""

    def work() -> dict[str, int]:
        rng, path, seen = np.random.default_rng(count), Path(root), {"refused": 0, "taken": 0}
        (table,) = (path / "manifest" / "resid_post.3").iterdir()
        whole = table.read_bytes()
        for _ in range(count):
            data = bytearray(whole)
            for at in rng.integers(len(data), size=rng.integers(1, 4)):
                data[at] = rng.integers(256)
            if rng.integers(4) == 0:
                at = int(rng.integers(len(data)))
                del data[at : at + int(rng.integers(1, 50))]
            with instead(path, with_table(path, "resid_post.3", bytes(data))):
                seen["refused" if use(path) else "taken"] += 1
        return seen

    return work


@pytest.mark.parametrize("count", [150, pytest.param(4000, marks=slow)])
def test_no_table_crashes_the_parser(tmp_path: Path, count: int) -> None:
    print(in_child(flip_table, str(build(tmp_path / "s", "planes")), count, timeout=1000))


def blosc_chunks(count: int) -> Callable[[], dict[str, int]]:
    """Blosc chunks with the right sizes and checksum, and everything else wrong."""

    def work() -> dict[str, int]:
        rng, out, seen = np.random.default_rng(count), np.empty(4096, np.uint8), {"refused": 0, "taken": 0}
        wholes = [codec.encode((rng.normal(size=2048) * s).astype(np.int16), "blosc")[:-4] for s in (3, 1e4)]
        for i in range(count):
            data = bytearray(wholes[i % 2])
            for at in rng.integers(0, 60 if i % 3 else len(data), size=rng.integers(1, 6)):
                data[at] = rng.choice([0, 1, 2, 127, 128, 255, rng.integers(256)])
            data[4:8], data[12:16] = (4096).to_bytes(4, "little"), len(data).to_bytes(4, "little")
            if i % 5 == 0:
                data[8:12] = int(rng.choice([0, 1, 1 << 31, (1 << 32) - 1, 4097, 4095])).to_bytes(4, "little")
            try:
                codec.decode_into(data + codec.crc32c(bytes(data)).to_bytes(4, "little"), "blosc", out, "here")
                seen["taken"] += 1
            except IntegrityError:
                seen["refused"] += 1
        return seen

    return work


@pytest.mark.parametrize("count", [5000, pytest.param(500_000, marks=slow)])
def test_no_blosc_chunk_crashes_its_decoder(count: int) -> None:
    print(in_child(blosc_chunks, count, timeout=1000))


def frame(claim: int, content: bytes) -> bytes:
    """A zstd frame that claims a size and holds one raw block (RFC 8878)."""
    head = b"\x28\xb5\x2f\xfd\xe0" + claim.to_bytes(8, "little")
    return head + (len(content) << 3 | 1).to_bytes(3, "little") + content


def blosc(nbytes: int, blocksize: int, cbytes: int, typesize: int = 2, flags: int = 0x91) -> bytes:
    return struct.pack("<BBBBIII", 2, 1, flags, typesize, nbytes, blocksize, cbytes) + bytes(range(100))


BOMB = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 26))
PAYLOADS = [
    ("planes", frame(1 << 40, b"x" * 96)), ("planes", frame((1 << 64) - 1, b"x" * 96)), ("planes", frame(96, b"x")),
    ("planes", frame(96, b"x" * 97)), ("planes", frame(97, b"x" * 97)), ("planes", BOMB), ("planes", b"\0"),
    ("planes", frame(96, b"x" * 96) + BOMB), ("planes", b"\x50\x2a\x4d\x18\xff\xff\xff\xff" + frame(96, b"x" * 96)),
    ("none", b"x" * 95), ("none", b"x" * 97), ("blosc", b"\2\1"),
    *[("blosc", blosc(*sizes)) for sizes in (
        (1 << 31, 96, 116), (96, 1 << 31, 116), (96, 96, 1 << 31), (96, 0, 116), (96, 96, 116, 0), (96, 96, 116, 255),
        (0, 0, 116), ((1 << 32) - 1, (1 << 32) - 1, 116), (96, 96, 116, 2, 0x93), (96, 1, 116), (96, 96, 15),
    )],
]  # fmt: skip


@pytest.mark.parametrize(("root", "payload"), PAYLOADS, indirect=["root"], ids=range(len(PAYLOADS)))
def test_payloads_with_the_right_checksum_are_refused_by_chunk(root: Path, payload: bytes) -> None:
    key, told = "resid_post.3/c/0/0", document(root, commit_key(0))
    chunks, crc = told["arrays"]["resid_post.3"], codec.crc32c(payload)
    rest = (root / key).read_bytes()[chunks["stored"][0] :][: chunks["stored"][1]]
    chunks["stored"][0] = len(payload) + 4
    chunks["crc32c"] = f"{crc:08x}" + chunks["crc32c"][8:]
    shard = payload + crc.to_bytes(4, "little") + rest + tail(chunks["stored"][:2], 2, "a" * 16)
    with instead(root, {key: shard, commit_key(0): sealed(told), **NO_MANIFEST}):
        said = use(root, read, check, stream, through_zarr)
        assert len(said) == 4
        assert all(f"{key} chunk at byte 0" in s for s in said), said


@pytest.mark.parametrize("value", [np.nan, 0.0, -1.0, np.inf, None])
@pytest.mark.parametrize("row", ["scale", "offset"])
def test_calibrations_that_lie_are_refused(root: Path, value: float | None, row: str) -> None:
    key = calibration_key("attn_out.3")
    table = np.frombuffer((root / key).read_bytes()[:-4], "<f4").copy()
    table[1 if row == "scale" else 5] = 1.0 if value is None else value
    plain = table.tobytes() + (b"more" if value is None else b"")
    crc = codec.crc32c(plain)
    records = {
        c: sealed(put(document(root, c), "calibration/attn_out.3", f"{crc:08x}")) for c in map(commit_key, (0, 1))
    }
    with instead(root, {key: plain + crc.to_bytes(4, "little"), **records, **NO_MANIFEST}):
        said = use(root, read, check, stream)
        if row == "offset" and value in (0.0, -1.0):  # an offset may be anything finite
            assert said == []
        else:
            assert len(said) == 3
            assert all(key in s for s in said), said


def bombs(root: str) -> Callable[[], list[list[str]]]:
    """Small objects that claim or unpack to a gigabyte and more: JSON, a long run in a table."""
    path = Path(root)
    claimed = document(path, HEAD_KEY)
    claimed["spec"]["rows"] = 1 << 28
    many = {name: pa.array(np.ones(1 << 24, np.uint32)) for name in GOOD}
    files: list[dict[str, bytes | None]] = [
        with_table(path, "resid_post.3", table_of(many, use_dictionary=True)),
        {HEAD_KEY: sealed(claimed)},
        {**NO_MANIFEST, commit_key(0): sealed({SEAL: UNSEALED, "x": [{}] * 5_000_000})},
    ]

    def work() -> list[list[str]]:
        said: list[list[str]] = []
        for contents in files:
            with instead(path, contents):
                said.append(use(path))
        return said

    return work


def test_bombs_are_refused_before_they_unpack(tmp_path: Path) -> None:
    said = in_child(bombs, str(build(tmp_path / "s", "planes")))
    assert [w in said for w in ("rows, expected 5", "are of 40 rows", "values, at most")] == [True] * 3, said


def largest(root: str) -> Callable[[], str]:
    """A head of the most buckets that a spec allows, of which nothing is there; what reading a chunk says."""
    rows = 32 << 24
    head = document(Path(root), HEAD_KEY)
    head["spec"]["rows"] = rows
    head["tables"] = dict.fromkeys(head["tables"], "0" * 8 * (1 << 14))
    for sums in head["stats"].values():
        sums["rows"] = rows

    def work() -> str:
        with instead(Path(root), {HEAD_KEY: sealed(head)}):
            store = open_store(root)
            assert (store.rows, store.complete) == (rows, True)
            with pytest.raises(StoreError) as e:
                store.read_chunk("resid_post.3", 0, 0)
        return str(e.value)

    return work


def test_the_most_buckets_fit_in_memory(tmp_path: Path) -> None:
    assert "manifest/resid_post.3/000000-00000000.parquet" in in_child(largest, str(build(tmp_path / "s", "planes")))


KEYS = [
    GROUP_KEY,
    HEAD_KEY,
    commit_key(0),
    "resid_post.3/c/0/0",
    "resid_post.3/zarr.json",
    "calibration/attn_out.3/c/0/0",
]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "what",
    [
        "symlink",
        "symlink to a directory",
        "directory",
        "device",
        "circle",
    ],
)
def test_objects_that_are_no_files_of_the_store(tmp_path: Path, key: str, what: str) -> None:
    root, outside = build(tmp_path / "s", "planes"), tmp_path / "outside"
    path = root / key
    if what == "symlink to a directory" and path.parent != root:
        path.parent.rename(outside)
        path.parent.symlink_to(outside)
    else:
        path.rename(outside)
        to = {"device": "/dev/zero", "circle": path}.get(what, outside)
        path.mkdir() if what == "directory" else path.symlink_to(to)
    said = use(root)
    assert said or (key, what) == (HEAD_KEY, "directory")  # without a manifest the records speak
    if what not in ("directory", "circle"):
        assert any("leads out of the store" in s for s in said), said


def fifos(root: str) -> Callable[[], list[str]]:
    """A FIFO in the place of each object in turn; the keys that were not named."""

    def work() -> list[str]:
        silent: list[str] = []
        for key in KEYS:
            path, aside = Path(root) / key, Path(root).with_name("aside")
            path.rename(aside)
            os.mkfifo(path)
            if not any(key in s for s in use(Path(root))):
                silent.append(key)
            path.unlink()
            aside.rename(path)
        return silent

    return work


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    assert in_child(fifos, str(build(tmp_path / "s", "planes"))).strip() == "[]"
