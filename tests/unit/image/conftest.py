"""Fixtures: a checkout to build from, and a marketplace with plugins."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.image.checkouts import Write

LOCK = "ray==2.60.0 \\\n    --hash=sha256:0a\nclaude-agent-sdk==0.2.187 \\\n    --hash=sha256:0b\nhttpx==0.28.1\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    (root / "claude_hitl_template").mkdir(parents=True)
    (root / "claude_hitl_template" / "__init__.py").write_text("")
    (root / "requirements.lock").write_text(LOCK)
    (root / "Dockerfile").write_text("FROM scratch\n")
    return root


@pytest.fixture
def write(checkout: Path) -> Write:
    """Writes a file of the checkout: a text as it is, other values as JSON."""

    def put(name: str, value: Any) -> Path:
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return put


@pytest.fixture
def marketplace(tmp_path: Path) -> Path:
    """A marketplace with one plugin, `formatter`, in a folder that is not a repository yet."""
    folder = tmp_path / "marketplace"
    listed = {"name": "acme", "plugins": [{"name": "formatter", "source": "./plugins/formatter"}]}
    for name, text in {
        ".claude-plugin/marketplace.json": json.dumps(listed),
        "plugins/formatter/.claude-plugin/plugin.json": '{"name": "formatter", "version": "1.0.0"}',
        "plugins/formatter/commands/format.md": "Format it.",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
