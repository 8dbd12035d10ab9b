"""The store: what is written is what every reader gets back, bit for bit."""

import json
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import pytest
import zarr
import zstandard
from conftest import SPEC, Known, clear_memory, fill, random_sites, write_known, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import actstore
from actstore.errors import IntegrityError, MismatchError, StoreError
from actstore.store import SiteSpec, Store, create_store, open_store, open_writer
from actstore.store.format import codec, record, stats
from actstore.store.format.manifest import HEAD_KEY
from actstore.store.format.sealed import SEAL, UNSEALED, dump, from_json, to_json
from actstore.store.format.spec import GROUP_KEY, group_metadata, spec_from_bytes
from actstore.store.maintain.verify import Damage, verify
from actstore.store.storage import LocalStorage, open_storage
from actstore.store.write.protocol import NotWritten


def damage(url: str | Path) -> list[Damage]:
    return verify(open_storage(url), deep=True).damage


@given(
    bits=hnp.arrays(st.sampled_from([np.uint16, np.uint32]), hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)),
    chain=st.sampled_from(codec.CODECS),
)
@settings(max_examples=100, deadline=None)
def test_codec_round_trips_every_bit_pattern(bits: np.ndarray, chain: codec.CodecName) -> None:
    data = codec.encode(bits, chain)
    out = np.empty(bits.nbytes, np.uint8)
    codec.decode_into(data, chain, out, "chunk")
    assert np.array_equal(codec.merge(out, chain, bits.dtype).reshape(bits.shape), bits)


def test_planes_is_a_plain_zstd_frame_of_byte_planes() -> None:
    bits = np.arange(600, dtype=np.uint16).reshape(20, 30) * 77
    data = codec.encode(bits, "planes")
    planes = np.frombuffer(zstandard.ZstdDecompressor().decompress(data[:-4]), np.uint8)
    assert np.array_equal(planes[:600], bits.reshape(-1) & 255)
    assert np.array_equal(planes[600:], bits.reshape(-1) >> 8)


@pytest.mark.parametrize("chain", codec.CODECS)
def test_damaged_chunks_never_decode(chain: codec.CodecName) -> None:
    data = bytearray(codec.encode(np.arange(500, dtype=np.uint16).reshape(50, 10), chain))
    out = np.empty(1000, np.uint8)
    for i in range(len(data)):
        data[i] ^= 1 << (i % 8)
        with pytest.raises(IntegrityError, match="chunk 7"):
            codec.decode_into(bytes(data), chain, out, "chunk 7")
        data[i] ^= 1 << (i % 8)
    for length in range(0, len(data), 7):
        with pytest.raises(IntegrityError):
            codec.decode_into(bytes(data[:length]), chain, out, "chunk 7")


@pytest.mark.parametrize("chain", codec.CODECS)
def test_zarr_reads_the_same_bits(tmp_path: Path, chain: codec.CodecName) -> None:
    known = write_known(tmp_path / "s", replace(SPEC, codec=chain))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Numcodecs codecs")
        group = zarr.open_group(tmp_path / "s", mode="r")
        stored = known.stored
        resid, mlp = group["resid_post.3"], group["mlp_out.3"]
        assert resid.dtype == ml_dtypes.bfloat16
        assert np.array_equal(resid[:].view(np.uint16), stored["resid_post.3"])
        assert np.array_equal(mlp[:].view(np.uint32), stored["mlp_out.3"].view(np.uint32))
        assert np.array_equal(np.sort(group["sequence"][:]), np.arange(1000))


