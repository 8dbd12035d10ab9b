"""Copies: identical objects, or the same values in another form; whatever interrupts them; and moves."""

import json
import multiprocessing
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from commands import run_actstore
from conftest import SPEC, Known, clear_memory, write_known, write_rows

import actstore
from actstore.errors import IntegrityError, MismatchError, StoreError
from actstore.store import SiteSpec, Storage, StoreSpec, create_store, open_storage, open_store
from actstore.store.format import fixed
from actstore.store.format.spec import OPEN_ENDED
from actstore.store.format.spec import arrays as spec_arrays
from actstore.store.maintain.copy import copy
from actstore.store.maintain.verify import verify
from actstore.store.read.values import BucketRows, Values
from actstore.store.storage import LocalStorage
from actstore.store.storage.local import LOCK

SMALLEST: dict[str, Any] = {"bucket_rows": 256, "shard_rows": 128, "chunk_rows": 64, "threads": 1}
NORMAL = replace(SPEC, sites={"a.0": SiteSpec(d=5), "b": SiteSpec(d=9)})


def objects(url: str | Path) -> dict[str, bytes]:
    """All objects, without what differs from attempt to attempt: its id in records, its mark in shards."""
    storage = open_storage(url)
    arrays = spec_arrays(open_store(url).spec)
    found: dict[str, bytes] = {}
    for key in storage.list(""):
        data = storage.get(key)
        name = key.partition("/c/")[0]
        if name in arrays and "/c/" in key:
            at = len(data) - 4 - 16 * arrays[name].chunks_per_shard
            data = data[: at - 16] + data[at:]
        elif key.startswith("commits/"):
            data = re.sub(rb'"(attempt|object_crc32c)": "[^"]*"', b"", data)
        found[key] = data
    return found


def add_tokens(url: str | Path) -> None:
    storage = open_storage(url)
    for key in ("zarr.json", "ids/zarr.json", "ids/c/0/0", "documents.parquet"):
        storage.put(f"tokens/{key}", f"tokens of {key}".encode() * 9)


def write_normal(url: Path, spec: StoreSpec = NORMAL, **options: Any) -> dict[str, np.ndarray]:
    """A store of finite bf16 values; returns them as float32 in stored order."""
    rng, out = np.random.default_rng(1), {}
    for name, site in spec.sites.items():
        out[name] = (rng.normal(size=(spec.rows, site.d)) * 3 + 1).astype(ml_dtypes.bfloat16)
    writer = create_store(url, spec)
    zeros = np.arange(spec.rows, dtype=np.int32)
    for b in range(spec.buckets):
        r = slice(*spec.bucket_range(b))
        kind = {n: s.kind for n, s in spec.sites.items()}
        sites = {n: v[r].view(np.uint16) if kind[n] != "f32" else v[r].astype(np.float32) for n, v in out.items()}
        assert write_rows(writer, b, sites, sequence=zeros[r], position=zeros[r], token_id=zeros[r])
    writer.finalise()
    return {name: v.astype(np.float32) for name, v in out.items()}


def values(url: str | Path, name: str) -> np.ndarray:
    """What a reader gets, in stored order."""
    store = open_store(url)
    found = Values(store, name, np.dtype("<f4"))
    return np.concatenate([BucketRows(found, store, name, p)[:] for p in range(len(store.index.buckets))])


def intact(url: str | Path) -> bool:
    return verify(open_storage(url), deep=True).damage == []


@pytest.mark.parametrize("url", ["memory://copies/s", "local"])
def test_a_copy_has_the_same_objects(known: Known, tmp_path: Path, url: str) -> None:
    url = str(tmp_path / "deep" / "copy") if url == "local" else url
    add_tokens(known.url)
    summary = copy(known.url, url)
    assert (summary.buckets, summary.buckets_copied, summary.planned_buckets) == (4, 4, 4)
    assert objects(url) == objects(known.url)
    assert summary.fingerprint == open_store(known.url).fingerprint
    assert summary.bytes_copied == open_store(known.url).stored_bytes + sum(open_storage(url).list("tokens").values())
    again = copy(known.url, url)
    assert again.buckets_copied == 0
    assert copy(url, tmp_path / "back").buckets == 4
    assert objects(tmp_path / "back") == objects(known.url)
    clear_memory("memory://copies")


