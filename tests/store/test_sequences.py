"""Rows by number and whole sequences, against arrays that are put in the order of rows by hand."""

import tempfile
import threading
import tracemalloc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import SPEC, Known, replace, write_rows
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from servers import REMOTE, server_of

import actstore
from actstore.errors import ActstoreWarning, IntegrityError, StoreError
from actstore.store import SiteSpec, Store, StoreSpec, create_store
from actstore.store.format import fixed, stats
from actstore.store.format.spec import calibration_key
from actstore.store.read import rows as rows_module
from actstore.store.read.index import Location
from actstore.store.storage import LocalStorage

CAPTURED: dict[str, Any] = {"tokens": {"fingerprint": "0" * 32}}
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Brute:
    """Every array of a store in the order of rows, gaps included, and which rows are committed."""

    arrays: Arrays
    committed: np.ndarray

    def rows(self, number: int) -> np.ndarray:
        return np.flatnonzero((self.arrays["sequence"] == number) & self.committed)

    def equal(self, found: dict[str, Any], rows: np.ndarray, names: list[str]) -> None:
        assert set(found) == {*names, "sequence", "position", "token_id"}
        for name in (*names, "position", "token_id"):
            expected = self.arrays[name][rows]
            assert found[name].dtype == expected.dtype, name
            assert np.array_equal(bits(found[name]), bits(expected)), name
            assert found[name].flags.writeable
            assert found[name].flags.owndata or found[name].base.nbytes == found[name].nbytes


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)


