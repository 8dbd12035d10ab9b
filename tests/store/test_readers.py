"""Other zarr readers get the same bits from our stores: zarr-python's own pipeline, zarrs, TensorStore; today's bytes
stay readable for ever."""

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
import zarrs
from conftest import SPEC, fill
from numpy.typing import NDArray

from actstore.store import SiteSpec, StoreSpec, create_store, open_store
from actstore.store.format.bfloat16 import BFloat16
from actstore.store.format.codec import CODECS, CodecName
from actstore.store.maintain.verify import verify

GOLDEN = Path(__file__).parent / "golden"
SITES = {
    "attn_z.0": SiteSpec(d=6, encoding="fixed:1e-3"),
    "mlp_out.3": SiteSpec(d=7, encoding="f32"),
    "resid_post.3": SiteSpec(d=24),
}
ROWS = replace(SPEC, sites=SITES, rows=600)


def values(spec: StoreSpec) -> dict[str, NDArray[Any]]:
    """In row order: every 16-bit pattern in turn, float32 of random bits, and round numbers for `fixed`."""
    rng = np.random.default_rng(7)
    bits = rng.integers(0, 1 << 32, (spec.rows, 7), dtype=np.uint32)
    patterns = np.arange(spec.rows * 24, dtype=np.uint32) * 40503 % 65536  # odd, so all of them come up
    return {
        "attn_z.0": (rng.integers(-999, 999, (spec.rows, 6)) / 64).astype(np.float32),
        "mlp_out.3": bits.view(np.float32),
        "resid_post.3": patterns.astype(np.uint16).reshape(-1, 24),
    }


def write(url: Path, codec: CodecName) -> None:
    writer = create_store(url, replace(ROWS, codec=codec), threads=1)
    for bucket in range(writer.buckets):
        assert fill(writer, bucket, values(ROWS))
    writer.finalise()