def test_a_copy_continues_after_a_failure(known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_tokens(known.url)
    create = LocalStorage.create
    calls = []

    def failing(self: LocalStorage, key: str, data: Any) -> bool:
        calls.append(key)
        if len(calls) == 30:
            raise StoreError("the network is gone")
        return create(self, key, data)

    monkeypatch.setattr(LocalStorage, "create", failing)
    with pytest.raises(StoreError, match="the network is gone"):
        copy(known.url, tmp_path / "c")
    assert 0 < len(open_store(tmp_path / "c").index.buckets) < 4
    assert intact(tmp_path / "c")
    assert 0 < copy(known.url, tmp_path / "c").buckets_copied < 4
    assert objects(tmp_path / "c") == objects(known.url)


@pytest.mark.parametrize("encoding", [None, "f32"])
def test_a_copy_continues_after_kill_9(known: Known, tmp_path: Path, encoding: str | None) -> None:
    add_tokens(known.url)
    quiet = copy(known.url, tmp_path / "quiet", encoding=encoding)
    context = multiprocessing.get_context("fork")
    for kill_at in (1, 7, 12, 25, 44, 60, 75):
        child = context.Process(target=_copy_and_die, args=(known.url, str(tmp_path / "c"), encoding, kill_at))
        child.start()
        child.join()
        if (tmp_path / "c" / "zarr.json").exists():
            assert intact(tmp_path / "c")
    assert copy(known.url, tmp_path / "c", encoding=encoding).fingerprint == quiet.fingerprint
    assert intact(tmp_path / "c")
    assert objects(tmp_path / "quiet") == objects(tmp_path / "c")


def _copy_and_die(source: str, destination: str, encoding: str | None, kill_at: int) -> None:
    """Die in the middle of the kill_at-th write."""
    link, count = os.link, [0]

    def dying(*args: Any, **kwargs: Any) -> None:
        count[0] += 1
        if count[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        link(*args, **kwargs)

    os.link = dying
    copy(source, destination, encoding=encoding)


def test_encodings_there_and_on(tmp_path: Path) -> None:
    expected = write_normal(tmp_path / "bf16")
    copy(tmp_path / "bf16", tmp_path / "f32", encoding="f32")
    copy(tmp_path / "f32", tmp_path / "back", encoding="bf16")
    copy(tmp_path / "f32", tmp_path / "fixed", encoding="fixed:1e-3")
    copy(tmp_path / "bf16", tmp_path / "direct", encoding="fixed:1e-3")
    for name, value in expected.items():
        assert np.array_equal(values(tmp_path / "f32", name), value)
        assert np.array_equal(values(tmp_path / "back", name), value)
        made = values(tmp_path / "fixed", name)
        assert np.array_equal(made, values(tmp_path / "direct", name))
        fvu = ((made - value) ** 2).sum() / ((value - value.mean(0)) ** 2).sum()
        assert 0.5e-3 < fvu < 2e-3
    for url in ("f32", "back", "fixed"):
        assert intact(tmp_path / url)
        store = open_store(tmp_path / url)
        assert np.array_equal(np.sort(store["sequence"][:]), np.arange(1000))
    crcs = [open_store(tmp_path / u).index.arrays["b"].crc32c for u in ("bf16", "back")]
    assert np.array_equal(*crcs)
    origin = open_store(tmp_path / "fixed").provenance["copied_from"]
    assert origin["fingerprint"] == open_store(tmp_path / "f32").fingerprint
    assert origin["encoding"] == {"a.0": "f32", "b": "f32"}
    assert origin["copied_from"]["fingerprint"] == open_store(tmp_path / "bf16").fingerprint


def test_rows_beyond_the_range_of_another_encoding_are_counted(tmp_path: Path) -> None:
    """float32 above the largest bfloat16 rounds to infinity; what `fixed` clips is summed over the store."""
    x = np.random.default_rng(0).normal(size=(600, 4)).astype(np.float32)
    x[[5, 300]] = 3.4e38
    with actstore.create(tmp_path / "s", sites={"a": 4}, encoding="f32", **SMALLEST) as w:
        w.append({"a": x})
    assert copy(tmp_path / "s", tmp_path / "same").nonfinite == 0
    told = tmp_path / "c.json"
    done = run_actstore("cp", str(tmp_path / "s"), str(tmp_path / "c"), "--encoding", "bf16", "--json", str(told))
    assert json.loads(told.read_text())["nonfinite"] == 2
    assert "nonfinite" in done.stdout
    x[[5, 300]] = 0
    x[300:] *= 1.2
    with actstore.create(tmp_path / "t", sites={"a": 4}, encoding="fixed:0.0001", **SMALLEST) as w:
        w.append({"a": x})
    clipped = open_store(tmp_path / "t").stats("a").saturated
    assert copy(tmp_path / "t", tmp_path / "u", codec="none").saturated == clipped


def test_every_bit_pattern_survives_widening_and_back(known: Known, tmp_path: Path) -> None:
    spec = replace(SPEC, sites={"resid_post.3": SiteSpec(d=24)})
    known = write_known(tmp_path / "bf16", spec)
    copy(known.url, tmp_path / "f32", encoding="f32")
    wide = values(tmp_path / "f32", "resid_post.3")
    assert np.array_equal(wide.view(np.uint32), known.stored["resid_post.3"].astype(np.uint32) << 16)


def test_codecs_there_and_on(tmp_path: Path) -> None:
    known = write_known(tmp_path / "planes")
    last = tmp_path / "planes"
    for codec in ("blosc", "none", "planes"):
        summary = copy(last, tmp_path / f"to-{codec}", codec=codec)
        last = tmp_path / f"to-{codec}"
        fresh = open_store(write_known(tmp_path / f"fresh-{codec}", replace(SPEC, codec=codec)).url)
        store = open_store(last)
        assert intact(last)
        assert summary.buckets_copied == 4
        assert store.spec.codec == codec
        for name, array in store.index.arrays.items():
            assert np.array_equal(array.crc32c, fresh.index.arrays[name].crc32c)
        assert np.array_equal(store["resid_post.3"][:].view(np.uint16), known.stored["resid_post.3"])


def test_codes_and_statistics_of_fixed_survive_another_codec(tmp_path: Path) -> None:
    spec = replace(NORMAL, sites={n: replace(s, encoding="fixed:1e-6") for n, s in NORMAL.sites.items()})
    write_normal(tmp_path / "s", spec)
    source = open_store(tmp_path / "s")
    copy(tmp_path / "s", tmp_path / "same")
    copy(tmp_path / "s", tmp_path / "none", codec="none")
    assert objects(tmp_path / "same") == objects(tmp_path / "s")
    for name in spec.sites:
        assert np.array_equal(open_store(tmp_path / "none")[name][:], source[name][:])
        assert source.stats(name).saturated == open_store(tmp_path / "none").stats(name).saturated
    copy(tmp_path / "s", tmp_path / "f32", encoding="f32")
    expected = fixed.dequantise(source["b"][:], source.calibration("b"))
    assert np.array_equal(values(tmp_path / "f32", "b"), expected)


def test_another_calibration_at_the_destination_is_refused(tmp_path: Path) -> None:
    spec = replace(NORMAL, sites={"b": SiteSpec(d=9, encoding="fixed:1e-3")})
    write_normal(tmp_path / "s", spec)
    create_store(tmp_path / "c", spec)
    other = fixed.Calibration(scale=np.ones(9, np.float32), offset=np.zeros(9, np.float32))
    open_storage(tmp_path / "c").put("calibration/b/c/0/0", fixed.to_bytes(other))
    with pytest.raises(StoreError, match="calibration/b/c/0/0 is another calibration"):
        copy(tmp_path / "s", tmp_path / "c")


@pytest.mark.parametrize("options", [{}, {"codec": "none"}, {"encoding": "f32"}])
def test_a_damaged_chunk_is_named_and_its_bucket_not_copied(known: Known, tmp_path: Path, options: Any) -> None:
    victim = Path(known.url) / "resid_post.3" / "c" / "6" / "0"
    data = bytearray(victim.read_bytes())
    data[3] ^= 1
    victim.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"resid_post\.3/c/6/0 chunk at byte 0"):
        copy(known.url, tmp_path / "c", **options)
    assert open_store(tmp_path / "c").index.buckets.tolist() == [0]
    assert intact(tmp_path / "c")
    data[3] ^= 1
    victim.write_bytes(data)
    assert copy(known.url, tmp_path / "c", **options).buckets == 4


def test_swapped_intact_shards_are_found(known: Known, tmp_path: Path) -> None:
    a, b = (Path(known.url) / "mlp_out.3" / "c" / i / "0" for i in ("0", "1"))
    size = min(len(a.read_bytes()), len(b.read_bytes()))
    a.write_bytes(b.read_bytes())
    assert size
    with pytest.raises((IntegrityError, StoreError), match=r"mlp_out\.3/c/0/0"):
        copy(known.url, tmp_path / "c")


def test_an_unfinished_store_is_copied_as_far_as_it_is(tmp_path: Path) -> None:
    spec = replace(SPEC, rows=OPEN_ENDED)
    small = replace(SPEC, rows=512)
    writer = create_store(tmp_path / "s", spec)
    content = write_known(tmp_path / "model", small).stored
    zeros = np.zeros(256, np.int32)
    for b in range(2):
        sites = {k: v[256 * b : 256 * b + 256] for k, v in content.items()}
        assert write_rows(writer, b, sites, sequence=zeros, position=zeros, token_id=zeros)
        summary = copy(tmp_path / "s", tmp_path / "c")
        assert (summary.buckets, summary.buckets_copied, summary.planned_buckets) == (b + 1, 1, None)
    with pytest.raises(StoreError, match="unfinished"):
        copy(tmp_path / "s", tmp_path / "c", move=True)
    writer.fix_rows(512)
    writer.finalise()
    assert copy(tmp_path / "s", tmp_path / "c").planned_buckets == 2
    assert open_store(tmp_path / "c").complete
    assert objects(tmp_path / "c") == objects(tmp_path / "s")


def test_another_store_at_the_destination_is_refused(known: Known, tmp_path: Path) -> None:
    write_known(tmp_path / "other", replace(SPEC, seed=5))
    with pytest.raises(MismatchError, match="seed is 5, asked for 0"):
        copy(known.url, tmp_path / "other")
    write_normal(tmp_path / "n")
    write_known(tmp_path / "k", NORMAL)
    with pytest.raises(StoreError, match="not the source's"):
        copy(tmp_path / "n", tmp_path / "k")


def test_one_place_is_no_two_places(known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    (tmp_path / "link").symlink_to(known.url)
    for destination in (known.url, f"{known.url}/copy", tmp_path, tmp_path / "link", f"file://{known.url}"):
        with pytest.raises(ValueError, match="same place"):
            copy(known.url, destination)
    for a, b in (("memory://x/y", "memory:///x/y/z/"), ("s3://b/run", "s3a://b/run")):
        with pytest.raises(ValueError, match="same place"):
            copy(a, b)
    copy(known.url, f"{known.url}2")
    assert set(objects(known.url)) == set(objects(f"{known.url}2"))


def test_a_move_leaves_nothing_of_the_store(known: Known, tmp_path: Path) -> None:
    add_tokens(known.url)
    before = objects(known.url)
    (Path(known.url) / "mlp_out.3" / f"x.{'0' * 16}.partial").write_bytes(b"x")
    summary = copy(known.url, tmp_path / "c", move=True)
    assert (summary.moved, summary.left) == (True, [])
    assert objects(tmp_path / "c") == before
    assert not Path(known.url).exists()
    assert tmp_path.exists()


def test_a_move_leaves_what_is_not_the_stores(known: Known, tmp_path: Path) -> None:
    root = Path(known.url)
    (root / "notes.txt").write_text("mine")
    (root / "mlp_out.3" / "c" / "0" / "extra").write_text("mine too")
    (root / "empty").mkdir()
    assert copy(known.url, tmp_path / "c", move=True, encoding="f32").left == ["mlp_out.3/c/0/extra", "notes.txt"]
    left = {p.relative_to(root).as_posix() for p in root.rglob("*")}
    assert left - {LOCK} == {"notes.txt", "empty", "mlp_out.3", "mlp_out.3/c", "mlp_out.3/c/0", "mlp_out.3/c/0/extra"}


def test_a_move_deletes_nothing_if_the_copy_is_damaged(known: Known, tmp_path: Path) -> None:
    copy(known.url, tmp_path / "c")
    before = objects(known.url)
    victim = tmp_path / "c" / "resid_post.3" / "c" / "0" / "0"
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match=r"resid_post\.3/c/0/0.*nothing was deleted"):
        copy(known.url, tmp_path / "c", move=True)
    assert objects(known.url) == before


@pytest.mark.parametrize("options", [{}, {"encoding": "f32"}])
def test_a_move_can_be_interrupted_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any) -> None:
    """After each possible number of deletions: the source opens whole or not at all, and the same call finishes."""
    spec = replace(SPEC, rows=256)
    delete = LocalStorage.delete
    source, total = tmp_path / "s", 1
    for allowed in range(40):
        if allowed % 3 == 0 or allowed < 6:
            write_known(source, spec)
            add_tokens(source)
            budget = [allowed]

            def failing(self: Storage, key: str, budget: list[int] = budget) -> None:
                if budget[0] == 0:
                    raise StoreError("interrupted")
                budget[0] -= 1
                delete(self, key)

            monkeypatch.setattr(LocalStorage, "delete", failing)
            try:
                copy(source, tmp_path / "c", move=True, **options)
            except StoreError as e:
                assert "interrupted" in str(e)
                total += 1
                try:
                    open_store(source)
                except StoreError:
                    with pytest.raises(StoreError, match="interrupted move"):
                        copy(source, tmp_path / "c", **options)
                else:
                    assert len(values(source, "resid_post.3")) == 256
            monkeypatch.setattr(LocalStorage, "delete", delete)
            if source.exists():
                assert copy(source, tmp_path / "c", move=True, **options).moved
            assert not source.exists()
            assert intact(tmp_path / "c")
    assert total > 8
