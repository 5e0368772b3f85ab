"""Tests of single modules, without torch."""