def test_own_reader_equals_zarr_chunk_by_chunk(known: Known) -> None:
    store = open_store(known.url)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Numcodecs codecs")
        with_zarr = zarr.open_group(known.url, mode="r")["resid_post.3"][:].view(np.uint16)
    for place, bucket in enumerate(store.index.buckets):
        first, stop = store.spec.bucket_range(int(bucket))
        for c in range(-(-(stop - first) // store.spec.chunk_rows)):
            rows = store.read_chunk("resid_post.3", place, c)
            at = first + c * store.spec.chunk_rows
            assert np.array_equal(rows, with_zarr[at : at + len(rows)])


def test_records_alone_and_manifest_tell_the_same(tmp_path: Path) -> None:
    write_known(tmp_path / "s", finalise=False)
    before = open_store(tmp_path / "s")
    assert not before.storage.exists(HEAD_KEY)
    open_writer(tmp_path / "s").finalise()
    after = open_store(tmp_path / "s")
    assert after.storage.exists(HEAD_KEY)
    assert before.fingerprint == after.fingerprint
    for name, a in before.index.arrays.items():
        assert np.array_equal(a.chunks, after.index.arrays[name].chunks)
    assert np.array_equal(before.stats("mlp_out.3").mean, after.stats("mlp_out.3").mean, equal_nan=True)
    files = [p for p in (tmp_path / "s").rglob("*") if p.is_file()]
    data = sum(p.stat().st_size for p in files if "/c/" in p.as_posix())
    assert after.stored_bytes == data


def test_statistics_are_those_of_the_decoded_values(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(1000, 24)) * 5 + 2).astype(ml_dtypes.bfloat16)
    y = rng.normal(size=(1000, 7)).astype(np.float32)
    writer = create_store(tmp_path / "s", SPEC)
    zeros = np.zeros(1000, np.int32)
    for b in reversed(range(4)):
        r = slice(*writer.bucket_range(b))
        sites = {"resid_post.3": x[r].view(np.uint16), "mlp_out.3": y[r]}
        write_rows(writer, b, sites, sequence=zeros[r], position=zeros[r], token_id=zeros[r])
    for site, values in (("resid_post.3", x.astype(np.float64)), ("mlp_out.3", y.astype(np.float64))):
        s = open_store(tmp_path / "s").stats(site)
        np.testing.assert_allclose(s.mean, values.mean(0), rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(s.variance, values.var(0), rtol=1e-11)
        np.testing.assert_allclose(s.mean_sq_norm, (values**2).sum(1).mean(), rtol=1e-13)
        assert s.max_abs == np.abs(values).max()
        assert s.rows == 1000


def parts_of(seed: int, count: int) -> list[stats.Sums]:
    """Statistics of buckets whose values have very different sizes, and cancel each other."""
    rng = np.random.default_rng(seed)
    rows = [(rng.normal(size=(9, 5)) * 10.0 ** rng.integers(-30, 30)).astype(np.float32) for _ in range(count)]
    return [stats.sums(x) for r in rows for x in (r, -r)]


@given(seed=st.integers(0, 1 << 32), count=st.integers(1, 12), cuts=st.lists(st.integers(1, 23), max_size=4))
@settings(max_examples=60, deadline=None)
def test_merged_statistics_are_rounded_once_however_they_are_grouped(seed: int, count: int, cuts: list[int]) -> None:
    """Against exact rational sums: any order, any grouping, through JSON, gives the float64 nearest to the sum."""
    parts = parts_of(seed, count)
    np.random.default_rng(seed).shuffle(parts)  # type: ignore[arg-type]
    bounds = sorted({0, len(parts), *(c for c in cuts if c < len(parts))})
    whole = stats.none(5)
    for a, b in pairwise(bounds):
        group = stats.none(5)
        for part in parts[a:b]:
            group = stats.merge(group, part, 5)
        stored = msgspec.json.decode(json.dumps(msgspec.to_builtins(group, enc_hook=to_json)))
        whole = stats.merge(whole, msgspec.convert(stored, stats.Sums, dec_hook=from_json), 5)
    found = stats.rounded(whole, 5)
    for name in ("total", "squares"):
        for k in range(5):
            exact = sum((Fraction(float(getattr(p, name)[k])) for p in parts), Fraction(0))
            assert getattr(found, name)[k] == float(exact)
    assert found.rows == 9 * len(parts)
    assert max(map(len, (whole.total, whole.squares))) < 20 * 5


def test_rows_with_nan_or_infinity_are_counted_named_and_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 24)).astype(ml_dtypes.bfloat16)
    y = rng.normal(size=(1000, 7)).astype(np.float32)
    bad = sorted(rng.choice(1000, 20, replace=False).tolist())
    for row in bad:
        y[row, rng.integers(7)] = rng.choice([np.nan, np.inf, -np.inf])
    x[17] = np.nan
    writer = create_store(tmp_path / "s", SPEC)
    for b in range(writer.buckets):
        assert isinstance(fill(writer, b, {"resid_post.3": x.view(np.uint16), "mlp_out.3": y}), record.CommitRecord)
    writer.finalise()
    s = open_store(tmp_path / "s").stats("mlp_out.3")
    finite = np.delete(y, bad, axis=0).astype(np.float64)
    np.testing.assert_allclose(s.mean, finite.mean(0), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(s.variance, finite.var(0), rtol=1e-11)
    assert (s.rows, s.nonfinite, list(s.nonfinite_rows)) == (1000, 20, bad[:8])
    assert s.max_abs == np.abs(finite).max()
    assert open_store(tmp_path / "s").stats("resid_post.3").nonfinite_rows == (17,)
    assert any("mlp_out.3: 20 rows hold NaN" in r for r in verify(open_storage(tmp_path / "s"), deep=False).remarks)


def test_a_bucket_is_committed_once(known: Known) -> None:
    writer = open_writer(known.url)
    before = {p: p.read_bytes() for p in Path(known.url).rglob("*") if p.is_file()}
    zeros = np.zeros(256, np.int32)
    other = {"resid_post.3": np.zeros((256, 24), np.uint16), "mlp_out.3": np.zeros((256, 7), np.float32)}
    data = {**other, "sequence": zeros, "position": zeros, "token_id": zeros}
    assert writer.write_arrays(1, data) is NotWritten.ALREADY_COMMITTED
    assert writer.is_committed(1)
    assert before == {p: p.read_bytes() for p in Path(known.url).rglob("*") if p.is_file()}


def test_partial_stores_show_committed_buckets_only(tmp_path: Path) -> None:
    write_known(tmp_path / "s", buckets=[2, 0])
    store = open_store(tmp_path / "s")
    assert store.index.buckets.tolist() == [0, 2]
    assert (store.rows, store.complete) == (512, False)
    write_known(tmp_path / "s", buckets=[1, 3])
    assert (open_store(tmp_path / "s").rows, open_store(tmp_path / "s").complete) == (1000, True)


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_9_leaves_whole_buckets_and_a_rerun_completes(tmp_path: Path, kills: int) -> None:
    """Killed at random moments, checked a dozen times on the way, then finished and compared with a quiet store."""
    spec = replace(SPEC, rows=256 * 4 * kills)
    undisturbed = write_known(tmp_path / "whole", spec)
    context = multiprocessing.get_context("fork")
    rng = np.random.default_rng(0)
    for kill in range(kills):
        process = context.Process(target=_finish_what_is_missing, args=(str(tmp_path / "s"), spec))
        process.start()
        time.sleep(float(rng.uniform(0.01, 0.15)))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if kill % (kills // 12) == 0 and (tmp_path / "s" / "zarr.json").exists():
            assert damage(tmp_path / "s") == []
    _finish_what_is_missing(str(tmp_path / "s"), spec)
    assert open_store(tmp_path / "s").fingerprint == open_store(undisturbed.url).fingerprint
    assert damage(tmp_path / "s") == []


def _finish_what_is_missing(url: str, spec: object) -> None:
    assert spec.__class__.__name__ == "StoreSpec"
    writer = create_store(url, spec)
    missing = sorted(set(range(writer.buckets)) - writer.committed())
    write_known(url, spec, buckets=missing)


def test_verify_names_each_damaged_object(known: Known) -> None:
    root = Path(known.url)
    assert damage(known.url) == []
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.stat().st_size]
    rng = np.random.default_rng(0)
    for path in files:
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        for content in (bytes(damaged), whole[:-1], None):
            path.unlink() if content is None else path.write_bytes(content)
            key = path.relative_to(root).as_posix()
            if content is None and key.startswith("manifest"):
                continue  # without a manifest the records speak
            try:
                assert key in {d.key for d in damage(known.url)}, key
            except StoreError as e:
                assert key in str(e)
            path.write_bytes(whole)
    assert damage(known.url) == []


@pytest.mark.parametrize("url", ["memory://round/trip", "file"])
def test_other_storage(url: str, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/s" if url == "file" else url
    known = write_known(url)
    store = open_store(url)
    assert np.array_equal(store["resid_post.3"][:].view(np.uint16), known.stored["resid_post.3"])
    assert damage(url) == []
    clear_memory("memory://round")


def test_different_settings_are_refused_field_by_field(known: Known) -> None:
    with pytest.raises(MismatchError) as e:
        create_store(known.url, replace(SPEC, seed=5, rows=2000, provenance={"model": {"name": "m"}}))
    absent = "provenance.model.name is absent, asked for 'm'"
    for part in ("seed is 0, asked for 5", "rows is 1000, asked for 2000", absent, "another place"):
        assert part in str(e.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_rows": 15}, "shard_rows.*multiple of chunk_rows"),
        ({"shard_rows": 96}, "bucket_rows.*multiple of shard_rows"),
        ({"rows": 0}, "rows is 0"),
        ({"sites": {}}, "at least one site"),
        ({"sites": {"../x": SiteSpec(d=3)}}, "site name"),
        ({"sites": {"sequence": SiteSpec(d=3)}}, "site name"),
        ({"sites": {"a.0": SiteSpec(d=0)}}, "d is 0"),
    ],
)
def test_impossible_specs(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **change)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"attributes": {}}', b'{"attributes": {"actstore": {"format_version": 2}}}', b"\xff"]
)
def test_foreign_groups_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "zarr.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"zarr\.json"):
        open_store(tmp_path)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_lying_metadata_is_a_store_error(data: st.DataObject) -> None:
    """Any JSON value in any one field of the group and of a commit record."""
    numbers = st.one_of(st.integers(-(1 << 70), 1 << 70), st.floats(allow_nan=False, allow_infinity=False))
    nested = st.one_of(st.lists(st.integers(-5, 5), max_size=3), st.dictionaries(st.text(max_size=3), st.integers()))
    junk = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=5), nested)
    whole = json.loads(group_metadata(SPEC))
    group = whole["attributes"]["actstore"]
    group[SEAL] = UNSEALED
    name = data.draw(st.sampled_from(sorted(group)))
    group[name] = data.draw(junk)
    try:
        assert spec_from_bytes(dump(whole), "here") is not None
    except StoreError as e:
        assert "here" in str(e)
    made = record.CommitRecord(
        bucket=0, attempt="a" * 16, rows=256,
        arrays={a: record.Chunks(stored=np.full(16, 9, np.uint32), crc32c=np.full(16, 1, np.uint32))
                for a in record.arrays(SPEC)},
        calibration={},
        stats={s: stats.sums(np.zeros((256, site.d), np.float32)) for s, site in SPEC.sites.items()},
        versions={},
    )  # fmt: skip
    parsed = json.loads(record.to_bytes(made))
    parsed[SEAL] = UNSEALED
    again = record.from_bytes(dump(parsed), SPEC, 0)
    assert isinstance(again, record.CommitRecord)
    assert record.to_bytes(again) == record.to_bytes(made)
    name = data.draw(st.sampled_from(sorted(parsed)))
    parsed[name] = data.draw(junk)
    try:
        record.from_bytes(dump(parsed), SPEC, 0)
    except StoreError as e:
        assert "commits/00000000.json" in str(e)


