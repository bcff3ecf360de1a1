"""An agent may report a missing package by its name only, never a text that would harm a human who copies it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claude_hitl_template.domain import missing_dependency

GOOD = [
    ("system", "jq"), ("system", "libpq-dev"), ("system", "g++"), ("system", "libc6:arm64"), ("system", "jq=1.6-2.1+b1"),
    ("python", "requests"), ("python", "requests[socks,use_chardet]>=2.31,<3"), ("python", "Pillow == 11.*"),
    ("python", "x"), ("npm", "typescript"), ("npm", "@types/node"), ("npm", "@types/node@^22.0.1"),
]  # fmt: skip
BAD = [
    ("system", "jq; rm -rf /"), ("system", "jq\nevil"), ("system", "$(id)"), ("system", "-y"), ("system", "jq curl"),
    ("system", ""), ("system", "../x"), ("system", "j" * 200), ("system", "jq\u202e"), ("system", "JQ'"), ("system", "jq\n"),
    ("python", "-r /etc/passwd"), ("python", "--index-url=http://x"), ("python", "x @ http://evil/x.whl"),
    ("python", "x # y"), ("python", "x; y"), ("python", "x`id`"),
    ("npm", "http://evil/x.tgz"), ("npm", "@/x"), ("npm", "x@file:../y"), ("npm", "../x"), ("npm", "A"),
]  # fmt: skip


def said(kind: Any, name: Any, why: Any = "to read JSON") -> dict[str, Any]:
    return {"kind": kind, "name": name, "why": why}


def event(given: Any, **more: Any) -> dict[str, Any]:
    server, tool = missing_dependency.SERVER, missing_dependency.TOOL
    return {"type": "agent.mcp_tool_use", "mcp_server_name": server, "name": tool, "input": given, **more}


@pytest.mark.parametrize(("kind", "name"), GOOD)
def test_a_package_is_passed_on_with_the_file_that_declares_it(kind: str, name: str) -> None:
    assert missing_dependency.problem(said(kind, name)) is None
    advice = missing_dependency.advice(said(kind, name))
    assert f"`{name}`" in advice
    assert f"template_project/dependencies/{missing_dependency.KINDS[kind].file}" in advice


@pytest.mark.parametrize(("kind", "name"), BAD)
def test_what_is_no_package_is_sent_back(kind: str, name: str) -> None:
    assert "name" in str(missing_dependency.problem(said(kind, name)))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "kind"), (said("cargo", "x"), "kind"), (said(["system"], "x"), "kind"), (said("system", None), "name"),
        (said("system", ["jq"]), "name"), (said("system", "jq", ""), "why"), (said("system", "jq", "  "), "why"),
        (said("system", "jq", 5), "why"), (said("system", "jq", "x" * 1001), "why"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_used_is_named(given: dict[str, Any], named: str) -> None:
    assert str(missing_dependency.problem(given)).startswith(named)


anything = st.recursive(st.none() | st.text() | st.integers(), lambda inner: st.lists(inner, max_size=2))


@given(st.sampled_from([*missing_dependency.KINDS, "other"]) | anything, anything, anything)
def test_no_report_breaks_its_reader(kind: Any, name: Any, why: Any) -> None:
    given_input = said(kind, name, why)
    if missing_dependency.is_report(event(given_input)):
        assert missing_dependency.advice(given_input).isprintable()


def test_only_our_own_servers_tool_makes_reports() -> None:
    good = said("system", "jq")
    assert missing_dependency.is_report(event(good))
    assert not missing_dependency.is_report(event(good, mcp_server_name="hitl2"))
    assert not missing_dependency.is_report(event(good, name="other"))
    assert not missing_dependency.is_report(
        {"type": "agent.tool_use", "name": missing_dependency.TOOL, "input": good}
    )
    assert not missing_dependency.is_report(event(None))
