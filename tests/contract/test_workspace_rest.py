"""The saved files of a session over REST: they are listed and streamed, and no other file of the machine is reachable."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from claude_hitl_template.config.secret_files import hash_api_key
from claude_hitl_template.domain.models import Agent, Environment
from claude_hitl_template.files.manifest import CHUNK_BYTES, Manifest, SavedFile, blob_name
from claude_hitl_template.testing.threaded import Threaded
from tests.contract.asking import key_of

LARGE = bytes(range(256)) * (CHUNK_BYTES // 256) + b"the rest"
FILES = {
    "a.txt": b"hello",
    "empty": b"",
    "sub/large.bin": LARGE,
    'q"\r\nü.txt': b"odd",
    "caf\udce9": b"no utf-8",
    "page.html": b"<script>alert(1)</script>",
}


@pytest.fixture(scope="module")
def session_id(parking: Threaded) -> str:
    return parking.run(_with_files(parking))


async def _with_files(served: Threaded) -> str:
    store = served.service.store
    alice = key_of(await store.find_identity(hash_api_key(served.service.keys["alice"])))
    assert alice is not None
    made = await store.create_session(
        alice.id, agent=Agent(), environment=Environment(), title=None, metadata={}, initial=[]
    )
    rows: list[SavedFile] = []
    for path, content in FILES.items():
        pieces = [content[at : at + CHUNK_BYTES] for at in range(0, len(content), CHUNK_BYTES)]
        await store.put_blobs(pieces)
        rows.append(SavedFile(path, 0o640, len(content), 10**18, tuple(map(blob_name, pieces))))
    encoded = Manifest.of(rows).encode()
    await store.put_blobs(encoded)
    await store.add_files(made.id, alice.id, blob_name(encoded[-1]))
    return made.id


def client(served: Threaded, key: str) -> httpx.Client:
    return httpx.Client(
        base_url=served.service.url, headers={"x-api-key": served.service.keys[key]}, timeout=60
    )


@pytest.fixture(scope="module")
def alice(parking: Threaded) -> Iterator[httpx.Client]:
    with client(parking, "alice") as http:
        yield http


def test_saved_files_are_listed_by_path_in_pages(alice: httpx.Client, session_id: str):
    found: list[dict[str, Any]] = []
    page: dict[str, Any] = {}
    while True:
        answer = alice.get(f"/v1/sessions/{session_id}/workspace", params={"limit": 4, **page})
        assert answer.status_code == 200, answer.text
        found += answer.json()["data"]
        if not answer.json()["next_page"]:
            break
        page = {"page": answer.json()["next_page"]}
    assert [f["path"] for f in found] == sorted(
        ['q"\r\nü.txt', "a.txt", "empty", "page.html", "sub/large.bin", "caf\\xe9"]
    )
    assert found[0] == {
        "type": "workspace_file",
        "path": "a.txt",
        "size_bytes": 5,
        "mode": "640",
        "modified_at": "2001-09-09T01:46:40+00:00",
    }


@pytest.mark.parametrize("path", FILES)
def test_a_saved_file_is_streamed_as_it_is(alice: httpx.Client, session_id: str, path: str):
    shown = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    answer = alice.get(f"/v1/sessions/{session_id}/workspace/files", params={"path": shown})
    assert answer.status_code == 200
    assert answer.content == FILES[path]
    assert answer.headers["content-length"] == str(len(FILES[path]))
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment; filename*=utf-8''")
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/etc/passwd",
        "../a.txt",
        "./a.txt",
        "sub",
        "sub/",
        "sub/../a.txt",
        "A.TXT",
        "%2e%2e/x",
        "a" * 5000,
    ],
)
def test_a_path_that_is_no_saved_file_is_not_found(alice: httpx.Client, session_id: str, path: str):
    answer = alice.get(f"/v1/sessions/{session_id}/workspace/files", params={"path": path})
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"


def test_a_nul_in_a_path_is_bad_input(alice: httpx.Client, session_id: str):
    assert alice.get(f"/v1/sessions/{session_id}/workspace/files?path=a%00b").status_code == 400


def test_another_keys_files_are_not_found(parking: Threaded, session_id: str):
    with client(parking, "bob") as bob:
        assert bob.get(f"/v1/sessions/{session_id}/workspace").status_code == 404
        answer = bob.get(f"/v1/sessions/{session_id}/workspace/files", params={"path": "a.txt"})
        assert answer.status_code == 404


def test_a_session_without_files_has_an_empty_listing(alice: httpx.Client):
    made = alice.post("/v1/sessions", json={"agent": "default", "environment_id": "default"}).json()["id"]
    assert alice.get(f"/v1/sessions/{made}/workspace").json() == {"data": [], "next_page": None}


@pytest.mark.parametrize("params", [{"limit": "0"}, {"limit": "x"}, {"page": "nonsense"}])
def test_bad_paging_names_the_field(alice: httpx.Client, session_id: str, params: dict[str, str]):
    answer = alice.get(f"/v1/sessions/{session_id}/workspace", params=params)
    assert answer.status_code == 400
    assert next(iter(params)) in answer.json()["error"]["message"]
