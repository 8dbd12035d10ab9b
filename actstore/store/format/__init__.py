"""What the bytes of a store mean; pure functions, no I/O."""
