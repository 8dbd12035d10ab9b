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
import tracemalloc
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
from actstore.store.format.parquet_pages import page_sizes
from commands import run_in_fork
from conftest import fill, random_sites
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import actstore
from actstore.errors import ActstoreError, IntegrityError, StoreError
from actstore.store import SiteSpec, StoreSpec, create_store, open_storage, open_store
from actstore.store.format import codec
from actstore.store.format.manifest import HEAD_KEY
from actstore.store.format.record import commit_key
from actstore.store.format.shard import footer
from actstore.store.format.spec import ATTRIBUTE, GROUP_KEY, SEAL, UNSEALED, calibration_key, load_sealed, seal
from actstore.store.maintain.verify import verify

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
GIB = 1 << 30
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
    before = {key: (root / key).read_bytes() for key in contents}
    files = {p for p in root.parent.rglob("*") if p.is_file()}
    try:
        for key, content in contents.items():
            (root / key).unlink() if content is None else (root / key).write_bytes(content)
        yield
        gone = {root / key for key, content in contents.items() if content is None}
        assert {p for p in root.parent.rglob("*") if p.is_file()} == files - gone
    finally:
        for key, content in before.items():
            (root / key).write_bytes(content)


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
        for _ in actstore.ActivationDataset(store, sites=list(store.sites), batch_size=8, threads=1, with_rows=True):
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
        with instead(root, {key: content, **({HEAD_KEY: None} if alone else {})}):
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
        ("rows", 40.0, "rows is 40.0"),
        ("rows", True, "rows is True"),
        ("seed", 1 << 70, "seed"),
        ("bucket_rows", -32, "bucket_rows"),
        ("bucket_rows", 1 << 31, "chunks"),
        ("shard_rows", 0, "shard_rows"),
        ("chunk_rows", "8", "chunk_rows is '8'"),
        ("chunk_rows", None, "chunk_rows is None"),
        ("codec", "lzma", "codec is 'lzma'"),
        ("sites", {}, "at least one site"),
        ("sites", {"../x": {"d": 3, "encoding": "bf16"}}, "site name"),
        ("sites", {"/etc": {"d": 3, "encoding": "bf16"}}, "site name"),
        ("sites", {"a/b": {"d": 3, "encoding": "bf16"}}, "site name"),
        ("sites", {"": {"d": 3, "encoding": "bf16"}}, "site name"),
        ("sites", {"x" * 300: {"d": 3, "encoding": "bf16"}}, "site name"),
        ("sites", {"x": {"d": 1 << 40, "encoding": "bf16"}}, "d is"),
        ("sites", {"x": {"d": 3.0, "encoding": "bf16"}}, "d is 3.0"),
        ("sites", {"x": {"d": 3, "encoding": "pickle"}}, "encoding is 'pickle'"),
        ("sites", {"x": {"d": 3, "encoding": "bf16", "more": 1}}, "more"),
        ("provenance", [], "provenance"),
        ("provenance", {"x": float("nan")}, "NaN"),
        ("provenance", {"x": float("inf")}, "Infinity"),
        ("provenance", {"x": json.loads("[" * 70 + "]" * 70)}, "more than 64"),
        ("provenance", {"x": json.loads("[" * 700 + "]" * 700)}, "more than 64"),
        ("format_version", 2, "format version is 2"),
        ("more", 1, "fields are"),
    ],
)
def test_groups_that_lie_are_refused_by_field(root: Path, path: str, value: Any, words: str) -> None:
    lying = put(document(root, GROUP_KEY), f"attributes/{ATTRIBUTE}/{path}", value)
    with instead(root, {GROUP_KEY: sealed(lying), HEAD_KEY: None}):
        said = use(root)
        assert len(said) == 2
        assert all(words in s and GROUP_KEY in s for s in said), said


