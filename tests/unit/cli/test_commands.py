"""The command line: exit statuses, messages without tracebacks, and no slow imports."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from claude_hitl_template import __version__, code_version
from claude_hitl_template.cli import app, run
from claude_hitl_template.cli.commands import development
from claude_hitl_template.cli.terminal import chat
from claude_hitl_template.config.secret_files import prepare, read_api_key
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError
from claude_hitl_template.model.scenario import Scenarios
from tests.commands import hitl
from tests.unit.cli.heads import started

type Make = Callable[..., Settings]


def test_a_process_of_its_own_ends_with_the_status_and_says_what_is_wrong(make_settings: Make) -> None:
    make_settings()
    command = [sys.executable, "-m", "claude_hitl_template.cli", "approvals"]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert "./hitl up" in result.stderr
    assert "Traceback" not in result.stderr


def test_wrong_usage_is_2(make_settings: Make) -> None:
    make_settings()
    assert hitl("approvals", "deny").returncode == 2
    assert hitl("demo", "--answer", "maybe").returncode == 2
    assert hitl("demo", "--deny-message", "x").returncode == 2
    assert hitl("nonsense").returncode == 2


@pytest.mark.parametrize(
    "arguments",
    [("approvals",), ("sessions",), ("chat",), ("approvals", "allow", "appr_1"), ("sessions", "show", "x")],
)
def test_without_a_service_each_command_says_how_to_start_it(
    make_settings: Make, free_port: int, arguments: tuple[str, ...]
) -> None:
    make_settings(serve_port=free_port, api_key="a-secret-key")
    result = hitl(*arguments)
    assert result.returncode == 1
    assert "./hitl up" in result.stderr
    assert "Traceback" not in result.stderr
    assert "a-secret-key" not in result.stdout + result.stderr


def test_before_the_first_start_there_is_no_key_and_that_is_said(make_settings: Make) -> None:
    make_settings()
    result = hitl("approvals")
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    assert "./hitl up" in result.stderr


def test_without_the_key_of_a_cluster_elsewhere_it_is_said_where_it_is_shown(make_settings: Make) -> None:
    make_settings(serve_url="http://127.0.0.1:1")
    result = hitl("sessions", "list")
    assert result.returncode == 1
    assert "Fix: on the cluster, ./hitl status --show-secrets shows it" in result.stderr


def test_status_says_that_nothing_runs(make_settings: Make, free_port: int) -> None:
    make_settings(serve_port=free_port)
    result = hitl("status")
    assert result.returncode == 1
    assert "nothing runs; start it with ./hitl up" in result.stdout
    assert hitl("status", "--json").stdout.startswith("{")


def test_down_says_that_nothing_ran(make_settings: Make, free_port: int) -> None:
    make_settings(serve_port=free_port)
    result = hitl("down")
    assert (result.returncode, result.stdout) == (0, "nothing ran\n")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("HITL_SERVE_PORT=eight", "HITL_SERVE_PORT"),
        ("HITL_SERVE_PORT=70000", "HITL_SERVE_PORT"),
        ("HITL_HOT_WINDOW_S=-1", "HITL_HOT_WINDOW_S"),
        ("HITL_LOG_LEVEL=loud", "HITL_LOG_LEVEL"),
        ("HITL_RAY_PORT=8001", "the ports must differ"),
    ],
)
def test_a_wrong_value_in_env_is_named_with_what_mends_it(
    make_settings: Make, tmp_path: Path, line: str, named: str
) -> None:
    make_settings()
    (tmp_path / ".env").write_text(line)
    result = hitl("up")
    assert result.returncode == 1
    assert named in result.stderr
    assert "Fix:" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_data_folder_that_cannot_be_written_stops_up(make_settings: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    make_settings(data_dir=tmp_path / "file" / "data")
    result = hitl("up")
    assert result.returncode == 1
    assert "HITL_DATA_DIR" in result.stderr
    assert "Traceback" not in result.stderr


def test_clean_keeps_the_data_unless_told(
    make_settings: Make, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make_settings()
    settings.secrets_dir.mkdir(parents=True)
    development.clean(yes=False)
    assert f"kept {settings.data_dir}" in capsys.readouterr().out
    assert settings.data_dir.is_dir()
    assert not (project / ".ruff_cache").exists()
    development.clean(yes=True)
    assert f"deleting {settings.data_dir}" in capsys.readouterr().out
    assert not settings.data_dir.exists()


@pytest.mark.usefixtures("project")
def test_clean_does_not_delete_a_folder_that_is_not_ours(make_settings: Make, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    make_settings(data_dir=tmp_path / "precious")
    with pytest.raises(ConfigError, match="does not look like"):
        development.clean(yes=True)
    assert (tmp_path / "precious").is_dir()


@pytest.mark.usefixtures("project")
def test_clean_refuses_while_the_service_runs(make_settings: Make) -> None:
    settings = make_settings()
    settings.secrets_dir.mkdir(parents=True)
    with started(settings), pytest.raises(ConfigError, match="the service runs"):
        development.clean(yes=True)
    assert settings.data_dir.is_dir()


def test_help_lists_the_exit_statuses_of_a_conversation(make_settings: Make) -> None:
    make_settings()
    for command in ("demo", "chat"):
        assert "calls still wait" in " ".join(hitl(command, "--help").stdout.split())


def test_help_is_asked_for_by_h_too_and_lists_commands_by_what_they_are_for(make_settings: Make) -> None:
    make_settings()
    text = hitl("-h").stdout
    places = [
        text.index(name) for name in ("Every day", " demo ", "Operating", " doctor ", "Working on", " test ")
    ]
    assert places == sorted(places)
    for command in ("demo", "approvals", "test"):
        assert hitl(command, "-h").stdout == hitl(command, "--help").stdout
    assert "Usage: ./hitl approvals deny" in hitl("approvals", "deny", "-h").stdout


def test_the_version_is_shown(make_settings: Make) -> None:
    make_settings()
    assert hitl("--version").stdout == f"claude-hitl {__version__}, code {code_version()}\n"


def test_completion_is_installed_and_completes_commands(
    make_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_settings()
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    monkeypatch.setenv("HOME", str(tmp_path))
    command = f"{sys.executable} -m claude_hitl_template.cli"
    said = subprocess.run(
        ["bash", "-c", f"{command} --install-completion; true"], capture_output=True, text=True, check=True
    ).stdout
    assert "completion for bash is installed" in said
    (tmp_path / "hitl").write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    (tmp_path / "hitl").chmod(0o755)
    script = (
        "source .bash_completions/hitl.sh; COMP_WORDS=(./hitl app); COMP_CWORD=1; "
        "_hitl_completion ./hitl; echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "approvals\n"


def test_the_demo_names_what_the_offline_model_has_a_script_for(make_settings: Make) -> None:
    make_settings()
    text = " ".join(hitl("demo", "--help").stdout.split())
    prompts = [scenario.prompt for scenario in Scenarios.load().known]
    assert sorted(prompts) == sorted(chat.PROMPTS)
    for prompt in prompts:
        assert f'"{prompt}"' in text


def test_the_line_for_clients_is_shell_and_gives_address_and_key(make_settings: Make, tmp_path: Path) -> None:
    settings = make_settings(data_dir=tmp_path / "a folder's name")
    prepare(settings)
    line = chat.export_line(settings).removeprefix("Clients").strip()
    script = f"{line}; echo $HITL_URL $HITL_API_KEY"
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert said == [settings.base_url, read_api_key(settings)]
    assert not settings.base_url.endswith("/v1")
    assert read_api_key(settings) not in line


SLOW = {
    "ray",
    "claude_agent_sdk",
    "sqlalchemy",
    "fastapi",
    "fsspec",
    "grpc",
    "yaml",
    "cryptography",
    "rfc8785",
    "claude_hitl_template.image.build",
}
FOR_A_COMMAND = {"httpx", "pydantic", "psutil", "claude_hitl_template.config.settings"}


@pytest.mark.parametrize(
    ("command", "unused"),
    [
        ("--version", SLOW | FOR_A_COMMAND | {"rich"}),
        ("--help", SLOW | FOR_A_COMMAND),
        ("configuration", SLOW | {"httpx", "rich"}),
        ("status", SLOW),
        ("approvals", SLOW | {"claude_hitl_template.cli.host.service"}),
        ("sessions", SLOW | {"claude_hitl_template.cli.host.service"}),
    ],
)
def test_commands_do_not_import_what_is_slow(
    make_settings: Make, free_port: int, command: str, unused: set[str]
) -> None:
    make_settings(serve_port=free_port, api_key="a-key")
    code = (
        "import sys; from claude_hitl_template.cli import app, run; "
        f"sys.argv[1:] = [{command!r}]; run.run(app.app); "
        f"print([m for m in {sorted(unused)} if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.splitlines()[-1] == "[]"


def test_the_table_of_commands_says_what_they_say_of_themselves() -> None:
    for name, entry in app.ENTRIES.items():
        command = app.load(name)
        assert " ".join(str(command.help).split("\n\n")[0].split()) == entry.help, name
        assert (command.name, command.hidden) == (name, entry.hidden)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("a", "b"), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(4), 4),
        (SystemExit(None), 0),
        (None, 0),
    ],
)
def test_how_it_ended_is_the_exit_status(
    error: BaseException | None, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def app(**_: object) -> None:
        if error is not None:
            raise error

    assert run.run(app) == status
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_message_cannot_act_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def app(**_: object) -> None:
        raise ConfigError("bad \x1b[2J")

    assert run.run(app) == 1
    assert capsys.readouterr().err == "error: bad \\x1b[2J\n"