def in_sequences(spec: StoreSpec, lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sequence and position of every row: sequences of these lengths, again and again; both have gaps."""
    sequence, position = np.full(spec.rows, -1, np.int32), np.full(spec.rows, -1, np.int32)
    rows = np.concatenate([np.arange(*spec.bucket_range(b)) for b in range(spec.buckets)])
    at = number = 0
    while at < len(rows):
        n = lengths[number % len(lengths)]
        here = rows[at : at + n]
        sequence[here] = 2 * number + number // 3
        kept = np.arange(len(here))
        position[here] = 1 + kept + kept // 3
        at, number = at + n, number + 1
    return sequence, position


def write(
    url: str | Path,
    spec: StoreSpec,
    sequence: np.ndarray,
    position: np.ndarray,
    *,
    buckets: Any = None,
    finalise: bool = True,
) -> Brute:
    rng = np.random.default_rng(spec.rows)
    given_: Arrays = {}
    for name, site in spec.sites.items():
        raw = rng.integers(0, 1 << 32, (spec.rows, site.d), dtype=np.uint32)  # every bit pattern, NaN too
        given_[name] = (raw >> 16).astype(np.uint16) if site.kind == "bf16" else raw.view(np.float32)
        if site.kind == "fixed":
            given_[name] = rng.normal(size=(spec.rows, site.d)).astype(np.float32)
    token_id = np.random.default_rng(1).integers(0, 99, spec.rows, np.int32)
    arrays = {"sequence": sequence, "position": position, "token_id": token_id}
    writer = create_store(url, spec, threads=2)
    for name in spec.fixed_sites:  # of all rows: a first bucket of one row would clip the others
        calibration = fixed.calibrate(stats.sums(given_[name]), 1e-3, given_[name])
        writer.storage.create(calibration_key(name), fixed.to_bytes(calibration))
    committed = np.zeros(spec.rows, bool)
    for b in range(spec.buckets) if buckets is None else buckets:
        rows = np.arange(*spec.bucket_range(b))
        stored = rows[np.argsort(spec.permutation(b))]
        sites = {name: x[stored] for name, x in given_.items()}
        write_rows(writer, b, sites, **{name: x[stored] for name, x in arrays.items()})
        committed[rows] = True
    if finalise:
        writer.finalise()
    store = actstore.open(url)
    for name, site in spec.sites.items():
        arrays[name] = given_[name].view(ml_dtypes.bfloat16) if site.kind == "bf16" else given_[name]
        if site.kind == "fixed":
            arrays[name] = np.zeros((spec.rows, site.d), np.float32)
            for place, b in enumerate(store.index.buckets.tolist()):
                first, stop = spec.bucket_range(b)
                chunks = range(-(-(stop - first) // spec.chunk_rows))
                codes = np.concatenate([store.read_chunk(name, place, c) for c in chunks])[spec.permutation(b)]
                arrays[name][first:stop] = fixed.dequantise(codes, store.calibration(name))
    return Brute(arrays, committed)


@contextmanager
def watched() -> Iterator[tuple[list[tuple[str, int, int]], list[tuple[str, int]]]]:
    """Requests for ranges, and chunks that are decoded, of any store while it lasts."""
    requests: list[tuple[str, int, int]] = []
    decoded: list[tuple[str, int]] = []
    decode, lock = Store.decode_chunk, threading.Lock()

    def decode_chunk(self: Store, name: str, at: Location, data: Any) -> Any:
        with lock:
            decoded.append((at.key, at.offset))
        return decode(self, name, at, data)

    with pytest.MonkeyPatch.context() as patch:
        for kind in (LocalStorage, actstore.store.storage.RemoteStorage):
            get = kind.get_range

            def get_range(self: Any, key: str, offset: int, length: int, get: Any = get) -> Any:
                with lock:
                    requests.append((key, offset, length))
                return get(self, key, offset, length)

            patch.setattr(kind, "get_range", get_range)
        patch.setattr(Store, "decode_chunk", decode_chunk)
        yield requests, decoded


def numbers_of(found: Any) -> list[int]:
    return [s["sequence"] for s in found]


@st.composite
def specs(draw: st.DrawFn) -> StoreSpec:
    chunk = draw(st.integers(1, 9))
    shard = chunk * draw(st.integers(1, 3))
    bucket = shard * draw(st.integers(1, 4))
    rows = draw(st.integers(1, 5 * bucket))
    short = []
    if bucket > 1:
        last = -(-rows // bucket) - 1
        short = [(b, draw(st.integers(1, bucket - 1))) for b in range(last) if draw(st.booleans())]
    encodings = draw(st.lists(st.sampled_from(["bf16", "f32", "fixed:1e-3"]), min_size=1, max_size=2))
    return StoreSpec(
        sites={f"s.{i}": SiteSpec(d=draw(st.integers(1, 9)), encoding=e) for i, e in enumerate(encodings)},
        rows=rows,
        bucket_rows=bucket,
        shard_rows=shard,
        chunk_rows=chunk,
        seed=draw(st.integers(-5, 5)),
        codec=draw(st.sampled_from(["planes", "blosc", "none"])),
        provenance=draw(st.sampled_from([{}, CAPTURED])),
        short_buckets=tuple(short),
    )


@given(
    spec=specs(),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    seed=st.integers(0, 1 << 20),
    gap=st.sampled_from([0, 50, 1 << 19]),
    missing=st.sets(st.integers(0, 4), max_size=3),
)
@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_everything_equals_brute_force(
    spec: StoreSpec, lengths: list[int], seed: int, gap: int, missing: set[int]
) -> None:
    buckets = [b for b in range(spec.buckets) if b not in missing] or [spec.buckets - 1]
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "GAP_BYTES", gap)
        whole = len(buckets) == spec.buckets
        brute = write(Path(folder) / "s", spec, *in_sequences(spec, lengths), buckets=buckets, finalise=whole)
        store, names = actstore.open(Path(folder) / "s"), list(spec.sites)
        rows = rng.choice(np.flatnonzero(brute.committed), rng.integers(0, 40))
        taken = store.take(rows, names[:1])
        brute.equal(taken, rows, names[:1])
        assert np.array_equal(taken["sequence"], brute.arrays["sequence"][rows])

        beside = np.zeros(spec.rows + 2, bool)  # rows at an end of a bucket that is beside one that is not committed
        for b in buckets:
            first, stop = spec.bucket_range(b)
            beside[first] |= b > 0 and b - 1 not in buckets
            beside[stop - 1] |= b + 1 < spec.buckets and b + 1 not in buckets
        cut = set(brute.arrays["sequence"][beside[: spec.rows]].tolist())
        there = np.unique(brute.arrays["sequence"][brute.committed]).tolist()
        for number in there:
            if number in cut:
                with pytest.raises(StoreError, match="not committed"):
                    store.sequence(number)
            else:
                brute.equal(store.sequence(number), brute.rows(number), names)
        for shuffle in (False, True):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = store.sequences(shuffle=shuffle, seed=seed)
            assert found.left_out == len(cut)
            assert len(said) == (1 if cut else 0)
            everything = list(found)
            assert sorted(numbers_of(everything)) == sorted(set(there) - cut)
            assert shuffle or numbers_of(everything) == sorted(set(there) - cut)
            for s in everything:
                brute.equal(s, brute.rows(s["sequence"]), names)
            start = int(rng.integers(0, len(everything) + 2))
            rest = list(store.sequences(shuffle=shuffle, seed=seed, start=start))
            assert numbers_of(rest) == numbers_of(everything)[start:]
            for s in rest:
                brute.equal(s, brute.rows(s["sequence"]), names)


BIG = replace(
    SPEC,
    sites={"resid_post.3": SiteSpec(d=24), "mlp_out.3": SiteSpec(d=7, encoding="f32")},
    rows=2000,
    codec="none",
    provenance=CAPTURED,
)
LENGTHS = [30, 17, 1, 44]
FIRST_SHUFFLED = [144, 135, 151, 140, 137, 133, 149, 130]
"""The first sequences of seed 0, which no later version may change."""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Brute]:
    url = tmp_path_factory.mktemp("sequences") / "s"
    return str(url), write(url, BIG, *in_sequences(BIG, LENGTHS))


@pytest.mark.parametrize("backend", ["local", *REMOTE])
def test_near_chunks_come_in_one_request_and_none_twice(
    backend: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "s") if backend == "local" else server_of(backend, request).fresh()
    brute = write(url, BIG, *in_sequences(BIG, LENGTHS))
    store = actstore.open(url)
    rows = np.concatenate([np.arange(256, 512), np.arange(300, 310)])
    with watched() as (requests, decoded):
        brute.equal(store.take(rows, "resid_post.3"), rows, ["resid_post.3"])
    # bucket 1 has 16 chunks of each array; its four shards of the site are an object each, provenance has one shard
    assert len(decoded) == len(set(decoded)) == 4 * 16
    assert len(requests) == 4 + 3
    with watched() as (requests, _):
        store.take([0], [])
    assert len(requests) == 3
    monkeypatch.setattr(rows_module, "REQUEST_BYTES", 2 * (16 * 24 * 2 + 4))
    with watched() as (requests, _):
        brute.equal(store.take(rows, "resid_post.3"), rows, ["resid_post.3"])
    assert len([key for key, _, _ in requests if key.startswith("resid")]) == 4 * 2


def test_the_gap_decides_what_is_fetched_for_nothing(big: tuple[str, Brute], monkeypatch: pytest.MonkeyPatch) -> None:
    store, chunk = actstore.open(big[0]), 16 * 24 * 2 + 4
    stored = np.argsort(BIG.permutation(0))  # the row at each place
    rows = [int(stored[0]), int(stored[3 * 16])]  # in chunks 0 and 3 of the first shard
    for gap, expected in ((2 * chunk, [4 * chunk]), (2 * chunk - 1, [chunk, chunk])):
        monkeypatch.setattr(rows_module, "GAP_BYTES", gap)
        with watched() as (requests, decoded):
            big[1].equal(store.take(rows, "resid_post.3"), np.array(rows), ["resid_post.3"])
        assert [length for key, _, length in requests if key.startswith("resid")] == expected
        assert len([key for key, _ in decoded if key.startswith("resid")]) == 2


def test_what_a_row_number_may_be(big: tuple[str, Brute]) -> None:
    store, brute = actstore.open(big[0]), big[1]
    for numbers in ([5, 5, 1999, 0], range(3, 9), np.array([7], np.uint64), torch.tensor([9, 2]), (np.int8(4), 3), [1]):
        rows = np.array([int(n) for n in numbers])
        brute.equal(store.take(numbers), rows, list(BIG.sites))
    empty = store.take([])
    assert {k: (v.shape, v.dtype.name) for k, v in empty.items()} == {
        "mlp_out.3": ((0, 7), "float32"),
        "resid_post.3": ((0, 24), "bfloat16"),
        **dict.fromkeys(("sequence", "position", "token_id"), ((0,), "int32")),
    }
    assert set(store.take([1], [])) == {"sequence", "position", "token_id"}
    as_torch = torch.from_numpy(store.take([3])["resid_post.3"].view(np.int16)).view(torch.bfloat16)
    assert as_torch.shape == (1, 24)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([3, -1], "no row -1: its rows are 0 to 1999"),
        ([2000], "no row 2000: its rows are 0 to 1999"),
        ([1, 2.5], "2.5 is not a whole number"),
        ([1.0], "1.0 is not a whole number"),
        ([1, 1 << 70], "1180591620717411303424 is not"),
        ([1, 1 << 63], "9223372036854775808 is not"),
        (np.array([1 << 63], np.uint64), "9223372036854775808 is not"),
        ([True, False], "True is not"),
        (["7"], "7 is not"),
        ([None], "None is not"),
        (7, "numbers is 7, expected a list"),
        (None, "expected a list"),
        ({1, 2}, "expected a list"),
        ([[1, 2]], "expected a list"),
        ([[1], [2, 3]], "can't be read as numbers"),
        (np.array([1], "M8[s]"), "is not a whole number"),
        ([float("nan")], "nan is not"),
    ],
)
def test_other_row_numbers_are_refused(big: tuple[str, Brute], numbers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        actstore.open(big[0]).take(numbers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": "resid_post.9"}, "no site 'resid_post.9'; it has mlp_out.3, resid_post.3"),
        ({"sites": ["mlp_out.3", "sequence"]}, "no site 'sequence'"),
        ({"start": -1}, "start is -1"),
        ({"start": 0.5}, "start: 0.5 is not a whole number"),
        ({"seed": "x"}, "seed: x is not a whole number"),
        ({"seed": None}, "seed: None is not"),
        ({"pool": "max"}, "pool is 'max', expected 'last', 'mean' or None"),
        ({"pool": "mean", "pairs": True}, "pool or pairs, not both"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(big: tuple[str, Brute], arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        actstore.open(big[0]).sequences(**arguments)


def test_a_sequence_that_is_not_there(big: tuple[str, Brute]) -> None:
    store = actstore.open(big[0])
    last = int(big[1].arrays["sequence"][-1])
    for number in (1, -1, last + 1, 1 << 40):
        with pytest.raises(ValueError, match=f"no row of sequence {number}; its rows are of sequences 0 to {last}$"):
            store.sequence(number)
    with pytest.raises(ValueError, match=r"number: 1\.5 is not"):
        store.sequence(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no site"):
        store.sequence(0, "x")


def test_searching_looks_at_few_buckets_of_a_captured_store(tmp_path: Path) -> None:
    spec = replace(BIG, rows=64 * 256)
    brute = write(tmp_path / "s", spec, *in_sequences(spec, LENGTHS))
    store = actstore.open(tmp_path / "s")
    number = int(brute.arrays["sequence"][40 * 256 + 128])
    with watched() as (requests, _):
        brute.equal(store.sequence(number, []), brute.rows(number), [])
    # two ends in one request for each of 1 + log2(64) buckets and perhaps a neighbour; then the bucket itself
    assert len({key for key, _, _ in requests if key.startswith("sequence")}) <= 9
    assert len(requests) <= 9 + 3
    with watched() as (requests, _):
        brute.equal(store.sequence(number, []), brute.rows(number), [])
    assert len(requests) == 3


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (np.full(600, -1), "rows have no sequence"),
        (np.r_[np.full(300, -1), np.arange(300)], "rows have no sequence"),
        (np.arange(600)[::-1] // 10, r"sequence \d+ comes after \d+"),
        (np.r_[np.arange(300), np.arange(300)] // 10, r"sequence \d+ comes after 2\d, expected numbers that ascend"),
    ],
)
def test_sequences_that_do_not_ascend_are_refused(
    tmp_path: Path, sequence: np.ndarray, message: str, captured: bool
) -> None:
    """At once, unless the store says that it was captured: then when the rows that show it are read."""
    spec = replace(BIG, rows=600, bucket_rows=64, provenance=CAPTURED if captured else {})
    write(tmp_path / "s", spec, sequence.astype(np.int32), np.zeros(600, np.int32))
    store = actstore.open(tmp_path / "s")
    with pytest.raises(StoreError, match=message):
        list(store.sequences()) if captured else store.sequences()
    if not captured:
        with pytest.raises(StoreError, match=message):
            store.sequence(3)
    assert len(store.take(range(600))["sequence"]) == 600


def test_appended_rows_come_by_position(tmp_path: Path) -> None:
    """From `actstore.create`: positions as they were given, in any order, and ids unknown."""
    x = np.arange(40, dtype=np.float32).reshape(20, 2)
    sequence, position = np.repeat([3, 8], 10), np.r_[np.arange(10)[::-1], np.full(10, -1)]
    with actstore.create(
        tmp_path / "s", sites={"s": 2}, encoding="f32", bucket_rows=8, shard_rows=8, chunk_rows=2
    ) as writer:
        writer.append({"s": x}, sequence=sequence, position=position)
    store = actstore.open(tmp_path / "s")
    first, second = store.sequences()
    assert first["position"].tolist() == list(range(10))
    assert np.array_equal(first["s"], x[:10][::-1])
    assert np.array_equal(second["s"], x[10:])
    assert np.array_equal(store.sequence(3)["s"], first["s"])
    assert [len(s["s"][0]) for s in store.sequences(pairs=True)] == [9, 0]


def test_an_empty_store_has_no_sequences(tmp_path: Path) -> None:
    create_store(tmp_path / "s", BIG)
    store = actstore.open(tmp_path / "s")
    for call in (store.sequences, lambda: store.sequence(0)):
        with pytest.raises(StoreError, match="no committed bucket yet"):
            call()
    assert store.take([])["resid_post.3"].shape == (0, 24)


def test_rows_that_are_not_committed_are_refused(tmp_path: Path) -> None:
    spec = replace(BIG, short_buckets=((5, 7),))
    write(tmp_path / "s", spec, *in_sequences(spec, LENGTHS), buckets=[0, 1, 3, 5, 6], finalise=False)
    store = actstore.open(tmp_path / "s")
    with pytest.raises(StoreError, match=r"no row 600 yet: rows 512 to 767 \(bucket 2\) are not committed"):
        store.take([0, 600])
    with pytest.raises(ValueError, match="no row 1287: after row 1286 comes row 1536, of an extension"):
        store.take([1286, 1287])
    with pytest.warns(ActstoreWarning, match="5 sequences are left out") as said:
        left_out = store.sequences().left_out
    assert left_out == 5
    assert [w.filename for w in said] == [__file__]
    with pytest.raises(StoreError, match="unfinished"):
        store.sequence(10**6)


def test_pooled_and_in_pairs(big: tuple[str, Brute]) -> None:
    store, brute = actstore.open(big[0]), big[1]
    names = list(BIG.sites)
    with np.errstate(all="ignore"):
        for how in ("last", "mean"):
            for s in store.sequences(pool=how):
                rows = brute.rows(s["sequence"])
                assert np.array_equal(s["position"], brute.arrays["position"][rows])
                for name in names:
                    x = brute.arrays[name][rows]
                    mean = np.stack([x[:, j].astype(np.float64) for j in range(x.shape[1])], 1).mean(0)
                    expected = x[-1] if how == "last" else mean.astype(np.float32)
                    assert s[name].dtype == expected.dtype
                    assert s[name].shape == expected.shape
                    assert np.array_equal(s[name].astype(np.float32), expected.astype(np.float32), equal_nan=True)
    for s in store.sequences(pairs=True, shuffle=True):
        rows = brute.rows(s["sequence"])
        p = brute.arrays["position"][rows]
        pairs = [(a, b) for a, b, q, r in zip(rows, rows[1:], p, p[1:], strict=False) if r == q + 1]
        for name in (*names, "position", "token_id"):
            for side, found in enumerate(s[name]):
                assert np.array_equal(bits(found), bits(brute.arrays[name][[pair[side] for pair in pairs]]))


def test_means_round_once(tmp_path: Path) -> None:
    spec = StoreSpec(sites={"s": SiteSpec(d=1, encoding="f32")}, rows=3, bucket_rows=4, shard_rows=4, chunk_rows=2)
    writer = create_store(tmp_path / "s", spec)
    values, zero = np.array([[2.0**25], [1], [1]], np.float32), np.zeros(3, np.int32)
    order = np.argsort(spec.permutation(0))
    write_rows(writer, 0, {"s": values[order]}, sequence=zero, position=order.astype(np.int32), token_id=zero)
    (s,) = actstore.open(tmp_path / "s").sequences(pool="mean")
    assert s["s"].tolist() == [np.float32((2**25 + 2) / 3)]


def test_the_order_is_a_function_of_the_seed(big: tuple[str, Brute]) -> None:
    store = actstore.open(big[0])
    orders = [numbers_of(store.sequences([], shuffle=True, seed=seed)) for seed in (0, 0, 1, -1)]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != sorted(orders[0])
    assert orders[0][:8] == FIRST_SHUFFLED


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_chunk_is_read_once_and_what_start_passes_over_not_at_all(big: tuple[str, Brute], shuffle: bool) -> None:
    store = actstore.open(big[0])
    with watched() as (_, decoded):
        everything = numbers_of(store.sequences(shuffle=shuffle))
    sites = [d for d in decoded if d[0].startswith(("resid", "mlp", "token", "position"))]
    assert len(sites) == len(set(sites)) == 4 * 125
    with watched() as (_, decoded):
        assert numbers_of(store.sequences(shuffle=shuffle, start=len(everything))) == []
    assert all(key.startswith("sequence") for key, _ in decoded)


@pytest.mark.parametrize("shuffle", [False, True])
def test_memory_is_about_a_bucket(tmp_path: Path, shuffle: bool) -> None:
    spec = StoreSpec(sites={"s": SiteSpec(d=256)}, rows=16 << 10, bucket_rows=1 << 10, shard_rows=256, chunk_rows=32)
    write(tmp_path / "s", spec, *in_sequences(spec, [20, 40]))
    store, bucket = actstore.open(tmp_path / "s"), 512 << 10
    list(store.sequences([]))
    tracemalloc.start()
    try:
        for _ in store.sequences(shuffle=shuffle):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert bucket < peak < 3 * bucket  # the store has 16


def test_damage_names_the_chunk(tmp_path: Path) -> None:
    write(tmp_path / "s", BIG, *in_sequences(BIG, LENGTHS))
    shard = tmp_path / "s/resid_post.3/c/5/0"
    data = bytearray(shard.read_bytes())
    data[16 * 24 * 2 + 4 + 9] ^= 1
    shard.write_bytes(data)
    store = actstore.open(tmp_path / "s")
    for call in (lambda: store.take(range(2000)), lambda: list(store.sequences())):
        with pytest.raises(IntegrityError, match=r"resid_post\.3/c/5/0 chunk at byte 772"):
            call()
    assert len(list(store.sequences("mlp_out.3"))) == len(np.unique(store.take(range(2000), [])["sequence"]))


def test_joined_stores(big: tuple[str, Brute], tmp_path: Path) -> None:
    tuned = replace(BIG, sites={"resid_post.3": SiteSpec(d=5, encoding="fixed:1e-3")})
    other = write(tmp_path / "tuned", tuned, *in_sequences(tuned, LENGTHS))
    store = actstore.join({"base": big[0], "tuned": tmp_path / "tuned"})
    brute = Brute({f"base:{k}": v for k, v in big[1].arrays.items()} | big[1].arrays, big[1].committed)
    brute.arrays["tuned:resid_post.3"] = other.arrays["resid_post.3"]
    names = ["base:mlp_out.3", "tuned:resid_post.3"]
    rows = np.array([1999, 3, 700])
    brute.equal(store.take(rows, names), rows, names)
    for s in (store.sequence(4, names), *store.sequences(names, shuffle=True)):
        brute.equal(s, brute.rows(s["sequence"]), names)


def test_known_rows_of_the_shared_store(known: Known) -> None:
    """Written by code that all other tests use: row r has sequence r."""
    store = actstore.open(known.url)
    rows = np.random.default_rng(0).permutation(1000)
    found = store.take(rows, "resid_post.3")
    assert np.array_equal(found["sequence"], rows)
    assert np.array_equal(found["resid_post.3"].view(np.uint16), known.sites["resid_post.3"][rows])
