"""The pages answer under the service's own names, and under no name that a foreign page has given this machine."""

import httpx
import pytest
from fastapi import FastAPI

from claude_hitl_template.config.settings import Settings
from claude_hitl_template.signin.own_names import only_under, own_names

SETTINGS = Settings(
    host="10.0.0.5", public_url="https://hitl.example.org", panel_hosts="desk:3370, other.example.org"
)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:8001", "localhost", "LOCALHOST:8001", "hitl.localhost:80", "[::1]:8001", "192.168.1.7:8001", "10.0.0.5",
        "box:8001", "box.tail1234.ts.net", "Box.local.:8001", "hitl.example.org", "hitl.example.org:443", "desk",
        "other.example.org:8001",
    ],
)  # fmt: skip
def test_own_names_are_answered(host: str) -> None:
    assert own_names(SETTINGS, "box.example.com")(host)


@pytest.mark.parametrize(
    "host",
    [
        "", ":8001", "evil.example", "localhost.evil.example", "hitl.example.org.evil.example", "127.0.0.1.evil.example",
        "sub.hitl.example.org", "xbox", "[::1", "2130706433", "0x7f.1",
    ],
)  # fmt: skip
def test_foreign_names_are_not(host: str) -> None:
    assert not own_names(SETTINGS, "box.example.com")(host)


@pytest.mark.parametrize("hosts", [["evil.example"], ["box", "evil.example"], []])
async def test_what_is_asked_for_under_a_foreign_name_is_refused_with_the_fix(hosts: list[str]) -> None:
    inner = FastAPI()
    app = only_under(own_names(SETTINGS, "box"), inner)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://box") as http:
        assert (await http.get("/openapi.json")).status_code == 200
        request = http.build_request("GET", "/openapi.json")
        request.headers = httpx.Headers([("host", host) for host in hosts])
        refused = await http.send(request)
    assert (refused.status_code, "HITL_PUBLIC_URL" in refused.text) == (421, True)
