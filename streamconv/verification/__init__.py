"""The checks of an output, one per module, with the original models, the result and the report."""
