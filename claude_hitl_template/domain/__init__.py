"""What the service speaks of: sessions, events, approvals, and the policy for tool calls. Pure: no I/O, no framework."""
