"""Pages of listings that hold a limited number of bytes, however large their entries are."""

from collections.abc import Awaitable, Callable

from pydantic import BaseModel

PAGE_BYTES = 8 * 1024 * 1024  # about as much as is read at once for one answer
PIECE = 64  # entries that are read at once; one of the largest legal size each is what the ledger must bear


async def fill[T: BaseModel, K](
    fetch: Callable[[K | None, int], Awaitable[list[T]]], place: Callable[[T], K], after: K | None, limit: int
) -> tuple[list[T], bool]:
    """Up to `limit` entries behind `after`, fewer when they are over PAGE_BYTES together; and whether there are more.

    `fetch(after, count)` reads the next ones in order, `place` says where one stands. The first one is always there,
    however large.
    """
    found: list[T] = []
    size = 0
    while True:
        count = min(PIECE, limit + 1 - len(found))
        piece = await fetch(after, count)
        for entry in piece:
            size += len(entry.model_dump_json())
            if len(found) == limit or (found and size > PAGE_BYTES):
                return found, True
            found.append(entry)
        if len(piece) < count:
            return found, False
        after = place(piece[-1])
