"""A compact trainer of sparse autoencoders on an activation store."""
