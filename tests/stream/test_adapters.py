"""Adapters: endless, exact on resume, harmless to change; what each trainer's form promises."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Known, with_settings
from torch import Tensor
from torch.utils.data import DataLoader

import actstore
from actstore.errors import MismatchError, StreamError
from actstore.stream import adapters

SITE = "mlp_out.3"
STEPS = 1000 // 16


def dataset(known: Known, **changes: Any) -> actstore.ActivationDataset:
    settings: dict[str, Any] = {"sites": SITE, "batch_size": 16, "shuffle_chunks": 16}
    return actstore.ActivationDataset(known.url, **with_settings(settings | changes))


def same(a: Tensor, b: Tensor) -> bool:
    """The same dtype and bits; the stores here hold NaN."""
    return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


def expected(known: Known, epochs: int = 3) -> list[Tensor]:
    """The batches of the first epochs, each by a data set of its own."""
    return [batch.clone() for epoch in range(epochs) for batch in dataset(known, epoch=epoch)]


def test_endless_is_epoch_after_epoch(known: Known) -> None:
    whole = expected(known)
    batches = adapters.endless(dataset(known))
    assert isinstance(batches, Iterator)
    for i, batch in enumerate(islice(batches, len(whole))):
        assert batch.shape == (16, 7)
        assert same(batch, whole[i])


def test_endless_takes_a_data_loader(known: Known) -> None:
    batches = adapters.endless(DataLoader(dataset(known), batch_size=None))
    assert all(same(a, b) for a, b in zip(islice(batches, STEPS), expected(known, 1), strict=True))


def test_what_the_data_set_delivers_is_passed_on(known: Known) -> None:
    for dtype in ("float32", "bfloat16"):
        ds = dataset(known, sites=[SITE], with_rows=True, dtype=dtype)
        batch, other = next(adapters.endless(ds)), next(iter(adapters.Restarting(ds)))
        assert batch[SITE].dtype == getattr(torch, dtype)
        assert list(batch) == list(other) == [SITE, "sequence", "position", "token_id"]


def test_a_store_without_a_batch_is_refused(known: Known) -> None:
    with pytest.raises(StreamError, match="fewer rows than one batch"):
        next(adapters.endless([]))
    with pytest.raises(ValueError, match="use at most 1000"):
        dataset(known, batch_size=1008)


@pytest.mark.parametrize("steps", [1, 7, STEPS, STEPS + 5])
@pytest.mark.parametrize("form", ["endless", "restarting"])
def test_resume_through_an_adapter_continues_exactly(known: Known, steps: int, form: str) -> None:
    def begin(ds: actstore.ActivationDataset) -> Iterator[Tensor]:
        return adapters.endless(ds) if form == "endless" else iter(adapters.Restarting(ds))

    whole, first, second = expected(known), dataset(known), dataset(known)
    for i, batch in enumerate(islice(begin(first), steps)):
        assert same(batch, whole[i])
    second.load_state_dict(first.state_dict())
    for i, batch in enumerate(islice(begin(second), STEPS + 3)):
        assert same(batch, whole[steps + i])


def test_config_says_where_batches_come_from(known: Known) -> None:
    ds = dataset(known, seed=3)
    config = json.loads(json.dumps(adapters.Restarting(ds).config))
    assert config["url"] == ds.store.url
    assert (config["store"], config["sites"], config["seed"], config["batch_size"]) == (
        ds.store.fingerprint,
        [SITE],
        3,
        16,
    )


def test_restarting_loses_nothing_to_a_look(known: Known) -> None:
    whole = expected(known)
    fresh, later = dataset(known), dataset(known)
    list(islice(adapters.endless(fresh), 40))
    later.load_state_dict(fresh.state_dict())
    for ds, start in ((dataset(known), 0), (later, 40)):
        batches = adapters.Restarting(ds)
        for looks in (1, 70, STEPS + 1):
            for i, batch in enumerate(islice(batches, looks)):
                assert same(batch, whole[start + i])
        assert ds.state_dict()["epoch"] * STEPS + ds.state_dict()["step"] == start + STEPS + 1


@pytest.mark.parametrize("keep", [True, False])
def test_a_trainer_may_change_batches_in_place(known: Known, keep: bool) -> None:
    """Whether it keeps them, so that their memory can't be lent again, or lets them go."""
    whole, kept = expected(known, 2), []
    for i, batch in enumerate(islice(adapters.endless(dataset(known)), len(whole))):
        assert same(batch, whole[i])
        batch.fill_(float(i))
        if keep:
            kept.append(batch)
    assert all(bool((batch == i).all()) for i, batch in enumerate(kept))


