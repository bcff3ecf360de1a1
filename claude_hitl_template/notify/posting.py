"""Posts to permitted addresses of other services, and says what their answers mean."""

import asyncio
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from http import HTTPStatus

import httpx

from claude_hitl_template import __version__
from claude_hitl_template.config.network import UNREACHABLE, direct_async
from claude_hitl_template.domain.canonical_json import shown_host
from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.notify.addresses import Targets, at_address
from claude_hitl_template.notify.sender import Gone, Outcome, Refused, Retry, Sent

TIMEOUT_S = 15.0  # of one delivery as a whole
READ_BYTES = 4096  # of an answer, which is not used
_LATER = frozenset({408, 409, 425, 429})  # refusals that may pass


class Poster:
    """Posts to exactly the address that was checked, and follows no redirect."""

    def __init__(self, targets: Targets, *, timeout_s: float = TIMEOUT_S) -> None:
        self._targets, self._timeout_s = targets, timeout_s
        # No connection is kept: it belongs to an address that was checked for one delivery.
        self._client = direct_async(
            timeout=timeout_s, follow_redirects=False, limits=httpx.Limits(max_keepalive_connections=0)
        )

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Outcome:
        """Posts, and reads no more of the answer than its status, its headers and READ_BYTES."""
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await self._targets.address(url)
                if isinstance(found, (Refused, Retry)):
                    return found
                address, host = found
                return await self._post(at_address(url, address), host, body, headers)
        except TimeoutError:
            return Retry(f"no answer within {self._timeout_s:g} s")

    async def close(self) -> None:
        await self._client.aclose()

    async def _post(
        self, url: str, host: tuple[str, int], body: bytes, headers: Mapping[str, str]
    ) -> Outcome:
        name, port = host
        is_usual = port == (443 if url.startswith("https:") else 80)
        own = {
            "host": name if is_usual else shown_host(name, port),
            "user-agent": f"claude-hitl/{__version__}",
        }
        try:
            async with self._client.stream(
                "POST", url, content=body, headers={**own, **headers}, extensions={"sni_hostname": name}
            ) as answer:
                await _read_some(answer)
                return outcome_of(answer.status_code, answer.headers.get("retry-after"))
        except httpx.TimeoutException:
            return Retry(f"no answer within {self._timeout_s:g} s")
        except (*UNREACHABLE, httpx.DecodingError) as error:
            return Retry(f"{name} cannot be reached, or does not speak HTTP ({type(error).__name__})")


async def _read_some(answer: httpx.Response) -> None:
    """Reads the beginning of an answer, so that a target that waits for it to be read sees no broken connection."""
    size = 0
    async for piece in answer.aiter_raw(READ_BYTES):
        size += len(piece)
        if size >= READ_BYTES:
            return


def outcome_of(status: int, retry_after: str | None = None) -> Outcome:
    """What a status of the target means."""
    if 200 <= status < 300:
        return Sent()
    said = f"HTTP {status}"
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        return Gone(said)
    if 300 <= status < 400:
        return Refused(f"{said}: redirects are not followed; register the address that it leads to")
    if status in _LATER or status >= 500:
        return Retry(said, _seconds(retry_after))
    return Refused(said)


def _seconds(retry_after: str | None) -> float | None:
    """The header in seconds, which is a number of them or a date."""
    if retry_after is None or retry_after.isdecimal():
        return None if retry_after is None else float(retry_after)
    try:
        at = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    wait = (at if at.tzinfo else at.replace(tzinfo=UTC)) - utcnow()
    return max(wait.total_seconds(), 0.0)
