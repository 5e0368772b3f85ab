"""Outputs in stores: S3, and every other that fsspec can write to."""
