"""`hitl up` reports obstacles with their fixes, and changes nothing of another cluster."""

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest

from claude_hitl_template.cli.host import service
from claude_hitl_template.cli.host.processes import (
    LOOPBACK,
    node_address,
    private_dir,
    ray_environment,
    temp_dir,
)
from claude_hitl_template.config.secret_files import Prepared, forget_model_key, prepare
from claude_hitl_template.config.settings import Settings
from claude_hitl_template.errors import ConfigError
from tests.unit.cli.heads import started

type Make = Callable[..., Settings]


def listener(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


def test_a_port_that_is_taken_is_named_with_its_holder(make_settings: Make, free_port: int) -> None:
    settings = make_settings(serve_port=free_port)
    with listener(free_port), pytest.raises(ConfigError) as raised:
        service.check_ports(settings)
    me = psutil.Process()
    assert f"port {free_port} (HITL_SERVE_PORT) is taken by {me.name()} (process {me.pid})" in str(
        raised.value
    )
    assert "HITL_SERVE_PORT" in raised.value.fix


def test_a_port_that_another_ray_holds_says_so(make_settings: Make, free_port: int, tmp_path: Path) -> None:
    code = f"import socket; s = socket.create_server(('127.0.0.1', {free_port})); print(flush=True); input()"
    named = tmp_path / "gcs_server"
    named.symlink_to(sys.executable)
    other = subprocess.Popen([named, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout
        other.stdout.readline()
        with pytest.raises(ConfigError, match="another Ray cluster: gcs_server") as raised:
            service.check_ports(make_settings(ray_port=free_port))
        assert "end that cluster with its own means" in raised.value.fix
    finally:
        other.communicate(b"\n")


def test_ray_is_for_other_hosts_only_at_an_address_that_they_can_reach(make_settings: Make) -> None:
    for host, expected in (("127.0.0.1", LOOPBACK), ("0.0.0.0", LOOPBACK), ("10.0.0.7", "10.0.0.7")):
        assert node_address(make_settings(host=host)) == expected


def test_starting_stops_at_a_taken_port_and_starts_nothing(make_settings: Make, free_port: int) -> None:
    settings = make_settings(ray_port=free_port)
    prepare(settings)
    with listener(free_port), pytest.raises(ConfigError, match=f"port {free_port}"):
        service.start(settings, lambda _: nullcontext())
    assert service.ray_process(settings) is None


def test_a_data_folder_that_cannot_be_made_says_which_setting_mends_it(
    make_settings: Make, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written") as raised:
        prepare(make_settings(data_dir=tmp_path / "file" / "data"))
    assert "HITL_DATA_DIR" in raised.value.fix


def test_preparing_makes_one_key_and_keeps_it(make_settings: Make) -> None:
    settings = make_settings()
    made = prepare(settings).made_key
    assert made
    assert made.startswith("hitl_")
    assert prepare(settings) == Prepared()
    assert (settings.secrets_dir / "api-key").read_text() == made


def test_a_key_that_is_replaced_is_nowhere(make_settings: Make) -> None:
    made = prepare(make_settings()).made_key
    assert made
    settings = make_settings(api_key="mine")
    assert prepare(settings) == Prepared(replaced_key=True)
    assert not [path for path in settings.secrets_dir.iterdir() if made in path.read_text()]
    assert (settings.secrets_dir / "api-key").read_text() == "mine"
    assert prepare(settings) == Prepared()


def test_secrets_are_for_their_owner_only(make_settings: Make) -> None:
    settings = make_settings(anthropic_api_key="sk-ant-x", api_key="mine")
    assert prepare(settings) == Prepared()
    assert stat.S_IMODE(settings.data_dir.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in settings.secrets_dir.iterdir()}
    assert modes == dict.fromkeys(("admin-password", "api-key", "model-key", "ray-token", "signing"), 0o600)


def test_a_model_key_that_is_gone_is_forgotten(make_settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(make_settings(anthropic_api_key="sk-ant-x"))
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    settings = make_settings()
    assert forget_model_key(settings)
    assert not (settings.secrets_dir / "model-key").exists()
    assert not forget_model_key(settings)


@pytest.fixture
def running(make_settings: Make) -> Iterator[Settings]:
    """Settings with which a head was started."""
    settings = make_settings(api_key="one")
    prepare(settings)
    with started(settings):
        yield settings


@pytest.mark.parametrize(
    ("name", "value", "variable"),
    [
        ("hot_window_s", 5, "HITL_HOT_WINDOW_S"),
        ("anthropic_api_key", "sk-ant-new", "ANTHROPIC_API_KEY"),
        ("api_key", "another", "HITL_API_KEY"),
    ],
)
def test_a_setting_that_changed_since_the_start_is_noticed(
    running: Settings, make_settings: Make, name: str, value: object, variable: str
) -> None:
    assert service.changed_settings(running) == []
    changed = make_settings(**{name: value})
    assert service.changed_settings(changed) == [variable]
    prepare(changed)
    assert service.changed_settings(changed) == [variable]


def test_another_model_key_counts_without_a_restart(
    running: Settings, make_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = make_settings(anthropic_api_key="sk-ant-new")
    prepare(changed)
    monkeypatch.setattr(service, "_start_missing", lambda *_, **__: [])
    before = service.ray_process(changed)
    assert service.start(changed, lambda _: nullcontext()) == [
        "the model key changed: it counts from the next request to the model"
    ]
    assert service.ray_process(changed) == before
    assert service.changed_settings(changed) == []


def test_the_same_data_folder_named_from_elsewhere_is_no_change(
    running: Settings, make_settings: Make, tmp_path: Path
) -> None:
    assert service.changed_settings(make_settings(home=tmp_path.parent, api_key="one")) == []


def test_the_record_of_a_run_says_no_secret(running: Settings) -> None:
    assert "one" not in (running.data_dir / "run.json").read_text()


def test_stopping_ends_strays_and_nothing_else(make_settings: Make, free_port: int) -> None:
    settings = make_settings(serve_port=free_port)
    sleep = [sys.executable, "-c", "input()"]
    marked = {**os.environ, "HITL_CLUSTER": str(temp_dir(settings))}
    stray = subprocess.Popen(sleep, env=marked, stdin=subprocess.PIPE)
    reader = subprocess.Popen([*sleep, str(temp_dir(settings))], stdin=subprocess.PIPE)
    try:
        assert service.stop(settings) == service.Stopped(1, None)
        assert stray.poll() is not None
        assert reader.poll() is None
        assert service.stop(settings).processes == 0
    finally:
        for process in (stray, reader):
            process.kill()
            process.communicate()


def test_stopping_ends_what_the_head_s_processes_left(make_settings: Make, tmp_path: Path) -> None:
    settings = make_settings()
    prepare(settings)
    note = tmp_path / "left"
    os.mkfifo(note)
    leave = f"sleep 600 & echo $! > {note}"  # as a worker, whose fork server was killed
    with started(settings, f"import subprocess; subprocess.run(['sh', '-c', {leave!r}])") as head:
        left = psutil.Process(int(note.read_text()))
        psutil.wait_procs(psutil.Process(head.pid).children())
        assert left.ppid() != head.pid
        service.stop(settings)
        assert not left.is_running()


def test_a_stop_that_is_interrupted_leaves_nothing_half_ended(
    running: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = service.ray_process(running)
    assert head is not None
    wait = psutil.wait_procs

    def interrupted(*_: object, **__: object) -> None:
        monkeypatch.setattr(psutil, "wait_procs", wait)
        raise KeyboardInterrupt

    monkeypatch.setattr(psutil, "wait_procs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        service.stop(running)
    assert not head.is_running()


def test_rays_processes_are_not_handed_secrets(make_settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "t")
    monkeypatch.setenv("DB_PASSWORD", "p")
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:p@h/d")
    environment = ray_environment(make_settings(api_key="k", anthropic_api_key="m", hot_window_s=7))
    secret = {"SOME_TOKEN", "DB_PASSWORD", "HITL_API_KEY", "ANTHROPIC_API_KEY", "DATABASE_URL"}
    assert not secret & set(environment)
    assert environment["HITL_HOT_WINDOW_S"] == "7.0"


def test_rays_log_files_are_bounded(make_settings: Make) -> None:
    environment = ray_environment(make_settings())
    kept = 1 + int(environment["RAY_ROTATION_BACKUP_COUNT"])
    assert kept * int(environment["RAY_ROTATION_MAX_BYTES"]) <= 60_000_000  # each file and its older ones


def test_rays_folder_is_short_and_one_per_data_folder(make_settings: Make, tmp_path: Path) -> None:
    one, other = (temp_dir(make_settings(data_dir=tmp_path / name)) for name in ("a", "b"))
    assert one != other
    assert len(str(one)) < 40


def test_rays_folder_is_in_one_that_is_closed_to_others(make_settings: Make, tmp_path: Path) -> None:
    """Ray makes its own folders writable for every user of the machine."""
    settings = make_settings()
    around = private_dir(settings)
    try:
        around.mkdir(mode=0o755)
        service.make_ray_folder(settings)
        assert around.stat().st_mode & 0o777 == 0o700
        around.rmdir()
        around.symlink_to(tmp_path)  # by another user, to a folder of theirs
        for unsafe in (settings, make_settings(ray_temp_dir="/tmp")):
            with pytest.raises(ConfigError, match="not a folder of yours alone"):
                service.make_ray_folder(unsafe)
    finally:
        around.unlink()


@pytest.mark.parametrize("panel", [True, False])
def test_what_the_application_does_not_need_starts_after_it(
    make_settings: Make, monkeypatch: pytest.MonkeyPatch, free_port: int, panel: bool
) -> None:
    settings = make_settings(panel=panel, ray_port=free_port)
    prepare(settings)
    order: list[str] = []

    def note(what: str, answer: Any = None) -> Callable[..., Any]:
        return lambda *_, **__: (order.append(what), answer)[1]

    monkeypatch.setattr(service, "check_ports", note("ports"))
    monkeypatch.setattr(service, "_start_ray", note("Ray"))
    monkeypatch.setattr(service, "_deploy_patiently", note("application"))
    monkeypatch.setattr(service, "_is_complete", lambda _: "dashboard" in order)
    monkeypatch.setattr(service, "_until_complete", note("dashboard"))
    monkeypatch.setattr(service.panel, "start_missing", note("panel", ["panel"]))
    monkeypatch.setattr(service.panel, "wait", note("panel waited for"))
    monkeypatch.setattr(service, "private_dir", lambda _: settings.data_dir)
    said: list[str] = []

    def step(message: str) -> AbstractContextManager[None]:
        said.append(message)
        return nullcontext()

    done = service.start(settings, step)
    before = ["ports", "Ray", "application"]
    assert order == [*before, *(["panel", "dashboard", "panel waited for"] if panel else ["dashboard"])]
    assert [message.partition(":")[0].partition(" (")[0] for message in said] == [
        "Starting Ray and the application",
        "REST is ready at http",
    ]
    assert done == ["started Ray", "deployed the application", *(["started the panel"] if panel else [])]
