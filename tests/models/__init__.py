"""Tests in which models run: verification, and what depends on it."""
