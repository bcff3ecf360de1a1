"""Pages of a listing, and cursors that are valid for their own listing only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import TypeAdapter

from claude_hitl_template.domain.canonical_json import digest
from claude_hitl_template.domain.models import Page
from claude_hitl_template.errors import InvalidInput

_LISTING_CHARS = 16
_FILTERS = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class Cursor:
    """Where a page of a listing begins.

    On the wire a cursor names, by a digest, the listing it belongs to: its address, filters and order. With others it
    would skip or repeat entries without an error.

    Attributes:
        page: The store's own cursor; None at the beginning.
        listing: Digest of the listing.
    """

    page: str | None
    listing: str

    @classmethod
    def of(cls, request: Request, page: str | None, **filters: Any) -> Self:
        """`page` is the caller's. Raises InvalidInput for a cursor of another listing."""
        address = {"route": request.scope["route"].path_format, **request.path_params}
        known = _FILTERS.dump_python({**filters, **address}, mode="json")
        listing = digest(known)[:_LISTING_CHARS]
        if page is None:
            return cls(None, listing)
        inner, _, of_listing = page.rpartition(".")
        if not inner or of_listing != listing:
            raise InvalidInput(
                "not a cursor of this listing; repeat the request as it was, with next_page of its response",
                "page",
            )
        return cls(inner, listing)

    def response[T](self, page: Page[T], wire: Callable[[T], dict[str, Any]]) -> JSONResponse:
        """The page as JSON, with the cursor of the next one. FastAPI does not validate a Response: that would take as
        long as reading the page."""
        next_page = None if page.next_page is None else f"{page.next_page}.{self.listing}"
        return JSONResponse({"data": [wire(one) for one in page.data], "next_page": next_page})


def single_page(data: Sequence[dict[str, Any]], page: str | None) -> JSONResponse:
    """A listing that is always one page. Raises InvalidInput for any cursor."""
    if page is not None:
        raise InvalidInput("not a cursor of this listing; everything is on the first page", "page")
    return JSONResponse({"data": list(data), "next_page": None})


def each_once[T: str](values: Sequence[T] | None) -> list[T]:
    """Sorted, so that the same filter is the same however it is written."""
    return sorted(set(values or ()))
