"""A credential is in the request that leaves, and nowhere in the sandbox: on the real CLI, with TLS."""

import functools
import json
import shutil
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from claude_hitl_template.claude import outlets, sandbox
from claude_hitl_template.claude.egress import Egress
from claude_hitl_template.claude.sandbox import SandboxConfig
from claude_hitl_template.config.credentials import Credential
from claude_hitl_template.domain.policy import PermissionPolicy, Rule
from claude_hitl_template.domain.policy.floor import Floor
from tests.contract.test_layers import bash, script
from tests.contract.test_session import house, model_url
from tests.contract.test_web_fetch import NAME, pages
from tests.sandboxed import run_in_sandbox

__all__ = ["model_url"]

CANARY = "canary-5b21-of-the-operator"
# A pattern that finds it, and is not found by itself.
SEARCH = (
    "grep -rsl 'canary-5b2[1]' /run /tmp /home /etc . | head; "
    "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n' | grep -c 'canary-5b2[1]'; env"
)


async def test_a_credential_is_in_the_request_and_nowhere_in_the_sandbox(
    tmp_path: Path, model_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    async def resolve(_name: str, _port: int) -> list[str]:
        return ["127.0.0.1"]

    pretended = functools.partial(Egress, resolve=resolve, allows_address=lambda one: one == "127.0.0.1")
    monkeypatch.setattr(outlets, "Egress", pretended)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "site" / "cert.pem"))
    async with pages(tmp_path / "site") as site:
        url = f"https://{NAME}:{site.port}"
        urllib = f"import urllib.request as u; print(u.urlopen('{url}/v1/python').status)"
        steps = script(
            {"tools": [bash(f"curl -sS -H 'Authorization: mine' {url}/v1/curl")]},
            {"tools": [bash(f'python3 -c "{urllib}"')]},
            {"tools": [bash(f"curl -sS -H 'Authorization: mine' {url}/other")]},
            {"tools": [bash(f"curl -sSk https://unlisted.example.org:{site.port}/v1/unlisted")]},
            {"tools": [bash(SEARCH)]},
        )
        allowed = ("Bash", f"Network(*.example.org:{site.port})")
        rules = tuple(Rule(rule=rule, policy="always_allow") for rule in allowed)
        policy, floor = PermissionPolicy(rules=rules), Floor(rules=rules)
        h = await house(tmp_path / "session", model_url, steps, policy=policy, floor=floor)
        one = Credential(
            host=f"{NAME}:{site.port}", path_prefix="/v1/", header="Authorization", value=SecretStr(CANARY)
        )
        h.sandbox = SandboxConfig(credentials=(one,))
        await h.drive()
    results = [e.payload["content"][0]["text"] for e in await h.log("agent.tool_result")]
    assert [line.split(" ")[1] for line in site.asked] == [
        "/v1/curl",
        "/v1/python",
        "/other",
        "/v1/unlisted",
    ], results
    assert [f"authorization: {CANARY}" in head for head in site.heads] == [True, True, False, False]
    assert "mine" not in "".join(site.heads)
    assert "Closed on Mondays" in results[0]
    searched = results[4].splitlines()
    assert searched[0] == "0", results[4]
    assert "CURL_CA_BUNDLE=/run/hitl-certificates.pem" in searched
    everything = json.dumps([e.payload for e in await h.log()]) + capsys.readouterr().out
    transcript = await h.store.load_transcript(
        {"scope": h.session.id, "project_key": "-", "session_id": h.session.transcript_id, "subpath": ""}
    )
    assert CANARY not in everything + json.dumps(transcript)


NODE = (
    "const http = require('http'), https = require('https');"
    "http.request({{host: '127.0.0.1', port: 3128, method: 'CONNECT', path: '{name}:{port}'}})"
    ".on('connect', (_, socket) => https.get({{host: '{name}', socket, agent: false, path: '/v1/node'}},"
    " answer => {{ console.log(answer.statusCode); process.exit() }})).end()"
)
# Each asks for a path that begins with its name; what they make of the answer does not matter.
PROGRAMS = {
    "curl": "curl -sS {url}/v1/curl",
    "python3": "python3 -c \"import urllib.request as u; u.urlopen('{url}/v1/python3')\"",
    "pip": "python3 -m pip download --disable-pip-version-check --retries 0 -d d -i {url}/v1/pip x",
    "git": "git ls-remote {url}/v1/git",
    "node": f'node -e "{NODE}"',
}


async def test_the_programs_of_the_sandbox_trust_its_authority(
    tmp_path: Path, model_url: str, monkeypatch: pytest.MonkeyPatch
):
    async def resolve(_name: str, _port: int) -> list[str]:
        return ["127.0.0.1"]

    pretended = functools.partial(Egress, resolve=resolve, allows_address=lambda one: one == "127.0.0.1")
    monkeypatch.setattr(outlets, "Egress", pretended)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "site" / "cert.pem"))
    there = [name for name in PROGRAMS if shutil.which(name)]
    async with pages(tmp_path / "site") as site:
        url = f"https://{NAME}:{site.port}"
        asked = [PROGRAMS[name].format(url=url, name=NAME, port=site.port) for name in there]
        rules = tuple(Rule(rule=r, policy="always_allow") for r in ("Bash", f"Network({NAME}:{site.port})"))
        h = await house(
            tmp_path / "session",
            model_url,
            script(*({"tools": [bash(command)]} for command in asked)),
            policy=PermissionPolicy(rules=rules),
            floor=Floor(rules=rules),
        )
        one = Credential(
            host=f"{NAME}:{site.port}", path_prefix="/v1/", header="Authorization", value=SecretStr(CANARY)
        )
        h.sandbox = SandboxConfig(credentials=(one,))
        await h.drive()
    results = [e.payload["content"][0]["text"] for e in await h.log("agent.tool_result")]
    paths = [line.split(" ")[1].split("/")[2].partition("?")[0] for line in site.asked]
    assert list(dict.fromkeys(paths)) == there, results
    assert all(f"authorization: {CANARY}" in head for head in site.heads)


@pytest.mark.skipif(sys.platform != "linux", reason="there are sandboxes on Linux alone")
@pytest.mark.parametrize("contained", [False, True])
def test_the_authority_is_in_the_sandbox_of_a_container_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contained: bool
):
    """There /run is hidden: the file is laid over that, for the agent to read and not to change."""
    (tmp_path / "mountinfo").touch()  # as in a container into which nothing is mounted
    monkeypatch.setattr(sandbox, "MOUNTINFO", tmp_path / "mountinfo")
    one = Credential(host=NAME, header="Authorization", value=SecretStr(CANARY))
    config = SandboxConfig(contained=contained, credentials=(one,))
    count = "; ".join(f"grep -c BEGIN.CERTIFICATE ${name}" for name in sandbox.TRUST)
    said = run_in_sandbox(
        tmp_path / "here", f"{count}; echo x 2>/dev/null >>$SSL_CERT_FILE || echo fixed", config
    )
    *counts, fixed = said.split()
    assert len(counts) == len(sandbox.TRUST) == 6, said
    assert len({*counts}) == 1
    assert int(counts[0]) > 1, "the authority alone: programs would trust nothing else"
    assert fixed == "fixed"
