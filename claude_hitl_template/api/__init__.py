"""The REST API: the Managed Agents wire protocol, and the inbox across sessions."""
