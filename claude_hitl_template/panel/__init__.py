"""Kodosumi's panel: who asks, what is shown, what is decided there. Importing any module of it imports Kodosumi."""
