"""gc: what dead attempts left is freed, and nothing else, whoever is alive while it runs."""

import json
import os
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from commands import run_actstore
from conftest import SPEC, begin, fill, put, random_sites, write_known
from hypothesis import given, settings
from hypothesis import strategies as st
from test_commit import Gate, contents, whole

from actstore.errors import StoreError
from actstore.store import create_store, open_storage, open_store, open_writer
from actstore.store.format import record
from actstore.store.format.manifest import HEAD_KEY
from actstore.store.format.shard import MARK_BYTES, tail, tail_bytes
from actstore.store.format.spec import GROUP_KEY, OPEN_ENDED, arrays, calibration_key
from actstore.store.maintain import gc
from actstore.store.maintain.gc import Report, collect
from actstore.store.write.protocol import Attempt

SMALL = replace(SPEC, rows=300, bucket_rows=128)
VALUES = random_sites(SMALL)
STRANGE = (
    "notes.txt",
    "resid_post.3/c/90/0/deeper",
    "resid_post.3/c/007/0",
    "resid_post.3/c/-1/0",
    "resid_post.3/c/x/0",
    "resid_post.3/c/80",
    "sequence/c/70/0",
    "resid_post.99/c/0/0",
    "resid_post.3/c/9999999999999999999/0",
    "commits/00000099.json",
    "commits/1.json",
    "manifest/old.parquet",
)
"""Names that look like the store's and are not."""
OWN = ("tokens/zarr.json", "tokens/ids/c/0/0", "tokens/resid_post.3/c/7/0")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return open_store(write_known(tmp_path_factory.mktemp("quiet") / "s", SMALL).url).fingerprint


def die_in(url: str, bucket: int, shards: int = 3) -> list[str]:
    """Leave what an attempt leaves that dies after so many puts; returns their keys."""
    storage = open_storage(url)
    attempt = begin(storage, bucket)
    keys = keys_of(bucket)[:shards]
    for key in keys:
        assert put(storage, attempt, key, secrets.token_bytes(700))
    return keys


