"""Claude Code's tools by what they do, and the fields of their inputs that policies read."""

# They ask the human themselves: to allow them unseen would answer in the human's name.
QUESTIONS = frozenset({"AskUserQuestion", "ExitPlanMode"})

# They touch nothing but the session's own state. Not among them: what stops something (KillShell, TaskStop),
# reaches other sessions (SendMessage, ListAgents), schedules (CronCreate, ScheduleWakeup) or checks out
# (EnterWorktree).
HARMLESS = frozenset(
    {"TodoWrite", "TaskCreate", "TaskUpdate", "TaskList", "TaskGet", "TaskOutput", "BashOutput", "ToolSearch"}
    | {"EnterPlanMode", "StructuredOutput"}
)
SPAWNING = frozenset({"Agent", "Task"})
# A subagent's calls come to the same gate; other fields (`isolation`, `mode`, `cwd`) may lead past it.
SPAWN_FIELDS = frozenset({"description", "prompt", "subagent_type", "model", "effort", "run_in_background"})

READING = frozenset({"Read", "Glob", "Grep", "LS", "NotebookRead"})
EDITING = frozenset({"Edit", "Write", "MultiEdit", "NotebookEdit"})
SEARCHING = frozenset({"Glob", "Grep", "LS"})
NETWORK = "Network"  # not a tool of the CLI: our name for a request to reach a host
_OTHERS = frozenset({NETWORK, "Bash", "WebFetch", "WebSearch", "Skill", "KillShell", "TaskStop", "Monitor"})
KNOWN = QUESTIONS | HARMLESS | SPAWNING | READING | EDITING | _OTHERS

PATH_FIELD = {
    **dict.fromkeys(("Read", "Edit", "Write", "MultiEdit"), "file_path"),
    **dict.fromkeys(("NotebookRead", "NotebookEdit"), "notebook_path"),
    **dict.fromkeys(("Glob", "Grep", "LS"), "path"),
}
REQUIRED_TEXT: dict[str, tuple[str, ...]] = {
    **{tool: (field,) for tool, field in PATH_FIELD.items()},
    **dict.fromkeys(("Glob", "Grep"), ("pattern",)),
    "Bash": ("command",),
    "WebFetch": ("url",),
    "WebSearch": ("query",),
    NETWORK: ("host",),
}
OPTIONAL_TEXT = {"Glob": ("path",), "Grep": ("path", "glob")}

# As in Claude Code: a rule for the first also speaks of the others.
FAMILIES = {"Read": READING, "Edit": EDITING, "Agent": SPAWNING, "Task": SPAWNING}
# Monitor runs its command in the same shell; a rule that allows Bash was not written with it in mind.
GUARDED_FAMILIES = {**FAMILIES, "Bash": frozenset({"Bash", "Monitor"})}

# Files here may later run code or change the rules without a question: hooks, settings, servers.
PROTECTED = frozenset({".claude", ".git", ".mcp.json"})
