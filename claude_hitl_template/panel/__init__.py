"""Kodosumi's panel: its entries and flows, who its users are, and the checks in front of it."""