BIG = base64.b64encode(np.full(6, 1.7e308).tobytes()).decode()
NANS = base64.b64encode(np.full(6, np.nan).tobytes()).decode()


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("shards", {"../x": []}, "shards are of"),
        ("rows", 31, "rows is 31"),
        ("bucket", 1, "bucket is 1"),
        ("bucket", True, "bucket is True"),
        ("attempt", "", "attempt is"),
        ("attempt", "x" * 65, "attempt is"),
        ("attempt", "\ud800", "attempt is"),
        ("attempt", "a\n", "attempt is"),
        ("state", "done", "not a commit record"),
        ("state", "writing", "fields are"),
        ("shards/resid_post.3/0/chunks/0", 0, "chunk lengths"),
        ("shards/resid_post.3/0/chunks/0", -1, "chunk lengths"),
        ("shards/resid_post.3/0/chunks/0", 1 << 40, "chunk lengths"),
        ("shards/resid_post.3/0/chunks/0", 100.0, "chunk lengths"),
        ("shards/resid_post.3/0/chunks", [50], "chunk lengths"),
        ("shards/resid_post.3", [], "0 shards"),
        ("shards/resid_post.3/0/crc32c", "0" * 8, "crc32c"),
        ("shards/resid_post.3/0/crc32c", "0" * 15 + "g", "crc32c"),
        ("calibration/attn_out.3", 7, "crc32c is '7'"),
        ("stats/resid_post.3/rows", 31, "31 rows"),
        ("stats/resid_post.3/sum", BIG[:-12], "statistics"),
        ("stats/resid_post.3/max_abs", "0x1p+5000", "statistics"),
        ("stats/resid_post.3/saturated", -1, "statistics"),
        ("stats/resid_post.3/sum", BIG, None),
        ("stats/resid_post.3/sum_sq", BIG, None),
        ("stats/resid_post.3/sum", NANS, None),
        ("stats/resid_post.3/max_abs", "nan", None),
        ("stats/resid_post.3/saturated", 1 << 300, None),
    ],
)
def test_records_that_lie_are_refused_by_field(root: Path, path: str, value: Any, words: str | None) -> None:
    """Without `words`: what can't be seen to be false; it must not stop a reader."""
    keys = [commit_key(0), commit_key(1)] if words is None else [commit_key(0)]
    lying = {key: sealed(put(document(root, key), path, value)) for key in keys}
    with instead(root, {**lying, HEAD_KEY: None}):
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
        load_sealed(content, "here")


def manifest(root: Path, told: Any = None, table: pa.Table | None = None, **options: Any) -> bytes:
    """A sealed manifest that says `told` in its metadata and `table` in its columns; else what the real one says."""
    real = pq.read_table(root / HEAD_KEY)
    table = real.replace_schema_metadata() if table is None else table
    out = io.BytesIO()
    options = {"compression": "zstd", "store_schema": False, **options}
    with pq.ParquetWriter(out, table.schema, **options) as writer:
        writer.write_table(table)
        told = {**json.loads(real.schema.metadata[b"actstore"]), SEAL: UNSEALED} if told is None else told
        writer.add_key_value_metadata({ATTRIBUTE: json.dumps(told)})
    return seal(out.getvalue())


@pytest.mark.parametrize("budget", [quick, pytest.param(many, marks=slow)], ids=["some", "many"])
def test_manifest_metadata_that_lies(root: Path, budget: settings) -> None:
    told = {**json.loads(pq.read_table(root / HEAD_KEY).schema.metadata[b"actstore"]), SEAL: UNSEALED}

    @given(data=st.data())
    @budget
    def one(data: st.DataObject) -> None:
        with instead(root, {HEAD_KEY: manifest(root, lie(data.draw, told))}):
            use(root)

    one()


