"""The spool of `tokenize`: what is tokenised so far, on disk, so that a killed run goes on where it was.

Three files only grow: `ids` and `document` (int32), and `names` (an Arrow stream). `state.json` says how far they are
good; it is renamed into place after they are synced, and what was written after it is cut off. For a local table the
spool is `<out>.partial` beside it, else a directory of the user's cache, or of the temporary directory where no cache
can be written. It takes 8 bytes a token, and is deleted when the table is committed. A lock on the directory, which the
kernel releases with its holder, keeps a second run out.
"""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actstore.errors import TokensError
from actstore.store.storage import LocalStorage, Storage
from actstore.tokens.documents import Document
from actstore.tokens.table import DOCUMENT_COLUMNS

_STATE = "state.json"
_NAMES_PARQUET = "names-parquet"  # without the suffix that would make it a source of text
_GROUP_ROWS = 1 << 16
"""Names in a row group of the parquet file, at least."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything before (file, record) is in the spool."""

    file: int = 0
    record: int = 0
    size: float = 0.0
    """Bytes of the sources that are done, for progress."""
    documents: int = 0
    skipped: int = 0
    special: int = 0
    empty_files: int = 0
    has_text: bool = False
    """Whether a document of the file that is being read held text."""
    tokens: int = 0
    """Values in `ids` and in `document`."""
    names: int = 0
    """Bytes of `names`."""


@contextmanager
def open_spool(
    storage: Storage, settings: dict[str, object], say: Callable[[str], None], *, may_skip: bool
) -> Generator["Spool"]:
    """The spool of a table, with what an earlier run of the same settings left; deleted if the block succeeds.

    What was left with skipped documents is used only if this run may skip. `TokensError` if another run has it.
    """
    folder = _place(storage, say)
    fd = _lock(folder, storage.url)
    try:
        spool = Spool(folder, settings, may_skip=may_skip)
        try:
            yield spool
        except BaseException:
            spool.close(keep=bool(spool.state.tokens))
            raise
        spool.close(keep=False)
    finally:
        os.close(fd)


def _place(storage: Storage, say: Callable[[str], None]) -> Path:
    if isinstance(storage, LocalStorage):
        root = storage.root.resolve()
        return root.with_name(f"{root.name}.partial")
    name = Path("tokenize", hashlib.blake2b(storage.url.encode(), digest_size=16).hexdigest())
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "actstore" / name
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        pass
    mine = Path(tempfile.gettempdir()) / f"actstore-{os.getuid()}"
    mine.mkdir(mode=0o700, exist_ok=True)
    if mine.is_symlink() or mine.stat().st_uid != os.getuid():
        raise TokensError(f"{mine} belongs to another user; set XDG_CACHE_HOME or TMPDIR to a directory of your own")
    say(f"packed tokens wait in {mine / name}: there is no cache directory that can be written (XDG_CACHE_HOME)")
    return mine / name


def _lock(folder: Path, url: str) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), folder.stat()):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    raise TokensError(
        f"{url}: another actstore tokenize is writing it (see {folder}); wait for it or use another --out"
    )


class Spool:
    """Files that grow, and the state up to which they are good."""

    def __init__(self, folder: Path, settings: dict[str, object], *, may_skip: bool) -> None:
        """Go on with what is in `folder`, if it was made with these settings."""
        self._folder, self._settings = folder, settings
        self.state = self._read(may_skip=may_skip)
        if self.state == State():
            (folder / _STATE).unlink(missing_ok=True)
        for path, size in self._sizes(self.state).items():
            path.touch()
            os.truncate(path, size)
        self._ids, self._document, self._names = (path.open("ab") for path in self._sizes(self.state))
        if not self.state.names:
            self._names.write(DOCUMENT_COLUMNS.serialize())

    def _read(self, *, may_skip: bool) -> State:
        try:
            found = json.loads((self._folder / _STATE).read_bytes())
            state = State(**found["state"])
            same = found["settings"] == json.loads(json.dumps(self._settings))
            whole = all(path.stat().st_size >= size for path, size in self._sizes(state).items())
        except (OSError, ValueError, TypeError, KeyError):
            return State()
        return state if same and whole and (may_skip or not state.skipped) else State()

    def _sizes(self, state: State) -> dict[Path, int]:
        sizes = {"ids": 4 * state.tokens, "document": 4 * state.tokens, "names": state.names}
        return {self._folder / name: size for name, size in sizes.items()}

    def append(self, ids: NDArray[np.int32], numbers: NDArray[np.int32], documents: list[Document], first: int) -> None:
        """Add packed tokens, and the names of the documents, numbered from `first`, that they come from."""
        self._ids.write(ids.tobytes())
        self._document.write(numbers.tobytes())
        if documents:
            columns: dict[str, list[object]] = {"document": list(range(first, first + len(documents)))}
            columns |= {name: [getattr(d, name) for d in documents] for name in DOCUMENT_COLUMNS.names[1:]}
            self._names.write(pa.RecordBatch.from_pydict(columns, schema=DOCUMENT_COLUMNS).serialize())

    def save(self, state: State) -> None:
        """Make all that was appended last, as what `state` stands for."""
        for f in (self._ids, self._document, self._names):
            f.flush()
            os.fsync(f.fileno())
        self.state = replace(state, tokens=self._ids.tell() // 4, names=self._names.tell())
        partial = self._folder / f"{_STATE}.new"
        partial.write_text(json.dumps({"settings": self._settings, "state": asdict(self.state)}))
        partial.replace(self._folder / _STATE)

    def read(self, name: str, places: NDArray[np.int64], width: int) -> NDArray[np.int32]:
        """Runs of `width` saved values of `ids` or `document`, by their number: [n, width].

        Read one by one, because the pages of a memory map would count as this process's memory.
        """
        out = np.empty((len(places), width), np.int32)
        with (self._folder / name).open("rb", buffering=0) as f:
            for row, place in zip(out, places.tolist(), strict=True):
                os.preadv(f.fileno(), [row.data], 4 * width * place)
        return out

    def tail(self, width: int) -> NDArray[np.int32]:
        """Saved document numbers after the last whole run of `width`."""
        n = self.state.tokens % width
        return np.fromfile(self._folder / "document", np.int32, n, offset=4 * (self.state.tokens - n))

    def documents(self) -> Path:
        """The names as a parquet file."""
        path = self._folder / _NAMES_PARQUET
        with (
            pq.ParquetWriter(path, DOCUMENT_COLUMNS, write_page_checksum=True) as writer,
            pa.OSFile(str(self._folder / "names")) as f,
        ):
            waiting: list[pa.RecordBatch] = []
            for batch in pa.ipc.open_stream(f):
                waiting.append(batch)
                if sum(b.num_rows for b in waiting) >= _GROUP_ROWS:
                    writer.write_table(pa.Table.from_batches(waiting))
                    waiting = []
            if waiting:
                writer.write_table(pa.Table.from_batches(waiting))
        return path

    def close(self, *, keep: bool) -> None:
        """Close the files; delete them unless they are kept, and the directory too if nothing else is in it."""
        for f in (self._ids, self._document, self._names):
            f.close()
        if keep:
            return
        for name in ("ids", "document", "names", _NAMES_PARQUET, _STATE, f"{_STATE}.new"):
            (self._folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            self._folder.rmdir()
