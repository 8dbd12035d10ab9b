"""The files behind the arguments: local, or anywhere fsspec reaches.

The order is fixed (arguments as given, directories sorted), so document numbers are reproducible. A directory that
Hugging Face `datasets` saved is read as its `state.json` says: caches that `map` left beside the data are not data.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import fsspec

from actstore.builtin import TEXTS
from actstore.errors import TokensError

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst")
MAX_LISTED = 1000
"""Files that a token table names one by one."""
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class SourceFile:
    """One file of text."""

    fs: Any
    path: str
    name: str
    """Path below the argument that named it; never a machine's own path."""
    size: int

    def identity(self) -> dict[str, Any]:
        """Name, bytes, and a digest of the file's first and last 64 KiB: enough to notice another file."""
        head = self.fs.cat_file(self.path, start=0, end=_SAMPLE_BYTES)
        tail = self.fs.cat_file(self.path, start=max(0, self.size - _SAMPLE_BYTES), end=self.size)
        digest = hashlib.blake2b(head + tail, digest_size=16).hexdigest()
        return {"name": self.name, "bytes": self.size, "sample": digest}


def list_files(sources: tuple[str, ...]) -> list[SourceFile]:
    """Every file behind the arguments, in reading order; `TokensError` if one is missing or of no known kind."""
    files: list[SourceFile] = []
    for source in sources:
        fs, root = fsspec.core.url_to_fs(str(TEXTS.get(source, source)))
        root = str(root).rstrip("/")
        if fs.isfile(root):
            paths, base = [root], root.rpartition("/")[0]
        elif fs.isdir(root):
            paths, base = _below(fs, root, source), root
        else:
            raise TokensError(f"{source}: no such file or directory")
        if not paths or not all(p.endswith(SUFFIXES) for p in paths):
            raise TokensError(f"{source}: no text in a known form; expected {', '.join(SUFFIXES)}")
        files += [SourceFile(fs, p, p[len(base) :].lstrip("/"), int(fs.size(p))) for p in paths]
    return files


def _below(fs: Any, root: str, source: str) -> list[str]:
    """The files of text in a directory, sorted; of a saved data set only those that belong to it."""
    everything = sorted(fs.find(root))
    paths = {p for p in everything if p.endswith(SUFFIXES)}
    for path in everything:
        folder, _, name = path.rpartition("/")
        if name == "dataset_dict.json":
            splits = ", ".join(_listed(fs, path, "splits", source))
            raise TokensError(f"{source}: a DatasetDict of the splits {splits}; name one split's directory")
        if name != "state.json":
            continue
        arrow = {p for p in paths if p.endswith(".arrow") and p.rpartition("/")[0] == folder}
        if arrow:
            mine = {f"{folder}/{f}" for f in _listed(fs, path, "_data_files", source)}
            if not mine <= paths:
                raise TokensError(f"{source}: {', '.join(sorted(mine - paths))} is missing; save the data set again")
            paths -= arrow - mine
    return sorted(paths)


def _listed(fs: Any, path: str, key: str, source: str) -> list[str]:
    """The names in a JSON file that `datasets` wrote."""
    try:
        return [str(n if key == "splits" else n["filename"]) for n in json.loads(fs.cat_file(path))[key]]
    except (ValueError, TypeError, KeyError) as e:
        raise TokensError(f"{source}: {path.rpartition('/')[2]} is none that datasets.save_to_disk writes") from e


def identities(files: list[SourceFile]) -> list[dict[str, Any]]:
    """What a token table records of its sources: every file, or one digest for all where there are very many."""
    each = [file.identity() for file in files]
    if len(each) <= MAX_LISTED:
        return each
    digest = hashlib.blake2b(json.dumps(each).encode(), digest_size=16).hexdigest()
    return [{"name": f"{len(each)} files", "bytes": sum(f.size for f in files), "sample": digest}]
