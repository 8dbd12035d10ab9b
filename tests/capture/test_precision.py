"""Precision and attention are decided once: from what was asked, the store, the device and the processor."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from io import StringIO

import pytest
import torch
from conftest import without_mark
from rich.console import Console
from tiny import config_of, save

from actstore.capture import CaptureConfig, capture, precision
from actstore.capture.config import RepairConfig
from actstore.capture.precision import choose, saved_precision
from actstore.capture.worker import Replica
from actstore.errors import CaptureError, StoreError
from actstore.progress import Progress
from actstore.store import open_store
from actstore.tokens import TokenizeConfig, tokenize

TEXTS = [f"Document {i}: the quick brown fox jumps over the lazy dog." for i in range(40)]


def chosen(asked="auto", saved="bfloat16", *, device="cpu", bfloat16_gpu=False, recorded=None, kind="gemma2"):
    return choose(asked, saved, config_of(kind), device=device, bfloat16_gpu=bfloat16_gpu, recorded=recorded)


@pytest.fixture(params=[True, False], ids=["products", "none"])
def products(request, monkeypatch):
    """A processor with and without bfloat16 products."""
    monkeypatch.setattr(precision, "bfloat16_products", lambda: request.param)
    return request.param


@pytest.mark.parametrize("saved", ["bfloat16", "float16", "float32", None])
def test_a_cpu_takes_float32_unless_the_model_and_the_processor_have_bfloat16(products, saved):
    both = products and saved == "bfloat16"
    assert chosen(saved=saved).dtype == ("bfloat16" if both else "float32")


def test_what_was_asked_is_taken_and_slow_precision_is_named(products):
    for asked in ("bfloat16", "float16", "float32"):
        choice = chosen(asked, recorded={"dtype": "float32"})
        assert choice.dtype == asked
        assert ("slow" in str(choice)) == (asked == "bfloat16" and not products)


def test_a_store_has_decided_already(products):
    for recorded in ("bfloat16", "float16", "float32"):
        for device in ("cpu", "cuda"):
            choice = chosen(device=device, recorded={"dtype": recorded, "attention": "flex_attention"})
            assert (choice.dtype, choice.attention) == (recorded, "flex_attention")
    assert chosen(recorded={"name": "imported"}).attention == "eager"


@pytest.mark.parametrize("name", ["someone/kernel", "paged|sdpa", 3, None])
def test_an_attention_that_would_be_fetched_and_run_is_refused(name):
    with pytest.raises(StoreError, match=r"the store names attention .*, expected one of default, eager, sdpa"):
        chosen(recorded={"dtype": "float32", "attention": name})


def test_flash_attention_is_never_fetched(tmp_path):
    from actstore.capture.model import load_model

    save(tmp_path / "gemma", "gemma2", torch.float32, TEXTS)
    with pytest.raises(CaptureError, match="captured with flash attention; pip install flash-attn"):
        load_model(str(tmp_path / "gemma"), attention="flash_attention_2")


def test_a_gpu_takes_bfloat16_if_it_has_it():
    assert chosen(saved="float32", device="cuda", bfloat16_gpu=True).dtype == "bfloat16"
    assert chosen(saved="bfloat16", device="cuda", bfloat16_gpu=False).dtype == "float32"


@pytest.mark.parametrize("limit", ["AVX2", "avx512_core", None])
def test_a_limit_on_onednn_is_a_limit_on_the_processor(limit):
    """As `ONEDNN_MAX_CPU_ISA` is read when torch starts, each is a process of its own."""
    code = "from actstore.capture.precision import bfloat16_products as b; print(b())"
    environment = {k: v for k, v in os.environ.items() if k != "ONEDNN_MAX_CPU_ISA"}
    if limit:
        environment["ONEDNN_MAX_CPU_ISA"] = limit
    found = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    has = torch.cpu.get_capabilities()
    expected = limit is None and any(has.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    assert found.stdout.strip() == str(expected)


@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_what_a_model_was_saved_in(tmp_path, kind):
    from actstore.capture.model import load_config

    for dtype in ("bfloat16", "float32"):
        save(tmp_path / dtype, kind, getattr(torch, dtype), TEXTS)
        assert saved_precision(str(tmp_path / dtype), load_config(str(tmp_path / dtype))) == dtype


@pytest.fixture
def run(tmp_path, in_process, monkeypatch):
    """Captures of a bfloat16 model; gives what each printed, and the precision that its worker was given."""
    model = save(tmp_path / "gemma", "gemma2", torch.bfloat16, TEXTS)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    tokens = str(tmp_path / "tokens")
    source = str(tmp_path / "text.jsonl")
    quiet = Progress(Console(file=StringIO()))
    tokenize(TokenizeConfig(sources=(source,), tokenizer=str(model), seq_len=32, out=tokens), quiet)
    config = CaptureConfig(
        model=str(model), tokens=tokens, sites=("resid_post.1",), out=str(tmp_path / "store"), batch_size=4,
        bucket_rows=128, shard_rows=64, chunk_rows=32, device="cpu",
    )  # fmt: skip
    given = []
    load = Replica._load

    def loading(self):
        given.append(self.config.dtype)
        return load(self)

    monkeypatch.setattr(Replica, "_load", loading)

    def run(**changes):
        screen = Console(file=StringIO(), width=200)
        summary = capture(replace(config, **changes), Progress(screen))
        return summary, screen.file.getvalue(), set(given)

    return run


def test_the_choice_is_printed_recorded_and_given_to_workers(run, products, tmp_path):
    summary, printed, given = run()
    expected = "bfloat16" if products else "float32"
    assert printed.startswith(f"model runs on cpu in {expected} (")
    assert open_store(summary.store).provenance["model"]["dtype"] == summary.dtype == expected
    assert given == {expected}
    parameters = {p.dtype for p in loaded(summary.store, tmp_path).parameters()}
    assert parameters == {getattr(torch, expected)}


def loaded(store, tmp_path):
    from actstore.capture.worker import ReplicaConfig, load_replica

    about = open_store(store).provenance["model"]
    config = ReplicaConfig(str(tmp_path / "gemma"), None, about["dtype"], about["attention"], "cpu", store, 4, 1)
    return load_replica(config).model


def test_a_store_that_was_begun_on_another_processor_is_continued_as_it_was(run, monkeypatch):
    monkeypatch.setattr(precision, "bfloat16_products", lambda: False)
    begun, _, _ = run(rows=400)
    monkeypatch.setattr(precision, "bfloat16_products", lambda: True)
    again, printed, given = run(rows=400)
    assert (begun.dtype, again.dtype, given) == ("float32", "float32", {"float32"})
    assert "as the store was begun" in printed


def test_repair_takes_the_store_s_precision(run, monkeypatch, tmp_path):
    from actstore.capture.repair import repair

    monkeypatch.setattr(precision, "bfloat16_products", lambda: False)
    summary, _, given = run()
    monkeypatch.setattr(precision, "bfloat16_products", lambda: True)
    shard = next(p for p in (tmp_path / "store" / "resid_post.1" / "c").rglob("*") if p.is_file())
    key = shard.relative_to(tmp_path / "store").as_posix()
    before = without_mark(open_store(summary.store).spec, key, shard.read_bytes())
    shard.write_bytes(before[:-9])
    given.clear()
    screen = Console(file=StringIO(), width=200)
    repaired = repair(summary.store, RepairConfig(model=str(tmp_path / "gemma"), device="cpu"), Progress(screen))
    assert repaired.buckets_repaired == 1
    assert without_mark(open_store(summary.store).spec, key, shard.read_bytes()) == before
    assert "in float32 (as the store was begun)" in screen.file.getvalue()


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(run, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for changes in ({"device": "cuda"}, {"devices_per_worker": 2.0}):
        with pytest.raises(CaptureError, match="GPUs per worker: torch finds 0 on this machine; use --device cpu"):
            run(**{"device": "auto", **changes})
    assert not (tmp_path / "store").exists()
