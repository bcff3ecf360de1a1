"""Sends notices of approvals and sessions to people and programs."""
