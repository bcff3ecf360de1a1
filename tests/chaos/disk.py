"""A data folder on a disk of its own, a small one, which can be filled to its last byte."""

import errno
import io
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

SIZE = "1g"  # more than a run of an hour needs
FILLER = "filler"
PIECES = (1024 * 1024, 4096, 1)


class Disk:
    def __init__(self, folder: Path, size: str = SIZE) -> None:
        self._folder, self._size = folder, size

    def mount(self) -> bool:
        """False where we may not."""
        if os.geteuid() != 0:
            return False
        self._folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={self._size},mode=0711", "none", str(self._folder)]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    def fill(self, for_s: float, enough: threading.Event | None = None) -> None:
        """Blocking; takes all the room there is, also what is given back meanwhile. `enough` ends it earlier."""
        enough = enough or threading.Event()
        path, until = self._folder / FILLER, time.monotonic() + for_s
        try:
            with path.open("wb", buffering=0) as file:
                while time.monotonic() < until and not enough.wait(0.1):
                    _fill(file)
        finally:
            path.unlink(missing_ok=True)

    def unmount(self) -> None:
        """What is on it stays in the folder, but for what belongs to processes. Lazily: one that still ends may hold it."""
        kept = self._folder.with_name("kept")
        shutil.copytree(self._folder, kept, symlinks=True, ignore=shutil.ignore_patterns("run", FILLER))
        subprocess.run(["umount", "--lazy", str(self._folder)], check=True)
        self._folder.rmdir()
        kept.rename(self._folder)


def _fill(file: io.RawIOBase) -> None:
    for size in PIECES:
        try:
            while file.write(b"x" * size):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
