"""Commands that need no group of their own."""
