"""Extending a finished store: new buckets behind whatever the last one was, and nothing that was there changes."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import SPEC, fill, random_sites, write_known

from actstore import ActivationDataset
from actstore.errors import MismatchError, StoreError
from actstore.exchange.exporter import export
from actstore.store import SiteSpec, StoreSpec, open_store, open_writer
from actstore.store.format.spec import ATTRIBUTE, GROUP_KEY, dump
from actstore.store.maintain.copy import copy
from actstore.store.maintain.gc import collect
from actstore.store.maintain.verify import verify
from actstore.store.read.index import read_spec
from actstore.store.storage import open_storage
from actstore.store.write.extend import extend, extensions

pytestmark = pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")
ABOUT = {"tokens": {"fingerprint": "b"}}


def objects(storage, keys=None):
    return {k: storage.get(k) for k in (keys or storage.list(""))}


def add(url, rows, about, seed):
    """Extend, fill every new bucket and finalise; returns the rows of the new buckets, by site."""
    storage = open_storage(url)
    before = open_store(url).spec.buckets
    extend(storage, rows, about)
    writer = open_writer(url)
    sites = random_sites(writer.spec, seed)
    for bucket in range(before, writer.buckets):
        assert fill(writer, bucket, sites) is not None
    writer.finalise()
    return sites


def rows_of(store, site):
    """Every committed row of a site in row order, through zarr, and its row numbers as `fill` put them."""
    stored, number = store[site][:], store["sequence"][:]
    place = np.concatenate([np.arange(*store.spec.bucket_range(int(b))) for b in store.index.buckets])
    order = np.argsort(number[place])
    return stored[place][order], number[place][order]


def test_an_extension_changes_nothing_that_is_there(backend_url):
    check_extension(backend_url, 300, "bf16")


@pytest.mark.parametrize("rows", [1000, 768, 1, 256], ids=["short", "whole", "one row", "one bucket"])
@pytest.mark.parametrize("encoding", ["bf16", "f32"])
def test_wherever_the_store_ends(tmp_path, rows, encoding):
    check_extension(str(tmp_path / "store"), rows, encoding)


def check_extension(url, rows, encoding):
    spec = StoreSpec(
        sites={"a": SiteSpec(d=5, encoding=encoding)}, rows=rows, bucket_rows=256, shard_rows=64, chunk_rows=16
    )
    known = write_known(url, spec)
    storage = open_storage(url)
    data = [k for k in storage.list("") if "/c/" in k or k.startswith("commits/")]
    before, fingerprint = objects(storage, data), open_store(url).fingerprint

    extend(storage, 300, ABOUT)
    assert open_store(url).fingerprint == fingerprint, "readers see what it was"
    assert open_store(url).complete
    writer = open_writer(url)
    assert writer.committed() == set(range(spec.buckets))
    assert extend(storage, 300, ABOUT) == writer.spec, "the same extension is continued, not repeated"
    assert not verify(storage, deep=True).damage
    sites = random_sites(writer.spec, 7)
    for bucket in range(spec.buckets, writer.buckets):
        assert fill(writer, bucket, sites) is not None
    writer.finalise()

    store = open_store(url)
    assert (store.rows, store.spec.planned_rows, store.complete) == (rows + 300, rows + 300, True)
    assert store.stats("a").rows == rows + 300
    assert objects(storage, data) == before
    assert not verify(storage, deep=True).damage
    found, numbers = rows_of(store, "a")
    first_new = spec.buckets * 256
    assert numbers.tolist() == [*range(rows), *range(first_new, first_new + 300)]
    bits = found.view(np.uint16 if encoding == "bf16" else np.uint32).reshape(rows + 300, 5)
    expected = np.concatenate([known.sites["a"], sites["a"][first_new : first_new + 300]])
    assert np.array_equal(bits, expected.view(bits.dtype).reshape(bits.shape))


def test_twice_extended_streamed_exported_copied_and_cleaned(tmp_path):
    url = str(tmp_path / "store")
    known = write_known(url)
    sites = [known.sites, add(url, 100, ABOUT, 1), add(url, 600, {"tokens": {"fingerprint": "c"}}, 2)]
    store = open_store(url)
    assert [e["first_bucket"] for e in extensions(store.spec)] == [4, 5]
    assert store.spec.short_buckets == ((3, 232), (4, 100))
    assert store.rows == 1700
    spans = [range(1000), range(1024, 1124), range(1280, 1880)]
    numbers = [r for span in spans for r in span]
    expected = np.concatenate([s["resid_post.3"][span.start : span.stop] for s, span in zip(sites, spans, strict=True)])

    seen = []
    with ActivationDataset(url, sites="resid_post.3", batch_size=20, with_rows=True, streams=1) as ds:
        for batch in ds:
            seen += batch["sequence"].tolist()
    assert sorted(seen) == numbers, "every row once, no gap"

    export(url, tmp_path / "all.npy", sites=["resid_post.3"], format="npy")
    assert np.load(tmp_path / "all.npy" / "row.npy").tolist() == numbers
    exact = np.load(tmp_path / "all.npy" / "resid_post.3.npy")
    assert np.array_equal((exact.view(np.uint32) >> 16).astype(np.uint16), expected)
    export(url, tmp_path / "some.npy", sites=["resid_post.3"], rows=(990, 1030), format="npy")
    assert np.load(tmp_path / "some.npy" / "row.npy").tolist() == [*range(990, 1000), *range(1024, 1030)]
    with pytest.raises(ValueError, match="rows 1000:1024 hold no row"):  # places behind a short bucket
        export(url, tmp_path / "none.npy", rows=(1000, 1024))
    assert not (tmp_path / "none.npy").exists()
    export(url, tmp_path / "sample.npy", sites=["resid_post.3"], sample=1700, format="npy")
    assert np.load(tmp_path / "sample.npy" / "row.npy").tolist() == numbers

    copy(url, tmp_path / "copy")
    assert open_store(tmp_path / "copy").fingerprint == store.fingerprint
    assert not verify(open_storage(tmp_path / "copy"), deep=True).damage
    found = collect(url, older_than=0, delete=False)
    assert all(g.key.startswith("manifest/") for g in found.garbage)  # of the times before the extensions
    assert not found.unknown
    np.seterr(invalid="ignore")  # the random bits hold signalling NaN
    for name, gap in (("sequence", -1), ("resid_post.3", np.nan), ("mlp_out.3", np.nan)):
        whole = np.asarray(store[name][:])
        assert np.array_equal(
            whole[1000:1024].astype(float), np.full_like(whole[1000:1024], gap, float), equal_nan=True
        )
        assert not np.array_equal(
            whole[992:1000].astype(float), np.full_like(whole[992:1000], gap, float), equal_nan=True
        )


def test_what_an_extension_in_work_holds_is_not_garbage_and_not_moved_away(tmp_path):
    url = str(tmp_path / "store")
    write_known(url)
    extend(open_storage(url), 600, ABOUT)
    writer = open_writer(url)
    assert fill(writer, 4, random_sites(writer.spec)) is not None
    assert not collect(url, older_than=0, delete=True).garbage
    assert open_writer(url).committed() == {0, 1, 2, 3, 4}
    with pytest.raises(StoreError, match="unfinished and may still be written"):
        copy(url, tmp_path / "copy", move=True)


def test_what_cannot_be_extended_is_refused(tmp_path):
    url = str(tmp_path / "store")
    write_known(url, buckets=[0, 1], finalise=False)
    with pytest.raises(StoreError, match="is unfinished; finish it with the command that began it"):
        extend(open_storage(url), 10, ABOUT)
    write_known(tmp_path / "whole")
    extend(open_storage(tmp_path / "whole"), 10, ABOUT)
    with pytest.raises(MismatchError, match="rows is 10, asked for 11"):
        extend(open_storage(tmp_path / "whole"), 11, ABOUT)


LIES = [[], [[3, "x"]], [[99, 1]], [[0, 1], [0, 2]], [[1, 5], [0, 5]], [[0, 256]], [[0, 0]], [[-1, 5]], [[3, 5]]]


@pytest.mark.parametrize("lie", [*LIES, [[True, 5]], {"0": 5}, 5, "0", [[0, 5]] * 2000, [[0, 5, 6]], [None]])
def test_short_buckets_that_cannot_be_are_refused(tmp_path, lie):
    url = str(tmp_path / "store")
    spec = write_known(url).spec
    data = spec.to_json() | {"short_buckets": lie}
    group = {"zarr_format": 3, "node_type": "group", "attributes": {ATTRIBUTE: data}}
    open_storage(url).put(GROUP_KEY, dump(group))
    with pytest.raises(StoreError, match="short_buckets"):
        read_spec(open_storage(url))


@pytest.mark.parametrize("lie", [5, [5], [{}], [{"first_bucket": 99, "rows": 1}], [{"first_bucket": 1, "rows": "1"}]])
def test_extensions_that_cannot_be_are_refused(lie):
    spec = replace(SPEC, provenance={"extensions": lie})
    with pytest.raises(StoreError, match="provenance extensions is"):
        extensions(spec)
