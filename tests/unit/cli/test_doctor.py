"""Each check reports its problem with the fix, and never shows a secret."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from claude_hitl_template.claude.sandbox import sandbox_check
from claude_hitl_template.cli.commands import doctor
from claude_hitl_template.cli.commands.doctor import Check
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.presentation.checks import lines

type Make = Callable[..., Settings]
GIB = 1024**3


def mended(check: Check) -> bool:
    """Whether the check has a fix exactly if it is not ok."""
    return (check.level == "ok") != bool(check.fix)


@pytest.mark.parametrize(
    ("check", "level"),
    [
        (doctor.python_check((3, 12)), "ok"),
        (doctor.python_check((3, 11)), "wrong"),
        (doctor.cli_version_check("2.1.330 (Claude Code)\n", "2.1.330", "m"), "ok"),
        (doctor.cli_version_check("2.2.0", "2.1.330", "m"), "ok"),
        (doctor.cli_version_check("2.1.9 (Claude Code)", "2.1.330", "m"), "wrong"),
        (doctor.cli_version_check("", "2.1.330", "m"), "wrong"),
        (doctor.cli_check(Path("/nonexistent/claude")), "wrong"),
        (doctor.ray_version_check("2.60.0", None), "ok"),
        (doctor.ray_version_check("2.60.0", "2.60.0"), "ok"),
        (doctor.ray_version_check("2.60.0", "2.59.0"), "wrong"),
        (doctor.socket_check(Path("/tmp/hitl-0-12345678")), "ok"),
        (doctor.socket_check(Path("/tmp") / ("x" * 60)), "wrong"),
        (doctor.disk_check(2 * GIB), "ok"),
        (doctor.disk_check(GIB - 1), "warning"),
        (doctor.files_check("file:///tmp/files"), "ok"),
        (doctor.files_check("nonsense://x"), "wrong"),
        (doctor.memory_check(2 * GIB), "ok"),
        (doctor.memory_check(2 * GIB - 1), "warning"),
        (doctor.key_check(None), "ok"),
        (doctor.key_check("sk-ant-abc"), "ok"),
        (doctor.key_check("sk-ant abc"), "wrong"),
        (doctor.key_check("sk-ant\n"), "wrong"),
        (doctor.key_check('"sk-ant"'), "wrong"),
        (doctor.key_check("sk-ant\u200b"), "wrong"),
        (doctor.service_check(None, False, "c"), "warning"),
        (doctor.service_check(None, True, "c"), "wrong"),
        (doctor.service_check({"code": "b"}, True, "c"), "warning"),
        (doctor.service_check({"code": "c"}, True, "c"), "ok"),
        (doctor.setpriv_check("/usr/bin/setpriv"), "ok"),
        (doctor.setpriv_check(None), "wrong"),
        (doctor.channels_check([]), "ok"),
        (doctor.channels_check(["webhook deploys (wbhk_1): HTTP 500"]), "warning"),
        (sandbox_check("off"), "wrong"),
    ],
    ids=str,
)
def test_each_check_tells_good_from_bad(check: Check, level: str) -> None:
    assert check.level == level
    assert mended(check)


def test_the_floor_that_holds_is_named_and_a_wrong_file_is_told_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HITL_HOME", str(tmp_path))
    monkeypatch.delenv("HITL_POLICY", raising=False)
    check = doctor.floor_check(Settings.load())
    assert (check.level, check.found.split(":")[0]) == ("ok", "built in")
    monkeypatch.setenv("HITL_POLICY", "floor.yaml")  # below HITL_HOME
    (tmp_path / "floor.yaml").write_text("rules:\n  - {rule: bash, policy: always_deny}\n")
    check = doctor.floor_check(Settings.load())
    assert check.level == "wrong"
    assert "floor.yaml, line 2: rules.0: tool names are case-sensitive" in check.found
    assert mended(check)


def test_that_sandboxes_are_switched_off_is_said_with_the_setting() -> None:
    check = sandbox_check("off")
    assert "HITL_SANDBOX=off" in check.found
    assert "unset HITL_SANDBOX" in check.fix


def test_the_key_is_never_shown() -> None:
    assert "sk-ant" not in "".join(lines(doctor.key_check("'sk-ant-oops '")))


def test_a_missing_folder_is_checked_where_it_would_be_made(tmp_path: Path) -> None:
    assert doctor.folder_check(tmp_path / "a" / "b").level == "ok"
    (tmp_path / "file").write_text("")
    found = doctor.folder_check(tmp_path / "file" / "b")
    assert (found.level, "HITL_DATA_DIR" in found.fix) == ("wrong", True)


def test_secrets_that_others_may_read_are_named(tmp_path: Path) -> None:
    assert doctor.secrets_check(tmp_path / "none").level == "ok"
    (tmp_path / "api-key").write_text("x")
    (tmp_path / "api-key").chmod(0o640)
    found = doctor.secrets_check(tmp_path)
    assert (found.level, "api-key" in found.found, "chmod 600" in found.fix) == ("wrong", True, True)
    (tmp_path / "api-key").chmod(0o600)
    assert doctor.secrets_check(tmp_path).level == "ok"


def test_a_port_is_free_or_held_by_someone(make_settings: Callable[..., Settings], free_port: int) -> None:
    settings = make_settings(serve_port=free_port)
    assert doctor.port_check(settings, "serve_port").level == "ok"
    with socket.create_server(("127.0.0.1", free_port)):
        found = doctor.port_check(settings, "serve_port")
    assert found.level == "wrong"
    assert "HITL_SERVE_PORT" in found.fix


def test_an_upstream_that_cannot_be_reached_is_wrong(free_port: int) -> None:
    found = doctor.upstream_check(f"http://127.0.0.1:{free_port}", "sk")
    assert (found.level, "ANTHROPIC_BASE_URL" in found.fix) == ("wrong", True)
    assert doctor.upstream_check("http://[", "sk").level == "wrong"


@pytest.mark.parametrize(("status", "level"), [(200, "ok"), (404, "ok"), (401, "wrong"), (403, "wrong")])
def test_a_key_that_the_model_refuses_is_told_and_not_shown(
    answering: Callable[..., str], status: int, level: str
) -> None:
    found = doctor.upstream_check(answering(status), "sk-ant-oops")
    assert found.level == level
    assert "oops" not in "".join(lines(found))


def test_a_key_that_no_request_can_carry_is_told_and_not_shown(answering: Callable[..., str]) -> None:
    found = doctor.upstream_check(answering(200), "sk-\u200b")
    assert (found.level, "\u200b" in "".join(lines(found))) == ("warning", False)


def test_ray_of_another_user_is_told_by_its_folder(tmp_path: Path) -> None:
    me = tmp_path.stat().st_uid
    assert doctor.ray_folder_check(tmp_path / "none", me).level == "ok"
    assert doctor.ray_folder_check(tmp_path, me).level == "ok"
    tmp_path.chmod(0o777)  # as Ray makes it
    found = doctor.ray_folder_check(tmp_path, me)
    assert (found.level, found.fix) == ("wrong", f"chmod 700 {tmp_path}")
    found = doctor.ray_folder_check(tmp_path, me + 1)
    assert (found.level, "HITL_RAY_TEMP_DIR" in found.fix) == ("wrong", True)


def test_how_many_sessions_fit_is_what_is_reserved_for_each_by_cpu_and_memory(make_settings: Make) -> None:
    settings = make_settings()
    assert doctor.capacity_check(settings, 2, 24 * GIB).found.startswith(
        "about 8 sessions awake at once (by CPU 8, "
    )
    assert doctor.capacity_check(settings, 64, 10 * GIB).found.startswith("about 7 ")
    assert doctor.capacity_check(settings, 2, GIB).level == "wrong"
