"""What encodings and codecs cost and save on real activations: python benchmarks/encodings.py STORE...

STORE is a finished bf16 store, as `actstore capture --encoding bf16` writes it; `actstore cp` copies it to every form.
Sizes count every object but the token table: metadata, records, manifest and provenance too.
FVU is that of what a reader decodes against the bf16 values, in float64, over the whole store.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from actstore.bench import machine
from actstore.console import figure, print_table
from actstore.store import Store, open_store
from actstore.store.maintain.copy import copy
from actstore.store.maintain.verify import verify
from actstore.store.read.values import FLOATS, BucketRows, Values

HERE = Path(__file__).parent
FORMS: list[dict[str, str]] = [
    {"codec": "planes", "encoding": "bf16"},
    {"codec": "blosc", "encoding": "bf16"},
    {"codec": "none", "encoding": "bf16"},
    {"codec": "planes", "encoding": "f32"},
    {"codec": "planes", "encoding": "fixed:1e-4"},
    {"codec": "planes", "encoding": "fixed:1e-3"},
    {"codec": "blosc", "encoding": "fixed:1e-3"},
    {"codec": "planes", "encoding": "fixed:4e-3"},
    {"codec": "planes", "encoding": "fixed:1e-2"},
]


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


def measure(source: str, form: dict[str, Any], url: str) -> dict[str, Any]:
    """Copy a store to another form and compare."""
    copy(source, url, **form)
    original, made = open_store(source), open_store(url)
    assert not verify(made.storage, deep=True).damage
    everything = sum(size for key, size in made.storage.list("").items() if not key.startswith("tokens/"))
    raw = sum(2 * original.rows * s.d for s in original.sites.values())
    eps = next(iter(made.sites.values())).eps
    fvu = max(added_fvu(original, made, site) for site in made.sites)
    return {
        "encoding": form["encoding"],
        "codec": form["codec"],
        "bf16 bytes / stored": raw / everything,
        "of it not activations": 1 - sum(_site_bytes(made, s) for s in made.sites) / everything,
        "added FVU": fvu,
        "FVU / eps": fvu / eps if eps else None,
        "saturated": sum(made.stats(s).saturated for s in made.sites),
    }


def _site_bytes(store: Store, site: str) -> int:
    return sum(size for key, size in store.storage.list(site).items() if "/c/" in key)


def main() -> None:
    """Measure every store given, print and keep the figures."""
    record: dict[str, Any] = {"command": "python benchmarks/encodings.py STORE...", "machine": machine(), "stores": []}
    for source in sys.argv[1:]:
        store = open_store(source)
        with tempfile.TemporaryDirectory() as scratch:
            found = [measure(source, form, f"{scratch}/{i}") for i, form in enumerate(FORMS)]
        sites = ", ".join(f"{name} (d = {s.d})" for name, s in store.sites.items())
        about = {"name": Path(source).name, "sites": sites, "rows": store.rows}
        record["stores"].append({**about, "provenance": store.provenance, "forms": found})
        print_table(str(about), [tuple(f.values()) for f in found], header=tuple(found[0]))
    (HERE / "encodings.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE / "encodings.md").write_text(page(record))


def page(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = ["# Encodings", "", f"Made by `{record['command']}`; do not edit."]
    for store in record["stores"]:
        header = tuple(store["forms"][0])
        lines += ["", f"{store['name']}: {store['sites']}, {figure(store['rows'])} rows", ""]
        lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines += ["| " + " | ".join(figure(v) for v in form.values()) + " |" for form in store["forms"]]
    return "\n".join([*lines, "", ", ".join(f"{k} {v}" for k, v in record["machine"].items()), ""])


if __name__ == "__main__":
    main()
