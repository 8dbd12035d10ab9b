"""What users do with a store that can't be done, or not wholly: each is refused or said, never passed over."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run_actstore
from conftest import begin

import actstore
from actstore.errors import ActstoreWarning, StoreError, StreamError
from actstore.store import open_store, open_writer
from actstore.store.format.spec import metadata_objects
from actstore.store.maintain import copy as copying
from actstore.store.maintain.copy import copy
from actstore.store.maintain.verify import verify
from actstore.store.read.index import read_spec
from actstore.store.storage import open_storage
from actstore.store.write.extend import extend
from actstore.store.write.protocol import Attempt
from actstore.stream.filter import whole_numbers

SITE = "resid_post.1"
SIZES = {"bucket_rows": 512, "shard_rows": 256, "chunk_rows": 128}
SMALL: dict[str, Any] = {"encoding": "f32", **SIZES}


def rows(n: int, value: float | None = None) -> np.ndarray:
    return np.full((n, 8), value, np.float32) if value is not None else np.random.default_rng(0).normal(size=(n, 8))


def make(url: Path | str, n: int = 2048, **provenance: Any) -> str:
    with actstore.create(url, sites={SITE: 8}, **SMALL) as w:
        w.append({SITE: rows(n)}, **provenance)
    return str(url)


# Writers


def test_of_two_writers_one_fails_and_says_that_its_rows_are_not_stored(tmp_path: Path) -> None:
    a, b = (actstore.create(tmp_path / "s", sites={SITE: 8}, **SMALL) for _ in range(2))
    a.append({SITE: rows(512, 1.0)})
    a._settle()
    b.append({SITE: rows(512, 2.0)})
    with pytest.raises(StoreError, match="bucket 0 was already committed by another writer, so the rows given here"):
        b.append({SITE: rows(512, 3.0)})
        b.close()
    a.close()
    assert np.unique(open_store(tmp_path / "s")[SITE][:]).tolist() == [1.0]


def test_a_bucket_that_was_taken_over_is_not_called_committed(tmp_path: Path) -> None:
    w = actstore.create(tmp_path / "s", sites={SITE: 8}, **SMALL)
    check = type(w._writer)._check_clipping

    def overtaken(self: Any, bucket: int, sums: Any) -> None:
        check(self, bucket, sums)
        assert isinstance(begin(open_storage(tmp_path / "s"), bucket), Attempt)  # and dies

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(w._writer), "_check_clipping", overtaken)
        w.append({SITE: rows(512)})
        with pytest.raises(StoreError, match="bucket 0 was taken over by another writer"):
            w.close()
    assert open_store(tmp_path / "s").rows == 0


def test_threads_and_forks_are_refused(tmp_path: Path) -> None:
    with actstore.create(tmp_path / "s", sites={SITE: 8}, **SMALL) as w:
        w.append({SITE: rows(10)})
        said: list[str] = []

        def other() -> None:
            try:
                w.append({SITE: rows(10)})
            except ValueError as e:
                said.append(str(e))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert "from another thread than before" in said[0]
        pid = os.fork()
        if pid == 0:
            other()
            os._exit(0 if "from another process" in said[-1] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert open_store(tmp_path / "s").rows == 10


@pytest.mark.parametrize("last", ["w = fed()", "fed()"], ids=["held", "dropped"])
def test_a_writer_that_is_never_closed_keeps_full_buckets_and_says_so(tmp_path: Path, last: str) -> None:
    code = f"""
import numpy as np, actstore
def fed():
    w = actstore.create({str(tmp_path / "s")!r}, sites={{"a": 8}}, encoding="f32", **{SIZES})
    w.append({{"a": np.ones((1500, 8), np.float32)}})
    return w
actstore.create({str(tmp_path / "s")!r}, sites={{"a": 8}}, encoding="f32", **{SIZES})  # was given nothing
{last}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "was never closed: the store is unfinished, 1024 rows are in full buckets, 476 are lost" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert open_store(tmp_path / "s").rows == 1024


