"""Writes weight files on the workers of a Dask cluster."""
