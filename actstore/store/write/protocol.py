"""The commit protocol: what makes any number of writers of a bucket, alive, dead or asleep, safe side by side.

States of a bucket, by its commit object and who moves it on:

    absent     --begin--> intent of A                                   an attempt announces itself
    intent of A --begin--> intent of B                                  B takes the bucket over; A can't commit any more
    intent of A --commit--> record of A                                 the bucket exists
    record     --take_over--> intent of B                               a repair writes a damaged bucket again

A crash leaves the state as it is: an intent, and shards that no reader looks at. While the intent is its own, an
attempt puts each shard create-only, or over exactly the version that it saw before it checked the intent. So once B
has put a shard, no put of A can replace it, however late it arrives (`docs/decisions/0005-commit.md` has the argument,
`tests/store/test_protocol.py` searches all interleavings).

Each step below is a generator of storage requests, and knows no storage: `run` sends them to one, the test to a model.
"""

import secrets
from collections.abc import Generator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, TypeVar

from actstore.errors import MissingError, StoreError
from actstore.store.format import record
from actstore.store.format.sealed import METADATA_LIMIT
from actstore.store.storage.base import Buffers, Storage

SWAPS = 20
"""Tries at one conditional put before giving up: each means that another attempt was at the same object."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Request:
    """One request to a storage. Answers: create, replace -> bool; version -> str | None; get -> bytes | None."""

    kind: Literal["create", "replace", "version", "get"]
    key: str
    data: Buffers = b""
    version: str = ""


Steps = Generator[Request, Any, T]


class NotWritten(Enum):
    """Why an attempt did not commit its bucket."""

    ALREADY_COMMITTED = "already committed"
    """Another attempt had committed it; there is nothing left to do."""
    TAKEN_OVER = "taken over"
    """Another attempt is writing it, or died after it had taken the bucket over; the rows are not stored yet."""


class ContendedError(Exception):
    """An object changed at every try."""


@dataclass(frozen=True)
class Attempt:
    """An attempt that has begun: its intent is at the bucket's commit key."""

    bucket: int
    id: str
    version: str
    """Of the commit object while the attempt holds the bucket."""
    content: bytes
    """Of the commit object meanwhile: the attempt's intent."""

    @property
    def key(self) -> str:
        """Name of the commit object."""
        return record.commit_key(self.bucket)


def new_id(prefix: str = "") -> str:
    """A random id of 16 characters for an attempt."""
    return (prefix + secrets.token_hex(8))[:16]


def begin(bucket: int, attempt_id: str) -> Steps[Attempt | NotWritten]:
    """Announce an attempt, taking over from another one that has not committed."""
    key, intent = record.commit_key(bucket), record.intent_bytes(bucket, attempt_id)
    for _ in range(SWAPS):
        if (yield Request("create", key, intent)):
            return (yield from _hold(bucket, attempt_id))
        version = yield Request("version", key)
        present = yield Request("get", key)
        if version is None or present is None:
            continue
        if len(present) > record.INTENT_BYTES:
            return NotWritten.ALREADY_COMMITTED
        if (yield Request("replace", key, intent, version)):
            return (yield from _hold(bucket, attempt_id))
    raise ContendedError(key)


def take_over(bucket: int, attempt_id: str, version: str | None) -> Steps[Attempt | NotWritten]:
    """Announce an attempt only if the commit object still has this version (None: is still missing).

    gc takes over what it found old, and repair takes over the very record that it found damaged.
    """
    key, intent = record.commit_key(bucket), record.intent_bytes(bucket, attempt_id)
    request = Request("create", key, intent) if version is None else Request("replace", key, intent, version)
    return (yield from _hold(bucket, attempt_id)) if (yield request) else NotWritten.TAKEN_OVER


def _hold(bucket: int, attempt_id: str) -> Steps[Attempt | NotWritten]:
    """Learn the version of the own intent. In this order: what `get` returns is at least as new as the version."""
    version = yield Request("version", record.commit_key(bucket))
    made = Attempt(bucket, attempt_id, version or "", record.intent_bytes(bucket, attempt_id))
    return made if (yield from holds(made)) else NotWritten.TAKEN_OVER


def holds(attempt: Attempt) -> Steps[bool]:
    """Whether the bucket is still this attempt's."""
    return (yield Request("get", attempt.key)) == attempt.content


def put(attempt: Attempt, key: str, data: Buffers) -> Steps[bool]:
    """Store a shard; False if the bucket was taken over."""
    for _ in range(SWAPS):
        if (yield Request("create", key, data)):
            return True
        replaced = yield from put_over(attempt, key, data)
        if replaced is not None:
            return replaced
    raise ContendedError(key)


def put_over(attempt: Attempt, key: str, data: Buffers) -> Steps[bool | None]:
    """Replace the object that is there; False if the bucket was taken over, None if the object changed meanwhile.

    Read the version first, then check that the bucket is still ours: only an object that was there while we held the
    bucket may be replaced.
    """
    version = yield Request("version", key)
    if not (yield from holds(attempt)):
        return False
    return True if version is not None and (yield Request("replace", key, data, version)) else None


def commit(attempt: Attempt, data: bytes) -> Steps[bool]:
    """Replace the intent by the record; False if the bucket was taken over."""
    if (yield Request("replace", attempt.key, data, attempt.version)):
        return True
    return (yield Request("get", attempt.key)) == data


def run(storage: Storage, steps: Steps[T]) -> T:
    """Carry steps out on a storage."""
    answer: Any = None
    try:
        while True:
            answer = _send(storage, steps.send(answer))
    except StopIteration as e:
        return e.value
    except ContendedError as e:
        raise StoreError(f"{storage.url}/{e} changed {SWAPS} times while it was being written; try again") from e


def _send(storage: Storage, request: Request) -> Any:
    key = request.key
    if request.kind == "create":
        return storage.create(key, request.data)
    if request.kind == "replace":
        return storage.replace(key, request.data, request.version)
    if request.kind == "version":
        found = storage.stat(key)
        return found.version if found else None
    try:
        return storage.get(key, METADATA_LIMIT)
    except MissingError:
        return None
