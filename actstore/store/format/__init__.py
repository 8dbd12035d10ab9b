"""What the bytes of a store mean. Pure functions, no I/O, in the order in which data is written.

spec, sealed      the store's numbers, names and zarr metadata; JSON objects that hold their own checksum
fixed, bits, bfloat16, stats   the encodings, and the statistics of what they decode to
codec, encoder, shard          chunks, and one shard object of them
record, manifest               what makes a bucket exist; many records in few objects
"""
