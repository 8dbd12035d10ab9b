"""What encodings and codecs cost on one core: python benchmarks/codec.py [--like STORE] [--quick].

Each form is encoded (quantisation of `fixed` included), decoded, decoded with its crc32c checked, and decoded and
gathered into rows, which is all that a loader does. Rates are GB/s of decoded activations: 2 bytes a value, 4 for f32.
Rows are synthetic, with the entropy of activations, or come from the first bf16 site of the store STORE; then f32 is of
bf16 values, whose low 16 bits are zero.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import record
from numpy.typing import NDArray
from record import Row

from actstore.bench.report import alternate, copying, float_activations_like
from actstore.bench.write import rows_of
from actstore.store.format import codec, fixed, stats
from actstore.store.format.bfloat16 import NATIVE as BFLOAT16
from actstore.store.format.spec import ArraySpec
from actstore.stream.gather import gather
from actstore.stream.memory import addresses
from actstore.stream.stages import gb_per_s

EPS, CHUNKS = 1e-3, 4
"""Chunks that each call works on."""
STAGES = ("encode", "decode", "decode checked", "to rows")


class Form:
    """Chunks of rows in one encoding and codec. Every stage returns the bytes that it was for."""

    def __init__(self, values: NDArray[np.float32], encoding: str, name: codec.CodecName) -> None:
        """Encode `values` [rows, d]."""
        self.name, self.codec = f"{encoding} {name}", name
        plain = values if encoding == "f32" else values.astype(BFLOAT16).view(np.uint16)
        self.chunks = np.ascontiguousarray(plain).reshape(CHUNKS, -1, plain.shape[1])
        rows = self.chunks.shape[1]
        self.calibration: fixed.Calibration | None = None
        if encoding == "fixed":
            self.calibration = fixed.calibrate(stats.sums(plain), EPS, plain[: fixed.CALIBRATION_ROWS])
            self.codes = np.empty(self.chunks.shape[1:], np.int16)
            self.floats = np.empty(self.chunks.shape[1:], np.float32)
        self.out = np.empty(codec.max_stored(self.chunks[0].nbytes), np.uint8)
        self.stored = [self.out[: self.encode_chunk(i)].tobytes() for i in range(CHUNKS)]
        self.decoded = np.empty((CHUNKS, self.chunks[0].nbytes), np.uint8)
        self.array = ArraySpec(
            name=name, shape=plain.shape, dtype=np.dtype("i2"), shard_rows=rows, chunk_rows=rows, codec=name
        )
        rng = np.random.default_rng(0)
        self.buffer, self.row = (rng.integers(0, n, len(plain)) for n in (CHUNKS, rows))
        self.rows = np.empty_like(plain)

    def encode_chunk(self, i: int) -> int:
        """Stored bytes of a chunk, quantised if it is to be, in `out`."""
        elements = self.chunks[i]
        if self.calibration is not None:
            fixed.quantise(elements, self.calibration, self.codes, self.floats)
            elements = self.codes
        return codec.encode_into(elements, self.codec, self.out)[0]

    def encode(self) -> int:
        """Quantise and encode."""
        for i in range(CHUNKS):
            self.encode_chunk(i)
        return self.chunks.nbytes

    def decode(self) -> int:
        """Decode without looking at the checksum."""
        for i, data in enumerate(self.stored):
            codec.decode_payload(memoryview(data)[: -codec.CRC_BYTES], self.codec, self.decoded[i], f"chunk {i}")
        return self.chunks.nbytes

    def checked(self) -> int:
        """Decode after checking the crc32c."""
        for i, data in enumerate(self.stored):
            codec.decode_into(data, self.codec, self.decoded[i], f"chunk {i}")
        return self.chunks.nbytes

    def to_rows(self) -> int:
        """Decode, and gather random rows."""
        self.decode()
        gather(addresses(self.decoded), self.buffer, self.row, self.rows, self.array, self.calibration)
        return self.chunks.nbytes


def forms(args: argparse.Namespace) -> list[Row]:
    """Forms alternate with a memory copy in every round."""
    d, rows = (64, CHUNKS * 256) if args.quick else (2304, CHUNKS * 2048)
    if args.like is None:
        values = float_activations_like(rows, d)
    else:
        values = (rows_of(args.like, rows).astype(np.uint32) << np.uint32(16)).view(np.float32)
    values = values[: len(values) // CHUNKS * CHUNKS]
    made = [Form(values, encoding, name) for encoding in ("bf16", "f32", "fixed") for name in codec.CODECS]
    jobs: dict[str, Callable[[], float]] = {"copy": partial(gb_per_s, copying())}
    for form in made:
        stages = (form.encode, form.decode, form.checked, form.to_rows)
        jobs |= {f"{form.name} {s}": partial(gb_per_s, work) for s, work in zip(STAGES, stages, strict=True)}
    found = alternate(jobs, args.rounds)
    lines: list[Row] = [{"form": "memory copy", "to rows": statistics.median(r["copy"] for r in found)}]
    for form in made:
        row: Row = {"form": form.name, "bf16 bytes / stored": 2 * values.size / sum(map(len, form.stored))}
        row |= {s: statistics.median(r[f"{form.name} {s}"] for r in found) for s in STAGES}
        row["to rows, over copy"] = statistics.median(r[f"{form.name} to rows"] / r["copy"] for r in found)
        lines.append(row)
    return lines


if __name__ == "__main__":
    arguments = record.parser(__doc__)
    arguments.add_argument("--like", metavar="STORE", help="a store with a bf16 site whose rows are used")
    record.main(__file__, {"forms": forms}, arguments)
