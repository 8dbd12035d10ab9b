"""English prose from the pinned packages, where no corpus can be fetched: python benchmarks/docstrings.py OUT.

The docstrings of every module of the packages in this environment, one document a module, each docstring once. Writes
OUT/train.parquet, and OUT/heldout.parquet with one module in fifty. `constraints.txt` fixes the packages, and with them
the text (to the byte on one platform).
"""

import argparse
import ast
import hashlib
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

LEAST = 400
"""Characters of a document."""


def modules() -> Iterator[tuple[str, Path]]:
    """Name and path of every Python file of every installed package, in one order everywhere."""
    found = {
        f"{package.metadata['Name'].lower()}/{file}": Path(str(package.locate_file(file)))
        for package in distributions()
        for file in package.files or []
        if file.suffix == ".py"
    }
    yield from sorted(found.items())


def docstrings(path: Path) -> list[str]:
    """Those of a file; none where it is not valid Python of this version (templates, old code)."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, FileNotFoundError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    seen: set[bytes] = set()
    parts: dict[str, list[str]] = {"train": [], "heldout": []}
    for name, path in modules():
        fresh = []
        for text in docstrings(path):
            digest = hashlib.sha256(text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                fresh.append(text)
        document = "\n\n".join(fresh)
        if len(document) >= LEAST:
            held = hashlib.sha256(name.encode()).digest()[0] % 50 == 0
            parts["heldout" if held else "train"].append(document)
    args.out.mkdir(parents=True, exist_ok=True)
    for part, documents in parts.items():
        pq.write_table(pa.table({"text": documents}), args.out / f"{part}.parquet")
        print(f"{part}: {len(documents):,} documents, {sum(map(len, documents)):,} characters")


if __name__ == "__main__":
    main()
