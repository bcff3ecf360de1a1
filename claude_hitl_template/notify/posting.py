"""Posts to permitted addresses of other services."""

import asyncio
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime

import httpx

from claude_hitl_template.config.network import UNREACHABLE, direct_async
from claude_hitl_template.domain.canonical_json import shown_host
from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.notify.addresses import Targets, at_address
from claude_hitl_template.notify.sender import Outcome, Refused, Retry
from claude_hitl_template.notify.webhook import TIMEOUT_S, outcome_of


class Poster:
    """Posts to exactly the address that was checked, and follows no redirect."""

    def __init__(self, targets: Targets, *, timeout_s: float = TIMEOUT_S) -> None:
        self._targets, self._timeout_s = targets, timeout_s
        # No connection is kept: it belongs to an address that was checked for one delivery.
        self._client = direct_async(
            timeout=timeout_s, follow_redirects=False, limits=httpx.Limits(max_keepalive_connections=0)
        )

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Outcome:
        """Posts, and reads no more of the answer than its status and headers."""
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await self._targets.address(url)
                if isinstance(found, (Refused, Retry)):
                    return found
                address, (name, port) = found
                is_usual = port == (443 if url.startswith("https:") else 80)
                named = {"host": name if is_usual else shown_host(name, port), **headers}
                async with self._client.stream(
                    "POST",
                    at_address(url, address),
                    content=body,
                    headers=named,
                    extensions={"sni_hostname": name},
                ) as answer:
                    return outcome_of(answer.status_code, _seconds(answer.headers.get("retry-after")))
        except (TimeoutError, httpx.TimeoutException):
            return Retry(f"no answer within {self._timeout_s:g} s")
        except UNREACHABLE as error:
            return Retry(f"it cannot be reached, or does not speak HTTP ({type(error).__name__})")

    async def close(self) -> None:
        await self._client.aclose()


def _seconds(retry_after: str | None) -> str | None:
    """The header as seconds, which is a number of them or a date."""
    if retry_after is None or retry_after.isdecimal():
        return retry_after
    try:
        at = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    wait = (at if at.tzinfo else at.replace(tzinfo=UTC)) - utcnow()
    return str(max(round(wait.total_seconds()), 0))
