"""`tokenize` end to end: packings, row rules and sources; what is malformed is named or counted."""

import gzip
import json
import os
from dataclasses import replace
from io import StringIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny import rows_of, tokenizer_of

from actstore.errors import TokensError
from actstore.progress import Progress
from actstore.tokens import TokenizeConfig, build, documents, open_tokens, row_starts, tokenize
from actstore.tokens.sources import find_sources
from actstore.tokens.tokenizer import load_tokenizer

TEXTS = [f"Document {i}: the quick brown fox {'jumps over ' * (i % 13)}the lazy dog. é{i}" for i in range(200)]
QUIET = Progress(Console(file=StringIO()))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A tokenizer with padding 0, BOS 1, EOS 2."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer_of(TEXTS).save_pretrained(folder)
    return load_tokenizer(str(folder))


@pytest.fixture
def made(loaded, tmp_path, monkeypatch):
    """Tokenise files, given by name and content, into a table of its own."""
    monkeypatch.setattr(build, "load_tokenizer", lambda name: loaded)
    runs = iter(range(1000))

    def make(files, **options):
        source = tmp_path / f"source{next(runs)}"
        source.mkdir()
        for name, content in files.items():
            if isinstance(content, pa.Table):
                pq.write_table(content, source / name)
            else:
                (source / name).write_bytes(content)
        config = {"seq_len": 16, "tokenizer": "t", "out": str(source) + ".table"} | options
        return tokenize(TokenizeConfig(sources=(str(source),), **config), QUIET)

    return make


def jsonl(*rows):
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)


# -- ready input_ids, separate documents, row rules -------------------------------------------------------------------


def test_ready_sequences_are_stored_as_they_are(made):
    left, right, full, empty = [0, 0, 1, 5, 6], [1, 7, 8, 0], [9] * 8, []
    table = made(
        {"a.jsonl": jsonl(*({"input_ids": i} for i in (left, right, full, empty)))}, seq_len=8, packing="ready"
    )
    found = sorted(zip(table.ids(0, 4).tolist(), table.documents(0, 4).tolist(), strict=True))
    assert found == sorted([
        ([0, 0, 1, 5, 6, 0, 0, 0], [-2, -2, -1, 0, 0, -2, -2, -2]),
        ([1, 7, 8, 0, 0, 0, 0, 0], [-1, 1, 1, -2, -2, -2, -2, -2]),
        ([9] * 8, [2] * 8),
        ([0] * 8, [-2] * 8),
    ])  # fmt: skip
    assert (table.tokens, table.packing) == (12, "ready")


def test_separate_documents_go_on_in_further_sequences(made):
    table = made({"a.jsonl": jsonl({"input_ids": [*range(10, 20)]}, {"input_ids": [5]})}, seq_len=8, packing="separate")
    found = sorted(zip(table.ids(0, 3).tolist(), table.documents(0, 3).tolist(), strict=True))
    assert found == [
        ([1, 5, 0, 0, 0, 0, 0, 0], [-1, 1, -2, -2, -2, -2, -2, -2]),
        ([1, 10, 11, 12, 13, 14, 15, 16], [-1, 0, 0, 0, 0, 0, 0, 0]),
        ([1, 17, 18, 19, 0, 0, 0, 0], [-1, 0, 0, 0, -2, -2, -2, -2]),
    ]


def test_without_bos_sequences_start_with_a_token(made):
    files = {"a.jsonl": jsonl({"input_ids": [5, 6, 7, 8]})}
    table = made(files, seq_len=2, bos=False)
    assert sorted(table.ids(0, 2).tolist()) == [[5, 6], [7, 8]]
    assert not table.bos
    assert table.bos_id == 1


def test_what_nothing_can_pad_is_counted(monkeypatch, made, loaded):
    bare = replace(loaded, bos_id=None, eos_id=None, pad_id=None)
    monkeypatch.setattr(build, "load_tokenizer", lambda name: bare)
    files = {"a.jsonl": jsonl({"input_ids": [5, 6, 7, 8, 9]})}
    assert made(files, seq_len=3).left_out == 2
    assert made({"a.jsonl": jsonl({"input_ids": [5, 6, 7]})}, seq_len=3).left_out == 0
    for packing in ("separate", "ready"):
        with pytest.raises(TokensError, match="document 0 does not fill"):
            made(files, seq_len=6, packing=packing)


