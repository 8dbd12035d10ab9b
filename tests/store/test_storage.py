"""Object storage: one contract for every backend, with faults, forks and hostile names."""

import errno
import json
import os
import secrets
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from commands import CONTEXT, run_in_fork, start_fork
from faults import KINDS, Fault, FaultyProxy
from servers import BUCKET, REMOTE, Server, server_of

from actstore.errors import MissingError, StoreError
from actstore.store.storage import LocalStorage, Storage, check_conditional_writes, open_storage
from actstore.store.storage import remote as storage_remote
from actstore.store.storage.remote import RemoteStorage, plain

MIB = 1 << 20


@pytest.fixture
def storage(backend_url: str) -> Storage:
    return open_storage(backend_url)


def together(n: int, job: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(job, range(n)))


# The contract


def test_objects_round_trip(storage: Storage) -> None:
    big = secrets.token_bytes(12 * MIB)
    pieces = [b"", big[:5], b"", big[5 : 3 * MIB], big[3 * MIB :]]
    for key, data in {"a/empty": b"", "none": [], "a/b/one": b"x", "big": big, "pieces": pieces}.items():
        whole = data if isinstance(data, bytes) else b"".join(data)
        storage.put(key, data)
        assert storage.get(key) == whole
        assert storage.size(key) == len(whole)
        assert storage.exists(key)
        assert storage.create(f"created/{key}", data)
        assert storage.get(f"created/{key}", len(whole)) == whole
    assert not storage.create("created/big", big), "a large object is not read back"
    storage.put("big", b"small")
    assert storage.get("big") == b"small"


def test_a_buffer_may_be_used_again(storage: Storage) -> None:
    for write in (storage.put, storage.create):
        buffer = bytearray(b"first")
        write(f"of/{write.__name__}", [memoryview(buffer)])
        buffer[:] = b"other"
        assert storage.get(f"of/{write.__name__}") == b"first"


def test_many_pieces_are_one_object(tmp_path: Path) -> None:
    pieces = [bytes([i % 251]) * (i % 7) for i in range(3000)]
    storage = LocalStorage(tmp_path)
    storage.put("x", pieces)
    assert storage.get("x") == b"".join(pieces)


def test_ranges_are_exact(storage: Storage) -> None:
    data = bytes(range(256)) * 16
    storage.put("x", data)
    storage.put("empty", b"")
    for offset, size in ((0, 1), (0, 4096), (4095, 1), (100, 1000), (7, 0)):
        assert storage.get_range("x", offset, size) == data[offset : offset + size]
    for key, offset, size in (("x", 4000, 97), ("x", 4096, 1), ("x", 9999, 5), ("empty", 0, 1)):
        with pytest.raises(StoreError, match=rf"object {key} has \d+ bytes from {offset} on, expected {size}"):
            storage.get_range(key, offset, size)
    with pytest.raises(MissingError, match="object nothing is missing"):
        storage.get_range("nothing", 0, 1)


def test_a_limit_refuses_larger_objects(storage: Storage) -> None:
    storage.put("x", b"12345")
    storage.put("empty", b"")
    assert storage.get("x", 5) == b"12345"
    assert storage.get("x", 1 << 40) == b"12345"
    assert storage.get("empty", 0) == b""
    for limit in (0, 4):
        with pytest.raises(StoreError, match=f"object x is larger than the {limit} bytes"):
            storage.get("x", limit)


def test_missing_objects(storage: Storage) -> None:
    storage.put("there/x", b"x")
    for key in ("nothing", "there", "there/x/below"):
        assert storage.stat(key) is None
        assert not storage.exists(key)
        with pytest.raises(MissingError, match="missing"):
            storage.get(key)
        with pytest.raises(MissingError, match="missing"):
            storage.size(key)
    assert not storage.replace("nothing", b"x", storage.stat("there/x").version)  # type: ignore[union-attr]
    assert not storage.exists("nothing")


def test_delete(storage: Storage) -> None:
    storage.put("a/x", b"x")
    storage.delete("a/x")
    storage.delete("a/x")
    storage.delete("never/there")
    assert storage.list("") == {}
    assert storage.create("a/x", b"y")


