"""One module per resource; a route is one function in one of them."""

from claude_hitl_template.api.routers import (
    agents,
    approvals,
    environments,
    events,
    health,
    internal,
    keys,
    secrets,
    sessions,
    workspace,
)

ROUTERS = (
    health.public,
    health.router,
    sessions.router,
    events.router,
    workspace.router,
    approvals.router,
    agents.router,
    environments.router,
    internal.router,
    keys.router,
    secrets.router,
)
