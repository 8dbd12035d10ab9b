"""actstore: the open activation store for interpretability research.

`actstore.open(url)` opens a store, `actstore.ActivationDataset(url, sites=...)` streams shuffled batches from it,
`actstore.create(url, sites=...)` makes one of activations from anywhere.
"""

import os
from typing import TYPE_CHECKING, Any

from actstore.errors import ActstoreError

if TYPE_CHECKING:
    from actstore.store.read.store import Store
    from actstore.store.write.append import create
    from actstore.stream.dataset import ActivationDataset

__version__ = "0.1.0"
__all__ = ["ActivationDataset", "ActstoreError", "create", "open"]


def open(url: str | os.PathLike[str]) -> "Store":  # noqa: A001  actstore.open is the public name
    """Open a store read-only; `StoreError` if there is none at `url`."""
    from actstore.store.read.store import open_store

    return open_store(url)


def __getattr__(name: str) -> Any:
    """Load what is heavy only when it is asked for."""
    if name == "create":
        from actstore.store.write.append import create

        return create
    if name == "ActivationDataset":
        from actstore.stream.dataset import ActivationDataset

        return ActivationDataset
    raise AttributeError(f"module 'actstore' has no attribute {name!r}")
