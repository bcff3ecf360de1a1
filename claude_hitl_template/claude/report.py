"""The MCP server `hitl` inside a session's owner: how the agent says that a tool is missing in its image."""

from typing import Any

from claude_agent_sdk import McpSdkServerConfig, ToolAnnotations, create_sdk_mcp_server, tool

from claude_hitl_template.domain import missing_dependency

_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"type": "string", "enum": list(missing_dependency.KINDS)},
        "name": {"type": "string", "description": "As apt, pip or npm call the package."},
        "why": {"type": "string", "description": "What you need it for, in a sentence."},
    },
    "required": ["kind", "name", "why"],
}


@tool(
    missing_dependency.TOOL,
    "Tells the operator that a program or package is missing in this environment, which you cannot install yourself. "
    "Call it once for each, when a command is not found or an import fails. /app/.dependency-manifest.json lists what "
    "there is.",
    _SCHEMA,
    annotations=ToolAnnotations(readOnlyHint=True),
)
async def _report(given: dict[str, Any]) -> dict[str, Any]:
    wrong = missing_dependency.problem(given)
    if wrong is not None:
        return {"content": [{"type": "text", "text": f"Not reported: {wrong}."}], "is_error": True}
    answer = (
        f"A human was informed that {given['name']} is missing. This session will not get it: go on without it, or end "
        "your turn and say what has to wait for it."
    )
    return {"content": [{"type": "text", "text": answer}]}


def report_server() -> McpSdkServerConfig:
    """For the option `mcp_servers`, under the name missing.SERVER."""
    return create_sdk_mcp_server(missing_dependency.SERVER, tools=[_report])
