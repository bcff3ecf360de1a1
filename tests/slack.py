"""A stand-in for Slack: its Web API, the addresses that answers to presses go to, and presses that it signs.

It asserts that every message keeps to Block Kit's published limits.
"""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from aiohttp import web
from slack_sdk.signature import SignatureVerifier

TOKEN = "xoxb-s3cret"
SIGNING = "5ecre7" * 5
REFERENCE = {"channel": "C1", "ts": "1700000000.000100"}


def check_blocks(message: dict[str, Any]) -> None:
    """Asserts what https://docs.slack.dev/reference/block-kit/blocks says of the blocks that are used here."""
    assert 0 < len(message["text"]) <= 40_000
    assert 0 < len(message["blocks"]) <= 50
    for block in message["blocks"]:
        match block["type"]:
            case "section":
                assert block["text"]["type"] == "mrkdwn"
                assert 0 < len(block["text"]["text"]) <= 3000
            case "rich_text":
                for part in block["elements"]:
                    assert part["type"] == "rich_text_preformatted"
                    assert all(one["type"] == "text" and one["text"] for one in part["elements"])
            case "actions":
                assert 0 < len(block["elements"]) <= 25
                ids = [element["action_id"] for element in block["elements"]]
                assert len(set(ids)) == len(ids)
                for element in block["elements"]:
                    assert element["type"] == "button"
                    assert element["text"]["type"] == "plain_text"
                    assert len(element["text"]["text"]) <= 75
                    assert len(element["action_id"]) <= 255
                    assert len(element.get("value", "")) <= 2000
                    assert len(element.get("url", "")) <= 3000
                    for name, limit in (("title", 100), ("text", 300), ("confirm", 30), ("deny", 30)):
                        assert len(element.get("confirm", {}).get(name, {"text": ""})["text"]) <= limit
                    assert element.get("style", "danger") in ("primary", "danger")
            case other:
                raise AssertionError(f"the stand-in does not know the block {other}")


@dataclass
class Slack:
    """`calls` are those of the Web API, `answers` what was sent to the address of a press."""

    error: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict[str, str])
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list[tuple[str, dict[str, Any]]])
    answers: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    url: str = ""
    response_url: str = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Slack"]:
        app = web.Application()
        app.router.add_post("/api/{method}", self._answer)
        app.router.add_post("/actions/T1/1", self._take_answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/api/"
        self.response_url = f"http://127.0.0.1:{runner.addresses[0][1]}/actions/T1/1"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        assert request.headers["authorization"] == f"Bearer {TOKEN}"
        given = await request.json()
        check_blocks(given)
        self.calls.append((request.match_info["method"], given))
        body = {"ok": False, "error": self.error} if self.error else {"ok": True, **REFERENCE}
        return web.json_response(body, status=self.status, headers=self.headers)

    async def _take_answer(self, request: web.Request) -> web.Response:
        given = await request.json()
        if "blocks" in given:
            check_blocks(given)
        assert 0 < len(given["text"]) <= 40_000
        self.answers.append(given)
        return web.Response(text="ok")

    def buttons(self) -> dict[str, dict[str, Any]]:
        """The buttons of the last message that was sent, by what they do."""
        return {one["action_id"]: one for one in self.calls[-1][1]["blocks"][-1]["elements"]}

    def press(self, action: str, value: str, *, user: str = "U1", **more: Any) -> bytes:
        """The body of a press, in the form that Slack sends."""
        who = {"id": user, "username": f"{user} <x>", "name": "someone", "team_id": "T1"}
        payload = {
            "type": "block_actions",
            "user": who,
            "team": {"id": "T1", "domain": "example"},
            "api_app_id": "A1",
            "container": {"type": "message", "message_ts": REFERENCE["ts"], "channel_id": "C1"},
            "actions": [
                {"action_id": action, "block_id": "b", "type": "button", "value": value, "action_ts": "1.0"}
            ],
            "response_url": self.response_url,
            **more,
        }
        return urlencode({"payload": json.dumps(payload)}).encode()


def signed(body: bytes, at: datetime, secret: str = SIGNING) -> Mapping[str, str]:
    """The headers that Slack sends with a press."""
    timestamp = str(int(at.timestamp()))
    signature = SignatureVerifier(secret).generate_signature(timestamp=timestamp, body=body)
    assert signature is not None
    return {
        "content-type": "application/x-www-form-urlencoded",
        "x-slack-request-timestamp": timestamp,
        "x-slack-signature": signature,
    }
