"""Reading a store: where its chunks lie, and its values."""
