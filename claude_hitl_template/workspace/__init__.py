"""A session's folder: saved to the store's file area and restored from it on any machine."""
