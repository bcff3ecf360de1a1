"""A process that looks like the Ray head of a data folder, and a checkout's record of it."""

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from claude_hitl_template.cli.host import run_record, service
from claude_hitl_template.cli.host.processes import temp_dir
from claude_hitl_template.config.settings import Settings


@contextmanager
def started(settings: Settings, code: str = "") -> Generator[subprocess.Popen[bytes]]:
    """Starts a process that looks like a head with these settings, recorded by the checkout in `run_record.CHECKOUT`.

    `code`: what it does before it waits for its end.
    """
    options = ["--head", f"--temp-dir={temp_dir(settings)}"]
    marks = {"HITL_CLUSTER": str(temp_dir(settings)), "HITL_DATA_DIR": str(settings.data_dir)}
    head = subprocess.Popen(
        [sys.executable, "-c", f"print(flush=True)\n{code}\ninput()", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **marks},
        start_new_session=True,
    )
    try:
        if head.stdout is not None:
            head.stdout.readline()  # before its program has begun, its command line may be empty
        known = service.fingerprints(settings) if settings.secrets_dir.joinpath("signing").exists() else {}
        run_record.write(settings, head.pid, known)
        yield head
    finally:
        head.kill()
        head.communicate()


@contextmanager
def in_checkout(place: Path) -> Generator[None]:
    """Makes the code inside of the context run as a checkout at `place`, which is created if it does not exist."""
    (place / "claude_hitl_template").mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_record, "CHECKOUT", place)
        yield
