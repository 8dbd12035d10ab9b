"""Every damage that changes a value or a fact is found and named, and no damaged row is returned.

Small stores of every encoding and codec are damaged one object at a time: a flipped byte, a truncation, a deletion, two
objects that swap places. What a damage changed is judged without actstore's readers: by zarr-python, json and pyarrow.
"""

import contextlib
import itertools
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from commands import run_actstore
from conftest import fill, random_sites

from actstore.errors import ActstoreError
from actstore.store import SiteSpec, StoreSpec, create_store, open_storage, open_store
from actstore.store.format import codec
from actstore.store.format.manifest import HEAD_KEY
from actstore.store.format.spec import ATTRIBUTE, GROUP_KEY, SEAL
from actstore.store.maintain.verify import Damage, verify
from actstore.store.read.index import Location
from actstore.store.storage.local import LOCK

SPEC = StoreSpec(
    sites={
        "resid_post.3": SiteSpec(d=12),
        "mlp_out.3": SiteSpec(d=7, encoding="f32"),
        "attn_out.3": SiteSpec(d=10, encoding="fixed:1e-3"),
        "attn_out.4": SiteSpec(d=10, encoding="fixed:1e-3"),
    },
    rows=212,
    bucket_rows=64,
    shard_rows=32,
    chunk_rows=8,
)
"""Four buckets of two shards; the last bucket has one shard of three chunks, the last of them half full."""
KINDS = (
    "bf16", "f32", "fixed", "provenance", "record", "manifest", "group", "array", "calibration", "calibration metadata",
)  # fmt: skip
HOWS = ("flip", "truncate", "delete", "swap")
COMBINATIONS = list(itertools.product(KINDS, HOWS))


def kind_of(key: str) -> str:
    top = key.partition("/")[0]
    if top in SPEC.sites or top in ("sequence", "position", "token_id"):
        if key.endswith(GROUP_KEY):
            return "array"
        return SPEC.sites[top].kind if top in SPEC.sites else "provenance"
    if top == "calibration":
        return "calibration metadata" if key.endswith(GROUP_KEY) else "calibration"
    return {GROUP_KEY: "group", HEAD_KEY: "manifest", "manifest": "manifest", "commits": "record"}[top]


def build(root: Path, spec: StoreSpec, seed: int) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    sites = random_sites(spec, seed)  # every bit pattern
    for name, site in spec.sites.items():
        if site.kind == "fixed":
            sites[name] = rng.normal(size=(spec.rows, site.d)).astype(np.float32)
    sites["resid_post.3"] = (rng.normal(size=(spec.rows, 12)).astype(np.float32).view(np.uint32) >> 16).astype("<u2")
    writer = create_store(root, spec, threads=1)
    for b in range(spec.buckets):
        assert fill(writer, b, sites) is not None
    writer.finalise()
    return snapshot(root)


def snapshot(root: Path) -> dict[str, bytes]:
    files = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
    return {key: p.read_bytes() for key, p in sorted(files.items()) if key != LOCK}


