"""Benchmarks of streamconv and other converters: ``python -m benchmarks``."""
