"""Logs are shown in order of time, complete, for one session if requested, and never with a secret."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from claude_hitl_template.cli.commands.logs import LogFile, logs, masker, new_lines
from claude_hitl_template.cli.host.processes import temp_dir
from claude_hitl_template.config.secret_files import prepare
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import InvalidInput


@pytest.fixture
def settings(make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Settings]:
    found = make_settings(ray_temp_dir=tmp_path / "ray", api_key="hitl_own-key-of-this-service")
    prepare(found)
    yield found
    shutil.rmtree(tmp_path / "ray", ignore_errors=True)


def write(settings: Settings, name: str, text: str) -> Path:
    worker = name.startswith("worker-")
    folder = temp_dir(settings) / "session_latest" / "logs" if worker else settings.logs_dir
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a") as file:
        file.write(text)
    return folder / name


def test_lines_of_all_files_come_in_order_of_time(settings: Settings) -> None:
    write(settings, "ray.log", "2030-01-01 10:00:00,100 one\n  more of one\n2030-01-01 10:00:02,000 three\n")
    write(
        settings,
        "worker-ab-01-77.err",
        ":job_id:01\n:actor_name:ServeReplica:app:Ledger\nINFO 2030-01-01 10:00:01.5 two\n",
    )
    found = new_lines(settings, {})
    assert [line.split("  ", 1)[1].strip() for line in found] == [
        "2030-01-01 10:00:00,100 one",
        "more of one",
        "INFO 2030-01-01 10:00:01.5 two",
        "2030-01-01 10:00:02,000 three",
    ]
    assert found[2].startswith("app:Ledger[77]  ")


def test_only_what_is_new_and_whole_is_read(settings: Settings) -> None:
    known: dict[Path, LogFile] = {}
    write(settings, "ray.log", "a\nhalf")
    assert new_lines(settings, known) == ["ray  a"]
    write(settings, "ray.log", " and half\n")
    write(settings, "worker-x-01-1.out", "b\n")
    assert new_lines(settings, known) == ["ray  half and half", "worker[1]  b"]
    (settings.logs_dir / "ray.log").write_text("c\n")
    assert new_lines(settings, known) == ["ray  c"]


@pytest.mark.parametrize(
    "secret",
    [
        "hitl_own-key-of-this-service",
        "sk-ant-api03-abc_def",
        "hitl_abcdefghijklmnopqrstuvwxyz",
        "Bearer abc.def",
        "x-api-key: zzz",
    ],
)
def test_secrets_are_masked(settings: Settings, secret: str) -> None:
    shown = masker(settings)(f"before {secret} after")
    assert secret not in shown
    assert "[secret] after" in shown


def test_hostile_lines_are_made_visible(settings: Settings) -> None:
    assert masker(settings)("a\x1b]0;title\x07") == "a\\x1b]0;title\\x07"


def test_a_session_and_a_number_of_lines_can_be_chosen(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    write(settings, "ray.log", "".join(f"2030-01-01 10:00:0{n} sesn_{n % 2}\n" for n in range(6)))
    logs(session="sesn_1", follow=False, count=2)
    assert capsys.readouterr().out.split("\n") == [
        "ray  2030-01-01 10:00:03 sesn_1",
        "ray  2030-01-01 10:00:05 sesn_1",
        "",
    ]
    logs(session=None, follow=False, count=0)
    assert capsys.readouterr().out == ""


def test_one_log_can_be_chosen_and_an_unknown_one_is_answered_with_those_that_there_are(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    write(settings, "ray.log", "one\n")
    write(settings, "panel.log", "two\n")
    logs(session="panel", follow=False, count=10)
    assert capsys.readouterr().out == "panel  two\n"
    with pytest.raises(InvalidInput, match=r"no log has this name; the logs are: panel, ray"):
        logs(session="penal", follow=False, count=10)
