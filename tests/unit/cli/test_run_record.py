"""Processes of another checkout on a data folder are not stopped or changed, and stale records are not believed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from claude_hitl_template.cli.commands import backup, development, starting, status
from claude_hitl_template.cli.commands.doctor import checkout_check, environment_check
from claude_hitl_template.cli.host import postgres, run_record, service
from claude_hitl_template.cli.host.postgres import LocalPostgres
from claude_hitl_template.cli.host.processes import strays
from claude_hitl_template.cli.terminal import chat
from claude_hitl_template.config.secret_files import prepare
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError
from tests.unit.cli.heads import in_checkout, started

pytestmark = pytest.mark.usefixtures("project")  # of which `clean` deletes the caches

type Make = Callable[..., Settings]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


COMMANDS: dict[str, Callable[[Settings], object]] = {
    "up": chat.ensure_up,
    "down": lambda _: starting.down(),
    "clean": lambda _: development.clean(yes=True),
    "restore": lambda settings: backup.restore(settings.data_dir / "backup"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_another_checkout_runs_is_left_alone_and_named_with_its_process(
    make_settings: Make, tmp_path: Path, command: str
) -> None:
    settings = make_settings(api_key="of-the-first", anthropic_api_key="sk-ant-first")
    prepare(settings)
    with in_checkout(tmp_path / "first"), started(settings) as head:
        pass_on = contents(settings.data_dir)
        with in_checkout(tmp_path / "second"), pytest.raises(ConfigError) as raised:
            COMMANDS[command](make_settings(api_key="of-the-second"))
        assert head.poll() is None
    assert str(tmp_path / "first") in raised.value.message
    assert f"process {head.pid}" in raised.value.message
    assert f"{tmp_path / 'first'}/hitl down" in raised.value.fix
    after = contents(settings.data_dir)
    after.pop(str(settings.data_dir / "up.lock"), None)
    pass_on.pop(str(settings.data_dir / "up.lock"), None)
    assert after == pass_on


def test_status_and_doctor_say_which_checkout_runs_it(make_settings: Make, tmp_path: Path) -> None:
    settings = make_settings()
    prepare(settings)
    with in_checkout(tmp_path / "first"), started(settings), in_checkout(tmp_path / "second"):
        facts = status.gather(settings)
        check = checkout_check(run_record.other_checkout(settings))
    assert f"started by the checkout {tmp_path / 'first'}" in "\n".join(status.describe(facts))
    assert (check.level, str(tmp_path / "first") in check.found) == ("warning", True)
    problems = status.find_problems(
        head=True, app={"code": "old"}, code="new", checkout="/first", changed=["HITL_MODEL"], refused=None
    )
    assert problems == ["the service runs the code of another checkout: /first/hitl down, then ./hitl up"]


def test_a_checkout_that_was_moved_while_it_runs_is_the_same_one(make_settings: Make, tmp_path: Path) -> None:
    settings = make_settings()
    prepare(settings)
    with in_checkout(tmp_path / "before"), started(settings):
        (tmp_path / "before").rename(tmp_path / "after")
        with in_checkout(tmp_path / "after"):
            run_record.check_ours(settings)
            assert service.ray_process(settings) is not None


def test_a_data_folder_that_was_moved_while_it_runs_is_the_same_one(
    make_settings: Make, tmp_path: Path
) -> None:
    settings = make_settings()
    prepare(settings)
    with started(settings) as head:
        settings.data_dir.rename(tmp_path / "moved")
        moved = make_settings(data_dir=tmp_path / "moved")
        assert service.changed_settings(moved) == ["HITL_DATA_DIR"]
        assert service.stop(moved).processes == 1
        assert head.poll() is not None


def test_a_copy_of_a_data_folder_is_not_the_one_that_runs(make_settings: Make, tmp_path: Path) -> None:
    settings = make_settings()
    prepare(settings)
    with in_checkout(tmp_path / "first"), started(settings) as head:
        shutil.copytree(settings.data_dir, tmp_path / "copy")
        copy = make_settings(data_dir=tmp_path / "copy")
        with in_checkout(tmp_path / "second"):
            run_record.check_ours(copy)
            assert service.ray_process(copy) is None
            assert service.stop(copy).processes == 0
        assert head.poll() is None


def test_one_folder_by_two_names_is_one_data_folder(make_settings: Make, tmp_path: Path) -> None:
    settings = make_settings()
    prepare(settings)
    (tmp_path / "link").symlink_to(settings.data_dir)
    assert make_settings(data_dir=tmp_path / "link").data_dir == settings.data_dir


@pytest.mark.parametrize("line", [[], ["--head"], ["--head", "--temp-dir=/tmp/of-another"]])
def test_a_record_that_outlived_its_head_is_not_believed(make_settings: Make, line: list[str]) -> None:
    """After a restart of the machine, its process id may belong to another process."""
    settings = make_settings()
    prepare(settings)
    other = subprocess.Popen([sys.executable, "-c", "input()", *line], stdin=subprocess.PIPE)
    try:
        run_record.write(settings, other.pid, {})
        assert service.ray_process(settings) is None
        run_record.check_ours(settings)
        service.stop(settings)
        assert other.poll() is None
    finally:
        other.communicate(b"\n")


@pytest.mark.parametrize("text", ["not json", "[]", "{}", '{"pid": "x", "settings": {}}', '{"pid": -1}'])
def test_a_record_that_is_none_is_no_run(make_settings: Make, text: str) -> None:
    settings = make_settings()
    prepare(settings)
    (settings.data_dir / "run.json").write_text(text)
    assert service.ray_process(settings) is None
    assert service.changed_settings(settings) == []


def test_a_change_of_the_clock_hides_no_head(make_settings: Make) -> None:
    settings = make_settings()
    prepare(settings)
    with started(settings) as head:
        assert "created" not in json.loads((settings.data_dir / "run.json").read_text())
        found = service.ray_process(settings)
        assert found is not None
        assert found.pid == head.pid


def hold(settings: Settings, checkout: Path) -> subprocess.Popen[bytes]:
    """Starts another ./hitl of `checkout`, which holds the data folder until the test ends it."""
    code = (
        "import pathlib\n"
        "from claude_hitl_template.cli.host import run_record\n"
        "from claude_hitl_template.config.settings import Settings\n"
        f"run_record.CHECKOUT = pathlib.Path({str(checkout)!r})\n"
        "with run_record.alone(Settings.load()):\n"
        "    print(flush=True)\n"
        "    input()\n"
    )
    environment = {**os.environ, "HITL_DATA_DIR": str(settings.data_dir)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout
    process.stdout.readline()
    return process


def test_a_command_of_another_checkout_at_work_is_not_disturbed(
    make_settings: Make, tmp_path: Path, project: Path
) -> None:
    settings = make_settings()
    prepare(settings)
    (tmp_path / "first" / "claude_hitl_template").mkdir(parents=True)
    holder = hold(settings, tmp_path / "first")
    try:
        for command in COMMANDS.values():
            with pytest.raises(ConfigError, match=f"process {holder.pid}"):
                command(settings)
        assert (project / ".ruff_cache").exists()
    finally:
        holder.communicate(b"\n")
    with run_record.alone(settings):
        run_record.check_ours(settings)


def test_two_commands_of_one_checkout_take_turns_or_the_second_says_who_is_at_work(
    make_settings: Make,
) -> None:
    settings, said = make_settings(), list[str]()
    prepare(settings)
    holder = hold(settings, run_record.CHECKOUT)

    def step(message: str) -> nullcontext[None]:
        said.append(message)
        holder.communicate(b"\n")
        return nullcontext()

    with pytest.raises(ConfigError, match=f"process {holder.pid}.* is using"):
        development.clean(yes=True)
    with run_record.alone(settings, step):
        assert f"process {holder.pid}" in said[0]


def test_rays_folder_of_another_data_folder_is_not_taken(make_settings: Make, tmp_path: Path) -> None:
    """Two data folders have the same HITL_RAY_TEMP_DIR in their settings."""
    shared = tmp_path / "ray"
    first = make_settings(ray_temp_dir=shared)
    prepare(first)
    shared.mkdir()
    with started(first) as head:
        second = make_settings(data_dir=tmp_path / "second")
        with pytest.raises(ConfigError, match=rf"{first.data_dir} \(process {head.pid}\)") as raised:
            chat.ensure_up(second)
        assert "HITL_RAY_TEMP_DIR" in raised.value.fix
        assert service.stop(second).processes == 0
        development.clean(yes=True)
        assert not second.data_dir.exists()
        assert shared.exists()
        assert head.poll() is None
        assert [p.pid for p in strays(first)] == [head.pid]


def test_a_postgres_that_has_the_number_of_ours_by_now_is_not_ours(tmp_path: Path) -> None:
    program = tmp_path / "postgres"
    program.symlink_to(sys.executable)
    other = subprocess.Popen([program, "-c", "input()"], stdin=subprocess.PIPE, cwd=tmp_path)
    folder = tmp_path / "data" / "cluster"
    folder.mkdir(parents=True)
    try:
        (folder / "postmaster.pid").write_text(f"{other.pid}\n{folder}\n0\n5432\n")
        server = LocalPostgres(tmp_path / "data", tmp_path / "password")
        assert server.pid() is None
        assert not server.stop("immediate")
        assert other.poll() is None
    finally:
        other.communicate(b"\n")


def test_a_postgres_has_ended_when_stop_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pg_ctl returns once the file with the number has gone, and the server deletes that before it exits."""
    folder = tmp_path / "data" / "cluster"
    folder.mkdir(parents=True)
    (tmp_path / "postgres").symlink_to(sys.executable)
    program = tmp_path / "postgres", "-c", "input()"
    with subprocess.Popen(program, stdin=subprocess.PIPE, cwd=folder) as process:
        number = folder / "postmaster.pid"
        number.write_text(f"{process.pid}\n{folder}\n0\n5432\n")
        pg_ctl = tmp_path / "pg_ctl"
        pg_ctl.write_text(f"#!/bin/sh\nrm {number}\n(sleep 0.5; kill {process.pid}) >/dev/null 2>&1 &\n")
        pg_ctl.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(postgres, "server_account", postgres.Account)
        assert LocalPostgres(tmp_path / "data", tmp_path / "password").stop()
        assert not number.exists()
        assert process.poll() is not None


