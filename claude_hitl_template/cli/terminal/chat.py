"""`hitl demo` and `hitl chat`: a session in this terminal."""

import shlex
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.text import Text

from claude_hitl_template import code_version
from claude_hitl_template.cli.client import Client
from claude_hitl_template.cli.common import console, say, service_client, step
from claude_hitl_template.cli.host import panel, run_record, service
from claude_hitl_template.cli.program import NAME
from claude_hitl_template.cli.run import INTERRUPTED
from claude_hitl_template.cli.terminal import ids
from claude_hitl_template.cli.terminal.conversation import (
    MAX_LISTED_FILES,
    OFFLINE_NOTE,
    Conversation,
    End,
    Terminal,
    UserLeft,
    ask_user,
    session_summary,
)
from claude_hitl_template.cli.terminal.dialogue import Body, Decider, scripted
from claude_hitl_template.cli.terminal.render import approval_view, event_lines
from claude_hitl_template.config.secret_files import (
    ADMIN,
    API_KEY,
    SecretFiles,
    forget_model_key,
    prepare,
    prepare_panel,
    read_model_key,
)
from claude_hitl_template.config.settings import Settings, variable
from claude_hitl_template.presentation.terminal import shown

RECONNECT_S = 120.0  # a service that is restarted answers again well within this time
DEMO_PROMPT = "Write hello.txt with a greeting"
RECENT_EVENTS = 12
OFFLINE = "offline"
SESSION = "sesn_"  # what the id of a session begins with
HELP = """\
/quit    ends the chat, not the session (so do Ctrl-D and, at this prompt, Ctrl-C)
/help    shows this
Ctrl-C   while the agent works: stops the turn
Everything else goes to the agent as it is typed."""
STATUSES = (
    "Exit status: 0 the turn ended, with or without denials; 3 it ended with an error; 4 calls still wait; "
    "1 the service cannot be started or reached; 2 wrong usage; 130 Ctrl-C while the agent works."
)

PROMPTS = (
    "Write hello.txt with a greeting",
    "Read hello.txt",
    "Run a command",
    "Do three things at once",
    "Ask me a question",
    "Make a plan first",
    "Let a subagent do it",
)
OFFLINE_PROMPTS = "Without a model's key a script answers. It has something to do for: " + "; ".join(
    f'"{prompt}"' for prompt in PROMPTS
)
DEMO_EPILOG = f"{OFFLINE_PROMPTS}\n\n{STATUSES}"


class Answer(StrEnum):
    ALLOW = "allow"
    DENY = "deny"


def demo(
    prompt: Annotated[str, typer.Option(help="What the agent is asked to do.")] = DEMO_PROMPT,
    answer: Annotated[
        Answer | None,
        typer.Option(help="Decide every call this way instead of asking; a question gets its first option."),
    ] = None,
    deny_message: Annotated[
        str | None, typer.Option(help="The reason that the agent gets, with --answer deny.")
    ] = None,
) -> None:
    """Shows the product: starts the service if needed, gives an agent a task, and asks you before a gated call runs."""
    if deny_message is not None and answer is not Answer.DENY:
        raise typer.BadParameter("goes with --answer deny", param_hint="--deny-message")
    settings = Settings.load()
    _ensure_running(settings)
    terminal = Terminal(console())
    decide: Decider = ask_user(terminal)
    if answer is not None:
        decide = _scripted(terminal, answer, deny_message)
    client = Client.open(settings, patience_s=RECONNECT_S, say=say)
    conversation = Conversation(client, _create(client, prompt), terminal, decide, seen=0)
    _introduce(terminal, client, conversation.id)
    end = _run_turn(settings, client, conversation, terminal)
    if settings.serve_url is None:
        typer.echo("\n".join(line for line in (panel_line(settings), export_line(settings)) if line))
    raise typer.Exit(end)


