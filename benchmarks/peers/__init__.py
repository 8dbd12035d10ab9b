"""Other loaders on the same rows with the same batch size, each in an environment of its own: `bench peers`."""

from actstore.bench.peers.run import bench_peers

__all__ = ["bench_peers"]
