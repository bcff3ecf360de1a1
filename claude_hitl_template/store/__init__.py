"""Where everything durable is kept: one protocol, its rules written once, two backends."""
