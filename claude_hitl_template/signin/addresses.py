"""The addresses of the sign-in pages, and which addresses a sign-in may lead to."""

import re
from urllib.parse import unquote, urlsplit

ROOT = "/claude-hitl"  # the prefix of everything that this service serves
SIGN_IN, SIGN_OUT, ACCOUNT = f"{ROOT}/sign-in", f"{ROOT}/sign-out", f"{ROOT}/account"
CALLBACK = f"{SIGN_IN}/callback"
HOME = f"{ROOT}/inbox"  # after a sign-in that did not begin on a page
PARTS = frozenset({"sign-in", "sign-out", "account"})  # the first parts of these paths, below ROOT
MAX_PATH_CHARS = 2000
MAX_DECODINGS = 4
_CONTROL = re.compile(r"[\x00-\x20\x7f-\x9f\\]")


def own_path(given: str) -> str:
    """`given` if it is the path of a page of ours that a sign-in may return to, else HOME.

    A browser takes `//host`, `/\\host` and `/<tab>/host` for other hosts. Paths are decoded before they are compared,
    because a proxy may decode them again.
    """
    if len(given) > MAX_PATH_CHARS or not _is_own(given):
        return HOME
    return given


def _is_own(given: str) -> bool:
    try:
        found = urlsplit(given)
    except ValueError:
        return False
    if found.scheme or found.netloc or not given.startswith(f"{ROOT}/"):
        return False
    path = found.path
    for _ in range(MAX_DECODINGS):
        if _CONTROL.search(path) or "//" in path or not {".", ".."}.isdisjoint(path.split("/")):
            return False
        decoded = unquote(path)
        if decoded == path:
            return not _CONTROL.search(given) and not path.startswith((SIGN_IN, SIGN_OUT))
        path = decoded
    return False