# -- a checkout that was moved


@pytest.mark.parametrize("second_line", [False, True])
def test_doctor_names_commands_that_were_installed_elsewhere(tmp_path: Path, second_line: bool) -> None:
    prefix = tmp_path / "new" / ".venv"
    (prefix / "bin").mkdir(parents=True)
    assert environment_check(prefix).level == "ok"
    for place, level in ((prefix / "bin", "ok"), (tmp_path / "old place" / ".venv/bin", "wrong")):
        line = f"#!{place}/python\n"
        if second_line:
            line = f'#!/bin/sh\n\'\'\'exec\' "{place}/python3.12" "$0" "$@"\n'
        (prefix / "bin" / "ray").write_text(line)
        found = environment_check(prefix)
        assert (found.level, str(place) in found.found) == (level, level == "wrong")


STUB = "import pathlib, sys; print(sys.prefix, pathlib.Path(__file__).parents[2], sys.dont_write_bytecode)"


@pytest.mark.slow
@pytest.mark.parametrize(("spaces", "copied"), [(True, False), (False, True)])
def test_a_checkout_that_was_moved_or_copied_makes_its_venv_anew(
    tmp_path: Path, spaces: bool, copied: bool
) -> None:
    old, new = tmp_path / ("the old" if spaces else "old"), tmp_path / ("the new" if spaces else "new")
    (old / "claude_hitl_template" / "cli").mkdir(parents=True)
    (old / "claude_hitl_template" / "cli" / "__main__.py").write_text(STUB)
    (old / "requirements.lock").write_text("")
    shutil.copy2(run_record.CHECKOUT / "hitl", old / "hitl")

    def run(checkout: Path) -> subprocess.CompletedProcess[str]:
        """Runs this checkout's command from another checkout's folder."""
        done = subprocess.run(
            [checkout / "hitl"],
            cwd=run_record.CHECKOUT,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == f"{checkout}/.venv {checkout} False\n", done.stderr
        return done

    run(old)
    venv_bin = old / ".venv" / "bin"
    first = (
        f"#!/bin/sh\n'''exec' \"{venv_bin}/python\" \"$0\" \"$@\"\n' '''\n"
        if spaces
        else f"#!{venv_bin}/python\n"
    )
    (venv_bin / "ray").write_text(first)
    assert "Making" not in run(old).stderr
    if copied:
        shutil.copytree(old, new, symlinks=True)
    else:
        old.rename(new)
    assert f"Making {new}/.venv again" in run(new).stderr
    assert "Making" not in run(new).stderr
    if copied:
        assert "Making" not in run(old).stderr
