"""The rows that all loaders read: an .npy file [rows, d] of bf16 bits with the entropy of real activations."""

from pathlib import Path

import numpy as np

from actstore.bench.report import activations_like

BLOCK_ROWS = 1 << 14


def write_source(file: Path, rows: int, d: int) -> None:
    """Rows of a random block, again and again; the first two values of a row hold its number, low 16 bits first.

    Nothing here compresses across rows, so repetition makes no format smaller; the numbers tell what a loader gave.
    """
    if d < 2:
        raise ValueError(f"rows of {d} values can't hold their number; use d of 2 or more")
    block = activations_like(min(BLOCK_ROWS, rows), d)
    out = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint16, shape=(rows, d))
    for start in range(0, rows, len(block)):
        number = np.arange(start, min(start + len(block), rows))
        out[number] = block[: len(number)]
        out[number, 0], out[number, 1] = number & 0xFFFF, number >> 16
    out.flush()
