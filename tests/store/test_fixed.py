"""`fixed(eps)`: the error that was asked for, nothing silent."""

import math
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import SPEC, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore.bench import activations_like
from actstore.errors import EncodingError, IntegrityError, StoreError
from actstore.store import SiteSpec, StoreSpec, create_store, open_store, open_writer
from actstore.store.format import codec, fixed, stats
from actstore.store.format.spec import calibration_key
from actstore.store.maintain.verify import verify

D = 96


def spec_of(encoding: str, rows: int = 8192, **changes: object) -> StoreSpec:
    sites = {"resid_post.3": SiteSpec(d=D, encoding=encoding)}
    return replace(SPEC, sites=sites, rows=rows, bucket_rows=4096, shard_rows=1024, chunk_rows=256, **changes)


def write(url: Path, spec: StoreSpec, values: np.ndarray, **kwargs: object) -> None:
    """Store rows so that `sequence` holds their number."""
    writer = create_store(url, spec, threads=2)
    for b in range(writer.buckets):
        first, stop = writer.bucket_range(b)
        order = np.argsort(writer.permutation(b)) + first
        zeros = np.zeros(stop - first, np.int32)
        made = write_rows(
            writer, b, {"resid_post.3": values[order]}, sequence=order.astype(np.int32), position=zeros, token_id=zeros
        )
        assert made is not None
    writer.finalise()


def stored_values(url: Path) -> np.ndarray:
    """All values in row order, through the plain zarr array and the calibration as a foreign reader would use them."""
    store = open_store(url)
    scale, offset = np.asarray(store.calibration("resid_post.3").scale), store.calibration("resid_post.3").offset
    codes = store["resid_post.3"][:]
    assert codes.dtype == np.int16
    out = np.empty(codes.shape, np.float32)
    out[store["sequence"][:]] = (codes.astype(np.float64) * scale.astype(np.float64) + offset).astype(np.float32)
    return out