RULES = st.fixed_dictionaries({"skip_first": st.integers(0, 15), "skip_ids": st.sets(st.integers(0, 40), max_size=5)})


@settings(deadline=None, max_examples=25)
@given(rule=RULES, ids=st.lists(st.lists(st.integers(0, 40), max_size=20), min_size=1, max_size=8))
def test_row_rules_agree_with_a_brute_count(rule, ids, loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rule")
    (folder / "a.jsonl").write_bytes(jsonl(*({"input_ids": i} for i in [*ids, [50] * 40])))
    config = TokenizeConfig(sources=(str(folder / "a.jsonl"),), tokenizer="t", seq_len=16, out=str(folder / "t"))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(build, "load_tokenizer", lambda name: loaded)
        table = tokenize(replace(config, skip_first=rule["skip_first"], skip_ids=tuple(rule["skip_ids"])), QUIET)
        default = tokenize(replace(config, out=str(folder / "d")), QUIET)
    stored_ids, documents = table.ids(0, table.sequences), table.documents(0, table.sequences)
    brute = [
        (s, p)
        for s in range(table.sequences)
        for p in range(rule["skip_first"], 16)
        if documents[s, p] >= 0 and stored_ids[s, p] not in rule["skip_ids"]
    ]
    stripped = [bytes(i).strip(b"\0").translate(None, b"\1\2") for i in [*ids, [50] * 40]]
    assert (documents >= 0).sum() == default.tokens == sum(map(len, stripped))
    assert default.special == sum(map(len, [*ids, [50] * 40])) - default.tokens
    starts = row_starts(table)
    rows = rows_of(table, starts, 0, int(starts[-1]))
    assert list(zip(rows.sequence, rows.position, strict=True)) == brute
    assert len(brute) == table.tokens
    assert np.array_equal(stored_ids, default.ids(0, default.sequences))
    is_default = not rule["skip_first"] and not rule["skip_ids"]
    assert (table.fingerprint == default.fingerprint) == is_default
    assert open_tokens(str(folder / "t")) == table


def test_rules_that_can_not_be_are_refused(made):
    files = {"a.jsonl": jsonl({"input_ids": [5, 6, 7]})}
    with pytest.raises(TokensError, match="nothing to write"):
        made(files, skip_ids=(5, 6, 7))
    with pytest.raises(TokensError, match="nothing to write"):
        made(files, skip_first=4)
    with pytest.raises(ValueError, match="skip_first is 16, expected 0 to 15"):
        made(files, skip_first=16)
    with pytest.raises(ValueError, match="skip_ids holds -1"):
        made(files, skip_ids=(5, -1))
    with pytest.raises(ValueError, match=r"skip_ids holds 999999, but .* has \d+ ids"):
        made(files, skip_ids=(5, 999_999))


GOLDEN = """{
  "zarr_format": 3,
  "node_type": "group",
  "attributes": {
    "actstore_tokens": {
      "format_version": 1,
      "fingerprint": "2e0aa6920925e742b6be3a63337943fa",
      "sequences": 940,
      "tokens": 119203,
      "max_id": 4094,
      "seq_len": 128,
      "seed": 0,
      "text_column": "text",
      "tokenizer": "builtin",
      "tokenizer_digest": "e60e30438212eb32225220c8cffe7917",
      "vocab_size": 4096,
      "bos_id": 2,
      "eos_id": 1,
      "pad_id": 0,
      "sources": [
        {
          "name": "heldout.parquet",
          "bytes": 144964,
          "sample": "bbbf762c5eaef6d19a9e46079427f604"
        }
      ]
    }
  }
}"""
"""Attributes of a table of defaults."""


def test_a_default_table_is_what_it_was(tmp_path):
    config = TokenizeConfig(sources=("builtin-heldout",), tokenizer="builtin", seq_len=128, out=str(tmp_path / "t"))
    table = tokenize(config, QUIET)
    assert (tmp_path / "t" / "zarr.json").read_text() == GOLDEN
    assert (table.packing, table.bos, table.skip_first, table.skip_ids, table.skipped) == ("joined", True, 0, (), 0)


@pytest.mark.parametrize(
    "change",
    [{"packing": "loose"}, {"bos": 1}, {"skip_ids": [-1]}, {"skip_ids": 3}, {"skip_first": -1}, {"skipped": "1"}],
)
def test_damaged_options_are_named(made, tmp_path, change):
    made({"a.jsonl": jsonl({"input_ids": [5]})}, out=str(tmp_path / "t"))
    path = tmp_path / "t" / "zarr.json"
    group = json.loads(path.read_text())
    group["attributes"]["actstore_tokens"] |= change
    path.write_text(json.dumps(group))
    with pytest.raises(TokensError, match=f"{next(iter(change))} is .* which can't be"):
        open_tokens(str(tmp_path / "t"))


# -- malformed documents ----------------------------------------------------------------------------------------------

GOOD = {"text": "the quick brown fox"}
LINES = [
    (b"not json", "not JSON: "),
    (b'{"text": "cut', "not JSON: "),
    (b'{"text": "\xff"}', "not JSON: 'utf-8' codec"),
    (b"[" * 100_000, "not JSON: "),
    (b'["text"]', "JSON, but list, expected an object"),
    (b'{"body": "a"}', "no field 'text' or 'input_ids'; see --text-column"),
    (b'{"text": 5}', "text is int, expected text or token ids"),
    (b'{"text": {"a": 1}}', "text is dict"),
    (b'{"text": "\\ud800"}', "text is not UTF-8"),
    (b'{"input_ids": [3, true]}', "input_ids holds True, expected token ids"),
    (b'{"input_ids": [3, 4.5]}', "input_ids holds 4.5"),
    (b'{"input_ids": [3, null]}', "input_ids holds None"),
    (b'{"input_ids": [[3]]}', r"input_ids holds \[3\]"),
    (b'{"input_ids": [3, -1]}', r"input_ids are -1\.\.3, but .* ids"),
    (b'{"input_ids": [3, 100000]}', r"input_ids are 3\.\.100000"),
    (b'{"input_ids": [3, 4294967299]}', r"input_ids are 3\.\.4294967299"),
    (b'{"input_ids": [3, 1267650600228229401496703205376]}', r"input_ids are 3\.\.1267650600228229401496703205376"),
]


@pytest.mark.parametrize(("line", "message"), LINES, ids=range(len(LINES)))
def test_a_malformed_line_is_named_or_counted(made, line, message):
    with pytest.raises(TokensError, match=rf"^a\.jsonl, line 3: {message}.*--on-error skip$"):
        made({"a.jsonl": jsonl(GOOD, b"", line, GOOD)})
    table = made({"a.jsonl": jsonl(GOOD, b"", line, GOOD)}, on_error="skip")
    assert table.skipped == 1
    assert table.fingerprint == made({"a.jsonl": jsonl(GOOD, GOOD)}).fingerprint
    assert [(n["document"], n["record"]) for n in table.document_names().to_pylist()] == [(0, 0), (1, 3)]


READY = {"input_ids": [1, 5, 6]}


@pytest.mark.parametrize(
    ("line", "message"),
    [({"input_ids": [5] * 17}, "17 input_ids, but --packing ready with --seq-len 16"), (GOOD, "text, but --packing")],
)
def test_what_is_no_ready_sequence_is_named_or_counted(made, line, message):
    with pytest.raises(TokensError, match=rf"^a\.jsonl, line 2: {message}"):
        made({"a.jsonl": jsonl(READY, line)}, packing="ready")
    assert made({"a.jsonl": jsonl(READY, line)}, packing="ready", on_error="skip").skipped == 1


def no_utf8():
    return pa.array([b"good", b"\xff\xfe", b"also good"], pa.binary()).view(pa.string())


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("text", no_utf8(), "text is not UTF-8: invalid start byte at 0"),
        ("input_ids", [[3], [4, None], [5]], "input_ids holds None"),
        ("input_ids", [[3], [-4, 4], [5]], r"input_ids are -4\.\.4"),
        ("input_ids", [[3], [2**40], [5]], "input_ids are 1099511627776"),
    ],
)
def test_a_malformed_record_is_named_or_counted(made, column, values, message):
    files = {"a.parquet": pa.table({column: values})}
    with pytest.raises(TokensError, match=rf"^a\.parquet, record 1: {message}"):
        made(files)
    table = made(files, on_error="skip")
    assert table.skipped == 1
    assert [n["record"] for n in table.document_names().to_pylist()] == [0, 2]