COLUMNS: list[tuple[str, Any]] = [
    ("bucket", [0.0, 1.5]), ("bucket", [0.0, float("nan")]), ("bucket", ["0", "1"]), ("bucket", [0, None]),
    ("bucket", [-1, 0]), ("bucket", [1, 0]), ("bucket", [0, 2]), ("bucket", [0, 1 << 62]), ("bucket", [[0], [1]]),
    ("bucket", [{"a": 0}, {"a": 1}]), ("bucket", pa.array([0, 1], pa.uint64())), ("bucket", [b"0", b"1"]),
    ("attempt", ["a", None]), ("attempt", ["a", ""]), ("attempt", ["a", "x" * 65]), ("attempt", ["a", "\n"]),
    ("attempt", [1, 2]),
    ("attempt", [["a"], ["b"]]), ("attempt", [b"a", b"\xff"]),
    ("resid_post.3/chunks", [1, 2]), ("resid_post.3/chunks", [[9] * 4, [9] * 2]),
    ("resid_post.3/chunks", pa.array([[9] * 4, None], pa.list_(pa.uint32()))),
    ("resid_post.3/chunks", pa.array([[9] * 4, [None]], pa.list_(pa.uint32()))),
    ("resid_post.3/chunks", pa.array([[9] * 4, [0]], pa.list_(pa.uint32()))),
    ("resid_post.3/chunks", pa.array([[9] * 4, [1 << 31]], pa.list_(pa.uint32()))),
    ("resid_post.3/chunks", pa.array([[9] * 3, [9] * 2], pa.list_(pa.uint32()))),
    ("resid_post.3/crc32c", pa.array([[9] * 4, []], pa.list_(pa.uint32()))),
    ("resid_post.3/crc32c", [[[9]] * 4, [[9]]]), ("resid_post.3/crc32c", [["a"] * 4, ["b"]]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("column", "values"), [*COLUMNS, *[(c, None) for c in ("bucket", "attempt", "position/chunks")]]
)
def test_manifest_columns_that_lie(root: Path, column: str, values: Any) -> None:
    table = pq.read_table(root / HEAD_KEY).replace_schema_metadata()
    i = table.schema.get_field_index(column)
    table = table.remove_column(i) if values is None else table.set_column(i, column, [values])
    with instead(root, {HEAD_KEY: manifest(root, table=table)}):
        said = use(root)
        assert len(said) == 2
        assert all(HEAD_KEY in s for s in said), said


@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_manifests_by_other_settings_of_parquet_are_read(
    root: Path, compression: str, dictionary: bool, version: str
) -> None:
    content = manifest(root, compression=compression, use_dictionary=dictionary, data_page_version=version)
    with instead(root, {HEAD_KEY: content}):
        assert use(root) == []


def test_a_manifest_of_a_longer_store_does_not_stretch_this_one(root: Path) -> None:
    """The group says 40 rows; a manifest of 1000 knows a third bucket, and a second one that is full."""
    told = {**json.loads(pq.read_table(root / HEAD_KEY).schema.metadata[b"actstore"]), SEAL: UNSEALED, "rows": 1000}
    table = pq.read_table(root / HEAD_KEY).replace_schema_metadata()
    full = pa.concat_tables([table.slice(0, 1), table.slice(0, 1)])
    for bucket in (1, 2):
        for s in told["stats"].values():
            s["rows"] = 64
        lying = full.set_column(0, "bucket", [[0, bucket]])
        with instead(root, {HEAD_KEY: manifest(root, told, lying)}):
            said = use(root)
            assert len(said) == 2
            assert "describe different stores" in said[0]


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


def flip_manifest(root: str, count: int) -> Callable[[], dict[str, int]]:
    """Sealed manifests with wrong bytes: what pyarrow meets behind the seal."""

    def work() -> dict[str, int]:
        rng, file, seen = np.random.default_rng(count), Path(root) / HEAD_KEY, {"refused": 0, "taken": 0}
        whole = file.read_bytes()
        for _ in range(count):
            data = bytearray(whole)
            for at in rng.integers(len(data), size=rng.integers(1, 4)):
                data[at] = rng.integers(256)
            if rng.integers(4) == 0:
                at = int(rng.integers(len(data)))
                del data[at : at + int(rng.integers(1, 50))]
            file.write_bytes(resealed(bytes(data)))
            seen["refused" if use(Path(root)) else "taken"] += 1
        file.write_bytes(whole)
        return seen

    return work


@pytest.mark.parametrize("count", [150, pytest.param(4000, marks=slow)])
def test_no_manifest_crashes_the_parser(tmp_path: Path, count: int) -> None:
    print(in_child(flip_manifest, str(build(tmp_path / "s", "planes")), count, timeout=1000))


@pytest.mark.parametrize("kind", [1, 3, 7])
def test_a_footer_cannot_hold_a_list_longer_than_itself(kind: int) -> None:
    """A list of 2^20 booleans, bytes or doubles, none of which is there; with 2^60 the difference is a hang."""
    footer = bytes([0x19, 0xF0 | kind]) + b"\x80\x80\x40"
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, IndexError)):
            page_sizes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


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
    told_shard, crc = told["shards"]["resid_post.3"][0], codec.crc32c(payload)
    rest = (root / key).read_bytes()[told_shard["chunks"][0] :][: told_shard["chunks"][1]]
    told_shard["chunks"][0] = len(payload) + 4
    told_shard["crc32c"] = f"{crc:08x}" + told_shard["crc32c"][8:]
    shard = payload + crc.to_bytes(4, "little") + rest + footer(told_shard["chunks"], 2)
    with instead(root, {key: shard, commit_key(0): sealed(told), HEAD_KEY: None}):
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
    with instead(root, {key: plain + crc.to_bytes(4, "little"), **records, HEAD_KEY: None}):
        said = use(root, read, check, stream)
        if row == "offset" and value in (0.0, -1.0):  # an offset may be anything finite
            assert said == []
        else:
            assert len(said) == 3
            assert all(key in s for s in said), said


