"""The one family of errors.

Every message says what was found, what was expected and what to do. Bad arguments raise `ValueError` (the command
line exits with 2); everything the world did wrong raises an `ActstoreError` (exit 1).
"""

import warnings


class ActstoreError(Exception):
    """Anything actstore refuses or could not do."""


class ActstoreWarning(UserWarning):
    """What was done, and yet is worth knowing: clipped values, rows with NaN, an unfinished store."""


def warn(message: str) -> None:
    """Say it in a warning that a program can turn off or into an error; `message` is one line."""
    warnings.warn(f"actstore: {message}", ActstoreWarning, stacklevel=3)


def brief(error: object) -> str:
    """What another library says of untrusted bytes, as one short line: it may quote them, control characters too."""
    return "".join(c if c.isprintable() else " " for c in str(error)[:200])


class StoreError(ActstoreError):
    """A store, or an object in it, is missing, malformed or unreachable."""


class MissingError(StoreError):
    """An object is not there."""


class IntegrityError(StoreError):
    """Stored bytes are not the bytes that were written."""


class EncodingError(ActstoreError):
    """A value can't be stored in the encoding that was asked for."""


class MismatchError(ActstoreError):
    """The target exists already and was made with other settings."""


class TokensError(ActstoreError):
    """A text source, tokenizer or token table can't be used."""


class CaptureError(ActstoreError):
    """The model can't be loaded or does not fit what was asked of it."""


class StreamError(ActstoreError):
    """A reading plan can't be carried out or resumed."""


def mismatch(what: str, found: dict[str, object], expected: dict[str, object], remedy: str) -> MismatchError:
    """A `MismatchError` that lists exactly the fields that differ."""
    both = found.keys() & expected.keys()
    keys = [k for k in sorted(found.keys() | expected.keys()) if k not in both or found[k] != expected[k]]

    def field(k: str) -> str:
        if k not in expected:
            return f"{k} is {found[k]!r}, not asked for"
        return f"{k} is {repr(found[k]) if k in found else 'absent'}, asked for {expected[k]!r}"

    return MismatchError(f"{what} differs: {'; '.join(map(field, keys))}. {remedy}")
