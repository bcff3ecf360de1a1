"""`hitl users`: people are made, get passwords that no one else sees, and are shut out."""

import asyncio
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager

import httpx
import pytest
from typer.testing import CliRunner

from claude_hitl_template.cli.app import app
from claude_hitl_template.cli.commands import users
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError, Conflict, HitlError, InvalidInput, NotFound
from claude_hitl_template.signin.service import REMEMBER_S
from claude_hitl_template.testing.threaded import Threaded
from tests.sign_in import hidden_fields

type Make = Callable[..., Settings]
PASSWORD, NEW = "canary horse battery", "another canary battery"


def run(*arguments: str, typed: str = "") -> str:
    """Runs a command and returns its output, in which no password is. Raises the command's errors."""
    result = CliRunner().invoke(app, ["users", *arguments], input=typed)
    assert "canary" not in result.output
    if isinstance(result.exception, HitlError):
        assert "canary" not in str(result.exception)
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@contextmanager
def signed_in(served: Threaded, name: str, password: str) -> Generator[httpx.Client]:
    """A browser, signed in if name and password fit."""
    base = served.service.url
    with httpx.Client(headers={"origin": base.removesuffix("/claude-hitl")}, timeout=30) as browser:
        form = hidden_fields(browser.get(f"{base}/sign-in").text)
        browser.post(f"{base}/sign-in", data={**form, "name": name, "password": password})
        yield browser


def is_signed_in(served: Threaded, browser: httpx.Client) -> bool:
    return browser.get(f"{served.service.url}/account").status_code == 200


def gets_in(served: Threaded, name: str, password: str) -> bool:
    with signed_in(served, name, password) as browser:
        return is_signed_in(served, browser)


@pytest.mark.usefixtures("here")
def test_a_user_is_made_signs_in_gets_another_password_and_is_shut_out(served: Threaded) -> None:
    said = run(
        "add",
        "ann",
        "--role",
        "approver",
        "--role",
        "viewer",
        "--email",
        "ann@example.org",
        typed=f"{PASSWORD}\n",
    )
    assert re.search(r"user_\w+ +ann, approver, viewer in ", said)
    with signed_in(served, "ann", PASSWORD) as browser:
        assert is_signed_in(served, browser)
        assert "signed out everywhere" in run("set-password", "ann", typed=f"{NEW}\nignored\n")
        served.run(asyncio.sleep(REMEMBER_S))  # as long as a session that was found is cached
        assert not is_signed_in(served, browser)
    assert not gets_in(served, "ann", PASSWORD)
    with signed_in(served, "ann", NEW) as browser:
        assert is_signed_in(served, browser)
        assert "ann is signed out of 1 browsers" in run("sign-out", "ann")
    assert "ann is disabled" in run("disable", "ann")
    assert not gets_in(served, "ann", NEW)
    (line,) = [line for line in run("list").splitlines() if line.rstrip().endswith("ann")]
    assert "disabled" in line
    assert "approver viewer" in line
    assert "ann is enabled" in run("enable", "ann")
    assert gets_in(served, "ann", NEW)


@pytest.mark.usefixtures("here")
def test_a_user_of_the_provider_needs_no_password(served: Threaded) -> None:
    run("add", "carl", "--role", "admin", "--no-password")
    assert not gets_in(served, "carl", "")
    (line,) = [line for line in run("list").splitlines() if line.rstrip().endswith("carl")]
    assert "everywhere: admin" in line


@pytest.mark.usefixtures("here")
def test_bad_input_says_what_is_wrong_and_makes_no_one() -> None:
    for typed in ("", "short\n", f"{'x' * 1025}\n"):
        with pytest.raises(InvalidInput, match="12 to 1024 characters"):
            run("add", "dora", typed=typed)
    with pytest.raises(InvalidInput, match="there is no workspace 'nowhere'"):
        run("add", "dora", "--workspace", "nowhere", typed=f"{PASSWORD}\n")
    assert "dora" not in run("list")
    run("add", "dora", typed=f"{PASSWORD}\n")
    with pytest.raises(Conflict, match="names are unique"):
        run("add", "dora", typed=f"{PASSWORD}\n")
    with pytest.raises(InvalidInput, match="there is no user or service account 'unknown'"):
        run("disable", "unknown")
    with pytest.raises(InvalidInput, match="is a service account"):
        run("set-password", "first key", typed=f"{PASSWORD}\n")


def test_a_password_is_not_sent_in_the_clear(make_settings: Make) -> None:
    make_settings(serve_url="http://hitl.example.org:8001")
    for arguments in (("add", "eve"), ("set-password", "eve")):
        with pytest.raises(ConfigError, match="without TLS"):
            run(*arguments, typed=f"{PASSWORD}\n")


def test_a_terminal_is_asked_twice_and_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def prompt(text: str, **options: object) -> str:
        asked.append({"text": text, **options})
        return PASSWORD

    monkeypatch.setattr(users.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(users.click, "prompt", prompt)
    assert users.read_password() == PASSWORD
    assert asked == [{"text": "Password", "hide_input": True, "confirmation_prompt": "Again"}]


@pytest.mark.usefixtures("here")
def test_a_user_that_does_not_exist_gets_no_password(served: Threaded) -> None:
    with pytest.raises(NotFound):
        served.run(served.service.store.set_password("user_none", "hash"))
