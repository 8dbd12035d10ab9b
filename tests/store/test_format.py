"""A second reader, written from docs/format.md and sharing no code with actstore, gets the same rows."""

import base64
import hashlib
import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import SPEC, fill, random_sites, write_known
from numcodecs import blosc

from actstore.store import open_store, open_writer
from actstore.store.storage import open_storage
from actstore.store.write.extend import extend

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {"bf16": "<u2", "f32": "<f4", "fixed": "<i2"}
_TABLE = []
for _i in range(256):
    for _ in range(8):
        _i = _i >> 1 ^ (0x82F63B78 if _i & 1 else 0)
    _TABLE.append(_i)
M64 = 2**64 - 1


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def checked(data: bytes) -> bytes:
    """What precedes the trailing crc32c."""
    assert crc32c(data[:-4]) == int.from_bytes(data[-4:], "little")
    return data[:-4]


def unsealed(data: bytes) -> bytes:
    field = b'"object_crc32c": "'
    at = data.index(field) + len(field)
    assert crc32c(data[:at] + b"00000000" + data[at + 8 :]) == int(data[at : at + 8], 16)
    return data


def permute(x: int, n: int, k: int) -> int:
    def mix(z: int) -> int:
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & M64
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & M64
        return z ^ z >> 31

    bits = max(1, (n - 1).bit_length())
    while True:
        b = bits >> 1
        a = bits - b
        left, right = x >> b, x & (2**b - 1)
        for r in range(1, (16 if bits <= 8 else 8) + 1):
            f = mix((right + mix((k + r * 0x9E3779B97F4A7C15) & M64)) & M64) & (2**a - 1)
            left, right = right, left ^ f
            a, b = b, a
        x = left << b | right
        if x < n:
            return x


def place(seed: int, bucket: int, i: int, n: int) -> int:
    key = hashlib.blake2b(f"{seed}/bucket/{bucket}".encode(), digest_size=8).digest()
    return permute(i, n, int.from_bytes(key, "little"))


def decode(chunk: bytes, codec: str, itemsize: int) -> bytes:
    payload = checked(chunk)
    if codec == "planes":
        planes = zstandard.decompress(payload)
        n = len(planes) // itemsize
        return bytes(planes[b * n + i] for i in range(n) for b in range(itemsize))
    return blosc.decompress(payload) if codec == "blosc" else payload


