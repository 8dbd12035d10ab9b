"""What a file or table decodes to is bounded: a small one that claims gigabytes is refused, honest ones are read."""

import gzip
import json
import subprocess
import sys
from dataclasses import replace
from io import StringIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from awscrt.checksums import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny import tokenizer_of

from actstore.errors import ActstoreError, IntegrityError, StoreError, TokensError
from actstore.progress import Progress
from actstore.tokens import TokenizeConfig, open_tokens, row_starts, tokenize
from actstore.tokens.arrays import MAX_CHUNK_BYTES, TableArray
from actstore.tokens.documents import batches
from actstore.tokens.sources import find_sources

QUIET = Progress(Console(file=StringIO()))
TEXTS = [f"Document {i}: the quick brown fox {'jumps over ' * (i % 13)}the lazy dog." for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits")
    tokenizer_of(TEXTS).save_pretrained(folder / "tokenizer")
    pq.write_table(pa.table({"text": TEXTS}), folder / "t.parquet")
    return folder


@pytest.fixture
def table(folder, tmp_path):
    source, tokenizer = (str(folder / "t.parquet"),), str(folder / "tokenizer")
    return tokenize(TokenizeConfig(sources=source, tokenizer=tokenizer, seq_len=32, out=str(tmp_path / "t")), QUIET)


def sealed(payload: bytes) -> bytes:
    return payload + crc32c(payload).to_bytes(4, "little")


def edit(path, change):
    parsed = json.loads(path.read_text())
    change(parsed)
    path.write_text(json.dumps(parsed))


# -- the table --------------------------------------------------------------------------------------------------------


def test_a_frame_that_does_not_declare_the_size_of_its_chunk_is_not_decoded(table, tmp_path, monkeypatch):
    decoded = []
    real = zstandard.ZstdDecompressor
    monkeypatch.setattr(zstandard, "ZstdDecompressor", lambda: decoded.append(1) or real())
    size = 4 * table.sequences * 32
    small, no_size = zstandard.ZstdCompressor(), zstandard.ZstdCompressor(write_content_size=False)
    chunk = tmp_path / "t" / "ids" / "c" / "0" / "0"
    for payload in (small.compress(bytes(1 << 20)), small.compress(bytes(size - 4)), no_size.compress(bytes(size))):
        chunk.write_bytes(sealed(payload))
        with pytest.raises(IntegrityError, match=rf"ids/c/0/0 is damaged: .* {size} bytes"):
            table.ids(0, 1)
    chunk.write_bytes(sealed(b"no zstd at all"))
    with pytest.raises(IntegrityError, match="ids/c/0/0 is damaged"):
        table.ids(0, 1)
    assert not decoded
    chunk.write_bytes(sealed(small.compress(bytes(size)) + small.compress(bytes(1 << 20))))
    with pytest.raises(IntegrityError, match="ids/c/0/0 is damaged"):
        table.ids(0, 1)
    chunk.write_bytes(bytes(2 * size))
    with pytest.raises(StoreError, match="larger than"):
        table.ids(0, 1)


ROWS = MAX_CHUNK_BYTES // 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[ROWS + 1, 32]), "chunks have"),
        (lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[1 << 60, 32]), "chunks have"),
        (lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=["x"]), "chunks have 'x' sequences"),
        (lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[]), "is not the metadata"),
        (lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[3, 16]), "chunk_grid is"),
        (lambda m: m.update(codecs=[*m["codecs"][:2], *m["codecs"][1:]]), "codecs is .*zstd.*zstd"),
        (lambda m: m.update(shape=[1 << 40, 32]), "shape is"),
        (lambda m: m.update(storage_transformers=[{}]), "'storage_transformers' is unknown"),
        (lambda m: m.pop("chunk_grid"), "is not the metadata of a zarr array"),
        (lambda m: m.update(data_type="int64"), "data_type is 'int64', expected 'int32'"),
    ],
)
def test_metadata_that_tokenize_does_not_write_is_refused(table, tmp_path, change, message):
    edit(tmp_path / "t" / "ids" / "zarr.json", change)
    with pytest.raises(TokensError, match=message) as error:
        open_tokens(str(tmp_path / "t")).ids(0, 1)
    assert "KeyError" not in str(error.value)


