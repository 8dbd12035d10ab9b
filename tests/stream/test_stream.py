"""ActivationDataset: right rows, exact resume, any world size, clean ends."""

import multiprocessing
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SPEC, Known, replace, with_settings, write_known
from torch.utils.data import DataLoader

import actstore
from actstore.errors import IntegrityError, MismatchError, StreamError
from actstore.store.format import codec

SETTINGS: dict[str, Any] = {"sites": ["resid_post.3"], "with_rows": True, "batch_size": 16, "shuffle_chunks": 16}


def dataset(url: str, **changes: Any) -> actstore.ActivationDataset:
    return actstore.ActivationDataset(url, **with_settings(SETTINGS | changes))


def rows(batches: Any) -> list[int]:
    return [int(i) for batch in batches for i in batch["sequence"]]


@pytest.mark.parametrize("chain", codec.CODECS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_arrives_once_with_its_values(tmp_path: Path, chain: codec.CodecName, shuffle: bool) -> None:
    known = write_known(tmp_path / "s", replace(SPEC, codec=chain))
    seen = []
    with dataset(known.url, sites=["resid_post.3", "mlp_out.3"], drop_last=False, shuffle=shuffle) as ds:
        for batch in ds:
            i = batch["sequence"].numpy()
            seen.extend(i)
            assert batch["resid_post.3"].dtype == torch.bfloat16
            assert np.array_equal(batch["resid_post.3"].view(torch.uint16).numpy(), known.sites["resid_post.3"][i])
            values = batch["mlp_out.3"].numpy().view(np.uint32)
            assert np.array_equal(values, known.sites["mlp_out.3"][i].view(np.uint32))
            assert np.array_equal(batch["position"].numpy(), i % 7)
    assert sorted(seen) == list(range(1000))


def test_one_site_is_a_tensor_and_length_is_exact(known: Known) -> None:
    ds = actstore.ActivationDataset(known.url, sites="mlp_out.3", batch_size=48)
    batches = list(ds)
    assert len(batches) == len(ds) == 1000 // 48
    assert all(b.shape == (48, 7) and b.dtype == torch.float32 for b in batches)
    batches[0].zero_()
    assert ds.epoch == 1


def test_epochs_follow_each_other_and_can_be_set(known: Known) -> None:
    ds = dataset(known.url, drop_last=False)
    first, second = rows(ds), rows(ds)
    assert first != second
    assert sorted(first) == sorted(second)
    assert rows(dataset(known.url, drop_last=False, epoch=1)) == second
    ds.set_epoch(0)
    assert rows(ds) == first


@pytest.mark.parametrize("step", [1, 7, 31, 61])
def test_resume_continues_exactly_and_twice(known: Known, step: int) -> None:
    whole = rows(dataset(known.url)) + rows(dataset(known.url, epoch=1))
    ds = dataset(known.url)
    got: list[int] = []
    for k, batch in enumerate(ds):
        got.extend(rows([batch]))
        if k + 1 == step:
            break
    state = ds.state_dict()
    for _ in range(2):
        again = dataset(known.url)
        again.load_state_dict(state)
        assert again.state_dict() == state
        rest = rows(again) + rows(again)
        assert got + rest == whole[: len(got) + len(rest)]
        assert len(got + rest) >= len(whole)


def test_state_at_the_end_is_the_next_epoch(known: Known) -> None:
    ds = dataset(known.url)
    list(ds)
    assert (ds.state_dict()["epoch"], ds.state_dict()["step"]) == (1, 0)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_global_sequence_is_the_same_for_any_world_size(known: Known, world: int) -> None:
    alone = rows(dataset(known.url))
    ranks = [list(dataset(known.url, rank=r, world_size=world)) for r in range(world)]
    assert {len(r) for r in ranks} == {1000 // 16}
    share = 16 // 8
    merged: list[int] = []
    for step in range(1000 // 16):
        for s in range(8):
            at = (s // world) * share
            merged.extend(ranks[s % world][step]["sequence"][at : at + share].tolist())
    assert merged == alone


def test_partial_store_streams_what_is_committed(tmp_path: Path) -> None:
    known = write_known(tmp_path / "s", buckets=[3, 1])
    got = rows(dataset(known.url, drop_last=False))
    assert sorted(got) == [*range(256, 512), *range(768, 1000)]


def test_another_plan_is_refused_field_by_field(known: Known) -> None:
    state = dataset(known.url, seed=3).state_dict()
    with pytest.raises(MismatchError, match=r"batch_size is 16, asked for 32; seed is 3, asked for 0"):
        dataset(known.url, batch_size=32).load_state_dict(state)
    write_known(Path(known.url).parent / "other", buckets=[0])
    with pytest.raises(MismatchError, match="store is"):
        dataset(str(Path(known.url).parent / "other")).load_state_dict(dataset(known.url).state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sites": "resid_post.9"}, r"no site 'resid_post\.9'; it has"),
        ({"sites": []}, "one or more"),
        ({"batch_size": 12}, "multiple of streams=8; the next is 16"),
        ({"batch_size": 1008}, "more than the 1000 committed rows; use at most 1000"),
        ({"rank": 0, "world_size": 3}, r"world size 3 does not divide streams=8; use one of \[1, 2, 4, 8\]"),
        ({"rank": 2, "world_size": 2}, "rank is 2, expected 0 to 1"),
        ({"rank": 1}, "both rank and world_size"),
        ({"memory_budget": 100}, "memory_budget 100 is too small: .* need"),
        ({"shuffle_chunks": 0}, "shuffle_chunks is 0"),
    ],
)
def test_bad_arguments_are_refused_at_construction(known: Known, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataset(known.url, **change)


def test_a_tight_budget_delivers_the_same(known: Known) -> None:
    need = dataset(known.url)
    chunk = 16 * 24 * 2 + 3 * 16 * 4
    tight = dataset(known.url, memory_budget=16 * chunk + 6 * 16 * (48 + 12), threads=2)
    assert rows(tight) == rows(need)
    assert tight.explain()["pool_bytes"] == 16 * chunk
    with pytest.raises(ValueError, match=r"memory_budget .* is too small: 16 chunks"):
        dataset(known.url, memory_budget=16 * chunk + 6 * 16 * (48 + 12) - 1)


def test_damage_raises_and_names_the_object(known: Known) -> None:
    path = sorted(p for p in (Path(known.url) / "resid_post.3" / "c").rglob("0") if p.is_file())[2]
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match=rf"resid_post\.3/c/{path.parent.name}/0 chunk at byte 0"):
        list(dataset(known.url))
    path.unlink()
    with pytest.raises(actstore.ActstoreError, match="is missing"):
        list(dataset(known.url))
    assert not loader_threads()


def loader_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("actstore-work", "actstore-fetch"))]


def test_threads_end_with_the_loop_however_it_ends(known: Known) -> None:
    ds = dataset(known.url)
    for _ in ds:
        break
    ds.close()
    assert not loader_threads()
    with pytest.raises(RuntimeError, match="trainer failed"), dataset(known.url) as ds:
        for _ in ds:
            raise RuntimeError("trainer failed")
    assert not loader_threads()
    list(ds)
    assert not loader_threads()
    iterator = iter(ds)
    next(iterator)
    assert loader_threads()
    del iterator
    ds.close()
    assert not loader_threads()


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_in_a_dataloader_and_pickled(known: Known) -> None:
    alone = rows(dataset(known.url))
    assert rows(DataLoader(dataset(known.url), batch_size=None)) == alone
    data = pickle.dumps(dataset(known.url))
    assert len(data) < 10_000
    assert rows(pickle.loads(data)) == alone
    for workers, how in ((1, "spawn"), (2, "fork")):
        loader = DataLoader(dataset(known.url), batch_size=None, num_workers=workers, multiprocessing_context=how)
        batches = iter(loader)
        with pytest.raises(StreamError, match=rf"num_workers is {workers}.*num_workers=0"):
            next(batches)
        del batches


def _child(ds: actstore.ActivationDataset, pipe: Any) -> None:
    pipe.send(rows(ds))


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_after_a_fork_the_child_reads_for_itself(known: Known) -> None:
    ds = dataset(known.url)
    next(iter(ds))
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_child, args=(ds, theirs))
    process.start()
    assert ours.poll(60)
    assert ours.recv() == rows(dataset(known.url))
    process.join(30)
    assert process.exitcode == 0
    ds.close()


def test_state_is_small_and_cheap(known: Known) -> None:
    ds = dataset(known.url)
    assert len(repr(ds.state_dict())) < 1000
    began = time.thread_time()
    for _ in range(1000):
        ds.state_dict()
    assert time.thread_time() - began < 1.0


def test_stats_and_explain_add_up(known: Known) -> None:
    ds = dataset(known.url, drop_last=False)
    list(ds)
    stats = ds.stats()
    assert stats["batches"] == len(ds) == 63
    assert stats["delivered_bytes"] == 1000 * (24 * 2 + 3 * 4)
    assert stats["chunks"] >= 63
    assert ds.explain()["steps"] == 63


def test_an_empty_store_says_so(tmp_path: Path) -> None:
    write_known(tmp_path / "s", buckets=[])
    with pytest.raises(StreamError, match="no committed bucket yet"):
        dataset(str(tmp_path / "s"))
