"""Sessions in rootless containers: conversations work as without containers, and the additional promises hold."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.acceptance import probe
from tests.acceptance.browser import Panel
from tests.acceptance.worker import ROOT, USER, Worker, as_user, home, require_containers, settle
from tests.contract.test_probes import outer_address
from tests.integration.harness import KEY, Conversation, command_line, kill, script, wait_for

pytestmark = pytest.mark.slow

MIB = 1024**2
# Another team's project layer, which is built on top of the image's own; only the build can write there.
LAYERS = (
    'RUN printf \'%s\' \'{"env": {"TEAM": "other"}}\' > /app/workspace/.claude/settings.json',
    "RUN echo 'Call everyone Ada.' > /app/workspace/CLAUDE.md",
)
CANARY = "canary-5b0c1f-sings"
BROKEN = "broken"  # while this file is there, podman does not work for Ray's user


@pytest.fixture(scope="module")
def image() -> str:
    """The image as `./hitl image build` makes it on this machine, in the storage of Ray's user."""
    require_containers()
    given = os.environ.get("HITL_TEST_IMAGE")  # an existing image, to save time during work on these tests
    if given:
        return given
    done = as_root(
        "image", "build", "--from-host", "--for-user", USER, "--name", "localhost/claude-hitl-worker"
    )
    return next(
        line.partition("=")[2] for line in done.splitlines() if line.startswith("CONTAINER_IMAGE_URI=")
    )


