"""Tokens: packing loses nothing, row numbers match a brute count, and what is wrong is named."""

import gzip
import json
from dataclasses import replace
from io import StringIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from conftest import clear_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny import rows_of, tokenizer_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actstore import keyed
from actstore.errors import IntegrityError, MismatchError, StoreError, TokensError
from actstore.progress import Progress
from actstore.store.storage import open_storage
from actstore.tokens import RowRule, TokenizeConfig, copy_tokens, kept, open_tokens, row_starts, tokenize
from actstore.tokens.pack import Layout, framed, pack
from actstore.tokens.rule import leading_padding
from actstore.tokens.tokenizer import load_tokenizer

TEXTS = [f"Document {i}: the quick brown fox, {'jumps over ' * (i % 13)}the lazy dog.\n\nEnd é{i}." for i in range(60)]
QUIET = Progress(Console(file=StringIO()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    tokenizer_of(TEXTS).save_pretrained(folder / "tokenizer")
    rows = {"text": TEXTS, "title": [f"title {i}" for i in range(60)]}
    pq.write_table(pa.table(rows), folder / "text.parquet", row_group_size=17)
    return folder


@pytest.fixture
def config(folder, tmp_path):
    return TokenizeConfig(
        sources=(str(folder / "text.parquet"),),
        tokenizer=str(folder / "tokenizer"),
        seq_len=32,
        out=str(tmp_path / "table"),
    )


def unpacked(ids: np.ndarray, documents: np.ndarray, number: int) -> list[int]:
    """Token ids of a document, wherever it was cut."""
    return ids[documents == number].tolist()


# -- packing ----------------------------------------------------------------------------------------------------------

SPECIALS = st.sampled_from([(1, 2, 0), (1, 2, 2), (1, 1, 1), (None, 2, 2), (None, 2, 0), (1, None, 1), (None, None, 0)])
DOCUMENTS = st.lists(st.lists(st.integers(3, 99), max_size=40), min_size=1, max_size=25)


def packed(documents, specials, packing, seq_len, batch=1000, *, bos=True, given=True):
    """Sequences and document numbers [n, seq_len] of documents that come in batches, then what is left over."""
    bos_id, eos_id, pad_id = specials
    layout = Layout(packing=packing, seq_len=seq_len, bos=bos, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id)
    given = [given] * len(documents) if isinstance(given, bool) else given
    parts = [
        pack(documents[i : i + batch], given[i : i + batch], i, layout)[0] for i in range(0, len(documents), batch)
    ]
    ids, numbers = (np.concatenate(column) for column in zip(*parts, strict=True))
    whole = ids.size // layout.body * layout.body
    rest = ids[whole:], numbers[whole:]
    return *framed(ids[:whole].reshape(-1, layout.body), numbers[:whole].reshape(-1, layout.body), layout), *rest


@settings(deadline=None, max_examples=200)
@given(documents=DOCUMENTS, seq_len=st.integers(2, 17), specials=SPECIALS, batch=st.integers(1, 7), bos=st.booleans())
def test_joined_is_the_documents_with_eos_between_them_cut(documents, seq_len, specials, batch, bos):
    bos_id, eos, _ = specials
    ids, numbers, rest, rest_numbers = packed(documents, specials, "joined", seq_len, batch, bos=bos)
    first = [bos_id] if bos and bos_id is not None else []
    between = [] if eos is None else [(eos, -1)]
    stream = [p for n, d in enumerate(documents) for p in (between if n else []) + [(i, n) for i in d]]
    body = seq_len - len(first)
    cut = [stream[i : i + body] for i in range(0, len(stream) - body + 1, body)]
    assert ids.tolist() == [first + [i for i, _ in s] for s in cut]
    assert numbers.tolist() == [[-1] * len(first) + [n for _, n in s] for s in cut]
    assert list(zip(rest, rest_numbers, strict=True)) == stream[len(cut) * body :]


@settings(deadline=None, max_examples=200)
@given(documents=DOCUMENTS, seq_len=st.integers(2, 17), specials=SPECIALS, batch=st.integers(1, 7), bos=st.booleans())
def test_separate_never_puts_two_documents_in_a_sequence(documents, seq_len, specials, batch, bos):
    bos_id, _, pad = specials
    ids, numbers, rest, _ = packed(documents, specials, "separate", seq_len, batch, bos=bos)
    first = [bos_id] if bos and bos_id is not None else []
    body = seq_len - len(first)
    expected = []
    for n, document in enumerate(documents):
        for i in range(0, len(document), body):
            part = document[i : i + body]
            gap = body - len(part)
            expected.append((first + part + [pad] * gap, [-1] * len(first) + [n] * len(part) + [-2] * gap))
    assert list(zip(ids.tolist(), numbers.tolist(), strict=True)) == expected
    assert rest.size == 0


@settings(deadline=None, max_examples=200)
@given(data=st.data(), seq_len=st.integers(2, 17), specials=SPECIALS, batch=st.integers(1, 7))
def test_ready_is_what_it_was(data, seq_len, specials, batch):
    documents = data.draw(st.lists(st.lists(st.integers(0, 9), max_size=seq_len), min_size=1, max_size=20))
    ids, numbers, rest, _ = packed(documents, specials, "ready", seq_len, batch)
    expected = [d + [specials[2]] * (seq_len - len(d)) for d in documents]
    assert ids.tolist() == expected
    for n, (document, found) in enumerate(zip(documents, numbers.tolist(), strict=True)):
        roles = roles_of(document, specials) + [-2] * (seq_len - len(document))
        assert [min(r, 0) for r in found] == roles or max(roles) < 0 > max(found)
        assert {r for r in found if r >= 0} <= {n}
    assert rest.size == 0


def roles_of(ids, specials):
    """By hand: 0 for a token, -1 for BOS and EOS, -2 for padding in a document that came as ids."""
    bos, eos, pad = specials
    roles = [-1 if i in {bos, eos} else 0 for i in ids]
    front = next((n for n, i in enumerate(ids) if i != pad), len(ids))
    back = next((n for n, i in enumerate(reversed(ids)) if i != pad), len(ids))
    front -= pad == (eos if bos is None else bos) and front > 0
    back -= pad == eos and back > 0
    return [-2 if n < front or n >= len(ids) - back else r for n, r in enumerate(roles)]


@pytest.mark.parametrize("packing", ["joined", "separate"])
def test_special_ids_inside_documents_are_left_out_where_packing_puts_in_its_own(packing):
    ids, numbers, *_ = packed([[1, 5, 6, 2], [1, 7, 2, 0, 0]], (1, 2, 0), packing, 5)
    expected = {"joined": [[1, 5, 6, 2, 7]], "separate": [[1, 5, 6, 0, 0], [1, 7, 0, 0, 0]]}[packing]
    assert ids.tolist() == expected
    owner = {0: -2, 5: 0, 6: 0, 7: 1}
    assert numbers.tolist() == [[owner.get(i, -1) for i in s] for s in expected]


@settings(deadline=None, max_examples=200)
@given(data=st.data(), seq_len=st.integers(2, 9), specials=SPECIALS, packing=st.sampled_from(["joined", "separate"]))
def test_a_token_of_text_is_kept_whatever_its_id_is(data, seq_len, specials, packing):
    documents = data.draw(st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=6))
    are_ids = data.draw(st.lists(st.booleans(), min_size=len(documents), max_size=len(documents)))
    rule = RowRule(first_positions=data.draw(st.integers(0, 3)))
    ids, numbers, rest, rest_numbers = packed(documents, specials, packing, seq_len, 2, given=are_ids)
    flat, owners = np.concatenate([ids.ravel(), rest]), np.concatenate([numbers.ravel(), rest_numbers])
    for n, (document, is_ids) in enumerate(zip(documents, are_ids, strict=True)):
        roles = roles_of(document, specials) if is_ids else [0] * len(document)
        if max(roles, default=0) == 0:
            assert flat[owners == n].tolist() == [i for i, r in zip(document, roles, strict=True) if r == 0]
    mask = kept(ids, numbers, rule)
    assert np.array_equal(mask, (numbers >= 0) & (np.arange(seq_len) >= rule.first_positions))


def test_skipped_positions_count_from_the_first_token_that_is_no_padding():
    ids = np.array([[0, 0, 1, 5, 6, 7], [1, 5, 6, 7, 0, 0], [0, 0, 0, 0, 0, 0], [0, 5, 6, 7, 8, 9]], np.int32)
    numbers = np.array([[-2, -2, -1, 0, 0, 0], [-1, 1, 1, 1, -2, -2], [-2] * 6, [-2] + [3] * 5], np.int32)
    rows = [ids[n][kept(ids, numbers, RowRule(first_positions=2))[n]].tolist() for n in range(4)]
    assert rows == [[6, 7], [6, 7], [], [7, 8, 9]]
    rows = [ids[n][kept(ids, numbers, RowRule(ids=(7, 0)))[n]].tolist() for n in range(4)]
    assert rows == [[5, 6], [5, 6], [], [5, 6, 8, 9]]


@pytest.mark.parametrize("special", [{"pad_token": "the"}, {"eos_token": "the"}, {"pad_token": "<unk>"}])
def test_a_vocabulary_whose_special_id_is_a_common_token_loses_none(tmp_path, special):
    words = {w: i for i, w in enumerate(["<unk>", "the", "cat", "sat", "<s>", "</s>"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | special
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path / "t")
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "the cat sat the zebra"}) * 1 + "\n")
    for packing in ("joined", "separate"):
        out = str(tmp_path / packing)
        source = (str(tmp_path / "t.jsonl"),)
        table = tokenize(
            TokenizeConfig(sources=source, tokenizer=str(tmp_path / "t"), seq_len=8, out=out, packing=packing), QUIET
        )
        rows = rows_of(table, row_starts(table), 0, table.tokens)
        assert rows.token_id.tolist() == [1, 2, 3, 1, 0]
        assert table.special == 0


