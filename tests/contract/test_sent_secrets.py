"""A running service accepts a secret from its operator, stores it readable by its user only, and never returns it."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from claude_hitl_template.config.secret_files import SENT_MODEL_KEY
from claude_hitl_template.testing.local_service import OPERATOR_KEY
from claude_hitl_template.testing.threaded import Threaded, serve_in_thread

KEYS = {"first": "first-secret", "other": "other-secret"}
PATH = "/v1/internal/secrets"
NAME = f"{PATH}/ANTHROPIC_API_KEY"
VALUE = "sk-ant-something-secret"


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Threaded, Path]]:
    folder = tmp_path_factory.mktemp("secrets")
    with serve_in_thread(folder, keys=KEYS) as service:
        yield service, folder


def ask(service: Threaded, method: str, path: str, key: str, body: object = None) -> httpx.Response:
    return httpx.request(
        method, service.service.url + path, headers={"x-api-key": key}, json=body, timeout=30
    )


@pytest.mark.parametrize("key", [KEYS["first"], OPERATOR_KEY])
def test_the_owner_sets_lists_and_removes_it_and_nobody_is_told_the_value(
    serving: tuple[Threaded, Path], key: str
) -> None:
    service, folder = serving
    answers = [ask(service, "PUT", NAME, key, {"value": VALUE})]
    kept = folder / SENT_MODEL_KEY
    assert kept.read_text() == VALUE
    assert kept.stat().st_mode & 0o077 == 0
    answers.append(ask(service, "GET", PATH, key))
    found = {secret["name"]: secret["set"] for secret in answers[-1].json()["data"]}
    assert found == {"ANTHROPIC_API_KEY": True, "HITL_OIDC_CLIENT_SECRET": False, "HITL_SMTP_PASSWORD": False}
    answers.append(ask(service, "DELETE", NAME, key))
    assert answers[-1].json()["removed"]
    assert not kept.exists()
    assert not ask(service, "DELETE", NAME, key).json()["removed"]
    assert all(answer.status_code == 200 and VALUE not in answer.text for answer in answers)


@pytest.mark.parametrize(("method", "path"), [("PUT", NAME), ("GET", PATH), ("DELETE", NAME)])
@pytest.mark.parametrize("key", [KEYS["other"], "unknown", "\xff", ""])
def test_no_other_key_opens_it(serving: tuple[Threaded, Path], method: str, path: str, key: str) -> None:
    service, folder = serving
    headers = [(b"x-api-key", key.encode("latin-1"))] if key else []
    body = {"value": VALUE} if method == "PUT" else None
    answer = httpx.request(method, service.service.url + path, headers=headers, json=body, timeout=30)
    assert answer.status_code == 401
    assert not (folder / SENT_MODEL_KEY).exists()


@pytest.mark.parametrize(
    "value", ["", "two words", "new\nline", "schl\u00fcssel", "x" * 5000, None, 3, ["x"]]
)
def test_what_no_secret_looks_like_is_refused_without_repeating_it(
    serving: tuple[Threaded, Path], value: object
) -> None:
    service, folder = serving
    answer = ask(service, "PUT", NAME, KEYS["first"], {"value": value})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("value: ")
    if isinstance(value, str) and value:
        assert value not in answer.text
    assert not (folder / SENT_MODEL_KEY).exists()


@pytest.mark.parametrize("name", ["signing", "api-key", "..%2Fsigning", "%00", "HITL_API_KEY"])
def test_nothing_else_of_the_service_can_be_set(serving: tuple[Threaded, Path], name: str) -> None:
    service, folder = serving
    assert ask(service, "PUT", f"{PATH}/{name}", KEYS["first"], {"value": VALUE}).status_code == 404
    assert not (folder / "signing").exists()
