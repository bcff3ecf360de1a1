"""Runs the command line: expected errors become a message and an exit status."""

import os
import sys
from collections.abc import Callable
from typing import Any

from claude_hitl_template.cli import completion
from claude_hitl_template.cli.program import NAME, named
from claude_hitl_template.config.grpc import keep_direct
from claude_hitl_template.errors import HitlError
from claude_hitl_template.presentation.text import visible

INTERRUPTED = 130  # as shells have it


def run(app: Callable[..., Any]) -> int:
    """Runs the command line; never ends in a traceback for an expected error. Returns the exit status."""
    keep_direct()
    completion.prepare()
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]  # its own commands take as long as all of the rest
    try:
        app(prog_name=NAME, complete_var=completion.VARIABLE)
    except HitlError as error:
        print(f"error: {visible(named(str(error)))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader is gone; without this, Python says so again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0
