"""The panel next to the service: losing it affects no session, it receives no secret, and it admits only known users."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from claude_hitl_template.cli.host.panel import SERVER, SPOOLER
from claude_hitl_template.cli.host.processes import family
from tests.integration.harness import KEY, PATIENCE_S, Conversation, Service, kill, wait_for

pytestmark = pytest.mark.slow

PROMPT = "Write hello.txt with a greeting"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with a panel and hot calls, and with a key for the model that must not appear anywhere."""
    one = Service(tmp_path_factory.mktemp("panel"), {"HITL_PANEL": "true", "HITL_HOT_WINDOW_S": "3600"})
    try:
        one.up()
        yield one
    finally:
        one.down()


def secret(service: Service, name: str) -> str:
    return (service.root / "data" / "secrets" / name).read_text().strip()


def panel_url(service: Service) -> str:
    return f"http://127.0.0.1:{service.environment['HITL_PANEL_PORT']}"


@pytest.fixture
def browser(service: Service) -> Iterator[httpx.Client]:
    """A client that is logged in to the panel as its admin."""
    own = {"origin": panel_url(service)}
    with httpx.Client(base_url=panel_url(service), headers=own, timeout=PATIENCE_S) as client:
        body = {"name": "admin", "password": secret(service, "panel-password")}
        assert client.post("/api/login", json=body).status_code == 200
        yield client


def kodosumi(service: Service) -> dict[str, psutil.Process]:
    """Returns the processes of spooler and panel, by name."""
    found: dict[str, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            line, folder = process.cmdline(), process.cwd()
        except (psutil.Error, FileNotFoundError):  # it ended meanwhile
            continue
        if {SPOOLER, SERVER}.isdisjoint(line) or not Path(folder).is_relative_to(service.root):
            continue
        found["panel" if SERVER in line else "spooler"] = process
    return found


def entries(client: httpx.Client) -> list[Any]:
    return client.get("/flow", params={"pp": 50}).json()["items"]


def waiting(service: Service) -> tuple[Conversation, str]:
    session = service.start_session(PROMPT)
    return session, session.until_asked()


def test_the_panel_lists_the_entries_and_finds_its_spooler(service: Service, browser: httpx.Client) -> None:
    assert [e for e in entries(browser) if e["base_url"].startswith(service.base)]
    assert browser.get("/health").json()["spooler_status"]["pid"] == kodosumi(service)["spooler"].pid
    told = service.hitl("status").stdout
    assert "service    healthy" in told
    assert "problem" not in told
    assert secret(service, "panel-password") not in told
    assert secret(service, "panel-password") in service.hitl("status", "--show-secrets").stdout


def test_no_secret_is_in_a_command_line_an_environment_a_log_or_a_file_of_ray(
    service: Service, browser: httpx.Client
) -> None:
    assert browser.get(entries(browser)[0]["url"]).status_code == 200
    secrets = {
        name: secret(service, name)
        for name in ("panel-secret", "panel-password", "signing", "api-key", "ray-token")
    }
    assert secrets["api-key"] == KEY
    secrets["login"] = browser.cookies["kodosumi_jwt"]
    running = [*family(service.head()), *kodosumi(service).values()]
    assert len(running) > 8
    places = {f"process {p.pid}": "\n".join([*p.cmdline(), *p.environ().values()]) for p in running}
    for path in ("/api/v0/runtime_envs", "/api/v0/actors?detail=1", "/api/serve/applications/", "/api/jobs/"):
        places[path] = service.dashboard(path).text
    ray = Path(service.hitl("status", "--json").stdout.split('"temp_dir": "')[1].split('"')[0])
    for path in [*(service.root / "data" / "logs").iterdir(), *(ray / "session_latest" / "logs").rglob("*")]:
        if path.is_file():
            places[str(path)] = path.read_text(errors="replace")
    found = [
        (place, name) for place, text in places.items() for name, value in secrets.items() if value in text
    ]
    assert found == []


def test_a_session_does_not_notice_that_panel_and_spooler_are_killed(service: Service) -> None:
    session, call = waiting(service)
    cli = service.cli_of(session).pid
    for process in kodosumi(service).values():
        kill(process)
    wait_for("both to be gone", lambda: not kodosumi(service) or None)
    assert service.cli_of(session).pid == cli
    session.decide(call)
    assert session.until_idle() == {"type": "end_turn"}
    assert (session.workspace / "hello.txt").exists()
    assert "the spooler does not run" in service.hitl("status").stdout
    service.up()
    assert set(kodosumi(service)) == {"spooler", "panel"}


@pytest.mark.parametrize("name", ["spooler", "panel"])
def test_what_was_killed_is_started_again_alone(service: Service, browser: httpx.Client, name: str) -> None:
    before, ingress = kodosumi(service), service.replica("Ingress").pid
    kill(before[name])
    done = service.hitl("up")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"started the \w+|deployed|restarted|started Ray", done.stderr) == [
        f"started the {name}"
    ]
    after = kodosumi(service)
    (other,) = {"spooler", "panel"} - {name}
    assert after[other].pid == before[other].pid
    assert after[name].pid != before[name].pid
    assert service.replica("Ingress").pid == ingress
    assert entries(browser)
    assert "problem" not in service.hitl("status").stdout