@pytest.mark.parametrize("key", [f"{SITE}/zarr.json", f"{SITE}/c/0/0", "commits/notes.txt", "manifest/x", "tokens/ids"])
def test_what_has_a_name_of_the_stores_is_not_written_over(tmp_path: Path, key: str) -> None:
    """Whoever made it: without the store it could be of, it is somebody's."""
    source, mine = make(tmp_path / "s"), tmp_path / "mine" / key
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    (tmp_path / "mine" / "notes.txt").write_text("no name of the store's")
    assert f"{key} is there and of no store" in run_actstore("cp", source, str(tmp_path / "mine"), code=1).stderr
    with pytest.raises(StoreError, match="delete it, or choose an empty place"):
        make(tmp_path / "mine")
    left = {p.relative_to(tmp_path / "mine").as_posix() for p in (tmp_path / "mine").rglob("*") if p.is_file()}
    assert left == {key, "notes.txt"}
    mine.unlink()
    run_actstore("cp", source, str(tmp_path / "mine"))


def test_a_store_that_lost_its_group_is_continued(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), actstore.create(tmp_path / "s", sites={SITE: 8}, rows=2048, **SMALL) as w:
        w.append({SITE: rows(2048)[:1024]})
        raise ZeroDivisionError
    (tmp_path / "s" / "zarr.json").unlink()
    with actstore.create(tmp_path / "s", sites={SITE: 8}, rows=2048, **SMALL) as w:
        assert w.next_row == 1024
        w.append({SITE: rows(2048)[1024:]})
    with actstore.create(tmp_path / "whole", sites={SITE: 8}, rows=2048, **SMALL) as w:
        w.append({SITE: rows(2048)})
    assert open_store(tmp_path / "s").fingerprint == open_store(tmp_path / "whole").fingerprint


def test_threads_are_one_or_more(tmp_path: Path) -> None:
    for threads in (0, -1):
        with pytest.raises(ValueError, match=f"threads is {threads}, expected 1 or more"):
            actstore.create(tmp_path / "s", sites={SITE: 8}, threads=threads, **SMALL)
    assert not (tmp_path / "s").exists()


def test_sites_must_agree_in_their_leading_dimensions(tmp_path: Path) -> None:
    with actstore.create(tmp_path / "s", sites={"a": 8, "b": 8}, **SMALL) as w:
        with pytest.raises(ValueError, match="leading dimensions by site are"):
            w.append({"a": np.zeros((4, 6, 8), np.float32), "b": np.zeros((6, 4, 8), np.float32)})
        w.append({name: np.zeros((4, 6, 8), np.float32) for name in "ab"})