def as_root(*args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "claude_hitl_template.cli", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def derived(image: str, name: str, *lines: str) -> str:
    """Builds an image on top of another one, as Ray's user."""
    with tempfile.TemporaryDirectory(dir=home()) as folder:
        (Path(folder) / "Dockerfile").write_text("\n".join([f"FROM {image}", *lines]))
        shutil.chown(folder, USER, USER)
        as_user("podman", "build", "--quiet", "--tag", f"localhost/{name}:1", folder)
    return f"localhost/{name}:1"


@pytest.fixture(scope="module")
def service(image: str) -> Iterator[Worker]:
    folder = Path(tempfile.mkdtemp(prefix="hitl-test-", dir=home()))
    folder.chmod(0o755)
    raylet_folder = Path(f"/tmp/hitl-test-{uuid.uuid4().hex[:6]}")
    shared = raylet_folder / "shared"  # a sandbox has what is there when it is made
    shared.mkdir(parents=True)
    for place in (raylet_folder, shared):
        shutil.chown(place, USER, USER)
    python = settle(folder)
    # Stands before podman while the service runs, so that a test can take podman away.
    (folder / "tools").mkdir()
    podman = folder / "tools/podman"
    podman.write_text(
        f'#!/bin/sh\n[ -e {folder}/{BROKEN} ] && exit 127\nexec {shutil.which("podman")} "$@"\n'
    )
    podman.chmod(0o755)
    environments = {
        "other": {"image": derived(image, "hitl-test-other", "USER root", *LAYERS, "USER ray")},
        "old": {"image": derived(image, "hitl-test-old", "LABEL org.claude-hitl.ray=2.1.0")},
        "entry": {"image": derived(image, "hitl-test-entry", 'ENTRYPOINT ["/bin/true"]')},
        "bare": {"image": derived("scratch", "hitl-test-bare", "LABEL nothing=here")},
        "gone": {"image": "localhost/hitl-test-gone:1"},
        "local": {},
    }
    one = Worker(
        folder,
        {
            "HOME": str(home()),
            "LD_LIBRARY_PATH": str(folder / "python/lib"),
            "PATH": f"{folder}/tools:{os.environ['PATH']}",
            "HITL_HOME": str(folder),
            "HITL_RAY_TEMP_DIR": str(raylet_folder),
            "HITL_SANDBOX_WRITE": str(shared),
            "HITL_API_KEY": KEY,
            "CONTAINER_IMAGE_URI": image,
            "HITL_ENVIRONMENTS": json.dumps(environments),
            "HITL_HOT_WINDOW_S": "2",
            "HITL_IDLE_TIMEOUT_S": "2",
            "HITL_SPARE_OWNERS": "0",
            "HITL_SESSION_MEMORY_BYTES": str(700 * MIB),
            "HITL_SESSION_PROCESSES": "60",
            "HITL_PANEL": "true",
            "HITL_START_TIMEOUT_S": "110",  # a busy machine is not a failure
        },
        ("runuser", "-u", USER, "--", str(python), "-m", "claude_hitl_template.cli"),
        raylet_folder,
    )
    try:
        one.up()
        yield one
    finally:
        one.down()
        as_user("podman", "system", "migrate")  # ends the process that holds the user's namespace
        try:
            wait_for("its processes to end", lambda: not [*filter(command_line, one.processes(""))])
        finally:
            shutil.rmtree(folder)
            shutil.rmtree(raylet_folder, ignore_errors=True)


def said(session: Conversation) -> str:
    """Returns the model's last message."""
    return session.events("agent.message")[-1]["content"][0]["text"]


def decide_all(session: Conversation, result: str = "allow") -> None:
    """Decides on all calls until none waits any more."""
    while (stop := session.until_idle())["type"] == "requires_action":
        for event_id in stop["event_ids"]:
            session.decide(event_id, result)
        wait_for("the decisions to count", lambda: session.get()["stop_reason"] != stop or None)
    assert stop["type"] == "end_turn", session.events("session.error")


# -- the conversation


def test_the_panel_says_what_a_session_runs_in_and_offers_what_it_made(panel: Panel, image: str):
    panel.start(script("echo here > made.txt"))
    panel.sees("Waiting for you: one call waits for a decision")
    shown = panel.window().inner_text()
    assert image in shown
    assert f"Ray {version('ray')}, Python 3.12" in shown
    panel.window().locator("dd").first.scroll_into_view_if_needed()
    panel.picture("container")
    panel.open_form()
    panel.decide("Allow")
    panel.rests()
    with panel.page.expect_download() as got:
        panel.window().get_by_role("link", name="made.txt").click()
    assert got.value.path().read_text() == "here\n"


def test_a_call_that_was_allowed_runs_and_one_that_was_denied_does_not(service: Worker):
    allowed, denied = (service.start_session(script("id -u; pwd; echo $HOME")) for _ in range(2))
    allowed.decide(allowed.until_asked())
    denied.decide(denied.until_asked(), "deny", deny_message="not here")
    assert allowed.until_idle()["type"] == denied.until_idle()["type"] == "end_turn"
    assert said(allowed).split()[1:] == [as_user("id", "-u").strip(), "/app/workspace", "/app/template_user"]
    assert "not here" in said(denied)
    assert [a["state"] for a in denied.approvals()] == ["denied"]


def test_what_was_edited_is_what_runs(service: Worker):
    session = service.start_session(script("echo proposed"))
    session.decide(session.until_asked(), updated_input={"command": "echo edited"})
    assert session.until_idle()["type"] == "end_turn"
    assert said(session) == "Done: edited"


def test_a_batch_is_asked_at_once_and_each_call_runs_once(service: Worker):
    session = service.start_session("Do three things at once")
    assert len(session.until_idle()["event_ids"]) == 3
    decide_all(session)
    assert [a["state"] for a in session.approvals()] == ["succeeded"] * 3


def test_a_question_is_answered(service: Worker):
    session = service.start_session("Ask me a question")
    answers = {"Which colour should the report have?": "Blue", "Which formats do you need?": ["PDF", "CSV"]}
    session.decide(session.until_asked(), answers=answers)
    assert session.until_idle()["type"] == "end_turn"
    assert "Blue" in said(session)


def test_a_plan_is_accepted_and_carried_out(service: Worker):
    session = service.start_session("Make a plan first")
    decide_all(session)
    assert "The plan is carried out" in said(session)


def test_an_interrupt_ends_the_turn_and_the_call_never_runs(service: Worker):
    session = service.start_session(script("echo ran"))
    session.until_asked()
    session.interrupt()
    wait_for("the interrupt", lambda: session.approvals()[0]["state"] == "superseded" or None)
    assert session.until_idle()["type"] == "end_turn"
    assert "ran" not in str([e["content"] for e in session.events("agent.tool_result")])


# -- containers


def test_each_awake_session_has_a_container_and_a_parked_one_has_none(service: Worker):
    before = {c["Id"] for c in service.containers()}
    sessions = [service.start_session(script("touch here; sleep 600")) for _ in range(2)]
    for session in sessions:
        session.decide(session.until_asked())
        wait_for("the command to run", lambda one=session: service.processes("sleep 600") or None)
    ours = [service.container_of(session) for session in sessions]
    assert len({*ours}) == 2
    assert {c["Id"] for c in service.containers()} - before == {*ours}
    for session in sessions:
        session.interrupt()
        session.until_parked()
    wait_for("the containers to end", lambda: not {*ours} & {c["Id"] for c in service.containers()} or None)
    assert not service.processes("sleep 600")


def test_a_file_is_there_after_parking_in_a_new_container_and_nothing_of_the_old_one_is(service: Worker):
    session = service.start_session(
        script("mkdir -p a/b; echo kept > a/b/c; echo more > /tmp/elsewhere", "cat a/b/c; ls /tmp")
    )
    first = session.until_asked()
    session.decide(first)
    second = wait_for(
        "the next call",
        lambda: (session.until_idle().get("event_ids") or [first])[0] != first and session.until_asked(),
    )
    session.until_parked()
    wait_for("its container to be removed", lambda: not service.containers() or None)
    layers = home() / ".local/share/containers/storage/overlay"
    assert not list(layers.glob("*/diff/app/workspace/a")), "the old container's storage is gone"
    session.decide(second)
    assert session.until_idle()["type"] == "end_turn"
    assert "kept" in said(session)
    assert "elsewhere" not in said(session)


def test_the_project_level_of_the_image_applies_and_can_not_be_changed_from_inside(service: Worker):
    command = "echo team=$TEAM; echo x > CLAUDE.md || rm -rf .claude || mv .claude gone || echo refused"
    told = {}
    for environment in ("default", "other"):
        session = service.start_session(script(command), environment)
        decide_all(session)
        told[environment] = said(session)
    assert "team=other" in told["other"]
    assert "team=other" not in told["default"]
    assert all(text.rstrip().endswith("refused") for text in told.values())


def test_the_user_level_of_the_image_is_there_after_parking_in_a_new_container(service: Worker):
    """tests/contract/test_layers.py tests what the model receives of it."""
    skill = {"name": "Skill", "input": {"skill": "save-the-work"}}
    steps = [
        {"text": "A command.", "tools": [{"name": "Bash", "input": {"command": "echo first"}}]},
        {"text": "A skill of the image's.", "tools": [skill]},
        {"text": "Done: {tool_result}"},
    ]
    session = service.start_session(f"```scenario\n{json.dumps(steps)}\n```")
    asked = session.until_asked()
    session.until_parked()
    session.decide(asked)
    decide_all(session)
    used = next(e for e in session.events("agent.tool_use") if e["name"] == "Skill")
    (result,) = [e for e in session.events("agent.tool_result") if e["tool_use_id"] == used["id"]]
    assert not result["is_error"]
    assert "save-the-work" in str(result["content"])


def test_what_a_command_leaves_in_the_background_ends_with_the_command(service: Worker):
    """This includes processes that left its process group, session and environment. It happens before the container ends."""
    left = "env -i setsid nohup sh -c 'touch began; sleep 7001' > /dev/null 2>&1 &"
    session = service.start_session(script(f"{left} until [ -e began ]; do sleep 0.1; done; echo left"))
    decide_all(session)
    assert said(session) == "Done: left"
    assert not service.processes("sleep 7001")


def test_two_environments_of_one_service_run_beside_each_other(service: Worker):
    session = service.start_session(script("echo at $(pwd)"), "local")
    decide_all(session)
    assert str(service.root) in said(session)
    listed = {e["id"]: e for e in service.call("GET", "/v1/environments")["data"]}
    assert set(listed) == {"default", "other", "old", "entry", "bare", "gone", "local"}
    known = wait_for(
        "what is in the image", lambda: service.call("GET", "/v1/environments/default")["dependencies"]
    )
    assert any(package.startswith("ray==") for package in known["python"])


# -- bad luck


def podman_kill(service: Worker, session: Conversation) -> None:
    as_user("podman", "kill", service.container_of(session))


STRIKES: dict[str, Callable[[Worker, Conversation], None]] = {
    "the CLI": lambda service, session: kill(service.cli_of(session)),
    "the actor": lambda service, session: kill(service.owner_of(session)),
    "the container": podman_kill,
    "the ledger": lambda service, _: kill(service.replica("Ledger")),
}


@pytest.mark.parametrize("struck", STRIKES)
def test_a_call_runs_and_something_is_killed(service: Worker, struck: str):
    """The call is not repeated, an unknown outcome is shown to a person, and the session goes on."""
    session = service.start_session("Hello")
    session.until_idle()
    place = service.shared(session)
    session.say(
        script(
            f"echo ran >> {place}/journal; for i in $(seq 600); do [ -e {place}/go ] && break; sleep 0.1; done"
        )
    )
    session.decide(session.until_asked())
    wait_for("the command to run", lambda: (place / "journal").exists() or None)
    STRIKES[struck](service, session)
    known = struck == "the ledger"
    if known:
        (place / "go").touch()
    assert session.until_idle()["type"] == "end_turn"
    assert (place / "journal").read_text() == "ran\n"
    assert [a["state"] for a in session.approvals()] == ["succeeded" if known else "unknown"]
    session.say("Hello")
    wait_for("the next turn", lambda: len(session.events("session.usage")) >= 3 or None)
    assert session.until_idle()["type"] == "end_turn"


def test_a_parked_call_survives_the_end_of_everything(service: Worker):
    session = service.start_session(script("echo still here"))
    asked = session.until_asked()
    session.until_parked()
    service.down()
    assert not service.containers()
    service.up()
    session.decide(asked)
    assert session.until_idle()["type"] == "end_turn"
    assert said(session) == "Done: still here"


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ("gone", "hitl-test-gone:1 is not on this machine"),
        ("old", "Ray 2.1.0 in the image"),
        ("entry", "the image has one"),
        ("bare", "was not built by ./hitl image build"),
    ],
)
def test_an_image_that_cannot_be_used_ends_the_turn_with_the_reason(
    service: Worker, environment: str, why: str
):
    session = service.start_session(script("echo never"), environment)
    assert session.until_idle()["type"] == "retries_exhausted"
    (error,) = session.events("session.error")
    assert why in error["error"]["message"]
    assert "Fix:" in error["error"]["message"]


