"""The benchmark behind `./hitl bench`: the service and the bare SDK, side by side. It measures, and decides nothing."""

from enum import StrEnum


class Part(StrEnum):
    """What can be measured alone."""

    TURNS = "turns"
    CROWD = "crowd"
    RECOVERY = "recovery"
    SANDBOX = "sandbox"