def test_metadata_that_is_deep_or_large_is_refused(table, tmp_path):
    for name in ("ids/zarr.json", "zarr.json"):
        path = tmp_path / "t" / name
        whole = path.read_bytes()
        for text in (b"[" * 50_000, b'{"attributes": ' + b"[" * 50_000, b" " * (1 << 24)):
            path.write_bytes(text)
            with pytest.raises((TokensError, StoreError)):
                open_tokens(str(tmp_path / "t")).ids(0, 1)
        path.write_bytes(whole)


def test_row_counts_are_checked_against_the_table(table, tmp_path):
    counts = table.row_counts()
    path = tmp_path / "t" / "rows" / "c" / "0"
    array = TableArray("rows", (table.sequences,), table.sequences)
    assert path.read_bytes() == array.encode(counts)
    assert path.stat().st_size == 4 * table.sequences + 4, "row counts are stored as they are: nothing to inflate"
    moved = counts.copy()
    moved[:2] += np.array([-40, 40])
    for wrong in (counts + 1, moved):
        path.write_bytes(array.encode(wrong.astype(np.int32)))
        with pytest.raises(IntegrityError, match="in all, expected 0 to 32 and"):
            row_starts(table)


def test_ids_that_the_vocabulary_does_not_have_are_damage(table, tmp_path):
    array = TableArray("ids", (table.sequences, 32), table.sequences)
    for wrong in (-1, table.max_id + 1):
        ids = np.full((table.sequences, 32), wrong, np.int32)
        (tmp_path / "t" / "ids" / "c" / "0" / "0").write_bytes(array.encode(ids))
        with pytest.raises(IntegrityError, match=f"ids are {wrong} to {wrong}, expected 0 to {table.max_id}"):
            table.ids(0, 1)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_damaged_table_raises_our_errors_only(data, folder, tmp_path_factory):
    out = folder / "damaged"
    if not out.exists():
        source, tokenizer = (str(folder / "t.parquet"),), str(folder / "tokenizer")
        tokenize(TokenizeConfig(sources=source, tokenizer=tokenizer, seq_len=32, out=str(out)), QUIET)
    path = data.draw(st.sampled_from(sorted(p for p in out.rglob("*") if p.is_file() and p.name != ".lock")))
    whole = path.read_bytes()
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    for _ in range(data.draw(st.integers(0, 3)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        table = open_tokens(str(out))
        table.ids(0, table.sequences)
        table.documents(0, table.sequences)
        row_starts(table)
        table.document_names()
    except ActstoreError as e:
        assert "\n" not in str(e)
    finally:
        path.write_bytes(whole)


# -- sources ----------------------------------------------------------------------------------------------------------


def read(path, column="text"):
    (file,) = find_sources((str(path),)).files
    return [d for b in batches(file, column) for d in b]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress], ids=["gz", "zst"])
def test_a_document_that_a_small_file_can_not_hold_is_malformed(tmp_path, compress):
    bomb, kind = compress(b"a" * (1 << 26)), {gzip.compress: "gz", zstandard.compress: "zst"}[compress]
    (tmp_path / f"a.txt.{kind}").write_bytes(bomb)
    (only,) = read(tmp_path / f"a.txt.{kind}")
    assert only.problem.startswith("one document of more than ")
    lines = b'{"text": "one"}\n{"text": "' + b"a" * (1 << 26) + b'"}\n\n{"text": "two"}'
    (tmp_path / f"a.jsonl.{kind}").write_bytes(compress(lines))
    one, long, two = read(tmp_path / f"a.jsonl.{kind}")
    assert (one.content, two.content, two.record) == ("one", "two", 3)
    assert long.problem.startswith("one document of more than ")
    honest = b"the quick brown fox " * 100_000
    (tmp_path / f"b.txt.{kind}").write_bytes(compress(honest))
    assert read(tmp_path / f"b.txt.{kind}")[0].content == honest.decode()


SMALL = {"use_dictionary": False, "compression": "zstd"}
ONE_ROW = pa.ListArray.from_arrays(pa.array([0, 1 << 27], pa.int32()), pa.array(np.full(1 << 27, 7, np.int8)))


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_parquet_file_that_claims_too_much_is_refused(tmp_path, version):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a" * (1 << 28)]}), path, data_page_version=version, **SMALL)
    with pytest.raises(TokensError, match=r"a\.parquet: the file is damaged .* a part of it claims 268\d+ bytes"):
        read(path)
    pq.write_table(pa.table({"input_ids": ONE_ROW}), path, data_page_version=version, compression="zstd")
    with pytest.raises(TokensError, match="a part of it claims 1073741824 bytes"):
        read(path)


