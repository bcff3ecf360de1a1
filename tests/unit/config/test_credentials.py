"""The file of credentials, and which requests get which of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from claude_hitl_template.claude.injection import Injector
from claude_hitl_template.config.credentials import Credential, read_credentials
from claude_hitl_template.errors import ConfigError

SECRET = "canary-5b21-of-the-operator"
ENTRY = {
    "host": "api.example.org",
    "path_prefix": "/v1/",
    "methods": ["GET"],
    "header": "X-Key",
    "value": SECRET,
}


def written(folder: Path, content: Any, mode: int = 0o600) -> Path:
    path = folder / "credentials.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    path.chmod(mode)
    return path


def test_a_value_is_in_the_file_or_in_one_of_its_own(tmp_path: Path):
    token = tmp_path / "token"
    token.write_text(f"{SECRET}\n")
    token.chmod(0o600)
    other = {"host": "b.example.org", "value_file": str(token)}
    found = read_credentials(written(tmp_path, [ENTRY, other]))
    assert [one.value.get_secret_value() for one in found if one.value] == [SECRET, SECRET]
    assert SECRET not in repr(found)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "JSON"),
        ([{**ENTRY, "host": "*.example.org"}], "0.host"),
        ([{**ENTRY, "host": "https://x"}], "0.host"),
        ([{**ENTRY, "path_prefix": "v1"}], "0.path_prefix"),
        ([{**ENTRY, "methods": ["get"]}], "0.methods.0"),
        ([{**ENTRY, "header": "a b"}], "0.header"),
        ([ENTRY, {"host": "x.example.org"}], "1"),
        ([{**ENTRY, "value": f"{SECRET}\r\nHost: x"}], "api.example.org"),
        ([{**ENTRY, "vaule": SECRET}], "0.vaule"),
        ([{**ENTRY, "value": None, "value_file": "/nonexistent/token"}], "/nonexistent/token"),
    ],
)
def test_a_file_that_cannot_be_used_says_what_is_wrong_and_no_value(tmp_path: Path, content: Any, said: str):
    with pytest.raises(ConfigError) as refused:
        read_credentials(written(tmp_path, content))
    assert said in str(refused.value)
    assert SECRET not in str(refused.value)


def test_a_file_that_others_may_read_is_refused_with_what_to_do(tmp_path: Path):
    with pytest.raises(ConfigError, match="chmod 600"):
        read_credentials(written(tmp_path, [ENTRY], 0o640))


@pytest.mark.parametrize(
    ("host", "method", "target", "tls", "gets"),
    [
        (("api.example.org", 443), "GET", "/v1/things?x=1", True, True),
        (("api.example.org", 443), "GET", "/v1/things", False, False),
        (("api.example.org", 443), "POST", "/v1/things", True, False),
        (("api.example.org", 443), "GET", "/v2/things", True, False),
        (("api.example.org", 443), "GET", "/v1/../v2/things", True, False),
        (("api.example.org", 443), "GET", "/v1/%2e%2e/v2", True, False),
        (("api.example.org", 443), "GET", "/v1/%2E./v2", True, False),
        (("api.example.org", 443), "GET", "/v1/..\\v2", True, False),
        (("api.example.org", 443), "GET", "//v1/things", True, False),
        (("api.example.org", 8443), "GET", "/v1/things", True, False),
        (("x.api.example.org", 443), "GET", "/v1/things", True, False),
    ],
)
def test_which_requests_get_a_credential(
    tmp_path: Path, host: tuple[str, int], method: str, target: str, tls: bool, gets: bool
):
    injector = Injector([Credential.model_validate(ENTRY)], tmp_path)
    sent = injector.headers(host, method, target, [("accept", "*/*")], tls=tls)
    assert sent == [("accept", "*/*"), *([("x-key", SECRET)] if gets else [])]


def test_what_the_agent_has_in_its_place_is_dropped(tmp_path: Path):
    injector = Injector([Credential.model_validate(ENTRY)], tmp_path)
    given = [("x-key", "mine"), ("accept", "*/*"), ("x-key", "mine too")]
    assert injector.headers(("api.example.org", 443), "GET", "/v1/a", given, tls=True) == [
        ("accept", "*/*"),
        ("x-key", SECRET),
    ]
    assert injector.headers(("api.example.org", 443), "GET", "/other", given, tls=True) == [("accept", "*/*")]
    assert injector.headers(("b.example.org", 443), "GET", "/v1/a", given, tls=True) == given
