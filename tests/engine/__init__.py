"""Tests of reading, converting, writing and publishing tiny models. No model runs."""
