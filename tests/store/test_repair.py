"""Repair captures again what is condemned and nothing else; extended, padded and ruled stores are right row by row."""

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from rich.console import Console
from tiny import save

from actstore.capture import CaptureConfig, capture, parse_sites
from actstore.capture import execute as execute_module
from actstore.capture import memory as memory_module
from actstore.capture.config import RepairConfig
from actstore.capture.forward import activations
from actstore.capture.model import load_model
from actstore.capture.repair import repair
from actstore.capture.segments import open_segments
from actstore.errors import CaptureError, IntegrityError, MismatchError, StoreError
from actstore.progress import Progress
from actstore.store import open_store, open_writer
from actstore.store.maintain.info import describe
from actstore.store.maintain.repair import commit_version
from actstore.store.maintain.verify import verify
from actstore.store.storage import open_storage
from actstore.store.write import protocol
from actstore.tokens import TokenizeConfig, tokenize

pytestmark = pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")
TEXTS = [f"Document {i}: the quick brown fox, {'jumps over ' * (i % 17)}the lazy dog.\n\nEnd {i}." for i in range(100)]
QUIET = Progress(Console(file=StringIO()))
SITES = ("resid_post.1", "mlp_out.0", "attn_out.1", "resid_pre.0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repair")
    save(folder / "gemma", "gemma2", torch.float32, TEXTS)
    for name, texts in (("text", TEXTS), ("more", [t.replace("fox", "cat") for t in TEXTS])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    make_tokens(folder, "tokens", "text.jsonl")
    make_tokens(folder, "more", "more.jsonl")
    return folder


def make_tokens(folder, out, source, **options):
    config = {"sources": (str(folder / source),), "tokenizer": str(folder / "gemma"), "out": str(folder / out)}
    return tokenize(TokenizeConfig(**config | {"seq_len": 32} | options), QUIET)


@pytest.fixture
def config(folder, tmp_path, in_process):
    return CaptureConfig(
        model=str(folder / "gemma"),
        tokens=str(folder / "tokens"),
        sites=SITES,
        out=str(tmp_path / "store"),
        batch_size=3,
        bucket_rows=512,
        shard_rows=256,
        chunk_rows=64,
        device="cpu",
    )


@pytest.fixture
def mender(folder):
    return RepairConfig(model=str(folder / "gemma"), device="cpu")


def files(store: Path) -> dict[str, tuple[int, bytes]]:
    found = {str(p.relative_to(store)): p for p in store.rglob("*") if p.is_file()}
    return {k: (p.stat().st_mtime_ns, p.read_bytes()) for k, p in found.items() if not k.startswith("events/")}


def plain(key: str, data: bytes) -> bytes:
    """A shard without the mark of its attempt, 16 bytes before the index."""
    at = len(data) - 4 - 16 * (4 if key.partition("/")[0] in SITES else 8)
    return data[: at - 16] + data[at:] if "/c/" in key and not key.startswith("tokens/") else data


def flip(path: Path, at: int = 40) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# -- repair -----------------------------------------------------------------------------------------------------------


def test_only_damaged_objects_are_put_and_they_are_what_they_were(config, mender):
    capture(config, QUIET)
    store = Path(config.out)
    before = files(store)
    flip(store / "resid_post.1/c/3/0")
    (store / "mlp_out.0/c/2/0").unlink()
    flip(store / "sequence/c/4")
    shutil.copy(store / "attn_out.1/c/0/0", store / "attn_out.1/c/1/0")
    flip(store / "mlp_out.0/zarr.json")
    damaged = {k for k, (_, data) in before.items() if not (store / k).exists() or (store / k).read_bytes() != data}
    assert {d.key for d in verify(open_storage(config.out), deep=True).damage} == damaged
    for path in store.rglob("*"):
        if path.is_file() and str(path.relative_to(store)) not in damaged:
            path.chmod(0o444)

    done = repair(config.out, mender, QUIET)

    assert (done.damaged_objects, done.made_anew, done.buckets, done.buckets_repaired) == (5, 1, 3, 3)
    after = files(store)
    assert {k: plain(k, data) for k, (_, data) in after.items()} == {k: plain(k, x) for k, (_, x) in before.items()}
    assert {k for k in after if after[k][0] != before[k][0]} == damaged
    assert repair(config.out, mender, QUIET).damaged_objects == 0


@pytest.mark.parametrize("how", ["flipped", "gone", "an intent"])
def test_a_bucket_without_record_is_captured_again(config, mender, how, monkeypatch):
    capture(config, QUIET)
    fingerprint, storage = open_store(config.out).fingerprint, open_storage(config.out)
    record = Path(config.out) / "commits/00000001.json"
    if how == "flipped":
        flip(record, 200)
    elif how == "gone":
        record.unlink()
    else:  # a repair that was killed after it took the bucket over
        version = commit_version(storage, 1)
        assert isinstance(protocol.run(storage, protocol.take_over(1, protocol.new_id(), version)), protocol.Attempt)
    assert verify(storage, deep=False).damage
    done = repair(config.out, mender, QUIET)
    assert (done.buckets, done.buckets_repaired) == (1, 0)
    assert not verify(storage, deep=True).damage
    assert open_store(config.out).fingerprint == fingerprint


def test_rows_that_come_out_differently_replace_the_bucket_as_a_whole(config, mender, monkeypatch):
    capture(config, QUIET)
    storage, store = open_storage(config.out), open_store(config.out)
    before = {k: data for k, (_, data) in files(Path(config.out)).items()}
    flip(Path(config.out) / "resid_post.1/c/2/0")
    import actstore.capture.bucket as bucket_module

    real = bucket_module.activations

    def other(*args, **options):
        return {name: x * 1.5 for name, x in real(*args, **options).items()}

    monkeypatch.setattr(bucket_module, "activations", other)
    done = repair(config.out, mender, QUIET)
    assert (done.buckets, done.buckets_repaired) == (1, 0)
    assert not verify(storage, deep=True).damage
    after = {k: data for k, (_, data) in files(Path(config.out)).items()}
    changed = {k for k in after if after[k] != before.get(k)}
    shards = {f"{site}/c/{i}/0" for site in SITES for i in (2, 3)}
    assert {k for k in changed if not k.startswith("manifest")} == shards | {
        "commits/00000001.json", *(f"{name}/c/1" for name in ("sequence", "position", "token_id"))
    }  # fmt: skip
    assert open_store(config.out).rows == store.rows


def test_a_manifest_that_cannot_be_read_is_made_anew_without_a_model(config, monkeypatch):
    capture(config, QUIET)
    before = files(Path(config.out))
    flip(Path(config.out) / "manifest.json", 3000)
    monkeypatch.setattr(execute_module, "Pool", None)
    done = repair(config.out, RepairConfig(model="/nowhere"), QUIET)
    assert (done.damaged_objects, done.made_anew, done.buckets) == (1, 1, 0)
    assert {k: d for k, (_, d) in files(Path(config.out)).items()} == {k: d for k, (_, d) in before.items()}


@pytest.mark.parametrize("how", ["flipped", "gone"])
@pytest.mark.parametrize("what", ["*/*.parquet", "*.json"])
def test_each_object_of_the_manifest_is_made_again(config, what, how, monkeypatch):
    capture(config, QUIET)
    before = {k: d for k, (_, d) in files(Path(config.out)).items()}
    victim = min((Path(config.out) / "manifest").glob(what))
    if how == "flipped":
        flip(victim)
    else:
        victim.unlink()
    monkeypatch.setattr(execute_module, "Pool", None)
    assert repair(config.out, RepairConfig(model="/nowhere"), QUIET).damaged_objects > 0
    assert {k: d for k, (_, d) in files(Path(config.out)).items()} == before
    assert not verify(open_storage(config.out), deep=True).damage


def test_what_cannot_be_made_again_is_refused_and_nothing_changes(config, mender, folder, tmp_path):
    config = replace(config, encoding="fixed:1e-3")
    capture(config, QUIET)
    flip(Path(config.out) / "calibration/mlp_out.0/c/0/0")
    flip(Path(config.out) / "resid_post.1/c/3/0")
    before = files(Path(config.out))
    with pytest.raises(StoreError, match=r"1 damaged objects can't be made again, for example calibration/mlp_out\.0"):
        repair(config.out, mender, QUIET)
    assert files(Path(config.out)) == before


def test_another_model_is_refused(config, mender, tmp_path):
    capture(config, QUIET)
    flip(Path(config.out) / "resid_post.1/c/3/0")
    with pytest.raises(CaptureError, match="model gemma: no such directory"):
        repair(config.out, replace(mender, model=None), QUIET)  # "gemma" was a directory
    save(tmp_path / "other", "gemma2", torch.bfloat16, TEXTS)
    with pytest.raises(MismatchError, match="the model on this worker differs: weights is"):
        repair(config.out, replace(mender, model=str(tmp_path / "other")), QUIET)
    assert verify(open_storage(config.out), deep=True).damage


def test_a_store_that_was_not_captured_is_told_so(known, mender):
    flip(Path(known.url) / "resid_post.3/c/3/0")
    with pytest.raises(StoreError, match="its provenance names no model, so it was not captured"):
        repair(known.url, mender, QUIET)


# -- extension --------------------------------------------------------------------------------------------------------


def test_an_extended_store_holds_both_tables_and_its_rows_lead_back_to_their_text(config, folder, mender):
    first = capture(config, QUIET)
    before = {k: v for k, v in files(Path(config.out)).items() if "/c/" in k or k.startswith("commits/")}
    more = replace(config, tokens=str(folder / "more"), extend=True, rows=1000)
    second = capture(more, QUIET)
    assert (second.rows, second.rows_captured) == (first.rows + 1000, 1000)
    assert capture(more, QUIET).buckets == 0
    after = files(Path(config.out))
    assert all(after[k] == before[k] for k in before)
    check_rows(config, folder, sample=1000)
    flip(Path(config.out) / f"mlp_out.0/c/{-(-first.rows // 512) * 2 + 1}/0")
    assert repair(config.out, mender, QUIET).buckets_repaired == 1
    check_rows(config, folder, sample=100)


def test_an_extension_is_refused_field_by_field(config, folder):
    capture(config, QUIET)
    more = replace(config, tokens=str(folder / "more"), extend=True)
    with pytest.raises(CaptureError, match="has these tokens already; --extend is for others"):
        capture(replace(more, tokens=config.tokens), QUIET)
    with pytest.raises(MismatchError, match=r"batch_size is 3, asked for 4; seed is 0, asked for 7; .*sites\.mlp_out"):
        capture(replace(more, batch_size=4, seed=7, sites=("resid_post.1",)), QUIET)
    with pytest.raises(StoreError, match="no activation store"):
        capture(replace(more, out=f"{config.out}-none"), QUIET)
    assert open_store(config.out).spec.short_buckets == ()


# -- rows -------------------------------------------------------------------------------------------------------------


def check_rows(config, folder, *, sample: int) -> None:
    """Random rows: their sequence through the model alone, unpadded, gives them within bfloat16 rounding."""
    store, model = open_store(config.out), load_model(config.model)
    group = zarr.open_group(config.out, mode="r")
    columns = {n: group[n][:] for n in ("sequence", "position", "token_id", *SITES)}
    committed = np.concatenate([np.arange(*store.spec.bucket_range(int(b))) for b in store.index.buckets])
    segments = open_segments(store.storage, store.spec)
    chosen = np.random.default_rng(0).choice(committed, min(sample, len(committed)), replace=False)
    by_sequence: dict[int, list[int]] = {}
    for i in chosen:
        by_sequence.setdefault(int(columns["sequence"][i]), []).append(int(i))
    for sequence, rows in by_sequence.items():
        segment = [s for s in segments if s.first_sequence <= sequence][-1]
        table = segment.tokens
        (ids,) = table.ids(sequence - segment.first_sequence, sequence - segment.first_sequence + 1)
        left = 0
        while ids[left] == table.pad_id:
            left += 1
        position = columns["position"][rows]
        assert np.array_equal(ids[position], columns["token_id"][rows])
        assert not np.isin(ids[position], table.rule.ids).any()
        assert (position >= table.rule.first_positions).all()
        found = activations(model, torch.from_numpy(ids[None, left:]).long(), parse_sites(SITES))
        for site in SITES:
            expected = found[site][0, position - left].float()
            stored = torch.from_numpy(columns[site][rows].astype(np.float32))
            torch.testing.assert_close(stored, expected, rtol=2**-5, atol=2**-5 * float(expected.abs().mean()))


def test_a_thousand_rows_are_what_their_sequence_gives_again(config, folder):
    capture(config, QUIET)
    check_rows(config, folder, sample=1000)


@pytest.mark.parametrize("options", [{"packing": "separate"}, {"bos": False}, {"skip_first": 3, "skip_ids": (70, 71)}])
def test_other_packings_and_rules(config, folder, tmp_path, options):
    table = make_tokens(folder, f"tokens-{next(iter(options))}", "text.jsonl", **options)
    config = replace(config, tokens=table.storage.url)
    assert capture(config, QUIET).rows == table.tokens
    assert capture(config, QUIET).buckets == 0
    check_rows(config, folder, sample=300)
    found = open_store(config.out).provenance["tokens"]
    assert options.items() <= (found | {"skip_ids": tuple(found.get("skip_ids", ()))}).items()


def test_sequences_padded_on_either_side_and_short_ones(config, folder, tmp_path):
    rng = np.random.default_rng(1)
    lines = []
    for i in range(120):
        length = int(rng.integers(1, 31))
        body, pad = [1, *rng.integers(3, 300, length).tolist()], [0] * (31 - length)
        lines.append(pad + body if i % 3 == 0 else body + pad if i % 3 == 1 else body)
    (folder / "ready.jsonl").write_text("".join(json.dumps({"input_ids": x}) + "\n" for x in lines))
    table = make_tokens(folder, "tokens-ready", "ready.jsonl", packing="ready")
    config = replace(config, tokens=str(folder / "tokens-ready"))
    assert capture(config, QUIET).rows == table.tokens == sum(sum(i > 2 for i in x) for x in lines)
    check_rows(config, folder, sample=2000)


def test_what_does_not_fit_in_memory_is_refused_before_anything_is_made(config, monkeypatch):
    monkeypatch.setattr(memory_module, "free_memory", lambda: 10_000_000)
    with pytest.raises(CaptureError, match=r"needs .* GB per worker for 1 worker, 0\.01 GB are free"):
        capture(config, QUIET)
    assert not Path(config.out).exists()


def test_a_bad_runtime_environment_is_refused_before_anything_is_made(config, tmp_path):
    for name, text in (("none.json", None), ("bad.json", "{"), ("list.json", "[]"), ("vars.json", '{"env_vars": 5}')):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"runtime_env .*{name}: "):
            capture(replace(config, runtime_env=tmp_path / name), QUIET)
    assert not Path(config.out).exists()


