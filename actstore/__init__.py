"""actstore: the open activation store for interpretability research.

`actstore.open(url)` opens a store, `actstore.ActivationDataset(url, sites=...)` streams shuffled batches from it,
`actstore.create(url, sites=...)` makes one of activations from anywhere.
"""

import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from actstore.errors import ActstoreError

if TYPE_CHECKING:
    from actstore.store.read.join import join
    from actstore.store.read.store import Store
    from actstore.store.write.append import create
    from actstore.stream.dataset import ActivationDataset

__version__ = "0.1.0"
__all__ = ["ActivationDataset", "ActstoreError", "create", "join", "open"]


def _give_numba_a_cache(package: Path) -> None:
    """Name a private temporary directory for compiled functions where neither package nor home can be written.

    numba refuses to compile with a cache and no place for it. The directory is private because numba unpickles files.
    """
    if "NUMBA_CACHE_DIR" in os.environ or os.access(package, os.W_OK):
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or f"{os.environ.get('HOME', '/nonexistent')}/.cache")
    if os.access(next(p for p in (home, *home.parents) if p.exists()), os.W_OK):
        return
    cache = Path(tempfile.gettempdir()) / f"actstore-numba-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    seen = cache.lstat()
    private = stat.S_ISDIR(seen.st_mode) and seen.st_uid == os.getuid() and not seen.st_mode & 0o077
    os.environ["NUMBA_CACHE_DIR"] = str(cache) if private else tempfile.mkdtemp(prefix="actstore-numba-")


_give_numba_a_cache(Path(__file__).parent)


def open(url: str | os.PathLike[str]) -> "Store":  # noqa: A001  actstore.open is the public name
    """Open a store read-only; `StoreError` if there is none at `url`."""
    from actstore.store.read.store import open_store

    return open_store(url)


def __getattr__(name: str) -> object:
    """Load what is heavy only when it is asked for."""
    if name == "create":
        from actstore.store.write.append import create

        return create
    if name == "join":
        from actstore.store.read.join import join

        return join
    if name == "ActivationDataset":
        from actstore.stream.dataset import ActivationDataset

        return ActivationDataset
    raise AttributeError(f"module 'actstore' has no attribute {name!r}")
