"""Memory: what a capture needs is known before it starts, what does not fit is refused with what would."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny import config_of, save

from actstore.capture import memory
from actstore.capture.bucket import raw_dtype
from actstore.capture.memory import Needs, check_memory, free_memory, needs
from actstore.capture.model import load_config, model_identity
from actstore.capture.sites import check_sites, expand_sites
from actstore.errors import CaptureError
from actstore.progress import Progress
from actstore.store import SiteSpec, StoreSpec, create_store
from actstore.tokens import TokenizeConfig, copy_tokens, open_tokens, tokenize

SPEC = StoreSpec(sites={"resid_post.1": SiteSpec(d=48)}, rows=1 << 22)
SHAPE = {"dtype": "bfloat16", "seq_len": 128, "batch_size": 8, "threads": 2, "local": True, "on_gpu": False}


@pytest.fixture
def no_container(monkeypatch, tmp_path):
    """A machine with 8 GB free and no limit; gives the directory of its control groups."""
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("M", (), {"available": 8_000_000_000}))
    files = [("v2/memory.max", "v2/memory.current"), ("v1/limit_in_bytes", "v1/usage_in_bytes")]
    monkeypatch.setattr(memory, "_CGROUPS", tuple((str(tmp_path / a), str(tmp_path / b)) for a, b in files))
    return tmp_path


def limit(folder: Path, names: tuple[str, str], allowed: str, used: int, stat: str) -> None:
    folder.mkdir()
    (folder / names[0]).write_text(allowed + "\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


def test_without_a_limit_the_machine_counts(no_container):
    assert free_memory() == 8_000_000_000


@pytest.mark.parametrize(
    ("folder", "names", "cache"),
    [
        ("v2", ("memory.max", "memory.current"), "inactive_file"),
        ("v1", ("limit_in_bytes", "usage_in_bytes"), "total_inactive_file"),
    ],
)
def test_a_container_s_limit_counts_without_its_page_cache(no_container, folder, names, cache):
    limit(no_container / folder, names, "5000000000", 3_000_000_000, f"anon 1\n{cache} 1000000000\n")
    assert free_memory() == 3_000_000_000


@pytest.mark.parametrize(("allowed", "free"), [("max", 8e9), ("9223372036854771712", 8e9), ("1000000000", 0)])
def test_limits_that_limit_nothing_and_one_that_is_passed(no_container, allowed, free):
    limit(no_container / "v2", ("memory.max", "memory.current"), allowed, 2_000_000_000, "anon 1\n")
    assert free_memory() == free


def test_two_buckets_and_their_provenance_grow_with_bucket_rows():
    spec = replace(SPEC, sites={"resid_post.1": SiteSpec(d=2304)})  # so that provenance is not the largest shard
    small, large = (needs(replace(spec, bucket_rows=n), config_of("llama"), **SHAPE) for n in (1 << 18, 1 << 20))
    assert large.total - small.total == ((1 << 20) - (1 << 18)) * (2 * 2304 * 2 + 56)
    assert needs(replace(SPEC, rows=1 << 15), config_of("llama"), **SHAPE).bucket_rows == 1 << 15


ROWS_HELD = [("f32", "bfloat16", 4), ("fixed:1e-3", "float32", 4), ("bf16", "float32", 2),
             ("fixed:1e-3", "bfloat16", 2), ("fixed:1e-3", "float16", 4), ("f32", "float16", 4)]  # fmt: skip


@pytest.mark.parametrize(("encoding", "dtype", "size"), ROWS_HELD)
def test_a_row_has_the_size_it_has_before_it_is_encoded(encoding, dtype, size):
    spec = replace(SPEC, sites={"resid_post.1": SiteSpec(d=48, encoding=encoding)})
    assert needs(spec, config_of("llama"), **{**SHAPE, "dtype": dtype}).row == 2 * 48 * size + 56
    assert raw_dtype(encoding, getattr(torch, dtype)).itemsize == size


def test_eager_attention_grows_with_the_square_of_the_sequence():
    def grown(kind: str) -> float:
        fixed = [needs(SPEC, config_of(kind), **{**SHAPE, "seq_len": n}).fixed for n in (0, 1 << 12, 1 << 13)]
        return (fixed[2] - fixed[0]) / (fixed[1] - fixed[0])

    assert grown("llama") == 2
    assert 3.9 < grown("gemma2") < 4


def test_the_model_counts_where_it_is():
    cpu = needs(SPEC, config_of("llama"), **SHAPE)
    gpu = needs(SPEC, config_of("llama"), **{**SHAPE, "on_gpu": True})
    assert gpu.fixed < cpu.fixed
    assert gpu.row == cpu.row


def test_layers_behind_the_deepest_site_do_not_count_and_the_head_only_where_malloc_keeps_it(monkeypatch):
    config = config_of("llama", num_hidden_layers=8)
    layer, head = (48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 96 + 2 * 48) * 2, 2000 * 48 * 2
    whole = memory.parameter_bytes(config, 2)
    assert config.num_hidden_layers == 8
    assert memory.kept_bytes(config, 2, SPEC) == whole - 6 * layer
    monkeypatch.setattr(memory, "KEPT_BY_MALLOC", 0)
    assert memory.kept_bytes(config, 2, SPEC) == whole - 6 * layer - head


def test_a_gguf_file_s_weights_exist_twice_while_they_are_loaded():
    config = config_of("llama", vocab_size=1 << 22)
    whole = memory.parameter_bytes(config, 2)
    small = replace(SPEC, rows=2048)
    assert needs(small, config, **SHAPE, gguf=True).total == memory.PROCESS + 2 * whole
    assert needs(small, config, **SHAPE).total < memory.PROCESS + 2 * whole


def test_what_does_not_fit_is_refused_with_what_does(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 6_000_000_000)
    needed = Needs(row=2 * 2304 * 2 + 56, bucket_rows=1 << 20, fixed=100_000_000)
    message = (
        "capture needs 9.82 GB per worker for 1 worker, 6 GB are free: lower --bucket-rows to 622592 or less, "
        "or use a larger machine"
    )
    with pytest.raises(CaptureError, match=f"^{re.escape(message)}$"):
        check_memory(needed, 1, 1 << 14)
    check_memory(needed, 1, 1 << 14, resident=4_000_000_000)


@pytest.mark.parametrize("changes", [{"fixed": 7_000_000_000}, {"loading": 7_000_000_000}])
def test_where_no_bucket_would_fit_other_advice_is_given(monkeypatch, changes):
    monkeypatch.setattr(memory, "free_memory", lambda: 6_000_000_000)
    with pytest.raises(CaptureError, match="use fewer --workers, a smaller --batch-size, or use a larger"):
        check_memory(replace(Needs(row=100, bucket_rows=1 << 20, fixed=0), **changes), 1, 1 << 14)


SIZES = st.integers(0, 10**10)


@given(
    row=st.integers(54, 10**6), fixed=SIZES, loading=SIZES, free=SIZES, workers=st.integers(1, 64),
    bucket_rows=st.integers(1, 1 << 21), shard_rows=st.sampled_from([1 << 10, 1 << 14]),
)  # fmt: skip
def test_the_advice_fits_and_one_shard_more_does_not(row, fixed, loading, free, workers, bucket_rows, shard_rows):
    needed = Needs(row=row, bucket_rows=bucket_rows, fixed=fixed, loading=loading)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free_memory", lambda: free)
        try:
            check_memory(needed, workers, shard_rows)
        except CaptureError as e:
            if found := re.search(r"--bucket-rows to (\d+)", str(e)):
                rows = int(found[1])
                check_memory(replace(needed, bucket_rows=rows), workers, shard_rows)
                assert rows % shard_rows == 0
                with pytest.raises(CaptureError):
                    check_memory(replace(needed, bucket_rows=rows + shard_rows), workers, shard_rows)
        else:
            assert needed.total * workers <= free


FILL_TWO_BUCKETS = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from actstore.capture.segments import open_segments, work_of
from actstore.capture.worker import Replica, ReplicaConfig
from actstore.store import StoreWriter, open_writer
from actstore.tokens import row_starts

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

model, store = sys.argv[1:]
writer = open_writer(store)
segment = open_segments(writer.storage, writer.spec)[0]
*works, short = work_of(writer.spec, 0, segment, row_starts(segment.tokens), range(3))
replica = Replica(ReplicaConfig(model, None, "float32", "default", "cpu", store, 8, 1))
replica.capture(short)
before, full, write = peak(), threading.Barrier(2), StoreWriter.write_arrays

def held(self, *arguments, **options):
    full.wait()
    return write(self, *arguments, **options)

StoreWriter.write_arrays = held
with ThreadPoolExecutor(2) as pool:
    list(pool.map(replica.capture, works))
print(peak() - before)
"""
"""Prints by how many bytes two buckets that are full at a time raise the peak of what a small one took."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")
def test_two_full_buckets_take_what_the_formula_says(tmp_path):
    rows = 3 << 14
    text = [f"Document {i}: the quick brown fox, {'jumps over ' * (i % 13)}the lazy dog." for i in range(5200)]
    model = str(save(tmp_path / "model", "llama", torch.float32, text[:120]))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in text))
    source, out = str(tmp_path / "text.jsonl"), str(tmp_path / "tokens")
    tokenize(TokenizeConfig(sources=(source,), tokenizer=model, seq_len=128, out=out), Progress(Console(quiet=True)))
    config = load_config(model)
    widths = check_sites(config, expand_sites(("all",), config), model)
    spec = StoreSpec(
        sites={name: SiteSpec(d=d) for name, d in widths.items()},
        rows=2 * rows + 4096,
        bucket_rows=rows,
        shard_rows=4096,
        provenance={"model": model_identity(model, config, "float32", "default")},
    )
    writer = create_store(tmp_path / "store", spec)
    copy_tokens(open_tokens(out), writer.storage)
    call = [sys.executable, "-c", FILL_TWO_BUCKETS, model, str(tmp_path / "store")]
    grown = int(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
    assert grown == pytest.approx(rows * needs(spec, config, **SHAPE).row, rel=0.15)
