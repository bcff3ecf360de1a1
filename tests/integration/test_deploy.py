"""A changed working tree goes live on a running cluster; if it has an error, the previous code keeps running.

Each deploy takes half a minute, so several tests check one of them, and run in the order of this file.
"""

import socket
import socketserver
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from claude_hitl_template.cli.host.ports import free_ports
from claude_hitl_template.cluster import setup_worker
from claude_hitl_template.config.build_info import python_minor
from tests.integration.harness import KEY, Conversation, Service, command_line, script, wait_for
from tests.integration.trees import CODE, Tree, addresses, applications, empty, status
from tests.serving import loopback

pytestmark = pytest.mark.slow

CUT_BYTES = 200_000  # less than a package
SECRET = "sk-ant-sent-by-the-test"
# Begins, waits for the file `go`, and ends; its files show if it ran twice.
WORKS = "echo x >> begun; while [ ! -e go ]; do sleep 0.1; done; echo x >> done; echo worked"
DEFECT = """

def _defect(self, *_, **__):
    raise RuntimeError('a defect of the test')


Supervisor.__init__ = _defect
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that keeps the CLI running while calls wait."""
    one = Service(tmp_path_factory.mktemp("cluster"), {"HITL_SPARE_OWNERS": "0"})
    try:
        one.up(HITL_HOT_WINDOW_S="3600")
        yield one
    finally:
        one.down()