def test_a_changed_file_is_noticed_by_an_import_that_goes_on(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    out = str(tmp_path / "s")
    command = ("import", str(tmp_path / "x.npy"), "--out", out, "--site", "a.0", "--bucket-rows", "64")
    command += ("--shard-rows", "64", "--chunk-rows", "32")
    run_actstore(*command)
    assert open_store(out).provenance["imported"]["files"][0]["bytes"] == (tmp_path / "x.npy").stat().st_size
    x[3, 3] += 1
    np.save(tmp_path / "x.npy", x)
    assert "provenance.imported.files is" in run_actstore(*command, code=1).stderr


# Readers


def unfinished(tmp_path: Path) -> str:
    """A store that lacks its second bucket, as a copy that ended early."""
    url = Path(make(tmp_path / "s"))
    (url / "manifest.json").unlink()
    for part in (url / "manifest").glob("*.json"):
        part.unlink()
    (url / "commits" / "00000001.json").unlink()
    return str(url)


def test_a_missing_bucket_is_an_error_and_never_zeros(tmp_path: Path) -> None:
    store = open_store(unfinished(tmp_path))
    assert np.asarray(store[SITE][:512]).all()
    for where in (slice(512, 1024), slice(None), 600):
        with pytest.raises(StoreError, match=r"rows 512 to 1023 \(bucket 1\) are not committed"):
            np.asarray(store[SITE][where])


def test_everybody_says_that_a_store_is_unfinished(tmp_path: Path) -> None:
    url, words = unfinished(tmp_path), "the store is unfinished: 1536 of 2048 rows are committed"
    assert words in run_actstore("info", url).stdout
    figures = tmp_path / "v.json"
    done = run_actstore("verify", url, "--deep", "--json", str(figures), code=1)
    assert "the store is unfinished: 3 of 4 buckets are committed" in done.stdout
    told = json.loads(figures.read_text())
    assert (told["complete"], told["buckets"], told["planned_buckets"]) == (False, 3, 4)
    with pytest.warns(ActstoreWarning, match=words):
        actstore.ActivationDataset(url, sites=SITE, batch_size=64)


def test_filters_that_leave_out_nothing_are_refused(tmp_path: Path) -> None:
    n = np.arange(2048)
    bare, known = make(tmp_path / "bare"), make(tmp_path / "known", sequence=n // 64, position=n % 64, token_id=n % 50)
    for url, options, words in (
        (bare, {"drop_positions": [0]}, "holds no position"),
        (bare, {"drop_tokens": [2]}, "holds no token_id"),
        (known, {"drop_positions": [64]}, "no row has one of"),
        (known, {"drop_tokens": [50, 99]}, "no row has one of"),
    ):
        with pytest.raises(StreamError, match=words):
            _ = actstore.ActivationDataset(url, sites=SITE, batch_size=64, **options).rows
    with pytest.raises(ValueError, match="drop_positions holds -1"):
        actstore.ActivationDataset(known, sites=SITE, batch_size=64, drop_positions=[-1])
    for given in ("12", [1.5], [None]):
        with pytest.raises(ValueError, match=r"drop_tokens is .*, expected whole numbers"):
            whole_numbers("drop_tokens", given)  # type: ignore[arg-type]
    assert whole_numbers("drop_tokens", np.array([3, 1, 3])) == (1, 3)  # type: ignore[arg-type]
    assert actstore.ActivationDataset(known, sites=SITE, batch_size=64, drop_positions=[0, 64]).rows == 2048 - 32


# Extending and moving


ABOUT = {"tokens": {"fingerprint": "x"}}


def write_extension(url: str) -> None:
    writer = open_writer(url)
    for bucket in sorted(set(range(writer.buckets)) - writer.committed()):
        first, stop = writer.bucket_range(bucket)
        ids = np.zeros(stop - first, np.int32)
        data = {SITE: np.zeros((stop - first, 8), np.float32), "sequence": ids, "position": ids, "token_id": ids}
        writer.write_arrays(bucket, data)
    writer.finalise()


def test_readers_see_the_store_as_it_was_while_it_is_extended(tmp_path: Path) -> None:
    url = make(tmp_path / "s")
    before = open_store(url)
    extend(open_storage(url), 512, ABOUT)
    for store in (before, open_store(url)):
        assert (store.rows, store[SITE].shape, np.asarray(store[SITE][:]).shape) == (2048, (2048, 8), (2048, 8))
    write_extension(url)
    assert open_store(url)[SITE].shape == (2560, 8)
    assert before[SITE].shape == (2048, 8)


def test_two_extensions_at_once_leave_the_metadata_of_the_one_that_won(tmp_path: Path) -> None:
    url = make(tmp_path / "s", 512)
    slow, raced = open_storage(url), []
    replace = slow.replace

    def late(key: str, *args: Any) -> bool:
        if not raced:
            raced.append(extend(open_storage(url), 1024, ABOUT))
        return replace(key, *args)

    slow.replace = late  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="is unfinished"):
        extend(slow, 2048, {"tokens": {"fingerprint": "y"}})
    write_extension(url)
    storage = open_storage(url)
    assert open_store(url).rows == 1536
    assert not verify(storage, deep=True).damage
    assert all(storage.get(key) == data for key, data in metadata_objects(read_spec(storage)).items())


def test_a_move_stops_where_the_source_was_extended_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, real = make(tmp_path / "s"), copying.move_away

    def while_copying(*args: Any) -> Any:
        extend(open_storage(url), 512, ABOUT)
        write_extension(url)
        return real(*args)

    monkeypatch.setattr(copying, "move_away", while_copying)
    with pytest.raises(StoreError, match="was changed while it was copied, so nothing was deleted there"):
        copy(url, tmp_path / "d", move=True)
    assert open_store(url).rows == 2560


def test_nothing_is_written_where_conditions_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage("memory://careless/run")
    monkeypatch.setattr(storage, "create", lambda key, data: storage.put(key, data) or True)
    monkeypatch.setattr("actstore.store.write.bucket.open_storage", lambda _: storage)
    with pytest.raises(StoreError, match="ignores conditional writes"):
        actstore.create("memory://careless/run", sites={SITE: 8}, rows=512, **SMALL)
    assert storage.list("") == {}