def test_podman_goes_away_and_comes_back_and_the_message_is_taken_up(service: Worker):
    (service.root / BROKEN).touch()
    session = service.start_session(script("echo in the end"))
    try:
        assert session.until_idle()["type"] == "retries_exhausted"
    finally:
        (service.root / BROKEN).unlink()
    assert "podman" in session.events("session.error")[0]["error"]["message"]
    session.say("Hello")
    decide_all(session)
    assert any("in the end" in str(e) for e in session.events("agent.message"))


def test_a_session_that_takes_too_much_memory_is_stopped_and_no_other(service: Worker):
    other = service.start_session(script("sleep 5; echo well"))
    greedy = service.start_session(
        script("python -c 'x = b\"x\" * 900 * 2**20; import time; time.sleep(600)'")
    )
    other.decide(other.until_asked())
    greedy.decide(greedy.until_asked())
    assert greedy.until_idle()["type"] == "retries_exhausted"
    assert "HITL_SESSION_MEMORY_BYTES" in greedy.events("session.error")[-1]["error"]["message"]
    assert [a["state"] for a in greedy.approvals()] == ["unknown"]
    assert other.until_idle()["type"] == "end_turn"
    greedy.say("Hello")
    decide_all(greedy)


def test_a_session_that_starts_too_many_processes_is_stopped(service: Worker):
    session = service.start_session(script("for i in $(seq 80); do sleep 600 & done; wait"))
    session.decide(session.until_asked())
    assert session.until_idle()["type"] == "retries_exhausted"
    assert "HITL_SESSION_PROCESSES" in session.events("session.error")[-1]["error"]["message"]
    wait_for("its processes to end", lambda: not service.processes("sleep 600") or None)


