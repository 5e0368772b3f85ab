"""The architectures that streamconv converts: one module per family, found by listing this package."""