@pytest.mark.parametrize(("packing", "documents"), [("separate", [[5, 6], [7]]), ("ready", [[5, 6], [7]])])
def test_padding_needs_an_id_to_pad_with(packing, documents):
    assert packed(documents[:1], (None, None, None), packing, 2)[0].tolist() == [[5, 6]]
    with pytest.raises(TokensError, match="document 1 does not fill its last sequence"):
        packed(documents, (None, None, None), packing, 2)


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_table_holds_every_document_in_keyed_order(config, folder):
    table = tokenize(config, QUIET)
    ids, documents = table.ids(0, table.sequences), table.documents(0, table.sequences)
    order = keyed.permute(np.arange(table.sequences), table.sequences, keyed.key(config.seed, "sequences"))
    packed_ids, packed_documents = ids[order], documents[order]
    hf = tokenizer_of(TEXTS)
    reference = [hf(t, add_special_tokens=False)["input_ids"] for t in TEXTS]
    for number, expected in enumerate(reference):
        assert unpacked(packed_ids, packed_documents, number) == expected
        assert hf.decode(expected) == TEXTS[number]
    assert table.tokens == sum(map(len, reference))
    assert table.max_id == ids.max()
    names = table.document_names().to_pylist()
    assert [n["title"] for n in names] == [f"title {i}" for i in range(60)]
    assert [(n["document"], n["file"], n["source"], n["record"]) for n in names] == [
        (i, "text.parquet", "text.parquet", i) for i in range(60)
    ]
    other = tokenize(replace(config, seed=1, out=config.out + "1"), QUIET)
    moved = other.ids(0, other.sequences)
    assert sorted(map(tuple, moved)) == sorted(map(tuple, ids))
    assert not np.array_equal(moved, ids)
    assert other.fingerprint != table.fingerprint


