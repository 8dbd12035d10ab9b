"""Whole sequences of a store, found by the `sequence` of its rows.

Captured stores number their rows by (sequence, position). So the rows of one sequence follow each other, and a search
over the first and last row of O(log buckets) buckets finds them. Of stores from elsewhere the whole column is read
once, 4 bytes a row before compression, because nothing less shows that it ascends. A bucket stores its rows in permuted
order: a sequence of a thousand rows lies in most chunks of its bucket. One sequence therefore costs about as much as
its bucket, and `Sequences` reads each bucket once instead.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actstore import keyed
from actstore.errors import StoreError
from actstore.store.read.rows import read_rows, site_names, whole_numbers
from actstore.store.read.store import Store

Pool = Literal["last", "mean"]
Sites = str | Sequence[str] | None
Arrays = dict[str, NDArray[Any]]
_SCAN_ROWS = 1 << 22
"""Rows whose sequences are read at a time."""


class SequenceIndex:
    """Which rows belong to which sequence. A bucket is named by its place, its row in the store's index."""

    def __init__(self, store: Store) -> None:
        """`StoreError` unless sequences ascend with row numbers; of captured stores only what is read is checked."""
        self.store, self.places = store, range(len(store.index.buckets))
        self._ends: dict[int, tuple[int, int]] = {}
        if not self.places:
            raise StoreError(f"{store.url} has no committed bucket yet; let a capture finish one")
        tokens = store.provenance.get("tokens")
        if isinstance(tokens, dict) and "fingerprint" in tokens:
            self.ends(0)
            return
        step = max(1, _SCAN_ROWS // store.spec.bucket_rows)
        for start in self.places[::step]:
            self._columns(self.places[start : start + step])

    def row_range(self, place: int) -> tuple[int, int]:
        """First row and the row after the last of a bucket."""
        return self.store.spec.bucket_range(int(self.store.index.buckets[place]))

    def ends(self, place: int) -> tuple[int, int]:
        """Sequences of the first and of the last row of a bucket."""
        if place not in self._ends:
            first, stop = self.row_range(place)
            self._note(place, read_rows(self.store, np.array([first, stop - 1]), ["sequence"])["sequence"])
        return self._ends[place]

    def _columns(self, places: range) -> list[NDArray[Any]]:
        """The sequence of each row of some buckets."""
        rows = [np.arange(*self.row_range(place)) for place in places]
        column = read_rows(self.store, np.concatenate(rows), ["sequence"])["sequence"]
        columns = np.split(column, np.cumsum([len(r) for r in rows])[:-1])
        for place, sequences in zip(places, columns, strict=True):
            self._note(place, sequences)
        return columns

    def _note(self, place: int, sequences: NDArray[Any]) -> None:
        """Keep the ends of a bucket, once it is certain that its sequences ascend, from those of its neighbours."""
        before, after = self._ends.get(place - 1, (0, 0))[1], self._ends.get(place + 1, (1 << 31, 0))[0]
        line = np.concatenate([[before], sequences, [after]])
        falls = line[1:] < line[:-1]
        if falls.any():
            i = int(falls.argmax())
            what = f"sequence {line[i + 1]} comes after {line[i]}" if line[i + 1] >= 0 else "rows have no sequence (-1)"
            raise StoreError(
                f"{self.store.url}: can't be read by sequence: in bucket {self.store.index.buckets[place]} {what}, "
                "expected numbers that ascend with the rows, as capture writes them; read such rows with store.take"
            )
        self._ends[place] = int(line[1]), int(line[-2])

    def pieces(self, place: int) -> dict[int, range]:
        """The rows of each sequence in a bucket."""
        column, first = self._columns(range(place, place + 1))[0], self.row_range(place)[0]
        starts = [0, *(np.flatnonzero(np.diff(column)) + 1).tolist(), len(column)]
        return {int(column[a]): range(first + a, first + b) for a, b in pairwise(starts)}

    def _goes_on(self, place: int) -> bool:
        """Whether the last sequence of a bucket goes on in the next one."""
        buckets = self.store.index.buckets
        if place + 1 not in self.places or buckets[place + 1] != buckets[place] + 1:
            return False
        return self.ends(place)[1] == self.ends(place + 1)[0]

    def span(self, place: int, number: int) -> range:
        """The places of the buckets that a sequence at `place` reaches over."""
        low = high = place
        while low and self.ends(low)[0] == number and self._goes_on(low - 1):
            low -= 1
        while self.ends(high)[1] == number and self._goes_on(high):
            high += 1
        return range(low, high + 1)

    def cut(self, place: int) -> set[int]:
        """Sequences at the ends of a bucket that may go on in a neighbour that is not committed."""
        bucket, stop = int(self.store.index.buckets[place]), self.store.spec.buckets
        beside = enumerate((bucket - 1, bucket + 1))
        return {self.ends(place)[i] for i, b in beside if 0 <= b < stop and self.store.index.place(b) is None}

    def rows(self, number: int) -> NDArray[np.int64]:
        """Rows of a sequence, ascending."""
        place = bisect_left(self.places, number, key=lambda p: self.ends(p)[1])
        span = self.span(min(place, self.places[-1]), number)
        if any(number in self.cut(p) for p in span):
            raise StoreError(
                f"{self.store.url}: sequence {number} may go on in a bucket that is not committed; the store is "
                f"unfinished, it has {self.store.rows} rows"
            )
        found = [np.array(self.pieces(p).get(number, ()), np.int64) for p in span]
        if not any(map(len, found)):
            first, last = self.ends(0)[0], self.ends(self.places[-1])[1]
            what = f"{self.store.url} has no row of sequence {number}; its rows are of sequences {first} to {last}"
            raise ValueError(what) if self.store.complete else StoreError(f"{what}, and it is unfinished")
        return np.concatenate(found)

    def read(self, number: int, sites: Sites) -> dict[str, Any]:
        """What `Store.sequence` returns."""
        names, number = site_names(self.store, sites), int(whole_numbers("number", number))
        rows = read_rows(self.store, self.rows(number), [*names, "position", "token_id"])
        return _by_position(rows) | {"sequence": number}


class Sequences(Iterator[dict[str, Any]]):
    """Whole sequences, one pass over the store; made by `Store.sequences`.

    A sequence comes with the last of its buckets that is read. Until then its pieces are held.
    """

    left_out: int
    """Sequences that are left out because they may go on in a bucket that is not committed."""

    def __init__(
        self,
        index: SequenceIndex,
        sites: Sites,
        *,
        shuffle: bool,
        seed: int,
        start: int,
        pool: Pool | None,
        pairs: bool,
    ) -> None:
        """Check what was asked, and find the sequences that are cut."""
        self._index, self._sites = index, site_names(index.store, sites)
        self._pool: Pool | None = pool
        self._shuffle, self._pairs = shuffle, pairs
        self._seed, self._start = int(whole_numbers("seed", seed)), int(whole_numbers("start", start))
        if self._start < 0:
            raise ValueError(f"start is {start}, expected how many sequences to pass over")
        if pool not in (None, "last", "mean"):
            raise ValueError(f"pool is {pool!r}, expected 'last', 'mean' or None")
        if pool and pairs:
            raise ValueError("pool makes one vector of a sequence, which leaves no pairs; give pool or pairs, not both")
        self._cut = set[int]().union(*map(index.cut, index.places))
        self.left_out = len(self._cut)
        self._items = self._read()

    def __next__(self) -> dict[str, Any]:
        """The next sequence."""
        return next(self._items)

    def _order(self, n: int, *bucket: int) -> list[int]:
        """The order of n buckets, or of n sequences of a bucket."""
        if not self._shuffle or not n:
            return list(range(n))
        return keyed.permute(np.arange(n), n, keyed.key(self._seed, "sequences", *bucket)).tolist()

    def _read(self) -> Iterator[dict[str, Any]]:
        """Go from bucket to bucket.

        A held piece is the rows themselves, or their numbers in a bucket that `start` passes over: these are read when
        their sequence comes.
        """
        index, left, names = self._index, self._start, [*self._sites, "position", "token_id"]
        held: dict[int, dict[int, Arrays | range]] = {}
        for place in self._order(len(index.places)):
            pieces = {number: rows for number, rows in index.pieces(place).items() if number not in self._cut}
            for number, rows in pieces.items():
                held.setdefault(number, {})[place] = rows
            whole = [n for n in pieces if len(held[n]) == len(index.span(place, n))]
            done = [(number, held.pop(number)) for number in whole]
            if left and len(done) <= left:
                left -= len(done)
                continue
            first, stop = index.row_range(place)
            data = read_rows(index.store, np.arange(first, stop), names)
            for number in pieces.keys() & held.keys():
                held[number][place] = {k: v.copy() for k, v in _part(data, first, pieces[number]).items()}
            for i in self._order(len(done), int(index.store.index.buckets[place]))[left:]:
                number, parts = done[i]
                yield self._formed(number, parts | {place: _part(data, first, pieces[number])}, names)
            left = 0
            del data  # before the next bucket is read

    def _formed(self, number: int, parts: dict[int, Arrays | range], names: list[str]) -> dict[str, Any]:
        """A sequence as it is handed out, from its pieces by place."""
        store, ordered = self._index.store, [parts[place] for place in sorted(parts)]
        arrays = [read_rows(store, np.arange(p.start, p.stop), names) if isinstance(p, range) else p for p in ordered]
        rows = _by_position({name: np.concatenate([a[name] for a in arrays]) for name in names})
        formed: dict[str, Any] = rows | {"sequence": number}
        if self._pool:
            formed |= {s: rows[s][-1].copy() if self._pool == "last" else _mean(rows[s]) for s in self._sites}
        if self._pairs:
            p = rows["position"]
            first = np.flatnonzero((p[:-1] >= 0) & (p[1:] == p[:-1] + 1))
            formed |= {name: (values[first], values[first + 1]) for name, values in rows.items()}
        return formed


def _part(data: Arrays, first: int, rows: range) -> Arrays:
    """Some rows of a bucket whose first row is `first`."""
    return {name: values[rows.start - first : rows.stop - first] for name, values in data.items()}


def _by_position(rows: Arrays) -> Arrays:
    """Copies of the rows, ordered by position."""
    order = np.argsort(rows["position"], kind="stable")
    return {name: values[order] for name, values in rows.items()}


def _mean(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Mean of [n, d] in float64, rounded once [d]."""
    with np.errstate(all="ignore"):  # NaN and infinity are values too
        return rows.astype(np.float64).mean(axis=0).astype(np.float32)