def test_token_batches_have_tokens_and_mask(tmp_path: Path) -> None:
    tokens = np.arange(512, dtype=np.int32) * 3
    with actstore.create(
        tmp_path / "s", sites={"a": 4, "b": 2}, encoding="f32", bucket_rows=128, shard_rows=64, chunk_rows=16
    ) as writer:
        x = tokens[:, None].astype(np.float32)
        writer.append({"a": x + np.arange(4), "b": x - np.arange(2)}, token_id=tokens)
    ds = actstore.ActivationDataset(tmp_path / "s", sites=["a", "b"], batch_size=64, with_rows=True)
    stream = adapters.token_batches(ds, names={"a": "blocks.0.hook_in"})
    seen: list[int] = []
    for _ in range(2):  # a look, then training
        for batch in islice(stream, len(ds)):
            assert list(batch) == ["blocks.0.hook_in", "b", "tokens", "mask"]
            assert batch["tokens"].dtype == batch["mask"].dtype == torch.int64
            assert batch["mask"].tolist() == [1] * 64
            assert torch.equal(batch["blocks.0.hook_in"], batch["tokens"][:, None].float() + torch.arange(4))
            assert torch.equal(batch["b"], batch["tokens"][:, None].float() - torch.arange(2))
            seen.extend(batch["tokens"].tolist())
    assert sorted(seen) == sorted([*tokens.tolist()] * 2)


def test_token_batches_say_what_is_missing(known: Known) -> None:
    with pytest.raises(ValueError, match="with_rows=True"):
        next(iter(adapters.token_batches(dataset(known))))
    with pytest.raises(ValueError, match=r"names has \['resid'\], but the data set reads \['mlp_out\.3'\]"):
        adapters.token_batches(dataset(known), names={"resid": "x"})
    for name in ("tokens", "mask"):
        with pytest.raises(ValueError, match="must differ"):
            adapters.token_batches(dataset(known), names={SITE: name})


@pytest.mark.parametrize("encoding", ["bf16", "f32"])
def test_scaling_factor_is_that_of_all_rows(tmp_path: Path, encoding: str) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.exponential(1.0, (1000, 1))  # norms that differ much, so that E||x|| and E||x||^2 do
    with actstore.create(
        tmp_path / "s", sites={"a": 24, "b": 7}, encoding=encoding, bucket_rows=256, shard_rows=64, chunk_rows=16
    ) as writer:
        sites = {"a": 24, "b": 7}
        writer.append({k: (rng.standard_normal((1000, d)) * lengths + 3).astype(np.float32) for k, d in sites.items()})
    ds = actstore.ActivationDataset(tmp_path / "s", sites=["a", "b"], batch_size=8, drop_last=False)
    rows = {k: np.concatenate([batch[k].double().numpy() for batch in ds]) for k in ("a", "b")}
    for site, x in rows.items():
        assert len(x) == 1000
        norms = np.sqrt((x**2).sum(1))
        factor, d = adapters.scaling_factor(ds, site), x.shape[1]
        assert factor == pytest.approx(np.sqrt(d / (norms**2).mean()), rel=1e-9)
        saelens = np.sqrt(d) / norms.mean()
        assert saelens / factor == pytest.approx(np.sqrt(1 + norms.var() / norms.mean() ** 2), rel=1e-9)
        assert ((x * factor) ** 2).sum(1).mean() == pytest.approx(d, rel=1e-9)
        unit = actstore.ActivationDataset(tmp_path / "s", sites=site, batch_size=8, normalize="unit_mean_square")
        assert adapters.scaling_factor(unit) == pytest.approx(np.sqrt(d), rel=1e-9)
    with pytest.raises(ValueError, match="say which site"):
        adapters.scaling_factor(ds)
    one = actstore.ActivationDataset(tmp_path / "s", sites="b", batch_size=8)
    assert adapters.scaling_factor(one) == adapters.scaling_factor(ds, "b")


def test_scaling_factor_of_no_number_is_an_error(tmp_path: Path) -> None:
    with actstore.create(tmp_path, sites={SITE: 8}, bucket_rows=128, shard_rows=64, chunk_rows=32) as w:
        w.append({SITE: np.full((512, 8), np.nan, np.float32)})
    with pytest.raises(StreamError, match="mean squared norm"):
        adapters.scaling_factor(actstore.ActivationDataset(tmp_path, sites=SITE, batch_size=64))


def test_state_goes_into_a_trainers_checkpoint(known: Known, tmp_path: Path) -> None:
    whole, ds = expected(known), dataset(known)
    save, batches = adapters.state_saver(ds), adapters.endless(ds)
    list(islice(batches, 70))
    save(None)  # SAELens without a checkpoint folder
    save(tmp_path)
    next(batches)
    again = dataset(known)
    adapters.load_state(again, tmp_path)
    assert same(next(adapters.endless(again)), whole[70])
    with pytest.raises(MismatchError, match="seed is 0, asked for 5"):
        adapters.load_state(dataset(known, seed=5), tmp_path)
    with pytest.raises(StreamError, match="state_saver"):
        adapters.load_state(again, tmp_path / "none")
