"""A new user goes through the README from top to bottom, in a fresh clone: every block, as it stands but for the port."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from claude_hitl_template.cli.terminal.dialogue import TOOL_PROMPT
from tests.contract.tmux import Tmux
from tests.integration.harness import Service
from tests.integration.trees import ROOT, Tree

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```|((?:^    \S[^\n]*\n)+)", re.DOTALL | re.MULTILINE)
WALK_S = 1800


@dataclass(frozen=True)
class User:
    """Someone in a clone, in a shell. The ports are free ones; every other setting is its default."""

    clone: Path
    ports: dict[str, str]

    def decide(self, command: str, answer: str) -> str:
        """The screen after a command that asks for a decision, and this answer."""
        line = f"cd {self.clone} && {command}"
        terminal = {"TERM": "screen-256color", "LANG": "C.UTF-8"}
        screen = Tmux(self.clone.parent, 120, ["bash", "-ec", line], {**self.ports, **terminal})
        try:
            screen.until(TOOL_PROMPT, patience_s=WALK_S)
            screen.type(answer)
            return screen.until("exit status 0")
        finally:
            screen.close()

    def run(self, command: str, typed: str = "") -> str:
        """What a command prints, which succeeds, while the user types this."""
        ours = ("HITL_", "ANTHROPIC_", "RAY_", "VIRTUAL_ENV")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        done = subprocess.run(
            ["bash", "-ec", command.replace("8001", self.ports["HITL_SERVE_PORT"])],
            env={**inherited, **self.ports},
            cwd=self.clone,
            input=typed,
            capture_output=True,
            text=True,
            timeout=WALK_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    ports = {name: port for name, port in Service(tmp_path).environment.items() if name.endswith("_PORT")}
    (tmp_path / "clone").mkdir()
    one = User(Tree.check_out(tmp_path / "clone").root, ports)
    yield one
    one.run("./hitl down")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_a_new_user_runs_every_block_of_the_readme_from_top_to_bottom(user: User):
    found = [match.groups(default="") for match in BLOCK.finditer((ROOT / "README.md").read_text())]
    (_, _, commands), (shell, variables, _), (language, example, _) = found
    assert (shell, language) == ("sh", "python")
    demo, tests = [re.sub(r"\s+#.*", "", line).strip() for line in commands.splitlines()]
    assert tests == "./hitl test"  # takes minutes: tests/unit/test_docs.py runs it on one file

    shown = user.decide(demo, "a")
    assert "Done: `hello.txt`" in shown
    for name in ("HITL_URL", "HITL_API_KEY"):
        assert name in shown

    (user.clone / "example.py").write_text(example)  # the client is the user's own, not one of the service
    said = user.run(f"{variables}{sys.executable} example.py", "y\n")
    assert "Write {'file_path': 'hello.txt'" in said
    assert "Done: `hello.txt`" in said.splitlines()[-1]
    written = list((user.clone / ".hitl" / "workspaces").glob("*/hello.txt"))
    assert len(written) == 2, "one by the demo, one by the example"