def test_any_zarr_reader_opens_the_table(config):
    table = tokenize(config, QUIET)
    group = zarr.open_group(config.out, mode="r")
    assert np.array_equal(group["ids"][:], table.ids(0, table.sequences))
    assert np.array_equal(group["document"][:], table.documents(0, table.sequences))


def test_many_chunks_read_like_one(config, monkeypatch):
    whole = tokenize(config, QUIET)
    monkeypatch.setattr("actstore.tokens.build.CHUNK_TOKENS", 32 * 7)
    cut = tokenize(replace(config, out=config.out + "-cut"), QUIET)
    assert cut.fingerprint == whole.fingerprint
    for start, stop in [(0, 7), (3, 8), (6, 22), (whole.sequences - 1, whole.sequences), (5, 5)]:
        assert np.array_equal(cut.ids(start, stop), whole.ids(start, stop))
    with pytest.raises(ValueError, match="not within"):
        cut.ids(0, whole.sequences + 1)


def test_every_kind_of_source_gives_the_same_table(config, folder, tmp_path):
    expected = tokenize(config, QUIET)
    source = tmp_path / "sources"
    (source / "train").mkdir(parents=True)
    (source / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS[:10]) + "\n")
    with gzip.open(source / "b.jsonl.gz", "wt") as f:
        f.writelines(json.dumps({"text": t}) + "\n" for t in TEXTS[10:20])
    for i in range(20, 25):
        (source / f"c{i}.txt").write_text(TEXTS[i])
    (source / "dataset_info.json").write_text("{}")
    arrow = pa.table({"text": TEXTS[25:40]})
    with pa.ipc.new_stream(source / "d.arrow", arrow.schema) as writer:
        writer.write_table(arrow, max_chunksize=4)
    hf = tokenizer_of(TEXTS)
    ready = [[1, *hf(t, add_special_tokens=False)["input_ids"], 2] for t in TEXTS[40:]]
    pq.write_table(pa.table({"input_ids": ready}), source / "train" / "e.parquet")
    table = tokenize(replace(config, sources=(str(source),), out=config.out + "-mixed"), QUIET)
    assert table.fingerprint == expected.fingerprint
    files = [n["file"] for n in table.document_names().to_pylist()]
    assert files[9:11] == ["a.jsonl", "b.jsonl.gz"]
    assert files[-1] == "train/e.parquet"


