"""Conversations and approvals in a terminal."""
