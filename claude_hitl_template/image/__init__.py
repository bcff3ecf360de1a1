"""The image `claude-hitl-worker`: its content, build and labels. Independent of Ray."""
