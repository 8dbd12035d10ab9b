"""The files behind the arguments: local, or anywhere fsspec reaches.

The order is fixed (arguments as given, directories sorted), so document numbers are reproducible. A directory that
Hugging Face `datasets` saved is read as its `state.json` says: caches that `map` left beside the data are not data.
A file is read once however often it is named, and what a directory holds beside its sources is counted and named.
"""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from actstore.builtin import TEXTS
from actstore.errors import TokensError
from actstore.store.storage import LocalStorage, Storage

SUFFIXES = (".parquet", ".arrow", *(f".{k}{c}" for k in ("jsonl", "json", "txt") for c in ("", ".gz", ".zst")))
MAX_LISTED, _MAX_LISTED_BYTES = 1000, 1 << 20
"""Files that a token table names one by one."""
NAMED = 3
"""Names in a line that counts files."""
_SAMPLE_BYTES = 1 << 16
_MAX_STATE_BYTES = 1 << 24
_METADATA = re.compile(
    r"(zarr|dataset_infos?|dataset_dict|state|(generation_|preprocessor_|tokenizer_)?config|tokenizer|special_tokens_map|"
    r"added_tokens|vocab|.*\.index)\.json"
)
"""JSON files that zarr and Hugging Face's libraries write beside data and models."""
_HIDDEN = re.compile(r"[._].*|te?mp|.*(\.te?mp|\.partial|~)", re.IGNORECASE)
"""Files and folders that programs hide, or keep while they write: Spark, editors, caches, `tokenize` itself."""
_READERS = 16


@dataclass(frozen=True)
class SourceFile:
    """One file of text."""

    fs: Any
    path: str
    name: str
    """Path below the argument that named it; never a machine's own path."""
    size: int

    @property
    def kind(self) -> str:
        """The suffix without that of a compression."""
        return self.path.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]

    def identity(self) -> dict[str, str | int]:
        """Name, bytes, and a digest of the file's first and last 64 KiB: enough to notice another file."""
        head = self.fs.cat_file(self.path, start=0, end=_SAMPLE_BYTES)
        tail = self.fs.cat_file(self.path, start=max(0, self.size - _SAMPLE_BYTES), end=self.size)
        digest = hashlib.blake2b(head + tail, digest_size=16).hexdigest()
        return {"name": self.name, "bytes": self.size, "sample": digest}


@dataclass(frozen=True)
class Sources:
    """What the arguments name."""

    files: list[SourceFile] = field(default_factory=list)
    """In reading order."""
    unread: list[str] = field(default_factory=list)
    """Files in the directories that are not read."""
    repeated: list[str] = field(default_factory=list)
    """Files that were named again."""

    def notes(self) -> list[str]:
        """A line on each kind of file that is not read as asked."""
        kinds = {
            "files in the sources' directories that are not read": self.unread,
            "files that are named again and read once": self.repeated,
        }
        return [f"{what}: {len(names)} ({named(names)})" for what, names in kinds.items() if names]


def named(names: list[str]) -> str:
    """The first few of some names."""
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def find_sources(arguments: tuple[str, ...], out: Storage | None = None) -> Sources:
    """Every file behind the arguments; `TokensError` if one is missing or of no known kind, or inside `out`.

    What lies in the table at `out`, or in its spool, is no source.
    """
    found, seen = Sources(), set[tuple[Any, str]]()
    for source in arguments:
        fs, root = _opened(source)
        own = _own(fs, out)
        if fs.isfile(root):
            paths, unread, base = [root], [], root.rpartition("/")[0]
        elif fs.isdir(root):
            paths, unread = _below(fs, root, own, source)
            base = root
        else:
            raise TokensError(f"{source}: no such file or directory")
        if any(_inside(_real(fs, root), folder) for folder in own):
            raise TokensError(f"{source}: lies in the token table that is to be written; use another --out")
        if not paths or not all(p.endswith(SUFFIXES) for p in paths):
            there = f"; it holds {named(unread)}" if unread else ""
            raise TokensError(f"{source}: no text in a known form{there}; expected {', '.join(SUFFIXES)}")
        found.unread.extend(unread)
        for path in paths:
            name = path[len(base) :].lstrip("/")
            if (fs, _real(fs, path)) in seen:
                found.repeated.append(name)
                continue
            seen.add((fs, _real(fs, path)))
            try:
                found.files.append(SourceFile(fs, path, name, int(fs.size(path))))
            except FileNotFoundError as e:
                raise TokensError(f"{source}: {name} is gone, or a link to nothing; delete it") from e
    return found


