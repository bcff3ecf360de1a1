"""Views of calls and events for people, and texts in them, independent of the medium."""
