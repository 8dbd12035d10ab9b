"""The commit protocol, searched: every interleaving of several writers, crashes included, on a model of a storage.

The model answers single requests as the three kinds of storage do, which differ in what a version is: a number that
counts writes (GCS), the content itself (S3, whose ETag is a hash of it), an inode that is used again and a time (a
directory). A refused put of content that is there already counts as done, as `Storage` promises. A process that is not
scheduled any more has crashed, and one that is scheduled late is a zombie: the search visits every state in which each
process has made any number of its requests.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from conftest import SPEC

from actstore.store.format import record
from actstore.store.format.spec import GROUP_KEY, group_metadata, metadata_objects, spec_from_bytes
from actstore.store.write import extend, protocol
from actstore.store.write.extend import swap_metadata, swap_spec
from actstore.store.write.protocol import Attempt, NotWritten, Request

KEY = record.commit_key(0)
SHARDS = ("a/c/0/0", "b/c/0/0")
Process = Callable[[], Generator[Request, Any, Any]]


@dataclass(frozen=True)
class Object:
    content: bytes
    inode: int
    written: int


@dataclass(frozen=True)
class Model:
    """A storage at one moment."""

    kind: str
    objects: tuple[tuple[str, Object], ...] = ()
    clock: int = 0

    def version(self, found: Object | None) -> str | None:
        if found is None:
            return None
        return {
            "generation": str(found.written),
            "etag": found.content.hex(),
            "inode": f"{found.inode}-{found.written}-{len(found.content)}",
        }[self.kind]

    def answer(self, r: Request) -> tuple["Model", Any]:
        """What the request returns, and the storage afterwards."""
        objects = dict(self.objects)
        found = objects.get(r.key)
        if r.kind == "get":
            return self, found.content if found else None
        if r.kind == "version":
            return self, self.version(found)
        assert isinstance(r.data, bytes)
        if found and r.data == found.content:
            return self, True
        if found if r.kind == "create" else self.version(found) != r.version:
            return self, False
        used = {o.inode for o in objects.values()}
        inode = next(i for i in range(len(used) + 1) if i not in used)
        clock = self.clock + 1 if self.kind != "etag" else 0
        objects[r.key] = Object(r.data, inode, clock)
        return Model(self.kind, tuple(sorted(objects.items(), key=lambda item: item[0])), clock), True

    def content(self, key: str) -> bytes | None:
        found = dict(self.objects).get(key)
        return found.content if found else None


def search(start: Model, processes: Sequence[Process], check: Callable[[Model, tuple[Any, ...]], None]) -> int:
    """Visit every reachable state; `check` gets each with the results of the processes, `...` of unfinished ones.

    A state is the storage and, for each process, its result or where it is in its code with which values.
    """
    begun = tuple((_after(process, ()), ()) for process in processes)
    pending: list[tuple[Model, tuple[tuple[Any, Any], ...]]] = [(start, begun)]
    seen = set[Any]()
    while pending:
        model, moves = pending.pop()
        state = model, tuple(where for (_, where), _ in moves)
        if state in seen:
            continue
        seen.add(state)
        check(model, tuple(... if isinstance(m, Request) else m for (m, _), _ in moves))
        for i, ((move, _), given) in enumerate(moves):
            if isinstance(move, Request):
                after, answer = model.answer(move)
                answers = (*given, answer)
                pending.append((after, (*moves[:i], (_after(processes[i], answers), answers), *moves[i + 1 :])))
    return len(seen)


def _after(process: Process, answers: Sequence[Any]) -> tuple[Any, Any]:
    """The request that a process makes after these answers, or its result; and all that its future depends on."""
    steps = process()
    try:
        request = next(steps)
        for answer in answers:
            request = steps.send(answer)
    except StopIteration as e:
        return e.value, ("result", e.value)
    except protocol.ContendedError:
        return "gave up", ("result", "gave up")
    where, inner = [], steps
    while inner is not None:
        frame = inner.gi_frame
        where.append((frame.f_lasti, repr(sorted(frame.f_locals.items(), key=lambda item: item[0]))))
        inner = inner.gi_yieldfrom  # type: ignore[assignment]
    return request, tuple(where)


def data_of(attempt: str, rows: str, *, marked: bool) -> bytes:
    """A shard: the same rows give the same bytes, but for the attempt's mark."""
    return f"{rows} {attempt if marked else ''}".encode()


def record_of(attempt: str) -> bytes:
    return f"{attempt} has committed".encode().ljust(record.INTENT_BYTES + 1)


def writer(attempt: str, rows: str, *, marked: bool = True, shards: Sequence[str] = SHARDS) -> Process:
    def steps() -> Generator[Request, Any, Any]:
        held = yield from protocol.begin(0, attempt)
        return (yield from finish(held, rows, marked=marked, shards=shards))

    return steps


def finish(held: Attempt | NotWritten, rows: str, *, marked: bool, shards: Sequence[str]) -> Any:
    if isinstance(held, NotWritten):
        return held
    for key in shards:
        if not (yield from protocol.put(held, key, data_of(held.id, rows, marked=marked))):
            return NotWritten.TAKEN_OVER
    done = yield from protocol.commit(held, record_of(held.id))
    return held.id if done else NotWritten.TAKEN_OVER


def collector(attempt: str, shards: Sequence[str] = SHARDS) -> Process:
    """gc, which finds the bucket old enough whatever is there."""

    def steps() -> Generator[Request, Any, Any]:
        version = yield Request("version", KEY)
        present = yield Request("get", KEY)
        if present is not None and len(present) > record.INTENT_BYTES:
            return "committed"
        held = yield from protocol.take_over(0, attempt, version)
        if isinstance(held, NotWritten):
            return held
        for key in shards:
            if not (yield from protocol.put_over(held, key, b"empty " + attempt.encode())):
                return NotWritten.TAKEN_OVER
        return "emptied"

    return steps


