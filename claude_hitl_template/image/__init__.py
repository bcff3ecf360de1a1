"""The image `claude-hitl-worker`: what goes into it, how it is built, what it says of itself. Knows no Ray."""