def test_text_that_spells_a_special_token_is_text(folder, tmp_path):
    (tmp_path / "t.txt").write_text("one <eos> two <bos>")
    config = TokenizeConfig(
        sources=(str(tmp_path / "t.txt"),), tokenizer=str(folder / "tokenizer"), seq_len=64, out=str(tmp_path / "out")
    )
    table = tokenize(config, QUIET)
    (ids,), (documents,) = table.ids(0, 1), table.documents(0, 1)
    assert tokenizer_of(TEXTS).decode(ids[documents == 0].tolist()) == "one <eos> two <bos>"


@pytest.mark.parametrize(("bos", "eos", "pad"), [(None, "<eos>", None), ("<s>", "<s>", None), (None, None, "<pad>")])
def test_tokenizers_without_some_special_tokens(config, tmp_path, bos, eos, pad):
    tokenizer_of(TEXTS, bos=bos, eos=eos, pad=pad).save_pretrained(tmp_path / "t")
    table = tokenize(replace(config, tokenizer=str(tmp_path / "t")), QUIET)
    ids, documents = table.ids(0, table.sequences), table.documents(0, table.sequences)
    assert (table.bos_id is None) == (bos is None)
    assert np.array_equal(kept(ids, documents, table.rule), documents >= 0)
    assert row_starts(table)[-1] == table.tokens == (documents >= 0).sum()


