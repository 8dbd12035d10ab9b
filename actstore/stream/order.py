"""Reading order, version 1: a pure function of (plan, stream, position).

The chunks of a store form one line in keyed order: round q of the line visits every committed bucket once, in an
order keyed by the epoch, and takes from each the chunk that a keyed permutation puts in place q. So any window of the
line spreads over as many buckets as it can. The line is dealt to S canonical streams like cards; the few chunks left
over and the short chunks at bucket ends are cut so that all streams have the same number of rows, give or take one.

Within a stream the cyclic chunk interleaver mixes K chunks (a convolutional interleaver; Forney 1971): slice j of
piece i goes to slot (i + j) mod n, and the rows of a slot are permuted by a key of their own. Position -> row needs a
few integers and no table over chunks, so a resumed reader starts anywhere at once. A changed order is a new version.
"""

from dataclasses import dataclass
from functools import lru_cache

import numba
import numpy as np
from numpy.typing import NDArray

from actstore import keyed

ORDER_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The committed rows of a store, as far as their order is concerned."""

    chunk_rows: int
    chunks_per_bucket: int
    """Of a full bucket."""
    buckets: int
    """Committed buckets; `place` numbers them from 0."""
    short: tuple[tuple[int, int], ...] = ()
    """(place, rows) of the buckets that are not full."""

    @property
    def rows(self) -> int:
        """All committed rows."""
        bucket_rows = self.chunk_rows * self.chunks_per_bucket
        return self.buckets * bucket_rows - sum(bucket_rows - rows for _, rows in self.short)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of rows of one chunk."""

    place: int
    chunk: int
    start: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The slices that one output slot of a stream mixes, in slice order."""

    pieces: tuple[int, ...]
    """Piece number of each slice [K]."""
    starts: NDArray[np.int64]
    """First row of each slice within its chunk [K]."""
    edges: NDArray[np.int64]
    """Cumulative rows: slice j holds rows edges[j] to edges[j + 1] of the slot [K + 1]."""

    @property
    def rows(self) -> int:
        """Rows of the slot."""
        return int(self.edges[-1])


class ChunkLine:
    """The chunks of one epoch in reading order, without a table of them."""

    def __init__(self, geometry: Geometry, seed: int, epoch: int, *, shuffle: bool) -> None:
        """Locate the places of the line that short buckets leave empty; the only work, and it is small."""
        self._g, self._seed, self._epoch, self._shuffle = geometry, seed, epoch, shuffle
        self._bucket_key = keyed.key(seed, "epoch", epoch, "buckets")
        holes = [
            self._grid(place, chunk)
            for place, rows in geometry.short
            for chunk in range(rows // geometry.chunk_rows, geometry.chunks_per_bucket)
        ]
        ordered = np.sort(np.array(holes, np.int64))
        self._skips = ordered - np.arange(len(ordered))
        self.full = geometry.buckets * geometry.chunks_per_bucket - len(holes)
        """Number of full chunks."""
        self.short_chunks = tuple(
            Piece(place=place, chunk=rows // geometry.chunk_rows, start=0, rows=rows % geometry.chunk_rows)
            for place, rows in geometry.short
            if rows % geometry.chunk_rows
        )

    def _chunk_key(self, place: int) -> int:
        return keyed.key(self._seed, "epoch", self._epoch, "chunks", place)

    def _grid(self, place: int, chunk: int) -> int:
        g = self._g
        if not self._shuffle:
            return place * g.chunks_per_bucket + chunk
        column = int(keyed.invert(place, g.buckets, self._bucket_key)[0])
        turn = int(keyed.invert(chunk, g.chunks_per_bucket, self._chunk_key(place))[0])
        return turn * g.buckets + column

    def chunk(self, position: int) -> tuple[int, int]:
        """(place, chunk) of the full chunk at a position of the line."""
        g = self._g
        grid = position + int(np.searchsorted(self._skips, position, side="right"))
        if not self._shuffle:
            return divmod(grid, g.chunks_per_bucket)
        turn, column = divmod(grid, g.buckets)
        place = keyed.permuted(column, g.buckets, self._bucket_key)
        return place, keyed.permuted(turn, g.chunks_per_bucket, self._chunk_key(place))


def cut(pieces: list[Piece], start: int, stop: int) -> list[Piece]:
    """Rows start to stop of a sequence of pieces."""
    found: list[Piece] = []
    offset = 0
    for p in pieces:
        low, high = max(start - offset, 0), min(stop - offset, p.rows)
        if low < high:
            found.append(Piece(place=p.place, chunk=p.chunk, start=p.start + low, rows=high - low))
        offset += p.rows
    return found


class StreamOrder:
    """One canonical stream of one epoch."""

    def __init__(
        self, geometry: Geometry, *, seed: int, epoch: int, streams: int, stream: int, mix: int, shuffle: bool
    ) -> None:
        """Stream `stream` of `streams`, mixing `mix` chunks (K)."""
        self._keys(geometry, seed=seed, epoch=epoch, stream=stream, mix=mix, shuffle=shuffle)
        self._chunks = ChunkLine(geometry, seed, epoch, shuffle=shuffle)
        self._streams = streams
        self._bulk = self._chunks.full // streams
        left = [self._full_piece(p) for p in range(self._bulk * streams, self._chunks.full)]
        left.extend(self._chunks.short_chunks)
        rows = sum(p.rows for p in left)
        self._tail = cut(left, stream * rows // streams, (stream + 1) * rows // streams)
        self.pieces = self._bulk + len(self._tail)
        """Number of pieces, and of slots (n)."""
        self.rows = self._bulk * geometry.chunk_rows + sum(p.rows for p in self._tail)
        """Rows of this stream."""
        deficits = np.zeros((0, 2), np.int64)
        if self._tail:
            deficits = np.array([self._deficit(i, j) for i in range(self._bulk, self.pieces) for j in range(mix)])
            deficits = deficits[np.argsort(deficits[:, 0], kind="stable")]
        # every piece is asked for by K slots in a row
        self.piece = lru_cache(maxsize=2 * mix)(self._piece)
        """Piece i, 0 <= i < n."""
        self._deficit_slots = deficits[:, 0]
        self._deficit_sums = np.concatenate([[0], np.cumsum(deficits[:, 1])])

    def _keys(self, geometry: Geometry, *, seed: int, epoch: int, stream: int, mix: int, shuffle: bool) -> None:
        self._geometry, self._seed, self._epoch = geometry, seed, epoch
        self._stream, self.mix, self._shuffle = stream, mix, shuffle

    def _full_piece(self, position: int) -> Piece:
        place, chunk = self._chunks.chunk(position)
        return Piece(place=place, chunk=chunk, start=0, rows=self._geometry.chunk_rows)

    def _piece(self, i: int) -> Piece:
        if i < self._bulk:
            return self._full_piece(i * self._streams + self._stream)
        return self._tail[i - self._bulk]

    def _slice(self, rows: int, j: int) -> tuple[int, int]:
        return j * rows // self.mix, (j + 1) * rows // self.mix

    def _deficit(self, i: int, j: int) -> tuple[int, int]:
        """(slot, rows missing there) because piece i is shorter than a chunk, for its slice j."""
        full = self._slice(self._geometry.chunk_rows, j)
        here = self._slice(self._tail[i - self._bulk].rows, j)
        return (i + j) % self.pieces, (full[1] - full[0]) - (here[1] - here[0])

    def first_row(self, slot: int) -> int:
        """Position in the stream of the first row of a slot; `first_row(n) == rows`."""
        missing = self._deficit_sums[np.searchsorted(self._deficit_slots, slot, side="left")]
        return slot * self._geometry.chunk_rows - int(missing)

    def slot_at(self, position: int) -> int:
        """The slot that holds a position of the stream, 0 <= position < rows."""
        low, high = position // self._geometry.chunk_rows, self.pieces - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.first_row(middle) <= position:
                low = middle
            else:
                high = middle - 1
        return low

    def slot(self, t: int) -> Slot:
        """What slot t mixes."""
        numbers = tuple((t - j) % self.pieces for j in range(self.mix))
        starts, sizes = [0] * self.mix, [0] * self.mix
        for j, i in enumerate(numbers):
            p = self.piece(i)
            low, high = self._slice(p.rows, j)
            starts[j], sizes[j] = p.start + low, high - low
        edges = np.zeros(self.mix + 1, np.int64)
        np.cumsum(sizes, out=edges[1:])
        return Slot(pieces=numbers, starts=np.array(starts), edges=edges)

    def rows_of(self, t: int, slot: Slot, buffers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of every output row of slot t: `buffers[j]` of its slice j, and its row within the slice's chunk."""
        places, rows = np.empty(slot.rows, np.int64), np.empty(slot.rows, np.int64)
        key = np.uint64(keyed.key(self._seed, "epoch", self._epoch, "slot", self._stream, t) if self._shuffle else 0)
        _rows_of(slot.edges, slot.starts, buffers, key, self._shuffle, places, rows)
        return places, rows


@numba.njit(nogil=True, cache=True)
def _rows_of(
    edges: NDArray[np.int64],
    starts: NDArray[np.int64],
    buffers: NDArray[np.int64],
    key: np.uint64,
    shuffle: bool,  # noqa: FBT001  compiled functions take no keywords
    places: NDArray[np.int64],
    rows: NDArray[np.int64],
) -> None:
    if shuffle and edges[-1] > 0:
        n = np.uint64(edges[-1])
        keyed.walk_range(0, n, keyed.round_keys(n, key), rows)
    else:
        for i in range(rows.shape[0]):
            rows[i] = i
    # a table of slices: a search for each row would mispredict its branches
    slices = np.empty(rows.shape[0], np.int32)
    for j in range(edges.shape[0] - 1):
        for i in range(edges[j], edges[j + 1]):
            slices[i] = j
    shifts = starts - edges[:-1]
    for i in range(rows.shape[0]):
        j = slices[rows[i]]
        places[i] = buffers[j]
        rows[i] += shifts[j]