class Reader:
    """One store, opened from the manifest or from the commit records."""

    def __init__(self, root: Path, *, manifest: bool) -> None:
        self.root = root
        self.spec = json.loads(unsealed((root / "zarr.json").read_bytes()))["attributes"]["actstore"]
        assert self.spec["format_version"] == 1
        self.buckets: dict[int, dict[str, tuple[list[int], list[int]]]] = {}
        self.stats: dict[str, Any] = {}
        if manifest:
            head = json.loads(unsealed((root / "manifest.json").read_bytes()))
            self.stats, self.spec = head["stats"], head["spec"]
            chunks = [-(-self.rows(b) // self.spec["chunk_rows"]) for b in range(self.num_buckets)]
            self.buckets = {b: {} for b in range(self.num_buckets)}
            size = max(1, min(1024, 2**18 // (self.spec["bucket_rows"] // self.spec["chunk_rows"])))
            for name, crcs in head["tables"].items():
                for part in range(len(crcs) // 8):
                    crc = crcs[8 * part : 8 * part + 8]
                    data = (root / "manifest" / name / f"{part:06d}-{crc}.parquet").read_bytes()
                    assert crc32c(data) == int(crc, 16)
                    table = pq.read_table(io.BytesIO(data)).to_pydict()
                    at = 0
                    for b in range(part * size, min((part + 1) * size, self.num_buckets)):
                        self.buckets[b][name] = tuple(table[c][at : at + chunks[b]] for c in ("stored", "crc32c"))
                        at += chunks[b]
            return
        for path in (root / "commits").glob("*.json"):
            record = json.loads(unsealed(path.read_bytes()))
            if record["state"] == "committed":
                self.buckets[record["bucket"]] = {
                    name: (a["stored"], [int(a["crc32c"][i : i + 8], 16) for i in range(0, len(a["crc32c"]), 8)])
                    for name, a in record["arrays"].items()
                }

    @property
    def num_buckets(self) -> int:
        return -(-self.spec["rows"] // self.spec["bucket_rows"])

    def rows(self, bucket: int) -> int:
        n = min(self.spec["bucket_rows"], self.spec["rows"] - bucket * self.spec["bucket_rows"])
        return dict(self.spec.get("short_buckets", [])).get(bucket, n)

    def bucket(self, name: str, bucket: int) -> np.ndarray:
        """An array's rows of a bucket, in row order."""
        site = self.spec["sites"].get(name)
        kind = site["encoding"].partition(":")[0] if site else None
        dtype = np.dtype(DTYPES[kind] if kind else "<i4")
        lengths, crcs = self.buckets[bucket][name]
        per_shard = (self.spec["shard_rows"] if site else self.spec["bucket_rows"]) // self.spec["chunk_rows"]
        first_shard = bucket * self.spec["bucket_rows"] // self.spec["chunk_rows"] // per_shard
        out, offset = b"", 0
        for c, (length, crc) in enumerate(zip(lengths, crcs, strict=True)):
            offset = 0 if c % per_shard == 0 else offset
            shard = self.root / name / "c" / str(first_shard + c // per_shard) / ("0" if site else "")
            chunk = shard.read_bytes()[offset : offset + length]
            assert int.from_bytes(chunk[-4:], "little") == crc
            index = struct.unpack(f"<{2 * per_shard}Q", checked(shard.read_bytes()[-16 * per_shard - 4 :]))
            assert index[2 * (c % per_shard) :][:2] == (offset, length)
            out += decode(chunk, self.spec["codec"], dtype.itemsize)
            offset += length
        stored = np.frombuffer(out, dtype).reshape(-1, *([site["d"]] if site else []))
        if kind == "fixed":
            raw = checked((self.root / "calibration" / name / "c" / "0" / "0").read_bytes())
            scale, offsets = np.frombuffer(raw, "<f4").reshape(2, -1).astype(np.float64)
            stored = (scale * stored + offsets).astype(np.float32)
        n = self.rows(bucket)
        return stored[[place(self.spec["seed"], bucket, i, n) for i in range(n)]]


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "records"])
@pytest.mark.parametrize("codec", ["planes", "blosc", "none"])
def test_the_second_reader_agrees(codec: str, *, manifest: bool) -> None:
    reader = Reader(GOLDEN / codec, manifest=manifest)
    assert sorted(reader.buckets) == [0, 1, 2]
    ours = open_store(GOLDEN / codec)
    spec = ours.spec
    for b in range(spec.buckets):
        first, stop = spec.bucket_range(b)
        rows = np.arange(first, stop)
        assert np.array_equal(reader.bucket("sequence", b), rows)
        assert np.array_equal(reader.bucket("position", b), rows % 7)
        for name in spec.sites:
            chunks = [ours.read_chunk(name, b, c) for c in range(-(-(stop - first) // spec.chunk_rows))]
            expected = np.concatenate(chunks)[spec.permutation(b)]
            if spec.sites[name].kind == "fixed":
                calibration = ours.calibration(name)
                scale, offset = (x.astype(np.float64) for x in (calibration.scale, calibration.offset))
                expected = (expected * scale + offset).astype(np.float32)
            assert np.array_equal(reader.bucket(name, b).view(np.uint8), np.ascontiguousarray(expected).view(np.uint8))


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "records"])
def test_the_second_reader_agrees_on_an_extended_store(tmp_path: Path, *, manifest: bool) -> None:
    known = write_known(tmp_path)
    extend(open_storage(str(tmp_path)), 300, {"tokens": {}})
    writer = open_writer(tmp_path)
    more = random_sites(writer.spec, 1)
    for bucket in (4, 5):
        assert fill(writer, bucket, more) is not None
    writer.finalise()
    reader = Reader(tmp_path, manifest=manifest)
    assert sorted(reader.buckets) == [0, 1, 2, 3, 4, 5]
    for bucket, first, stop in ((3, 768, 1000), (4, 1024, 1280), (5, 1280, 1324)):
        assert np.array_equal(reader.bucket("sequence", bucket), np.arange(first, stop))
        source = known.sites if bucket == 3 else more
        for name, values in source.items():
            found = reader.bucket(name, bucket)
            assert np.array_equal(found.view(np.uint8), np.ascontiguousarray(values[first:stop]).view(np.uint8))


def test_statistics_are_sums_over_decoded_values() -> None:
    reader = Reader(GOLDEN / "planes", manifest=True)
    values = np.concatenate([reader.bucket("attn_z.0", b) for b in range(3)]).astype(np.float64)
    stats = reader.stats["attn_z.0"]
    assert stats["rows"] == SPEC.rows - 400 == len(values)
    for field, expected in (("sum", values.sum(0)), ("sum_sq", (values**2).sum(0))):
        assert np.allclose(np.frombuffer(base64.b64decode(stats[field]), "<f8"), expected, rtol=1e-12, atol=1e-9)
    assert float.fromhex(stats["max_abs"]) == np.abs(values).max()
