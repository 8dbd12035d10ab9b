"""How much memory a file may claim: some for nothing, and beyond that only in proportion to the bytes that it has."""

MAX_DOCUMENT_BYTES = 1 << 27
"""Of one document, which is encoded whole."""
_FREE_BYTES, _RATIO = 1 << 26, 256
_FREE_DOCUMENT_BYTES, _DOCUMENT_RATIO = 1 << 24, 64


def decoded_limit(stored: int) -> int:
    """Most bytes that a part of a file of `stored` bytes may decode to at once."""
    return _FREE_BYTES + _RATIO * stored


def document_limit(stored: int) -> int:
    """Most bytes of a document in a compressed file of `stored` bytes; text hardly ever compresses to a 64th."""
    return min(MAX_DOCUMENT_BYTES, _FREE_DOCUMENT_BYTES + _DOCUMENT_RATIO * stored)
