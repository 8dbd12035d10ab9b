"""Which token table each bucket's rows come from: the store's first one, or that of an extension.

Sequence numbers go on from table to table, so `sequence` and `position` lead back to one token in all of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actstore.store.format.spec import StoreSpec
from actstore.store.storage import Storage
from actstore.store.write.extend import extensions
from actstore.tokens import Span, TokenTable, open_tokens, span_of


@dataclass(frozen=True)
class Work:
    """One bucket to capture; small enough to travel."""

    bucket: int
    segment: int
    """Index of its segment."""
    span: Span
    keys: tuple[str, ...] = ()
    """Damaged objects of a committed bucket that is captured again."""
    version: str | None = None
    """Of that bucket's commit object when it was found damaged; None if it is missing, or nothing is repaired."""


@dataclass(frozen=True)
class Segment:
    """A run of buckets made of one token table."""

    first_bucket: int
    stop_bucket: int
    first_sequence: int
    """Added to the table's own sequence numbers."""
    tokens: TokenTable


def segment_prefix(index: int) -> str:
    """Where the token table of a segment lies in the store."""
    return f"tokens/extension-{index}/" if index else "tokens/"


def open_segments(storage: Storage, spec: StoreSpec) -> list[Segment]:
    """All segments of a store, in order."""
    firsts = [0, *(e["first_bucket"] for e in extensions(spec))]
    found: list[Segment] = []
    before = 0
    for i, (first, stop) in enumerate(zip(firsts, [*firsts[1:], spec.buckets], strict=True)):
        table = open_tokens(storage, segment_prefix(i))
        found.append(Segment(first, stop, before, table))
        before += table.sequences
    return found


def work_of(
    spec: StoreSpec, index: int, segment: Segment, starts: NDArray[np.int64], buckets: Iterable[int]
) -> list[Work]:
    """What these buckets of a segment take, given the `row_starts` of its token table."""
    origin = segment.first_bucket * spec.bucket_rows
    ranges = [(b, *spec.bucket_range(b)) for b in buckets]
    return [Work(b, index, span_of(starts, first - origin, stop - origin)) for b, first, stop in ranges]
