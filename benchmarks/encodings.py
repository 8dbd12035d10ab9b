"""What encodings and codecs save and cost on real activations: python benchmarks/encodings.py STORE...

STORE is a finished bf16 store, as `actstore capture --encoding bf16` writes it; `actstore cp` copies it to every form.
--quick takes a small store of synthetic rows instead.
"""

import argparse
import tempfile

import numpy as np
import record
import stores
from record import Row

from actstore.store import Store, open_store
from actstore.store.maintain.copy import copy
from actstore.store.maintain.verify import verify
from actstore.store.read.values import FLOATS, BucketRows, Values

FORMS = [("planes", e) for e in ("bf16", "f32", "fixed:1e-4", "fixed:1e-3", "fixed:4e-3", "fixed:1e-2")]
FORMS += [("blosc", "bf16"), ("none", "bf16"), ("blosc", "fixed:1e-3")]


def encodings(args: argparse.Namespace) -> list[Row]:
    """Sizes count every object but the token table. FVU is of what a reader decodes, in float64, over the whole store.

    Of several sites, the worst FVU is reported.
    """
    sources = args.stores
    if args.quick:
        sources = [args.dir / "synthetic"]
        stores.make(sources[0], "resid_post.0", "bf16", "planes", d=32, rows=8192, bucket_rows=4096)
    found: list[Row] = []
    for source in map(str, sources):
        for number, (codec, encoding) in enumerate(FORMS):
            with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
                found.append(measure(source, codec, encoding, f"{scratch}/{number}"))
    return found


def measure(source: str, codec: str, encoding: str, url: str) -> Row:
    """Copy a store to another form and compare."""
    copy(source, url, codec=codec, encoding=encoding)
    original, made = open_store(source), open_store(url)
    assert not verify(made.storage, deep=True).damage
    sizes = {key: size for key, size in made.storage.list("").items() if not key.startswith("tokens/")}
    everything = sum(sizes.values())
    activations = sum(n for key, n in sizes.items() if "/c/" in key and key.split("/")[0] in made.sites)
    eps, fvu = next(iter(made.sites.values())).eps, max(added_fvu(original, made, site) for site in made.sites)
    return {
        "store": source.rstrip("/").rpartition("/")[2],
        "sites": ", ".join(f"{name} (d = {s.d})" for name, s in original.sites.items()),
        "rows": original.rows,
        "encoding": encoding,
        "codec": codec,
        "bf16 bytes / stored": sum(2 * original.rows * s.d for s in original.sites.values()) / everything,
        "of it not activations": 1 - activations / everything,
        "added FVU": fvu,
        "FVU / eps": fvu / eps if eps else None,
        "saturated": sum(made.stats(s).saturated for s in made.sites),
    }


def added_fvu(original: Store, made: Store, site: str) -> float:
    """Squared error over the squared distance from the mean, summed over dimensions."""
    a, b = Values(original, site, FLOATS), Values(made, site, FLOATS)
    error = spread = 0.0
    mean = original.stats(site).mean
    for place in range(len(original.index.buckets)):
        x, y = (BucketRows(v, s, site, place)[:].astype(np.float64) for v, s in ((a, original), (b, made)))
        error += float(((x - y) ** 2).sum())
        spread += float(((x - mean) ** 2).sum())
    return error / spread


if __name__ == "__main__":
    arguments = record.parser(__doc__)
    arguments.add_argument("stores", nargs="*", metavar="STORE")
    record.main(__file__, {"encodings": encodings}, arguments)
