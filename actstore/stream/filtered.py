"""Reading order over the rows that pass a filter: order version 1 with chunks of unequal length.

The same line, streams and interleaver as `order.py`; a chunk counts with the rows of it that pass, and chunks of which
none passes are no part of the line. The arithmetic becomes tables: a few numbers a chunk, made when an epoch begins.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from actstore import keyed
from actstore.stream.order import Geometry, Piece, StreamOrder, cut


def filtered_orders(
    geometry: Geometry,
    counts: NDArray[np.int64],
    wanted: tuple[int, ...],
    *,
    seed: int,
    epoch: int,
    streams: int,
    mix: int,
    shuffle: bool,
) -> "dict[int, FilteredOrder]":
    """The streams `wanted` of `streams`; `counts` are the rows that pass [buckets, chunks per bucket].

    Streams have the same number of rows, give or take one: chunks are dealt to them like cards as long as no stream
    gets more than its share, and the rows of what is left are cut to fill all of them up.
    """
    line = _line(geometry, seed, epoch, shuffle=shuffle)
    line = line[counts.reshape(-1)[line] > 0]
    rows = counts.reshape(-1)[line]
    total = int(rows.sum())
    shares = np.diff(np.arange(streams + 1) * total // streams)
    rounds = len(line) // streams
    dealt = np.cumsum(rows[: rounds * streams].reshape(rounds, streams), axis=0)
    bulk = min(int(np.searchsorted(dealt[:, s], shares[s], side="right")) for s in range(streams))
    left = [
        _piece_at(geometry, int(c), int(r)) for c, r in zip(line[bulk * streams :], rows[bulk * streams :], strict=True)
    ]
    needs = shares - (dealt[bulk - 1] if bulk else 0)
    edges = np.concatenate([[0], np.cumsum(needs)])
    return {
        s: FilteredOrder(
            geometry,
            line[s : bulk * streams : streams],
            rows[s : bulk * streams : streams],
            cut(left, int(edges[s]), int(edges[s + 1])),
            seed=seed,
            epoch=epoch,
            stream=s,
            mix=mix,
            shuffle=shuffle,
        )
        for s in wanted
    }


def _piece_at(geometry: Geometry, chunk: int, rows: int) -> Piece:
    """All rows that pass of a chunk."""
    place, number = divmod(chunk, geometry.chunks_per_bucket)
    return Piece(place=place, chunk=number, start=0, rows=rows)


def _line(g: Geometry, seed: int, epoch: int, *, shuffle: bool) -> NDArray[np.int64]:
    """All chunks, as place * chunks_per_bucket + chunk, in the order of `ChunkLine`, absent ones included."""
    if not shuffle:
        return np.arange(g.buckets * g.chunks_per_bucket)
    places = keyed.permute(np.arange(g.buckets), g.buckets, keyed.key(seed, "epoch", epoch, "buckets"))
    turns = np.arange(g.chunks_per_bucket)
    grid = np.empty((g.chunks_per_bucket, g.buckets), np.int64)
    for column, place in enumerate(places.tolist()):
        chunks = keyed.permute(turns, g.chunks_per_bucket, keyed.key(seed, "epoch", epoch, "chunks", place))
        grid[:, column] = place * g.chunks_per_bucket + chunks
    return grid.reshape(-1)


class FilteredOrder(StreamOrder):
    """One canonical stream of one epoch, of rows that pass."""

    def __init__(
        self,
        geometry: Geometry,
        line: NDArray[np.int64],
        rows: NDArray[np.int64],
        tail: list[Piece],
        *,
        seed: int,
        epoch: int,
        stream: int,
        mix: int,
        shuffle: bool,
    ) -> None:
        """Mix the chunks of `line`, of which `rows` pass, and the pieces of `tail`."""
        self._keys(geometry, seed=seed, epoch=epoch, stream=stream, mix=mix, shuffle=shuffle)
        self._line, self._line_rows, self._tail = line, rows, tail
        lengths = np.concatenate([rows, np.array([p.rows for p in tail], np.int64)])
        self.pieces, self.rows = len(lengths), int(lengths.sum())
        sizes = np.zeros(self.pieces, np.int64)
        for j in range(mix):
            # slice j of piece i lies in slot (i + j) mod n
            sizes += np.roll((j + 1) * lengths // mix - j * lengths // mix, j)
        self._first = np.concatenate([[0], np.cumsum(sizes)])
        self.piece = lru_cache(maxsize=2 * mix)(self._piece_of)

    def _piece_of(self, i: int) -> Piece:
        if i < len(self._line):
            return _piece_at(self._geometry, int(self._line[i]), int(self._line_rows[i]))
        return self._tail[i - len(self._line)]

    def first_row(self, slot: int) -> int:
        """Position in the stream of the first row of a slot; `first_row(n) == rows`."""
        return int(self._first[slot])

    def slot_at(self, position: int) -> int:
        """The slot that holds a position of the stream, 0 <= position < rows."""
        return int(np.searchsorted(self._first, position, side="right")) - 1
