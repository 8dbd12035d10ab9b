"""Rows of a store by number, in any order.

Each chunk that holds a wanted row is read and decoded once. Chunks of one shard with at most `GAP_BYTES` between them
come in one ranged GET of at most `REQUEST_BYTES`, or of one chunk if that is larger. Up to 16 threads send the GETs,
and each GET writes its rows to their places in the result. Memory is therefore the result, about 100 bytes a row of
bookkeeping, and the GETs under way: `INFLIGHT_BYTES`, or what one chunk takes if that is more.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from actstore.errors import StoreError, brief
from actstore.store.format.bfloat16 import NATIVE as BFLOAT16
from actstore.store.format.spec import BITS
from actstore.store.read.index import Location
from actstore.store.read.store import Store
from actstore.store.read.values import Values

GAP_BYTES = 1 << 19
"""Bytes between two chunks that are fetched with them: they take less time than a request of its own would."""
REQUEST_BYTES = 1 << 23
INFLIGHT_BYTES = 1 << 29
_THREADS = 16
_CHUNK_COPIES = 3
"""Copies of a chunk that a thread holds at its peak: as decoded, merged, and the wanted rows as values."""


def whole_numbers(name: str, given: ArrayLike, dims: int = 0) -> NDArray[np.int64]:
    """`given` as int64 with `dims` dimensions; `ValueError` names the first that is not a whole number."""
    try:
        numbers = np.asarray(given)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{name} can't be read as numbers: {brief(e)}") from e
    if numbers.ndim != dims:
        raise ValueError(f"{name} is {brief(given)}, expected {'a list of whole numbers' if dims else 'a number'}")
    if numbers.size and numbers.dtype.kind != "i":
        numbers = np.asarray(given, object)  # as they were given: [1, 2.5] would name 1.0
        for x in numbers.ravel():
            if not isinstance(x, (int, np.integer)) or isinstance(x, bool) or not -(1 << 63) <= x < 1 << 63:
                raise ValueError(f"{name}: {brief(x)} is not a whole number of 64 bits")
    return numbers.astype(np.int64)


def site_names(store: Store, sites: str | Sequence[str] | None) -> list[str]:
    """The sites that were asked for, None being all; `ValueError` unless the store has them."""
    names = list(store.sites) if sites is None else [sites] if isinstance(sites, str) else list(sites)
    for name in names:
        store.check_site(name)
    return names


def committed_rows(store: Store, numbers: ArrayLike) -> NDArray[np.int64]:
    """Row numbers [n]; `ValueError` for a row that the store never has, `StoreError` for one not yet committed."""
    rows, spec = whole_numbers("numbers", numbers, 1), store.spec
    inside = (rows >= 0) & (rows < spec.rows)
    buckets, within = np.divmod(np.where(inside, rows, 0), spec.bucket_rows)
    exists = inside & (within < spec.bucket_sizes(buckets))
    bad = ~exists | ~np.isin(buckets, store.index.buckets)
    if not bad.any():
        return rows
    i = int(bad.argmax())
    first, stop = spec.bucket_range(int(buckets[i]))
    what = f"the store at {store.url} has no row {rows[i]}"
    if not inside[i]:
        raise ValueError(f"{what}: its rows are 0 to {spec.rows - 1}")
    if not exists[i]:
        raise ValueError(f"{what}: after row {stop - 1} comes row {first + spec.bucket_rows}, of an extension")
    what = f"{what} yet: rows {first} to {stop - 1} (bucket {buckets[i]}) are not committed"
    raise StoreError(f"{what}; the store is unfinished, it has {store.rows} rows")


def read_rows(store: Store, rows: NDArray[np.int64], names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Arrays of committed rows [n], in the order asked: sites [n, d], provenance [n]; types as in `Store.take`."""
    spec, buckets = store.spec, store.index.buckets
    places, stored = np.searchsorted(buckets, rows // spec.bucket_rows), np.empty(len(rows), np.int64)
    for group in _groups(places):
        stored[group] = spec.permutation(int(buckets[places[group[0]]]), rows[group] % spec.bucket_rows)
    numbers, within = np.divmod(stored, spec.chunk_rows)
    groups = _groups(places * (spec.bucket_rows // spec.chunk_rows) + numbers)
    columns = {name: _Column(store, name, within) for name in names}
    requests = [
        (column, request)
        for column in columns.values()
        for request in column.requests([(int(places[g[0]]), int(numbers[g[0]]), g) for g in groups])
    ]
    largest = max((store.index.arrays[name].array.chunk_bytes for name in names), default=0)
    threads = INFLIGHT_BYTES // (max(REQUEST_BYTES, largest) + _CHUNK_COPIES * largest)
    with ThreadPoolExecutor(min(max(threads, 1), _THREADS), thread_name_prefix="actstore-rows") as pool:
        for _ in pool.map(lambda request: request[0].read(request[1]), requests):
            pass  # raises what went wrong, and takes back what has not begun
    return {name: c.out.view(BFLOAT16) if c.out.dtype == BITS else c.out for name, c in columns.items()}


def _groups(keys: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Indices of equal keys, by ascending key."""
    order = np.argsort(keys, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(keys[order])) + 1) if len(keys) else []


_Request = list[tuple[Location, NDArray[np.int64]]]
"""Chunks of one shard that are fetched together, and which of the wanted rows lie in each."""


class _Column:
    """One array of the wanted rows; requests fill in `out`."""

    def __init__(self, store: Store, name: str, within: NDArray[np.int64]) -> None:
        """`within` has the place of each wanted row in its chunk."""
        self._store, self._name, self._within = store, name, within
        self._values = Values(store, name)
        self.out = np.empty((len(within), *store.index.arrays[name].array.shape[1:]), self._values.dtype)

    def requests(self, chunks: list[tuple[int, int, NDArray[np.int64]]]) -> Iterator[_Request]:
        """Requests for ascending chunks: row of the bucket in the index, chunk there, wanted rows."""
        request: _Request = []
        for place, chunk, indices in chunks:
            at = self._store.index.arrays[self._name].locate(place, int(self._store.index.buckets[place]), chunk)
            if request and not _near(request[0][0], request[-1][0], at):
                yield request
                request = []
            request.append((at, indices))
        if request:
            yield request

    def read(self, request: _Request) -> None:
        """Fetch and decode chunks, and put the wanted rows where they belong."""
        first, last = request[0][0], request[-1][0]
        storage = self._store.owner(self._name).storage
        data = memoryview(storage.get_range(first.key, first.offset, last.offset + last.length - first.offset))
        for at, indices in request:
            stored = data[at.offset - first.offset :][: at.length]
            decoded = self._store.decode_chunk(self._name, at, stored)
            self.out[indices] = self._values.convert(decoded[self._within[indices]])


def _near(first: Location, last: Location, at: Location) -> bool:
    """Whether a chunk is fetched with those from `first` to `last`."""
    gap, size = at.offset - last.offset - last.length, at.offset + at.length - first.offset
    return at.key == first.key and gap <= GAP_BYTES and size <= REQUEST_BYTES
