"""Tools for the project that are not part of the package: the benchmark."""
