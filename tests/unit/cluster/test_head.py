"""Ray's head: which of Ray's processes it starts, when its dashboard, and which logs stay."""

import os
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from ray._private import services
from ray._private.node import Node
from ray.dashboard.subprocesses.module import SubprocessModule
from ray.dashboard.utils import DashboardHeadModule, get_all_modules

from claude_hitl_template.cluster import head

OPTIONS = [
    "--head", "--port=6379", "--ray-client-server-port=10001", "--dashboard-port=8265", "--node-ip-address=127.0.0.2",
    "--dashboard-host=127.0.0.1", "--temp-dir=/nowhere", "--rest-after=http://127.0.0.1:8001/",
    "--fork-server=/nowhere/fork.sock",
]  # fmt: skip


def test_nothing_is_started_that_nothing_uses() -> None:
    params = head.params(head.parse(OPTIONS))
    assert (params.no_monitor, params.include_log_monitor) == (True, False)
    assert (params.min_worker_port, params.max_worker_port, params.dashboard_agent_listen_port) == (0, 0, 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, as the modules are imported
def test_the_modules_of_the_dashboard_are_some_of_rays() -> None:
    known = {
        kind.__name__ for base in (DashboardHeadModule, SubprocessModule) for kind in get_all_modules(base)
    }
    assert known > set(head.MODULES)


def test_dashboard_and_client_server_are_not_started_in_the_middle_of_rays_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[list[str]] = []

    def start_process(command: list[str], *_: Any, **__: Any) -> None:
        started.append(command)

    def start_api_server(*_: Any, **__: Any) -> None:
        services.start_ray_process(["dashboard"], "dashboard", fate_share=False)

    monkeypatch.setattr(services, "start_ray_process", start_process)
    monkeypatch.setattr(Node, "start_ray_client_server", lambda _: start_process(["client server"]))
    monkeypatch.setattr(Node, "start_api_server", start_api_server)
    node = object.__new__(head.Head)  # without Ray
    node.start_ray_client_server()
    node.start_api_server(include_dashboard=None, raise_on_failure=False)
    assert started == []
    node.start_the_rest()
    assert started == [["client server"], ["dashboard", f"--modules-to-load={','.join(head.MODULES)}"]]


@dataclass
class Ended:
    returncode: int


class Watched(head.Head):
    """A head whose processes end with these statuses at the third look."""

    def __init__(self, *statuses: int) -> None:
        self.statuses, self.looks, self.rests = statuses, 0, 0

    def dead_processes(self) -> list[tuple[str, Ended]]:
        self.looks += 1
        return [(f"process {status}", Ended(status)) for status in self.statuses if self.looks > 2]

    def start_the_rest(self) -> None:
        self.rests += 1


def test_the_dashboard_is_started_once_when_the_service_is_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "WATCH_S", 0.0)
    answers = [False, True]
    node = Watched(0, -15, 1)  # those that SIGTERM ended were asked to
    assert head.watch(node, lambda: answers.pop(0), lambda: None) == ["process 1"]
    assert (answers, node.rests) == ([], 1)


def test_the_dashboard_comes_in_the_end_without_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "PATIENCE_S", 0.0)
    node = Watched(1)
    head.watch(node, lambda: False, lambda: None)
    assert node.rests == 1


def test_the_log_folder_is_tidied_while_the_head_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "WATCH_S", 0.0)
    monkeypatch.setattr(head, "TIDY_S", -1.0)
    node, tidied = Watched(1), list[int]()
    head.watch(node, lambda: True, lambda: tidied.append(node.looks))
    assert tidied == [1, 2]


def logs_of(folder: Path, pid: int, written: float) -> list[Path]:
    """The five files that Ray writes for a worker, and one that it rotated."""
    (folder / "events").mkdir(exist_ok=True)
    (folder / "export_events").mkdir(exist_ok=True)
    names = (
        f"worker-{pid:056x}-01000000-{pid}.out", f"worker-{pid:056x}-01000000-{pid}.err",
        f"python-core-worker-{pid:056x}_{pid}.log", f"python-core-worker-{pid:056x}_{pid}.log.1",
        f"events/event_CORE_WORKER_{pid}.log", f"export_events/event_EXPORT_TASK_{pid}.log",
    )  # fmt: skip
    for path in (paths := [folder / name for name in names]):
        path.write_text("a line\n")
        os.utime(path, (written, written))
    return paths


def test_the_log_files_of_ended_workers_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "KEPT_WORKERS", 2)
    highest = int(Path("/proc/sys/kernel/pid_max").read_text())
    runs = logs_of(tmp_path, os.getpid(), written=1)  # the oldest of all
    ended = [logs_of(tmp_path, highest + number, written=number + 10) for number in (3, 1, 2)]
    others = [
        tmp_path / name
        for name in ("raylet.out", "gcs_server.err", "dashboard_agent.log", "events/event_GCS.log")
    ]
    for path in others:
        path.write_text("a line\n")
    head.remove_old_logs(tmp_path)
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*runs, *ended[0], *ended[2], *others}
    head.remove_old_logs(tmp_path / "missing")


def test_the_folders_of_earlier_starts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "KEPT_STARTS", 2)
    names = [f"session_2026-11-{day:02}_10-00-00_000000_{day}" for day in (28, 1, 2, 29, 3)]
    for name in names:
        (tmp_path / name / "logs").mkdir(parents=True)
    (tmp_path / "session_latest").symlink_to(names[0])
    head.remove_old_starts(tmp_path / names[0])
    assert {path.name for path in tmp_path.iterdir()} == {*(names[i] for i in (0, 2, 3, 4)), "session_latest"}


def test_only_an_answer_of_200_is_healthy() -> None:
    coming = [503, 302, 200]

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(coming.pop(0))
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    server = HTTPServer(("127.0.0.1", 0), Answers)
    Thread(target=server.serve_forever).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    try:
        assert [head.is_healthy(url) for _ in range(3)] == [False, False, True]
    finally:
        server.shutdown()
        server.server_close()
    assert not head.is_healthy(url)