def fact(root: Path, key: str) -> Any:
    """What an object says, by readers that are not actstore's; an exception if it says nothing."""
    if key == HEAD_KEY:
        if not (root / key).exists():
            return None
        about = json.loads((root / key).read_bytes())
        about.pop(SEAL)
        return about
    if key.endswith(".parquet"):
        return pq.read_table(root / key).to_pydict()
    if key == GROUP_KEY:
        zarr.open_group(root, mode="r")
        about = json.loads((root / key).read_bytes())
        about["attributes"][ATTRIBUTE].pop(SEAL)
        return about
    if key.startswith(("commits/", "manifest/")):
        about = json.loads((root / key).read_bytes())
        about.pop(SEAL)
        return about
    name = "/".join(key.split("/")[: 2 if key.startswith("calibration/") else 1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Numcodecs codecs")
        values = np.asarray(zarr.open_array(root, path=name, mode="r")[:])
    metadata = json.loads((root / key).read_bytes()) if key.endswith(GROUP_KEY) else None
    return metadata, values.dtype.name, values.shape, values.tobytes()


def changed(whole: "Whole", keys: list[str]) -> set[str]:
    """Those of the keys whose object now says something else than it did, or nothing."""
    out = set[str]()
    for key in keys:
        try:
            same = fact(whole.root, key) == whole.facts[key] or (key == HEAD_KEY and fact(whole.root, key) is None)
        except Exception:  # noqa: BLE001  whatever a foreign reader raises, it has read nothing
            same = False
        if not same:
            out.add(key)
    return out


@dataclass(frozen=True)
class Whole:
    """A store as it was written, and all that it says."""

    root: Path
    objects: dict[str, bytes]
    twin: dict[str, bytes]
    """Objects of another store, to stand in where a store has no two objects of one size."""
    facts: dict[str, Any]
    rows: dict[Location, np.ndarray]

    def damages(self, count: int, start: int, seed: int) -> Iterator[tuple[str, str, dict[str, bytes | None]]]:
        """`count` damages as kind, way and new contents; each 40 in a row are all kinds damaged in all ways."""
        rng = np.random.default_rng(seed)
        order = np.random.default_rng(0).permutation(len(COMBINATIONS))
        for i in range(start, start + count):
            kind, how = COMBINATIONS[order[i % len(order)]]
            keys = [k for k in self.objects if kind_of(k) == kind]
            yield kind, how, self._damage(str(rng.choice(keys)), how, rng)

    def _damage(self, key: str, how: str, rng: np.random.Generator) -> dict[str, bytes | None]:
        data = self.objects[key]
        if how == "flip":
            return {key: _flip(key, data, rng)}
        if how == "truncate":
            return {key: data[: rng.integers(len(data))]}
        if how == "delete":
            return {key: None}
        same = [k for k, v in self.objects.items() if k != key and len(v) == len(data)]
        other = [k for k in same if self.objects[k] != data]
        if not same or (kind_of(key) == "calibration metadata" and rng.integers(2)):
            return {key: self.twin[key]}
        partner = str(rng.choice(other or same))
        return {key: self.objects[partner], partner: data}


def _flip(key: str, data: bytes, rng: np.random.Generator) -> bytes:
    """One byte changed: every third time a shard's index, or a digit into another, which leaves JSON that parses."""
    flipped = bytearray(data)
    at, mask = int(rng.integers(len(data))), int(rng.integers(1, 256))
    if rng.integers(3) == 0 and key.endswith(".json"):
        at, mask = int(rng.choice([i for i, b in enumerate(data) if b in b"01234567"])), int(rng.integers(1, 8))
    elif rng.integers(3) == 0 and "/c/" in key:
        at = len(data) - 1 - int(rng.integers(4 + 16 * min(4, len(data) // 200)))
    flipped[at] ^= mask
    return bytes(flipped)


def read_rows(root: Path) -> Iterator[tuple[Location, np.ndarray | ActstoreError]]:
    """Every chunk of every array, or the error instead of it."""
    store = open_store(root)
    for name, index in store.index.arrays.items():
        for place, bucket in enumerate(store.index.buckets.tolist()):
            for c in range(np.count_nonzero(index.chunks[place])):
                at = index.locate(place, bucket, c)
                try:
                    yield at, store.read_chunk(name, place, c)
                except ActstoreError as e:
                    yield at, e
    for name, site in store.sites.items():
        if site.kind == "fixed":
            at = Location(key=f"calibration/{name}/c/0/0", offset=0, length=8 * site.d + 4, crc32c=0)
            try:
                steps = store.calibration(name)
                yield at, np.stack([steps.scale, steps.offset])
            except ActstoreError as e:
                yield at, e


@pytest.fixture(scope="module", params=codec.CODECS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    root, spec = tmp_path_factory.mktemp("damage") / "s", replace(SPEC, codec=request.param)
    objects = build(root, spec, 0)
    assert {kind_of(k) for k in objects} == set(KINDS)
    sites = {k: replace(v, d=11) if v.kind == "fixed" else v for k, v in spec.sites.items()}
    twin = build(root.with_name("twin"), spec, 1)
    for changes, kind in (({"seed": 1}, "group"), ({"sites": sites}, "calibration metadata")):
        other = build(root.with_name(kind), replace(spec, **changes), 1)
        twin |= {k: v for k, v in other.items() if kind_of(k) == kind}
    rows = dict(read_rows(root))
    assert verify(open_storage(root), deep=True).damage == []
    return Whole(root, objects, twin, {k: fact(root, k) for k in objects}, rows)  # type: ignore[arg-type]


@contextlib.contextmanager
def damaged(whole: Whole, contents: dict[str, bytes | None]) -> Iterator[None]:
    """The store with other contents of these objects, and afterwards as it was; nothing inside may write to it."""

    def put(contents: Mapping[str, bytes | None]) -> None:
        for key, content in contents.items():
            path = whole.root / key
            path.unlink() if content is None else path.write_bytes(content)

    put(contents)
    before = snapshot(whole.root)
    try:
        yield
        assert snapshot(whole.root) == before
    finally:
        put({key: whole.objects[key] for key in contents})


def findings(root: Path) -> tuple[list[Damage], str]:
    """What `verify --deep` finds, and the message of its error if it raises one."""
    try:
        return verify(open_storage(root), deep=True).damage, ""
    except ActstoreError as e:
        return [], str(e)


def names(found: Damage, key: str) -> bool:
    return found.key == key or found.problem.endswith(f"another store than {key}")


def check_reads(whole: Whole, contents: dict[str, bytes | None]) -> None:
    """A chunk whose bytes changed raises; every other raises or has the rows that were written."""
    try:
        found = list(read_rows(whole.root))
    except ActstoreError:
        return  # the store does not open, so it returns nothing
    for at, rows in found:
        old, new = (side[at.key][at.offset : at.offset + at.length] if side[at.key] is not None else None
                    for side in (whole.objects, {**whole.objects, **contents}))  # fmt: skip
        if old != new:
            assert isinstance(rows, ActstoreError), at
            assert at.key in str(rows)
        if not isinstance(rows, ActstoreError):
            assert rows.tobytes() == whole.rows[at].tobytes(), at


def check_arrays(whole: Whole) -> int:
    """`store[name]` raises or has what zarr read from the whole store; how many raised."""
    raised = 0
    for key in whole.objects:
        if kind_of(key) == "array":
            try:
                values = np.asarray(open_store(whole.root)[key.removesuffix(f"/{GROUP_KEY}")][:])
            except ActstoreError:
                raised += 1
            else:
                assert (values.dtype.name, values.shape, values.tobytes()) == whole.facts[key][1:], key
    return raised


@pytest.mark.parametrize(
    "count", [20, pytest.param(168, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])], ids=["some", "many"]
)
def test_every_damage_that_changes_anything_is_found_and_named(whole: Whole, count: int) -> None:
    """20 of each of three codecs meet every combination; 168 make 504."""
    seen = Counter[str]()
    number = codec.CODECS.index(json.loads(whole.objects[GROUP_KEY])["attributes"][ATTRIBUTE]["codec"])
    for kind, how, contents in whole.damages(count, number * 20, seed=100 * number + count):
        what = f"{how} of {kind} {sorted(contents)}"
        with damaged(whole, contents):
            lost = changed(whole, list(contents))
            found, error = findings(whole.root)
            for key in lost:
                assert (error and key in error) or any(names(d, key) for d in found), (what, found, error)
            assert len({d.key for d in found}) == len(found), (what, found)
            check_reads(whole, contents)
            seen["arrays that raised"] += check_arrays(whole)
        seen["changed" if lost else "harmless"] += 1
        seen["found"] += bool(found or error)
        seen["harmless and found"] += bool((found or error) and not lost)
    print(dict(seen))
    assert seen["changed"] > count * 3 // 4
    assert seen["arrays that raised"] > count // 4
    assert check_arrays(whole) == 0
    assert verify(open_storage(whole.root), deep=True).damage == []


def test_the_command_line_prints_one_line_for_each_damaged_object(whole: Whole) -> None:
    keys = ["attn_out.3/c/0/0", "commits/00000001.json", "mlp_out.3/zarr.json", "token_id/c/0"]
    contents = {k: None if k.startswith("token_id") else whole.objects[k][:-1] for k in keys}
    with damaged(whole, contents):
        lines = run_actstore("verify", str(whole.root), "--deep", code=1).stdout.splitlines()
    assert sorted(line.split(":")[0] for line in lines if not line.startswith("note: ")) == keys
    assert "intact" in run_actstore("verify", str(whole.root), "--deep").stdout