def write_arrow(path, table, compression, **options):
    with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, **options)


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_an_arrow_file_that_claims_too_much_is_refused(tmp_path, compression):
    path = tmp_path / "a.arrow"
    big = pa.array(["a" * (1 << 29)])
    for column in (big, big.dictionary_encode()):
        write_arrow(path, pa.table({"text": column}), compression)
        if path.stat().st_size > 1 << 20:
            continue  # lz4 does not compress so well
        with pytest.raises(TokensError, match=r"a\.arrow: .* a part of it claims 5\d+ bytes"):
            read(path)
    write_arrow(path, pa.table({"text": pa.array(TEXTS).dictionary_encode()}), compression, max_chunksize=7)
    assert [d.content for d in read(path)] == TEXTS


PEAK = """
import os, resource, sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from actstore.errors import ActstoreError
from actstore.tokens.documents import batches
from actstore.tokens.sources import find_sources
out = sys.argv[1]
long = "".join(map(chr, np.random.default_rng(0).integers(32, 127, 1 << 20)))
same = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2000, np.int32)), pa.array([long]))
skewed = pa.array([long] * 300 + ["short"] * 300_000)
def write():
    pq.write_table(pa.table({"text": same}), f"{out}/same.parquet")
    pq.write_table(pa.table({"text": ["x"] * 2000, "title": same}), f"{out}/title.parquet")
    plain = {"use_dictionary": False, "compression": "none", "write_batch_size": 16}
    pq.write_table(pa.table({"text": skewed}), f"{out}/skewed.parquet", **plain)
    with pa.ipc.new_stream(f"{out}/same.arrow", pa.schema({"text": same.type})) as writer:
        writer.write_table(pa.table({"text": same}))
def read(name):
    (file,) = find_sources((f"{out}/{name}",)).files
    before, n = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for batch in batches(file, "text"):
        n += len(batch)
    print(name, n, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, flush=True)
for work in (write, *(lambda n=n: read(n) for n in ("same.parquet", "title.parquet", "skewed.parquet", "same.arrow"))):
    pid = os.fork()
    if not pid:
        work()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
"""


def test_records_that_share_a_long_value_and_long_ones_among_short_ones_take_little_memory(tmp_path):
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    grown = {name: (int(n), int(mib)) for name, n, mib in map(str.split, done.stdout.splitlines())}
    assert {name: n for name, (n, _) in grown.items()} == {
        "same.parquet": 2000,
        "title.parquet": 2000,
        "skewed.parquet": 300_300,
        "same.arrow": 2000,
    }
    assert all(mib < 200 for _, mib in grown.values()), grown


def test_names_of_documents_are_bounded_and_checked(table, tmp_path):
    path = tmp_path / "t" / "documents.parquet"
    whole, names = path.read_bytes(), table.document_names()
    assert [n["record"] for n in names.to_pylist()] == list(range(60))
    bomb = pa.table({**{n: names[n].take([0] * 400) for n in names.column_names}, "title": ["a" * (1 << 20)] * 400})
    pq.write_table(bomb, path, write_batch_size=1, **SMALL)
    with pytest.raises(IntegrityError, match=r"documents\.parquet is damaged: 4\d+ bytes of document, file"):
        table.document_names()
    damaged = bytearray(whole)
    damaged[60] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(IntegrityError, match=r"documents\.parquet is damaged"):
        table.document_names()


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_damaged_source_raises_our_errors_only(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    kind = data.draw(st.sampled_from(["parquet", "arrow"]))
    path, table = folder / f"damaged.{kind}", pa.table({"text": TEXTS, "input_ids": [[i] for i in range(60)]})
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=20, data_page_version=data.draw(st.sampled_from(["1.0", "2.0"])))
    else:
        write_arrow(path, table, data.draw(st.sampled_from([None, "zstd"])), max_chunksize=20)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[-data.draw(st.integers(1, len(damaged)))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.sampled_from([len(damaged), len(damaged), len(damaged) // 2]))])
    try:
        read(path)
    except TokensError as e:
        assert "\n" not in str(e)


def test_bounds_leave_an_ordinary_table_alone(folder, table, tmp_path):
    again = TokenizeConfig(
        sources=(str(folder / "t.parquet"),), tokenizer=str(folder / "tokenizer"), seq_len=2, out=str(tmp_path / "two")
    )
    assert tokenize(again, QUIET).tokens == table.tokens
    assert tokenize(replace(again, seq_len=1 << 20, out=str(tmp_path / "long")), QUIET).sequences == 1
