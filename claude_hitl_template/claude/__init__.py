"""All that touches the Claude Agent SDK."""