def chat(
    begin: Annotated[
        str | None,
        typer.Argument(
            metavar="[MESSAGE or SESSION]",
            help="The first message of a new session; or the id of a session to continue, or its beginning (sesn_...).",
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="The agent first makes a plan, which you approve.")
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="The model of a new session.")
    ] = None,
) -> None:
    """Chats with an agent: messages, and decisions on what it wants to do.

    /help shows what you can type; everything but /help and /quit goes to the agent. Ctrl-C stops the running turn and
    asks for the next message. At that prompt, Ctrl-C, Ctrl-D or /quit ends the chat, not the session; at a decision,
    Ctrl-C or Ctrl-D ends it, too, and the call keeps waiting.
    """
    continued = begin if begin is not None and begin.startswith(SESSION) and " " not in begin else None
    if continued is not None and (plan or model):
        raise typer.BadParameter("is for a new session only", param_hint="--plan" if plan else "--model")
    with service_client() as client:
        client.get("/v1/version")  # fails at once if the service does not run
    settings, terminal = Settings.load(), Terminal(console())
    with service_client(RECONNECT_S) as client:
        recent, seen = list[dict[str, Any]](), 0
        if continued is None:
            session_id = _create(client, begin, plan=plan, model=model)
        else:
            session_id = ids.session_id(client, continued)
            recent, seen = _recent(client, session_id)
        conversation = Conversation(client, session_id, terminal, ask_user(terminal), seen=seen)
        _introduce(terminal, client, session_id, model)
        for view in map(event_lines, recent):
            if view is not None:
                terminal.show(view)
        asked = begin is not None and continued is None
        raise typer.Exit(converse(settings, client, conversation, terminal, asked=asked))


def panel_line(settings: Settings) -> str:
    """Where the panel is, and how to sign in; "" where there is none."""
    how = f"sign in as {panel.ADMIN}; {NAME} status --show-secrets shows the password"
    return f"Panel      {settings.panel_url}   ({how})" if settings.panel else ""


def pages_line(settings: Settings) -> str:
    """Where people decide in a browser, and how to sign in for the first time."""
    how = f"sign in as {ADMIN}; {NAME} status --show-secrets shows the first password"
    return f"Inbox      {settings.pages_url}/inbox   ({how})"


def export_line(settings: Settings) -> str:
    """A line to copy into a shell in which a client of the service is to run. The key stays in its file."""
    key = shlex.quote(str(settings.secrets_dir / API_KEY))
    return f'Clients    export HITL_URL={settings.base_url} HITL_API_KEY="$(cat {key})"'


def ensure_up(settings: Settings, *, make_postgres: bool = False) -> str | None:
    """Does what `hitl up` does.

    Returns:
        The first API key if it was created just now.

    Raises:
        ConfigError: The service cannot be started with these settings.
    """
    with run_record.alone(settings, step):
        run_record.check_ours(settings)  # before anything in the data folder changes
        return _bring_up(settings, make_postgres=make_postgres)


def _bring_up(settings: Settings, *, make_postgres: bool) -> str | None:
    settings.floor()  # an invalid policy file stops the start
    prepared = prepare(settings)
    if settings.anthropic_api_key is None and forget_model_key(settings) and read_model_key(settings) is None:
        say("ANTHROPIC_API_KEY is no longer set: from now on the offline model answers in every session")
    if (
        settings.anthropic_api_key is not None
        and "ANTHROPIC_API_KEY" in SecretFiles(settings.secrets_dir).names()
    ):
        say(
            "ANTHROPIC_API_KEY is set, but the one that was sent is used: ./hitl secrets remove ANTHROPIC_API_KEY"
        )
    if settings.panel:
        prepare_panel(settings)
    done = service.start(settings, step, make_postgres=make_postgres)
    if done:
        say("; ".join(done))
    if prepared.replaced_key:
        say("HITL_API_KEY has changed: the new key sees the same sessions, and the old one stops working")
    return prepared.made_key


def _ensure_running(settings: Settings) -> None:
    """Starts the service unless it runs. A running one is only changed if a model key was added to the settings."""
    found = service.healthy(settings)
    if found is None or service.ray_process(settings) is None:
        ensure_up(settings)
        return
    changed = service.changed_settings(settings)
    if variable("anthropic_api_key") in changed and settings.anthropic_api_key is not None:
        ensure_up(settings)
    elif other := run_record.other_checkout(settings):
        say(f"the service was started by another checkout, {other}, and runs its code")
    elif changed:
        say(f"the service runs with other settings than these: {', '.join(changed)}; ./hitl up applies them")
    elif found.get("code") != code_version() and not found.get("package"):
        say("the service is older than the working tree; ./hitl up deploys it")


def _scripted(terminal: Terminal, answer: Answer, deny_message: str | None) -> Decider:
    def decide(approval: Mapping[str, Any]) -> Body:
        terminal.show(approval_view(approval))
        return scripted(approval, answer.value, deny_message)

    return decide


def _create(
    client: Client, prompt: str | None = None, *, plan: bool = False, model: str | None = None
) -> str:
    """Creates a session of the default agent. Returns its id."""
    agent = {**({"permission_mode": "plan"} if plan else {}), **({"model": model} if model else {})}
    body: dict[str, Any] = {"agent": "default", "environment_id": "default"}
    if agent:
        body["agent"] = {"type": "agent_with_overrides", "id": "default", **agent}
    if prompt is not None:
        body["title"] = prompt[:80]
        body["initial_events"] = [{"type": "user.message", "content": [{"type": "text", "text": prompt}]}]
    return str(client.post("/v1/sessions", body)["id"])