@pytest.fixture(scope="module")
def tree(cluster: Service, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    one = Tree.check_out(tmp_path_factory.mktemp("mac") / "tree")
    # Where Serve is to listen, should it not run.
    one.profile("vm", **addresses(cluster), HITL_SERVE_PORT=cluster.environment["HITL_SERVE_PORT"])
    return one


def serving(cluster: Service) -> dict[str, Any]:
    return cluster.call("GET", "/v1/version")


@contextmanager
def unchanged(cluster: Service) -> Generator[None]:
    """Asserts that the same code serves before and after, and that no deploy in Serve is unfinished."""
    before = serving(cluster)
    yield
    assert serving(cluster) == before
    assert status(cluster) == "RUNNING"


def test_a_first_deploy_that_fails_leaves_an_empty_cluster_empty_and_the_next_one_is_not_hindered(
    cluster: Service, tree: Tree
) -> None:
    empty(cluster)
    with tree.spoilt(f"{CODE}/cluster/supervisor.py", "\nimport no_such_dependency\n"):
        said = tree.fails_to_deploy()
    assert "No module named 'no_such_dependency'" in said
    assert "nothing ran before, and nothing runs now" in said
    wait_for("what failed to be gone", lambda: not applications(cluster) or None)
    assert not cluster.processes("ServeReplica:")
    tree.name_version("0.1.0+first")
    tree.deploy()
    assert serving(cluster)["version"] == "0.1.0+first"


@dataclass(frozen=True)
class Second:
    """The cluster after a second deploy, during which one session waited for a decision on `asked` and another one
    worked. `failed`: what went wrong for a client that asked all the time."""

    said: str
    failed: list[str]
    waiting: Conversation
    asked: str
    code_before: str
    working: Conversation


@pytest.fixture(scope="module")
def second(cluster: Service, tree: Tree) -> Second:
    working = cluster.start_session(script(WORKS))
    working.decide(working.until_asked())
    wait_for("the command to begin", lambda: (working.workspace / "begun").exists() or None)
    waiting = cluster.start_session("Write hello.txt with a greeting")
    asked = waiting.until_asked()
    before = code_of(cluster.owner_of(waiting))
    tree.name_version("0.1.0+second")
    with asking(cluster) as failed:
        said = tree.deploy()
    return Second(said, failed, waiting, asked, before, working)


@contextmanager
def asking(cluster: Service) -> Generator[list[str]]:
    """A client that asks one thing after another; yields what failed."""
    failed, enough = list[str](), threading.Event()

    def ask() -> None:
        while not enough.wait(0.2):
            try:
                httpx.get(
                    f"{cluster.base}/v1/sessions", headers={"x-api-key": KEY}, timeout=60
                ).raise_for_status()
            except httpx.HTTPError as error:
                failed.append(repr(error))

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        yield failed
    finally:
        enough.set()
        asker.join()


def code_of(process: psutil.Process) -> str:
    """Returns the folder of the package whose code a worker of Ray runs."""
    return process.cwd()


def test_a_changed_tree_is_live_and_every_side_says_which_it_is(
    cluster: Service, tree: Tree, second: Second
) -> None:
    found = serving(cluster)
    assert (found["version"], found["dirty"]) == ("0.1.0+second", True)
    assert f"package {found['package']}" in second.said
    assert "MiB" in second.said or "KiB" in second.said
    done = tree.hitl("status", "--profile", "vm")
    assert done.returncode == 0, done.stdout
    assert found["package"] in done.stdout
    with tree.spoilt(f"{CODE}/__init__.py", "\n# newer\n"):
        done = tree.hitl("status", "--profile", "vm")
    assert done.returncode == 1
    assert "another code than the working tree: ./hitl deploy" in done.stdout


def test_no_request_fails_while_a_deploy_comes(second: Second) -> None:
    assert not second.failed


def test_a_turn_that_runs_while_a_deploy_comes_ends_and_its_call_ran_once_or_is_told_as_unknown(
    second: Second,
) -> None:
    """The outcome is unknown if the new ledger starts after the owner's lease ended, as on a very busy machine."""
    session = second.working
    (session.workspace / "go").touch()
    assert session.until_idle()["type"] == "end_turn"
    (result,) = [event["content"][0]["text"] for event in session.events("agent.tool_result")]
    assert session.events("agent.message")[-1]["content"][0]["text"].startswith("Done: ")
    assert (session.workspace / "begun").read_text() == "x\n"
    if not result.startswith("Outcome unknown"):
        assert result.strip() == "worked"
        assert (session.workspace / "done").read_text() == "x\n"


def test_what_waits_while_a_deploy_comes_is_decided_and_runs_with_the_new_code(
    cluster: Service, second: Second
) -> None:
    session = second.waiting
    session.until_parked()
    session.decide(second.asked)
    assert session.until_idle()["type"] == "end_turn"
    assert (session.workspace / "hello.txt").exists()
    now = code_of(cluster.owner_of(session))
    assert serving(cluster)["package"] in now
    assert now != second.code_before


def test_the_workers_of_a_package_are_forked_off_one_process_that_has_its_code(
    cluster: Service, second: Second
) -> None:
    assert second.said
    servers = {cluster.replica(name).parent() for name in ("Ledger", "Ingress", "Supervisor")}
    (server,) = servers
    assert server is not None
    assert command_line(server).strip() == f"{setup_worker.TITLE}, hitl-{serving(cluster)['package']}"


def test_up_on_the_cluster_leaves_what_was_deployed(cluster: Service, second: Second) -> None:
    with unchanged(cluster):
        cluster.up()
    assert serving(cluster)["package"]


def test_what_cannot_be_read_stops_at_the_development_machine(cluster: Service, tree: Tree) -> None:
    with unchanged(cluster), tree.spoilt(f"{CODE}/session/runner.py", "\ndef broken(:\n"):
        said = tree.fails_to_deploy()
    assert f"{CODE}/session/runner.py, line " in said
    assert "nothing was uploaded" in said


def test_a_key_that_serve_would_ignore_is_named(cluster: Service, tree: Tree) -> None:
    with unchanged(cluster), tree.spoilt("data/config/claude_hitl_template.yaml", "\nnum_replica: 2\n"):
        said = tree.fails_to_deploy()
    assert "claude_hitl_template.yaml: num_replica is not a key that Serve knows" in said


def test_deploys_that_fail_one_after_the_other_are_each_taken_back(cluster: Service, tree: Tree) -> None:
    """In the first, the machine lacks a package; the second is imported but does not start."""
    with unchanged(cluster), tree.spoilt("requirements.lock", "not-on-this-cluster==1.0\n"):
        said = tree.fails_to_deploy()
    assert "not-on-this-cluster 1.0 (missing)" in said
    assert "install this requirements.lock" in said
    assert "the previous code still runs" in said
    with unchanged(cluster), tree.spoilt(f"{CODE}/cluster/supervisor.py", DEFECT):
        said = tree.fails_to_deploy()
    assert "a defect of the test" in said
    assert "the previous code still runs" in said


def test_a_wrong_address_is_named_with_what_mends_it(cluster: Service, tree: Tree) -> None:
    (unused,) = free_ports(1)
    right = addresses(cluster)
    tree.profile("no-dashboard", **{**right, "HITL_DASHBOARD_URL": f"http://127.0.0.1:{unused}"})
    tree.profile("another", **{**right, "HITL_DASHBOARD_URL": right["HITL_SERVE_URL"]})
    tree.profile("no-service", **{**right, "HITL_SERVE_URL": f"http://127.0.0.1:{unused}"})
    with unchanged(cluster):
        assert f"does not answer at http://127.0.0.1:{unused}" in tree.fails_to_deploy("no-dashboard")
        assert "is not Ray's dashboard" in tree.fails_to_deploy("another")
        assert "there is no profile 'missing'" in tree.fails_to_deploy("missing")
        said = tree.fails_to_deploy("no-service")
    assert "correct HITL_SERVE_URL" in said
    assert "has package" in said  # it is what runs already


def test_koco_that_ends_with_0_though_it_failed_is_told(tree: Tree) -> None:
    """The real koco, with a dashboard that refuses its request."""
    app = FastAPI()
    versions = {"version": "4", "ray_version": version("ray"), "ray_commit": ""}
    told = {
        "/api/version": versions,
        "/api/ray/version": versions,
        "/api/v0/cluster_metadata": {"data": {"pythonVersion": f"{python_minor()}.1"}},
        "/api/serve/applications/": {"applications": {}},
    }

    @app.api_route("/{path:path}", methods=["GET", "PUT"])
    def answer(path: str, request: Request) -> JSONResponse:
        refused = request.method == "PUT" and path.startswith("api/serve")
        return JSONResponse("not today" if refused else told.get(f"/{path}", {}), 500 if refused else 200)

    with loopback(app) as url:
        alone = tree.koco("deploy", "-r", dashboard=url)
        tree.profile("refusing", HITL_DASHBOARD_URL=url)
        said = tree.fails_to_deploy("refusing")
    assert (alone.returncode, "deployment failed" in alone.stdout) == (0, True)
    assert "koco deploy -r failed, and nothing was changed" in said
    assert "not today" in said


class Cutting(socketserver.ThreadingTCPServer):
    """Forwards to a port, and cuts the first connection that sent CUT_BYTES."""

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Forward)
        self.to, self.cuts = port, 0


