"""pip and npm through the proxy: refused with a reason at first, and served once their registry's host was allowed."""

import base64
import functools
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template.claude import outlets
from claude_hitl_template.claude.egress import Egress
from tests.contract.test_asked_hosts import BASH, results, waiting
from tests.contract.test_layers import Model, bash, model, script
from tests.contract.test_session import house
from tests.sandboxed import run_in_sandbox
from tests.serving import serving
from tests.unit.image.test_packages import wheel

__all__ = ["model"]

PYPI, NPM = "pypi.example.org", "npm.example.org"


class Registry:
    """An index of Python packages and a registry of npm's, with one small package each."""

    def __init__(self, folder: Path) -> None:
        self._wheel = wheel(folder, "hitltiny", "1.0", "answer = 42\n")
        self.asked: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        host, path = dict(scope["headers"])[b"host"].decode(), scope["path"]
        self.asked.append(f"{host.partition(':')[0]}{path}")
        found = self._found(host, path)
        kind, body = found or ("text/plain", b"not found")
        status = 404 if found is None else 200
        headers = [(b"content-type", kind.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _found(self, host: str, path: str) -> tuple[str, bytes] | None:
        name = self._wheel.name
        if path == "/simple/hitltiny/":
            digest = hashlib.sha256(self._wheel.read_bytes()).hexdigest()
            return "text/html", f'<a href="/files/{name}#sha256={digest}">{name}</a>'.encode()
        if path == f"/files/{name}":
            return "application/octet-stream", self._wheel.read_bytes()
        if path == "/hitl-tiny":
            return "application/json", self._packument(host)
        if path == "/hitl-tiny/-/hitl-tiny-1.0.0.tgz":
            return "application/octet-stream", _tarball()
        return None

    def _packument(self, host: str) -> bytes:
        integrity = "sha512-" + base64.b64encode(hashlib.sha512(_tarball()).digest()).decode()
        dist = {"tarball": f"http://{host}/hitl-tiny/-/hitl-tiny-1.0.0.tgz", "integrity": integrity}
        version = {"name": "hitl-tiny", "version": "1.0.0", "dist": dist}
        return json.dumps(
            {"name": "hitl-tiny", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}
        ).encode()


@functools.cache
def _tarball() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name, text in {
            "package.json": '{"name": "hitl-tiny", "version": "1.0.0", "main": "index.js"}',
            "index.js": "module.exports = 42\n",
        }.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return made.getvalue()


@pytest.fixture
async def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Registry, int]]:
    """All names lead to it, and its address counts as one of the internet's."""

    async def resolve(_name: str, _port: int) -> list[str]:
        return ["127.0.0.1"]

    pretended = functools.partial(Egress, resolve=resolve, allows_address=lambda one: one == "127.0.0.1")
    monkeypatch.setattr(outlets, "Egress", pretended)
    folder = tmp_path / "index"
    folder.mkdir()
    made = Registry(folder)
    async with serving(made) as url:  # type: ignore[arg-type]
        yield made, int(url.rpartition(":")[2])


def pip(port: int) -> str:
    source = f"--index-url http://{PYPI}:{port}/simple --trusted-host {PYPI}"
    options = "--no-cache-dir --disable-pip-version-check --retries 0 --target here"
    install = f"python3 -m pip install {options} {source} hitltiny"
    return f"{install} && PYTHONPATH=here python3 -c 'import hitltiny; print(\"answer\", hitltiny.answer)'"


def npm(port: int) -> str:
    install = f"npm install --no-audit --no-fund --fetch-retries=0 --registry http://{NPM}:{port}/ hitl-tiny"
    return f'{install} && node -e \'console.log("answer", require("hitl-tiny"))\''


@pytest.mark.parametrize(
    ("host", "command", "needs"), [(PYPI, pip, "python3 -m pip"), (NPM, npm, "npm")], ids=["pip", "npm"]
)
async def test_a_package_comes_once_its_registry_was_allowed_and_the_reason_is_said_before(
    tmp_path: Path, model: Model, registry: tuple[Registry, int], host: str, command: Any, needs: str
):
    if shutil.which(needs.split(maxsplit=1)[0]) is None or not run_in_sandbox(
        tmp_path / "look", f"{needs} --version >/dev/null 2>&1 && echo there"
    ):
        pytest.skip(f"there is no {needs} on this machine")
    site, port = registry
    install = bash(command(port))
    steps = script({"tools": [install]}, {"text": "It waits."}, {"tools": [install]})
    h = await house(tmp_path / "session", model.url, steps, **BASH)
    await h.drive()
    assert (await h.until_idle())["type"] == "requires_action"
    assert site.asked == []
    # pip itself says only that it found no version.
    assert f"may not reach {host}:{port} yet: a human was asked" in model.recorder.told()
    [approval] = await waiting(h)
    assert (approval.input["host"], approval.input["port"]) == (host, port)

    await h.confirm(approval.event_id)
    await h.drive()
    assert (await h.until_idle())["type"] == "end_turn"
    assert "answer 42" in (await results(h))[-1]
    assert {one.partition("/")[0] for one in site.asked} == {host}
