"""The seccomp filter, carried out as the kernel does, for both kinds of machine."""

import errno
import struct

import pytest

from claude_hitl_template.claude.syscall_filter import MACHINES, syscall_filter

ALLOW, ABSENT, NO_FAMILY = 0x7FFF0000, 0x00050000 | errno.ENOSYS, 0x00050000 | errno.EAFNOSUPPORT
X86_64, AARCH64, I386 = 0xC000003E, 0xC00000B7, 0x40000003


def decided(program: bytes, architecture: int, number: int, argument: int = 0) -> int:
    """What the filter says of a call; the kernel's `struct seccomp_data` is number, architecture, address, arguments."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, argument, *[0] * 5)
    steps, at, loaded = list(struct.iter_unpack("=HBBI", program)), 0, 0
    while True:
        code, if_true, if_false, value = steps[at]
        at += 1
        match code:
            case 0x20:
                [loaded] = struct.unpack_from("=I", data, value)
            case 0x15:
                at += if_true if loaded == value else if_false
            case 0x35:
                at += if_true if loaded >= value else if_false
            case _:
                return int(value)


@pytest.mark.parametrize(
    ("machine", "architecture", "absent", "allowed", "socket"),
    [
        ("x86_64", X86_64, [250, 248, 249, 425, 426, 427, 323, 321, 298], [0, 1, 59, 56, 272, 165], 41),
        ("aarch64", AARCH64, [219, 217, 218, 425, 426, 427, 282, 280, 241], [63, 64, 221, 220, 97, 40], 198),
    ],
)
def test_what_reaches_past_the_namespaces_is_absent_and_all_else_is_there(
    machine: str, architecture: int, absent: list[int], allowed: list[int], socket: int
):
    """Allowed ones: read, write, execve, clone, unshare, mount, which the scope of a command is made with."""
    program = syscall_filter(machine) or b""
    assert {decided(program, architecture, number) for number in absent} == {ABSENT}
    assert {decided(program, architecture, number) for number in allowed} == {ALLOW}
    families = {family: decided(program, architecture, socket, family) for family in range(46)}
    assert {family for family, result in families.items() if result == ALLOW} == {1, 2, 10, 16}
    assert set(families.values()) == {ALLOW, NO_FAMILY}
    # The kernel takes the first argument for an int: what is above 32 bits does not make it another family.
    assert decided(program, architecture, socket, (1 << 32) | 40) == NO_FAMILY


def test_calls_by_another_table_of_numbers_are_absent():
    """The numbers of i386 and x32 mean other calls."""
    program = syscall_filter("x86_64") or b""
    assert decided(program, I386, 1) == ABSENT
    assert decided(program, X86_64, 0x40000000 | 41, 40) == ABSENT
    assert decided(program, X86_64, 0xFFFFFFFF) == ABSENT


def test_a_machine_whose_numbers_are_not_known_has_no_filter():
    assert syscall_filter("riscv64") is None
    assert set(MACHINES) == {"x86_64", "aarch64"}
