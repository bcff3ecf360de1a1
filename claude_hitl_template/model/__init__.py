"""The model endpoint that sessions talk to: pass-through to Anthropic, or the offline model."""
