"""The owner of a session under the names that other projects import it by; it lives in `cluster/actor.py`."""

from claude_hitl_template.cluster.actor import ClaudeSessionActor, cleanup_actor, create_actor, get_actor

__all__ = ["ClaudeSessionActor", "cleanup_actor", "create_actor", "get_actor"]
