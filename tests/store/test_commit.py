"""The commit protocol on every backend: whatever dies, races or wakes up late, a bucket is absent or whole, once."""

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from commands import CONTEXT, start_fork
from conftest import SPEC, begin, fill, put, random_sites, write_known
from faults import FaultyProxy
from servers import Server

from actstore.errors import ActstoreError, MismatchError
from actstore.store import StoreSpec, StoreWriter, create_store, open_storage, open_store, open_writer
from actstore.store.format import record
from actstore.store.format.manifest import HEAD_KEY
from actstore.store.format.record import CommitRecord
from actstore.store.maintain.verify import verify
from actstore.store.read.index import read_record
from actstore.store.storage import LocalStorage, Storage
from actstore.store.write import protocol
from actstore.store.write.protocol import Attempt, NotWritten

SMALL = replace(SPEC, rows=600)


def damage(url: str | Path) -> list[str]:
    return [f"{d.key}: {d.problem}" for d in verify(open_storage(url), deep=True).damage]


def whole(url: str | Path, spec: StoreSpec, undisturbed: str) -> None:
    """Complete, intact, and what a writer that nothing disturbed would have made."""
    assert damage(url) == []
    store = open_store(url)
    assert store.complete
    assert store.fingerprint == undisturbed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return open_store(write_known(tmp_path_factory.mktemp("quiet") / "s", SMALL).url).fingerprint


class Gate:
    """Lets a storage method of one writer wait until it is opened."""

    def __init__(self, storage: Storage, method: str, only: str) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        plain = getattr(storage, method)

        def wait(key: str, *args: object) -> object:
            if only in key and not self.reached.is_set():
                self.reached.set()
                assert self.opened.wait(60)
            return plain(key, *args)

        setattr(storage, method, wait)


@pytest.mark.parametrize(
    ("method", "key"),
    [("create", "/c/"), ("replace", "commits/"), ("stat", "/c/")],
    ids=["shard", "commit", "leftover"],
)
def test_a_zombie_changes_nothing(backend_url: str, undisturbed: str, method: str, key: str) -> None:
    """An attempt stops just before a put, its successor commits other bytes, and only then does it go on."""
    create_store(backend_url, SMALL)
    if method == "stat":  # it meets a shard that a dead attempt has left
        dead = open_writer(backend_url)
        shard = next(k for k in _shards(dead, 1))
        dead.storage.put(shard, b"left by a dead attempt")
    zombie = open_writer(backend_url, threads=1)
    gate = Gate(zombie.storage, method, key)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(fill, zombie, 1, other_values(1))
        assert gate.reached.wait(60)
        assert isinstance(fill(open_writer(backend_url), 1, known_values()), CommitRecord)
        before = contents(backend_url)
        gate.opened.set()
        assert late.result(60) in (NotWritten.TAKEN_OVER, NotWritten.ALREADY_COMMITTED)
    assert contents(backend_url) == before
    write_known(backend_url, SMALL, buckets=[0, 2])
    whole(backend_url, SMALL, undisturbed)


def known_values() -> dict[str, np.ndarray]:
    return random_sites(SMALL)


def other_values(seed: int) -> dict[str, np.ndarray]:
    return random_sites(SMALL, seed)


def _shards(writer: StoreWriter, bucket: int) -> list[str]:
    from actstore.store.format.spec import arrays

    found = []
    for array in arrays(writer.spec).values():
        first, stop = writer.bucket_range(bucket)
        found += [array.shard_key(i) for i in range(first // array.shard_rows, -(-stop // array.shard_rows))]
    return found


def contents(url: str) -> dict[str, bytes]:
    storage = open_storage(url)
    return {key: storage.get(key) for key in storage.list("")}


def test_of_many_attempts_one_commits(backend_url: str) -> None:
    """Attempts with different values race for the same bucket; the one that commits is whole."""
    create_store(backend_url, SMALL)
    values = [other_values(i) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda v: fill(open_writer(backend_url, threads=1), 0, v), values))
    won = [r for r in made if isinstance(r, CommitRecord)]
    assert len(won) == 1
    assert damage(backend_url) == []
    store = open_store(backend_url)
    assert read_record(store.storage, SMALL, 0).attempt == won[0].attempt
    place = SMALL.permutation(0)
    mine = values[made.index(won[0])]["resid_post.3"][:256]
    stored = np.concatenate([store.read_chunk("resid_post.3", 0, c) for c in range(16)])
    assert np.array_equal(stored[place], mine)


def test_an_attempt_that_was_overtaken_can_neither_put_nor_commit(backend_url: str) -> None:
    storage = create_store(backend_url, SMALL).storage
    first = begin(storage, 0)
    assert put(storage, first, "resid_post.3/c/0/0", b"first")
    second = begin(open_storage(backend_url), 0)
    assert not put(storage, first, "resid_post.3/c/0/0", b"again")
    assert put(storage, second, "resid_post.3/c/0/0", b"second")
    assert storage.get("resid_post.3/c/0/0") == b"second"
    assert isinstance(first, Attempt)
    assert not protocol.run(storage, protocol.commit(first, b"{}"))
    assert open_writer(backend_url).committed() == set()


def test_readers_never_see_what_is_not_committed(backend_url: str) -> None:
    create_store(backend_url, SMALL)
    writer = open_writer(backend_url)
    gate = Gate(writer.storage, "replace", "commits/")
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(fill, writer, 1, known_values())
        assert gate.reached.wait(60)
        assert open_store(backend_url).rows == 0  # all shards are there
        gate.opened.set()
        assert isinstance(late.result(60), CommitRecord)
    assert open_store(backend_url).index.buckets.tolist() == [1]


def test_settings_that_differ_are_refused_and_change_nothing(backend_url: str) -> None:
    write_known(backend_url, SMALL, buckets=[0])
    before = contents(backend_url)
    with pytest.raises(MismatchError, match="seed is 0, asked for 5"):
        create_store(backend_url, replace(SMALL, seed=5))
    assert contents(backend_url) == before


def test_rows_can_be_fixed_later(backend_url: str, undisturbed: str) -> None:
    writer = create_store(backend_url, replace(SMALL, rows=1 << 40))
    assert isinstance(fill(writer, 0, known_values()), CommitRecord)
    assert isinstance(fill(writer, 1, known_values()), CommitRecord)
    assert not open_store(backend_url).complete
    with pytest.raises(ValueError, match="rows is 511"):
        writer.fix_rows(511)
    writer.fix_rows(600)
    writer.fix_rows(600)
    assert isinstance(fill(writer, 2, known_values()), CommitRecord)
    writer.finalise()
    whole(backend_url, SMALL, undisturbed)


def test_an_intent_beyond_the_final_rows_is_in_nobodys_way(backend_url: str, undisturbed: str) -> None:
    writer = create_store(backend_url, replace(SMALL, rows=1 << 40))
    assert isinstance(begin(writer.storage, 7), Attempt)  # and dies
    for bucket in (0, 1):
        assert isinstance(fill(writer, bucket, known_values()), CommitRecord)
    writer.fix_rows(600)
    assert isinstance(fill(writer, 2, known_values()), CommitRecord)
    assert open_store(backend_url).rows == 600
    writer.finalise()
    whole(backend_url, SMALL, undisturbed)


def test_the_manifest_follows_what_is_committed(backend_url: str, undisturbed: str) -> None:
    """Finalised early, by two at once, and again: always one manifest that agrees with the records."""
    write_known(backend_url, SMALL, buckets=[1])
    assert open_store(backend_url).index.buckets.tolist() == [1]
    write_known(backend_url, SMALL, buckets=[0, 2], finalise=False)
    assert open_store(backend_url).fingerprint == undisturbed  # one bucket from the manifest, two from their records
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: open_writer(backend_url).finalise(), range(2)))
    whole(backend_url, SMALL, undisturbed)
    open_storage(backend_url).delete(HEAD_KEY)
    whole(backend_url, SMALL, undisturbed)


