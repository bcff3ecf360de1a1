"""A session's folder: saved to the store's file area, and made anew from it, on whichever machine."""