def test_listing(storage: Storage) -> None:
    assert storage.list("") == {}
    keys = {"b/2": 2, "b/10": 1, "a": 3, "b/c/d": 4, "bb/x": 5}
    for key, size in keys.items():
        storage.put(key, b"x" * size)
    assert list(storage.list("").items()) == sorted(keys.items())
    assert list(storage.list("b").items()) == [("b/10", 1), ("b/2", 2), ("b/c/d", 4)]
    assert storage.list("b/") == storage.list("b")
    assert storage.list("b/c") == {"b/c/d": 4}
    assert storage.list("nothing") == {}
    assert storage.list("a") == {}, "an object is not below itself"


def test_versions_change_with_every_write(storage: Storage) -> None:
    before = time.time()
    seen: list[str] = []
    for i in range(5):
        storage.put("x", b"%d" % i)
        found = storage.stat("x")
        assert found is not None
        assert found == storage.stat("x")
        assert found.size == 1
        assert before - 2 < found.modified < time.time() + 2
        seen.append(found.version)
    assert len(set(seen)) == 5


def test_replace_is_compare_and_swap(storage: Storage) -> None:
    storage.put("x", b"first")
    old = storage.stat("x")
    assert old is not None
    assert storage.replace("x", [b"sec", b"ond"], old.version)
    assert storage.get("x") == b"second"
    assert not storage.replace("x", b"third", old.version)
    assert storage.replace("x", b"second", old.version), "our own bytes are there"
    now = storage.stat("x")
    assert now is not None
    assert not storage.replace("x", b"third" * MIB, old.version)
    storage.delete("x")
    assert not storage.replace("x", b"third", now.version)
    assert not storage.exists("x")


def test_create_is_create_only(storage: Storage) -> None:
    assert storage.create("x", b"ours")
    assert not storage.create("x", b"theirs")
    assert storage.create("x", [b"ou", b"rs"]), "a lost answer looks like this"
    assert storage.get("x") == b"ours"


def test_of_sixteen_creators_one_wins(storage: Storage) -> None:
    for key in ("r/0", "r/1"):
        won = together(16, lambda i, key=key: storage.create(key, b"writer %d" % i))
        assert won.count(True) == 1
        assert storage.get(key) == b"writer %d" % won.index(True)


def test_of_sixteen_replacers_one_wins(storage: Storage) -> None:
    storage.put("x", b"start")
    for turn in range(2):
        found = storage.stat("x")
        assert found is not None
        version = found.version
        won = together(16, lambda i, v=version, t=turn: storage.replace("x", b"%d writer %d" % (t, i), v))
        assert won.count(True) == 1
        assert storage.get("x") == b"%d writer %d" % (turn, won.index(True))


def test_hostile_names_are_refused(storage: Storage) -> None:
    for key in ("", "/etc/passwd", "../x", "a/../../x", "a//b", "a/./b", "a\\b", "a\0b", "a/"):
        for call in (
            lambda k=key: storage.get(k),
            lambda k=key: storage.put(k, b""),
            lambda k=key: storage.create(k, b""),
            lambda k=key: storage.replace(k, b"", "1"),
            lambda k=key: storage.delete(k),
            lambda k=key: storage.stat(k),
        ):
            with pytest.raises(StoreError, match="not a relative path"):
                call()
    with pytest.raises(StoreError, match="not a relative path"):
        storage.list("../..")


def test_the_probe_passes_and_leaves_nothing(storage: Storage) -> None:
    check_conditional_writes(storage, "probe")
    assert storage.list("") == {}


@pytest.mark.parametrize("careless", ["create", "replace"])
def test_the_probe_refuses_stores_that_ignore_conditions(careless: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(f"memory://{secrets.token_hex(6)}")
    monkeypatch.setattr(storage, careless, lambda key, data, *_: storage.put(key, data) or True)
    with pytest.raises(StoreError, match="ignores conditional writes"):
        check_conditional_writes(storage, "probe")
    assert storage.list("") == {}


@pytest.mark.parametrize("scheme", REMOTE)
def test_listings_have_many_pages(scheme: str, request: pytest.FixtureRequest) -> None:
    url = server_of(scheme, request).fresh()
    storage = open_storage(url)
    n = 1050
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: storage.put(f"k/{i:05d}", b"x"), range(n)))
    assert list(open_storage(url).list("k")) == [f"k/{i:05d}" for i in range(n)]


# A directory


