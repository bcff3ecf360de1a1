"""The one JSON text of a value, and its digest: what tells whether the call that runs is the call that was shown."""

import hashlib
import json

from claude_hitl_template.errors import InvalidInput


def canonical_json(value: object) -> str:
    """The one JSON text of `value`: sorted keys, no spaces, no escapes beyond need.

    Raises InvalidInput for what JSON or UTF-8 cannot say: NaN, infinity, lone surrogates, foreign types, and
    nesting beyond what can be written.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"this is not a JSON value: {error}") from error
    return text


def digest(value: object) -> str:
    """SHA-256 (64 hex digits) of the canonical JSON in UTF-8. Raises what `canonical_json` raises."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def call_digest(given: object, cwd: str) -> str:
    """The digest of a call: of its input and of the folder it runs in. Raises what `canonical_json` raises."""
    return digest({"cwd": cwd, "input": given})


def shown_host(host: str, port: int) -> str:
    """`host:port`, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
