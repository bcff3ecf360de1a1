"""A data folder on its own small disk, which a chaos run can fill to the last byte."""

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
        """Mounts the disk; returns False without the permission to do so."""
        if os.geteuid() != 0:
            return False
        self._folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={self._size},mode=0711", "none", str(self._folder)]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    def fill(self, for_s: float, enough: threading.Event | None = None) -> None:
        """Keeps the disk full for `for_s` seconds, also if space is freed meanwhile. Blocking; `enough` ends it earlier."""
        enough = enough or threading.Event()
        path, until = self._folder / FILLER, time.monotonic() + for_s
        try:
            with path.open("wb", buffering=0) as file:
                while time.monotonic() < until and not enough.wait(0.1):
                    _fill(file)
        finally:
            path.unlink(missing_ok=True)

    def unmount(self) -> None:
        """Copies the files into the folder, except those of processes, and unmounts the disk. The unmount is lazy, because
        a process that is ending may still use the disk."""
        kept = self._folder.with_name("kept")
        shutil.copytree(
            self._folder, kept, symlinks=True, ignore=shutil.ignore_patterns("run", "*.sock", FILLER)
        )
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
