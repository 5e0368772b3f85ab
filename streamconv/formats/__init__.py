"""The formats of checkpoints, one per module: reading their indexes, and writing them."""
