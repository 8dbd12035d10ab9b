"""What encodings and codecs cost on one core, on rows of a store or synthetic ones: `actstore bench codec`.

For every form: encode (rows to stored bytes, quantisation of `fixed` included), decode (stored bytes to what the loader
gathers from) and to rows (decode and gather, all that a loader does). Rates count bytes of decoded activations: 2 a
value, 4 for f32. All forms alternate with a memory copy in every round.
"""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.bench.report import (
    PASSES,
    Rate,
    Report,
    alternate,
    copying,
    float_activations_like,
    machine,
    medians,
    memory_copy,
    timed,
)
from actstore.bench.write import rows_of
from actstore.store.format import codec, fixed, stats
from actstore.store.format.bfloat16 import NATIVE as BFLOAT16
from actstore.store.format.spec import ArraySpec
from actstore.stream import gather as gathering
from actstore.stream.memory import addresses

EPS = 1e-3
CHUNKS = 4
"""Chunks that each call works on."""
STAGES = ("encode", "decode", "to rows")


def bench_codec(*, like: str | None = None, d: int = 2304, chunk_rows: int = 2048, rounds: int = PASSES) -> Report:
    """Encode and decode `CHUNKS` chunks in every encoding and codec.

    Rows are synthetic, [n, d] with the entropy of activations, or come from the first bf16 site of the store `like`;
    then f32 is of bf16 values, whose low 16 bits are zero.
    """
    rows = CHUNKS * chunk_rows
    if like is None:
        values = float_activations_like(rows, d)
    else:
        values = (rows_of(like, rows).astype(np.uint32) << np.uint32(16)).view(np.float32)
    rows = len(values) // CHUNKS * CHUNKS
    forms = [_Form(values[:rows], encoding, c) for encoding in ("bf16", "f32", "fixed") for c in codec.CODECS]
    stages: dict[str, Callable[[], float]] = {"copy": timed(copying())}
    for form in forms:
        for stage in STAGES:
            stages[f"{form.name}, {stage}"] = timed(form.stage(stage))
    found = alternate(stages, rounds)
    median = medians(found)
    rates = [memory_copy(median["copy"])]
    for form in forms:
        for stage in STAGES:
            name = f"{form.name}, {stage}"
            of_copy = statistics.median(r[name] / r["copy"] for r in found)
            more = {"bf16 bytes / stored": form.ratio}
            rates.append(Rate(what=name, gb_s=median[name], of_ceiling=of_copy, ceiling="memory copy", more=more))
    default = {stage: median[f"bf16 planes, {stage}"] for stage in STAGES}
    bound = min(("encode", "to rows"), key=lambda s: default[s])
    return Report(
        command="actstore bench codec " + (f"--like {like}" if like else f"--d {d}"),
        rates=rates,
        bound="encode" if bound == "encode" else "decode",
        why="bf16 planes, GB/s a core: " + ", ".join(f"{s} {default[s]:.3g}" for s in STAGES),
        machine=machine(),
    )


class _Form:
    """Rows in one encoding and codec."""

    def __init__(self, values: NDArray[np.float32], encoding: str, name: codec.CodecName) -> None:
        self.name = f"{encoding}({EPS:g}) {name}" if encoding == "fixed" else f"{encoding} {name}"
        self._codec: codec.CodecName = name
        plain = values if encoding == "f32" else values.astype(BFLOAT16).view(np.uint16)
        self._chunks = np.ascontiguousarray(plain).reshape(CHUNKS, -1, plain.shape[1])
        self._calibration: fixed.Calibration | None = None
        if encoding == "fixed":
            self._calibration = fixed.calibrate(stats.sums(plain), EPS, plain[: fixed.CALIBRATION_ROWS])
            self._codes = np.empty(self._chunks.shape[1:], np.int16)
            self._values = np.empty(self._chunks.shape[1:], np.float32)
        self._out = np.empty(codec.max_stored(self._chunks[0].nbytes), np.uint8)
        self._stored = [self._encode(i) for i in range(CHUNKS)]
        self._decoded = np.empty((CHUNKS, self._chunks[0].nbytes), np.uint8)
        rows = self._chunks.shape[1]
        self._array = ArraySpec(
            name=name, shape=plain.shape, dtype=np.dtype("i2"), shard_rows=rows, chunk_rows=rows, codec=name
        )
        rng = np.random.default_rng(0)
        self._buffer, self._row = (rng.integers(0, n, len(plain)) for n in (CHUNKS, len(plain) // CHUNKS))
        self._rows = np.empty_like(plain)
        self.ratio = 2 * plain.size / sum(map(len, self._stored))

    def _elements(self, chunk: int) -> NDArray[Any]:
        """What the codec gets."""
        if self._calibration is None:
            return self._chunks[chunk]
        fixed.quantise(self._chunks[chunk], self._calibration, self._codes, self._values)
        return self._codes

    def _encode(self, chunk: int) -> bytes:
        return self._out[: codec.encode_into(self._elements(chunk), self._codec, self._out)[0]].tobytes()

    def stage(self, name: str) -> Callable[[], int]:
        """One of `STAGES`; it returns the bytes that it was for."""

        def encode() -> int:
            for i in range(CHUNKS):
                codec.encode_into(self._elements(i), self._codec, self._out)
            return self._chunks.nbytes

        def decode() -> int:
            for i, data in enumerate(self._stored):
                codec.decode_into(data, self._codec, self._decoded[i], f"chunk {i}")
            return self._chunks.nbytes

        def to_rows() -> int:
            decode()
            pool = addresses(self._decoded)
            gathering.gather(pool, self._buffer, self._row, self._rows, self._array, self._calibration)
            return self._chunks.nbytes

        return {"encode": encode, "decode": decode, "to rows": to_rows}[name]
