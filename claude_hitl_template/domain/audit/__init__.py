"""The audit log: entries in a hash chain per workspace, signed checkpoints, and their verification without the service."""

from claude_hitl_template.domain.audit.entries import GENESIS, SERVICE_CHAIN, Draft, Entry, Head, seal

__all__ = ["GENESIS", "SERVICE_CHAIN", "Draft", "Entry", "Head", "seal"]