# -- what an approved command reaches


@pytest.mark.parametrize("environment", ["default", "local"])
def test_an_approved_command_reaches_nothing_of_the_service_and_its_machine(
    service: Worker, environment: str
):
    victim = service.start_session(script("echo mine > note; sleep 600"), "local")
    victim.decide(victim.until_asked())
    wait_for("another session's command to run", lambda: service.processes("sleep 600") or None)
    session = service.start_session("Hello", environment)
    session.until_idle()
    place = service.shared(session)
    shutil.copy(probe.__file__, place / "probe.py")
    targets = targets_of(service, victim)
    targets["hostname"] = socket.gethostname()
    (place / "targets.json").write_text(json.dumps(targets))
    session.say(script(f"python3 {place}/probe.py {place}/targets.json; id -u"))
    asked = session.until_asked()
    session.decide(asked)
    wait_for("the probes to end", lambda: results_of(session, asked) or None)
    session.until_idle()
    # Hosts that the probes wanted to reach are asked for, and nothing else is.
    waiting = [a["tool_name"] for a in session.approvals() if a["state"] == "pending"]
    assert set(waiting) <= {"Network"}
    victim.interrupt()
    victim.until_parked()
    *results, user = said(session).splitlines()
    assert user == as_user("id", "-u").strip()
    # That the proxy and the model answer shows that nothing was refused because nothing worked.
    assert results == [
        "Done: the proxy answers",
        f"tried {len(list(probe.attempts(targets)))}",
    ], "\n".join(results)


