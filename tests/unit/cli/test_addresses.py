"""A value of HITL_HOST or of a port has one clear outcome in every command: it works, or the error names the fix."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from claude_hitl_template.cli import run
from claude_hitl_template.cli.app import app
from claude_hitl_template.cli.commands.doctor import address_check
from claude_hitl_template.cli.host import service
from claude_hitl_template.cli.host.panel import write_settings
from claude_hitl_template.config.secret_files import prepare, prepare_panel
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError

type Make = Callable[..., Settings]

COMMANDS = [
    "up", "down", "demo", "chat", "status", "approvals", "sessions", "deploy", "secrets list", "logs", "doctor",
    "doctor --remote", "shell", "backup FILE", "restore FILE", "clean", "bench",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_says_that_ipv6_is_not_possible_and_what_is(
    make_settings: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    make_settings()
    monkeypatch.setenv("HITL_HOST", "::1")
    monkeypatch.setattr(sys, "argv", ["hitl", *command.split()])
    assert run.run(app) == 1
    said = capfd.readouterr().err
    assert said.startswith("error: HITL_HOST is not usable: '::1' is an IPv6 address")
    assert "set it to 127.0.0.1 (this machine only), 0.0.0.0" in said


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("::", "IPv6"),
        ("[::1]", "IPv6"),
        ("[::]", "IPv6"),
        ("::ffff:127.0.0.1", "IPv6"),
        ("fe80::1%eth0", "IPv6"),
        ("2001:db8::7", "IPv6"),
        ("1.2.3", "not an IPv4 address"),
        ("127.1", "not an IPv4 address"),
        ("2130706433", "not an IPv4 address"),
        ("0x7f.1", "not an IPv4 address"),
        ("127.0.0.1:8001", "not an IPv4 address"),
        ("http://127.0.0.1", "not an IPv4 address"),
        ("127.0.0.1/8", "not an IPv4 address"),
        ("myhost", "not an IPv4 address"),
        ("*", "not an IPv4 address"),
        ("127.0.0.1, 10.0.0.5", "not an IPv4 address"),
        ("256.0.0.1", "not an IPv4 address"),
        ("255.255.255.255", "no machine has"),
        ("224.0.0.1", "no machine has"),
        ("0.0.0.1", "no machine has"),
    ],
)
def test_what_nothing_can_listen_on_is_refused_with_what_can_be_set(
    make_settings: Make, value: str, why: str
) -> None:
    with pytest.raises(ConfigError, match="HITL_HOST is not usable") as raised:
        make_settings(host=value)
    assert why in raised.value.message
    assert "127.0.0.1" in raised.value.message
    assert "correct HITL_HOST" in raised.value.fix


@pytest.mark.parametrize(
    ("value", "host", "reached_at"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        (" 127.0.0.1 ", "127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1", "127.0.0.1"),
        ("LocalHost", "127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "0.0.0.0", "127.0.0.1"),
        ("10.0.0.5", "10.0.0.5", "10.0.0.5"),
        ("", "127.0.0.1", "127.0.0.1"),
    ],
)
def test_what_works_is_one_address_that_is_shown_as_it_is_reached(
    make_settings: Make, value: str, host: str, reached_at: str
) -> None:
    settings = make_settings(host=value)
    assert settings.host == host
    assert settings.base_url == f"http://{reached_at}:{settings.serve_port}/claude-hitl"
    assert settings.own_dashboard == f"http://{reached_at}:{settings.dashboard_port}"


def test_an_address_of_another_machine_stops_the_start_and_doctor_names_it(make_settings: Make) -> None:
    settings = make_settings(host="192.0.2.7")
    with pytest.raises(
        ConfigError, match=r"192.0.2.7 \(HITL_HOST\) is not an address of this machine"
    ) as raised:
        service.check_ports(settings)
    assert "set HITL_HOST to 127.0.0.1" in raised.value.fix
    assert address_check(settings.host).level == "wrong"
    assert address_check("127.0.0.1").level == "ok"
    assert address_check("0.0.0.0").level == "ok"


@pytest.mark.parametrize(
    ("host", "listens_on"), [("127.0.0.1", "127.0.0.1"), ("127.0.0.9", "127.0.0.9"), ("10.0.0.5", "0.0.0.0")]
)
def test_the_panel_is_open_to_others_only_where_the_service_is(
    make_settings: Make, host: str, listens_on: str
) -> None:
    settings = make_settings(host=host)
    prepare(settings)
    prepare_panel(settings)
    write_settings(settings)
    said = (settings.panel_dir / ".env").read_text()
    assert f"KODO_APP_SERVER='http://{listens_on}:{settings.panel_port}'" in said


@pytest.mark.parametrize("value", ["0", "-1", "65536", "eighty", "80.5", "0x50", "80:81"])
def test_a_port_that_is_none_is_refused_by_its_name(make_settings: Make, value: str) -> None:
    with pytest.raises(ConfigError, match="HITL_PANEL_PORT is not usable"):
        make_settings(panel_port=value)


def test_a_port_given_twice_names_both_settings(make_settings: Make) -> None:
    with pytest.raises(ConfigError) as raised:
        make_settings(dashboard_port=8001)
    assert (
        raised.value.message == "HITL_DASHBOARD_PORT and HITL_SERVE_PORT are both 8001: the ports must differ"
    )
    assert ".env" in raised.value.fix


def test_a_host_in_a_profile_is_read_as_in_the_environment(make_settings: Make, tmp_path: Path) -> None:
    make_settings()
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "vm.env").write_text("HITL_HOST=::1\n")
    with pytest.raises(ConfigError, match="IPv6"):
        Settings.load("vm")
