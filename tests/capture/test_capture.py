"""Capture: every stored row is the model's own number, whoever captured it and whatever was killed meanwhile."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import zarr
from conftest import without_mark
from rich.console import Console
from tiny import config_of, model_of, rows_of, save, save_gguf, tokenizer_of

from actstore import keyed
from actstore.capture import CaptureConfig, bucket, capture, parse_sites
from actstore.capture import execute as execute_module
from actstore.capture import model as model_module
from actstore.capture import run as run_module
from actstore.capture import worker as worker_module
from actstore.capture.bucket import bucket_rows
from actstore.capture.forward import activations, decoder_of
from actstore.capture.model import load_config, load_model, model_identity
from actstore.capture.precision import saved_precision
from actstore.errors import CaptureError, EncodingError, MismatchError, TokensError
from actstore.progress import Progress
from actstore.store import StoreWriter, open_store, open_writer
from actstore.store.format import manifest, record
from actstore.store.maintain.verify import verify
from actstore.store.read.index import read_record
from actstore.store.storage import PARTIAL, open_storage
from actstore.store.write import finalise, protocol
from actstore.tokens import TokenizeConfig, TokenTable, open_tokens, row_starts, span_of, tokenize
from actstore.tokens.tokenizer import load_tokenizer

TEXTS = [f"Document {i}: the quick brown fox, {'jumps over ' * (i % 13)}the lazy dog.\n\nEnd {i}." for i in range(120)]
QUIET = Progress(Console(file=StringIO()))
pytestmark = pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")
SITES = "resid_post.2,mlp_out.1,attn_out.1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bfloat16 Gemma 2 and a float32 Llama with their tokenizer, and a token table of about 3,800 rows."""
    folder = tmp_path_factory.mktemp("capture")
    save(folder / "gemma", "gemma2", torch.bfloat16, TEXTS)
    save(folder / "llama", "llama", torch.float32, TEXTS)
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    config = TokenizeConfig(
        sources=(str(text),), tokenizer=str(folder / "gemma"), seq_len=32, out=str(folder / "tokens")
    )
    tokenize(config, QUIET)
    return folder


@pytest.fixture
def config(folder, tmp_path):
    return CaptureConfig(
        model=str(folder / "gemma"),
        tokens=str(folder / "tokens"),
        sites=(SITES,),
        out=str(tmp_path / "store"),
        batch_size=3,
        bucket_rows=512,
        shard_rows=256,
        chunk_rows=64,
        threads=1,
        device="cpu",
        dtype="bfloat16",
    )