def long_page(root: Path, column: str, values: int) -> bytes:
    """A manifest whose footer tells the truth of a column of 6 values, and whose page holds so many, all the same."""

    def varint(n: int) -> bytes:
        return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])

    def run(value: int, count: int) -> bytes:
        return varint(count << 1) + bytes([value])

    def block(levels: bytes) -> bytes:
        return len(levels).to_bytes(4, "little") + levels

    def integer(value: int) -> bytes:
        return b"\x15" + varint(value << 1)

    data = manifest(root, compression="none", use_dictionary=[f"{column}.list.element"])
    found = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0)
    about = next(c for c in map(found.column, range(found.num_columns)) if c.path_in_schema.startswith(column))
    start, stop = about.data_page_offset, about.dictionary_page_offset + about.total_compressed_size
    page = block(run(0, 1) + run(1, values - 1)) + block(run(3, values)) + b"\1" + run(0, values)
    # type, unpacked and packed bytes, and of a data page: values, then encodings (8 is dictionary, 3 is runs)
    size = stop - start - 22
    head = integer(0) + integer(size) + integer(size)
    head += b"\x2c" + integer(values) + integer(8) + integer(3) + integer(3) + b"\0\0"
    padding = stop - start - len(head) - len(page)
    assert padding >= 0
    head = head.replace(integer(size), integer(stop - start - len(head)))
    return resealed(data[:start] + head + page + bytes(padding) + data[stop:])


def bombs(root: str) -> Callable[[], list[list[str]]]:
    """Small objects that claim or unpack to a gigabyte and more: JSON, a long or repeated string, a long page."""
    path = Path(root)
    told = {**json.loads(pq.read_table(path / HEAD_KEY).schema.metadata[b"actstore"]), SEAL: UNSEALED}
    long = pa.table({"bucket": [0, 1], "attempt": ["a", "x" * (160 << 20)]})
    ids = pa.DictionaryArray.from_arrays(np.zeros(300_000, np.int32), pa.array(["x" * (1 << 14)]))
    repeated = pa.table({"bucket": np.arange(300_000), "attempt": ids})
    larger = {**told, "bucket_rows": 8, "shard_rows": 8, "rows": 1 << 22}
    files: list[dict[str, bytes | None]] = [
        {HEAD_KEY: manifest(path, told, long, use_dictionary=False)},
        {HEAD_KEY: manifest(path, larger, repeated)},
        {HEAD_KEY: long_page(path, "token_id/crc32c", 1 << 28)},
        {HEAD_KEY: None, commit_key(0): sealed({SEAL: UNSEALED, "x": [{}] * 5_000_000})},
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
    assert [w in said for w in ("column attempt has 2 values in 1677", "not a short id", "values, at most")] == [
        True
    ] * 3, said


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
