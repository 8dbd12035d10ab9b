"""The store: format version 1 on any object storage. Knows nothing of models or of torch."""

from actstore.store.format.spec import SiteSpec, StoreSpec
from actstore.store.read.store import Store, open_store
from actstore.store.storage import Storage, open_storage
from actstore.store.write.bucket import StoreWriter, create_store, open_writer

__all__ = [
    "SiteSpec",
    "Storage",
    "Store",
    "StoreSpec",
    "StoreWriter",
    "create_store",
    "open_storage",
    "open_store",
    "open_writer",
]
