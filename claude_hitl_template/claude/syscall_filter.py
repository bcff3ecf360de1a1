"""The seccomp filter of a sandbox: system calls that reach what no namespace keeps apart.

- Keys: the session keyring of the service's process is every child's, and holds what the service's user keeps there.
- Sockets of other families than AF_UNIX, AF_INET, AF_INET6 and AF_NETLINK: AF_VSOCK reaches the host of a virtual machine
  from any network namespace.
- io_uring, which makes sockets without the call that is looked at; and userfaultfd, bpf and perf_event_open, which are for
  root, or for attacks on the kernel.

Processes inherit it, and cannot take it away.
"""

import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Numbers of one kind of machine: its audit architecture, `socket`, and the calls that there are not in a sandbox."""

    architecture: int
    socket: int
    absent: tuple[int, ...]


_IO_URING = (425, 426, 427)  # setup, enter, register
# add_key, request_key, keyctl, userfaultfd, bpf, perf_event_open; from the kernel's tables of system calls.
MACHINES = {
    "x86_64": Machine(0xC000003E, 41, (248, 249, 250, 323, 321, 298, *_IO_URING)),
    "aarch64": Machine(0xC00000B7, 198, (217, 218, 219, 282, 280, 241, *_IO_URING)),
}
FAMILIES = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK

# linux/filter.h and linux/seccomp.h
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_ALLOW, _FAIL_WITH = 0x7FFF0000, 0x00050000
_OTHER_ABI = 0x40000000  # numbers from here on are x32's


def syscall_filter(machine: str) -> bytes | None:
    """The program for bubblewrap's `--seccomp`; None for a machine whose numbers are not known here."""
    known = MACHINES.get(machine)
    return None if known is None else b"".join(_program(known))


def _program(machine: Machine) -> Iterator[bytes]:
    absent = _FAIL_WITH | errno.ENOSYS
    yield _step(_LOAD, _ARCHITECTURE_AT)
    yield _step(_JUMP_IF_EQUAL, machine.architecture, if_true=1)
    yield _step(_RETURN, absent)
    yield _step(_LOAD, _NUMBER_AT)
    yield from _return_if(_JUMP_IF_AT_LEAST, _OTHER_ABI, absent)
    for number in machine.absent:
        yield from _return_if(_JUMP_IF_EQUAL, number, absent)
    yield _step(_JUMP_IF_EQUAL, machine.socket, if_true=1)
    yield _step(_RETURN, _ALLOW)
    yield _step(_LOAD, _FIRST_ARGUMENT_AT)
    for family in FAMILIES:
        yield from _return_if(_JUMP_IF_EQUAL, family, _ALLOW)
    yield _step(_RETURN, _FAIL_WITH | errno.EAFNOSUPPORT)


def _return_if(jump: int, value: int, result: int) -> Iterator[bytes]:
    yield _step(jump, value, if_false=1)
    yield _step(_RETURN, result)


def _step(code: int, value: int, *, if_true: int = 0, if_false: int = 0) -> bytes:
    """`struct sock_filter`. The jumps say how many steps are left out."""
    return struct.pack("=HBBI", code, if_true, if_false, value)