def keys_of(bucket: int) -> list[str]:
    """All shards of a bucket."""
    first, stop = SMALL.bucket_range(bucket)
    ranges = {a: range(first // a.shard_rows, -(-stop // a.shard_rows)) for a in arrays(SMALL).values()}
    return [a.shard_key(i) for a, shards in ranges.items() for i in shards]


def finish(url: str) -> None:
    """Write what is missing, as a worker does."""
    writer = open_writer(url, threads=1)
    for bucket in sorted(set(range(writer.buckets)) - writer.committed()):
        fill(writer, bucket, VALUES)
    writer.finalise()


def keys(report: Report) -> set[str]:
    return {g.key for g in report.garbage}


def age(url: str | Path, hours: float, *, only: str = "") -> None:
    """Make files of a directory that much older."""
    then = time.time() - 3600 * hours
    for path in Path(url).rglob("*"):
        if path.is_file() and only in path.as_posix():
            os.utime(path, (then, then))


# What is freed


def test_a_dry_run_lists_and_changes_nothing(backend_url: str) -> None:
    write_known(backend_url, SMALL, buckets=[0])
    dead = die_in(backend_url, 1)
    before = contents(backend_url)
    report = collect(backend_url, older_than=0)
    assert keys(report) == set(dead)
    assert report.bytes == 700 * len(dead)
    assert not report.deleted
    assert {g.why for g in report.garbage} == {"of bucket 1, which nobody committed"}
    assert contents(backend_url) == before


def test_leftovers_are_freed_and_nothing_else(backend_url: str, undisturbed: str) -> None:
    write_known(backend_url, SMALL, buckets=[0])
    storage = open_storage(backend_url)
    for key in (*OWN, *(s for s in STRANGE if s != "commits/1.json" and "99.json" not in s)):
        storage.put(key, b"x" * 50)
    dead = die_in(backend_url, 1)
    beyond = ["resid_post.3/c/10/0", "mlp_out.3/c/123456/0", "sequence/c/3"]
    for key in beyond:
        storage.put(key, b"of a larger plan")
    before = contents(backend_url)
    report = collect(backend_url, older_than=0, delete=True)
    assert keys(report) == {*dead, *beyond}
    assert report.deleted
    after = contents(backend_url)
    assert set(before) <= set(after)
    changed = {k for k in after if after[k] != before.get(k)}
    assert changed == {*dead, *beyond, *(f"commits/{b:08}.json" for b in (1, 5, 61728, 3))}
    for key in dead:
        assert after[key][MARK_BYTES:] == tail((), 4, "")[4:]
    assert set(report.unknown) == set(STRANGE) - {"commits/1.json", "commits/00000099.json"}
    again = collect(backend_url, older_than=0, delete=True)
    assert (again.garbage, again.kept) == ([], [])
    assert contents(backend_url) == after
    finish(backend_url)
    whole(backend_url, SMALL, undisturbed)


def test_an_emptied_bucket_is_not_committed(tmp_path: Path) -> None:
    write_known(tmp_path / "s", SMALL, buckets=[0])
    die_in(str(tmp_path / "s"), 1, shards=7)
    collect(tmp_path / "s", older_than=0, delete=True)
    for name in ("resid_post.3", "sequence"):
        with pytest.raises(StoreError, match=r"rows 128 to 255 .bucket 1. are not committed"):
            open_store(tmp_path / "s")[name][128:256]


def test_a_complete_store_has_no_garbage(backend_url: str, undisturbed: str) -> None:
    write_known(backend_url, SMALL)
    before = contents(backend_url)
    for manifest in (True, False):  # known from the manifest, and from the records
        if not manifest:
            open_storage(backend_url).delete(HEAD_KEY)
            del before[HEAD_KEY]
        report = collect(backend_url, older_than=0, delete=True)
        assert (report.garbage, report.kept, report.unknown) == ([], [], {})
        assert contents(backend_url) == before
    whole(backend_url, SMALL, undisturbed)


def test_only_what_is_old_enough_is_freed(tmp_path: Path) -> None:
    url = str(tmp_path / "s")
    write_known(url, SMALL, buckets=[0])
    young, old = die_in(url, 1), die_in(url, 2)
    storage = open_storage(url)
    storage.put("resid_post.3/c/10/0", b"old, beyond")
    age(url, 25)
    age(url, 23, only="commits/00000001.json")  # its shards are older than the attempt: somebody came back to it
    storage.put("resid_post.3/c/12/0", b"young, beyond")
    assert keys(collect(url)) == {*old, "resid_post.3/c/10/0"}
    report = collect(url, delete=True)
    assert keys(report) == {*old, "resid_post.3/c/10/0"}
    assert report.kept == ["bucket 1 was worked on 23.00 hours ago", "bucket 6 was worked on 0.00 hours ago"]
    assert keys(collect(url, older_than=22.9)) == set(young)
    assert open_storage(url).get("resid_post.3/c/12/0") == b"young, beyond"


def test_shards_without_an_intent_go_by_their_own_age(tmp_path: Path, undisturbed: str) -> None:
    url = str(tmp_path / "s")
    create_store(url, SMALL)
    storage = open_storage(url)
    storage.put("resid_post.3/c/3/0", b"from nowhere")
    assert collect(url).kept[0].startswith("bucket 1 was worked on 0.00 hours ago")
    assert keys(collect(url, older_than=0, delete=True)) == {"resid_post.3/c/3/0"}
    assert storage.size("resid_post.3/c/3/0") == tail_bytes(4)
    assert isinstance(record.from_bytes(storage.get("commits/00000001.json"), SMALL, 1), record.Intent)
    finish(url)
    whole(url, SMALL, undisturbed)


def test_partial_files_are_freed_by_name_and_age(tmp_path: Path) -> None:
    root = Path(write_known(tmp_path / "s", SMALL).url)
    old, young = root / f"mlp_out.3/c/0/0.{'a' * 16}.partial", root / f"zarr.json.{'b' * 16}.partial"
    foreign = root / "my.partial"
    (root / "link").symlink_to(foreign)
    for path in (old, young, foreign):
        path.write_bytes(b"half")
    age(root, 30, only=old.name)
    before = contents(str(root))
    assert keys(collect(root)) == {old.relative_to(root).as_posix()}
    assert old.exists()
    report = collect(root, delete=True)
    assert report.garbage[0].why == "a write that was never finished"
    assert (old.exists(), young.exists(), foreign.exists()) == (False, True, True)
    assert report.unknown == {"my.partial": 4, "link": 4}
    assert contents(str(root)) == before


def test_calibrations_and_open_ended_stores(tmp_path: Path) -> None:
    """The calibration that a dead attempt made stays: the next attempt takes it."""
    sites = {name: replace(site, encoding="fixed:1e-3") for name, site in SMALL.sites.items()}
    fixed = replace(SMALL, rows=OPEN_ENDED, sites=sites)
    create_store(tmp_path / "s", fixed)
    storage = open_storage(tmp_path / "s")
    assert isinstance(begin(storage, 70_000), Attempt)
    for key in (calibration_key("resid_post.3"), f"resid_post.3/c/{2 * 70_000 + 1}/0"):
        storage.put(key, b"x")
    assert keys(collect(tmp_path / "s", older_than=0, delete=True)) == {f"resid_post.3/c/{2 * 70_000 + 1}/0"}
    assert storage.get(calibration_key("resid_post.3")) == b"x"


@pytest.mark.parametrize("hours", [-1.0, float("nan"), float("inf")])
def test_bad_ages_are_refused(tmp_path: Path, hours: float) -> None:
    with pytest.raises(ValueError, match="expected a number of hours, 0 or more"):
        collect(tmp_path, older_than=hours)


def test_where_there_is_no_store_nothing_is_touched(tmp_path: Path) -> None:
    (tmp_path / f"x.{'0' * 16}.partial").write_bytes(b"mine")
    with pytest.raises(StoreError, match="no activation store"):
        collect(tmp_path, older_than=0, delete=True)
    root = Path(write_known(tmp_path / "s", SMALL, buckets=[0]).url)
    die_in(str(root), 1)
    group = (root / GROUP_KEY).read_bytes()
    before = contents(str(root))
    for damaged in (group[:-5], group.replace(b'"rows": 300', b'"rows": 200')):
        (root / GROUP_KEY).write_bytes(damaged)
        with pytest.raises(StoreError, match=r"zarr\.json"):
            collect(root, older_than=0, delete=True)
    (root / GROUP_KEY).write_bytes(group)
    assert contents(str(root)) == before
    assert (tmp_path / f"x.{'0' * 16}.partial").exists()


leftovers = st.fixed_dictionaries(
    {
        "committed": st.sets(st.integers(0, 2)),
        "intents": st.sets(st.integers(0, 2)),
        "shards": st.sets(st.sampled_from([k for b in range(3) for k in keys_of(b)])),
        "beyond": st.sets(st.integers(10, 10**18 - 1), max_size=3),
        "strange": st.sets(st.sampled_from([s for s in STRANGE if not s.startswith("commits/")] + list(OWN))),
    }
)


@settings(max_examples=40, deadline=None)
@given(there=leftovers)
def test_any_mixture_of_leftovers(there: dict[str, Any], undisturbed: str) -> None:
    url = f"memory://gc/{secrets.token_hex(8)}"
    write_known(url, SMALL, buckets=sorted(there["committed"]))
    storage = open_storage(url)
    for bucket in there["intents"] - there["committed"]:
        assert isinstance(begin(storage, bucket), Attempt)
    left = [k for k in there["shards"] if storage.create(k, secrets.token_bytes(90))]
    beyond = [f"mlp_out.3/c/{n}/0" for n in there["beyond"]]
    for key in (*beyond, *there["strange"]):
        storage.put(key, b"abc")
    before = contents(url)
    report = collect(url, older_than=0, delete=True)
    assert keys(report) == {*left, *beyond}
    assert set(report.unknown) == there["strange"] - set(OWN)
    after = contents(url)
    committed = {k for b in there["committed"] for k in (*keys_of(b), record.commit_key(b))}
    for key in (*committed, *there["strange"], GROUP_KEY):
        assert after[key] == before[key]
    assert all(len(after[k]) < 300 for k in (*left, *beyond))
    finish(url)
    whole(url, SMALL, undisturbed)


# Who is alive

# both engines on S3 make the same requests; the one that is quicker to connect is enough here
SLOW_S3 = pytest.param("s3", marks=pytest.mark.slow)
each_interleaved = pytest.mark.parametrize("backend_url", ["local", "memory", "gs", SLOW_S3], indirect=True)
each_server = pytest.mark.parametrize("backend_url", ["local", "memory", "gs", "s3"], indirect=True)


@each_interleaved
@pytest.mark.parametrize(
    ("method", "key", "survives"),
    [("create", "/c/", False), ("replace", "commits/", False), ("create", "commits/", True)],
    ids=["shards", "commit", "begin"],
)
def test_an_attempt_that_gc_overtakes(
    backend_url: str, undisturbed: str, method: str, key: str, survives: bool
) -> None:
    """An attempt sleeps while gc frees its bucket: it ends without a trace, or never noticed; a rerun completes."""
    create_store(backend_url, SMALL)
    if method == "create":
        open_storage(backend_url).put("resid_post.3/c/3/0", b"left by a dead attempt")
    sleeper = open_writer(backend_url, threads=1)
    gate = Gate(sleeper.storage, method, key)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(fill, sleeper, 1, VALUES)
        assert gate.reached.wait(60)
        report = collect(backend_url, older_than=0, delete=True)
        assert report.garbage
        gate.opened.set()
        assert isinstance(late.result(60), record.CommitRecord) == survives
    assert (open_store(backend_url).index.buckets.tolist() == [1]) == survives
    finish(backend_url)
    whole(backend_url, SMALL, undisturbed)


@each_interleaved
@pytest.mark.parametrize(
    ("method", "key"),
    [
        ("stat", "commits/"),
        ("replace", "commits/"),
        ("stat", "/c/"),
        ("replace", "/c/"),
    ],
    ids=["before-judging", "before-taking-over", "before-looking", "before-emptying"],
)
def test_an_attempt_that_overtakes_gc(
    backend_url: str, undisturbed: str, monkeypatch: pytest.MonkeyPatch, method: str, key: str
) -> None:
    """gc sleeps anywhere while another attempt commits the bucket: not a byte of it changes afterwards.

    Its clock is an hour ahead, so that no age limit helps.
    """
    write_known(backend_url, SMALL, buckets=[0, 2])
    die_in(backend_url, 1)
    storage = open_storage(backend_url)
    monkeypatch.setattr(gc, "open_storage", lambda url: storage)
    monkeypatch.setattr(gc, "time", SimpleNamespace(time=lambda: time.time() + 3600))
    gate = Gate(storage, method, key)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(collect, backend_url, older_than=0, delete=True)
        assert gate.reached.wait(60)
        finish(backend_url)
        before = contents(backend_url)
        gate.opened.set()
        report = late.result(60)
    assert contents(backend_url) == before
    assert not report.garbage
    assert len(report.kept) == 1
    whole(backend_url, SMALL, undisturbed)


@each_server
def test_many_at_once(backend_url: str, undisturbed: str) -> None:
    """Writers and collectors at the same three buckets, again and again, with the age limit off."""
    create_store(backend_url, SMALL)

    def write(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for bucket in rng.permutation(3).tolist():
            fill(open_writer(backend_url, threads=1), bucket, VALUES)

    def free(_: int) -> None:
        for _ in range(3):
            collect(backend_url, older_than=0, delete=True)

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(job, i) for i in range(2) for job in (write, free)]
        for job in jobs:
            job.result(120)
    finish(backend_url)
    whole(backend_url, SMALL, undisturbed)


def test_a_partial_file_of_a_living_writer_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is being written while gc runs gets its name, even with the age limit off."""
    write_known(tmp_path / "s", SMALL, buckets=[0])
    real, seen = os.link, []

    def link(source: Path, target: Path) -> None:
        seen.append(collect(tmp_path / "s", older_than=0, delete=True).garbage)
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    storage = open_storage(tmp_path / "s")
    assert storage.create("tokens/x", b"data")
    assert seen == [[]]
    assert storage.get("tokens/x") == b"data"


def test_the_command(tmp_path: Path) -> None:
    url = write_known(tmp_path / "s", SMALL, buckets=[0]).url
    dead = die_in(url, 1)
    (tmp_path / "s" / "evil\x1b[2J").write_bytes(b"mine")
    done = run_actstore("gc", url, "--older-than", "0", "--json", str(tmp_path / "g.json"))
    assert "3 objects, 2,100 bytes to free; do it with --delete" in done.stdout
    assert "unknown, left alone: evil\\x1b[2J (4 bytes)" in done.stdout
    figures = json.loads((tmp_path / "g.json").read_text())
    assert {g["key"] for g in figures["garbage"]} == set(dead)
    assert (figures["bytes"], figures["deleted"], figures["unknown"]) == (2100, False, {"evil\x1b[2J": 4})
    assert "left alone: bucket 1 was worked on 0.00 hours ago\n" in run_actstore("gc", url, "--delete").stdout
    assert "3 objects, 2,100 bytes freed" in run_actstore("gc", url, "--older-than", "0", "--delete").stdout
    assert "nothing to free" in run_actstore("gc", url, "--older-than", "0", "--delete").stdout
    assert "a number of hours" in run_actstore("gc", url, "--older-than", "-1", code=2).stderr
