"""Importers: files as their tools write them come out bit for bit; anything else is an error that names the file."""

import itertools
import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
import torch
from commands import run_actstore
from conftest import clear_memory
from safetensors.torch import save_file

from actstore.errors import MismatchError, StoreError
from actstore.exchange.importer import ImportSummary, _identity, import_activations
from actstore.store import open_store

SETTINGS: dict[str, Any] = {"site": "resid_post.3", "bucket_rows": 64, "shard_rows": 32, "chunk_rows": 16, "threads": 1}
numbers = itertools.count()
HOOK = "blocks.3.hook_resid_post"


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(math.prod(shape)).normal(size=shape).astype(np.float32)


def save_data_set(
    directory: Path, x: np.ndarray, ids: np.ndarray, *, files: int = 2, sizes: bool = True, large: bool = False
) -> list[Path]:
    """A cached data set as SAELens 6 leaves it: `Dataset.save_to_disk` of an Array2D and a fixed-length sequence."""
    directory.mkdir()
    (directory / "dataset_info.json").write_text("{}")
    extension = {
        "ARROW:extension:name": "datasets.features.features.Array2DExtensionType",
        "ARROW:extension:metadata": json.dumps([list(x.shape[1:]), str(x.dtype)]),
    }
    item = pa.list_(pa.list_(pa.from_numpy_dtype(x.dtype)))
    ids_type = pa.list_(pa.int32(), x.shape[1]) if sizes else pa.list_(pa.int32())
    if large:
        item, ids_type = pa.large_list(pa.large_list(pa.from_numpy_dtype(x.dtype))), pa.large_list(pa.int32())
    schema = pa.schema([pa.field(HOOK, item, metadata=extension), pa.field("token_ids", ids_type)])
    paths: list[Path] = []
    for i, rows in enumerate(np.array_split(np.arange(len(x)), files)):
        paths.append(directory / f"data-{i:05d}-of-{files:05d}.arrow")
        with pa.OSFile(str(paths[-1]), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in np.array_split(rows, 2):
                columns = [pa.array(x[batch].tolist(), item), pa.array(ids[batch].tolist(), ids_type)]
                writer.write_batch(pa.record_batch(columns, schema=schema))
    state = {"_data_files": [{"filename": p.name} for p in paths], "_fingerprint": None, "_format_type": None}
    (directory / "state.json").write_text(json.dumps(state))
    return paths


def save_activault(directory: Path, x: np.ndarray, ids: np.ndarray, files: int = 2) -> list[Path]:
    """Files as activault's uploader writes them."""
    directory.mkdir()
    paths: list[Path] = []
    for i, rows in enumerate(np.array_split(np.arange(len(x)), files)):
        paths.append(directory / f"5be1{i}--{i}_0.saved.pt")
        states = torch.from_numpy(x[rows]).bfloat16()
        torch.save({"states": states, "input_ids": torch.from_numpy(ids[rows]).long()}, paths[-1])
    return paths


def bring_in(*sources: Path, url: str = "", **options: Any) -> tuple[ImportSummary, Any]:
    url = url or f"memory://imported/{next(numbers)}"
    summary = import_activations(sources, out=url, **SETTINGS | options)
    store = open_store(url)
    assert store.complete
    return summary, store


def in_order(store: Any) -> np.ndarray:
    """The rows by number, as float32."""
    stored = store["resid_post.3"][:].astype(np.float32)
    out = np.empty_like(stored)
    for b in range(store.spec.buckets):
        first, stop = store.spec.bucket_range(b)
        out[first:stop] = stored[first:stop][store.spec.permutation(b)]
    return out


def rounded(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1]).astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(tmp_path: Path, dtype: str, order: str) -> None:
    native = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    a, b, c = normal(70, 6).astype(native), normal(5, 10, 6).astype(native), np.zeros((0, 6), native)
    for name, x in (("x_10", b), ("x_2", a), ("x_1", c)):
        np.save(tmp_path / f"{name}.npy", np.asarray(x, order=order))
    summary, store = bring_in(tmp_path)
    assert (summary.format, summary.files, summary.rows, summary.rows_imported, summary.d) == ("numpy", 3, 120, 120, 6)
    assert np.array_equal(in_order(store), np.concatenate([rounded(a), rounded(b)]))
    assert (store["token_id"][:] == -1).all()
    imported = {"format": "numpy", "files": [_identity(tmp_path / f"x_{i}.npy") for i in (1, 2, 10)], "tensor": None}
    assert store.provenance == {"imported": imported}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: Any) -> None:
    x = normal(130, 6)
    save(tmp_path / "a.npz", x=x)
    save(tmp_path / "b.npz", x=x[::-1], y=x)
    with pytest.raises(StoreError, match=r"b\.npz: it has the tensors x, y; name one of them with --tensor"):
        bring_in(tmp_path)
    store = bring_in(tmp_path, tensor="x", encoding="f32")[1]
    assert np.array_equal(in_order(store), np.concatenate([x, x[::-1]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    x = torch.from_numpy(normal(5, 20, 6)).to(dtype)
    save_file({"x": x}, tmp_path / "a.safetensors")
    save_file({"x": x.flip(0), "z": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(StoreError, match=r"b\.safetensors: it has the tensors x, z; name one"):
        bring_in(tmp_path)
    store = bring_in(tmp_path, tensor="x", encoding="f32")[1]
    expected = torch.cat([x, x.flip(0)]).float().numpy().reshape(-1, 6)
    assert np.array_equal(in_order(store), expected)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_saelens(tmp_path: Path, dtype: str, large: bool) -> None:
    x, ids = normal(17, 8, 6).astype(dtype), np.random.default_rng(0).integers(0, 1000, (17, 8))
    save_data_set(tmp_path / "cache", x, ids, sizes=not large, large=large)
    (tmp_path / "cache" / "cache-12ab.arrow").write_bytes(b"left by datasets.map")
    summary, store = bring_in(tmp_path / "cache", encoding="f32")
    assert (summary.format, summary.files, summary.rows, summary.d) == ("saelens", 2, 136, 6)
    sequence, position = store["sequence"][:], store["position"][:]
    assert sorted(zip(sequence, position, strict=True)) == list(itertools.product(range(17), range(8)))
    assert np.array_equal(store["resid_post.3"][:], x[sequence, position].astype(np.float32))
    assert np.array_equal(store["token_id"][:], ids[sequence, position])
    (tmp_path / "cache" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(StoreError, match=r"state\.json: lists data-00001-of-00002\.arrow, which is missing"):
        bring_in(tmp_path / "cache")


def test_activault(tmp_path: Path) -> None:
    x, ids = normal(17, 8, 6), np.random.default_rng(0).integers(0, 1000, (17, 8))
    save_activault(tmp_path / "run", x, ids)
    (tmp_path / "run" / "metadata.json").write_text("{}")
    summary, store = bring_in(tmp_path / "run")
    assert (summary.format, summary.files, summary.rows) == ("activault", 2, 136)
    sequence, position = store["sequence"][:], store["position"][:]
    assert sorted(zip(sequence, position, strict=True)) == list(itertools.product(range(17), range(8)))
    bits = x[sequence, position].astype(ml_dtypes.bfloat16).view(np.uint16)
    assert np.array_equal(store["resid_post.3"][:].view(np.uint16), bits)
    assert np.array_equal(store["token_id"][:], ids[sequence, position])


@pytest.mark.parametrize("save", [save_data_set, save_activault])
def test_interrupted_imports_continue_without_reading_what_is_there(
    tmp_path: Path, save: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actstore.store.write.append import ActivationWriter

    x, ids = normal(40, 10, 6), np.random.default_rng(0).integers(0, 1000, (40, 10))
    save(tmp_path / "in", x, ids, files=5)
    whole = bring_in(tmp_path / "in")[1]
    append, seen, limits = ActivationWriter.append, [], [100, 250, 400]

    def watched(self: Any, sites: Any, **columns: Any) -> None:
        seen.append((self.next_row, len(sites["resid_post.3"])))
        if self.next_row + seen[-1][1] > limits[0]:
            raise KeyboardInterrupt
        append(self, sites, **columns)

    monkeypatch.setattr(ActivationWriter, "append", watched)
    monkeypatch.setattr("actstore.exchange.importer._BLOCK_ROWS", 30)
    url = f"memory://imported/{next(numbers)}"
    while limits[0] < 400:
        with pytest.raises(KeyboardInterrupt):
            bring_in(tmp_path / "in", url=url)
        limits.pop(0)
        seen.clear()
    summary, store = bring_in(tmp_path / "in", url=url)
    assert seen[0][0] == 400 - summary.rows_imported == 192
    assert sum(n for _, n in seen) == 400 - 192
    assert store.fingerprint == whole.fingerprint
    assert bring_in(tmp_path / "in", url=url)[0].rows_imported == 0
    clear_memory("memory://imported")


def test_rows_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(100, 6))
    x[3, 1], x[70, 2], x[71] = np.nan, np.inf, 1e300
    np.save(tmp_path / "a.npy", x)
    small = ["--bucket-rows", "64", "--shard-rows", "32", "--chunk-rows", "16"]
    args = ["import", str(tmp_path / "a.npy"), "--out", str(tmp_path / "s"), "--site", "a.3", *small]
    run_actstore(*args, "--json", str(tmp_path / "i.json"))
    figures = json.loads((tmp_path / "i.json").read_text())
    assert (figures["nonfinite"], figures["saturated"]) == (3, 0)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A pipe would be waited for, a device read without end."""
    os.mkfifo(tmp_path / "a.npy")
    for path in (tmp_path / "a.npy", Path("/dev/zero")):
        with pytest.raises(StoreError, match="is no regular file"):
            bring_in(path, format="numpy")
    with pytest.raises(StoreError, match="no files to import in no files and directories"):
        bring_in()


def test_another_source_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", normal(10, 6))
    url = f"memory://imported/{next(numbers)}"
    bring_in(tmp_path / "a.npy", url=url)
    (tmp_path / "a.npy").rename(tmp_path / "b.npy")
    with pytest.raises(MismatchError, match=r"provenance\.imported\.files is \[.*'a.npy'.*\], asked for \[.*'b.npy'"):
        bring_in(tmp_path / "b.npy", url=url)


def files_of_every_kind(root: Path) -> dict[str, Path]:
    x, ids = normal(6, 8, 6), np.zeros((6, 8), np.int64)
    np.save(root / "a.npy", x)
    np.savez(root / "a.npz", x=x)
    np.savez_compressed(root / "c.npz", x=x)
    save_file({"x": torch.from_numpy(x)}, root / "a.safetensors")
    arrow = save_data_set(root / "arrow", x, ids, files=1)[0]
    pt = save_activault(root / "pt", x, ids, files=1)[0]
    found = {f"{p.stem}{p.suffix}": p for p in root.iterdir() if p.is_file()}
    return found | {"arrow": arrow, "pt": pt}


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "c.npz", "a.safetensors", "arrow", "pt"])
def test_truncated_and_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    """Every truncation is refused; a flipped bit is refused or, in a value that nothing checks, imported."""
    path = files_of_every_kind(tmp_path)[name]
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    cuts = [0, 1, 7, 8, 64, len(whole) - 1, len(whole) - 8, *rng.integers(0, len(whole), 20).tolist()]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(StoreError) as e:
            bring_in(path)
        assert str(e.value).startswith(f"{path}: ")
        assert "expected" in str(e.value)
        assert "weights_only" not in str(e.value)
    path.write_bytes(whole + b"\0" * 8)
    if name in ("a.npy", "a.safetensors"):
        with pytest.raises(StoreError):
            bring_in(path)
    for place in [*range(0, 160, 3), *rng.integers(0, len(whole), 60).tolist()]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        try:
            assert bring_in(path)[0].rows > 0
        except StoreError as e:
            assert str(e).startswith(f"{path}: ")
    clear_memory("memory://imported")


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("evil"),))


def test_nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"states": torch.zeros(2, 3, 4), "input_ids": Evil()}, "a.pt")
    np.save("a.npy", np.array([Evil()], dtype=object))
    np.savez("a.npz", x=np.array([Evil()], dtype=object))
    for name in ("a.pt", "a.npy", "a.npz"):
        with pytest.raises(StoreError, match=rf"{name}: "):
            bring_in(Path(name))
    assert not Path("evil").exists()


def lying(root: Path) -> dict[str, tuple[Path, str]]:
    """Files that are whole and wrong."""
    x, ids = torch.from_numpy(normal(6, 8, 6)), torch.zeros(6, 8, dtype=torch.int64)
    torch.save([x], root / "list.pt")
    torch.save({"states": x, "input_ids": ids[:, :7].clone()}, root / "ids.pt")
    torch.save({"states": x, "input_ids": ids + (1 << 40)}, root / "large.pt")
    torch.save({"states": x.expand(1 << 20, 6, 8, 6)[..., 0], "input_ids": ids}, root / "expanded.pt")
    torch.save({"states": x[0], "input_ids": ids[0]}, root / "flat.pt")
    torch.save({"states": x, "input_ids": ids}, root / "old.pt", _use_new_zipfile_serialization=False)
    np.save(root / "int.npy", ids.numpy())
    np.save(root / "flat.npy", np.zeros(5))
    np.save(root / "empty.npy", np.zeros((0, 5)))
    save_file({"x": ids}, root / "int.safetensors")
    data = (root / "flat.npy").read_bytes()
    (root / "header.npy").write_bytes(data.replace(b"(5,), ", b"(9,9),"))
    with zipfile.ZipFile(root / "header.npz", "w") as archive:
        archive.writestr("x.npy", data.replace(b"(5,), ", b"(9,9),"))
    ragged = pa.record_batch({"a": pa.array([[[1.0, 2.0]], [[1.0]]], pa.list_(pa.list_(pa.float32())))})
    nulls = pa.record_batch({"a": pa.array([[[1.0, 2.0]], None], pa.list_(pa.list_(pa.float32())))})
    for name, batch in (("ragged", ragged), ("nulls", nulls), ("flat", pa.record_batch({"a": pa.array([1.0])}))):
        with pa.ipc.new_stream(str(root / f"{name}.arrow"), batch.schema) as writer:
            writer.write_batch(batch)
    messages = {
        "list.pt": "no plain tensor 'states'",
        "ids.pt": r"token ids are int64\[6, 7\], expected int32\[6, 8\]",
        "large.pt": "token ids go from 1099511627776",
        "expanded.pt": "no plain tensor 'states'",
        "flat.pt": r"the shape is \[8, 6\], expected \[sequences, positions, d\]",
        "old.pt": "expected a torch.save file .zip format",
        "int.npy": r"the array is int64\[6, 8\]",
        "flat.npy": r"the shape is \[5\]",
        "empty.npy": "no rows in 1 files",
        "int.safetensors": "values are I64",
        "header.npy": "its header stands for 776",
        "header.npz": "its header stands for 776",
        "ragged.arrow": r"lists in a column are \[1, 2\] long",
        "nulls.arrow": "no nulls",
        "flat.arrow": "no tensor that fits",
    }
    assert {p.name for p in root.iterdir()} == set(messages)
    return {name: (root / name, message) for name, message in messages.items()}


def test_wrong_content_is_named(tmp_path: Path) -> None:
    for path, message in lying(tmp_path).values():
        with pytest.raises(StoreError, match=message) as e:
            bring_in(path)
        assert str(e.value).startswith(f"{path}: ")


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", normal(4, 6))
    np.save(tmp_path / "b.npy", normal(4, 7))
    with pytest.raises(StoreError, match=r"b\.npy: rows have 7 values, those before have 6"):
        bring_in(tmp_path)
    save_file({"x": torch.zeros(4, 6)}, tmp_path / "c.safetensors")
    with pytest.raises(StoreError, match=r"c\.safetensors: the name ends in '\.safetensors', expected numpy"):
        bring_in(tmp_path)
    assert bring_in(tmp_path, format="safetensors")[0].files == 1
    (tmp_path / "a.npy").rename(tmp_path / "a.bin")
    with pytest.raises(StoreError, match=r"a\.bin: the name ends in '\.bin'"):
        bring_in(tmp_path / "a.bin")
    assert bring_in(tmp_path / "a.bin", format="numpy")[0].rows == 4
    (tmp_path / "none").mkdir()
    with pytest.raises(StoreError, match="no files to import"):
        bring_in(tmp_path / "none")
    with pytest.raises(StoreError, match=r"no such file or directory; .* copied here"):
        bring_in(Path("s3://bucket/x"))


def test_command(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=normal(100, 6), y=normal(3, 3))
    small = ["--bucket-rows", "64", "--shard-rows", "32", "--chunk-rows", "16"]
    args = ["import", str(tmp_path / "a.npz"), "--out", str(tmp_path / "s"), "--site", "resid_post.3", *small]
    assert "name one of them with --tensor" in run_actstore(*args, code=1).stderr
    done = run_actstore(*args, "--tensor", "x", "--encoding", "f32", "--json", str(tmp_path / "i.json"))
    figures = json.loads((tmp_path / "i.json").read_text())
    assert (figures["rows"], figures["rows_imported"], figures["format"]) == (100, 100, "numpy")
    assert "import: 100% (100 of 100 rows)" in done.stderr
    assert np.array_equal(in_order(open_store(tmp_path / "s")), normal(100, 6))
    assert "--site" in run_actstore(*args[:4], code=2).stderr
    assert "encoding is 'f16'" in run_actstore(*args, "--tensor", "x", "--encoding", "f16", code=2).stderr