def fvu(decoded: np.ndarray, x: np.ndarray) -> float:
    x = x.astype(np.float64)
    return float(((decoded - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())


def floats(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("eps", ["1e-2", "1e-3", "1e-4"])
@pytest.mark.parametrize("chain", codec.CODECS)
@pytest.mark.parametrize("kind", ["bits", "floats"])
def test_added_fvu_is_eps(tmp_path: Path, eps: str, chain: codec.CodecName, kind: str) -> None:
    bits = activations_like(8192, D)
    x = floats(bits) + 3.0
    given_rows = (x.astype(ml_dtypes.bfloat16).view(np.uint16)) if kind == "bits" else x
    write(tmp_path / "s", spec_of(f"fixed:{eps}", codec=chain), given_rows)
    reference = floats(given_rows) if kind == "bits" else x
    assert fvu(stored_values(tmp_path / "s"), reference) == pytest.approx(float(eps), rel=0.05)
    assert open_store(tmp_path / "s").stats("resid_post.3").saturated == 0
    assert verify(open_store(tmp_path / "s").storage, deep=True).damage == []


def test_the_loader_delivers_the_decoded_values_as_bfloat16(tmp_path: Path) -> None:
    for chain in codec.CODECS:
        url = tmp_path / chain
        write(url, spec_of("fixed:1e-3", codec=chain), activations_like(8192, D))
        expected = torch.from_numpy(stored_values(url)).bfloat16()
        ds = actstore.ActivationDataset(url, sites=["resid_post.3"], with_rows=True, batch_size=64, drop_last=False)
        seen = 0
        for batch in ds:
            assert torch.equal(batch["resid_post.3"], expected[batch["sequence"].long()])
            seen += len(batch["sequence"])
        assert seen == 8192


def test_statistics_are_of_the_decoded_values_and_count_saturation(tmp_path: Path) -> None:
    x = floats(activations_like(8192, D))
    write(tmp_path / "first", spec_of("fixed:1e-3"), x)
    steps = open_store(tmp_path / "first").calibration("resid_post.3")
    x[4099:4103, 5] = steps.offset[5] + steps.scale[5] * np.float32(33_000)  # a little beyond the range
    write(tmp_path / "s", spec_of("fixed:1e-3"), x)
    decoded, s = stored_values(tmp_path / "s"), open_store(tmp_path / "s").stats("resid_post.3")
    np.testing.assert_allclose(s.mean, decoded.mean(0, dtype=np.float64), rtol=1e-12)
    assert s.max_abs == np.abs(decoded).max()
    calibration = open_store(tmp_path / "s").calibration("resid_post.3")
    codes = (x.astype(np.float64) - calibration.offset) / calibration.scale
    lost = np.square(decoded.astype(np.float64) - x)[:, 5].sum() / (x.var(0, dtype=np.float64).sum() * len(x))
    assert 0 < s.clipped_fvu < 1e-3
    assert s.clipped_fvu == pytest.approx(lost, rel=0.05)
    assert s.saturated == int((np.rint(codes) > 32767).sum() + (np.rint(codes) < -32768).sum()) > 0


ROWS = {"bucket_rows": 4096, "shard_rows": 1024, "chunk_rows": 256}


def test_clipping_that_breaks_the_promise_is_refused(tmp_path: Path) -> None:
    """Rows after the first bucket that are far larger: clipped, they would lose all of their variance."""
    x = floats(activations_like(8192, D))
    x[4096::64] *= 3e4
    with pytest.raises(EncodingError, match=r"bucket 1 of resid_post.3: .* clipping them would add an FVU of"):
        write(tmp_path / "s", spec_of("fixed:1e-3"), x)
    assert open_store(tmp_path / "s").index.buckets.tolist() == [0]
    with actstore.create(tmp_path / "a", sites={"x": D}, encoding="fixed:1e-3", **ROWS) as w:
        w.append({"x": x[:4096]})
        y = x[:4096].copy()
        y[7, 3] = 3620 * y[:, 3].std()
        w.append({"x": y})
        with pytest.warns(actstore.errors.ActstoreWarning, match="1 values were clipped"):
            w.close()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bucket", [0, 1])
@pytest.mark.parametrize("kind", ["bits", "floats"])
def test_nan_and_infinity_are_refused_by_row(tmp_path: Path, bad: float, bucket: int, kind: str) -> None:
    x = floats(activations_like(8192, D))
    row = 1234 + 4096 * bucket
    x[row, 7] = bad
    values = x.astype(ml_dtypes.bfloat16).view(np.uint16) if kind == "bits" else x
    with pytest.raises(EncodingError, match=rf"row {row} of resid_post\.3"):
        write(tmp_path / "s", spec_of("fixed:1e-3"), values)
    assert open_writer(tmp_path / "s").committed() == set(range(bucket))


def test_the_calibration_is_made_once_and_is_bound_to_the_buckets(tmp_path: Path) -> None:
    x = activations_like(8192, D)
    write(tmp_path / "s", spec_of("fixed:1e-3"), x)
    file = tmp_path / "s" / calibration_key("resid_post.3")
    before = file.read_bytes()
    other = create_store(tmp_path / "o", spec_of("fixed:1e-3"))
    zeros = np.zeros(4096, np.int32)
    scaled = (floats(x) * 3).astype(ml_dtypes.bfloat16).view(np.uint16)
    for b in (1, 0):
        rows = scaled if b else x
        write_rows(other, b, {"resid_post.3": rows[:4096]}, sequence=zeros, position=zeros, token_id=zeros)
    file.write_bytes((tmp_path / "o" / calibration_key("resid_post.3")).read_bytes())
    with pytest.raises(IntegrityError, match="calibration"):
        open_store(tmp_path / "s").calibration("resid_post.3")
    with pytest.raises(StoreError, match="calibration"):
        actstore.ActivationDataset(tmp_path / "s", sites="resid_post.3", batch_size=64)
    assert [d.key for d in verify(open_store(tmp_path / "s").storage, deep=False).damage] == [
        calibration_key("resid_post.3")
    ]
    file.write_bytes(before)
    assert verify(open_store(tmp_path / "s").storage, deep=True).damage == []


@given(
    mean=st.floats(-1e4, 1e4), sigma=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 300.0]), eps=st.sampled_from([1e-4, 1e-2])
)
@settings(max_examples=60, deadline=None)
def test_error_is_at_most_half_a_step(mean: float, sigma: float, eps: float) -> None:
    rng = np.random.default_rng(0)
    x = (mean + sigma * rng.normal(size=(500, 3)) * [1, 10, 0]).astype(np.float32)
    calibration = fixed.calibrate(stats.sums(x), eps, x)
    codes, values = np.empty(x.shape, np.int16), np.empty(x.shape, np.float32)
    assert fixed.quantise(stats.as_bits(x), calibration, codes, values) == (0, 0.0)
    assert np.array_equal(fixed.dequantise(codes, calibration), values)
    error = np.abs(values.astype(np.float64) - x)
    limit = calibration.scale / 2 * (1 + 1e-6) + np.abs(x) * 2.0**-24
    assert (error <= limit).all()
    parsed = fixed.from_bytes(fixed.to_bytes(calibration), 3, "x")
    assert np.array_equal(parsed.scale, calibration.scale)
    assert math.isfinite(float(calibration.scale.sum()))


@pytest.mark.parametrize(
    "text", ["fixed", "fixed:", "fixed:0", "fixed:1", "fixed:nan", "fixed:-1e-3", "int8", "", 3, None]
)
def test_unknown_encodings_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected bf16, f32 or fixed"):
        SiteSpec(d=3, encoding=text)  # type: ignore[arg-type]


def test_eps_has_one_spelling() -> None:
    assert SiteSpec(d=3, encoding="fixed:1e-3") == SiteSpec(d=3, encoding="fixed:0.001")
