"""What stands in for something in tests; never imported by production code."""
