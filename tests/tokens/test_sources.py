"""Sources: every kind of file and record is read or named, once, wherever the table goes."""

import gzip
import json
import os
import tempfile
from io import StringIO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import clear_memory
from rich.console import Console
from tiny import tokenizer_of

from actstore.errors import IntegrityError, TokensError
from actstore.progress import Progress
from actstore.store.storage import open_storage
from actstore.tokens import TokenizeConfig, build, copy_tokens, open_tokens, row_starts, tokenize
from actstore.tokens.tokenizer import load_tokenizer, one_line

TEXTS = [f"Document {i}: the quick brown fox." for i in range(20)]
IDS = [list(range(5, 25))] * 4


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_of(TEXTS).save_pretrained(folder)
    return load_tokenizer(str(folder))


@pytest.fixture
def make(loaded, tmp_path, monkeypatch):
    """Tokenise sources; return the table and the lines that were said."""
    monkeypatch.setattr(build, "load_tokenizer", lambda name: loaded)

    def run(*sources, **options):
        said = StringIO()
        options = {"out": str(tmp_path / "table"), "seq_len": 16} | options
        config = TokenizeConfig(sources=tuple(map(str, sources)), tokenizer="t", **options)
        return tokenize(config, Progress(Console(file=said, width=1000))), said.getvalue()

    return run


def jsonl(*rows):
    return b"".join(json.dumps(r).encode() + b"\n" for r in rows)


def files_of(table):
    return list(dict.fromkeys(n["file"] for n in table.document_names().to_pylist()))


# -- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl"])
def test_where_text_is_null_the_ids_are_used(make, tmp_path, kind):
    rows = {"text": [None, "the quick brown fox", None, "over"], "input_ids": [IDS[0], None, IDS[1], IDS[2]]}
    path, table = tmp_path / f"a.{kind}", pa.table(rows)
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_bytes(jsonl(*({n: rows[n][i] for n in rows} for i in range(4))))
    made, _ = make(path)
    ids, documents = made.ids(0, made.sequences), made.documents(0, made.sequences)
    assert [sorted(ids[documents == n].tolist()) == IDS[0] for n in range(4)] == [True, False, True, False]
    assert (documents == 3).sum() < 20
    assert made.tokens == (documents >= 0).sum()


def test_two_columns_of_one_name_are_an_error(make, tmp_path):
    for name in ("text", "input_ids", "title"):
        columns = [pa.array(TEXTS[:1]), pa.array(TEXTS[:1]), pa.array(TEXTS[:1])]
        pq.write_table(pa.table(columns, names=["text", name, name]), tmp_path / "a.parquet")
        with pytest.raises(TokensError, match=rf"^a\.parquet: \d columns are called '{name}'; rename all but one$"):
            make(tmp_path / "a.parquet")
    columns = [pa.array(TEXTS), pa.array(TEXTS), pa.array(TEXTS)]
    pq.write_table(pa.table(columns, names=["text", "url", "url"]), tmp_path / "a.parquet")
    assert make(tmp_path / "a.parquet")[0].tokens