def test_links_out_of_the_root_are_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").write_bytes(b"secret")
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    storage = LocalStorage(tmp_path / "root")
    storage.put("a/x", b"x")
    assert storage.get("a/x") == b"x", "the root itself may be a link"
    (tmp_path / "real" / "inside").symlink_to(tmp_path / "real" / "a")
    assert storage.get("inside/x") == b"x"
    (tmp_path / "real" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "real" / "a" / "file").symlink_to(tmp_path / "outside" / "x")
    for call in (
        lambda: storage.get("out/x"),
        lambda: storage.get("a/file"),
        lambda: storage.get_range("a/file", 0, 1),
        lambda: storage.put("out/y", b""),
        lambda: storage.create("out/y", b""),
        lambda: storage.delete("out/x"),
        lambda: storage.stat("out/x"),
        lambda: storage.list(""),
        lambda: storage.list("out"),
        lambda: storage.list("a"),
    ):
        with pytest.raises(StoreError, match="out of the store through the symbolic link"):
            call()
    assert sorted(p.name for p in (tmp_path / "outside").iterdir()) == ["x"]


def test_partial_and_lock_files_are_no_objects(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("a/x", b"x")
    assert (tmp_path / ".lock").exists()
    partial = tmp_path / "a" / "y.0123.partial"
    partial.write_bytes(b"half")
    assert storage.list("") == {"a/x": 1}
    assert list(storage.partials()) == [partial]


@pytest.mark.parametrize("method", ["put", "create", "replace"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("x", b"old")
    found = storage.stat("x")
    assert found is not None

    def full(fd: int, views: Any) -> int:
        os.write(fd, b"h")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "writev", full)
    more = (found.version,) if method == "replace" else ()
    with pytest.raises(OSError, match="No space left") as e:
        getattr(storage, method)("new" if method == "create" else "x", b"data", *more)
    assert e.value.errno == errno.ENOSPC
    assert not storage.partials()
    assert storage.get("x") == b"old"
    assert storage.list("") == {"x": 3}


def test_data_is_synced_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("a/x", b"old")
    log: list[str] = []
    sync, replace, link = os.fsync, os.replace, os.link
    monkeypatch.setattr(os, "fsync", lambda fd: (log.append(f"sync {os.fstat(fd).st_mode >> 12:o}"), sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda *a, **k: (log.append("name"), replace(*a, **k))[1])
    monkeypatch.setattr(os, "link", lambda *a, **k: (log.append("name"), link(*a, **k))[1])
    file_then_name_then_directory = ["sync 10", "name", "sync 4"]
    storage.put("a/x", b"new")
    assert log == file_then_name_then_directory
    storage.create("a/y", b"new")
    found = storage.stat("a/x")
    assert found is not None
    assert storage.replace("a/x", b"newer", found.version)
    assert log == file_then_name_then_directory * 3


def test_new_directories_are_synced_up_to_the_first_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())), sync(fd))[1]
    )
    LocalStorage(tmp_path / "new" / "store").put("a/b/x", b"data")
    above = {str(tmp_path / p) for p in (".", "new", "new/store", "new/store/a", "new/store/a/b")}
    assert above <= {str(Path(p)) for p in synced}


def test_paths_are_absolute_when_they_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    storage = open_storage("here")
    storage.put("x", b"1")
    monkeypatch.chdir(tmp_path / "elsewhere")
    storage.put("y", b"2")
    assert storage.list("") == open_storage(tmp_path / "here").list("") == {"x": 1, "y": 1}
    assert open_storage(storage.url).get("x") == b"1"


def test_file_urls_are_decoded_and_empty_ones_refused(tmp_path: Path) -> None:
    (tmp_path / "a b%").mkdir()
    open_storage(f"file://{tmp_path}/a%20b%25").put("x", b"1")
    assert (tmp_path / "a b%" / "x").read_bytes() == b"1"
    open_storage(f"{tmp_path}/a%20b").put("x", b"2")
    assert (tmp_path / "a%20b" / "x").read_bytes() == b"2"
    for url in ("", "  "):
        with pytest.raises(ValueError, match="empty path"):
            open_storage(url)
    with pytest.raises(ValueError, match="names the host 'runs'"):
        open_storage("file://runs/store")


