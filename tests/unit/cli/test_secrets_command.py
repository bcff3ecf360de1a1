"""A secret leaves this machine on a way that nobody can read along, and by no argument."""

import io
import sys
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from claude_hitl_template.cli.app import app
from claude_hitl_template.cli.commands import secrets
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError, InvalidInput

VALUE = "sk-ant-secret"
type Make = Callable[..., Settings]


@pytest.mark.parametrize(
    "url", ["http://localhost:8001/x", "http://127.0.0.1:1", "http://[::1]:8001", "https://cluster.example"]
)
def test_loopback_and_tls_are_good_ways(url: str) -> None:
    secrets.check_way(url)


@pytest.mark.parametrize("url", ["http://10.0.0.5:8001", "http://vm.local", "http://localhost.example:8001"])
def test_a_secret_does_not_cross_a_network_in_the_clear(url: str) -> None:
    with pytest.raises(ConfigError, match="without TLS") as raised:
        secrets.check_way(url)
    assert "ssh -N -L" in raised.value.fix


def test_it_refuses_before_it_reads_the_secret(make_settings: Make) -> None:
    make_settings(serve_url="http://10.255.255.1:8001", api_key="x")
    result = CliRunner().invoke(app, ["secrets", "set", "ANTHROPIC_API_KEY"], input=VALUE)
    assert isinstance(result.exception, ConfigError)
    assert VALUE not in str(result.exception)


def test_the_value_comes_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{VALUE}\n"))
    assert secrets.read_value("ANTHROPIC_API_KEY") == VALUE
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    with pytest.raises(InvalidInput, match="no value for ANTHROPIC_API_KEY"):
        secrets.read_value("ANTHROPIC_API_KEY")


@pytest.mark.parametrize("name", ["anthropic_api_key", "HITL_API_KEY", "../signing", "\x1b[2J"])
def test_an_unknown_name_is_told_with_those_there_are(make_settings: Make, name: str, free_port: int) -> None:
    make_settings(serve_port=free_port, api_key="x")
    for command in ("set", "remove"):
        result = CliRunner().invoke(app, ["secrets", command, name], input=VALUE)
        assert isinstance(result.exception, InvalidInput)
        assert "there are: ANTHROPIC_API_KEY" in str(result.exception)


def test_a_value_as_an_argument_is_wrong_usage(make_settings: Make) -> None:
    make_settings()
    assert CliRunner().invoke(app, ["secrets", "set", "ANTHROPIC_API_KEY", VALUE]).exit_code == 2
