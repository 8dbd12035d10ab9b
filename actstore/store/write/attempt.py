"""One attempt at writing one bucket: what makes any number of writers, live, dead or asleep, safe side by side.

An attempt begins by putting its intent at the bucket's commit key, puts shards create-only or over exactly the leftover
that was there while the intent was still its own, and commits by replacing its intent with the record. Whoever replaces
somebody's intent by his own has taken the bucket over (`docs/decisions/0005-commit.md` has the argument).
"""

import secrets

from actstore.errors import MissingError, StoreError
from actstore.store.format import record
from actstore.store.format.spec import METADATA_LIMIT, StoreSpec
from actstore.store.storage import Buffers, Storage

SWAPS = 20
"""Tries at one conditional put before giving up: each means that another attempt was at the same object."""


class OvertakenError(Exception):
    """Another attempt has taken the bucket over."""


class Attempt:
    """One attempt at one bucket, from its intent to its commit."""

    def __init__(self, storage: Storage, bucket: int) -> None:
        """Made by `begin`."""
        self.id = secrets.token_hex(8)
        self._storage, self._key = storage, record.commit_key(bucket)
        self._intent = record.intent_bytes(bucket, self.id)
        self._version = ""

    @classmethod
    def begin(cls, storage: Storage, spec: StoreSpec, bucket: int, *, condemned: bool = False) -> "Attempt | None":
        """Announce an attempt, taking over from whoever was at it; None if the bucket is committed.

        A `condemned` bucket is taken over whatever its commit object says.
        """
        attempt = cls(storage, bucket)
        for _ in range(SWAPS):
            if storage.create(attempt._key, attempt._intent):
                return attempt if attempt._hold() else None
            seen = storage.stat(attempt._key)
            if seen is None:
                continue
            if not condemned:
                present = record.from_bytes(storage.get(attempt._key, METADATA_LIMIT), spec, bucket)
                if isinstance(present, record.CommitRecord):
                    return None
            if storage.replace(attempt._key, attempt._intent, seen.version):
                return attempt if attempt._hold() else None
        raise StoreError(f"{storage.url}/{attempt._key} changed {SWAPS} times; too many attempts at one bucket")

    def _hold(self) -> bool:
        """Learn the version of the own intent; False if it was taken over already."""
        seen = self._storage.stat(self._key)
        self._version = seen.version if seen else ""
        return self._mine()

    def _mine(self) -> bool:
        return self._present() == self._intent

    def _present(self) -> bytes | None:
        try:
            return self._storage.get(self._key, METADATA_LIMIT)
        except MissingError:
            return None

    def put(self, key: str, data: Buffers) -> None:
        """Store a shard; `OvertakenError` if the bucket is somebody else's by now."""
        for _ in range(SWAPS):
            if self._storage.create(key, data):
                return
            # in this order: what was there while the intent was ours is what may be replaced
            seen = self._storage.stat(key)
            if not self._mine():
                raise OvertakenError
            if seen and self._storage.replace(key, data, seen.version):
                return
        raise StoreError(f"{self._storage.url}/{key} changed {SWAPS} times while it was being written; try again")

    def commit(self, data: bytes) -> bool:
        """Replace the intent with the record; False if the bucket was taken over."""
        return self._storage.replace(self._key, data, self._version) or self._present() == data