def expected_rows(config: CaptureConfig, site: str, attention: str = "eager") -> np.ndarray:
    """Row by row values of a site in row order, from transformers alone, in the batches that capture promises."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(config.model, attn_implementation=attention).eval()
    kind, layer = site.split(".")
    layer = int(layer)
    block = decoder_of(model).layers[layer]
    seen = []
    if kind == "attn_out":
        block.self_attn.o_proj.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    elif kind == "mlp_out":
        block.post_feedforward_layernorm.register_forward_hook(lambda _m, _i, output: seen.append(output))
    table = open_tokens(config.tokens)
    starts = row_starts(table)
    total = min(config.rows or table.tokens, table.tokens)
    values = []
    for first in range(0, total, config.bucket_rows):
        rows = rows_of(table, starts, first, min(first + config.bucket_rows, total))
        sequences = range(rows.sequence[0], rows.sequence[-1] + 1)
        for i in range(0, len(sequences), config.batch_size):
            batch = sequences[i : i + config.batch_size]
            with torch.inference_mode():
                ids = torch.from_numpy(table.ids(batch[0], batch[-1] + 1)).long()
                out = decoder_of(model)(input_ids=ids, output_hidden_states=True, use_cache=False)
            x = out.hidden_states[layer + 1] if kind == "resid_post" else seen.pop()
            here = (rows.sequence >= batch[0]) & (rows.sequence <= batch[-1])
            values.append(x[rows.sequence[here] - batch[0], rows.position[here]])
    return torch.cat(values)


def check_store(config: CaptureConfig, attention: str = "eager") -> None:
    """Every row of every site, through the store's own provenance and zarr-python, bit for bit."""
    store = open_store(config.out)
    table = open_tokens(config.tokens)
    starts = row_starts(table)
    group = zarr.open_group(config.out, mode="r")
    sequence, position, token_id = (group[n][:] for n in ("sequence", "position", "token_id"))
    assert len(sequence) == store.rows
    order = np.lexsort((position, sequence))
    rows = rows_of(table, starts, 0, store.rows)
    assert np.array_equal(sequence[order], rows.sequence)
    assert np.array_equal(position[order], rows.position)
    assert np.array_equal(token_id[order], rows.token_id)
    assert not np.isin(token_id, table.special_ids).any()
    for first in range(0, store.rows, config.bucket_rows):
        stop = min(first + config.bucket_rows, store.rows)
        place = keyed.permute(
            np.arange(stop - first), stop - first, keyed.key(config.seed, "bucket", first // config.bucket_rows)
        )
        assert np.array_equal(sequence[first:stop][place], rows.sequence[first:stop])
    for site in (s.name for s in parse_sites(config.sites)):
        stored = torch.from_numpy(group[site][:].astype(np.float32))[torch.from_numpy(order)]
        reference = expected_rows(config, site, attention)
        if config.encoding == "bf16":
            reference = reference.bfloat16()
        assert torch.equal(stored, reference.float())


def files_of(store: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p.relative_to(store)): (p.stat().st_mtime_ns, p.read_bytes()) for p in store.rglob("*") if p.is_file()}


def data_of(store: Path) -> dict[str, tuple[int, bytes]]:
    """Everything but the arrays' metadata, which every run writes again."""
    return {k: v for k, v in files_of(store).items() if not k.endswith("/zarr.json")}


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"batch_size": 7, "rows": 1000, "seed": 5}], ids=["all", "some"])
def test_every_stored_row_is_what_transformers_computes(config, in_process, changes):
    config = replace(config, **changes)
    summary = capture(config, QUIET)
    assert summary.rows == summary.rows_captured == open_store(config.out).rows
    check_store(config)


@pytest.mark.parametrize("encoding", ["bf16", "f32"])
def test_a_float32_model_is_stored_exactly_or_rounded_to_nearest_even(config, folder, in_process, encoding):
    config = replace(config, model=str(folder / "llama"), sites=("resid_post.0",), encoding=encoding, dtype="auto")
    capture(config, QUIET)
    check_store(config, attention="sdpa")
    if encoding == "bf16":
        bits = expected_rows(config, "resid_post.0", "sdpa").numpy().view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        stored = zarr.open_group(config.out, mode="r")["resid_post.0"][:]
        group = zarr.open_group(config.out, mode="r")
        order = np.lexsort((group["position"][:], group["sequence"][:]))
        assert np.array_equal(stored.view(np.uint16)[order], rounded.astype(np.uint16))


def test_a_bucket_does_not_depend_on_the_others(folder):
    """Any bucket size cuts sequences at its edges; the rows are the same wherever batches are the same."""
    table = open_tokens(str(folder / "tokens"))
    starts = row_starts(table)
    ids, documents = table.ids(0, table.sequences), table.documents(0, table.sequences)
    sites = parse_sites("resid_post.1")
    model = model_of("gemma2")

    def rows(first, stop):
        span = span_of(starts, first, stop)
        here = slice(span.first_sequence, span.stop_sequence)
        place = np.arange(stop - first)
        options = {"rule": table.rule, "batch_size": 1, "encoding": "f32"}
        arrays, found = bucket_rows(model, sites, ids[here], documents[here], span, place, **options)
        return arrays["resid_post.1"], found

    whole, provenance = rows(0, 300)
    for first, stop in [(0, 1), (7, 90), (29, 31), (299, 300)]:
        part, found = rows(first, stop)
        assert np.array_equal(part, whole[first:stop])
        assert np.array_equal(found.token_id, provenance.token_id[first:stop])


