"""What tests and the benchmark stand on. Never imported by production code."""
