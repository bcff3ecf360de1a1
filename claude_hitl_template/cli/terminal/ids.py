"""Finds a session, an approval or a key by the beginning of its id."""

import re
from collections.abc import Callable, Iterable, Sequence

from claude_hitl_template.cli.client import Client
from claude_hitl_template.domain.models import ApprovalState
from claude_hitl_template.errors import InvalidInput, NotFound

NAMED = 5  # ids that an error lists
_WHOLE = re.compile(r"[a-z]+_[0-9a-z]{26}")


def session_id(client: Client, given: str) -> str:
    """The id of the session that `given` is, or begins.

    Raises:
        NotFound: No session of this key.
        InvalidInput: `given` is empty, or several sessions' ids begin with it.
    """
    return by_prefix(
        given, "sesn", "session", lambda: _ids(client, "/v1/sessions", include_archived="true"), "sessions"
    )


def approval_id(client: Client, given: str) -> str:
    """The id of the approval that `given` is, or begins; one that waits goes before those that were decided.

    Raises:
        NotFound: No approval of this key.
        InvalidInput: `given` is empty, or several approvals' ids begin with it.
    """

    def listed(states: Iterable[str]) -> list[str]:
        return list(_ids(client, "/v1/approvals", **{"states[]": list(states)}))

    def known() -> list[str]:
        waiting = listed([ApprovalState.PENDING])
        found = any(one.startswith(_typed(given, "appr")) for one in waiting)
        return waiting if found else listed(ApprovalState)

    return by_prefix(given, "appr", "approval", known, "approvals --all")


def by_prefix(given: str, kind: str, noun: str, known: Callable[[], Iterable[str]], command: str) -> str:
    """The one id that `given` begins, with or without its type.

    Args:
        given: A whole id, which is taken as it is, or the beginning of one.
        kind: The type that such ids begin with, without the underscore.
        noun: What has the id, for messages.
        known: All ids, newest first; only asked for where `given` is not whole.
        command: The command that lists them, without `./hitl`.

    Raises:
        NotFound: No id begins so.
        InvalidInput: Several do, or `given` is empty.
    """
    if not given.strip():
        raise InvalidInput(f"is empty; ./hitl {command} shows the ids", "ID")
    begin = _typed(given, kind)
    if _WHOLE.fullmatch(begin):
        return begin
    every = list(known())
    found = [one for one in every if one.startswith(begin)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InvalidInput(f"{given} is the beginning of {len(found)} {noun}s: {_some(found)}", "ID")
    there = f"there are: {_some(every)}" if every else f"there is no {noun}"
    raise NotFound(
        f"no {noun} has an id that begins with {given!r}; {there}\n  Fix: ./hitl {command} lists them"
    )


def _typed(given: str, kind: str) -> str:
    text = given.strip()
    return text if text.startswith(kind) else f"{kind}_{text}"


def _some(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return f"{', '.join(ids[:NAMED])}{more}"


def _ids(client: Client, path: str, **wanted: object) -> Iterable[str]:
    return (str(one["id"]) for one in client.pages(path, **wanted))
