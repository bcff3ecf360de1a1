"""A clock that tests move."""

from datetime import UTC, datetime, timedelta


class FakeClock:
    """Always returns `now` until a test moves it. It starts at the current time by default."""

    def __init__(self, now: datetime | None = None) -> None:
        self.now = now or datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