def finish(url: str) -> None:
    """Write what is missing, as a worker does."""
    writer = create_store(url, SMALL, threads=2)
    for bucket in sorted(set(range(writer.buckets)) - writer.committed()):
        fill(writer, bucket, known_values())
    writer.finalise()


def _announce_and_finish(url: str, ready: Connection) -> None:
    finish("memory://warm")  # loads what is compiled, so that kills meet the writing and not the start
    open_storage(url).exists("x")  # connects
    ready.send_bytes(b"ready")
    finish(url)


def _kill_at_random(url: str, kills: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(kills):
        ready, theirs = CONTEXT.Pipe()
        process = start_fork(_announce_and_finish, url, theirs)
        assert ready.recv_bytes() == b"ready"
        time.sleep(float(rng.exponential(0.15)))
        process.kill()
        process.join()
        if open_storage(url).exists("zarr.json"):
            assert damage(url) == []


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_kill_9_on_every_backend(backend_url: str, undisturbed: str, kills: int) -> None:
    if backend_url.startswith("memory:"):
        return  # dies with its process
    _kill_at_random(backend_url, kills, seed=kills)
    finish(backend_url)
    whole(backend_url, SMALL, undisturbed)


@pytest.mark.parametrize("kind", ["gs", "s3"])
@pytest.mark.parametrize("share", [0.05, pytest.param(0.25, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_faults_on_the_way(
    kind: str, share: float, undisturbed: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that fails in every way that servers do, while two writers race for the same buckets."""
    server: Server = request.getfixturevalue("gcs_server" if kind == "gs" else "s3_server")
    monkeypatch.setenv("ACTSTORE_RETRY_DEADLINE", "6" if share < 0.1 else "30")
    url = server.fresh()
    with FaultyProxy(server.url, rate=share, seed=1) as proxy:
        monkeypatch.setenv(server.variable, proxy.url)
        with ThreadPoolExecutor(2) as pool:
            for _ in range(2):
                list(pool.map(lambda _: _ignoring_failure(url), range(2)))
        assert any(not r.endswith("None") for r in proxy.requests)
    monkeypatch.setenv(server.variable, server.url)
    assert damage(url) == []
    finish(url)
    whole(url, SMALL, undisturbed)


def _ignoring_failure(url: str) -> None:
    try:
        finish(url)
    except ActstoreError as e:
        assert "\n" not in str(e).strip()


def test_a_full_disk_loses_nothing(tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_known(tmp_path / "s", SMALL, buckets=[0], finalise=False)
    writer = open_writer(tmp_path / "s")
    real, calls = os.writev, []

    def full(*args: object) -> int:
        calls.append(args)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(OSError, match="No space"):
        fill(writer, 1, known_values())
    monkeypatch.undo()
    assert isinstance(writer.storage, LocalStorage)
    assert writer.storage.partials() == ()
    assert damage(tmp_path / "s") == []
    finish(str(tmp_path / "s"))
    whole(tmp_path / "s", SMALL, undisturbed)


def test_a_commit_record_is_never_taken_for_an_intent(backend_url: str) -> None:
    known = write_known(backend_url, SMALL)
    storage = open_storage(known.url)
    assert begin(storage, 0) is NotWritten.ALREADY_COMMITTED
    data = storage.get(record.commit_key(1))
    storage.put(record.commit_key(1), data[:-9])  # damaged: still no intent
    assert begin(storage, 1) is NotWritten.ALREADY_COMMITTED
