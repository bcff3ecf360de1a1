"""How the service's processes log: one line an event, to standard error, which Ray keeps in files."""

import logging
import sys
from typing import Any

import structlog

from claude_hitl_template.presentation.text import visible

REQUEST_ID = "request_id"  # under this name each line says of which request it came


def request_id() -> str:
    """The id of the request that is being answered here; "" outside of one."""
    return str(structlog.contextvars.get_contextvars().get(REQUEST_ID, ""))


def configure(level: str) -> None:
    """Tracebacks are rendered plainly: structlog's own rendering shows local variables, and keys are among them."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(
                key_order=["timestamp", "level", "event"], bool_as_flag=False
            ),
            _without_controls,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def _without_controls(_logger: object, _method: str, line: Any) -> str:
    """Escapes control characters: text of a model or a client must not move a terminal's cursor or begin a line."""
    return visible(line)
