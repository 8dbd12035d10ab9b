"""Looking after a store: verify, repair, gc, copy, move, info."""
