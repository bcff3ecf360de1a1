"""Whatever a model, a tool or a user writes is text on every page."""

from html.parser import HTMLParser
from typing import Any

import pytest

from tests.inbox import Desk, browser, decision, desk
from tests.unit.panel.html import Reader
from tests.unit.panel.nasty import PAYLOADS

_ELEMENTS = """
a article aside b body br button caption code col colgroup dd details dialog div dl dt em fieldset form h1 h2 h3 head header
html input kbd label legend li link main mark meta nav noscript ol option p pre script section select small span strong
style summary table tbody td textarea th thead time title tr ul
"""
HOSTILE = "\u202e\u2066\x1b\x00\ufeff\u2028\r"


class Page(Reader):
    """A page of ours. Its declaration is the only one that is allowed."""

    def handle_decl(self, data: str) -> None:
        assert data == "doctype html"

    def check_ours(self, canary: str) -> None:
        """Asserts that nothing of a payload became markup, and that no hidden character is left."""
        for tag, attributes in self.elements:
            assert tag in _ELEMENTS.split(), tag
            assert not [
                name for name in attributes if name.startswith("on") or name in ("style", "srcdoc")
            ], tag
            for name in ("href", "src", "action", "formaction", "hx-get", "hx-post"):
                target = attributes.get(name) or "/"
                assert target.startswith(("/", "?", "#", "http://", "https://", "mailto:")), target
            if tag == "script":
                assert (attributes.get("src") or "").startswith("/claude-hitl/inbox/static/")
        assert not set(HOSTILE) & set(self.text), canary


class Scripts(HTMLParser):
    """Collects what is inside of script elements, which is nothing on a page of ours."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.inside, self.found = False, ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.inside = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        self.found += data if self.inside else ""


async def check(client: Any, address: str, canary: str) -> str:
    answer = await client.get(address)
    assert answer.status_code == 200, answer.text
    Page(answer.text).check_ours(canary)
    assert not Scripts(answer.text).found.strip()
    return answer.text


CALLS = (
    ("Bash", lambda text: {"command": f"echo {text}", "description": text}),
    ("Write", lambda text: {"file_path": f"/w/{text}", "content": text}),
    ("Edit", lambda text: {"file_path": f"/w/{text}", "old_string": text, "new_string": f"{text}!", "replace_all": text}),
    ("NotebookEdit", lambda text: {"notebook_path": text, "new_source": text, "cell_id": text}),
    ("WebFetch", lambda text: {"url": f"https://x.example/{text}", "prompt": text}),
    ("mcp__x__y", lambda text: {text: text, "list": [text, {text: text}]}),
    ("AskUserQuestion", lambda text: {"questions": [{"question": text, "options": [{"label": text, "description": text}]}]}),
    ("ExitPlanMode", lambda text: {"plan": text}),
)  # fmt: skip


async def everywhere(on: Desk, payload: str) -> list[tuple[str, Any]]:
    """Calls and a session in which every text from outside is the payload."""
    session = await on.session(payload, said=payload)
    await on.begin_turn(session)
    await on.save(
        session, {f"f{n}{payload.replace('/', '-').replace(chr(0), '')[:100]}": payload for n in (1,)}
    )
    return [(tool, await on.ask(tool, given(payload), session=session)) for tool, given in CALLS]


@pytest.mark.parametrize("payload", PAYLOADS)
async def test_text_from_outside_is_text_in_the_list_on_each_card_and_on_the_sessions_page(
    payload: str,
) -> None:
    async with desk() as on, browser(on) as client:
        asked = await everywhere(on, payload)
        await on.ask(f"mcp__{payload[:40]}__t", {}, title=payload)
        await check(client, "inbox", payload)
        for _, approval in asked:
            await check(client, f"inbox/a/{approval.id}", payload)
        await check(client, f"sessions/{asked[0][1].session_id}", payload)
        await check(client, f"sessions/{asked[0][1].session_id}/changes", payload)
        await check(client, "sessions", payload)


@pytest.mark.parametrize("payload", PAYLOADS)
async def test_what_was_typed_is_text_when_it_is_shown_again(payload: str) -> None:
    async with desk() as on, browser(on) as client:
        approval = await on.ask("Bash", {"command": "ls"}, title=payload)
        wrong = await client.post(
            f"inbox/a/{approval.id}/decide",
            data=decision(approval, "edit", **{"as": "json", "json": payload}),
        )
        assert wrong.status_code == 400
        Page(wrong.text).check_ours(payload)
        denied = await client.post(
            f"inbox/a/{approval.id}/decide", data=decision(approval, "deny", reason=payload)
        )
        assert denied.status_code in (303, 400)
        Page((await client.get(f"inbox/a/{approval.id}")).text).check_ours(payload)
        searched = await client.get("inbox", params={"q": payload, "tool": payload, "session": payload})
        Page(searched.text).check_ours(payload)