def test_names_cannot_leave_the_root(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "root")
    for key in ("../x", "a/../../x", "/etc/x", "a//b", "", "a\\b"):
        with pytest.raises(StoreError, match="relative path"):
            storage.put(key, b"x")


def test_create_has_one_winner(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    for url in (str(tmp_path), "memory://race"):
        storage = open_storage(url)
        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(lambda i, s=storage: s.create("k", b"%d" % i), range(16)))
        if url == str(tmp_path):
            assert sum(won) == 1
            assert storage.get("k") == b"%d" % won.index(True)
    clear_memory("memory://race")
    with pytest.raises(ValueError, match="unknown URL scheme"):
        open_storage("nope://x")


@pytest.mark.parametrize("chain", codec.CODECS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_smallest_stores_hold_every_value(tmp_path: Path, chain: codec.CodecName, dtype: type) -> None:
    """Width 1, a chunk that is the shard and the bucket, a last bucket of one row; each encoding of each dtype."""
    x = np.random.default_rng(0).normal(size=(5, 1)).astype(dtype)
    wide = x.astype(np.float32)
    for rows, encoding in product((1, 5), ("bf16", "f32", "fixed:1e-3")):
        url = tmp_path / f"{rows}-{encoding}"
        sizes = {"bucket_rows": 4, "shard_rows": 4, "chunk_rows": 4 if rows == 5 else 1}
        with actstore.create(str(url), sites={"x": 1, "y": 2}, encoding=encoding, codec=chain, threads=1, **sizes) as w:
            w.append({"x": x[:rows], "y": np.repeat(x[:rows], 2, axis=1)})
        store = open_store(url)
        place = np.concatenate(
            [store.spec.bucket_range(b)[0] + store.spec.permutation(b) for b in range(-(-rows // 4))]
        )
        found = {name: store[name][:][place] for name in ("x", "y")}
        if encoding.startswith("fixed"):
            for name, codes in found.items():
                steps = store.calibration(name)
                found[name] = codes * steps.scale.astype(np.float64) + steps.offset
                assert (np.abs(found[name] - wide[:rows]) <= 0.51 * steps.scale).all()
        else:
            expected = wide if encoding == "f32" else wide.astype(ml_dtypes.bfloat16)
            assert np.array_equal(found["x"], expected[:rows])
            assert np.array_equal(found["y"], np.repeat(expected[:rows], 2, axis=1))
        assert damage(url) == []


class Interrupted(LocalStorage):
    """A directory in which something happens once, right after one object was read."""

    def __init__(self, root: Path, key: str, event: Callable[[], object]) -> None:
        super().__init__(root)
        self.key, self.event = key, event

    def get(self, key: str, limit: int | None = None) -> bytes:
        try:
            return super().get(key, limit)
        finally:
            if key == self.key:
                self.key = ""
                self.event()


@pytest.mark.parametrize("key", [HEAD_KEY, GROUP_KEY])
def test_opening_while_the_writer_closes_shows_the_store_before_or_after(tmp_path: Path, key: str) -> None:
    """An open-ended store gets its rows, its last bucket and its manifest between two reads of one opening."""
    sizes = {"bucket_rows": 64, "shard_rows": 16, "chunk_rows": 8}
    writer = actstore.create(str(tmp_path / "s"), sites={"x": 3}, encoding="f32", threads=1, **sizes)
    writer.append({"x": np.ones((150, 3), np.float32)})
    while open_store(tmp_path / "s").rows < 128:
        time.sleep(0.01)
    store = Store(Interrupted(tmp_path / "s", key, writer.close))
    assert (store.rows, store.complete) in ((128, False), (150, True))
    assert len(store["x"][:128]) == 128
    assert open_store(tmp_path / "s").rows == 150


def test_unknown_site_names_what_exists(known: Known) -> None:
    with pytest.raises(ValueError, match=r"no site 'resid_post\.4'; it has mlp_out\.3, resid_post\.3"):
        open_store(known.url).stats("resid_post.4")


def test_random_sites_hold_every_kind_of_value() -> None:
    values = random_sites(SPEC)["mlp_out.3"]
    assert np.isnan(values).any()
    assert np.signbit(values).any()
