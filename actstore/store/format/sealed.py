"""Sealed objects: JSON that holds the crc32c of itself, and is read as untrusted.

A sealed object has the field `"object_crc32c": "xxxxxxxx"`: the crc32c of the object as it is with zeros in the place
of those digits. `decode` checks the seal, bounds what the JSON may unpack to, and parses it into a typed structure,
whose arrays and checksums are text in JSON.
"""

import base64
import json
import re
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from actstore.errors import IntegrityError, StoreError, brief
from actstore.store.format.codec import Crc, crc32c

T = TypeVar("T")

SEAL = "object_crc32c"
UNSEALED = "00000000"
MAX_VALUES = 1 << 22
"""Values of a JSON object: bounds the memory of the parsed one, which takes 20 to 50 times its bytes."""
METADATA_LIMIT = 1 << 28
"""Bytes of a metadata object that a reader fetches."""
MAX_NUMBER = 2.0**400
"""No sum of squares of float32 values reaches it; below it, adding never overflows."""

_SEALED = re.compile(rb'"object_crc32c": "([0-9a-f]{8})"')
_HEX = re.compile(r"[0-9a-f]*")

Crcs = NDArray[np.uint32]
"""Checksums of many things [things]; JSON has 8 hexadecimal digits for each, in one string."""
Vectors = NDArray[np.float64]
"""Numbers below `MAX_NUMBER`; JSON has base64 of little-endian float64."""


class HexFloat(float):
    """A finite number that is not negative; JSON has it as a C99 hexadecimal one."""


class Sealed(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A sealed JSON object; subclasses add its other fields."""

    object_crc32c: str = UNSEALED


def dump(data: "dict[str, Any] | Sealed") -> bytes:
    """JSON as actstore writes it: sorted keys, so that equal content is equal bytes; sealed where it has the field."""
    if isinstance(data, Sealed):
        data = {**msgspec.to_builtins(data, enc_hook=to_json), SEAL: UNSEALED}
    return seal(json.dumps(data, indent=1, sort_keys=True, allow_nan=False).encode())


def seal(data: bytes) -> bytes:
    """Put the crc32c of the object in the place of its first UNSEALED field, if it has one."""
    unsealed, sealed = (f'"{SEAL}": "{value}"'.encode() for value in (UNSEALED, f"{crc32c(data):08x}"))
    return data.replace(unsealed, sealed, 1)


def decode(data: bytes, kind: type[T], where: str) -> T:
    """Parse sealed JSON into `kind`.

    Raises `IntegrityError` if a byte changed or the seal is missing, `StoreError` naming the field that does not fit.
    """
    found = _SEALED.search(data)
    if found:
        crc = crc32c(UNSEALED.encode(), crc32c(memoryview(data)[: found.start(1)]))
        if crc32c(memoryview(data)[found.end(1) :], crc) != int(found[1], 16):
            raise IntegrityError(f"{where}: does not match its own {SEAL}; the object is damaged")
    parsed = parse(data, kind, where)
    if not found:
        raise IntegrityError(f"{where}: has no readable {SEAL}; it is damaged, or not actstore's")
    return parsed


def parse(data: bytes, kind: type[T], where: str) -> T:
    """Parse JSON into `kind`; `StoreError` names the field that does not fit, or a bound that is passed."""
    values = sum(map(data.count, (b",", b"[", b"{")))
    if values > MAX_VALUES:
        raise StoreError(f"{where}: has {values} values, at most {MAX_VALUES} are allowed")
    try:
        return msgspec.json.decode(data, type=kind, dec_hook=from_json)
    except (ValueError, RecursionError) as e:
        raise StoreError(f"{where}: {brief(e)}") from e


def to_json(value: Any) -> Any:
    """What stands in JSON for a value that msgspec does not know."""
    if isinstance(value, Crc):
        return f"{value:08x}"
    if isinstance(value, HexFloat):
        return value.hex()
    if not isinstance(value, np.ndarray):
        return value.to_json()
    if value.dtype == np.uint32:
        return value.astype(">u4").tobytes().hex()
    return base64.b64encode(value.astype("<f8").tobytes()).decode()


def from_json(kind: Any, value: Any) -> Any:
    """The value of such a type that stands in JSON; `ValueError` if there is none."""
    if hasattr(kind, "from_json"):
        return kind.from_json(value)
    if not isinstance(value, str):
        raise ValueError(f"found {str(value)[:60]}, expected a string")
    if kind is HexFloat:
        try:
            number = float.fromhex(value)
        except OverflowError:
            number = np.inf
        if not 0 <= number < np.inf:
            raise ValueError(f"found {number}, expected a finite number that is not negative")
        return HexFloat(number)
    if kind == Vectors:
        numbers = np.frombuffer(base64.b64decode(value, validate=True), "<f8")
        if not (np.abs(numbers) < MAX_NUMBER).all():
            raise ValueError(f"expected numbers below {MAX_NUMBER}")
        return numbers
    if not _HEX.fullmatch(value) or len(value) % 8 or (kind is Crc and len(value) != 8):
        raise ValueError(f"found {value[:60]!r}, expected crc32c of 8 hexadecimal digits each")
    return Crc(value, 16) if kind is Crc else np.frombuffer(bytes.fromhex(value), ">u4").astype(np.uint32)
