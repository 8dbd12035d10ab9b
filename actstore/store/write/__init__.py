"""Writing a store: the commit protocol, buckets, appending, extending."""
