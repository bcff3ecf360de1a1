"""A failing disk below SQLite: its file system layer (VFS) returns errors at writing and at `fsync`.

The layer is the real one, with two of its methods replaced; what was written before an `fsync` that fails is in the file.
"""

import _sqlite3
import ctypes
from collections.abc import Generator
from contextlib import contextmanager
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int, c_int64, c_void_p, cast, pointer
from typing import Any, ClassVar, Literal

type Fault = Literal["write", "fsync"]

# Names, order and numbers are those of sqlite3.h.
CODES: dict[Fault, int] = {"write": 10 | 3 << 8, "fsync": 10 | 4 << 8}
_METHODS = (
    "xClose", "xRead", "xWrite", "xTruncate", "xSync", "xFileSize", "xLock", "xUnlock", "xCheckReservedLock",
    "xFileControl", "xSectorSize", "xDeviceCharacteristics", "xShmMap", "xShmLock", "xShmBarrier", "xShmUnmap",
    "xFetch", "xUnfetch",
)  # fmt: skip
_REST = (
    "xDelete", "xAccess", "xFullPathname", "xDlOpen", "xDlError", "xDlSym", "xDlClose", "xRandomness", "xSleep",
    "xCurrentTime", "xGetLastError", "xCurrentTimeInt64", "xSetSystemCall", "xGetSystemCall", "xNextSystemCall",
)  # fmt: skip


class _IoMethods(Structure):
    _fields_: ClassVar = [("iVersion", c_int), *((name, c_void_p) for name in _METHODS)]


class _File(Structure):
    _fields_: ClassVar = [("pMethods", POINTER(_IoMethods))]


class _Vfs(Structure):
    _fields_: ClassVar = [
        ("iVersion", c_int), ("szOsFile", c_int), ("mxPathname", c_int), ("pNext", c_void_p), ("zName", c_char_p),
        ("pAppData", c_void_p), ("xOpen", c_void_p), *((name, c_void_p) for name in _REST),
    ]  # fmt: skip


_OPEN = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p)
_WRITE = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)
_SYNC = CFUNCTYPE(c_int, c_void_p, c_int)


class FailingDisk:
    """Fails the operations in `faults` for files whose name ends with `suffix`; `met` counts the failures."""

    def __init__(self, suffix: str) -> None:
        self.faults: set[Fault] = set()
        self.met = 0
        self._suffix = suffix.encode()
        self._library = ctypes.CDLL(_sqlite3.__file__)
        self._library.sqlite3_vfs_find.restype = POINTER(_Vfs)
        self._real: Any = self._library.sqlite3_vfs_find(None)
        self._open = _OPEN(self._open_file)
        self._kept: list[Any] = []  # what SQLite points to
        self._methods: dict[int, Any] = {}
        real = self._real.contents
        self._vfs = _Vfs.from_buffer_copy(real)
        self._vfs.zName, self._vfs.pNext = b"failing-disk", None
        self._vfs.xOpen = cast(self._open, c_void_p).value

    def register(self) -> None:
        self._library.sqlite3_vfs_register(pointer(self._vfs), 1)

    def unregister(self) -> None:
        self._library.sqlite3_vfs_unregister(pointer(self._vfs))
        self._library.sqlite3_vfs_register(self._real, 1)

    def _open_file(self, _vfs: int, name: int | None, file: int, flags: int, out: int | None) -> int:
        opened: int = _OPEN(self._real.contents.xOpen)(
            cast(self._real, c_void_p).value, name, file, flags, out
        )
        ours = name is not None and (cast(name, c_char_p).value or b"").endswith(self._suffix)
        if opened == 0 and ours:
            cast(file, POINTER(_File)).contents.pMethods = pointer(self._failing(file))
        return opened

    def _failing(self, file: int) -> _IoMethods:
        real = cast(file, POINTER(_File)).contents.pMethods.contents
        at = ctypes.addressof(real)
        if at not in self._methods:
            made = _IoMethods.from_buffer_copy(real)
            write, sync = _WRITE(real.xWrite), _SYNC(real.xSync)
            ours = (
                _WRITE(lambda *args: self._fails("write") or write(*args)),
                _SYNC(lambda *args: self._fails("fsync") or sync(*args)),
            )
            made.xWrite, made.xSync = (cast(method, c_void_p).value for method in ours)
            self._kept += [write, sync, *ours]
            self._methods[at] = made
        return self._methods[at]

    def _fails(self, fault: Fault) -> int:
        if fault not in self.faults:
            return 0
        self.met += 1
        return CODES[fault]


@contextmanager
def failing_disk(suffix: str) -> Generator[FailingDisk]:
    """Puts all files that SQLite opens in this process from now on on the failing disk."""
    disk = FailingDisk(suffix)
    disk.register()
    try:
        yield disk
    finally:
        disk.unregister()
