"""Webhooks over REST: registered, sent by the service to a real target, verified by the official SDK, sent again."""

import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

import anthropic
import httpx
import pytest
from standardwebhooks import WebhookVerificationError

from claude_hitl_template.testing.threaded import Threaded, serve_in_thread

KEY = "key-of-alice"
GUIDE = (Path(__file__).parents[2] / "docs" / "notifications.md").read_text()


class Target:
    """An HTTP server that keeps what is posted to it. `status` is what it answers."""

    def __init__(self) -> None:
        self.status, self.posted = 204, Queue[tuple[dict[str, str], str]]()
        target = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"])).decode()
                self.send_response(target.status)
                self.end_headers()
                target.posted.put((dict(self.headers.items()), body))

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"

    def next(self) -> tuple[dict[str, str], str]:
        return self.posted.get(timeout=30)


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    made = Target()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, target: Target) -> Iterator[Threaded]:
    hosts = f"127.0.0.1:{target.server.server_port}"
    folder = tmp_path_factory.mktemp("webhooks")
    with serve_in_thread(folder, keys={"alice": KEY}, driving=False, webhook_private_hosts=hosts) as service:
        yield service


@pytest.fixture(scope="module")
def http(served: Threaded) -> Iterator[httpx.Client]:
    url = f"{served.service.url}/v1"
    with httpx.Client(base_url=url, headers={"x-api-key": KEY}, timeout=30) as client:
        yield client


@pytest.fixture
def sdk() -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(api_key="none") as client:
        yield client


def made(http: httpx.Client, target: Target, *events: str, **more: Any) -> dict[str, Any]:
    body = {"url": target.url, "events": events or ("session.created",), **more}
    return http.post("/webhooks", json=body).raise_for_status().json()


def session(http: httpx.Client) -> str:
    body = {"agent": "default", "environment_id": "default"}
    return http.post("/sessions", json=body).raise_for_status().json()["id"]


