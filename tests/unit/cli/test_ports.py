"""Randomly chosen ports stay free until they are used."""

import socket
from pathlib import Path

import pytest

from claude_hitl_template.cli.host import ports
from claude_hitl_template.cli.host.ports import free_ports, is_free


def test_ports_differ_and_are_free() -> None:
    found = free_ports(50)
    assert len(set(found)) == 50
    assert all(is_free(port) for port in found)


def test_what_somebody_has_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    held, free = free_ports(2)
    monkeypatch.setattr(ports, "_CHOSEN_FROM", [held, free])
    with socket.create_server(("127.0.0.1", held)):
        assert free_ports(1) == [free]


def test_no_connection_gets_one_by_chance() -> None:
    handed_out = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if not handed_out.exists():
        pytest.skip("only Linux tells which ports it hands out to connections")
    lowest, highest = map(int, handed_out.read_text().split())
    assert not [port for port in free_ports(200) if lowest <= port <= highest]