def test_the_log_says_what_happened_and_names_no_path(config, folder):
    done = capture(config, QUIET)
    storage = open_storage(config.out)
    (key,) = storage.list("events")
    text = storage.get(key).decode()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [e["event"] for e in lines] == ["capture", "worker", *["bucket"] * done.buckets, "done"]
    assert lines[0]["rows"] == done.rows == lines[-1]["rows_captured"]
    assert done.bound in ("forward", "encode", "upload")
    assert str(folder) not in text
    assert config.out not in text


def test_damaged_tokens_of_a_store_are_an_error(config):
    capture(config, QUIET)
    flip(Path(config.out) / "resid_post.1/c/3/0")
    chunk = next((Path(config.out) / "tokens/ids/c").rglob("0/0"))
    flip(chunk)
    with pytest.raises(IntegrityError, match="tokens/ids/c/0/0 is damaged"):
        repair(config.out, RepairConfig(model=config.model, device="cpu"), QUIET)


def test_a_writer_sees_buckets_of_an_extension_in_work(config, folder):
    capture(config, QUIET)
    buckets = open_writer(config.out).buckets
    real = execute_module.Pool.run

    class Interrupted(execute_module.Pool):
        def run(self, tasks, done):
            real(self, tasks[:1], done)
            raise KeyboardInterrupt

    more = replace(config, tokens=str(folder / "more"), extend=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute_module, "Pool", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            capture(more, QUIET)
    assert open_store(config.out).spec.buckets == buckets
    figures = describe(open_store(config.out))
    assert figures["complete"]
    assert (figures["extension_buckets"], figures["extension_planned_buckets"]) == (1, buckets)
    assert open_writer(config.out).committed() == set(range(buckets + 1))
    assert capture(more, QUIET).buckets_before == buckets + 1
    check_rows(config, folder, sample=200)
