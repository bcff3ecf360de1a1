"""The benchmark behind `./hitl bench`: the service and the bare SDK, side by side. It measures, and decides nothing."""

from enum import StrEnum


class Part(StrEnum):
    """What can be measured alone."""

    TURNS = "turns"
    ASKS = "asks"
    TOGETHER = "together"
    STREAMS = "streams"
    STORM = "storm"
    STARTUP = "startup"
    CROWD = "crowd"
    RECOVERY = "recovery"
    SANDBOX = "sandbox"