def test_the_table_lives_on_any_storage_and_copies(config, tmp_path):
    here = tokenize(config, QUIET)
    there = tokenize(replace(config, out="memory://tokens-test/table"), QUIET)
    assert there == here
    assert np.array_equal(there.ids(0, there.sequences), here.ids(0, here.sequences))
    storage = open_storage(str(tmp_path / "store"))
    copy = copy_tokens(there, storage)
    assert copy == here
    assert np.array_equal(copy.documents(0, 5), here.documents(0, 5))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*")}
    copy_tokens(here, storage)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*")}
    other = tokenize(replace(config, seed=3, out=config.out + "3"), QUIET)
    with pytest.raises(TokensError, match="holds another token table"):
        copy_tokens(other, storage)
    clear_memory("memory://tokens-test")


def test_the_same_settings_return_the_table_and_others_are_refused(config, folder, tmp_path, monkeypatch):
    table = tokenize(config, QUIET)
    with monkeypatch.context() as m:
        m.setattr("actstore.tokens.build._fill", None)
        assert tokenize(config, QUIET) == table
    with pytest.raises(MismatchError, match=r"seed is 0, asked for 5; seq_len is 32, asked for 16\. Use another --out"):
        tokenize(replace(config, seed=5, seq_len=16), QUIET)


def test_an_interrupted_table_does_not_exist_and_is_made_again(config, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr("actstore.tokens.build.fingerprint", stop)
        with pytest.raises(KeyboardInterrupt):
            tokenize(config, QUIET)
    with pytest.raises(TokensError, match="not a token table"):
        open_tokens(config.out)
    table = tokenize(config, QUIET)
    assert table == tokenize(replace(config, out=config.out + "-clean"), QUIET)


# -- rows -------------------------------------------------------------------------------------------------------------


def test_rows_are_numbered_by_sequence_and_position(config):
    table = tokenize(config, QUIET)
    ids = table.ids(0, table.sequences)
    brute = [
        (s, p, ids[s, p])
        for s in range(table.sequences)
        for p in range(table.seq_len)
        if ids[s, p] not in (table.bos_id, table.eos_id, table.pad_id)
    ]
    starts = row_starts(table)
    assert starts[-1] == len(brute) == table.tokens
    for first, stop in [(0, len(brute)), (0, 1), (17, 60), (30, 31), (31, 62), (len(brute) - 1, len(brute))]:
        rows = rows_of(table, starts, first, stop)
        assert list(zip(rows.sequence, rows.position, rows.token_id, strict=True)) == brute[first:stop]
    documents = table.documents(0, table.sequences)
    everything = rows_of(table, starts, 0, len(brute))
    assert (documents[everything.sequence, everything.position] >= 0).all()
    with pytest.raises(ValueError, match="not within"):
        rows_of(table, starts, 0, len(brute) + 1)


# -- what is wrong is named -------------------------------------------------------------------------------------------


def test_wrong_places_are_named(config, folder, tmp_path):
    table = tokenize(config, QUIET)
    assert table.sequences
    store = tmp_path / "store"
    store.mkdir()
    (store / "zarr.json").write_text(json.dumps({"attributes": {"actstore": {}}}))
    (tmp_path / "empty").mkdir()
    zarr.create_group(tmp_path / "group")
    for path, message in [
        (tmp_path / "none", "no such directory, not a token table; make one with: actstore tokenize"),
        (tmp_path / "empty", "an empty directory"),
        (folder / "text.parquet", "a file"),
        (folder, r"a directory of .*\.parquet.* files"),
        (store, "this is an activation store; its token table is at"),
        (tmp_path / "group", "a zarr group without 'actstore_tokens'"),
    ]:
        with pytest.raises(TokensError, match=message):
            open_tokens(str(path))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sequences", -1, "sequences is -1"),
        ("seq_len", "32", "seq_len is '32'"),
        ("sequences", 10**6, r"shape is \[\d+, 32\], expected \[1000000, 32\]"),
        ("bos_id", 1.5, "bos_id is 1.5"),
        ("fingerprint", "../x", "fingerprint is"),
        ("format_version", 9, "format version is 9, this actstore reads 1; update actstore"),
        ("surprise", 1, "fields are"),
    ],
)
def test_damaged_attributes_are_named(config, tmp_path, name, value, message):
    tokenize(config, QUIET)
    path = tmp_path / "table" / "zarr.json"
    group = json.loads(path.read_text())
    group["attributes"]["actstore_tokens"][name] = value
    path.write_text(json.dumps(group))
    with pytest.raises(TokensError, match=message):
        open_tokens(config.out).ids(0, 1)