def bits(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.fixture(scope="module", params=CODECS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("store") / request.param
    write(url, request.param)
    return url


def expected(url: Path, name: str) -> NDArray[np.uint8]:
    """Stored elements from what was written, with the store's reader only for the codes of `fixed`."""
    opened = open_store(url)
    if name == "attn_z.0":
        return bits(np.concatenate([opened.read_chunk(name, p, c) for p in range(3) for c in range(opened_chunks(p))]))
    if name in SITES:
        out = np.empty_like(values(ROWS)[name])
        out[places()] = values(ROWS)[name]
        return bits(out)
    row = np.empty(ROWS.rows, np.int32)
    row[places()] = np.arange(ROWS.rows)
    return bits({"sequence": row, "position": row % 7, "token_id": row * 0}[name])


def opened_chunks(place: int) -> int:
    first, stop = ROWS.bucket_range(place)
    return -(-(stop - first) // ROWS.chunk_rows)


def places() -> NDArray[np.int64]:
    """Stored place of each row."""
    return np.concatenate([ROWS.bucket_range(b)[0] + ROWS.permutation(b) for b in range(ROWS.buckets)])


ARRAYS = (*SITES, "sequence", "position", "token_id")


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in")
@pytest.mark.parametrize("name", ARRAYS)
def test_zarr_python(store: Path, name: str) -> None:
    assert np.array_equal(bits(zarr.open_group(store, mode="r")[name][:]), expected(store, name))


@pytest.mark.parametrize(
    ("fill", "number"), [("NaN", np.nan), ("-Infinity", -np.inf), ("0xffc1", np.nan), (1.5, 1.5), (0.0, 0.0)]
)
def test_bfloat16_fill_values(fill: str | float, number: float) -> None:
    """As zarr-extensions spells them; NaN of another payload keeps its bits."""
    scalar = BFloat16().from_json_scalar(fill, zarr_format=3)
    assert np.array_equal(float(scalar), number, equal_nan=True)
    assert BFloat16().to_json_scalar(scalar, zarr_format=3) == fill
    assert BFloat16.from_native_dtype(BFloat16().to_native_dtype()) == BFloat16()


@pytest.mark.parametrize("other", ["abc", None, [1], {}])
def test_what_is_no_number_is_no_bfloat16(other: object) -> None:
    for parse in (BFloat16().cast_scalar, lambda v: BFloat16().from_json_scalar(v, zarr_format=3)):
        with pytest.raises(TypeError):
            parse(other)


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in")
@pytest.mark.parametrize("name", ARRAYS)
def test_zarrs(store: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """zarrs' Python layer refuses every numpy type of kind V, bfloat16 too, before it asks its core, which knows it."""
    monkeypatch.setattr(zarrs.ZarrsCodecPipeline, "_raise_error_on_unsupported_batch_dtype", lambda *_: None)
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}):
        assert np.array_equal(bits(zarr.open_group(store, mode="r")[name][:]), expected(store, name))


@pytest.mark.parametrize("name", ARRAYS)
def test_tensorstore(store: Path, name: str) -> None:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{store}/{name}/"}}
    if store.name == "planes":
        with pytest.raises(ValueError, match=r"numcodecs\.shuffle"):
            tensorstore.open(spec).result()
    else:
        assert np.array_equal(bits(tensorstore.open(spec).result().read().result()), expected(store, name))


def test_the_calibration_is_a_plain_array(store: Path) -> None:
    ours = open_store(store).calibration("attn_z.0")
    scale, offset = zarr.open_group(store, mode="r")["calibration/attn_z.0"][:]
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{store}/calibration/attn_z.0/"}}
    assert np.array_equal(tensorstore.open(spec).result().read().result(), [scale, offset])
    assert np.array_equal(scale, ours.scale)
    assert np.array_equal(offset, ours.offset)


def contents(url: Path) -> dict[str, str]:
    """sha256 of the stored elements of each array, of calibration and statistics; and the fingerprint."""
    opened = open_store(url)
    found: dict[str, bytes] = {
        name: b"".join(
            bits(opened.read_chunk(name, p, c)).tobytes() for p in range(ROWS.buckets) for c in range(opened_chunks(p))
        )
        for name in ARRAYS
    }
    calibration = opened.calibration("attn_z.0")
    found["calibration"] = calibration.scale.tobytes() + calibration.offset.tobytes()
    stats = {name: asdict(opened.stats(name)) for name in SITES}
    found["stats"] = json.dumps(stats, default=np.ndarray.tolist).encode()
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()} | {
        "fingerprint": opened.fingerprint
    }


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "records"])
@pytest.mark.parametrize("codec", CODECS)
def test_the_golden_stores_stay_readable(codec: CodecName, tmp_path: Path, *, manifest: bool) -> None:
    """Written once by the first release of format version 1. If this fails, the reader is wrong: never remake them."""
    shutil.copytree(GOLDEN / codec, tmp_path / "s")
    if not manifest:
        (tmp_path / "s" / "manifest.json").unlink()
        shutil.rmtree(tmp_path / "s" / "manifest")
    assert contents(tmp_path / "s") == json.loads((GOLDEN / f"{codec}.json").read_text())
    assert verify(open_store(tmp_path / "s").storage, deep=True).damage == []


def without_mark(key: str, data: bytes) -> bytes:
    """A shard without the 16 bytes before its index, which are another attempt's each time."""
    name, _, shard = key.partition("/c/")
    places = ROWS.shard_rows // ROWS.chunk_rows if name in SITES else ROWS.bucket_rows // ROWS.chunk_rows
    at = len(data) - 16 * places - 4
    return data[: at - 16] + data[at:] if shard and "calibration" not in key else data


def test_what_is_written_today_is_what_the_golden_store_holds(tmp_path: Path) -> None:
    """All that the page leaves no choice in: not compression, not the choice of steps, not random attempt ids."""
    write(tmp_path / "s", "none")
    today, golden = (
        {(k := p.relative_to(url).as_posix()): without_mark(k, p.read_bytes()) for p in url.rglob("*") if p.is_file()}
        for url in (tmp_path / "s", GOLDEN / "none")
    )
    free = ("commits/", "manifest", "attn_z.0/c/", "calibration/attn_z.0/c/")
    ours = {key for key in golden if not key.startswith(free)}
    assert len(ours) > 25
    assert {key: today[key] for key in ours} == {key: golden[key] for key in ours}