def test_columns_of_another_type_and_files_without_utf8_hold_no_document(made):
    for values in ([True, False], [1.5], [[True]]):
        files = {"a.parquet": pa.table({"text": values}), "b.jsonl": jsonl(GOOD)}
        assert made(files, on_error="skip").skipped == len(values)
    files = {"a.txt": b"caf\xe9", "b.txt": b"plain"}
    with pytest.raises(TokensError, match=r"^a\.txt: text is not UTF-8"):
        made(files)
    assert made(files, on_error="skip").skipped == 1


def test_text_in_binary_large_and_dictionary_columns_is_text(made):
    texts = pa.array(["one", "two é", "one", None])
    tables = [pa.table({"text": texts.cast(t)}) for t in (pa.string(), pa.large_string(), pa.binary())]
    tables.append(pa.table({"text": texts.dictionary_encode()}))
    assert len({made({"a.parquet": t}).fingerprint for t in tables}) == 1


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet"])
def test_a_damaged_file_is_an_error_always(made, tmp_path, kind):
    lines = jsonl(*({"text": os.urandom(200).hex()} for _ in range(500)))
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "t")
    whole = {"gz": gzip.compress(lines), "zst": zstandard.compress(lines), "parquet": (tmp_path / "t").read_bytes()}[
        kind
    ]
    name = "a.parquet" if kind == "parquet" else f"a.jsonl.{kind}"
    assert made({name: whole}).tokens
    for damaged in (whole[:-20], whole[: len(whole) // 2]):
        with pytest.raises(TokensError, match=rf"^{name}: the file is damaged"):
            made({name: damaged}, on_error="skip")


# -- a data set that `datasets` saved ---------------------------------------------------------------------------------


def save_to_disk(folder, texts, shards):
    """What datasets.Dataset.save_to_disk writes (5.2.0), and a cache that `map` leaves beside it."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    for i, name in enumerate([*names, "cache-8dadd2c40eeee7bc.arrow"]):
        table = pa.table({"text": texts[i::shards] if i < shards else texts})
        with pa.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_saved_data_set_is_its_data_files(tmp_path):
    save_to_disk(tmp_path / "set", TEXTS, 3)
    names = ["data-00000-of-00003.arrow", "data-00001-of-00003.arrow", "data-00002-of-00003.arrow"]
    files = find_sources((str(tmp_path / "set"),)).files
    assert [f.name for f in files] == names
    found = [d.content for f in files for b in documents.batches(f, "text") for d in b]
    assert found == [t for i in range(3) for t in TEXTS[i::3]]
    (tmp_path / "set" / names[1]).unlink()
    with pytest.raises(TokensError, match=rf"{names[1]} is missing"):
        find_sources((str(tmp_path / "set"),))


def test_splits_are_never_mixed_silently(tmp_path):
    for split in ("train", "test"):
        save_to_disk(tmp_path / "dict" / split, TEXTS, 1)
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(TokensError, match="a DatasetDict of the splits train, test; name one split's directory"):
        find_sources((str(tmp_path / "dict"),))
    assert len(find_sources((str(tmp_path / "dict" / "train"),)).files) == 1
    (tmp_path / "dict" / "dataset_dict.json").write_text("[]")
    with pytest.raises(TokensError, match=r"dataset_dict\.json is none that datasets\.save_to_disk writes"):
        find_sources((str(tmp_path / "dict"),))
