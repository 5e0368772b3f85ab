"""Tests that take minutes: kills, failing disks, memory, fuzzing, benchmarks. They are marked ``slow``."""
