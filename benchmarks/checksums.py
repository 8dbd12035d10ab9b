"""What a checksum costs on decode: the table of docs/decisions/0003-checksums.md."""

import google_crc32c
import numpy as np
import zstandard
from awscrt import checksums
from numcodecs import zstd

from actstore.bench import activations_like, rate
from actstore.console import print_table

PARAMETERS = {
    "strategy": zstandard.STRATEGY_FAST, "min_match": 7, "hash_log": 6, "chain_log": 6, "window_log": 17,
    "target_length": 0, "search_log": 1, "write_content_size": 1,
}  # fmt: skip


def main() -> None:
    bits = activations_like(2048, 2304).reshape(-1)
    planes = np.concatenate([(bits & 255).astype(np.uint8), (bits >> 8).astype(np.uint8)])
    frames = [
        zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(write_checksum=check, **PARAMETERS)
        ).compress(planes.tobytes())
        for check in (0, 1)
    ]
    out = np.empty_like(planes)
    work = {
        "memory copy": lambda: np.copyto(out, planes),
        "zstd decode": lambda: zstd.decompress(frames[0], out),
        "zstd decode, frame checksum": lambda: zstd.decompress(frames[1], out),
        "crc32c of the frame, google-crc32c": lambda: google_crc32c.value(frames[0]),
        "crc32c of the frame, awscrt": lambda: checksums.crc32c(frames[0]),
    }

    def moved(run: object) -> int:
        run()  # type: ignore[operator]
        return planes.nbytes

    rows = [(name, rate(lambda run=run: moved(run), passes=15)) for name, run in work.items()]
    print_table(f"one chunk, ratio {planes.nbytes / len(frames[0]):.3f}", rows, header=("", "GB/s of decoded bytes"))


if __name__ == "__main__":
    main()