def _opened(source: str) -> tuple[Any, str]:
    """The file system of an argument, and the path there; `file://` URLs may be percent-encoded."""
    text = str(TEXTS.get(source, source))
    if text.startswith("file://"):
        text = unquote(text.removeprefix("file://"))
    try:
        fs, root = fsspec.core.url_to_fs(text)
    except ImportError as e:
        raise TokensError(f"{source}: needs another package: {e}") from e
    return fs, str(root).rstrip("/") or "/"


def _real(fs: Any, path: str) -> str:
    return os.path.realpath(path) if isinstance(fs, LocalFileSystem) else path


def _inside(path: str, folder: str) -> bool:
    return f"{path}/".startswith(f"{folder}/")


def _own(fs: Any, out: Storage | None) -> tuple[str, ...]:
    """Where the table that is written, and its spool, lie on this file system."""
    if isinstance(out, LocalStorage):
        root = str(out.root.resolve())
        return (root, f"{root}.partial") if isinstance(fs, LocalFileSystem) else ()
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    if out is None or urlsplit(out.url).scheme not in protocols:
        return ()
    return (str(fs._strip_protocol(out.url)).rstrip("/"),)  # noqa: SLF001  fsspec's name for a URL's path


def _below(fs: Any, root: str, own: tuple[str, ...], source: str) -> tuple[list[str], list[str]]:
    """The files of text in a directory, sorted, and the names of files that are not read.

    Hidden files, and those of zarr groups (token tables and stores), are not read, and named only if they look like
    text. A saved data set is those files that belong to it.
    """
    everything = [p for p in sorted(fs.find(root)) if not any(_inside(_real(fs, p), folder) for folder in own)]
    groups = {p.rpartition("/")[0] for p in everything if p.endswith("/zarr.json")}
    hidden = {
        path
        for path in everything
        if any(map(_HIDDEN.fullmatch, path[len(root) :].strip("/").split("/")))
        or any(_inside(path, group) for group in groups)
    }
    known = {p for p in everything if p.endswith(SUFFIXES) and not _METADATA.fullmatch(p.rpartition("/")[2])}
    paths = known - hidden
    for path in everything:
        folder, _, name = path.rpartition("/")
        if path in hidden:
            continue
        if name == "dataset_dict.json":
            splits = ", ".join(_listed(fs, path, "splits", source))
            raise TokensError(f"{source}: a DatasetDict of the splits {splits}; name one split's directory")
        arrow = {p for p in paths if p.endswith(".arrow") and p.rpartition("/")[0] == folder}
        if name == "state.json" and arrow:
            mine = {f"{folder}/{f}" for f in _listed(fs, path, "_data_files", source)}
            if not mine <= paths:
                raise TokensError(f"{source}: {', '.join(sorted(mine - paths))} is missing; save the data set again")
            paths -= arrow - mine
    unread = [p[len(root) :].lstrip("/") for p in everything if p not in paths and (p in known or p not in hidden)]
    return sorted(paths), unread


def _listed(fs: Any, path: str, key: str, source: str) -> list[str]:
    """The names in a JSON file that `datasets` wrote."""
    try:
        data = fs.cat_file(path, start=0, end=_MAX_STATE_BYTES)
        return [str(n if key == "splits" else n["filename"]) for n in json.loads(data)[key]]
    except (ValueError, RecursionError, TypeError, KeyError) as e:
        raise TokensError(f"{source}: {path.rpartition('/')[2]} is none that datasets.save_to_disk writes") from e


def identities(files: list[SourceFile]) -> list[dict[str, str | int]]:
    """What a token table records of its sources: every file, or one digest for all where there are very many."""
    with ThreadPoolExecutor(_READERS) as pool:
        each = list(pool.map(SourceFile.identity, files))
    text = json.dumps(each).encode()
    if len(each) <= MAX_LISTED and len(text) <= _MAX_LISTED_BYTES:
        return each
    digest = hashlib.blake2b(text, digest_size=16).hexdigest()
    return [{"name": f"{len(each)} files", "bytes": sum(f.size for f in files), "sample": digest}]
