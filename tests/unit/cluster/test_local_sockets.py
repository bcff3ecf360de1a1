"""The sockets of replicas: only this user may open them, and those of ended processes do not stay."""

import asyncio
import os
import stat
from pathlib import Path

import httpx
import pytest

from claude_hitl_template.cluster.local_sockets import listening, model_sockets, serve_http
from claude_hitl_template.config.secret_files import SigningKey
from claude_hitl_template.config.settings import Settings


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s") / "sockets"  # a short path: a socket's may have 107 characters


def test_a_socket_and_its_folder_are_closed_to_other_users(folder: Path) -> None:
    folder.mkdir(mode=0o777)
    with listening(folder) as made:
        path = Path(made.getsockname())
        assert (path.parent, stat.S_IMODE(folder.stat().st_mode)) == (folder, 0o700)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_sockets_of_processes_that_have_ended_are_removed(folder: Path) -> None:
    folder.mkdir()
    left, alive = folder / "999999999-0.sock", folder / f"{os.getpid()}-0.sock"
    left.touch()
    alive.touch()
    listening(folder).close()
    assert (left.exists(), alive.exists()) == (False, True)


def test_a_path_that_is_too_long_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too long"):
        listening(tmp_path / ("long" * 30))


async def test_an_application_is_served_on_its_socket(folder: Path) -> None:
    async def app(scope, _receive, send) -> None:  # type: ignore[no-untyped-def]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["path"].encode()})

    serving = asyncio.create_task(serve_http(app, folder))
    async with asyncio.timeout(5):
        while not (folder.exists() and list(folder.iterdir())):
            await asyncio.sleep(0.01)
    [path] = folder.iterdir()
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path))) as http:
        assert (await http.get("http://model/v1")).text == "/v1"
    serving.cancel()
    await asyncio.wait({serving})


async def test_without_a_socket_nothing_is_served_on_it(tmp_path: Path) -> None:
    async def app(*_: object) -> None: ...

    await serve_http(app, tmp_path / ("long" * 30))


def test_another_service_with_the_same_data_folder_has_another_folder(tmp_path: Path) -> None:
    settings = Settings.load().model_copy(update={"data_dir": tmp_path})
    one, other = (model_sockets(settings, SigningKey(key * 32)) for key in (b"a", b"b"))
    assert one != other
    assert one.parent == other.parent == tmp_path / "model"
