"""Datasets of several stores: mixtures, joins and stacks."""

import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import SPEC, Known, with_settings, write_known
from hypothesis import given, settings

import actstore
from actstore.errors import MismatchError, StreamError
from actstore.store.format.spec import SiteSpec
from actstore.stream import Settings

SITE, OTHER = "resid_post.3", "mlp_out.3"
WIDE = {SITE: SiteSpec(d=24), "resid_post.4": SiteSpec(d=24)}


def store(folder: Path, name: str, rows: int, **changes: Any) -> Known:
    return write_known(folder / name, replace(SPEC, rows=rows, **changes))


def mixed(stores: Any, **changes: Any) -> actstore.ActivationDataset:
    asked = {"sites": [SITE], "with_rows": True, "batch_size": 64, "shuffle_chunks": 16}
    return actstore.ActivationDataset(stores, **with_settings(asked | changes))


def origin(batch: dict[str, torch.Tensor], stores: dict[str, Known]) -> list[tuple[str, int]]:
    """Which store each row is from, found by its values alone."""
    found: list[tuple[str, int]] = []
    for bits, row in zip(batch[SITE].view(torch.uint16).numpy(), batch["sequence"].tolist(), strict=True):
        (name,) = [n for n, k in stores.items() if row < k.spec.rows and np.array_equal(k.sites[SITE][row], bits)]
        found.append((name, row))
    return found


@pytest.fixture
def two(tmp_path: Path) -> dict[str, Known]:
    sites = {SITE: SiteSpec(d=24)}
    found = {"web": store(tmp_path, "web", 1000, sites=sites), "code": store(tmp_path, "code", 300, sites=sites)}
    found["code"].sites[SITE][:] ^= 0  # its rows equal the first ones of the other store: same seed
    spec = replace(SPEC, rows=300, sites=sites)
    found["code"] = write_other(tmp_path / "code2", spec)
    return found


def write_other(url: Path, spec: Any) -> Known:
    """A store of other values."""
    from conftest import create_store, fill, random_sites

    known = Known(str(url), spec, random_sites(spec, seed=7))
    writer = create_store(url, spec, threads=1)
    for bucket in range(spec.buckets):
        fill(writer, bucket, known.sites)
    writer.finalise()
    return known


def weights(two: dict[str, Known]) -> dict[str, float]:
    return {two["web"].url: 0.75, two["code"].url: 0.25}