def _introduce(terminal: Terminal, client: Client, session_id: str, model: str | None = None) -> None:
    default = client.get("/v1/version")["model"]
    named = OFFLINE_NOTE if default == OFFLINE else model or default
    terminal.show(Text.assemble(("session    ", "bold"), session_id))
    terminal.show(Text.assemble(("model      ", "bold"), shown(named)))


def _show_summary(settings: Settings, client: Client, terminal: Terminal, session_id: str) -> None:
    session = client.get(f"/v1/sessions/{session_id}")
    page = client.get(f"/v1/sessions/{session_id}/workspace", limit=MAX_LISTED_FILES + 1)
    saved = [str(file["path"]) for file in page["data"]]
    for line in session_summary(settings, session, saved, offline=_is_offline(client)):
        terminal.show(line)


def _is_offline(client: Client) -> bool:
    return client.get("/v1/version")["model"] == OFFLINE


def _recent(client: Client, session_id: str) -> tuple[list[dict[str, Any]], int]:
    """The last events to show, and the number of the last one: events are numbered from 1 without gaps."""
    events = list(client.pages(f"/v1/sessions/{session_id}/events"))
    visible = [event for event in events if event_lines(event) is not None]
    return visible[-RECENT_EVENTS:], len(events)


def _run_turn(settings: Settings, client: Client, conversation: Conversation, terminal: Terminal) -> int:
    try:
        end = conversation.until_idle()
    except UserLeft:
        return _left_waiting(terminal, conversation.id)
    except KeyboardInterrupt:
        terminal.show(_how_to_continue("left; the agent continues to work", conversation.id))
        return INTERRUPTED
    _show_summary(settings, client, terminal, conversation.id)
    return end


def _left_waiting(terminal: Terminal, session_id: str) -> End:
    terminal.show(_how_to_continue("calls still wait for a decision, without a time limit", session_id))
    return End.LEFT


def _how_to_continue(what: str, session_id: str) -> Text:
    return Text(f"{what}. Continue with: {NAME} chat {session_id}", style="yellow")


def converse(
    settings: Settings, client: Client, conversation: Conversation, terminal: Terminal, *, asked: bool
) -> int:
    """Asks for messages and follows the turns until the user leaves.

    Args:
        settings: Of this machine.
        client: For the service that has the session.
        conversation: The session at this terminal.
        terminal: Where the user is asked.
        asked: Whether the first message is sent already, and none of its events is shown.

    Returns:
        The exit status.
    """
    session = client.get(f"/v1/sessions/{conversation.id}")
    waits = not asked and (session["stop_reason"] or {}).get("type") == "requires_action"
    busy, end = asked or waits or session["status"] != "idle", End.DONE
    if session["status"] == "terminated":
        terminal.show(
            Text("the session is archived: it can be read, but takes no more messages", style="yellow")
        )
        _show_summary(settings, client, terminal, conversation.id)
        return end
    try:
        while True:
            if busy:
                end = _interruptible_turn(conversation, waits)
            text = _next_message(terminal)
            if text is None:
                break
            busy, waits = True, False
            conversation.send(text)
    except UserLeft:
        return _left_waiting(terminal, conversation.id)
    except _StillStopping:
        terminal.show(_how_to_continue("left while the turn is being stopped", conversation.id))
        return INTERRUPTED
    _show_summary(settings, client, terminal, conversation.id)
    return end


def _next_message(terminal: Terminal) -> str | None:
    """What the user wants to say; None if the user leaves."""
    while True:
        try:
            text = terminal.ask("you > ").strip()
        except (EOFError, KeyboardInterrupt):
            terminal.show("")  # ends the line of the prompt
            return None
        if text == "/quit":
            return None
        if text == "/help":
            terminal.show(HELP)
        elif text:
            return text


class _StillStopping(Exception):
    """The user left by a second Ctrl-C before the turn that the first one stopped had ended."""


def _interruptible_turn(conversation: Conversation, waits: bool) -> End:
    """One turn; the first Ctrl-C interrupts it. Raises UserLeft, and _StillStopping at the second one."""
    try:
        return conversation.decide_and_follow() if waits else conversation.until_idle()
    except KeyboardInterrupt:
        say("stopping the turn (Ctrl-C again leaves without waiting)")
    try:
        conversation.interrupt()
        return conversation.until_idle()
    except KeyboardInterrupt:
        raise _StillStopping from None
