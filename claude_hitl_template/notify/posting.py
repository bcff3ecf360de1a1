"""Posts to a service of someone else, and says what its answer means for a delivery."""

from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime

import httpx

from claude_hitl_template.domain.models import utcnow
from claude_hitl_template.notify.sender import Gone, Outcome, Refused, Retry, Sent


async def post(
    client: httpx.AsyncClient, url: str, body: bytes, headers: Mapping[str, str], *, target: str
) -> Outcome:
    """Posts, and reads no more of the answer than its status and headers.

    Args:
        client: Sets the timeout and which addresses may be reached.
        url: The address, which no outcome names.
        body: The request's body.
        headers: The request's headers.
        target: What people call the other side, such as "the push service".
    """
    try:
        async with client.stream("POST", url, content=body, headers=headers) as response:
            return _outcome(response, target)
    except httpx.TimeoutException:
        return Retry(f"{target} did not answer in time")
    except httpx.TransportError as error:
        return Retry(f"{target} cannot be reached ({type(error).__name__})")


def _outcome(response: httpx.Response, target: str) -> Outcome:
    status = response.status_code
    if response.is_success:
        return Sent()
    why = f"{target} answered {status}"
    if status in (404, 410):
        return Gone(why)
    if status in (408, 429) or status >= 500:
        return Retry(why, _retry_after(response.headers.get("retry-after", "")))
    return Refused(why)


def _retry_after(given: str) -> float | None:
    """Seconds of the header, which is a number of them or a date."""
    if given.isascii() and given.isdecimal():
        return float(given)
    try:
        at = parsedate_to_datetime(given)
    except ValueError:
        return None
    return max((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - utcnow().timestamp(), 0.0)
