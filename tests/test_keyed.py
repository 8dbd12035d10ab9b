"""Keyed orders: bijections, frozen, uniform."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore import keyed

MASK = (1 << 64) - 1


def reference(x: int, n: int, key: int) -> int:
    """docs/format.md, in plain integers."""

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    bits = max(1, (n - 1).bit_length())
    rounds = 16 if bits <= 8 else 8
    while True:
        b = bits // 2
        a = bits - b
        left, right = x >> b, x & ((1 << b) - 1)
        for r in range(1, rounds + 1):
            f = mix((right + mix((key + r * 0x9E3779B97F4A7C15) & MASK)) & MASK) & ((1 << a) - 1)
            left, right = right, left ^ f
            a, b = b, a
        x = (left << b) | right
        if x < n:
            return x


@given(n=st.integers(1, 3000), seed=st.integers(0, MASK))
@settings(max_examples=100, deadline=None)
def test_it_is_a_permutation_with_its_inverse(n: int, seed: int) -> None:
    p = keyed.permute(np.arange(n), n, seed)
    assert np.array_equal(np.sort(p), np.arange(n))
    assert np.array_equal(keyed.invert(p, n, seed), np.arange(n))


@given(n=st.integers(1, (1 << 63) - 1), seed=st.integers(0, MASK), data=st.data())
@settings(max_examples=200, deadline=None)
def test_it_is_what_the_format_document_says(n: int, seed: int, data: st.DataObject) -> None:
    x = data.draw(st.integers(0, n - 1))
    y = int(keyed.permute(np.array([x], np.uint64), n, seed)[0])
    assert y == reference(x, n, seed)
    assert int(keyed.invert(np.array([y]), n, seed)[0]) == x


@pytest.mark.parametrize("n", [2, 3, 5, 8, 17, 64, 257, 1000])
def test_positions_are_independent_of_each_other_over_keys(n: int) -> None:
    """Chi-square of one image, and of the difference of two, over 20,000 keys: within 6 standard deviations."""
    keys = np.random.default_rng(n).integers(0, 1 << 63, 20_000)
    images = np.array([keyed.permute(np.array([0, n // 2]), n, int(k)) for k in keys])

    def deviation(values: np.ndarray, cells: int) -> float:
        counts = np.bincount(values, minlength=cells)
        expected = len(values) / cells
        return (((counts - expected) ** 2 / expected).sum() - (cells - 1)) / np.sqrt(2 * max(cells - 1, 1))

    assert abs(deviation(images[:, 0], n)) < 6
    if n > 2:
        assert abs(deviation((images[:, 1] - images[:, 0]) % n - 1, n - 1)) < 6


def test_keys_do_not_collide_where_sums_would() -> None:
    assert keyed.key(1, "epoch", 0) != keyed.key(0, "epoch", 1)
    assert keyed.key(12, "x") != keyed.key(1, "2", "x") != keyed.key(1, 2, "x", 0)


def test_golden() -> None:
    """Part of the format: these numbers never change."""
    assert keyed.key(0, "bucket", 0) == 0x98B178E0E91F6EB4
    assert keyed.permute(np.arange(10), 10, 42).tolist() == [6, 7, 2, 8, 1, 9, 0, 4, 3, 5]
    assert keyed.permute(np.array([0, 1, 10**15]), 10**18, 42).tolist() == [
        895148829324708544,
        32189539965083026,
        987897185007929716,
    ]


@pytest.mark.parametrize(("index", "n"), [(5, 5), (-1, 5), (0, 0), (0, 1 << 63)])
def test_out_of_range_is_refused(index: int, n: int) -> None:
    with pytest.raises(ValueError, match=r"needs|must lie"):
        keyed.permute(np.array([index]), n, 0)