class Forward(socketserver.BaseRequestHandler):
    server: Cutting
    request: socket.socket

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.server.to)) as other:
            back = threading.Thread(target=self._pass, args=(other, self.request, False))
            back.start()
            self._pass(self.request, other, True)
            back.join()

    def _pass(self, source: socket.socket, target: socket.socket, sending: bool) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
                passed += len(data)
                if sending and passed > CUT_BYTES and not self.server.cuts:
                    self.server.cuts += 1
                    break
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@contextmanager
def cutting(port: int) -> Generator[Cutting]:
    with Cutting(port) as line:
        thread = threading.Thread(target=line.serve_forever)
        thread.start()
        try:
            yield line
        finally:
            line.shutdown()
            thread.join()


def test_over_a_bad_line_a_package_is_sent_again_whole_and_a_secret_that_was_sent_before_counts(
    cluster: Service, tree: Tree
) -> None:
    before = tree.hitl("secrets", "list", "--profile", "vm")
    assert "ANTHROPIC_API_KEY   not set" in before.stdout.splitlines()
    sent = tree.hitl("secrets", "set", "ANTHROPIC_API_KEY", "--profile", "vm", stdin=f"{SECRET}\n")
    assert sent.returncode == 0, sent.stderr
    try:
        assert serving(cluster)["model"] == "https://api.anthropic.com"
        said = deploy_over_a_bad_line(cluster, tree)
        found = serving(cluster)
    finally:
        assert tree.hitl("secrets", "remove", "ANTHROPIC_API_KEY", "--profile", "vm").returncode == 0
    assert "the connection was lost during the upload" in said
    assert (found["version"], found["model"]) == ("0.1.0+over-a-bad-line", "https://api.anthropic.com")
    assert serving(cluster)["model"] == "offline"
    told = [sent.stdout, sent.stderr, said]
    assert not [text for text in told if SECRET in text]
    assert not [path for path in (tree.root, cluster.root / "data" / "logs") if holds(path, SECRET)]


def deploy_over_a_bad_line(cluster: Service, tree: Tree) -> str:
    tree.name_version("0.1.0+over-a-bad-line")
    with cutting(int(cluster.environment["HITL_DASHBOARD_PORT"])) as line:
        url = f"http://127.0.0.1:{line.server_address[1]}"
        tree.profile("bad-line", **{**addresses(cluster), "HITL_DASHBOARD_URL": url})
        said = tree.deploy("bad-line")
    assert line.cuts == 1
    return said


def holds(folder: Path, text: str) -> bool:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return any(text.encode() in path.read_bytes() for path in files)


def test_a_prompt_on_the_cluster_sees_its_sessions(cluster: Service, tree: Tree, second: Second) -> None:
    line = f"print('status', store.get_session('{second.waiting.id}').status, len(ray.nodes()))\n"
    done = tree.hitl("shell", "--profile", "vm", stdin=line)
    assert "status idle 1" in done.stdout, done.stdout + done.stderr