def test_a_mixture_has_each_store_s_share_in_every_batch_and_stops_with_the_first(two: dict[str, Known]) -> None:
    with mixed(weights(two)) as ds:
        assert len(ds) == min(1000 // 48, 300 // 16)
        rows = [r for batch in ds for r in origin(batch, two)]
        assert len(set(rows)) == len(rows) == 64 * len(ds)
        assert sum(name == "code" for name, _ in rows) == 16 * len(ds)
        assert ds.explain(probe=False)["stores"][1]["rows_per_batch"] == 16
        assert "epoch 1, step 0" in repr(ds)


def test_the_smaller_store_of_a_mixture_repeats_in_new_order(two: dict[str, Known]) -> None:
    with mixed(weights(two), exhausted="repeat") as ds:
        assert len(ds) == 1000 // 48
        batches = [origin(batch, two) for batch in ds]
        code = [[r for name, r in batch if name == "code"] for batch in batches]
        lap = 300 // 16
        first, second = ([r for batch in part for r in batch] for part in (code[:lap], code[lap:]))
        assert len(set(first)) == len(first)
        assert len(set(second)) == len(second)
        assert first[: len(second)] != second
        next_epoch = [[r for name, r in origin(batch, two) if name == "code"] for batch in ds]
        assert next_epoch[0] not in (code[0], code[lap])


@pytest.mark.parametrize("exhausted", ["stop", "repeat"])
@pytest.mark.parametrize("isolate", [False, True])
def test_a_mixture_resumes_exactly_at_any_world_size(two: dict[str, Known], exhausted: str, isolate: bool) -> None:
    with mixed(weights(two), exhausted=exhausted, drop_last=False) as ds:
        alone = [sorted(origin(batch, two)) for batch in ds]
    for world in (1, 2, 4):
        ranks: list[list[list[tuple[str, int]]]] = []
        for rank in range(world):
            more = {"exhausted": exhausted, "drop_last": False, "rank": rank, "world_size": world}
            ds = mixed(weights(two), **more, isolate=isolate and world == 2)
            batches = iter(ds)
            head = [origin(next(batches), two) for _ in range(3)]
            state = ds.state_dict()
            ds.close()
            with mixed(list(weights(two).items()), **more) as again:
                again.load_state_dict(state)
                ranks.append(head + [origin(batch, two) for batch in again])
        assert [sorted(row for part in parts for row in part) for parts in zip(*ranks, strict=True)] == alone


def test_mixtures_that_do_not_fit_are_refused_with_what_does(two: dict[str, Known], tmp_path: Path) -> None:
    a, b = (two[n].url for n in ("web", "code"))
    with pytest.raises(ValueError, match=r"sum to 1\.2, expected 1: 0\.75, 0\.25"):
        mixed({a: 0.9, b: 0.3})
    with pytest.raises(ValueError, match=r"none of the store of weight 0\.01; use batch_size=800"):
        mixed({a: 0.99, b: 0.01})
    narrow = store(tmp_path, "narrow", 300, sites={SITE: SiteSpec(d=8)})
    with pytest.raises(ValueError, match=r"is \[24\] torch.bfloat16 in .*web and \[8\]"):
        mixed({a: 0.5, narrow.url: 0.5})
    lacking = store(tmp_path, "lacking", 300, sites={OTHER: SiteSpec(d=8)})
    with pytest.raises(ValueError, match=r"lacking has no site 'resid_post.3'; it has mlp_out.3"):
        mixed({a: 0.5, lacking.url: 0.5})
    with mixed({a: 0.75, b: 0.25}) as ds, mixed({a: 0.5, b: 0.5}) as other:
        with pytest.raises(MismatchError, match="batch_size of store 0"):
            other.load_state_dict(ds.state_dict())
        with pytest.raises(ValueError, match="several stores"):
            _ = ds.store


def test_normalisation_of_a_mixture_is_one_factor_for_all(two: dict[str, Known], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    urls: list[str] = []
    for name, scale in (("a", 1.0), ("b", 3.0)):
        with actstore.create(
            tmp_path / name, sites={SITE: 8}, bucket_rows=256, shard_rows=256, chunk_rows=64, encoding="f32"
        ) as w:
            w.append({SITE: (rng.standard_normal((1024, 8)) * scale).astype(np.float32)})
        urls.append(str(tmp_path / name))
    with mixed(dict.fromkeys(urls, 0.5), normalize="unit_mean_square", with_rows=False) as ds:
        whole = torch.cat([b[SITE] for b in ds]).double()
        assert abs(float(whole.square().sum(1).mean()) - 1) < 1e-5
        assert ds.mean_sq_norm(SITE) == sum(actstore.open(u).stats(SITE).mean_sq_norm for u in urls) / 2


@pytest.mark.parametrize("device", [None, "cpu"])
def test_sites_of_one_width_are_stacked(tmp_path: Path, device: str | None) -> None:
    known = write_known(tmp_path / "s", replace(SPEC, sites=WIDE))
    names = ["resid_post.4", SITE]
    with mixed(known.url, sites=names, stack=True, device=device) as ds:
        for batch in ds:
            rows = batch["sequence"].numpy()
            for i, name in enumerate(names):
                assert np.array_equal(batch["activations"][:, i].view(torch.uint16).numpy(), known.sites[name][rows])
    with mixed(known.url, sites=names, stack=True, with_rows=False, dtype="float32", device=device) as ds:
        batch = next(iter(ds))
        assert batch.shape == (64, 2, 24)
        assert batch.dtype == torch.float32
        ds.close()
    with mixed(known.url, sites=names, with_rows=False, dtype="float32") as ds:
        parts = next(iter(ds))
        assert torch.equal(torch.stack([parts[n] for n in names], 1).nan_to_num(), batch.nan_to_num())
        ds.close()


def test_a_stack_of_different_widths_is_refused(tmp_path: Path) -> None:
    known = write_known(tmp_path / "s")
    with pytest.raises(ValueError, match=r"one width; widths are resid_post.3 24, mlp_out.3 7"):
        mixed(known.url, sites=[SITE, OTHER], stack=True)


def test_a_stack_comes_out_of_another_process_too(tmp_path: Path) -> None:
    known = write_known(tmp_path / "s", replace(SPEC, sites=WIDE))
    with (
        mixed(known.url, sites=list(WIDE), stack=True, with_rows=False) as here,
        mixed(known.url, sites=list(WIDE), stack=True, with_rows=False, isolate=True) as there,
    ):
        for a, b in zip(here, there, strict=True):
            assert torch.equal(a.view(torch.int16), b.view(torch.int16))


def joined(tmp_path: Path) -> tuple[Known, Known]:
    """Two stores of the same rows: the same geometry and provenance, other sites and values."""
    base = write_known(tmp_path / "base", replace(SPEC, sites={SITE: SiteSpec(d=24)}))
    tuned = write_other(tmp_path / "tuned", replace(SPEC, sites={SITE: SiteSpec(d=24)}, codec="none"))
    return base, tuned


@pytest.mark.parametrize("isolate", [False, True])
def test_joined_stores_are_read_row_by_row(tmp_path: Path, isolate: bool) -> None:
    base, tuned = joined(tmp_path)
    whole = actstore.join({"base": base.url, "tuned": tuned.url})
    assert sorted(whole.sites) == [f"base:{SITE}", f"tuned:{SITE}"]
    with mixed(whole, sites=list(whole.sites), isolate=isolate, drop_last=False, drop_positions=[0]) as ds:
        rows = 0
        for batch in ds:
            at = batch["sequence"].numpy()
            rows += len(at)
            for name, known in (("base", base), ("tuned", tuned)):
                assert np.array_equal(batch[f"{name}:{SITE}"].view(torch.uint16).numpy(), known.sites[SITE][at])
        assert rows == 1000 - len(range(0, 1000, 7))
        state = ds.state_dict()
    with mixed(actstore.join({"base": base.url, "tuned": tuned.url}), sites=list(whole.sites), drop_positions=[0],
               drop_last=False) as ds:  # fmt: skip
        ds.load_state_dict(state)
    assert np.array_equal(np.asarray(whole[f"tuned:{SITE}"]).view(np.uint16), tuned.stored[SITE])


def test_one_store_a_layer_keeps_its_sites_names(tmp_path: Path) -> None:
    a = write_known(tmp_path / "a", replace(SPEC, sites={SITE: SiteSpec(d=24)}))
    b = write_known(tmp_path / "b", replace(SPEC, sites={OTHER: SiteSpec(d=7, encoding="f32")}))
    whole = actstore.join([a.url, b.url])
    with mixed(whole, sites=[SITE, OTHER]) as ds:
        batch = next(iter(ds))
        at = batch["sequence"].numpy()
        assert np.array_equal(batch[OTHER].view(torch.int32).numpy(), b.sites[OTHER][at].view(np.int32))
        ds.close()


def test_stores_that_do_not_align_are_refused_field_by_field(tmp_path: Path) -> None:
    base, _ = joined(tmp_path)
    longer = store(tmp_path, "longer", 1100, chunk_rows=32)
    with pytest.raises(MismatchError, match=r"chunk_rows is 32, asked for 16.*rows is 1100, asked for 1000"):
        actstore.join({"a": base.url, "b": longer.url})
    with pytest.raises(ValueError, match=r"both hold resid_post.3; name the stores"):
        actstore.join([base.url, base.url])
    with pytest.raises(ValueError, match="stores is empty"):
        actstore.join([])
    with actstore.create(tmp_path / "x", sites={SITE: 24}, bucket_rows=256, shard_rows=64, chunk_rows=16) as w:
        w.append({SITE: np.zeros((1000, 24), np.float32)}, sequence=np.arange(1000) + 1)
    with pytest.raises(MismatchError, match=r"position is 'other values'.*sequence is 'other values'"):
        actstore.join({"a": base.url, "b": tmp_path / "x"})


@given(
    sizes=st.lists(st.integers(40, 400), min_size=2, max_size=3),
    exhausted=st.sampled_from(["stop", "repeat"]),
    drop_last=st.booleans(),
    steps=st.none() | st.integers(1, 3),
    seed=st.integers(0, 3),
)
@settings(max_examples=15, deadline=None)
def test_any_mixture_delivers_no_row_twice_in_a_lap(
    sizes: list[int], exhausted: str, drop_last: bool, steps: int | None, seed: int, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("mix")
    sites = {SITE: SiteSpec(d=2)}
    urls = [store(folder, str(i), n, sites=sites, bucket_rows=64, shard_rows=16).url for i, n in enumerate(sizes)]
    with mixed([(u, 1 / len(urls)) for u in urls], batch_size=24, streams=4, shuffle_chunks=None, exhausted=exhausted,
               drop_last=drop_last, steps=steps, seed=seed) as ds:  # fmt: skip
        batches = [batch["sequence"].tolist() for batch in ds]
    assert len(batches) == len(ds)
    if drop_last:
        assert {len(batch) for batch in batches} == {24}
    at = 0
    for i, part in enumerate(ds._parts):
        share = part.plan.batch_size
        for lap in range(0, len(batches), part.steps):
            rows = [r for batch in batches[lap : lap + part.steps] for r in batch[at : at + share]] if drop_last else []
            assert len(set(rows)) == len(rows), (i, lap)
        at += share


def _read(ds: actstore.ActivationDataset, pipe: Any) -> None:
    pipe.send([batch["sequence"].tolist() for batch in ds])


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("how", ["fork", "isolate", "spawn"])
def test_what_crosses_a_process_reads_the_plan_of_its_dataset(tmp_path: Path, how: str) -> None:
    """A capture goes on meanwhile, and the store is finished before the other process opens it."""
    from conftest import create_store, fill

    known = write_known(tmp_path / "s", buckets=[0, 2], finalise=False)
    ds = mixed(known.url, isolate=how == "isolate")
    alone = [batch["sequence"].tolist() for batch in mixed(known.url)]
    writer = create_store(known.url, known.spec, threads=1)
    for bucket in (1, 3):
        fill(writer, bucket, known.sites)
    writer.finalise()
    if how == "isolate":
        got = [batch["sequence"].tolist() for batch in ds]
    else:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context(how).Process(target=_read, args=(ds, theirs))
        process.start()
        assert ours.poll(90)
        got = ours.recv()
        process.join(30)
    assert got == alone
    ds.close()
    with mixed(known.url) as fresh, pytest.raises(MismatchError, match="store is"):
        fresh.load_state_dict(ds.state_dict())


def test_a_limited_epoch_and_sizes_in_words(tmp_path: Path) -> None:
    known = write_known(tmp_path / "s")
    with mixed(known.url, steps=3) as three, mixed(known.url, max_rows=3 * 64 + 5) as rows, mixed(known.url) as whole:
        first = [batch["sequence"].tolist() for batch in three]
        assert len(first) == 3
        assert first == [batch["sequence"].tolist() for batch in rows]
        assert first == [batch["sequence"].tolist() for batch in whole][:3]
        assert three.epoch == 1
        with pytest.raises(MismatchError, match="steps is 3, not asked for"):
            whole.load_state_dict(three.state_dict())
    with pytest.raises(ValueError, match=r"ask for 99 batches of 64 rows, expected 1 to the 15 of an epoch"):
        mixed(known.url, steps=99)
    assert mixed(known.url, memory_budget="1.5 GiB").settings.budget == 3 * 2**29
    with pytest.raises(ValueError, match="expected bytes such as"):
        Settings(memory_budget="much")
    assert len(next(iter(mixed(known.url, batch_size=None, per_rank_batch_size=16, rank=1, world_size=2)))[SITE]) == 16
    with pytest.raises(ValueError, match="not both"):
        mixed(known.url, per_rank_batch_size=16)
    early = mixed(known.url, batch_size=None, per_rank_batch_size=16)
    early._given_rank = (1, 2)  # as if torch.distributed had been initialised meanwhile
    with pytest.raises(StreamError, match=r"per_rank_batch_size 16 was taken .* now there are 2 ranks"):
        iter(early)


def test_no_rank_gets_an_empty_batch(tmp_path: Path) -> None:
    known = store(tmp_path, "s", 34, bucket_rows=64, chunk_rows=16, shard_rows=64)
    got: list[int] = []
    sizes: set[tuple[int, ...]] = set()
    for rank in range(8):
        with mixed(known.url, batch_size=16, drop_last=False, rank=rank, world_size=8) as ds:
            batches = [batch["sequence"].tolist() for batch in ds]
        got += [row for batch in batches for row in batch]
        sizes.add(tuple(map(len, batches)))
    assert sorted(got) == list(range(34))
    assert sizes == {(2, 2), (2, 3)}


def test_what_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    known = write_known(tmp_path / "s")
    with pytest.raises(ValueError, match="shuffle_chunks 12 is not a multiple of streams=8; use 16"):
        mixed(known.url, shuffle_chunks=12)
    ds = mixed(known.url)
    for state in ({"version": 1}, {"version": 1, "epoch": 0, "plan": ds.state_dict()["plan"]}):
        with pytest.raises(StreamError, match="the state lacks"):
            ds.load_state_dict(state)
