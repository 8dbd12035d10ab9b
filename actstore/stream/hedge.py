"""Hedged requests: ask once more for what takes far longer than the rest (Dean & Barroso 2013, "The Tail at Scale").

A request is overdue after three times the 95th percentile of recent ones. At most one in twenty is asked for again, by
a fetcher that has nothing else to do; the first answer counts.
"""

import time
from collections import deque

import numpy as np

from actstore.stream.residency import Resident

SAMPLES = 256
LEAST_S = 0.1
"""A request that is younger is never overdue."""
UNKNOWN_S = 2.0
"""Overdue after so long while there are too few samples."""
ENOUGH = 20
SHARE = 0.05


class Hedge:
    """Requests under way and how long others took. Its owner holds a lock around every call."""

    def __init__(self, *, enabled: bool) -> None:
        """Never ask twice unless `enabled`."""
        self._enabled = enabled
        self._began: dict[Resident, float] = {}
        self._asked: set[Resident] = set()
        self._took: deque[float] = deque(maxlen=SAMPLES)
        self._first = self._second = 0
        self._limit = UNKNOWN_S

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        return not self._began

    @property
    def under_way(self) -> int:
        """Chunks that are being requested."""
        return len(self._began)

    def begin(self, resident: Resident, *, second: bool) -> float:
        """A request starts; returns the time."""
        now = time.perf_counter()
        if second:
            self._second += 1
            self._asked.add(resident)
        else:
            self._first += 1
            self._began[resident] = now
        return now

    def end(self, resident: Resident, seconds: float | None) -> None:
        """A chunk has come, or failed (None: no sample)."""
        self._began.pop(resident, None)  # a damaged answer ended it before
        self._asked.discard(resident)
        if seconds is not None:
            self._took.append(seconds)
            if len(self._took) >= ENOUGH and self._first % ENOUGH == 0:
                self._limit = max(LEAST_S, 3 * float(np.quantile(np.array(self._took), 0.95)))

    def overdue(self) -> Resident | None:
        """The chunk to ask for once more, if any."""
        if not self._enabled or self._second > SHARE * self._first + 1:
            return None
        late = time.perf_counter() - self._limit
        return next((r for r, began in self._began.items() if began < late and r not in self._asked), None)