def results_of(session: Conversation, event_id: str) -> list[Any]:
    return [e for e in session.events("agent.tool_result") if e["tool_use_id"] == event_id]


def targets_of(service: Worker, victim: Conversation) -> dict[str, Any]:
    """Returns this service's real ports, sockets, files, processes and secrets."""
    data, ray = service.root / "data", service.raylet_folder / "session_latest"
    secrets = {path.name: path for path in (data / "secrets").iterdir()}
    owner = service.owner_of(victim)
    files = {
        **secrets,
        "the database": data / "hitl.sqlite3",
        "another session's file": victim.workspace / "note",
        "another session's transcript": next((data / "run").glob(f"{victim.id}-*/config")),
        "the code of the gate": service.root / "checkout/claude_hitl_template/session/gate.py",
        "Ray's sockets": ray / "sockets",
        "Ray's logs": ray / "logs",
        "the containers of others": home() / ".local/share/containers",
    }
    assert [name for name, path in files.items() if not path.exists()] == []
    ports = ("RAY_PORT", "RAY_CLIENT_PORT", "DASHBOARD_PORT", "SERVE_PORT", "PANEL_PORT")
    return {
        "addresses": ["127.0.0.1", "127.0.0.2", outer_address()],
        "ports": {name: int(service.environment[f"HITL_{name}"]) for name in ports},
        "unix": {path.name: str(path) for path in (ray / "sockets").iterdir()},
        "abstract": {},
        "files": {name: str(path) for name, path in files.items()},
        "secrets": [path.read_text().strip() for path in secrets.values()],
        "pids": {
            "the ledger": service.replica("Ledger").pid,
            "Ray's first process": service.head().pid,
            "another session's owner": owner.pid,
        },
    }


# -- secrets


def test_no_secret_and_no_text_of_a_user_is_where_others_look(service: Worker, image: str):
    session = service.start_session(script(f"echo {CANARY}; sleep 20; echo slept"))
    session.decide(session.until_asked())
    wait_for("the command to run", lambda: service.processes("sleep 20") or None)
    secrets = [path.read_text().strip() for path in (service.root / "data/secrets").iterdir()]
    assert KEY in secrets
    hidden = [*secrets, CANARY]
    container = service.container_of(session)
    shown = {
        "podman inspect": as_user("podman", "inspect", container),
        "the image": as_user("podman", "image", "inspect", image)
        + as_user("podman", "history", "--no-trunc", image),
    }
    for listing in ("actors", "workers", "tasks", "runtime_envs", "jobs", "nodes", "objects"):
        shown[listing] = service.dashboard(f"/api/v0/{listing}?detail=true&limit=1000").text
    shown["logical actors"] = service.dashboard("/logical/actors").text
    shown["serve"] = service.dashboard("/api/serve/applications/").text
    assert container in shown["podman inspect"]
    assert image in shown["runtime_envs"]
    for place, text in shown.items():
        assert not [secret for secret in hidden if secret in text], place
    for path in service.raylet_folder.rglob("*"):
        if path.is_file() and path.suffix in (".log", ".out", ".err"):
            text = path.read_text(errors="replace")
            assert not [secret for secret in hidden if secret in text], path
    for process in service.processes(""):
        command = " ".join(process.cmdline())
        # The agent's shell shows the command that a human allowed, as any shell does; it must contain no secret.
        of_the_agent = "claude" in command or "sleep" in command
        assert not [secret for secret in (secrets if of_the_agent else hidden) if secret in command]
        assert not [secret for secret in secrets if secret in " ".join(_environment(process))], command
    decide_all(session)


def _environment(process: psutil.Process) -> list[str]:
    try:
        return list(process.environ().values())
    except psutil.Error:
        return []
