"""Sealed objects: JSON, or any bytes, that hold the crc32c of themselves, and are read as untrusted.

A sealed object has the field `"object_crc32c": "xxxxxxxx"`: the crc32c of the object as it is with zeros in the place
of those digits. `decode` checks the seal, bounds what the JSON may unpack to, and parses it into a typed structure.
"""

import json
import re
from typing import Any, TypeVar

import msgspec

from actstore.errors import IntegrityError, StoreError
from actstore.store.format.codec import crc32c

T = TypeVar("T")

SEAL = "object_crc32c"
UNSEALED = "00000000"
MAX_VALUES = 1 << 22
"""Values of a JSON object: bounds the memory of the parsed one, which takes 20 to 50 times its bytes."""
METADATA_LIMIT = 1 << 28
"""Bytes of a metadata object that a reader fetches."""


def _seal(value: str) -> bytes:
    return f'"{SEAL}": "{value}"'.encode()


_SEALED = re.compile(rb'"object_crc32c": "([0-9a-f]{8})"')


class Sealed(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A sealed JSON object; subclasses add its other fields."""

    object_crc32c: str


def dump(data: Any) -> bytes:
    """JSON as actstore writes it: sorted keys, so that equal content is equal bytes; sealed where it has the field."""
    return seal(json.dumps(data, indent=1, sort_keys=True, allow_nan=False).encode())


def seal(data: bytes) -> bytes:
    """Put the crc32c of the object in the place of its first UNSEALED field, if it has one."""
    return data.replace(_seal(UNSEALED), _seal(f"{crc32c(data):08x}"), 1)


def check_seal(data: bytes, where: str) -> bool:
    """Whether the object is sealed; `IntegrityError` if a byte of it changed since."""
    found = _SEALED.search(data)
    if not found:
        return False
    crc = crc32c(UNSEALED.encode(), crc32c(memoryview(data)[: found.start(1)]))
    crc = crc32c(memoryview(data)[found.end(1) :], crc)
    if f"{crc:08x}" != found[1].decode():
        raise IntegrityError(f"{where}: does not match its own {SEAL}; the object is damaged")
    return True


def decode(data: bytes, kind: type[T], where: str) -> T:
    """Parse sealed JSON into `kind`.

    Raises `IntegrityError` if a byte changed or the seal is missing, `StoreError` naming the field that does not fit.
    """
    sealed = check_seal(data, where)
    parsed = parse(data, kind, where)
    if not sealed:
        raise IntegrityError(f"{where}: has no readable {SEAL}; it is damaged, or not actstore's")
    return parsed


def parse(data: bytes, kind: type[T], where: str) -> T:
    """Parse JSON into `kind`; `StoreError` names the field that does not fit, or a bound that is passed."""
    values = sum(map(data.count, (b",", b"[", b"{")))
    if values > MAX_VALUES:
        raise StoreError(f"{where}: has {values} values, at most {MAX_VALUES} are allowed")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        raise StoreError(f"{where}: {str(e)[:200]}") from e