def notification(http: httpx.Client, webhook_id: str, state: str) -> dict[str, Any]:
    """The newest one of a webhook, once it has this state."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = http.get("/notifications", params={"channel_id": webhook_id}).raise_for_status().json()
        if found["data"] and found["data"][0]["state"] == state:
            return found["data"][0]
        time.sleep(0.02)
    raise AssertionError(found)


def test_an_event_is_posted_verified_and_parsed_by_the_official_sdk(
    http: httpx.Client, target: Target, sdk: anthropic.Anthropic
):
    webhook = made(http, target)
    session_id = session(http)
    headers, body = target.next()
    event = sdk.beta.webhooks.unwrap(body, headers=headers, key=webhook["secret"])
    assert (event.data.type, event.data.id) == ("session.created", session_id)
    assert event.data.workspace_id == webhook["workspace_id"]
    assert notification(http, webhook["id"], "sent")["attempts"] == 1
    assert http.get(f"/webhooks/{webhook['id']}").json()["state"]["status"] == "active"
    for shown in (f"/webhooks/{webhook['id']}", "/webhooks", "/notifications/channels", "/audit?limit=1000"):
        assert webhook["secret"] not in http.get(shown).raise_for_status().text
    http.delete(f"/webhooks/{webhook['id']}").raise_for_status()


def test_a_refused_event_is_sent_again_by_hand_with_the_same_id(http: httpx.Client, target: Target):
    webhook = made(http, target)
    target.status = 400
    session(http)
    first, _ = target.next()
    sent = notification(http, webhook["id"], "refused")
    assert sent["last_error"] == "HTTP 400"
    target.status = 204
    http.post(f"/notifications/{sent['id']}/redeliver").raise_for_status()
    again, _ = target.next()
    assert again["webhook-id"] == first["webhook-id"]
    assert notification(http, webhook["id"], "sent")["attempts"] == 2
    http.delete(f"/webhooks/{webhook['id']}").raise_for_status()
    assert http.post(f"/notifications/{sent['id']}/redeliver").status_code == 404


def test_a_replaced_secret_signs_from_now_on_and_a_test_is_signed_by_both(
    http: httpx.Client, target: Target, sdk: anthropic.Anthropic
):
    webhook = made(http, target)
    path, key = f"/webhooks/{webhook['id']}", {"Idempotency-Key": "rotate"}
    rotated = http.post(f"{path}/rotate", headers=key).raise_for_status().json()
    assert http.post(f"{path}/rotate", headers=key).json()["secret"] == rotated["secret"] != webhook["secret"]
    http.post(f"{path}/test").raise_for_status()
    headers, body = target.next()
    for secret in (webhook["secret"], rotated["secret"]):
        assert sdk.beta.webhooks.unwrap(body, headers=headers, key=secret).data.type == "test"
    with pytest.raises(WebhookVerificationError):
        sdk.beta.webhooks.unwrap(body + " ", headers=headers, key=rotated["secret"])
    http.delete(path).raise_for_status()


def test_the_same_request_again_registers_nothing_and_has_the_same_secret(http: httpx.Client, target: Target):
    body, key = {"url": target.url, "events": ["session.deleted"]}, {"Idempotency-Key": "once"}
    first, again = (http.post("/webhooks", json=body, headers=key).json() for _ in range(2))
    assert first == again
    assert len(http.get("/webhooks").json()["data"]) == 1
    other = http.post("/webhooks", json={**body, "name": "other"}, headers=key)
    assert other.status_code == 409
    http.delete(f"/webhooks/{first['id']}").raise_for_status()


def test_nothing_is_posted_while_a_webhook_is_off_or_of_events_that_it_does_not_want(
    http: httpx.Client, target: Target
):
    webhook = made(http, target)
    path = f"/webhooks/{webhook['id']}"
    off = http.post(path, json={"enabled": False}).raise_for_status().json()
    assert off["enabled"] is False
    session(http)
    changed = {"enabled": True, "events": ["session.deleted"], "name": "n", "min_severity": "high"}
    on = http.post(path, json=changed).raise_for_status().json()
    assert {name: on[name] for name in changed} == changed
    deleted = session(http)
    http.delete(f"/sessions/{deleted}").raise_for_status()
    _, body = target.next()
    assert '"session.deleted"' in body
    assert target.posted.empty()
    http.delete(path).raise_for_status()


@pytest.mark.skipif(any(shutil.which(one) is None for one in ("bash", "curl")), reason="needs bash, curl")
def test_the_guides_commands_register_a_webhook_and_its_code_reads_an_event(
    served: Threaded, http: httpx.Client, target: Target, capsys: pytest.CaptureFixture[str]
):
    [register], [code] = (
        re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
        for language in ("bash", "python")
    )
    environment = {**os.environ, "HITL_URL": served.service.url, "HITL_API_KEY": KEY}
    command = register.replace("https://hooks.example.org/claude", target.url)
    done = subprocess.run(["bash", "-ec", command], env=environment, capture_output=True, check=True)
    webhook = json.loads(done.stdout)
    http.post(f"/webhooks/{webhook['id']}/test").raise_for_status()
    headers, body = target.next()
    code = code.replace("anthropic.Anthropic()", 'anthropic.Anthropic(api_key="none")')
    exec(code, {"body": body, "headers": headers, "secret": webhook["secret"]})
    assert f"test {webhook['id']}" in capsys.readouterr().out
    http.delete(f"/webhooks/{webhook['id']}").raise_for_status()


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"events": ["session.created"]}, "url"),
        ({"url": "http://hooks.example.org/", "events": ["session.created"]}, "url"),
        ({"url": "https://10.0.0.1/", "events": ["session.created"]}, "url"),
        ({"url": "https://hooks.example.org/", "events": []}, "events"),
        ({"url": "https://hooks.example.org/", "events": ["session.exploded"]}, "events"),
        ({"url": "https://hooks.example.org/", "events": ["test"]}, "events"),
    ],
)
def test_a_webhook_that_cannot_work_is_refused_with_the_field(
    http: httpx.Client, body: dict[str, Any], field: str
):
    refused = http.post("/webhooks", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith(field)
