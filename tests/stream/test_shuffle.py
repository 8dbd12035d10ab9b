"""The shuffle inside buckets: where a row goes says nothing about where it was, nor about any other bucket."""

import numpy as np
import pytest

from actstore.store import SiteSpec, StoreSpec

BINS, SEEDS = 16, 300


def permutation(seed: int, bucket: int, rows: int) -> np.ndarray:
    spec = StoreSpec(
        sites={"a": SiteSpec(d=1)}, rows=64 * rows, bucket_rows=rows, shard_rows=rows, chunk_rows=rows, seed=seed
    )
    return spec.permutation(bucket)


def deviations(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Chi-square of the two places, binned, over all pairs, in standard deviations from what independence gives."""
    table = np.zeros((BINS, BINS))
    for a, b in pairs:
        np.add.at(table, (a * BINS // len(a), b * BINS // len(b)), 1)
    expected = sum(len(a) for a, _ in pairs) / BINS**2
    degrees = (BINS - 1) ** 2
    return float((((table - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees))


@pytest.mark.parametrize("rows", [64, 512, 4096])
def test_the_place_after_is_independent_of_the_place_before(rows):
    before = np.arange(rows)
    assert abs(deviations([(before, permutation(seed, seed % 7, rows)) for seed in range(SEEDS)])) < 5
    assert deviations([(before, before)] * 10) > 100, "the test sees order where there is some"


@pytest.mark.parametrize("rows", [64, 512, 4096])
@pytest.mark.parametrize("other", [1, 2, 63])
def test_buckets_are_permuted_independently_of_each_other(rows, other):
    """Activault permutes every file alike (its defect in the survey of peers): rows of one place stay together."""
    pairs = [(permutation(seed, 0, rows), permutation(seed, other, rows)) for seed in range(SEEDS)]
    assert abs(deviations(pairs)) < 5
    assert deviations([(a, a) for a, _ in pairs]) > 100


def test_neighbours_do_not_stay_neighbours():
    rows = 4096
    steps = np.concatenate([np.diff(permutation(seed, 3, rows)) for seed in range(SEEDS)])
    expected = len(steps) * 2 / rows  # of a random permutation's neighbours 2 in n are neighbours again
    assert abs((np.abs(steps) == 1).sum() - expected) < 5 * np.sqrt(expected)
