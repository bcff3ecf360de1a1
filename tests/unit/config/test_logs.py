"""A log entry is one line, and has no effect on the terminal that shows it."""

import pytest
import structlog

from claude_hitl_template.config import logs


def test_control_characters_are_escaped(capfd: pytest.CaptureFixture[str]) -> None:
    before = structlog.get_config()
    try:
        logs.configure("INFO")
        structlog.get_logger().warning("refused", target="a\x1b[2Jb\r\nlevel=info \u202e\x9bc\x00", name="Ä")
    finally:
        structlog.configure(**before)
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.endswith("\n")
    assert not [char for char in said.rstrip("\n") if not char.isprintable()]
    assert "\\x1b[2Jb" in said
    assert "\\u202e" in said
    assert "Ä" in said
