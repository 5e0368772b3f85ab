"""Tensors that are not read yet, dtypes, casts and checksums."""
