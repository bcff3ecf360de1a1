"""The processes that `hitl up` starts on this machine."""
