"""Bringing a working tree to a cluster."""