def test_the_next_bucket_s_ids_are_read_while_a_bucket_s_passes_run(config, in_process, monkeypatch):
    read, passes = threading.Semaphore(0), 0
    ids, rows = TokenTable.ids, bucket.bucket_rows

    def reading(self, first, stop):
        found = ids(self, first, stop)
        if threading.current_thread().name.startswith("actstore-call"):
            read.release()
        return found

    def passing(*args, **options):
        nonlocal passes
        passes += 1
        for _ in range(2 if passes == 1 else 0):  # wait until both buckets have read their ids
            assert read.acquire(timeout=60), "the second bucket's ids wait for the first one's passes"
        return rows(*args, **options)

    monkeypatch.setattr(TokenTable, "ids", reading)
    monkeypatch.setattr(bucket, "bucket_rows", passing)
    capture(config, QUIET)
    assert passes > 1
    check_store(config)


def test_a_second_run_finds_nothing_to_do(config, in_process, monkeypatch):
    first = capture(config, QUIET)
    before = data_of(Path(config.out))
    monkeypatch.setattr(execute_module, "Pool", None)
    again = capture(config, QUIET)
    assert (again.buckets, again.buckets_before, again.rows) == (0, first.buckets, first.rows)
    assert data_of(Path(config.out)) == before


def test_the_store_names_its_model_and_tokens_without_machine_paths(config, folder, in_process):
    capture(config, QUIET)
    provenance = open_store(config.out).provenance
    table = open_tokens(config.tokens)
    assert provenance["tokens"]["fingerprint"] == table.fingerprint
    assert open_tokens(f"{config.out}/tokens") == table
    assert provenance["model"]["name"] == "gemma"
    assert provenance["model"]["dtype"] == "bfloat16"
    assert provenance["model"]["attention"] == "eager"
    assert str(folder) not in json.dumps(provenance)


