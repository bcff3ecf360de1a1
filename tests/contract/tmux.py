"""A terminal of a given width in which a test types as a user does, and reads the screen."""

import os
import re
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PATIENCE_S = 60.0
HEIGHT = 44
ARTIFACTS = Path(os.environ.get("HITL_TEST_ARTIFACTS", Path(__file__).parents[2] / "test-artifacts"))


class Tmux:
    """One command in one pane of a tmux server of its own. Screens are kept in test-artifacts/terminal."""

    def __init__(self, folder: Path, width: int, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._socket, self.width, self._scene = folder / f"tmux-{width}", width, 0
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in env.items())
        # The pane stays after the command, with its exit status; Ctrl-C is for the command.
        line = f"trap : INT; env -u COLUMNS -u LINES {variables} {shlex.join(command)}"
        line += '; echo "exit status $?"; exec sleep 600'
        size = ("-x", str(width), "-y", str(HEIGHT))
        self._run("-f", os.devnull, "new-session", "-d", *size, "sh", "-c", line)

    def close(self) -> None:
        self._run("kill-server")

    def type(self, text: str, *, enter: bool = True) -> None:
        self._run("send-keys", "-l", text)
        if enter:
            self.press("Enter")

    def press(self, key: str) -> None:
        self._run("send-keys", key)

    def screen(self, *, colours: bool = False) -> str:
        """The visible text."""
        return self._run("capture-pane", "-p", *(["-e"] if colours else []))

    def until(self, text: str, *, name: str | None = None, patience_s: float = PATIENCE_S) -> str:
        """Waits until the screen's last lines hold `text`, wherever lines are wrapped. Keeps the screen under `name`."""
        deadline = time.monotonic() + patience_s
        wanted = re.sub(r"\s", "", text)
        while wanted not in re.sub(r"\s", "", self.screen()):
            if time.monotonic() > deadline:
                raise AssertionError(f"{text!r} did not appear:\n{self.screen()}")
            time.sleep(0.05)
        if name is not None:
            self.keep(name)
        return self.screen()

    def keep(self, name: str) -> None:
        self._scene += 1
        folder = ARTIFACTS / "terminal"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.width}-{self._scene:02}-{name}.txt"
        path.write_text(self.screen())
        path.with_suffix(".ansi").write_text(self.screen(colours=True))

    def clear(self) -> None:
        """Empties the screen, so that the next `until` sees only what comes."""
        self._run("send-keys", "-R")
        self._run("clear-history")

    def _run(self, *arguments: str) -> str:
        command = ["tmux", "-S", str(self._socket), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
