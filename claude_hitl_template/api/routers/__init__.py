"""One module per resource; a route is one function in one of them."""

from claude_hitl_template.api.routers import (
    admin,
    agents,
    approvals,
    audit,
    environments,
    events,
    health,
    internal,
    passwords,
    secrets,
    sessions,
    workspace,
)

ROUTERS = (
    health.public,
    health.router,
    sessions.router,
    sessions.changes,
    events.router,
    events.inbound,
    workspace.router,
    approvals.router,
    approvals.decisions,
    audit.keys,
    audit.router,
    agents.router,
    environments.router,
    internal.router,
    admin.managed,
    admin.router,
    admin.operator,
    passwords.router,
    secrets.router,
)