def test_other_weights_are_another_model(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    def identity(path):
        return model_identity(str(path), load_config(str(path)), "bfloat16", "eager")

    model = AutoModelForCausalLM.from_pretrained(folder / "gemma")
    model.save_pretrained(tmp_path / "gemma")
    assert identity(tmp_path / "gemma") == identity(folder / "gemma")
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(tmp_path / "gemma")
    found, expected = identity(tmp_path / "gemma"), identity(folder / "gemma")
    assert {k for k in found if found[k] != expected[k]} == {"weights"}


def test_a_gguf_file_gives_the_same_ids_and_activations(tmp_path):
    path = str(save_gguf(tmp_path / "tiny.gguf", TEXTS))
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    sites = parse_sites("resid_post.1,mlp_out.2")
    found = activations(load_model(path), ids, sites)
    expected = activations(model_of("qwen2"), ids, sites)
    assert all(torch.equal(found[s.name], expected[s.name]) for s in sites)
    tokenizer, reference = load_tokenizer(path), tokenizer_of(TEXTS)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    assert tokenizer.encode(TEXTS) == [reference(t, add_special_tokens=False)["input_ids"] for t in TEXTS]
    reference.save_pretrained(tmp_path / "reference")
    assert tokenizer.digest == load_tokenizer(str(tmp_path / "reference")).digest
    assert saved_precision(path, load_config(path)) is None
    cut = activations(load_model(path, layers=3), ids, sites)
    assert all(torch.equal(cut[name], expected[name]) for name in cut)


def test_a_worker_with_another_model_is_refused(config, folder, in_process, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(folder / "gemma", tmp_path / "gemma")
    config = replace(config, model=str(tmp_path / "gemma"))
    real = run_module.execute

    def changed(*args, **options):
        (tmp_path / "gemma" / "config.json").write_text(
            (folder / "gemma" / "config.json").read_text().replace('"sliding_window": 8', '"sliding_window": 9')
        )
        return real(*args, **options)

    monkeypatch.setattr(run_module, "execute", changed)
    with pytest.raises(
        MismatchError, match=r"the model on this worker differs: config is .*Give every worker the same"
    ):
        capture(config, QUIET)


# -- Ray --------------------------------------------------------------------------------------------------------------

SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what they start in the background ignore Ctrl-C
from actstore.capture import CaptureConfig, capture
from actstore.progress import Progress
if __name__ == "__main__":
    with Progress() as progress:
        print(capture(CaptureConfig(**eval(sys.argv[1])), progress))
"""


def start(config: CaptureConfig) -> subprocess.Popen:
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, repr(fields)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, process: subprocess.Popen, what: str, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended before {what}: {process.communicate()[0]}"
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.005)


def commits(store: Path) -> set[int]:
    return {int(p.stem) for p in (store / "commits").glob("*.json") if b'"committed"' in p.read_bytes()}


@pytest.mark.timeout(900)
def test_interrupted_and_killed_captures_end_in_the_undisturbed_store(config, in_process, tmp_path):
    """Ctrl-C, then a worker killed with SIGKILL: no commit was touched, and the bytes are those of a quiet replica."""
    config = replace(config, workers=2, bucket_rows=64, shard_rows=64, batch_size=1)
    store = tmp_path / "store"
    process = start(config)
    wait_for(lambda: len(commits(store)) >= 3, process, "the third commit")
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C: everybody hears it
    output, _ = process.communicate(timeout=400)
    assert process.returncode not in (0, -signal.SIGKILL)
    assert "KeyboardInterrupt" in output
    psutil.wait_procs(children, timeout=120)
    assert not [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]
    done = commits(store)
    writer = open_writer(config.out)
    assert 3 <= len(done) < writer.buckets
    before = files_of(store)

    process = start(config)
    wait_for(lambda: len(commits(store)) > len(done), process, "a commit of the second run")
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if p.name().startswith("ray::Replica")]
    assert len(workers) == 2
    workers[0].kill()
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    # a worker that was killed after it had committed, and before it said so, counts among the others
    made = [int(n) for n in re.findall(r"\bbuckets(?:_by_others)?=(\d+)", output)]
    assert sum(made) == writer.buckets - len(done)
    assert f"buckets_before={len(done)}" in output
    after = files_of(store)
    kept = [f"commits/{b:0{len(next((store / 'commits').iterdir()).stem)}}.json" for b in done]
    kept += [f"{name}/c/{b}/0" for b in done for name in (s.name for s in parse_sites(config.sites))]
    kept += [k for k in before if k.startswith("tokens/")]
    assert all(after[k] == before[k] for k in kept)

    undisturbed = replace(config, out=str(tmp_path / "undisturbed"))
    capture(undisturbed, QUIET)
    expected = {k: data for k, (_, data) in files_of(Path(undisturbed.out)).items() if "/c/" in k}
    assert len(expected) > writer.buckets * len(SITES.split(","))
    objects = {k: data for k, (_, data) in after.items() if "/c/" in k and not k.endswith(PARTIAL)}
    assert sorted(objects) == sorted(expected)
    plain = partial(without_mark, open_store(config.out).spec)
    assert not [k for k in objects if plain(k, objects[k]) != plain(k, expected[k])]


def test_a_local_run_is_interrupted_after_its_batch_and_continued_without_ray(config, tmp_path):
    config = replace(config, bucket_rows=64, shard_rows=64, batch_size=1)
    store = tmp_path / "store"
    process = start(config)
    wait_for(lambda: len(commits(store)) >= 3, process, "the third commit")
    assert not psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    output, _ = process.communicate(timeout=400)
    assert time.monotonic() - began < 60
    assert "KeyboardInterrupt" in output
    done = commits(store)
    assert 3 <= len(done) < open_writer(config.out).buckets
    before = files_of(store)
    summary = capture(config, QUIET)
    assert (summary.buckets_before, summary.buckets) == (len(done), open_writer(config.out).buckets - len(done))
    assert all(
        files_of(store)[k] == before[k] for k in before if int(k.partition("/c/")[2].partition("/")[0] or -1) in done
    )
    check_store(config)
    assert [json.loads(line)["error"] for line in log_lines(store) if '"failed"' in line] == ["KeyboardInterrupt"]


def log_lines(store: Path) -> list[str]:
    return [line for path in sorted((store / "events").rglob("*.jsonl")) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "Input/output error"), RuntimeError("CUDA error: ECC")])
def test_a_local_bucket_that_fails_is_tried_again(config, monkeypatch, fault):
    failed, rows = [], bucket.bucket_rows

    def failing(*args, **options):
        if len(failed) < 2:
            failed.append(1)
            raise fault
        return rows(*args, **options)

    monkeypatch.setattr(bucket, "bucket_rows", failing)
    summary = capture(config, QUIET)
    assert summary.workers_lost == 2
    check_store(config)
    monkeypatch.setattr(bucket, "bucket_rows", lambda *_, **__: (_ for _ in ()).throw(fault))
    with pytest.raises(
        CaptureError, match=r"no worker can go on, committed buckets are kept: .*, 3 failures: .*Error"
    ) as error:
        capture(replace(config, out=config.out + "2"), QUIET)
    assert str(fault) in str(error.value)
    traces = [json.loads(line).get("traceback", "") for line in log_lines(Path(config.out + "2"))]
    assert any("Traceback" in t and 'File "actstore/capture/worker.py"' in t for t in traces)


def test_a_committed_bucket_costs_no_forward_pass_and_a_taken_one_is_taken_back(config, monkeypatch):
    """Another run commits one bucket, and takes another over and dies: neither is this run's, the store is complete."""
    committed, dead = 2, 4
    passes, begin, rows = [], protocol.begin, bucket.bucket_rows
    whole = replace(config, out=config.out + "-whole")
    capture(whole, QUIET)

    def committing(*args, **options):
        if not passes:  # while bucket 0 is in work
            other, stored = open_writer(config.out), zarr.open_group(whole.out, mode="r")
            part = slice(*other.bucket_range(committed))
            arrays = {name: stored[name][part] for name in [*other.spec.sites, "sequence", "position", "token_id"]}
            bits = {name: x if x.dtype == np.int32 else x.view(np.uint16) for name, x in arrays.items()}
            assert isinstance(other.write_arrays(committed, bits), record.CommitRecord)
        passes.append(1)
        return rows(*args, **options)

    def beginning(number, attempt_id):
        attempt = yield from begin(number, attempt_id)
        if number == dead and not taken:
            taken.append(number)
            key, storage = record.commit_key(number), open_storage(config.out)
            intent = record.intent_bytes(number, "another-run.....")
            assert storage.replace(key, intent, storage.stat(key).version)
        return attempt

    taken = []
    monkeypatch.setattr(bucket, "bucket_rows", committing)
    monkeypatch.setattr(protocol, "begin", beginning)
    summary = capture(config, QUIET)
    buckets = open_store(config.out).spec.buckets
    assert (summary.buckets_by_others, summary.buckets, summary.taken_over) == (1, buckets - 1, 1)
    assert len(passes) == buckets  # one less for the committed bucket, one more for the one that was taken over
    assert summary.rows_captured == open_store(config.out).rows - config.bucket_rows
    check_store(config)


def test_replicas_make_the_parts_of_the_manifest(config, monkeypatch):
    """A part a bucket instead of a thousand buckets; an interrupted finalisation goes on with the parts that lack."""
    monkeypatch.setattr(manifest, "PART_BUCKETS", 1)
    made, write = [], finalise.write_part

    def part(storage, spec, number):
        made.append(number)
        if len(made) == 3:
            raise KeyboardInterrupt
        write(storage, spec, number)

    monkeypatch.setattr(finalise, "write_part", part)
    with pytest.raises((KeyboardInterrupt, CaptureError)):
        capture(config, QUIET)
    storage = open_storage(config.out)
    there = [key for key in storage.list("manifest") if key.count("/") == 1]
    assert 0 < len(there) < open_store(config.out).spec.buckets
    assert not storage.exists(manifest.HEAD_KEY)
    begun = len(made)
    capture(config, QUIET)
    assert len(made) - begun == open_store(config.out).spec.buckets - len(there)
    store, whole = open_store(config.out), replace(config, out=config.out + "-whole")
    assert not verify(storage, deep=True).damage
    monkeypatch.undo()
    capture(whole, QUIET)
    assert store.fingerprint == open_store(whole.out).fingerprint
    for site in SITES.split(","):
        one, other = store.stats(site), open_store(whole.out).stats(site)
        assert np.array_equal(one.mean, other.mean)
        assert np.array_equal(one.variance, other.variance)


def test_other_versions_go_on_only_where_they_are_allowed(config, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "versions", lambda: {"torch": "1.0.0", "transformers": "4.0.0"})
        real, done = execute_module.Pool.run, []

        def interrupted(self, tasks, show):
            done.extend(list(tasks)[:2])
            real(self, done, show)
            raise KeyboardInterrupt

        patch.setattr(execute_module.Pool, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            capture(config, QUIET)
    with pytest.raises(MismatchError, match=r"provenance\.model\.torch is '1\.0\.0'"):
        capture(config, QUIET)
    summary = capture(replace(config, allow=("versions",)), QUIET)
    store = open_store(config.out)
    assert summary.buckets == store.spec.buckets - 2
    now = model_module.versions()
    assert store.provenance["model"]["torch"] == "1.0.0"
    assert store.index.versions == {
        name: tuple(sorted(("1.0.0" if name == "torch" else "4.0.0", v))) for name, v in now.items()
    }
    assert read_record(store.storage, store.spec, done[0].key).versions == {"torch": "1.0.0", "transformers": "4.0.0"}


def test_a_store_that_is_not_complete_at_the_end_is_an_error(config, monkeypatch):
    real = StoreWriter.finalise

    def finalising(self):
        next(Path(config.out, "commits").glob("*1.json")).unlink()
        return real(self)

    monkeypatch.setattr(StoreWriter, "finalise", finalising)
    with pytest.raises(CaptureError, match="the store is not complete: 1 buckets are not committed, for example"):
        capture(config, QUIET)


def test_an_error_in_a_worker_arrives_as_one_line(config, monkeypatch):
    real = run_module.copy_tokens

    def damaged(table, storage, prefix):
        real(table, storage, prefix)
        (Path(config.out) / "tokens" / "zarr.json").write_text("{}")

    monkeypatch.setattr(run_module, "copy_tokens", damaged)
    with pytest.raises(TokensError, match="is not a zarr group's metadata") as error:
        capture(config, QUIET)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("error", "message", "everywhere"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "no space left at gs://lab/out; committed buckets are",
            True,
        ),
        (RuntimeError("CUDA out of\n memory"), "RuntimeError: CUDA out of memory", False),
        (OSError(errno.EIO, "Input/output error"), "OSError: [Errno 5] Input/output error", False),
        (TokensError("as it is"), "as it is", True),
        (EncodingError("row 3 holds NaN"), "row 3 holds NaN", True),
        (MismatchError("other versions"), "other versions", False),
    ],
)
def test_failures_are_told_in_one_line_and_sorted_by_whether_they_repeat_everywhere(error, message, everywhere):
    found = worker_module._failure(error, "gs://lab/out")
    assert found.text.startswith(message)
    assert "\n" not in found.text
    assert found.everywhere == everywhere


# -- what is wrong is named before anything starts --------------------------------------------------------------------


@pytest.fixture
def refused(config, monkeypatch, tmp_path):
    """Capture must refuse in one line, before any forward pass."""
    monkeypatch.setattr(execute_module, "Pool", None)

    def check(error, message, **changes):
        with pytest.raises(error, match=message) as found:
            capture(replace(config, **changes), QUIET)
        assert "\n" not in str(found.value)
        assert len(str(found.value)) < 500

    return check


def test_wrong_sites_and_tokens_are_refused(refused, config, folder, tmp_path):
    refused(ValueError, r"site resid_post\.40: this gemma2 model has layers 0-3", sites=("resid_post.40",))
    refused(ValueError, "unknown site kind 'foo'", sites=("foo.1",))
    refused(TokensError, "no such directory, not a token table", tokens=str(tmp_path / "none"))
    text = folder / "text.jsonl"
    common = {"sources": (str(text),), "tokenizer": str(folder / "gemma")}
    tokenize(TokenizeConfig(**common, seq_len=200, out=str(tmp_path / "long")), QUIET)
    refused(CaptureError, r"sequences of 200, but .* reads at most 128; .*--seq-len 128", tokens=str(tmp_path / "long"))
    other = [t.upper() for t in TEXTS]
    tokenizer_of(other).save_pretrained(tmp_path / "other")
    common["tokenizer"] = str(tmp_path / "other")
    tokenize(TokenizeConfig(**common, seq_len=32, out=str(tmp_path / "o")), QUIET)
    refused(CaptureError, "were made with other, not the vocabulary of", tokens=str(tmp_path / "o"))
    small = config_of("llama", vocab_size=300)
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(small).save_pretrained(tmp_path / "small")
    refused(CaptureError, r"hold id \d+, but .*small has 300 ids", model=str(tmp_path / "small"), sites=("mlp_in.0",))
    assert not Path(config.out).exists()


def test_missing_and_incomplete_models_are_refused(refused, folder, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no-weights").mkdir()
    (tmp_path / "no-weights" / "config.json").write_text((folder / "gemma" / "config.json").read_text())
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not really")
    refused(CaptureError, "nowhere: no such directory; give a hub id", model=str(tmp_path / "nowhere"))
    refused(CaptureError, "x.gguf: no such file", model=str(tmp_path / "x.gguf"))
    refused(CaptureError, "the directory has no config.json", model=str(tmp_path / "empty"))
    refused(CaptureError, "no .safetensors file; save it again", model=str(tmp_path / "no-weights"))
    refused(CaptureError, "bad.gguf", model=str(tmp_path / "bad.gguf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(CaptureError, "no such directory, and the hub gave none", model="nobody/nothing-at-all")


def test_damaged_weights_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "gemma" / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "gemma" / "config.json").read_text())
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CaptureError, match=r"1 weights are missing, for example model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load_model(str(tmp_path))
    whole = (folder / "gemma" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CaptureError, match=r"can't be read") as error:
        load_model(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_full_disk_is_refused(refused, config, monkeypatch):
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused(CaptureError, r"1e-06 GB are free, but 3,\d\d\d rows of 3 sites need at least 0\.000\d+ GB")
    assert not Path(config.out).exists()


def test_another_store_at_the_target_is_refused(config, in_process, monkeypatch):
    capture(config, QUIET)
    monkeypatch.setattr(execute_module, "Pool", None)
    with pytest.raises(MismatchError, match=r"provenance\.batch_size is 3, asked for 4; seed is 0, asked for 1"):
        capture(replace(config, seed=1, batch_size=4), QUIET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"rows": -1}, "rows is -1"),
        ({"out": "memory://x"}, "live in one process"),
        ({"devices_per_worker": 1.5}, "devices_per_worker is 1.5, expected a whole number, or a part of one GPU"),
        ({"devices_per_worker": 0.0}, "devices_per_worker is 0, expected"),
    ],
)
def test_settings_are_checked(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_importing_the_settings_loads_no_deep_learning_library():
    code = "import sys, actstore.capture, actstore.tokens; print({'torch', 'transformers', 'ray'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
