"""WebFetch from a sandbox, on the real CLI: an allowed call gets its page, and the host is open for that call only."""

import asyncio
import functools
import ssl
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from claude_hitl_template.claude import outlets, sandbox
from claude_hitl_template.claude.egress import Egress
from claude_hitl_template.claude.sandbox import SandboxConfig
from tests.contract.test_layers import bash, script
from tests.contract.test_session import house, model_url

__all__ = ["model_url"]

NAME = "pages.example.org"
PAGE = b"<html><body><h1>Opening hours</h1><p>Closed on Mondays.</p></body></html>"


@dataclass
class Pages:
    """A site with TLS. `asked` has the first line of each request, `heads` the rest of its header."""

    port: int
    asked: list[str] = field(default_factory=list[str])
    heads: list[str] = field(default_factory=list[str])

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append((await reader.readline()).decode().strip())
        self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode().lower())
        head = f"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: {len(PAGE)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + PAGE)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def pages(folder: Path) -> AsyncGenerator[Pages]:
    folder.mkdir()
    key, certificate = folder / "key.pem", folder / "cert.pem"
    await asyncio.to_thread(
        subprocess.run,
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={NAME}",
         "-addext", f"subjectAltName=DNS:{NAME}", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    site = Pages(0)
    server = await asyncio.start_server(site.answer, "127.0.0.1", 0, ssl=context)
    site.port = server.sockets[0].getsockname()[1]
    try:
        yield site
    finally:
        server.close()


async def test_a_page_that_was_allowed_comes_and_its_host_is_shut_afterwards(
    tmp_path: Path, model_url: str, monkeypatch: pytest.MonkeyPatch
):
    async def resolve(name: str, _port: int) -> list[str]:
        assert name == NAME
        return ["127.0.0.1"]

    pretended = functools.partial(Egress, resolve=resolve, allows_address=lambda one: one == "127.0.0.1")
    monkeypatch.setattr(outlets, "Egress", pretended)
    real = sandbox.environment_of
    trusted = str(tmp_path / "workspace" / "cert.pem")

    def trusting(config: SandboxConfig) -> dict[str, str]:
        return {**real(config), "NODE_EXTRA_CA_CERTS": trusted}

    monkeypatch.setattr(sandbox, "environment_of", trusting)
    async with pages(tmp_path / "site") as site:
        url = f"https://{NAME}:{site.port}/hours"
        fetch = {"name": "WebFetch", "input": {"url": url, "prompt": "When is it closed?"}}
        h = await house(
            tmp_path, model_url, script({"tools": [fetch]}, {"tools": [bash(f"curl -sSk {url}")]})
        )
        h.workspace.mkdir()
        (h.workspace / "cert.pem").write_bytes((tmp_path / "site" / "cert.pem").read_bytes())
        await h.drive()
        await h.confirm((await h.until_idle())["event_ids"][0])
        await h.drive()
        stop = await h.until_idle()
        [fetched] = await h.log("agent.tool_result")
        assert fetched.payload["is_error"] is False, fetched.payload
        assert [line.split(" ")[1] for line in site.asked] == ["/hours"]
        await h.confirm(stop["event_ids"][0])
        await h.drive()
        assert (await h.until_idle())["type"] == "requires_action"
        [asked] = (await h.store.list_approvals("key_test", limit=9, states=["pending"])).data  # type: ignore[list-item]
    assert (asked.tool_name, asked.input["host"]) == ("Network", NAME)
    assert len(site.asked) == 1