def test_damaged_and_missing_chunks_are_noticed(config, tmp_path):
    table = tokenize(config, QUIET)
    chunk = tmp_path / "table" / "ids" / "c" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(IntegrityError, match="ids/c/0/0 is damaged: its checksum"):
        table.ids(0, 1)
    chunk.unlink()
    with pytest.raises(StoreError, match="ids/c/0/0 is missing"):
        table.ids(0, 1)
    meta = tmp_path / "table" / "document" / "zarr.json"
    meta.write_text(meta.read_text().replace("zstd", "numcodecs.pickle"))
    with pytest.raises(TokensError, match=r"codecs is .*numcodecs\.pickle"):
        open_tokens(config.out).documents(0, 1)


def test_bad_text_and_tokenizers_are_named(config, folder, tmp_path):
    def refused(message, **changes):
        with pytest.raises(TokensError, match=message) as error:
            tokenize(replace(config, out=str(tmp_path / "bad"), **changes), QUIET)
        assert "\n" not in str(error.value)

    (tmp_path / "t.jsonl").write_text('{"text": "a"}\nnot json\n')
    (tmp_path / "l.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "e.txt").write_text("")
    (tmp_path / "p.parquet").write_text("not parquet")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"input_ids": [[5, 10**6]]}), tmp_path / "i.parquet")
    refused("nowhere: no such file or directory", sources=(str(tmp_path / "nowhere"),))
    refused("no text in a known form", sources=(str(folder / "tokenizer"),))
    refused(r"t.jsonl, line 2: not JSON", sources=(str(tmp_path / "t.jsonl"),))
    refused(r"no column 'text' or 'input_ids' among body; see --text-column", sources=(str(tmp_path / "b.parquet"),))
    refused(r"input_ids are 5..1000000", sources=(str(tmp_path / "i.parquet"),))
    refused(r"l.txt: text is not UTF-8: invalid start byte at 0; put", sources=(str(tmp_path / "l.txt"),))
    refused("damaged or not what its name says", sources=(str(tmp_path / "p.parquet"),))
    refused("no text found", sources=(str(tmp_path / "e.txt"),))
    refused("the directory has no tokenizer.json", tokenizer=str(tmp_path))
    refused("x.gguf: no such file", tokenizer=str(tmp_path / "x.gguf"))
    assert not list(tmp_path.glob("bad*"))
    tokenize(replace(config, sources=(str(tmp_path / "b.parquet"),), text_column="body"), QUIET)


def test_a_hub_id_that_can_not_be_reached_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TokensError, match="or reachable hub id") as error:
        load_tokenizer("nobody/nothing-at-all")
    assert "\n" not in str(error.value)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="sources is empty"):
        TokenizeConfig(sources=(), tokenizer="t", out="o")
    with pytest.raises(ValueError, match="seq_len is 1"):
        TokenizeConfig(sources=("a",), tokenizer="t", out="o", seq_len=1)


def test_where_a_sequence_begins() -> None:
    documents = [[-2, -2, -1, 0], [-1, 0, -2, -2], [-2, -2, -2, -2], [0, -2, 0, 0], [-2, 5, 5, -2]]
    assert leading_padding(np.array(documents, np.int32)).tolist() == [2, 0, 0, 0, 1]