def test_without_hard_links_creating_is_as_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    storage = LocalStorage(tmp_path)
    won = together(16, lambda i: storage.create("r", b"writer %d" % i))
    assert won.count(True) == 1
    assert storage.get("r") == b"writer %d" % won.index(True)
    assert not storage.partials()


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(StoreError, match="has no file locks"):
        LocalStorage(tmp_path).put("x", b"1")
    assert LocalStorage(tmp_path).list("") == {}


def test_a_swap_sees_the_last_write_of_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`os.stat` of a path answers from a cache, as NFS's may for seconds; the file itself, once open, never."""
    cache: dict[Any, os.stat_result] = {}
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **k: cache.setdefault((path, *k.items()), real(path, **k)))
    a, b = LocalStorage(tmp_path), LocalStorage(tmp_path)
    assert a.create("k", b"v0")
    va, vb = a.stat("k"), b.stat("k")
    assert va and vb
    assert [a.replace("k", b"from a", va.version), b.replace("k", b"from b", vb.version)] == [True, False]
    assert a.get("k") == b"from a"


def hold_the_lock(folder: Path, held: Connection) -> None:
    with LocalStorage(folder)._lock():
        held.send_bytes(b"held")
        time.sleep(600)


def test_a_killed_process_frees_the_lock(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("x", b"old")
    held, theirs = CONTEXT.Pipe()
    child = start_fork(hold_the_lock, tmp_path, theirs)
    assert held.recv_bytes() == b"held"
    found = storage.stat("x")
    assert found is not None
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(storage.replace, "x", b"new", found.version)
        time.sleep(0.2)
        assert not waiting.done()
        child.kill()
        assert waiting.result(60)
    child.join()
    assert storage.get("x") == b"new"


# Faults


def through(
    proxy: FaultyProxy, server: Server, url: str, monkeypatch: pytest.MonkeyPatch, seconds: float = 20
) -> Storage:
    """The storage at `url` behind a proxy."""
    monkeypatch.setenv("ACTSTORE_RETRY_DEADLINE", str(seconds))
    monkeypatch.setenv(server.variable, proxy.url)
    return open_storage(url)


@pytest.fixture(params=REMOTE)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def server(kind: str, request: pytest.FixtureRequest) -> Server:
    return server_of(kind, request)


@pytest.mark.parametrize("fault", KINDS)
def test_every_fault_passes(kind: str, server: Server, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = secrets.token_bytes(MIB // 2)
    script = [fault, None] * 6
    with FaultyProxy(server.url, script) as proxy:
        storage = through(proxy, server, server.fresh(), monkeypatch, 8 if fault == "silence" else 20)
        storage.put("x", data)
        assert storage.get("x") == data
        if fault == "silence":
            return
        assert storage.get_range("x", 1000, 1000) == data[1000:2000]
        assert storage.list("") == {"x": len(data)}
        assert storage.size("x") == len(data)
        storage.delete("x")
        assert not storage.exists("x")


@pytest.mark.parametrize("fault", ["lost", "cut", "short", "500"])
def test_an_own_write_whose_answer_was_lost_is_ours(
    kind: str, server: Server, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyProxy(server.url, [fault]) as proxy:
        storage = through(proxy, server, server.fresh(), monkeypatch)
        assert storage.create("x", b"ours")
        assert not storage.create("x", b"theirs")
        assert storage.get("x") == b"ours"
        assert "PUT" in proxy.requests[0] or "POST" in proxy.requests[0]
    found = storage_at(storage, server, monkeypatch).stat("x")
    assert found is not None
    with FaultyProxy(server.url, [fault]) as proxy:
        again = through(proxy, server, storage.url, monkeypatch)
        assert again.replace("x", b"newer", found.version)
        assert not again.replace("x", b"other", found.version)
        assert again.get("x") == b"newer"


def storage_at(storage: Storage, server: Server, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv(server.variable, server.url)
    return open_storage(storage.url)


def test_a_large_create_whose_answer_was_lost_is_not_claimed(
    kind: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyProxy(server.url, ["lost"]) as proxy:
        storage = through(proxy, server, server.fresh(), monkeypatch)
        assert not storage.create("x", b"x" * (MIB + 1))
        assert storage.size("x") == MIB + 1


@pytest.mark.parametrize("fault", ["503", "silence"])
def test_lasting_failure_ends_in_one_line(
    kind: str, server: Server, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyProxy(server.url, [None, *[fault] * 1000]) as proxy:
        storage = through(proxy, server, server.fresh(), monkeypatch, 2)
        assert storage.stat("x") is None
        started = time.monotonic()
        with pytest.raises(StoreError, match=r"could not read some/key: \d+ tries within 2 s, .*RETRY_DEADLINE") as e:
            storage.get("some/key")
        assert time.monotonic() - started < 30
        assert "\n" not in str(e.value)
        assert "Signature" not in str(e.value)
        assert len(proxy.requests) >= 3


@pytest.mark.parametrize("answered", [False, True])
def test_a_server_that_never_answered_gets_less_time(
    kind: str, server: Server, answered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address that nobody listens at is given up on sooner than a server that stopped answering."""
    with FaultyProxy(server.url, [None] if answered else [], rate=1.0, kinds=["drop"]) as proxy:
        storage = through(proxy, server, server.fresh(), monkeypatch, 2 if answered else 60)
        if answered:
            assert storage.stat("x") is None
        monkeypatch.setattr(storage_remote, "FIRST_CONTACT", 0.5)
        started = time.monotonic()
        words = (
            r"within 2 s, .*RETRY_DEADLINE" if answered else r"within 0\.5 s, .*not answered once; check its address"
        )
        with pytest.raises(StoreError, match=words):
            storage.get("x")
        assert answered or time.monotonic() - started < 30


def test_http_is_refused_at_once(s3_server: Server) -> None:
    """A server of any other kind: an answer that will not change is no reason to wait."""
    with FaultyProxy(s3_server.url) as proxy:
        with pytest.raises(StoreError, match=r"could not read x: 403.*check the credentials"):
            open_storage(f"{proxy.url}/{BUCKET}/run").get("x")
        assert len(proxy.requests) == 1


@pytest.mark.parametrize("answer", [403, 401, 400, 404, 501])
def test_what_will_not_pass_is_not_tried_again(
    kind: str, server: Server, answer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3 = "<Error><Code>Custom</Code><Message>said the server</Message></Error>"
    text = json.dumps({"error": {"message": "said the server"}}) if kind == "gs" else s3
    script: list[Fault] = [(answer, text)] * 50
    with FaultyProxy(server.url, script) as proxy:
        storage = through(proxy, server, server.fresh(), monkeypatch)
        with pytest.raises(StoreError, match="is missing" if answer == 404 else "could not read x: .*the server"):
            storage.get("x")
        assert len(proxy.requests) == 1
        with pytest.raises(StoreError, match=r"could not write x: .*(no such bucket|said the server).*check the cred"):
            storage.put("x", b"data")
        assert len(proxy.requests) == 2


def test_a_missing_bucket_is_named(kind: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "<Error><Code>NoSuchBucket</Code><Message>The specified bucket does not exist</Message></Error>"
    with FaultyProxy(server.url, [(404, text)] * 50) as proxy:
        storage = through(proxy, server, server.fresh(), monkeypatch)
        for call in (lambda: storage.put("x", b""), lambda: storage.create("x", b""), lambda: storage.list("")):
            with pytest.raises(StoreError, match="there is no such bucket"):
                call()


def test_two_conditional_writes_that_met_are_tried_again(
    kind: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind != "s3":
        pytest.skip("S3's answer")
    text = "<Error><Code>ConditionalRequestConflict</Code><Message>conflicting operation</Message></Error>"
    with FaultyProxy(server.url, [(409, text)]) as proxy:
        storage = through(proxy, server, server.fresh(), monkeypatch)
        assert storage.create("x", b"ours")
    with FaultyProxy(server.url, [(409, text)]) as proxy:
        storage = through(proxy, server, server.fresh(), monkeypatch)
        storage.put("x", b"old")
        found = storage.stat("x")
        assert found is not None
        assert storage.replace("x", b"ours", found.version)


def test_one_request_an_object(kind: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    data = secrets.token_bytes(12 * MIB)
    with FaultyProxy(server.url) as proxy:
        storage = through(proxy, server, server.fresh(), monkeypatch)
        storage.put("x", data)
        assert storage.get("x") == data
        storage.get("x", 20 * MIB)
        with pytest.raises(StoreError, match="larger"):
            storage.get("x", 10)
        storage.get_range("x", 5, 5)
        assert storage.create("y", data)
        found = storage.stat("x")
        assert found is not None
        assert storage.replace("x", data[1:], found.version)
        methods = [r.split()[0] for r in proxy.requests]
    write = "POST" if kind == "gs" else "PUT"
    assert methods == [write, "GET", "GET", "GET", "GET", write, "GET" if kind == "gs" else "HEAD", write]


@pytest.mark.slow
def test_soak_under_faults(kind: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen writers add to 12 counters by compare-and-swap; no increment may be lost or doubled.

    An increment whose answer was lost and which was swapped away before it could be read back counts as not done.
    """
    kinds = [k for k in KINDS if k != "silence"]
    with FaultyProxy(server.url, rate=0.2, kinds=kinds, seed=7) as proxy:
        storage = through(proxy, server, server.fresh(), monkeypatch, 60)
        for k in range(12):
            assert storage.create(f"counter/{k}", b"0 start")

        def work(writer: int) -> int:
            done = 0
            for turn in range(24):
                key = f"counter/{(writer + turn) % 12}"
                found = storage.stat(key)
                assert found is not None
                value = int(storage.get(key).split()[0])
                done += storage.replace(key, b"%d writer %d turn %d" % (value + 1, writer, turn), found.version)
            return done

        done = sum(together(16, work))
        total = sum(int(storage.get(k).split()[0]) for k in storage.list("counter"))
        assert len(proxy.requests) > 1000
        lost = sum(r.endswith((" lost", " cut")) for r in proxy.requests if r.startswith(("PUT", "POST")))
    assert 12 < done <= total <= done + lost


# Forks, engines, messages


def fork(url: str, generations: int, child: str) -> None:
    """Read and write in a process, in a fork of it, and so on; exit with 0 if each could."""
    inherited = open_storage(url)
    inherited.put("0", b"data")
    for generation in range(1, generations + 1):
        pid = os.fork()
        if pid:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert inherited.get(f"{generation - 1}") == b"data", "the parent goes on"
            os._exit(code)
        made = inherited if child == "inherited" else open_storage(url)
        assert set(together(8, lambda _, g=generation, m=made: m.get(f"{g - 1}"))) == {b"data"}
        assert made.create(f"{generation}", b"data")
        with pytest.raises(MissingError):
            made.get("nothing")
        assert set(made.list("")) == {f"{g}" for g in range(generation + 1)}


@pytest.mark.parametrize("child", ["inherited", "anew"])
def test_a_forked_child_goes_on(backend_url: str, child: str) -> None:
    done = run_in_fork(fork, backend_url, 2, child)
    assert done.returncode == 0, done.stdout + done.stderr


def connect_at_once() -> None:
    """Use a storage in eight threads of a forked process; exit with the number of clients, the parent's too."""
    made: list[object] = []

    def connect() -> Any:
        time.sleep(0.05)
        made.append(object())
        return made[-1]

    storage = RemoteStorage("s3://bucket", "", connect)
    pid = os.fork()
    if pid:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    assert len(set(together(8, lambda _: id(storage._driver())))) == 1
    os._exit(len(made))


def test_the_threads_of_a_forked_child_share_one_client() -> None:
    done = run_in_fork(connect_at_once)
    assert done.returncode == 2, done.stderr


def test_the_engine_of_gs_is_chosen(gcs_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def driver() -> str:
        return type(open_storage(gcs_server.fresh())._driver()).__name__  # type: ignore[attr-defined]

    monkeypatch.delenv("ACTSTORE_ENGINE", raising=False)
    assert driver() == "GcsfsDriver"
    monkeypatch.setenv("ACTSTORE_ENGINE", "obstore")
    assert driver() == "ObstoreDriver"
    monkeypatch.setenv("ACTSTORE_ENGINE", "fast")
    with pytest.raises(ValueError, match="ACTSTORE_ENGINE is 'fast', expected gcsfs or obstore"):
        driver()


@pytest.mark.parametrize("url", ["hdfs://host/x", "s4://bucket/x", "abfs://c/x", "sftp://host/x"])
def test_unknown_schemes_are_refused_with_those_that_are_served(url: str) -> None:
    with pytest.raises(
        ValueError, match=r"unknown URL scheme '\w+'; use a path, file://, gs://, s3://, az://, memory://"
    ):
        open_storage(url)


@pytest.mark.parametrize("url", ["s3://bucket/a//b", "s3://bucket/../x", "memory://a/./b", "s3://bucket/a\\b"])
def test_hostile_prefixes_are_refused(url: str) -> None:
    with pytest.raises(StoreError, match="not a relative path"):
        open_storage(url)


def test_memory_is_shared_within_a_process() -> None:
    open_storage("memory://here/store").put("x", b"1")
    assert open_storage("memory:///here/store/").get("x") == b"1"
    assert open_storage("memory://here").list("store") == {"store/x": 1}
    everything = open_storage("memory://")
    assert everything.list("") == open_storage(everything.url).list("") == {"here/store/x": 1}
    assert open_storage("memory://other/store").list("") == {}


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:secret@bucket/x",
        "memory://x?token=secret",
        "gs://bucket/x?token=secret",
        "s3://",
        "gs:///x",
        "ftp://me:secret@host/x",
    ],
)
def test_urls_hold_no_secrets(url: str) -> None:
    with pytest.raises(ValueError, match="user, password or query") as e:
        open_storage(url)
    assert "secret" not in str(e.value)


def test_messages_hold_no_secrets() -> None:
    error = OSError("GET http://me:secret@host/x?X-Amz-Signature=secret\nfailed\n\nDebug source:\nsecret")
    assert plain(error) == "GET http://host/x failed"
    assert plain(TimeoutError()) == "TimeoutError"
    error = OSError('Generic S3 error: Error performing GET http://x/y in 1.5ms - HTTP error: failed\n\nDebug source:\n'
                    'Http(Connect, Os { code: 111, message: "Connection refused" })')  # fmt: skip
    assert plain(error) == "HTTP error: failed: Connection refused"
    assert plain(OSError("status code: 403 Forbidden: ")) == "status code: 403 Forbidden"


@pytest.mark.parametrize("seconds", ["soon", "0", "-1", "nan", "inf"])
def test_the_deadline_is_checked(seconds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTSTORE_RETRY_DEADLINE", seconds)
    with pytest.raises(ValueError, match="ACTSTORE_RETRY_DEADLINE is"):
        open_storage("memory://x")


def test_wrong_and_missing_credentials(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    storage = open_storage(s3_server.fresh())
    for call in (lambda: storage.get("x"), lambda: storage.put("x", b""), lambda: storage.list("")):
        with pytest.raises(StoreError, match="check the credentials") as e:
            call()
        assert "a-wrong-secret" not in str(e.value)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StoreError, match="credentials"):
        open_storage(s3_server.fresh()).get("x")


def test_credentials_come_from_profiles(s3_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c").write_text("[lab]\naws_access_key_id = test\naws_secret_access_key = test\n")
    (tmp_path / "config").write_text(f"[profile lab]\nregion = us-east-1\nendpoint_url = {s3_server.url}\n")
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "c"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    storage = open_storage(s3_server.fresh())
    storage.put("x", b"data")
    assert storage.get("x") == b"data"


def test_certificates_of_an_own_authority(s3_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cryptography = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = cryptography.Name([cryptography.NameAttribute(cryptography.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        cryptography.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(1), now + timedelta(1))
        .add_extension(cryptography.SubjectAlternativeName([cryptography.IPAddress(IPv4Address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "ca.pem").write_bytes(certificate.public_bytes(pem))
    (tmp_path / "both.pem").write_bytes(private + certificate.public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    monkeypatch.setenv("ACTSTORE_RETRY_DEADLINE", "3")
    with FaultyProxy(s3_server.url) as proxy:
        proxy._server.socket = context.wrap_socket(proxy._server.socket, server_side=True)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url.replace("http", "https"))
        with pytest.raises(StoreError, match="InvalidCertificate UnknownIssuer"):
            open_storage(s3_server.fresh()).put("x", b"1")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "ca.pem"))
        open_storage(s3_server.fresh()).put("x", b"1")
        assert len(proxy.requests) == 1


def test_the_root_of_a_bucket(server: Server) -> None:
    storage = open_storage(f"{server.scheme}://{BUCKET}")
    key = f"{secrets.token_hex(4)}/x"
    storage.put(key, b"1")
    assert storage.list("")[key] == 1


def test_odd_prefixes(server: Server) -> None:
    storage = open_storage(f"{server.scheme}://{BUCKET}/my run~1 % é/{secrets.token_hex(4)}")
    storage.put("a/x", b"1")
    assert storage.list("") == {"a/x": 1}
    assert storage.get("a/x") == b"1"