def test_ids_in_strings_are_not_text(make, tmp_path):
    pq.write_table(pa.table({"input_ids": ["[101, 102, 103]"] * 3}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_bytes(jsonl({"text": None, "input_ids": "5 6 7"}))
    for name in ("a.parquet", "b.jsonl"):
        with pytest.raises(TokensError, match=r"input_ids is text, expected a list of token ids; .*--text-column"):
            make(tmp_path / name)
    assert make(tmp_path / "a.parquet", text_column="input_ids")[0].tokens


def test_special_tokens_in_ids_are_counted(make, tmp_path):
    rows = [{"input_ids": [0, 0, 1, 7, 0, 8, 2, 9]}, {"input_ids": [1, 5, 6, 2, 0]}, {"text": "the quick"}]
    (tmp_path / "a.jsonl").write_bytes(jsonl(*rows))
    for packing in ("joined", "separate"):
        table, _ = make(tmp_path / "a.jsonl", packing=packing, out=str(tmp_path / packing))
        ids, documents = table.ids(0, table.sequences), table.documents(0, table.sequences)
        assert (ids[documents == 0].tolist(), ids[documents == 1].tolist()) == ([7, 0, 8, 9], [5, 6])
        assert table.special == 7
    (tmp_path / "a.jsonl").write_bytes(jsonl(*rows[:2]))
    table, said = make(tmp_path / "a.jsonl", packing="ready", out=str(tmp_path / "ready"))
    assert "7 BOS, EOS and padding tokens in input_ids are no rows" in said
    assert (table.special, table.tokens) == (7, 6)
    assert open_tokens(str(tmp_path / "ready")).special == 7


# -- files ------------------------------------------------------------------------------------------------------------


def test_json_lines_go_by_the_name_json_too(make, tmp_path):
    lines = jsonl(*({"text": t} for t in TEXTS))
    (tmp_path / "c4").mkdir()
    for name, data in {
        "c4-train.00000-of-01024.json.gz": gzip.compress(lines),
        "b.json": lines,
        "d.json.zst": zstandard.compress(lines),
        "e.jsonl.txt": b"plain text",
        "dataset_info.json": b"{}",
        "tokenizer.json": b"{}",
    }.items():
        (tmp_path / "c4" / name).write_bytes(data)
    table, said = make(tmp_path / "c4")
    assert files_of(table) == ["b.json", "c4-train.00000-of-01024.json.gz", "d.json.zst", "e.jsonl.txt"]
    assert table.document_names().num_rows == 61
    assert "directories that are not read: 2 (dataset_info.json, tokenizer.json)" in said
    assert (table.unread, table.unread_first) == (2, ("dataset_info.json", "tokenizer.json"))


def test_what_a_directory_holds_beside_its_sources_is_counted_and_named(make, tmp_path):
    for name in ("a.txt", "b.csv", "d/c.md", "_temporary/0/p.txt", ".cache/h.txt", ".git/config", "x.partial/s.txt"):
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / name).write_text("some text")
    table, said = make(tmp_path / "s")
    assert files_of(table) == ["a.txt"]
    assert "directories that are not read: 5 (.cache/h.txt, _temporary/0/p.txt, b.csv, ...)" in said
    assert table.unread == 5
    assert make(tmp_path / "s" / ".cache", out=str(tmp_path / "2"))[0].unread == 0, "a folder that is named is read"


def test_a_file_is_read_once_however_it_is_named(make, tmp_path, monkeypatch):
    folder = tmp_path / "with space"
    folder.mkdir()
    (folder / "a.txt").write_text("some text")
    (folder / "link.txt").symlink_to("a.txt")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    names = ["with space", "with space/a.txt", "./with space/../link/a.txt", folder.as_uri(), str(tmp_path / "link")]
    table, said = make(*names)
    assert files_of(table) == ["a.txt"]
    assert table.repeated == 8 - 1
    assert "named again and read once: 7 (link.txt, a.txt, a.txt, ...)" in said
    assert make("with space/a.txt", out=str(tmp_path / "once"))[0].fingerprint == table.fingerprint


def test_links_to_nothing_are_named_and_loops_end(make, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.txt").write_text("some text")
    (tmp_path / "s" / "loop").symlink_to(".")
    assert files_of(make(tmp_path / "s")[0]) == ["a.txt"]
    (tmp_path / "s" / "b.txt").symlink_to("nowhere")
    with pytest.raises(TokensError, match=r"s: b\.txt is gone, or a link to nothing; delete it"):
        make(tmp_path / "s")


def test_a_percent_in_a_file_url_is_decoded(make, tmp_path):
    (tmp_path / "50% of é.txt").write_text("some text")
    assert files_of(make((tmp_path / "50% of é.txt").as_uri())[0]) == ["50% of é.txt"]


@pytest.mark.parametrize("out", ["s/table", "s/deep/er", "s/.table"])
def test_the_table_may_lie_among_its_sources(make, tmp_path, monkeypatch, out):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.jsonl").write_bytes(jsonl(*({"text": t} for t in TEXTS)))
    with monkeypatch.context() as m:
        m.setattr(build, "GROUP_KEY", "killed")  # killed before the commit: documents.parquet is there
        with pytest.raises(TokensError):
            make(tmp_path / "s", out=str(tmp_path / out))
    assert list((tmp_path / "s").rglob("documents.parquet"))
    table, said = make(tmp_path / "s", out=str(tmp_path / out))
    assert (files_of(table), table.unread, said.count("not read")) == (["a.jsonl"], 0, 0)
    assert make(tmp_path / "s", out=str(tmp_path / out))[0] == table
    other, said = make(tmp_path / "s", out=str(tmp_path / "s" / "other"))
    assert (files_of(other), other.unread) == (["a.jsonl"], 1), "documents.parquet of the first"


def test_the_table_may_lie_among_its_sources_in_memory(make, tmp_path):
    fsspec.filesystem("memory").pipe("/sources-test/a.jsonl", jsonl(*({"text": t} for t in TEXTS)))
    for _ in range(2):
        table, _ = make("memory://sources-test", out="memory://sources-test/table")
        assert (files_of(table), table.unread) == (["a.jsonl"], 0)
    clear_memory("memory://sources-test")


def test_a_source_in_the_table_is_refused(make, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.txt").write_text("some text")
    for source in (tmp_path / "t", tmp_path / "t" / "a.txt"):
        with pytest.raises(TokensError, match="lies in the token table that is to be written; use another --out"):
            make(source, out=str(tmp_path / "t"))


def test_a_source_that_matches_nothing_is_refused(make, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.csv").write_text("a,b")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "_a.txt").write_text("text")
    for name, message in {
        "empty": "no text in a known form; expected",
        "other": r"no text in a known form; it holds a\.csv; expected",
        "hidden": r"no text in a known form; it holds _a\.txt; expected",
        "none*.txt": "no such file or directory",
    }.items():
        with pytest.raises(TokensError, match=message):
            make(tmp_path / name)


def test_files_without_text_are_counted_and_named(make, tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    pq.write_table(pa.table({"text": pa.array([None, ""], pa.string())}), tmp_path / "null.parquet")
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.txt").write_text("some text")
    (tmp_path / "d.jsonl").write_bytes(b"")
    table, said = make(*(p for p in sorted(tmp_path.iterdir()) if p.suffix != ".table"))
    assert table.empty_files == 5
    for name in ("a.jsonl", "b.txt", "d.jsonl"):
        assert f"{name}: no document in it holds text" in said
    assert table.document_names()["file"].to_pylist() == ["b.txt", "c.txt", "null.parquet", "null.parquet"]


# -- settings and machines --------------------------------------------------------------------------------------------


def test_integers_of_other_kinds_are_integers(make, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*({"text": t} for t in TEXTS)))
    plain = {"seq_len": 16, "seed": 3, "skip_first": 2, "skip_ids": (7,)}
    table, _ = make(tmp_path / "a.jsonl", **plain)
    same = {"seq_len": np.int64(16), "seed": np.uint8(3), "skip_first": np.int32(2), "skip_ids": np.array([7])}
    assert make(tmp_path / "a.jsonl", **same)[0] == table
    for wrong in ({"seq_len": 16.0}, {"skip_ids": ["7"]}, {"seed": None}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*, expected a whole number"):
            TokenizeConfig(sources=("a",), tokenizer="t", out="o", **wrong)


@pytest.mark.parametrize("change", [{"out": ""}, {"out": "  "}, {"sources": ("",)}, {"sources": ("a", "")}])
def test_an_empty_place_is_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} is empty"):
        TokenizeConfig(**({"sources": ("a",), "tokenizer": "t", "out": "o"} | change))


def test_without_a_cache_directory_the_spool_is_temporary(make, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*({"text": t} for t in TEXTS)))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/nonexistent")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    table, said = make(tmp_path / "a.jsonl", out="memory://spool-test/t")
    assert table.tokens
    assert f"packed tokens wait in {tmp_path}/tmp/actstore-{os.getuid()}/tokenize/" in said
    clear_memory("memory://spool-test")
    mine = tmp_path / "tmp" / f"actstore-{os.getuid()}"
    for path in sorted(mine.rglob("*"), reverse=True):
        path.rmdir()
    mine.rmdir()
    mine.symlink_to(tmp_path)
    with pytest.raises(TokensError, match="belongs to another user; set XDG_CACHE_HOME or TMPDIR"):
        make(tmp_path / "a.jsonl", out="memory://spool-test/t")
    clear_memory("memory://spool-test")


def test_a_missing_key_is_called_that():
    assert one_line(KeyError("model")) == "'model' is missing"
    assert one_line(MemoryError()) == "MemoryError"


def test_a_copy_goes_on_and_carries_no_damage(make, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*({"text": t * 9} for t in TEXTS)))
    monkeypatch.setattr(build, "CHUNK_TOKENS", 64)
    monkeypatch.setattr(build, "CHUNK_SEQUENCES", 5)
    table, _ = make(tmp_path / "a.jsonl")
    assert row_starts(table)[-1] == table.tokens
    chunks = (p for p in (tmp_path / "table").rglob("c/**/*") if p.is_file())
    objects = {p.relative_to(tmp_path / "table"): p.read_bytes() for p in chunks}
    assert len(objects) > 40
    target = tmp_path / "store" / "tokens"
    copy_tokens(table, open_storage(str(tmp_path / "store")))
    (target / "zarr.json").unlink()
    (target / "ids" / "c" / "1" / "0").unlink()
    other = target / "ids" / "c" / "2" / "0"
    other.write_bytes(other.read_bytes()[:-1] + b"\0")
    (target / "document" / "c" / "0" / "0").write_bytes(b"cut")
    kept = target / "ids" / "c" / "3" / "0"
    before = kept.stat().st_ino
    assert copy_tokens(table, open_storage(str(tmp_path / "store"))) == table
    assert {p: (target / p).read_bytes() for p in objects} == objects
    assert kept.stat().st_ino == before, "a chunk that was there is copied again"
    (target / "zarr.json").unlink()
    bad = tmp_path / "table" / "ids" / "c" / "4" / "0"
    bad.write_bytes(bad.read_bytes()[:-1] + b"\0")
    (target / "ids" / "c" / "4" / "0").unlink()
    with pytest.raises(IntegrityError, match="ids/c/4/0 is damaged"):
        copy_tokens(table, open_storage(str(tmp_path / "store")))
    assert not (target / "zarr.json").exists()
