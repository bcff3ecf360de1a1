"""Test doubles for tests and the benchmark. Never imported by production code."""