def repairer(attempt: str, rows: str, shards: Sequence[str] = SHARDS) -> Process:
    """A repair that has found the committed bucket damaged."""

    def steps() -> Generator[Request, Any, Any]:
        version = yield Request("version", KEY)
        present = yield Request("get", KEY)
        if present is None or present != record_of("damaged.........") or version is None:
            return "not damaged"
        held = yield from protocol.take_over(0, attempt, version)
        return (yield from finish(held, rows, marked=True, shards=shards))

    return steps


A, B, C, DEAD = (c * 16 for c in "abcz")


def whole(model: Model, results: tuple[Any, ...], *, rows: dict[str, str], shards: Sequence[str] = SHARDS) -> None:
    """A committed bucket holds the shards of the attempt that committed, and of no other; nobody else says it did."""
    present = model.content(KEY)
    committed = present.split()[0].decode() if present and len(present) > record.INTENT_BYTES else None
    if committed in rows:
        for key in shards:
            content = model.content(key)
            assert content is not None
            assert content.split()[0].decode() == rows[committed], (committed, key, content)
            if content.split()[1:]:
                assert content.split()[1].decode() == committed, (committed, key, content)
    assert set(results) & set(rows) <= {committed}


@pytest.fixture(autouse=True)
def few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two swaps before giving up instead of twenty: each try more is another copy of the same states."""
    monkeypatch.setattr(protocol, "SWAPS", 2)
    monkeypatch.setattr(extend, "SWAPS", 2)


def crashed(kind: str, process: Process) -> list[Model]:
    """The storage after each number of requests that a process makes before it dies."""
    model, answers, found = Model(kind), [], list[Model]()
    while isinstance(request := _after(process, answers)[0], Request):
        found.append(model)
        model, answer = model.answer(request)
        answers.append(answer)
    return found


KINDS = ("generation", "etag", "inode")


@pytest.mark.parametrize("kind", KINDS)
def test_two_attempts_and_the_leftovers_of_a_third(kind: str) -> None:
    """The dead one and B are the same kind of machine, so their rows are equal bit for bit; A's differ."""
    rows = {A: "other", B: "same"}
    states = sum(
        search(start, (writer(A, "other"), writer(B, "same")), lambda m, r: whole(m, r, rows=rows))
        for start in crashed(kind, writer(DEAD, "same"))
    )
    assert states > 1000


def test_without_the_mark_a_content_hash_is_no_version() -> None:
    """Why shards carry the attempt's mark: A's late put replaces B's committed shard, equal to the one it saw."""
    with pytest.raises(AssertionError):
        for start in crashed("etag", writer(DEAD, "same", marked=False)):
            processes = (writer(A, "other", marked=False), writer(B, "same", marked=False))
            search(start, processes, lambda m, r: whole(m, r, rows={A: "other", B: "same"}))


@pytest.mark.parametrize("kind", ["etag", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS)])
def test_two_attempts_and_gc(kind: str, request: pytest.FixtureRequest) -> None:
    """In the fast set from one state only: a dead attempt has put its shard."""
    one, rows = SHARDS[:1], {A: "other", B: "same"}
    gc = collector("gc-0123456789abc", one)
    starts = crashed(kind, writer(DEAD, "same", shards=one))
    for start in starts if request.node.get_closest_marker("slow") else starts[-1:]:
        processes = (writer(A, "other", shards=one), writer(B, "same", shards=one), gc)
        search(start, processes, lambda m, r: whole(m, r, rows=rows, shards=one))


@pytest.mark.parametrize("kind", ["etag", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[::2])])
def test_two_repairs_of_one_bucket_and_an_attempt(kind: str) -> None:
    """Of repairs that found the same damage one writes the bucket again; the others see that it changed."""
    one, rows = SHARDS[:1], {A: "x", B: "x", C: "y"}
    model, _ = Model(kind).answer(Request("create", KEY, record_of("damaged.........")))
    model, _ = model.answer(Request("create", one[0], b"damaged"))
    finished: list[tuple[Any, ...]] = []

    def check(m: Model, results: tuple[Any, ...]) -> None:
        whole(m, results, rows=rows, shards=one)
        if ... not in results:
            finished.append(results)

    search(model, (repairer(A, "x", one), repairer(B, "x", one), writer(C, "y", shards=one)), check)
    assert finished
    assert all(len(set(results) & set(rows)) == 1 for results in finished)


@pytest.mark.parametrize("kind", KINDS)
def test_two_extensions_leave_the_metadata_of_the_last(kind: str) -> None:
    """Each changes the group and then an array's metadata; a plain put of the metadata would let the first win."""
    key = "resid_post.3/zarr.json"
    model, _ = Model(kind).answer(Request("create", GROUP_KEY, group_metadata(SPEC)))
    model, _ = model.answer(Request("create", key, metadata_objects(SPEC)[key]))

    def extender(rows: int) -> Process:
        def steps() -> Generator[Request, Any, Any]:
            yield from swap_spec(lambda data: replace(spec_from_bytes(data, "here"), rows=rows))
            yield from swap_metadata(key, "here")
            return "extended"

        return steps

    def check(m: Model, results: tuple[Any, ...]) -> None:
        if ... not in results:
            spec = spec_from_bytes(m.content(GROUP_KEY) or b"", "here")
            assert m.content(key) == metadata_objects(spec)[key]

    assert search(model, (extender(2000), extender(3000)), check) > 50