def test_the_serve_port_lets_in_who_is_logged_in_to_the_panel_only(
    service: Service, browser: httpx.Client
) -> None:
    entry = entries(browser)[0]["base_url"]
    role = browser.get("/role/admin").json()["id"]
    assert httpx.get(entry).status_code == 401
    assert httpx.get(entry, headers={"x-kodosumi_user": role}).status_code == 401
    assert httpx.get(entry, cookies={"kodosumi_jwt": browser.cookies["kodosumi_jwt"][:-2]}).status_code == 401
    assert httpx.get(entry, cookies=dict(browser.cookies)).status_code == 200


def test_a_role_that_is_switched_off_is_not_let_in(service: Service, browser: httpx.Client) -> None:
    made = {"name": "ann", "email": "ann@example.org", "password": "a-password-of-ann", "operator": False}
    role = browser.post("/role", json=made).json()
    login = {"name": "ann", "password": made["password"]}
    token = httpx.post(panel_url(service) + "/api/login", json=login).json()["KODOSUMI_API_KEY"]
    assert browser.put(f"/role/{role['id']}", json={"active": False}).status_code == 200
    answer = httpx.get(entries(browser)[0]["base_url"], cookies={"kodosumi_jwt": token})
    assert (answer.status_code, "not active" in answer.text) == (401, True)


def test_the_rest_api_streams_beside_kodosumis_routes(service: Service) -> None:
    session, call = waiting(service)
    session.decide(call)
    session.until_idle()
    assert [event["id"] for _, event in session.stream()] == [event["id"] for event in session.events()]


def started(service: Service, browser: httpx.Client) -> tuple[str, str, list[str]]:
    """A conversation started over the panel's API, as a program would: its flow, the waiting lock, and its call."""
    (start,) = [e["url"] for e in entries(browser) if e["url"].rstrip("/").endswith("/start")]
    begun = browser.post(start, json={"prompt": PROMPT}).json()
    assert "result" in begun, begun.get("errors", begun)
    flow = begun["result"]

    def lock() -> str | None:
        asked = browser.get(f"/outputs/status/{flow}")
        found = asked.json().get("locks") if asked.status_code == 200 else None
        return found[0] if found and "Allow and remember" in form(browser, flow, found[0]) else None

    lock_id = wait_for("the flow's lock", lock)
    names = re.findall(r'name="(appr_\w+)\.do"', form(browser, flow, lock_id))
    return flow, lock_id, names


def form(browser: httpx.Client, flow: str, lock_id: str) -> str:
    answer = browser.get(f"/lock/{flow}/{lock_id}")
    return "".join(element.get("text", "") for element in answer.json()) if answer.status_code == 200 else ""


def test_a_program_decides_through_the_lock_itself_and_hears_who_did(
    service: Service, browser: httpx.Client
) -> None:
    flow, lock_id, [name, *_] = started(service, browser)
    wrong = browser.post(f"/lock/{flow}/{lock_id}", json={f"{name}.do": "edit", f"{name}.input": "{no json"})
    assert "Nothing was decided" in str(wrong.json()["errors"])
    said = {f"{name}.do": "deny", f"{name}.reason": "not now"}
    assert browser.post(f"/lock/{flow}/{lock_id}", json=said).json()["result"] == {"decided_by": "admin"}
    late = browser.post(f"/lock/{flow}/{lock_id}", json={f"{name}.do": "allow"})
    assert "result" not in late.json()  # Kodosumi has released the lock, or ours says who decided what


def test_a_lock_outlives_the_replicas_behind_it(service: Service, browser: httpx.Client) -> None:
    flow, lock_id, [name, *_] = started(service, browser)
    for deployment in ("Ingress", "Ledger"):
        kill(service.replica(deployment))

    def decided() -> bool | None:
        answer = browser.post(f"/lock/{flow}/{lock_id}", json={f"{name}.do": "allow"})
        return (answer.status_code == 200 and answer.json().get("result") == {"decided_by": "admin"}) or None

    wait_for("the decision to be taken", decided)
    wait_for("the flow to ask for the next message", lambda: "Send" in form_of_any(browser, flow) or None)


def form_of_any(browser: httpx.Client, flow: str) -> str:
    locks = browser.get(f"/outputs/status/{flow}").json().get("locks") or []
    return "".join(form(browser, flow, lock_id) for lock_id in locks)


def test_going_down_leaves_neither_panel_nor_spooler(service: Service) -> None:
    service.down()
    assert kodosumi(service) == {}
