"""What the pipeline measures, and which stage that says is the bound."""

from dataclasses import asdict, dataclass

STALL = 0.1
"""Share of its time that the consumer may wait before it is told so."""


@dataclass
class Meter:
    """Seconds and bytes by stage, summed over threads, since the dataset was made."""

    fetch_s: float = 0.0
    decode_s: float = 0.0
    gather_s: float = 0.0
    wait_s: float = 0.0
    """The consumer waiting for a batch."""
    elapsed_s: float = 0.0
    """From each loop's beginning to its latest batch."""
    stored_bytes: int = 0
    delivered_bytes: int = 0
    chunks: int = 0
    """Chunks read; those that are read again count again."""
    batches: int = 0
    requests: int = 0
    retries: int = 0
    """Requests that were sent once more because they failed."""
    hedges: int = 0
    """Second requests for what was slow."""
    hedges_won: int = 0
    skipped_chunks: int = 0
    skipped_rows: int = 0

    def figures(self) -> dict[str, float]:
        """All figures, and `stall`: the share of its time that the consumer waited."""
        return asdict(self) | {"stall": self.wait_s / self.elapsed_s if self.elapsed_s else 0.0}

    def bound(self, *, fetchers: int, workers: int) -> str:
        """The stage that limits the rate: `fetch`, `decode`, `gather`, or `consumer` if it hardly waits.

        Of the stages, the one whose threads are busiest: `fetchers` threads only fetch (0: the workers do it), and
        `workers` threads decode and gather.
        """
        if self.wait_s <= STALL * self.elapsed_s:
            return "consumer"
        busy = {
            "fetch": self.fetch_s / (fetchers or workers),
            "decode": self.decode_s / workers,
            "gather": self.gather_s / workers,
        }
        return max(busy, key=lambda stage: busy[stage])
